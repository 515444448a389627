"""Losses of logits and their relations in tests, and what hypothesis draws."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from support.feature_tools import DOUBLE, FLOAT, assert_near, loss_and_grad
from vitkd_fast import reference
from vitkd_fast.functional import mlkd_loss, spearman_loss, wkd_logit_loss


def seeded(seed: int) -> Callable[..., Tensor]:
    """draw(*shape) in float64, from this seed."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=DOUBLE)


def orthogonal(x: Tensor) -> Tensor:
    return torch.linalg.qr(x).Q


# losses of logits [batch, classes], each by one name beside its usual form


def line_of(classes: int, x: Tensor) -> Tensor:
    """Costs: how far apart classes are in their order, at most 1."""
    at = torch.arange(classes, device=x.device, dtype=torch.float64)
    return (at.unsqueeze(1) - at).abs() / classes


def wkd(x: Tensor, t: Tensor, **options: Any) -> Tensor:
    """wkd_logit_loss with labels and a cost that depend on the shape alone."""
    labels = torch.arange(x.shape[0], device=x.device) % x.shape[1]
    wide = DOUBLE if DOUBLE in (x.dtype, t.dtype) else FLOAT
    return wkd_logit_loss(x, t, line_of(x.shape[1], x).to(wide), labels, **options)


def usual_wkd(x: Tensor, t: Tensor) -> Tensor:
    labels = torch.arange(x.shape[0], device=x.device) % x.shape[1]
    return reference.wkd_logit_loss(x, t, line_of(x.shape[1], x), labels).mean()


LOGITS: dict[str, Callable[..., Tensor]] = {
    "mlkd": mlkd_loss,
    "wkd_logit": wkd,
    "spearman": partial(spearman_loss, softness=0.5),
}
USUAL: dict[str, Callable[..., Tensor]] = {
    "mlkd": reference.mlkd_loss,
    "wkd_logit": usual_wkd,
    "spearman": lambda x, t: reference.spearman_loss(x, t, 0.5).mean(),
}
every_logit_loss = pytest.mark.parametrize("name", LOGITS)


def check(name: str, x: Tensor, t: Tensor, roundings: int = 64) -> None:
    """Loss and gradient beside the usual form's in float64."""
    value, grad = loss_and_grad(LOGITS[name], x, t)
    want, want_grad = loss_and_grad(USUAL[name], x.double(), t.double())
    assert value.dtype == (DOUBLE if DOUBLE in (x.dtype, t.dtype) else FLOAT)
    assert grad.dtype == x.dtype
    # 1 - a correlation is a difference of numbers of 1
    assert_near(value, want, roundings, 1.0 if name == "spearman" else 0.0)
    assert_near(grad, want_grad, roundings)
