"""sliced_wasserstein_loss, the unfused PyTorch implementation, differentiated by autograd."""

from __future__ import annotations

from torch import Tensor

from .kd import _accumulator


def sliced_wasserstein_loss(x_s: Tensor, x_t: Tensor, directions: Tensor, p: float = 2.0) -> Tensor:
    """The mean of |a - b|^p over pairs of sorted projections, and over directions, [batch].

    Sets of n and m points, [batch, n, dim] and [batch, m, dim], become one of n * m by repetition.

    Args:
        directions: [dim, projections].
    """
    dtype = _accumulator(x_s)
    n, m = x_s.shape[1], x_t.shape[1]
    s, t = ((x.to(dtype) @ directions.to(dtype)).sort(1).values for x in (x_s, x_t))
    apart = s.repeat_interleave(m, 1) - t.repeat_interleave(n, 1)
    return apart.abs().pow(p).mean((1, 2))
