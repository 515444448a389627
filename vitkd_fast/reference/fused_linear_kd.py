"""fused_linear_kd_loss, the unfused PyTorch implementation, differentiated by autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .kd import kd_fwd


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    logits = x.to(dtype) @ weight.to(dtype).mT
    return logits if bias is None else logits + bias.to(dtype)


def fused_linear_kd_loss(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Tensor | tuple[Tensor, Tensor, Tensor | None],
    *options: Any,
) -> Tensor:
    """kd_fwd's loss of features weight^T + bias, [rows, classes], with `KDOptions`."""
    tensors = [features, weight, bias, *(teacher if isinstance(teacher, tuple) else [teacher])]
    double = any(x is not None and x.dtype == torch.float64 for x in tensors)
    dtype = torch.float64 if double else torch.float32
    if isinstance(teacher, tuple):
        teacher = _logits(*teacher, dtype)
    return kd_fwd(_logits(features, weight, bias, dtype), teacher.to(dtype), *options)[0]
