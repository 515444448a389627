"""at_loss, the unfused PyTorch implementation, differentiated by autograd."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .kd import _accumulator


def at_loss(f_s: Tensor, f_t: Tensor, p: float = 2.0) -> Tensor:
    """|| q_s/||q_s|| - q_t/||q_t|| ||^2 of each sample, [batch]; q = sum over channels of |F|^p.

    Args:
        f_s: [batch, channels, height, width].
        f_t: a feature map, tokens, or a map [batch, tokens], on the student's grid.
    """
    dtype = _accumulator(f_s)
    q_s = f_s.to(dtype).abs().pow(p).mean(1).flatten(1)
    q_t = f_t.to(dtype)
    if q_t.dim() == 4:
        q_t = q_t.abs().pow(p).mean(1).flatten(1)
    elif q_t.dim() == 3:
        q_t = q_t.abs().pow(p).mean(2)
    return (F.normalize(q_s) - F.normalize(q_t)).square().sum(1)
