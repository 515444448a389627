"""mmd_loss, the unfused PyTorch implementation, differentiated by autograd."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .kd import _accumulator


def mmd_loss(f_s: Tensor, f_t: Tensor, bandwidth: float | str = "mean") -> Tensor:
    """mean k(t, t) + mean k(s, s) - 2 mean k(s, t) of each sample, [batch]; k is Gaussian.

    Of channels over positions, of length 1; both are maps [batch, channels, height, width]. The
    bandwidth is a constant: a number, or of the squared distances between the two sides.
    """
    dtype = _accumulator(f_s)
    s, t = (F.normalize(x.to(dtype).flatten(2), dim=2) for x in (f_s, f_t))

    def squared(x: Tensor, y: Tensor) -> Tensor:
        return (x.unsqueeze(2) - y.unsqueeze(1)).square().sum(-1)

    between = squared(s, t).detach().flatten(1)
    if bandwidth == "mean":
        variance = between.mean(1)
    elif bandwidth == "median":
        variance = between.median(1).values
    else:
        variance = between.new_full(between.shape[:1], float(bandwidth) ** 2)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (-squared(x, y) / (2 * variance.view(-1, 1, 1))).exp().mean((1, 2))

    return kernel(t, t) + kernel(s, s) - 2 * kernel(s, t)
