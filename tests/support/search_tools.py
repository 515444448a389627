"""A recipe and a space for searches that take seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vitkd_fast.distill import config
from vitkd_fast.search import space, study

BOUND_MS = 0.09  # of the made-up machine: without the larger students
FLASH = 0.5  # of 18 steps: scores after 5 and 9
SPACE: dict[str, Any] = {
    "students": {
        "v2": {"width": {0.35: "mobilenetv2_035"}, "depth": [1.0, 1.4]},
        "v3": {"width": {0.5: "mobilenetv3_small_050", 1.0: "mobilenetv3_small_100"}},
    },
    "image_size": [16, 24],
    "losses": {
        "kd": {"kd": {"temperature": {"low": 1.0, "high": 8.0, "log": True}}},
        "kd+ce": {"kd": {"temperature": 4.0, "ce_weight": [0.1, 1.0]}},
    },
    "optimizer": {"lr": {"low": 1e-3, "high": 1e-2, "log": True}},
}


def recipe(images: Path, *more: str) -> config.Config:
    """Of the images of `run_tools.write_digits`, with a small teacher that is trained first."""
    given = [
        f"data={{train: {images}/train, val: {images}/val, image_size: 24, crop_pct: 1.0}}",
        "data.batch_size=16",
        "data.workers=0",
        "teacher={model: vit_tiny_patch16_224, epochs: 14}",
        "teacher.optimizer={lr: 4e-3, warmup_epochs: 1}",
        "teacher.options={patch_size: 4, embed_dim: 64, depth: 1, num_heads: 2}",
        "student.model=mobilenetv2_035",
        "losses.kd.temperature=4",
        "augmentation={scale: [0.8, 1.0], hflip: 0.0}",
        "run={epochs: 1, threads: 1, log_every: 1000, eval_every: 2}",
        "int8.enabled=false",
    ]
    return config.load(None, [*given, *more])


def settings(target: Path, **more: Any) -> study.Settings:
    given = {"device": str(target), "latency_ms": BOUND_MS, "flash": FLASH, **more}
    return study.Settings(**given)


def searched(folder: Path, images: Path, target: Path, **more: Any) -> study.Search:
    every = space.Space.model_validate(SPACE)
    return study.Search(recipe(images), every, folder, settings(target, **more), lambda _: None)
