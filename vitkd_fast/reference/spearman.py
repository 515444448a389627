"""spearman_loss, the unfused PyTorch implementation, differentiated by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from .kd import _accumulator


def spearman_loss(student: Tensor, teacher: Tensor, softness: float = 0.1) -> Tensor:
    """1 - correlation of soft ranks and ranks, [batch]; of logits [batch, classes]."""
    z, t = (x.to(_accumulator(student)) for x in (student, teacher))
    z = z / softness
    soft = 0.5 + torch.sigmoid(z.unsqueeze(2) - z.unsqueeze(1)).sum(2)
    above = t.unsqueeze(2) - t.unsqueeze(1)
    above = torch.where(t.unsqueeze(2) == t.unsqueeze(1), 0, above)
    exact = 0.5 + (0.5 + 0.5 * above.sign()).sum(2)
    soft, exact = (x - x.mean(1, keepdim=True) for x in (soft, exact))
    size = soft.norm(dim=1) * exact.norm(dim=1)
    return 1 - torch.where(size == 0, 0, (soft * exact).sum(1) / torch.where(size == 0, 1, size))
