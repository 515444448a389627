"""wkd_logit_loss, the unfused PyTorch implementation, differentiated by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from .kd import _accumulator


def wkd_logit_loss(
    student: Tensor,
    teacher: Tensor,
    cost: Tensor,
    labels: Tensor | None = None,
    temperature: float = 2.0,
    regularization: float = 0.05,
    iterations: int = 10,
) -> Tensor:
    """Transport between the classes but the label's, and its cross-entropy, [batch].

    Each row has a cost matrix of its own, without the label's row and column.
    """
    s, t, cost = (x.to(_accumulator(student)) for x in (student, teacher, cost))
    batch, classes = s.shape
    own = s.new_zeros(batch)
    cost = cost.expand(batch, -1, -1)
    if labels is not None:
        y = labels.unsqueeze(1)
        own = -(t.softmax(1).gather(1, y) * s.log_softmax(1).gather(1, y)).squeeze(1)
        mask = torch.ones_like(s).scatter(1, y, 0).bool()
        pairs = mask.unsqueeze(1) & mask.unsqueeze(2)
        s, t = s[mask].view(batch, -1), t[mask].view(batch, -1)
        cost = cost[pairs].view(batch, classes - 1, classes - 1)
    p, q = ((x / temperature).softmax(1).unsqueeze(2) for x in (s, t))
    kernel = torch.exp(-cost / regularization)
    u = torch.ones_like(p) / classes
    for _ in range(iterations):
        v = q / (kernel.mT @ u)
        u = p / (kernel @ v)
    return (u * kernel * v.mT * cost).sum((1, 2)) + own
