"""A run's trained students as files of the int8 engine, calibrated on images of training."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import int8
from ..int8.calibrate import Calibration
from ..models import Pixels
from . import data
from .config import Config


def images(config: Config, source: Any, count: int, ranks: int = 1) -> Tensor:
    """Images of a source, evenly spread, prepared as in validation: uint8 [N, H, W, 3].

    Raises:
        DataError: naming a file that cannot be read.
    """
    # a copy: the worker reuses its memory
    batches = [
        batch.images.permute(0, 2, 3, 1).clone()
        for batch in data.sample(config, source, count, ranks)
    ]
    return torch.cat(batches)[:count]


def quantize(
    model: nn.Module,
    images: Tensor,
    *,
    pixels: Pixels,
    classes: list[str],
    multilabel: bool,
    calibration: Calibration,
) -> int8.QuantizedModel:
    """Quantises a student, which is in evaluation mode afterwards.

    Raises:
        UnsupportedError: the model holds an operation that the engine lacks; names it.
    """
    return int8.quantize(
        model.eval(),
        images,
        mean=pixels.mean,
        std=pixels.std,
        calibration=calibration,
        classes=classes,
        multilabel=multilabel,
        crop_pct=pixels.crop_pct,
        interpolation=pixels.interpolation,
    )


def save(file: Path, model: nn.Module, images: Tensor, **options: Any) -> bytes:
    """Quantises a student, writes its file, prints its SQNR, and returns the file's bytes.

    Options and errors are those of `quantize`.
    """
    began = time.monotonic()
    made = quantize(model, images, **options)
    made.save(file)
    found, seconds = made.report(), time.monotonic() - began
    print(
        f"{file.parent.name}: int8 in {seconds:.0f} s, calibrated on {found.images} images, "
        f"logit SQNR {found.sqnr:.1f} dB: {file}",
        flush=True,
    )
    for warning in found.warnings:
        print(f"{file.parent.name}: warning: {warning}", flush=True)
    return file.read_bytes()
