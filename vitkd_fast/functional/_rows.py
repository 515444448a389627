"""What the losses of rows of logits share: labels, weights and temperatures of the rows."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from .. import reference
from ._common import (
    REDUCTIONS,
    check_choice,
    check_derivatives,
    check_device,
    check_floating,
    check_numbers,
    check_tensors,
    differentiable_once,
    wide_dtype,
)

Labels: TypeAlias = Tensor | tuple[Tensor, Tensor, float | Tensor]

_fwd = torch.ops.vitkd_fast.row_loss_fwd.default
_fwd_grad = torch.ops.vitkd_fast.row_loss_fwd_grad.default
_bwd = torch.ops.vitkd_fast.row_loss_bwd.default
_scale_ = torch.ops.vitkd_fast.kd_scale_.default

_LABEL_FORMS = (
    "an int64 tensor of class ids, or mixup's (labels_a, labels_b, lam) with lam a float or one "
    "number per row"
)


def _per_row(
    loss: str, name: str, x: Tensor, student: Tensor, rows: torch.Size, dtype: torch.dtype,
    constant: bool = True,
) -> Tensor:  # fmt: skip
    """A 0-dim or rows-shaped tensor argument, in the accumulation type."""
    if x.dim() != 0 and x.shape != rows:
        raise ValueError(
            f"{loss}: {name}: expected a number, a 0-dim tensor or one number per row, "
            f"{list(rows)}, got {list(x.shape)}"
        )
    check_device(loss, name, x, "student", student)
    check_derivatives(loss, {name: x}, {name} if constant else ())
    return x.to(dtype)


def _check_labels(loss: str, name: str, x: Any, student: Tensor, rows: torch.Size) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{loss}: {name}: expected {_LABEL_FORMS}, got a {type(x).__name__}")
    if x.dtype != torch.int64 or x.shape != rows:
        dense = " (dense soft labels are not supported)" if x.is_floating_point() else ""
        raise ValueError(
            f"{loss}: {name}: expected {_LABEL_FORMS}, of the rows' shape {list(rows)}, got "
            f"{x.dtype} {list(x.shape)}{dense}"
        )
    check_device(loss, name, x, "student", student)


def row_options(
    loss: str,
    student: Tensor,
    rows: torch.Size,
    labels: Labels | None,
    row_weights: Tensor | None,
    temperature: float | Tensor,
    *,
    constant: bool = True,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """The operations' options that are tensors of the rows, or stand in for one.

    Args:
        constant: a temperature that requires grad is an error.
        dtype: of the arithmetic, the student's accumulation type unless given.
    """
    wide = dtype or wide_dtype(student)
    temperature_rows = lam_rows = labels_b = None
    lam: float | Tensor = 1.0
    if isinstance(temperature, Tensor):
        temperature_rows = _per_row(loss, "temperature", temperature, student, rows, wide, constant)
        temperature = 1.0
    elif not temperature > 0:
        raise ValueError(f"{loss}: temperature: expected a number > 0, got {temperature}")
    if isinstance(labels, (tuple, list)):
        if len(labels) != 3:
            raise ValueError(
                f"{loss}: labels: expected {_LABEL_FORMS}, got a {type(labels).__name__} of "
                f"{len(labels)}"
            )
        labels, labels_b, lam = labels
        _check_labels(loss, "labels_b", labels_b, student, rows)
        if isinstance(lam, Tensor):
            lam_rows, lam = _per_row(loss, "lam", lam, student, rows, wide), 1.0
        elif not 0 <= lam <= 1:
            raise ValueError(f"{loss}: lam: expected 0 to 1, got {lam}")
    if labels is not None:
        _check_labels(loss, "labels", labels, student, rows)
    if row_weights is not None:
        check_tensors(loss, {"row_weights": row_weights})
        if row_weights.shape != rows:
            raise ValueError(
                f"{loss}: row_weights: expected one number per row, {list(rows)}, got "
                f"{list(row_weights.shape)}"
            )
        row_weights = _per_row(loss, "row_weights", row_weights, student, rows, wide)
    return {
        "temperature": temperature, "labels": labels, "labels_b": labels_b, "lam_rows": lam_rows,
        "temperature_rows": temperature_rows, "row_weights": row_weights, "lam": lam,
    }  # fmt: skip


def checked(
    loss: str,
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float | Tensor,
    labels: Labels | None,
    kd_weight: float,
    ce_weight: float,
    label_smoothing: float,
    ignore_index: int,
    row_weights: Tensor | None,
    class_dim: int,
    reduction: str,
    constant: bool = True,
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Student and teacher in compatible types, and the options that all losses of rows have.

    Args:
        constant: a temperature that requires grad is an error.
    """
    given = {"student": student, "teacher": teacher}
    check_tensors(loss, given)
    numbers = {"kd_weight": kd_weight, "ce_weight": ce_weight, "label_smoothing": label_smoothing}
    check_numbers(loss, numbers)
    check_derivatives(loss, given, {"teacher"})
    check_floating(loss, given)
    shape, dtype = student.shape, student.dtype
    dim = len(shape)
    if not -dim <= class_dim < dim:
        raise ValueError(
            f"{loss}: class_dim: expected {-dim} to {dim - 1} for student {list(shape)}, got "
            f"{class_dim}"
        )
    class_dim %= dim
    if teacher.shape != shape:
        classes = class_dim < teacher.dim() and teacher.shape[class_dim] != shape[class_dim]
        raise ValueError(
            f"{loss}: teacher: expected the {'classes' if classes else 'shape'} of student "
            f"{list(shape)}, got {list(teacher.shape)}"
        )
    if shape[class_dim] < 2:
        raise ValueError(
            f"{loss}: student: expected 2 classes or more, got {list(shape)}. The softmax of one "
            "class is always 1: for a binary head of one logit use torch.nn.functional."
            "binary_cross_entropy_with_logits(student, teacher.sigmoid())"
        )
    check_choice(loss, "reduction", reduction, REDUCTIONS)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{loss}: label_smoothing: expected 0 to 1, got {label_smoothing}")
    if ce_weight != 0 and labels is None:
        raise ValueError(
            f"{loss}: labels: expected {_LABEL_FORMS}, as ce_weight is {ce_weight}, got None"
        )
    if dtype is not teacher.dtype and torch.float64 in (dtype, teacher.dtype):
        student, teacher = student.double(), teacher.double()

    by_row: dict[str, Any] = {"temperature": temperature}
    if isinstance(temperature, Tensor) or labels is not None or row_weights is not None:
        rows = shape[:class_dim] + shape[class_dim + 1 :]
        by_row = row_options(
            loss, student, rows, labels, row_weights, temperature, constant=constant
        )
    elif not temperature > 0:
        raise ValueError(f"{loss}: temperature: expected a number > 0, got {temperature}")
    return student, teacher, {
        "kd_weight": kd_weight, "class_dim": class_dim, "reduction": REDUCTIONS[reduction],
        "ce_weight": ce_weight, "label_smoothing": label_smoothing, "ignore_index": ignore_index,
        **by_row,
    }  # fmt: skip


