"""ofa_loss, the unfused PyTorch implementation, differentiated by autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .kd import _accumulator


def ofa_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0, eps: float = 1.0
) -> Tensor:
    """-sum ((p + y)^eps - y) log q of each row, [batch]; y is one-hot, logits [batch, classes]."""
    dtype = _accumulator(student)
    log_q = F.log_softmax(student.to(dtype) / temperature, 1)
    p = F.softmax(teacher.to(dtype) / temperature, 1)
    y = F.one_hot(labels, p.shape[1])
    w = (p + y) ** eps - y
    return torch.where(w == 0, 0.0, -w * log_q).sum(1)
