"""What a candidate costs: on this machine, and by a file of another's layers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from support.search_tools import recipe
from vitkd_fast import int8
from vitkd_fast.distill.config import ConfigError
from vitkd_fast.search import device, training

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(images: Path) -> int8.QuantizedModel:
    return training.quantize(recipe(images, "student.model=mobilenetv3_small_100"))


def test_the_engine_of_this_machine(made: int8.QuantizedModel) -> None:
    found = device.open_device("int8:threads=1").cost(made)
    with int8.load(made.graph) as session:
        assert 0 < session.memory_bytes / 1e6 == found.memory_mb
    assert 0 < found.latency_ms < 1000


def test_layers_that_are_in_the_file_and_others(made: int8.QuantizedModel, target: Path) -> None:
    """The file's layers are of another network, and lie on a line: so does every prediction."""
    opened = device.Target(str(target))
    assert opened.error < 1e-6
    with int8.load(made.graph) as session:
        import numpy as np

        layers = session.profile(np.zeros((1, 24, 24, 3), np.uint8), rounds=1).json()
    expected = sum(1 + layer["macs"] / 20_000 for layer in layers)
    assert 1e3 * opened.cost(made).latency_ms == pytest.approx(expected, rel=0.02)


def test_what_was_measured_stands(target: Path, tmp_path: Path) -> None:
    """A layer of the file keeps its time, whatever line the others lie on; files may be a list."""
    tree = json.loads(target.read_text())
    other = copy.deepcopy(tree)
    other["layers"][3]["us"], other["layers"][3]["macs"] = 1234.0, 7
    file = tmp_path / "both.json"
    file.write_text(json.dumps([tree, other]))
    assert device.Target(str(file)).us(other["layers"][3]) == 1234.0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", "expected int8:threads=N or FILE.json, got gpu"),
        ("int8:threads=0", "threads: expected 1 to 256, got 0"),
        ("int8:cores=2", "expected int8:threads=N"),
        ("int8:threads=x", "expected int8:threads=N"),
        ("missing.json", "missing.json cannot be read"),
    ],
)
def test_no_device(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        device.open_device(name)


@pytest.mark.parametrize("tree", [{}, [], {"layers": []}, {"layers": [{"us": 1}]}, [3], "x"])
def test_no_measurements(tree: Any, tmp_path: Path) -> None:
    (file := tmp_path / "x.json").write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match=r"expected what `vitkd profile --json` prints"):
        device.open_device(str(file))


def test_a_kind_of_layer_that_was_not_measured(
    made: int8.QuantizedModel, target: Path, tmp_path: Path
) -> None:
    tree = json.loads(target.read_text())
    tree["layers"] = [x for x in tree["layers"] if x["kernel"] != "pool"]
    (file := tmp_path / "x.json").write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match=r"holds no layer of kind pool, which .* is"):
        device.Target(str(file)).cost(made)
