"""binary_kd_loss, in the order of its formula."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


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
