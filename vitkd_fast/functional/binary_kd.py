"""binary_kd_loss: classes that are not exclusive, T^2 KL of Bernoullis + w BCE, in one pass.

Everything is read once; loss and gradient are formed together, and nothing of the logits' size but
the gradient is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ._common import (
    REDUCTIONS,
    check_choice,
    check_device,
    check_inputs,
    check_numbers,
    check_tensors,
    differentiable_once,
    wide_dtype,
)

_fwd = torch.ops.vitkd_fast.binary_kd_fwd.default
_fwd_grad = torch.ops.vitkd_fast.binary_kd_fwd_grad.default
_bwd = torch.ops.vitkd_fast.binary_kd_bwd.default
_scale_ = torch.ops.vitkd_fast.kd_scale_.default


class _InForward(torch.autograd.Function):
    """The gradient is formed in the forward, while the logits are in registers."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, options: tuple) -> Tensor:
        loss, ctx.grad = _fwd_grad(student, teacher, *options)
        ctx.save_for_backward(student)
        ctx.constants = teacher, options
        return loss

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        # handed over, not shared: it is scaled in place and then belongs to the caller
        grad, ctx.grad = ctx.grad, None
        if grad is None:  # a second backward, after retain_graph=True
            (student,) = ctx.saved_tensors
            teacher, options = ctx.constants
            _, grad = _fwd_grad(student, teacher, *options)
        _scale_(grad, grad_loss)
        return grad, None, None


class _InBackward(torch.autograd.Function):
    """The gradient is formed in the backward, from the logits."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, *options: Any) -> Tensor:
        ctx.save_for_backward(student)
        ctx.constants = teacher, options
        return _fwd(student, teacher, *options)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        (student,) = ctx.saved_tensors
        teacher, options = ctx.constants
        grad = _bwd(grad_loss, student, teacher, *options)
        return grad, *[None] * (1 + len(options))


def _as_rows(x: Tensor | None, class_dim: int | None) -> Tensor | None:
    """[rows, classes]; without a class dimension one row of all, which need not be copied."""
    if x is None:
        return None
    if class_dim is None:
        return x.reshape(1, -1)
    return x.movedim(class_dim, -1).reshape(-1, x.shape[class_dim])


def _loss_of(student: Any, teacher: Any, options: reference.BinaryKDOptions) -> Tensor:
    if not (student.requires_grad and torch.is_grad_enabled()):
        return _fwd(student, teacher, *options)
    # float16: the incoming gradient, with its loss scale, is applied before the rounding.
    # a compiled graph keeps its inputs anyway, and allows no in-place operation
    late = student.dtype is torch.float16 or options.reduction == reference.NONE
    if late or torch.compiler.is_compiling():
        return _InBackward.apply(student, teacher, *options)
    return _InForward.apply(student, teacher, tuple(options))


def binary_kd_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    bce_weight: float = 0.0,
    mask: Tensor | None = None,
    class_weights: Tensor | None = None,
    class_dim: int = -1,
    reduction: str = "mean",
) -> Tensor:
    """kd_weight * T^2 * KL(Bern(sigmoid(t/T)) || Bern(sigmoid(s/T))) + bce_weight * BCE(s, y).

    Distillation of classes that are not exclusive, such as the labels of an image: each is a
    decision of its own (Hinton, Vinyals and Dean, 2015, arXiv:1503.02531, of two classes each).
    Teacher, labels, mask and weights are constants: one that requires grad is an error, unless
    under torch.no_grad(). The teacher may be an inference-mode tensor; it must keep its values
    until the backward has run. The loss is differentiable once, in reverse mode.

    Args:
        student: logits, any shape with one class or more, float32, float16, bfloat16 or float64.
            The gradient has its dtype; arithmetic is float32 (float64 where either side is).
        teacher: logits of the same shape, of any of these dtypes; -inf and inf are certain.
        labels: y of the same shape, in [0, 1]: multi-hot of any dtype, bool included, or smoothed
            or mixed; needed where bce_weight is not 0.
        temperature: T > 0.
        kd_weight: weight of the distillation term.
        bce_weight: weight of the cross-entropy of labels, at T = 1.
        mask: bool of the same shape; what is False is not looked at, such as an unknown label.
        class_weights: [classes], >= 0, a factor of both terms.
        class_dim: the dimension of the classes: 1 for [B, C, H, W].
        reduction: "mean" over all that is not masked (by the sum of its class weights), "sum", or
            "none": the sum of each row, the shape without class_dim.

    Returns:
        The loss, float32 (float64 for float64). An empty batch, and one that is masked, give 0.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was given; a teacher
            that requires grad.
        RuntimeError: a second derivative, or one in forward mode.
    """
    name = "binary_kd_loss"
    given = {"student": student, "teacher": teacher}
    check_inputs(name, given, "teacher")
    numbers = {"temperature": temperature, "kd_weight": kd_weight, "bce_weight": bce_weight}
    check_numbers(name, numbers)
    check_choice(name, "reduction", reduction, REDUCTIONS)
    shape = student.shape
    dim = len(shape)
    if not -dim <= class_dim < dim:
        raise ValueError(
            f"{name}: class_dim: expected {-dim} to {dim - 1} for student {list(shape)}, got "
            f"{class_dim}"
        )
    classes = shape[class_dim]
    if classes == 0:
        raise ValueError(f"{name}: student: expected one class or more, got {list(shape)}")
    if not temperature > 0:
        raise ValueError(f"{name}: temperature: expected a number > 0, got {temperature}")
    if bce_weight != 0 and labels is None:
        raise ValueError(
            f"{name}: labels: expected numbers in [0, 1] of the shape of student {list(shape)}, as "
            f"bce_weight is {bce_weight}, got None"
        )
    options: dict[str, Any] = {"labels": labels, "mask": mask, "class_weights": class_weights}
    options = {key: x for key, x in options.items() if x is not None}
    check_tensors(name, options)
    for argument, x in {"teacher": teacher, **options}.items():
        wanted = [classes] if argument == "class_weights" else list(shape)
        if list(x.shape) != wanted:
            what = "the shape of student " if argument != "class_weights" else ""
            raise ValueError(f"{name}: {argument}: expected {what}{wanted}, got {list(x.shape)}")
        check_device(name, argument, x, "student", student)
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}: {argument}: expected a constant, as the loss has no derivative there, "
                "got a tensor that requires grad: detach it"
            )
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"{name}: mask: expected bool, got {mask.dtype}")
    # sums over classes and rows alike need to know neither
    apart = class_weights is not None or reduction == "none"
    of = class_dim if apart or not student.is_contiguous() else None
    dtype = wide_dtype(student, teacher)
    if dtype == torch.float64:
        student, teacher = student.double(), teacher.double()
    if labels is not None and labels.dtype not in (torch.bool, torch.uint8):
        labels = labels.to(dtype)
    rows = [_as_rows(x, of) for x in (student, teacher, labels, mask)]
    loss = _loss_of(
        rows[0],
        rows[1],
        reference.BinaryKDOptions(
            temperature,
            kd_weight,
            REDUCTIONS[reduction],
            labels=rows[2] if bce_weight != 0 else None,
            mask=rows[3],
            class_weights=None if class_weights is None else class_weights.to(dtype),
            bce_weight=bce_weight,
        ),
    )
    if reduction != "none":
        return loss
    class_dim %= dim
    return loss.view(shape[:class_dim] + shape[class_dim + 1 :])
