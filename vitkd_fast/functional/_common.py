"""What the losses share; importing it registers torch.ops.vitkd_fast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import (
    _ops,  # noqa: F401  registers torch.ops.vitkd_fast
    reference,
)

FLOATING = frozenset((torch.float32, torch.float16, torch.bfloat16, torch.float64))
REDUCTIONS = {"mean": reference.MEAN, "sum": reference.SUM, "none": reference.NONE}


def differentiable_once(backward: Callable) -> Callable:
    """once_differentiable without its cost where it has nothing to do.

    Under create_graph=True the gradient always asks for a gradient, and so raises where one is
    taken; torch's own lets it pass as a constant if the incoming gradient is one.
    """
    checked = once_differentiable(backward)

    def run(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return checked(ctx, grad_loss.detach().requires_grad_())
        return backward(ctx, grad_loss)

    return run
