"""Images, and a run on them that many tests read."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from support.cluster_tools import three_machines
from support.run_tools import INT8, arguments
from vitkd_fast import cli
from vitkd_fast.distill import datasets


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits as PNG files, in train/<class>/ and val/<class>/."""
    root = tmp_path_factory.mktemp("images")
    digits = datasets.Digits()
    for i in range(200):
        image, label = digits.read(i)
        folder = root / ("val" if i % 4 == 0 else "train") / digits.classes[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A Ray cluster, to which this process is connected."""
    with three_machines(tmp_path_factory.mktemp("hook")) as made:
        yield made


@pytest.fixture(scope="session")
def run_folder(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "first"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["vitkd", "distill", *arguments(image_folder, folder), *INT8])
        with pytest.raises(SystemExit) as stop:
            cli.main()
    torch.set_num_threads(threads)
    assert not stop.value.code
    return folder
