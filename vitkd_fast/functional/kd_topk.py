"""kd_loss_topk: soft targets of which only the top classes were kept, in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ._common import (
    FLOATING,
    REDUCTIONS,
    check_choice,
    check_derivatives,
    check_device,
    check_floating,
    check_numbers,
    check_tensors,
    differentiable_once,
)
from ._rows import _LABEL_FORMS, Labels, _scale_, row_options

_kd_topk_fwd = torch.ops.vitkd_fast.kd_topk_fwd.default
_kd_topk_fwd_grad = torch.ops.vitkd_fast.kd_topk_fwd_grad.default
_kd_topk_bwd = torch.ops.vitkd_fast.kd_topk_bwd.default

TAILS = {
    "smooth": reference.TAIL_SMOOTH,
    "zero": reference.TAIL_ZERO,
    "renorm": reference.TAIL_RENORM,
    "bin": reference.TAIL_BIN,
}


class _InForward(torch.autograd.Function):
    """The gradient is formed in the forward, while the logits are in cache: 1 read, 1 write."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: tuple, options: tuple) -> Tensor:
        loss, ctx.grad = _kd_topk_fwd_grad(student, *teacher, *options)
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
            _, grad = _kd_topk_fwd_grad(student, *teacher, *options)
        _scale_(grad, grad_loss)
        return grad, None, None


