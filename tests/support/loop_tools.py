"""Trainers of a small student and a small teacher on digits, whose steps take milliseconds."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.layers import freeze_batch_norm_2d
from torch import nn

from vitkd_fast import models
from vitkd_fast.distill import sources
from vitkd_fast.distill.config import load
from vitkd_fast.distill.loop import Trainer
from vitkd_fast.distill.runtime import Runtime
from vitkd_fast.distill.task import DistillationTask

TINY = [
    "student.model=mobilenetv2_035",
    "student.options={drop_rate: 0.2, drop_path_rate: 0.1}",
    "data.batch_size=16",
    "int8.enabled=false",
    "optimizer={lr: 1e-3, warmup_epochs: 1, accumulate: 2, clip_grad: 1.0, ema_decay: 0.9}",
    "augmentation.mixup=0.2",
    "augmentation.cutmix=1.0",
    "losses.kd={weight: {start: 1, end: 0.5}, temperature: 2, ce_weight: 0.3}",
    "run.max_steps=6",
    "run.log_every=2",
    "run.seeds=[0]",
    "run.baseline=false",
]


@functools.cache
def splits() -> sources.Splits:
    return sources.open_data(load("digits").data)


def student() -> nn.Module:
    torch.manual_seed(0)
    return models.create("mobilenetv2_035", num_classes=10, options={"drop_path_rate": 0.1})


def teacher() -> nn.Module:
    torch.manual_seed(1)
    options = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return models.create("vit_tiny_patch16_224", num_classes=10, image_size=32, options=options)


def trainer(
    folder: Path,
    overrides: list[str] | tuple[str, ...] = (),
    *,
    resume: bool = False,
    rebuild: Mapping[str, Any] | None = None,
    **changed: nn.Module,
) -> Trainer:
    config = load("digits", ["run.epochs=5", *TINY, *overrides])
    pair = {"student": student(), "teacher": teacher()} | changed
    save_model = functools.partial(
        models.save,
        name="mobilenetv2_035",
        options={},
        num_classes=10,
        pixels=models.Pixels.of(student()),
        classes=tuple("0123456789"),
    )
    task = DistillationTask.create(config, pair["student"], pair["teacher"], Runtime.of(config))
    made = Trainer(config, task, splits(), folder, seed=0, save_model=save_model, rebuild=rebuild)
    if resume:
        made.restore()
    return made


PLAIN = [
    "augmentation.mixup=0.0",
    "augmentation.cutmix=0.0",
    "run.log_every=1",
    "run.precision=float32",
    "losses.attention={stride: 8, weight: 0.5}",
]


def frozen() -> nn.Module:
    return freeze_batch_norm_2d(
        models.create("mobilenetv2_035", num_classes=10, options={"drop_path_rate": 0.0})
    )
