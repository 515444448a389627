"""pkt_loss, the unfused PyTorch implementation, differentiated by autograd."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .kd import _accumulator


def pkt_loss(x_s: Tensor, x_t: Tensor, epsilon: float = 1e-7) -> Tensor:
    """KL divergence of rows of (1 + cosine) / 2 over their sums; mean over rows. [batch, dim]."""
    rows = []
    for x in (x_s, x_t):
        unit = F.normalize(x.to(_accumulator(x_s)))
        near = (unit @ unit.mT + 1) / 2
        rows.append(near / near.sum(1, keepdim=True))
    q, p = rows
    return ((p + epsilon) * ((p + epsilon) / (q + epsilon)).log()).sum() / max(p.shape[0], 1)
