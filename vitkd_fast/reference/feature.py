"""feature_loss, the unfused PyTorch implementation, differentiated by autograd.

Both sides are tokens [batch, tokens, channels]; callers permute maps.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .kd import _accumulator


def feature_loss(
    x_s: Tensor, x_t: Tensor, weight: Tensor | None = None, bias: Tensor | None = None,
    kind: str = "mse", beta: float = 1.0,
) -> Tensor:  # fmt: skip
    """The error of x_s weight^T + bias beside x_t, both tokens; its mean, as torch.nn has it."""
    dtype = _accumulator(x_s)
    y, x_t = x_s.to(dtype), x_t.to(dtype)
    if weight is not None:
        y = F.linear(y, weight.to(dtype), None if bias is None else bias.to(dtype))
    if kind == "cosine":
        return (1 - F.cosine_similarity(y, x_t, -1)).mean()
    return F.mse_loss(y, x_t) if kind == "mse" else F.smooth_l1_loss(y, x_t, beta=beta)
