"""dino_loss, pair by pair as in its authors' code, differentiated by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from .kd import _accumulator


def dino_loss(
    student: Tensor,
    teacher: Tensor,
    centre: Tensor | None = None,
    temperature: float = 0.1,
    teacher_temperature: float = 0.04,
) -> Tensor:
    """Mean over pairs i != j and the batch of -sum softmax((t_i - c)/T_t) log softmax(s_j/T).

    student: [views, batch, classes]; teacher: [teacher's views, batch, classes].
    """
    dtype = _accumulator(student)
    s = student.to(dtype) / temperature
    t = teacher.to(dtype)
    p = ((t if centre is None else t - centre) / teacher_temperature).softmax(-1)
    pairs = [
        torch.where(p[i] == 0, 0.0, -p[i] * s[j].log_softmax(-1)).sum(-1).mean()
        for i in range(len(p))
        for j in range(len(s))
        if i != j
    ]
    return torch.stack(pairs).mean()
