"""wkd_feature_loss: the unfused PyTorch form differentiated by autograd, and its operation."""

from __future__ import annotations

import torch
from torch import Tensor

from .at import formed_dtype
from .kd import MEAN, NONE, _accumulator


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


def wkd_feature_fwd_grad(
    f_s: Tensor, f_t: Tensor, mean_weight: float, reduction: int, wants_grad: bool
) -> tuple[Tensor, Tensor]:
    """The loss, reduced (none: [batch]), and the gradient of it (none: of its sum).

    Args:
        f_s: [batch, channels, positions].
        f_t: the same with its own positions, float64 where f_s is.
        wants_grad: else the gradient is empty, [0].
    """
    dtype = _accumulator(f_s)

    def moments(x: Tensor) -> tuple[Tensor, Tensor]:
        several = 1 if x.shape[2] > 1 else 0
        variance, mean = torch.var_mean(x.to(dtype), 2, correction=several, keepdim=True)
        return mean, (variance + 1e-5).sqrt()

    (mean, deviation), (mean_t, deviation_t) = moments(f_s), moments(f_t)
    apart, wider = mean - mean_t, deviation - deviation_t
    rows = (mean_weight * apart * apart + wider * wider).sum((1, 2))
    scale = 1 / max(f_s.shape[0], 1) if reduction == MEAN else 1.0
    loss = rows if reduction == NONE else rows.sum() * scale
    if not wants_grad:
        return loss, f_s.new_empty(0)
    n = f_s.shape[2]
    slope = wider / deviation * (2 * scale / max(n - 1, 1))
    shift = apart * (2 * mean_weight * scale / n)
    grad = torch.empty_like(f_s, dtype=formed_dtype(f_s))
    return loss, torch.add((f_s.to(dtype) - mean).mul_(slope), shift, out=grad)
