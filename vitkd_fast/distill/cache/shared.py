"""What a cache and a run that names it must have in common: weights, images, augmentation."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from ... import models
from ...images import DataError
from .. import augment, sources
from ..config import Config
from .plan import Plan
from .store import CacheError

# what makes the pixels of an augmented image
LIBRARIES = ("torchvision", "timm", "Pillow")


def sections(config: Config, splits: sources.Splits) -> dict[str, dict[str, Any]]:
    """`data`, `augmentation` and `versions` of a `Plan`.

    Raises:
        DataError: the images have no indices.
    """
    if sources.streams(splits.train):
        raise DataError(
            f"data.dataset: {config.data.dataset} streams: its images have no index by which a "
            "cache of a teacher's outputs could be read"
        )
    train = splits.train
    names = [train.name(i) for i in range(len(train))]
    root = os.path.commonpath(names)  # may move, and be given from another folder
    # mixing is not of an image, and a cache has none
    mixing = {"mixup", "cutmix", "mix_prob", "switch_prob", "mix_mode"}
    return {
        "data": {
            "images": len(train),
            "names": _digest(name.removeprefix(root) for name in names),
            "classes": _digest(splits.classes),
            "image_size": config.data.image_size,
            "interpolation": config.data.interpolation,
        },
        "augmentation": config.augmentation.model_dump(exclude=mixing),
        "versions": {
            **{name: version(name) for name in LIBRARIES},
            "augmentation": str(augment.VERSION),
        },
    }


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def weights(model: nn.Module) -> str:
    """The SHA-256 of a model's weights and buffers, by name."""
    digest = hashlib.sha256()
    for name, x in sorted(model.state_dict().items()):
        digest.update(f"{name} {x.dtype} {list(x.shape)}\n".encode())
        digest.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def of_teacher(model: nn.Module) -> dict[str, Any]:
    """What of `Plan.teacher` depends on the model, not on its name."""
    pixels = models.Pixels.of(model)
    return {
        "weights": weights(model),
        "mean": list(pixels.mean),
        "std": list(pixels.std),
        "image_size": models.Origin.of(model).resized,  # None: that of the data
    }


def check(
    plan: Plan, folder: str, config: Config, splits: sources.Splits, teacher: nn.Module | None
) -> None:
    """Raises CacheError, naming each key, where a cache is not one of this run's teacher.

    Without a `teacher`, whose weights are elsewhere, its name counts.
    """
    [section] = config.all_teachers().values()
    elsewhere = {"name": section.model, "image_size": section.image_size}
    of = of_teacher(teacher) if teacher is not None else elsewhere
    found = plan.unlike(sections(config, splits))
    found += [
        line
        for key, value in of.items()
        for line in plan.unlike({"teacher": plan.teacher | {key: value}})
    ]
    if found:
        raise CacheError(f"teacher.cache: {folder} was made with another {'; '.join(found)}")
