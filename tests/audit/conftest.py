"""Models that are trained once for all tests of the audit, and what they say."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from support.audit_tools import Trained

# the extra `audit`
collect_ignore_glob = [] if find_spec("captum") and find_spec("statsmodels") else ["test_*.py"]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="session")
def pair(trained: Trained):
    from vitkd_fast.audit import answers

    return answers.open_pair(str(trained.teacher), str(trained.student))


@pytest.fixture(scope="session")
def images(trained: Trained, pair):
    from vitkd_fast.audit import answers

    return answers.open_images(str(trained.folder), pair)


@pytest.fixture(scope="session")
def said(images, pair):
    """The answers of teacher and student."""
    from vitkd_fast.audit import answers

    return answers.ask(images, pair)
