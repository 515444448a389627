"""binary_kd_loss in the order of its formula, and its operations, with gradients written out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .kd import MEAN, NONE, _accumulator


class BinaryKDOptions(NamedTuple):
    """The arguments of the operations behind the tensors, in the schema's order.

    Student, teacher, labels and mask are [rows, classes]; `labels` bool, uint8 or of the
    accumulation type, as `class_weights` [classes] are; `mask` bool.
    """

    temperature: float
    kd_weight: float
    reduction: int
    labels: Tensor | None = None
    mask: Tensor | None = None
    class_weights: Tensor | None = None
    bce_weight: float = 0.0


def binary_kd_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    bce_weight: float = 0.0,
) -> Tensor:
    """kd_weight * T^2 * KL(Bern(sigmoid(t/T)) || Bern(sigmoid(s/T))) + bce_weight * BCE(s, y).

    Of each element, as `torch.nn.functional.binary_cross_entropy_with_logits` of "none".
    """
    either = student.dtype, teacher.dtype
    dtype = torch.float64 if torch.float64 in either else torch.float32
    s, t = student.to(dtype), teacher.to(dtype)
    u, v = s / temperature, t / temperature
    p = v.sigmoid()
    loss = torch.xlogy(p, p) - p * logsigmoid(u)
    loss = loss + torch.xlogy(1 - p, 1 - p) - (1 - p) * logsigmoid(-u)
    loss = kd_weight * temperature**2 * loss
    if labels is not None:
        y = labels.to(dtype)
        loss = loss - bce_weight * (y * logsigmoid(s) + (1 - y) * logsigmoid(-s))
    return loss


def _finite(x: Tensor) -> Tensor:
    """In place of infinities, which times 0 are NaN."""
    largest = torch.finfo(x.dtype).max
    return x.clamp(-largest, largest)


def _log_larger(x: Tensor) -> Tensor:
    """log of the larger of sigmoid(x) and sigmoid(-x): softplus(x) = max(x, 0) - this."""
    return logsigmoid(x.abs())


def _divergence(u: Tensor, v: Tensor) -> Tensor:
    """KL(Bernoulli(sigmoid(v)) || Bernoulli(sigmoid(u))).

    Of each side's own logarithms, which are small where its probability is near 1: a difference of
    softplus(u) and softplus(v) alone would lose what is smaller than a rounding of the logits.
    """
    up, down = u.clamp(min=0) - v.clamp(min=0), v.clamp(max=0) - u.clamp(max=0)
    return v.neg().sigmoid() * up + v.sigmoid() * down + (_log_larger(v) - _log_larger(u))


def _weighted(x: Tensor, o: BinaryKDOptions) -> Tensor:
    """By weight and mask; what is multiplied by 0 is not looked at: it may be NaN."""
    if o.class_weights is not None:
        x = torch.where(o.class_weights == 0, 0, x * o.class_weights)
    return x if o.mask is None else torch.where(o.mask, x, 0)


def _scale(student: Tensor, o: BinaryKDOptions) -> Tensor | float:
    """Of a mean: 1 / the sum of the weights of what is not masked, 1 where that is 0."""
    if o.reduction != MEAN:
        return 1.0
    if o.mask is None and o.class_weights is None:
        return 1 / max(student.numel(), 1)
    ones = torch.ones(student.shape, dtype=torch.float64, device=student.device)
    total = _weighted(ones, o).sum()
    return torch.where(total > 0, 1 / total, 1.0)


def binary_kd_fwd(student: Tensor, teacher: Tensor, *options: object) -> Tensor:
    """The loss, [] or [rows]."""
    o = BinaryKDOptions(*options)  # type: ignore[arg-type]
    dtype = _accumulator(student)
    s = student.to(dtype)
    loss = torch.zeros_like(s)
    if o.kd_weight != 0:
        u, v = (_finite(x.to(dtype) / o.temperature) for x in (student, teacher))
        loss = o.kd_weight * o.temperature**2 * _divergence(u, v)
    if o.bce_weight != 0:
        assert o.labels is not None
        s, y = _finite(s), o.labels.to(dtype)
        loss = loss + o.bce_weight * (s.clamp(min=0) - y * s - _log_larger(s))
    rows = _weighted(loss, o).sum(1)
    if o.reduction == NONE:
        return rows
    return (rows.sum(dtype=torch.float64) * _scale(student, o)).to(dtype)


def binary_kd_bwd(grad_loss: Tensor, student: Tensor, teacher: Tensor, *options: object) -> Tensor:
    """grad_loss * (kd_weight * T * (sigmoid(u) - sigmoid(v)) + bce_weight * (sigmoid(s) - y))."""
    o = BinaryKDOptions(*options)  # type: ignore[arg-type]
    dtype = _accumulator(student)
    s = student.to(dtype)
    grad = torch.zeros_like(s)
    if o.kd_weight != 0:
        u, v = s / o.temperature, teacher.to(dtype) / o.temperature
        grad = o.kd_weight * o.temperature * (u.sigmoid() - v.sigmoid())
    if o.bce_weight != 0:
        assert o.labels is not None
        grad = grad + o.bce_weight * (s.sigmoid() - o.labels.to(dtype))
    by = (grad_loss * _scale(student, o)).to(dtype)
    grad = _weighted(grad, o) * (by.unsqueeze(-1) if o.reduction == NONE else by)
    return student.new_empty(student.shape).copy_(grad)


def binary_kd_fwd_grad(student: Tensor, teacher: Tensor, *options: object) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient where what comes in is 1."""
    loss = binary_kd_fwd(student, teacher, *options)
    return loss, binary_kd_bwd(torch.ones_like(loss), student, teacher, *options)
