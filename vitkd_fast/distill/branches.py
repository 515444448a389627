"""Branch and merge: specialists on some of the classes, whose weights' mean is one student.

All specialists begin with the weights of one trunk, so that their mean is a model (Wortsman et al.,
"Model soups", 2022; Li et al., "Branch-Train-Merge", 2022); distillation on all classes then makes
it whole. Statistics of batch norms are those of the mean's own maps: they are taken again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

from .. import models
from . import data, sources
from .config import Branch, Config, ConfigError
from .datasets import Part, Share

_IMAGES = 2048  # for the statistics of batch norms


def groups(section: Branch, classes: Sequence[str]) -> list[list[int]]:
    """The classes of each specialist: neighbours, or those that are named.

    Raises:
        ConfigError: a class is unknown, in two groups, or in none; or there are too few.
    """
    given = section.groups
    if isinstance(given, int):
        if given > len(classes):
            raise ConfigError(
                f"branch.groups: expected at most {len(classes)} classes, got {given}"
            )
        return [part.tolist() for part in np.array_split(np.arange(len(classes)), given)]
    named = [str(name) for group in given for name in group]
    if sorted(named) != sorted(classes):
        wrong = sorted({x for x in named if named.count(x) > 1} | set(named) ^ set(classes))
        raise ConfigError(
            f"branch.groups: expected each class in one group, got {wrong[0]!r} not so"
        )
    return [[list(classes).index(str(name)) for name in group] for group in given]


def images_of(splits: sources.Splits, group: Sequence[int]) -> sources.Splits:
    """The images of some classes; those of training keep their places.

    Raises:
        ConfigError: they stream, and have no labels to look at.
    """
    found = []
    for part, kind in ((splits.train, Share), (splits.val, Part)):
        if (known := sources.labels(part)) is None:
            raise ConfigError("branch: the labels of data.dataset are not known without its images")
        found.append(kind(part, [i for i, label in enumerate(known) if label in set(group)]))
    return splits._replace(train=found[0], val=found[1])


def shorter(config: Config, epochs: int) -> Config:
    """The training of a trunk or a specialist, at the student's learning rate."""
    run = config.run.model_copy(update={"epochs": epochs, "max_steps": None})
    optimizer = config.optimizer.model_copy(
        update={"warmup_epochs": min(config.optimizer.warmup_epochs, epochs - 1)}
    )
    int8 = config.int8.model_copy(update={"watch": 0})
    return config.model_copy(update={"run": run, "optimizer": optimizer, "int8": int8})


def merge(specialists: Sequence[nn.Module], config: Config, splits: sources.Splits) -> nn.Module:
    """The mean of the specialists' weights, in training mode."""
    mean = AveragedModel(specialists[0])
    for specialist in specialists:
        mean.update_parameters(specialist)
    merged: Any = mean.module
    predictor = models.predictor(merged)
    device = next(merged.parameters()).device
    update_bn(data.sample(config, splits.train, _IMAGES), predictor.to(device), device)
    return merged.train()
