"""Images, and a run on them that many tests read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.cluster_tools import three_machines
from support.run_tools import INT8, arguments, distill, write_digits


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits as PNG files, in train/<class>/ and val/<class>/."""
    return write_digits(tmp_path_factory.mktemp("images"), 200, 4)


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A Ray cluster, to which this process is connected."""
    with three_machines(tmp_path_factory.mktemp("hook")) as made:
        yield made


@pytest.fixture(scope="session")
def run_folder(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "first"
    distill(*arguments(image_folder, folder), *INT8)
    return folder
