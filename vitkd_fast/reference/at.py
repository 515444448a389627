"""at_loss: the unfused PyTorch implementation differentiated by autograd, and its operation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .kd import MEAN, NONE, _accumulator


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


def formed_dtype(f_s: Tensor) -> torch.dtype:
    """Of a gradient that a loss scale multiplies later: float16 may not hold it before."""
    return torch.float32 if f_s.dtype == torch.float16 else f_s.dtype


def at_fwd_grad(
    f_s: Tensor, f_t: Tensor, p: int, reduction: int, wants_grad: bool
) -> tuple[Tensor, Tensor]:
    """The loss, reduced (none: [batch]), and the gradient of it (none: of its sum).

    Args:
        f_s: [batch, channels, positions].
        f_t: the same with its own channels, float64 where f_s is; or a map [batch, positions] in
            the accumulation type.
        p: 1 or 2.
        wants_grad: else the gradient is empty, [0].
    """
    dtype = _accumulator(f_s)

    def energy(x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x, p, 1, dtype=dtype).pow(p)

    q, t = energy(f_s), f_t if f_t.dim() == 2 else energy(f_t)
    length = torch.linalg.vector_norm(q, dim=1, keepdim=True).clamp_min(1e-12)
    unit = q / length
    apart = unit - F.normalize(t)
    rows = apart.square().sum(1)
    scale = 1 / max(f_s.shape[0], 1) if reduction == MEAN else 1.0
    loss = rows if reduction == NONE else rows.sum() * scale
    if not wants_grad:
        return loss, f_s.new_empty(0)
    # of the length that was divided out, nothing is left
    across = apart - unit * (unit * apart).sum(1, keepdim=True)
    slope = (across * (2 * p * scale) / length).unsqueeze(1)
    grad = torch.empty_like(f_s, dtype=formed_dtype(f_s))
    return loss, torch.mul(f_s if p == 2 else f_s.sign(), slope, out=grad)
