"""nst_loss, the unfused PyTorch implementation, differentiated by autograd."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .kd import _accumulator


def nst_loss(f_s: Tensor, f_t: Tensor) -> Tensor:
    """mean k(t, t) + mean k(s, s) - 2 mean k(s, t) of each sample, [batch]; k(x, y) = (x . y)^2.

    x and y are channels, over positions and of length 1; both are maps [batch, channels, height,
    width].
    """
    dtype = _accumulator(f_s)
    s, t = (F.normalize(x.to(dtype).flatten(2), dim=2) for x in (f_s, f_t))

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x.unsqueeze(1) * y.unsqueeze(2)).sum(-1).square().mean((1, 2))

    return kernel(t, t) + kernel(s, s) - 2 * kernel(s, t)