class _InBackward(torch.autograd.Function):
    """The gradient is formed in the backward, from the logits and six numbers per row."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, indices: Tensor, values: Tensor, *options: Any
    ) -> Tensor:
        loss, stats = _kd_topk_fwd(student, indices, values, *options)
        ctx.save_for_backward(student, stats)
        ctx.constants = indices, values, options
        return loss

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        student, stats = ctx.saved_tensors
        indices, values, options = ctx.constants
        grad = _kd_topk_bwd(grad_loss, student, indices, values, stats, *options)
        return grad, *[None] * (2 + len(options))


def _check_teacher(
    name: str, student: Tensor, indices: Tensor, values: Tensor, log_sum_exp: Tensor | None
) -> None:
    rows, classes = list(student.shape[:-1]), student.shape[-1]
    if indices.dtype not in (torch.int16, torch.int32, torch.int64):
        raise TypeError(f"{name}: indices: expected int16, int32 or int64, got {indices.dtype}")
    for argument, x in {"indices": indices, "values": values}.items():
        if x.dim() != student.dim() or list(x.shape[:-1]) != rows:
            raise ValueError(
                f"{name}: {argument}: expected the student's rows and K classes, {[*rows, 'K']}, "
                f"got {list(x.shape)}"
            )
        check_device(name, argument, x, "student", student)
    if not 1 <= indices.shape[-1] <= classes:
        raise ValueError(
            f"{name}: indices: expected 1 to {classes} classes per row, got {list(indices.shape)}"
        )
    if values.shape != indices.shape:
        raise ValueError(
            f"{name}: values: expected the shape of indices {list(indices.shape)}, got "
            f"{list(values.shape)}"
        )
    if log_sum_exp is not None:
        if list(log_sum_exp.shape) != rows:
            raise ValueError(
                f"{name}: log_sum_exp: expected one number per row, {rows}, got "
                f"{list(log_sum_exp.shape)}"
            )
        if log_sum_exp.dtype not in FLOATING:
            raise TypeError(
                f"{name}: log_sum_exp: expected float32, float16, bfloat16 or float64, got "
                f"{log_sum_exp.dtype}"
            )
        check_device(name, "log_sum_exp", log_sum_exp, "student", student)


def kd_loss_topk(
    student: Tensor,
    indices: Tensor,
    values: Tensor,
    *,
    log_sum_exp: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    tail: str = "smooth",
    labels: Labels | None = None,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    row_weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """kd_weight * T^2 * KL(p || softmax(student/T)) + ce_weight * CE(student, y), p of K classes.

    `kd_loss` for a teacher of which only K classes per row were kept, as caches of its outputs do
    (FKD, arXiv:2112.01528; TinyViT, arXiv:2207.10666): its probabilities p are never made dense.
    With K = V it is `kd_loss`, whatever the tail. The student is read once and its gradient
    written once; what is beside that is O(K) per row. What the K classes leave of 1, r = 1 - sum
    p, is by `tail`:

    - "smooth": spread evenly over the V - K others (TinyViT, FKD's "smoothed").
    - "zero": left out, as where a dense tensor is filled with zeros (MobileCLIP's code): a row
      counts by the mass that was kept, its least loss is below 0.
    - "renorm": none, as p is divided by its sum. Probabilities of the others go to 0.
    - "bin": the probability of one more class, whose student is the sum of the others: these are
      told how much they are together, not how it is spread.

    The student's sum over the others is the log-sum-exp of them alone, never 1 minus the K. A p
    that sums to more than 1, rounded, is divided by its sum.

    Args:
        student: logits, [*rows, V], float32, float16, bfloat16 or float64. The gradient has its
            dtype; arithmetic is float32 (float64 for float64).
        indices: the teacher's classes, [*rows, K], int16, int32 or int64, each once in a row.
        values: of these classes, [*rows, K], in a floating dtype: logits where `log_sum_exp` is
            given, else probabilities at T = 1. -inf (probability 0) masks a class.
        log_sum_exp: of all V logits of the teacher *at this temperature*, logsumexp(teacher/T),
            [*rows]; p = exp(values/T - log_sum_exp). "renorm" does not depend on it. Keep it in
            float32: an error of it is one of all p.
        temperature: T > 0: a float, or a 0-dim or rows-shaped tensor. Without `log_sum_exp` it is
            1: probabilities at T = 1 say nothing about the others at another T. Of probabilities
            that were taken at T, give T * log(p) for values and zeros for log_sum_exp.
        tail: "smooth", "zero", "renorm" or "bin".
        labels, kd_weight, ce_weight, label_smoothing, ignore_index, row_weights, reduction: as for
            `kd_loss`.

    Returns:
        The loss, float32 (float64 for float64): 0-dim, or one number per row for "none".

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was given; a teacher,
            a temperature or a weight that requires grad.
        RuntimeError: on the CPU, a class out of range or twice in a row, a probability outside [0,
            1], a label out of range, a temperature <= 0 inside a tensor; a second derivative, or
            one in forward mode. On a GPU, a class or label out of range is a device-side assertion
            in CUDA C++, and a NaN loss for its row in Triton; of classes that are there twice the
            result is not defined.
    """
    name = "kd_loss_topk"
    given = {"student": student, "values": values}
    check_tensors(name, given | {"indices": indices})
    numbers = {"kd_weight": kd_weight, "ce_weight": ce_weight, "label_smoothing": label_smoothing}
    check_numbers(name, numbers)
    constants = {"values": values}
    if log_sum_exp is not None:
        check_tensors(name, {"log_sum_exp": log_sum_exp})
        constants["log_sum_exp"] = log_sum_exp
    check_derivatives(name, {"student": student} | constants, constants)
    check_floating(name, given)
    if student.dim() < 1 or student.shape[-1] < 2:
        raise ValueError(
            f"{name}: student: expected [*rows, classes] with 2 classes or more, got "
            f"{list(student.shape)}"
        )
    _check_teacher(name, student, indices, values, log_sum_exp)
    check_choice(name, "tail", tail, TAILS)
    check_choice(name, "reduction", reduction, REDUCTIONS)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{name}: label_smoothing: expected 0 to 1, got {label_smoothing}")
    if ce_weight != 0 and labels is None:
        raise ValueError(
            f"{name}: labels: expected {_LABEL_FORMS}, as ce_weight is {ce_weight}, got None"
        )
    if log_sum_exp is None:
        if isinstance(temperature, Tensor) or temperature != 1:
            got = "a tensor" if isinstance(temperature, Tensor) else temperature
            raise ValueError(
                f"{name}: temperature: expected 1, as values are probabilities without "
                f"log_sum_exp, which have no other temperature, got {got}"
            )
    else:
        wide = torch.float64 if student.dtype == torch.float64 else torch.float32
        log_sum_exp = log_sum_exp.to(wide)
    by_row = row_options(name, student, student.shape[:-1], labels, row_weights, temperature)
    options = reference.KDTopKOptions(
        kd_weight=kd_weight, tail=TAILS[tail], reduction=REDUCTIONS[reduction],
        log_sum_exp=log_sum_exp, ce_weight=ce_weight, label_smoothing=label_smoothing,
        ignore_index=ignore_index, **by_row,
    )  # fmt: skip
    if not (student.requires_grad and torch.is_grad_enabled()):
        return _kd_topk_fwd(student, indices, values, *options)[0]
    # as in kd_loss: float16's loss scale is applied before the rounding
    formed_later = student.dtype is torch.float16 or reduction == "none"
    if formed_later or torch.compiler.is_compiling():
        return _InBackward.apply(student, indices, values, *options)
    return _InForward.apply(student, (indices, values), options)
