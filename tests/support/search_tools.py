"""A recipe and a space for searches that take seconds."""

from __future__ import annotations

from typing import Any

from vitkd_fast.distill import config

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


def recipe(*more: str) -> config.Config:
    """Scikit-learn's digits, and a small teacher that is trained first."""
    given = [
        "data={dataset: digits, holdout: 0.6, image_size: 24, crop_pct: 1.0, workers: 0}",
        "data.batch_size=32",
        "teacher={model: vit_tiny_patch16_224, epochs: 3, optimizer: {lr: 4e-3}}",
        "teacher.options={patch_size: 8, embed_dim: 32, depth: 1, num_heads: 2}",
        "student.model=mobilenetv2_035",
        "losses.kd.temperature=4",
        "augmentation={scale: [0.8, 1.0], hflip: 0.0}",
        "run={epochs: 2, threads: 1, log_every: 1000, eval_every: 2}",
        "int8.enabled=false",
    ]
    return config.load(None, [*given, *more])
