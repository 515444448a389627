"""kd_loss: soft targets and labels, in one pass over the logits."""

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

_kd_fwd = torch.ops.vitkd_fast.kd_fwd.default
_kd_fwd_grad = torch.ops.vitkd_fast.kd_fwd_grad.default
_kd_bwd = torch.ops.vitkd_fast.kd_bwd.default
_kd_scale_ = torch.ops.vitkd_fast.kd_scale_.default

COMPAT = (None, "timm", "deit", "torchdistill", "mdistiller", "hf")

_LABEL_FORMS = (
    "an int64 tensor of class ids, or mixup's (labels_a, labels_b, lam) with lam a float or one "
    "number per row"
)


class _KDInForward(torch.autograd.Function):
    """The gradient is formed in the forward, while the logits are in cache: 2 reads, 1 write."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, options: tuple) -> Tensor:
        loss, ctx.grad = _kd_fwd_grad(student, teacher, *options)
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
            _, grad = _kd_fwd_grad(student, teacher, *options)
        _kd_scale_(grad, grad_loss)
        return grad, None, None


class _KDInBackward(torch.autograd.Function):
    """The gradient is formed in the backward, from the logits and six numbers per row."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, *options: Any) -> Tensor:
        loss, stats = _kd_fwd(student, teacher, *options)
        ctx.save_for_backward(student, stats)
        ctx.constants = teacher, options
        return loss

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        student, stats = ctx.saved_tensors
        teacher, options = ctx.constants
        grad = _kd_bwd(grad_loss, student, teacher, stats, *options)
        return grad, *[None] * (1 + len(options))


def _per_row(
    argument: str, x: Tensor, student: Tensor, rows: torch.Size, dtype: torch.dtype, name: str
) -> Tensor:
    """A 0-dim or rows-shaped tensor argument, in the accumulation type."""
    if x.dim() != 0 and x.shape != rows:
        raise ValueError(
            f"{name}: {argument}: expected a number, a 0-dim tensor or one number per row, "
            f"{list(rows)}, got {list(x.shape)}"
        )
    check_device(name, argument, x, "student", student)
    check_derivatives(name, {argument: x}, {argument})
    return x.to(dtype)


