"""The images and the arguments of a run that takes seconds."""

import io
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from PIL import Image

from vitkd_fast import cli
from vitkd_fast.distill import datasets


def write_digits(root: Path, count: int, every: int) -> Path:
    """Digits as PNG files in train/<class>/, and one of `every` in val/<class>/."""
    digits = datasets.Digits()
    for i in range(count):
        image, label = digits.read(i)
        folder = root / ("val" if i % every == 0 else "train") / digits.classes[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i}.png")
    return root


def arguments(image_folder: Path, folder: Path) -> list[str]:
    return [
        f"data.train={image_folder}/train",
        f"data.val={image_folder}/val",
        "data.image_size=32",
        "data.batch_size=16",
        "data.workers=0",
        "teacher.model=vit_tiny_patch16_224",
        "teacher.options={patch_size: 8, embed_dim: 32, depth: 1, num_heads: 2}",
        "teacher.epochs=8",  # enough to be better than guessing
        "teacher.optimizer={lr: 4e-3, warmup_epochs: 1}",
        "augmentation.scale=[0.8, 1.0]",
        "augmentation.hflip=0.0",
        "student.model=mobilenetv2_035",
        "losses.kd.temperature=4",
        "run.epochs=1",
        "run.seeds=[0, 1]",
        f"run.folder={folder}",
        "int8.enabled=false",
    ]


def distill(*arguments: str) -> str:
    """What `vitkd distill` prints, in this process and one thread, for fixtures."""
    threads, said = torch.get_num_threads(), io.StringIO()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said):
        patch.setattr(sys, "argv", ["vitkd", "distill", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
    torch.set_num_threads(threads)
    assert not stop.value.code
    return said.getvalue()


INT8 = ["int8.enabled=true", "int8.calibration_images=32"]
