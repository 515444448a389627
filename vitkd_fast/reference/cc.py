"""cc_loss, the unfused PyTorch implementation, differentiated by autograd."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from .kd import _accumulator


def cc_loss(x_s: Tensor, x_t: Tensor, gamma: float = 0.4, order: int = 2) -> Tensor:
    """The squared difference of kernels, mean over pairs; both [batch, dim]."""

    def kernel(x: Tensor) -> Tensor:
        unit = F.normalize(x.to(_accumulator(x_s)))
        cosine = unit @ unit.mT
        terms = [(2 * gamma) ** p / math.factorial(p) * cosine**p for p in range(order + 1)]
        return math.exp(-2 * gamma) * sum(terms[1:], terms[0])

    return (kernel(x_s) - kernel(x_t)).square().sum() / max(x_s.shape[0] ** 2, 1)
