"""kd_loss: temperature-softmax KL with cross-entropy, row by row."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

MEAN, SUM, NONE = 1, 2, 0  # values of the `reduction` options


class KDOptions(NamedTuple):
    """The arguments of the operations behind the tensors, in the schema's order.

    `temperature` and `lam` hold for all rows, unless a tensor brings one per row.
    """

    temperature: float
    kd_weight: float
    class_dim: int
    reduction: int
    labels: Tensor | None = None
    labels_b: Tensor | None = None
    lam_rows: Tensor | None = None
    temperature_rows: Tensor | None = None
    row_weights: Tensor | None = None
    lam: float = 1.0
    ce_weight: float = 0.0
    label_smoothing: float = 0.0
    ignore_index: int = -100


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _last(x: Tensor, class_dim: int) -> Tensor:
    """[*rows, classes] in the accumulation type."""
    return x.movedim(class_dim, -1).to(_accumulator(x))


def _row_values(x: Tensor | None, value: float, like: Tensor) -> Tensor:
    """One number per row, [*rows]."""
    if x is None:
        return like.new_full(like.shape[:-1], value)
    return x.to(like.dtype).expand(like.shape[:-1])


def _target(o: KDOptions, like: Tensor) -> Tensor:
    """(1 - smoothing) (lam onehot(a) + (1 - lam) onehot(b)) + smoothing / V, [*rows, V]."""
    if o.labels is None:
        return torch.zeros_like(like)
    classes = torch.arange(like.shape[-1], device=like.device)
    hard = (o.labels.unsqueeze(-1) == classes).to(like.dtype)
    if o.labels_b is not None:
        other = (o.labels_b.unsqueeze(-1) == classes).to(like.dtype)
        lam = _row_values(o.lam_rows, o.lam, like).unsqueeze(-1)
        hard = lam * hard + (1 - lam) * other
    return (1 - o.label_smoothing) * hard + o.label_smoothing / like.shape[-1]


def _shares(o: KDOptions, like: Tensor) -> Tensor:
    """What each row's loss is multiplied by before the sum, [*rows]; 0 where it is ignored."""
    share = _row_values(o.row_weights, 1.0, like)
    for ids in (o.labels, o.labels_b):
        if ids is not None:
            share = torch.where(ids == o.ignore_index, torch.zeros_like(share), share)
    if o.reduction == MEAN:
        total = share.sum()
        share = torch.where(total == 0, torch.zeros_like(share), share / total)
    return share


def _rows(student: Tensor, teacher: Tensor, o: KDOptions) -> Tensor:
    """kd_weight * T^2 * sum p (log p - log q) + o.ce_weight * -sum y log q1 of each row, [*rows].

    0 * log 0 is 0 for p and y; a student of -inf where the teacher is finite gives +inf.
    """
    s, t = _last(student, o.class_dim), _last(teacher, o.class_dim)
    temp = _row_values(o.temperature_rows, o.temperature, s)
    loss = s.new_zeros(s.shape[:-1])
    if o.kd_weight != 0:
        log_q = torch.log_softmax(s / temp.unsqueeze(-1), -1)
        log_p = torch.log_softmax(t / temp.unsqueeze(-1), -1)
        terms = log_p.exp() * (log_p - log_q)
        terms = torch.where(torch.isneginf(s), torch.full_like(terms, torch.inf), terms)
        terms = torch.where(torch.isneginf(t), torch.zeros_like(terms), terms)
        loss = loss + o.kd_weight * temp * temp * terms.sum(-1)
    if o.ce_weight != 0:
        y = _target(o, s)
        terms = torch.where(y == 0, torch.zeros_like(y), -y * torch.log_softmax(s, -1))
        loss = loss + o.ce_weight * terms.sum(-1)
    return loss


def kd_fwd(student: Tensor, teacher: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """The reduced loss, and the [6, rows] numbers from which backward forms the gradient.

    These are max s, max t, log sum exp((s - max s)/T), the same of t, the same of s at T = 1, and
    the row's share of the loss (0 where it is ignored).
    """
    o = KDOptions(*options)
    s, t = _last(student, o.class_dim), _last(teacher, o.class_dim)
    share = _shares(o, s)
    rows = _rows(student, teacher, o)
    rows = torch.where(share == 0, torch.zeros_like(rows), share * rows)
    temp = _row_values(o.temperature_rows, o.temperature, s).unsqueeze(-1)
    max_s, max_t = s.amax(-1, keepdim=True), t.amax(-1, keepdim=True)
    stats = torch.stack([
        max_s.flatten(),
        max_t.flatten(),
        ((s - max_s) / temp).logsumexp(-1).flatten(),
        ((t - max_t) / temp).logsumexp(-1).flatten(),
        (s - max_s).logsumexp(-1).flatten(),
        share.flatten(),
    ])  # fmt: skip
    return (rows.clone() if o.reduction == NONE else rows.sum()), stats


def kd_bwd(
    grad_loss: Tensor, student: Tensor, teacher: Tensor, stats: Tensor, *options: Any
) -> Tensor:
    """grad_loss * share * (kd_weight * T * (q - p) + ce_weight * (q1 - y)), like the student."""
    o = KDOptions(*options)
    s, t = _last(student, o.class_dim), _last(teacher, o.class_dim)
    temp = _row_values(o.temperature_rows, o.temperature, s).unsqueeze(-1)
    grad = torch.zeros_like(s)
    if o.kd_weight != 0:
        grad = o.kd_weight * temp * (torch.softmax(s / temp, -1) - torch.softmax(t / temp, -1))
    if o.ce_weight != 0:
        y = _target(o, s)
        grad = grad + o.ce_weight * (torch.softmax(s, -1) - y)
    share = stats[5].view(s.shape[:-1]).unsqueeze(-1)
    scale = share * grad_loss.to(s.dtype).expand(s.shape[:-1]).unsqueeze(-1)
    grad = torch.where(share == 0, torch.zeros_like(grad), scale * grad)
    return torch.empty_like(student).copy_(grad.movedim(-1, o.class_dim))


def kd_fwd_grad(student: Tensor, teacher: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """The reduced loss, and the gradient of its sum, formed while the logits are at hand."""
    loss, stats = kd_fwd(student, teacher, *options)
    return loss, kd_bwd(torch.ones_like(loss), student, teacher, stats, *options)


def kd_scale_(grad: Tensor, factor: Tensor) -> None:
    """grad *= factor, in place; factor is 0-dim and in the accumulation type."""
    grad.mul_(factor)