def _check_labels(argument: str, x: Any, student: Tensor, rows: torch.Size, name: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: {argument}: expected {_LABEL_FORMS}, got a {type(x).__name__}")
    if x.dtype != torch.int64 or x.shape != rows:
        dense = " (dense soft labels are not supported)" if x.is_floating_point() else ""
        raise ValueError(
            f"{name}: {argument}: expected {_LABEL_FORMS}, of the rows' shape {list(rows)}, got "
            f"{x.dtype} {list(x.shape)}{dense}"
        )
    check_device(name, argument, x, "student", student)


def _row_options(
    student: Tensor,
    rows: torch.Size,
    labels: Labels | None,
    row_weights: Tensor | None,
    temperature: float | Tensor,
    name: str = "kd_loss",
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """The operations' options that are tensors of the rows, or stand in for one.

    dtype: of the arithmetic, the student's accumulation type unless given.
    """
    wide = dtype or wide_dtype(student)
    temperature_rows = lam_rows = labels_b = None
    lam: float | Tensor = 1.0
    if isinstance(temperature, Tensor):
        temperature_rows = _per_row("temperature", temperature, student, rows, wide, name)
        temperature = 1.0
    elif not temperature > 0:
        raise ValueError(f"{name}: temperature: expected a number > 0, got {temperature}")
    if isinstance(labels, (tuple, list)):
        if len(labels) != 3:
            raise ValueError(
                f"{name}: labels: expected {_LABEL_FORMS}, got a {type(labels).__name__} of "
                f"{len(labels)}"
            )
        labels, labels_b, lam = labels
        _check_labels("labels_b", labels_b, student, rows, name)
        if isinstance(lam, Tensor):
            lam_rows, lam = _per_row("lam", lam, student, rows, wide, name), 1.0
        elif not 0 <= lam <= 1:
            raise ValueError(f"{name}: lam: expected 0 to 1, got {lam}")
    if labels is not None:
        _check_labels("labels", labels, student, rows, name)
    if row_weights is not None:
        if row_weights.shape != rows:
            raise ValueError(
                f"{name}: row_weights: expected one number per row, {list(rows)}, got "
                f"{list(row_weights.shape)}"
            )
        row_weights = _per_row("row_weights", row_weights, student, rows, wide, name)
    return {
        "temperature": temperature, "labels": labels, "labels_b": labels_b, "lam_rows": lam_rows,
        "temperature_rows": temperature_rows, "row_weights": row_weights, "lam": lam,
    }  # fmt: skip


def _check_compat(
    compat: str,
    student: Tensor,
    temperature: float | Tensor,
    row_weights: Tensor | None,
    class_dim: int,
    reduction: str,
) -> None:
    """What no library's loss has is an error: there is no scale of theirs to reproduce."""
    for argument, expected, got, fits in (
        ("student", "[batch, classes]", list(student.shape), student.dim() == 2 and class_dim == 1),
        ("temperature", "a number", "a tensor", not isinstance(temperature, Tensor)),
        ("row_weights", "None", "a tensor", row_weights is None),
        ("reduction", "'mean'", repr(reduction), reduction == "mean"),
    ):
        if not fits:
            raise ValueError(
                f"kd_loss: {argument}: expected {expected} with compat={compat!r}, got {got}"
            )


def _weights_of(
    compat: str | None,
    kd_weight: float,
    ce_weight: float | None,
    temperature: float | Tensor,
    labels: Labels | None,
    classes: int,
) -> tuple[float, float]:
    """The weights of both terms, with which they add up to that library's loss."""
    if ce_weight is None:
        # most have one factor a in (1 - a) CE + a KD; timm's task_loss_weight is 1 unless given
        ce_weight = {None: 0.0, "mdistiller": 0.0, "timm": 1.0}.get(compat, 1 - kd_weight)
    if compat == "deit":  # its sum is divided by the number of logits
        return kd_weight / classes, ce_weight
    if compat == "torchdistill" and (ce_weight == 0 or labels is None):
        assert not isinstance(temperature, Tensor)
        return 1 / temperature**2, 0.0  # it returns the divergence as it is
    return kd_weight, ce_weight


def kd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    labels: Labels | None = None,
    kd_weight: float = 1.0,
    ce_weight: float | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    row_weights: Tensor | None = None,
    class_dim: int = -1,
    reduction: str = "mean",
    compat: str | None = None,
) -> Tensor:
    """kd_weight * T^2 * KL(softmax(teacher/T) || softmax(student/T)) + ce_weight * CE(student, y).

    Knowledge distillation (Hinton, Vinyals and Dean, 2015, arXiv:1503.02531) with its
    cross-entropy on hard or mixed labels, in one fused pass. A row is what is left of the logits'
    shape without `class_dim`. Teacher, labels and weights are constants: one that requires grad is
    an error, unless under torch.no_grad(). The teacher may be an inference-mode tensor; it must
    keep its values until the backward has run. The loss is differentiable once, in reverse mode.

    Args:
        student: logits of 2 classes or more, any shape, float32, float16, bfloat16 or float64. The
            gradient has its dtype; arithmetic is float32 (float64 where either side is float64).
        teacher: logits of the same shape, of any of these dtypes. Classes may be masked by -inf.
        temperature: T > 0: a float, or a 0-dim or rows-shaped tensor (it stays on the device, and
            may change between replays of a CUDA graph; a value <= 0 gives NaN there, an error on
            the CPU).
        labels: int64 class ids of the rows' shape, or mixup's (labels_a, labels_b, lam): the
            target lam * onehot(a) + (1 - lam) * onehot(b), lam a float or a 0-dim or rows-shaped
            tensor. A row is ignored where any of its labels is `ignore_index`, also if
            `ce_weight` is 0. A label out of range is an error on the CPU, a device-side assertion
            in CUDA C++, and a NaN loss for its row in Triton.
        kd_weight: weight of the distillation term.
        ce_weight: weight of the cross-entropy; needs labels unless 0. 0 unless given; with `compat`
            what the library takes: 1 - kd_weight for deit, torchdistill and hf, 1 for timm.
        label_smoothing: in [0, 1], as in torch.nn.functional.cross_entropy.
        ignore_index: the label whose rows are ignored.
        row_weights: scales each row's loss, rows-shaped; a row of weight 0 is not looked at.
        class_dim: the dimension of the classes: 1 for [B, C, H, W].
        reduction: "mean" over the rows that are not ignored (by the sum of their weights, where
            `row_weights` is given), "sum", or "none".
        compat: the scale of another library's loss, for weights tuned there: "timm", "deit",
            "torchdistill", "mdistiller" or "hf" (the guide of transformers). The KD term of "deit"
            is divided by the number of classes; that of "torchdistill" has no factor at all, T^2
            and kd_weight included, where ce_weight is 0 or there are no labels. For logits [batch,
            classes], one number as the temperature, the mean, and no row weights.

    Returns:
        The loss, float32 (float64 for float64): 0-dim, or one number per row for "none". Ignored
        rows, a mean over no rows and an empty batch give 0. +inf where the student is -inf and the
        teacher is finite.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was given; a teacher,
            a temperature or a weight that requires grad; one class.
        RuntimeError: a label out of range or a temperature <= 0 inside a tensor, on the CPU; a
            second derivative, or one in forward mode.
    """
    given = {"student": student, "teacher": teacher}
    check_tensors("kd_loss", given)
    numbers = {"kd_weight": kd_weight, "ce_weight": ce_weight, "label_smoothing": label_smoothing}
    check_numbers("kd_loss", numbers)
    check_choice("kd_loss", "compat", compat, COMPAT)
    check_derivatives("kd_loss", given, {"teacher"})
    check_floating("kd_loss", given)
    shape, dtype = student.shape, student.dtype
    dim = len(shape)
    if not -dim <= class_dim < dim:
        raise ValueError(
            f"kd_loss: class_dim: expected {-dim} to {dim - 1} for student {list(shape)}, got "
            f"{class_dim}"
        )
    class_dim %= dim
    if teacher.shape != shape:
        classes = class_dim < teacher.dim() and teacher.shape[class_dim] != shape[class_dim]
        raise ValueError(
            f"kd_loss: teacher: expected the {'classes' if classes else 'shape'} of student "
            f"{list(shape)}, got {list(teacher.shape)}"
        )
    if shape[class_dim] < 2:
        raise ValueError(
            f"kd_loss: student: expected 2 classes or more, got {list(shape)}. The softmax of one "
            "class is always 1: for a binary head of one logit use torch.nn.functional."
            "binary_cross_entropy_with_logits(student, teacher.sigmoid())"
        )
    check_choice("kd_loss", "reduction", reduction, REDUCTIONS)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"kd_loss: label_smoothing: expected 0 to 1, got {label_smoothing}")
    if dtype is not teacher.dtype and torch.float64 in (dtype, teacher.dtype):
        student, teacher = student.double(), teacher.double()

    by_row: dict[str, Any] = {"temperature": temperature}
    if isinstance(temperature, Tensor) or labels is not None or row_weights is not None:
        rows = shape[:class_dim] + shape[class_dim + 1 :]
        by_row = _row_options(student, rows, labels, row_weights, temperature)
    elif not temperature > 0:
        raise ValueError(f"kd_loss: temperature: expected a number > 0, got {temperature}")
    if compat:
        _check_compat(compat, student, temperature, row_weights, class_dim, reduction)
    kd_weight, ce_weight = _weights_of(
        compat, kd_weight, ce_weight, temperature, labels, shape[class_dim]
    )
    if ce_weight != 0 and labels is None:
        raise ValueError(
            f"kd_loss: labels: expected {_LABEL_FORMS}, as ce_weight is {ce_weight}, got None"
        )
    options = reference.KDOptions(
        kd_weight=kd_weight, class_dim=class_dim, reduction=REDUCTIONS[reduction],
        ce_weight=ce_weight, label_smoothing=label_smoothing, ignore_index=ignore_index, **by_row,
    )  # fmt: skip
    if not (student.requires_grad and torch.is_grad_enabled()):
        return _kd_fwd(student, teacher, *options)[0]
    # float16: the incoming gradient, with its loss scale, is applied before the rounding.
    # a compiled graph keeps its inputs anyway, and allows no in-place operation
    if dtype is torch.float16 or reduction == "none" or torch.compiler.is_compiling():
        return _KDInBackward.apply(student, teacher, *options)
    return _KDInForward.apply(student, teacher, options)
