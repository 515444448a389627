"""wkd_feature_loss, the unfused PyTorch implementation, differentiated by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from .kd import _accumulator


def wkd_feature_loss(
    f_s: Tensor, f_t: Tensor, cells: int = 1, mean_weight: float = 2.0, eps: float = 1e-5
) -> Tensor:
    """Squared differences of means and deviations, [batch]; of maps with the same channels.

    cells * cells parts of a map, those of adaptive pooling, have moments of their own.
    """
    dtype = _accumulator(f_s)

    def moments(x: Tensor, i: int, j: int) -> tuple[Tensor, Tensor]:
        h, w = x.shape[2:]
        a, b = i * h // cells, -(-(i + 1) * h // cells)
        c, d = j * w // cells, -(-(j + 1) * w // cells)
        part = x[:, :, a:b, c:d].to(dtype).flatten(2)
        variance = part.var(2, correction=1 if part.shape[2] > 1 else 0)
        return part.mean(2), torch.sqrt(variance + eps)

    loss = f_s.new_zeros(f_s.shape[0], dtype=dtype)
    for i in range(cells):
        for j in range(cells):
            (mu_s, sigma_s), (mu_t, sigma_t) = moments(f_s, i, j), moments(f_t, i, j)
            loss = loss + mean_weight * (mu_s - mu_t).square().sum(1)
            loss = loss + (sigma_s - sigma_t).square().sum(1)
    return loss / cells**2