class _InForward(torch.autograd.Function):
    """The gradient is formed in the forward, while the logits are in cache."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, temperature: Tensor | None, options: tuple
    ) -> Tensor:
        value, ctx.grad, ctx.d_temperature = _fwd_grad(student, teacher, *options)
        ctx.save_for_backward(student)
        ctx.constants = teacher, temperature, options
        return value

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        teacher, temperature, options = ctx.constants
        # handed over, not shared: it is scaled in place and then belongs to the caller
        grad, ctx.grad = ctx.grad, None
        if grad is None:  # a second backward, after retain_graph=True
            (student,) = ctx.saved_tensors
            _, grad, _ = _fwd_grad(student, teacher, *options)
        _scale_(grad, grad_loss)
        return grad, None, _like(temperature, ctx.d_temperature * grad_loss), None


class _InBackward(torch.autograd.Function):
    """The gradient is formed in the backward, from the logits."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, temperature: Tensor | None, *options: Any
    ) -> Tensor:
        ctx.save_for_backward(student, temperature)
        ctx.constants = teacher, options
        return _fwd(student, teacher, *options)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        student, temperature = ctx.saved_tensors
        teacher, options = ctx.constants
        grad, d_temperature = _bwd(grad_loss, student, teacher, *options)
        return grad, None, _like(temperature, d_temperature), *[None] * len(options)


def _like(temperature: Tensor | None, rows: Tensor) -> Tensor | None:
    """The gradient of a temperature, which is one for all rows or one for each."""
    if temperature is None:
        return None
    return rows if temperature.dim() else rows.sum()


def row_loss(
    loss: str,
    divergence: str,
    student: Tensor,
    teacher: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    standardize: bool = False,
    **rows: Any,
) -> Tensor:
    """A divergence of reference.DIVERGENCES for the function `loss`; `rows`: as `checked` takes."""
    temperature = rows["temperature"]
    check_numbers(loss, {"alpha": alpha, "beta": beta})
    student, teacher, shared = checked(loss, student, teacher, constant=False, **rows)
    grad_mode = torch.is_grad_enabled()
    if not (isinstance(temperature, Tensor) and temperature.requires_grad and grad_mode):
        temperature = None
    else:
        temperature = shared["temperature_rows"]
        shared["temperature_rows"] = temperature.detach()
    options = reference.RowLossOptions(
        divergence=reference.DIVERGENCES[divergence], alpha=alpha, beta=beta,
        standardize=standardize, wants_temperature=temperature is not None, **shared,
    )  # fmt: skip
    if not grad_mode or not (student.requires_grad or temperature is not None):
        return _fwd(student, teacher, *options)
    # as kd_loss chooses
    in_backward = student.dtype is torch.float16 or shared["reduction"] == reference.NONE
    if in_backward or torch.compiler.is_compiling():
        return _InBackward.apply(student, teacher, temperature, *options)
    return _InForward.apply(student, teacher, temperature, options)
