"""What the losses share; importing it registers torch.ops.vitkd_fast."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Container, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import (
    _ops,  # noqa: F401  registers torch.ops.vitkd_fast
    reference,
)
from ._precision import exactly as exactly

FLOATING = frozenset((torch.float32, torch.float16, torch.bfloat16, torch.float64))
REDUCTIONS = {"mean": reference.MEAN, "sum": reference.SUM, "none": reference.NONE}

_Function = TypeVar("_Function", bound=Callable)


class _Once(torch.autograd.Function):
    """A gradient, which has none: asking for it raises."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *of: Tensor) -> Tensor:
        return grad.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            "vitkd_fast: a loss is differentiable once, and a derivative of its gradient is asked "
            "for (attention_map_loss and relation_loss have it in float64)"
        )


def constant_when_compiled(function: _Function) -> _Function:
    """torch.compiler.assume_constant_result without an import of dynamo, which takes seconds."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def differentiable_once(backward: Callable) -> Callable:
    """torch's once_differentiable, which would let a second derivative be 0.

    That one raises only where the incoming gradient requires grad, and only if the engine has to
    pass by on its way, which leads from the gradient to no input. Here the gradient depends on what
    the forward saved, of which one is its input.
    """

    def run(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        of = [x for x in (*grads, *ctx.saved_tensors) if x is not None and x.requires_grad]
        with torch.no_grad():
            found = backward(ctx, *grads)
        return tuple(None if x is None else _Once.apply(x, *of) for x in found)

    return run


def check_tensors(name: str, given: Mapping[str, Any]) -> None:
    """Each argument is one tensor: a list of features, or a model's output, is not."""
    for argument, x in given.items():
        if isinstance(x, Tensor):
            continue
        expected, got = "one tensor", f"a {type(x).__name__}"
        if hasattr(x, "logits"):
            expected += ", such as its logits"
        elif isinstance(x, (list, tuple)):
            expected += ", so that the loss is called for each pair"
            got += f" of {len(x)}"
            if not x:
                got += (
                    " (attentions of transformers' models are an empty tuple under sdpa; load the "
                    "model with attn_implementation='eager')"
                )
        raise TypeError(f"{name}: {argument}: expected {expected}, got {got}")


def check_numbers(name: str, given: Mapping[str, Any]) -> None:
    """Options that are numbers: a tensor would lose its gradient, and synchronise its device."""
    for argument, x in given.items():
        if isinstance(x, Tensor):
            raise TypeError(
                f"{name}: {argument}: expected a number, as the loss has no derivative there, got "
                "a tensor"
            )


def check_derivatives(
    name: str, given: Mapping[str, Tensor], constants: Container[str], forward_mode: bool = False
) -> None:
    """Raises where a derivative is asked for that the loss does not have, which would be 0.

    Args:
        constants: arguments in which it has none.
        forward_mode: the others have one in forward mode, too.
    """
    if torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        # a compiler does not see there that something requires grad
        raise RuntimeError(
            f"{name}: expected backward() or torch.autograd.grad, got torch.func inside "
            "torch.compile, which would give a derivative of 0"
        )
    dual = forward_ad._current_level >= 0
    for argument, x in given.items():
        constant = argument in constants
        if constant and x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}: {argument}: expected a constant, as the loss has no derivative there, "
                "got a tensor that requires grad: detach it, or run the teacher under "
                "torch.no_grad()"
            )
        if dual and (constant or not forward_mode):
            if forward_ad.unpack_dual(x).tangent is not None:
                raise RuntimeError(
                    f"{name}: {argument}: expected backward() or torch.autograd.grad, as the loss "
                    "has no derivative in forward mode there, got a tangent"
                )


def wide_dtype(*given: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in given) else torch.float32


def entropy(log_p: Tensor) -> Tensor:
    """-sum p log p of each row, of log p [.., classes].

    Without numbers below the smallest normal one, which are slow, and nothing.
    """
    log_p = log_p.clamp(min=0.9 * math.log(torch.finfo(log_p.dtype).tiny))
    return -log_p.mul_(log_p.exp()).sum(-1)


def check_inputs(name: str, given: dict[str, Any], teacher: str) -> None:
    """The tensors by themselves; the first is the student's."""
    check_tensors(name, given)
    check_derivatives(name, given, {teacher})
    check_floating(name, given)


def check_floating(name: str, given: Mapping[str, Tensor]) -> None:
    """Floating point, and all on one device."""
    first, student = next(iter(given.items()))
    for argument, x in given.items():
        if x.dtype not in FLOATING:
            raise TypeError(
                f"{name}: {argument}: expected float32, float16, bfloat16 or float64, got {x.dtype}"
            )
        check_device(name, argument, x, first, student)


def check_device(name: str, argument: str, x: Tensor, other: str, y: Tensor) -> None:
    if x.device != y.device:
        raise ValueError(
            f"{name}: {argument}: expected the device of {other}, {y.device}, got {x.device}"
        )


def check_choice(name: str, argument: str, x: Any, choices: Collection[Any]) -> None:
    if x not in choices:
        *some, last = map(str, choices)
        raise ValueError(f"{name}: {argument}: expected {', '.join(some)} or {last}, got {x!r}")


def check_batch(name: str, f_s: Tensor, f_t: Tensor, s: str = "f_s", t: str = "f_t") -> None:
    if f_s.shape[0] != f_t.shape[0]:
        raise ValueError(
            f"{name}: {t}: expected the batch of {s} {list(f_s.shape)}, got {list(f_t.shape)}"
        )


def check_logits(name: str, student: Tensor, teacher: Tensor, least: int = 1) -> None:
    """Both [batch, classes], of so many classes at least."""
    if student.dim() != 2 or student.shape[1] < least:
        raise ValueError(
            f"{name}: student: expected [batch, classes] of {least} or more, got "
            f"{list(student.shape)}"
        )
    if teacher.shape != student.shape:
        raise ValueError(
            f"{name}: teacher: expected the shape of student {list(student.shape)}, got "
            f"{list(teacher.shape)}"
        )
