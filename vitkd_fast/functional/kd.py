"""kd_loss: soft targets and labels, in one pass over the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ._common import check_choice, differentiable_once
from ._rows import Labels, checked, row_loss

_kd_fwd = torch.ops.vitkd_fast.kd_fwd.default
_kd_fwd_grad = torch.ops.vitkd_fast.kd_fwd_grad.default
_kd_bwd = torch.ops.vitkd_fast.kd_bwd.default
_kd_scale_ = torch.ops.vitkd_fast.kd_scale_.default

COMPAT = (None, "timm", "deit", "torchdistill", "mdistiller", "hf")


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


def _ce_weight(
    compat: str | None, kd_weight: float, ce_weight: float | None, labels: Labels | None
) -> float:
    """What a library gives the cross-entropy."""
    if compat == "torchdistill" and labels is None:
        return 0.0
    if ce_weight is not None:
        return ce_weight
    # most have one factor a in (1 - a) CE + a KD; timm's task_loss_weight is 1 unless given
    return {None: 0.0, "mdistiller": 0.0, "timm": 1.0}.get(compat, 1 - kd_weight)


def _kd_weight(
    compat: str, student: Tensor, kd_weight: float, ce_weight: float, standardize: bool,
    *, temperature: float | Tensor, row_weights: Tensor | None, class_dim: int, reduction: str,
    **_: Any,
) -> float:  # fmt: skip
    """The factor of T^2 KL in a library's loss; what none of them has is an error."""
    for argument, expected, got, fits in (
        (
            "student",
            "[batch, classes]",
            list(student.shape),
            student.dim() == 2 and class_dim % 2 == 1,
        ),
        ("temperature", "a number", "a tensor", not isinstance(temperature, Tensor)),
        ("row_weights", "None", "a tensor", row_weights is None),
        ("reduction", "'mean'", repr(reduction), reduction == "mean"),
        ("standardize", "False", "True", not standardize),
    ):
        if not fits:
            raise ValueError(
                f"kd_loss: {argument}: expected {expected} with compat={compat!r}, got {got}"
            )
    assert not isinstance(temperature, Tensor)
    if compat == "deit":  # its sum is divided by the number of logits
        return kd_weight / student.shape[1]
    if compat == "torchdistill" and ce_weight == 0:  # it returns the divergence as it is
        return 1 / temperature**2
    return kd_weight


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
    standardize: bool = False,
    compat: str | None = None,
) -> Tensor:
    """kd_weight * T^2 * KL(softmax(teacher/T) || softmax(student/T)) + ce_weight * CE(student, y).

    Knowledge distillation (Hinton, Vinyals and Dean, 2015, arXiv:1503.02531) with its
    cross-entropy on hard or mixed labels, in one fused pass. A row is what is left of the logits'
    shape without `class_dim`. Teacher, labels and weights are constants: one that requires grad is
    an error, unless under torch.no_grad(). The teacher may be an inference-mode tensor; it must
    keep its values until the backward has run. The loss is differentiable once, in reverse mode,
    in the student and in a temperature that is a tensor.

    Args:
        student: logits of 2 classes or more, any shape, float32, float16, bfloat16 or float64. The
            gradient has its dtype; arithmetic is float32 (float64 where either side is float64).
        teacher: logits of the same shape, of any of these dtypes. Classes may be masked by -inf.
        temperature: T > 0: a float, or a 0-dim or rows-shaped tensor (it stays on the device, and
            may change between replays of a CUDA graph; a value <= 0 gives NaN there, an error on
            the CPU). One that requires grad is learned: see `nn.LearnableTemperature`.
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
        standardize: both logits become (x - mean) / (std + 1e-7) of their row, std with V - 1,
            before they are divided by T (Sun et al., 2024, arXiv:2403.01427, with T = 2 and
            kd_weight = 9). The cross-entropy is that of the logits as they are.
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
        ValueError, TypeError: naming the argument, what was expected and what was given; a teacher
            or a weight that requires grad; one class.
        RuntimeError: a label out of range or a temperature <= 0 inside a tensor, on the CPU; a
            second derivative, or one in forward mode.
    """
    check_choice("kd_loss", "compat", compat, COMPAT)
    ce_weight = _ce_weight(compat, kd_weight, ce_weight, labels)
    rows: dict[str, Any] = {
        "temperature": temperature, "labels": labels, "kd_weight": kd_weight,
        "ce_weight": ce_weight, "label_smoothing": label_smoothing, "ignore_index": ignore_index,
        "row_weights": row_weights, "class_dim": class_dim, "reduction": reduction,
    }  # fmt: skip
    learned = isinstance(temperature, Tensor) and temperature.requires_grad
    if (standardize or learned) and not compat:
        return row_loss("kd_loss", "kl", student, teacher, standardize=standardize, **rows)
    student, teacher, shared = checked("kd_loss", student, teacher, **rows)
    if compat:
        shared["kd_weight"] = _kd_weight(compat, student, standardize=standardize, **rows)
    options = reference.KDOptions(**shared)
    if not (student.requires_grad and torch.is_grad_enabled()):
        return _kd_fwd(student, teacher, *options)[0]
    # float16: the incoming gradient, with its loss scale, is applied before the rounding.
    # a compiled graph keeps its inputs anyway, and allows no in-place operation
    if student.dtype is torch.float16 or reduction == "none" or torch.compiler.is_compiling():
        return _KDInBackward.apply(student, teacher, *options)
    return _KDInForward.apply(student, teacher, options)
