"""A device for searches that take seconds."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from support.run_tools import write_digits
from support.search_tools import recipe
from vitkd_fast import int8

collect_ignore_glob = [] if find_spec("optuna") else ["test_*.py"]  # the extra `search`


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("images"), 900, 3)


@pytest.fixture(scope="session")
def target(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers of a real network, on a machine that takes 1 us for each and for 20,000 MACs."""
    from vitkd_fast.search import training

    made = training.quantize(recipe(images, "student.model=mobilenetv3_small_050"))
    with int8.load(made.graph) as session:
        layers = session.profile(np.zeros((1, 24, 24, 3), np.uint8), rounds=1).json()
    for layer in layers:
        layer["us"] = 1 + layer["macs"] / 20_000
    file = tmp_path_factory.mktemp("target") / "slow.json"
    file.write_text(json.dumps({"version": 1, "session": "", "layers": layers}))
    return file
