"""sp_loss, the unfused PyTorch implementation, differentiated by autograd."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .kd import _accumulator


def sp_loss(x_s: Tensor, x_t: Tensor) -> Tensor:
    """|| N(x_s x_s^T) - N(x_t x_t^T) ||_F^2 / batch^2, N: rows of length 1; both [batch, dim]."""
    dtype = _accumulator(x_s)
    s, t = (F.normalize(x.to(dtype) @ x.to(dtype).mT) for x in (x_s, x_t))
    return (s - t).square().sum() / max(s.numel(), 1)
