"""What features f are worth without a classifier of their own: neighbours, and a linear one.

k-NN: the class with the largest sum of exp(cos(f, g) / 0.07) over the 20 nearest g of a bank, as in
DINO (Caron et al., 2021, arXiv:2104.14294). Linear probe: W f + b by logistic regression on frozen
features.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .data import Batch
from .evaluate import Predictor

NEIGHBOURS, TEMPERATURE = 20, 0.07  # DINO's
_ROWS = 1024  # of a product with a bank


class Features(NamedTuple):
    """Of images, of all ranks together, on the CPU."""

    x: Tensor  # [N, features] float32
    labels: Tensor  # [N] int64; -1 without labels


class Head(NamedTuple):
    """A linear classifier of features."""

    weight: Tensor  # [classes, features] float32
    bias: Tensor  # [classes]


@torch.inference_mode()
def features(predictor: Predictor, batches: Iterable[Batch], device: Any) -> Features:
    """What a model without a classifier returns; each rank passes its share of the images.

    Raises:
        ValueError: there is no image, or a feature is NaN or Inf.
    """
    parts = []
    for batch in batches:
        found = torch.as_tensor(predictor(batch.images.to(device))).float().flatten(1).cpu()
        # a copy: the worker reuses its memory
        parts.append((found, batch.labels.clone()))
    if dist.is_available() and dist.is_initialized():
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, parts)
        parts = [part for rank in gathered for part in rank]
    if not parts:
        raise ValueError("features: batches: expected at least one image, got none")
    made = Features(*(torch.cat(x) for x in zip(*parts, strict=True)))
    if bad := int((~made.x.isfinite().all(1)).sum()):
        raise ValueError(
            f"features: predictor: expected finite features, got NaN or Inf for {bad} of "
            f"{len(made.x)} images"
        )
    return made


def nearest(bank: Features, x: Tensor, classes: int, k: int = NEIGHBOURS) -> Tensor:
    """The class of each row of x [N, features] by its k nearest of the bank, [N] int64."""
    known = F.normalize(bank.x, dim=1)
    found = []
    for rows in x.split(_ROWS):
        cosines, places = (F.normalize(rows, dim=1) @ known.T).topk(min(k, len(known)))
        votes = cosines.new_zeros(len(rows), classes)
        # less the largest, which changes no order: exp(1 / 0.07) is 1.6e6
        weights = ((cosines - cosines[:, :1]) / TEMPERATURE).exp()
        found.append(votes.scatter_add_(1, bank.labels[places], weights).argmax(1))
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64)


def knn(bank: Features, scored: Features, classes: int) -> float:
    """Top-1 of the nearest neighbours in a bank."""
    return float((nearest(bank, scored.x, classes) == scored.labels).double().mean())


def fit(bank: Features, classes: int) -> Head:
    """The linear classifier by logistic regression (lbfgs, C = 1) on standardised features.

    Args:
        bank: with at least one image of each class.
        classes: 2 or more.
    """
    from sklearn.linear_model import LogisticRegression

    x = bank.x.double().numpy()
    mean, scale = x.mean(0), x.std(0)
    scale[scale == 0] = 1  # a feature that is the same everywhere
    model = LogisticRegression(max_iter=1000).fit((x - mean) / scale, bank.labels.numpy())
    weight, bias = model.coef_, model.intercept_
    if classes == 2:  # scikit-learn has one row: the second class against the first
        weight, bias = np.concatenate([0 * weight, weight]), np.append(0, bias)
    weight = weight / scale
    bias = bias - weight @ mean
    return Head(torch.from_numpy(weight).float(), torch.from_numpy(bias).float())
