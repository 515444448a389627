"""A device for searches that take seconds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from support.run_tools import write_digits
from vitkd_fast import int8

if TYPE_CHECKING:
    from vitkd_fast.search import study

collect_ignore_glob = [] if find_spec("optuna") else ["test_*.py"]  # the extra `search`


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("images"), 450, 3)


@pytest.fixture(scope="session")
def target(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers of a real network, on a machine that takes 1 us for each and for 20,000 MACs."""
    from support.search_tools import recipe
    from vitkd_fast.search import training

    made = training.quantize(recipe(images, "student.model=mobilenetv3_small_050"))
    with int8.load(made.graph) as session:
        layers = session.profile(np.zeros((1, 24, 24, 3), np.uint8), rounds=1).json()
    for layer in layers:
        layer["us"] = 1 + layer["macs"] / 20_000
    file = tmp_path_factory.mktemp("target") / "slow.json"
    file.write_text(json.dumps({"version": 1, "session": "", "layers": layers}))
    return file


@pytest.fixture(scope="session")
def done(images: Path, target: Path, tmp_path_factory: pytest.TempPathFactory) -> study.Search:
    """Two trained trials; the lock is given back, so that copies and the folder can be taken up."""
    from support.search_tools import searched

    folder = tmp_path_factory.mktemp("done") / "search"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with searched(folder, images, target) as found:
        found.run(2)
    torch.set_num_threads(threads)
    return found


@pytest.fixture
def copied(
    done: study.Search, images: Path, target: Path, tmp_path: Path
) -> Iterator[Callable[..., study.Search]]:
    """A new study that has the teacher and the caches of `done`."""
    from support.search_tools import searched

    made: list[study.Search] = []

    def copy(name: str = "copy", **more: Any) -> study.Search:
        folder = tmp_path / name
        folder.mkdir()
        for part in done.folder.iterdir():
            if part.name == "teachers" or part.name.startswith(("cache", "costs")):
                (shutil.copytree if part.is_dir() else shutil.copyfile)(part, folder / part.name)
        made.append(searched(folder, images, target, **more))
        return made[-1]

    yield copy
    for found in made:
        found.lock.close()
