"""The launchers of the kernel that all row losses but kd_loss share (_row_loss.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import _config
from ._row_loss import _row_loss_kernel
from .kd import _per_row_and_step, _plan_of, _shares_of


def _run(
    student: Tensor, teacher: Tensor, grad_loss: Tensor | None, with_loss: bool, with_grad: bool,
    o: reference.RowLossOptions,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The reduced loss, and the gradients of its sum or along grad_loss; empty if not asked for."""
    wide = torch.float64 if student.dtype == torch.float64 else torch.float32
    shape = student.shape[: o.class_dim] + student.shape[o.class_dim + 1 :]
    rows = student.new_empty(shape, dtype=wide)
    loss = rows if with_loss else None
    grad = torch.empty_like(student) if with_grad else None
    d_temperature = torch.empty_like(rows) if with_grad and o.wants_temperature else None
    if student.numel() == 0:
        for x in (rows, d_temperature):
            if x is not None:
                x.zero_()
    else:
        with torch.cuda.device_of(student):
            of = _shares_of(o, rows)
            plan, logits = _plan_of(
                student, teacher, grad, o, _config.ROW_LOSS_PER_THREAD,
                DIVERGENCE=o.divergence, STANDARDIZE=o.standardize,
            )  # fmt: skip
            _row_loss_kernel[(plan.programs,)](
                loss, d_temperature, *_per_row_and_step(grad_loss), *logits, *plan.strides,
                of.labels, of.labels_b, of.row_weights,
                *_per_row_and_step(o.lam_rows), *_per_row_and_step(o.temperature_rows),
                of.totals, of.mean, of.parts, plan.rows, plan.inner, plan.classes, o.ignore_index,
                o.temperature, o.lam, o.kd_weight, o.ce_weight, o.label_smoothing, o.alpha, o.beta,
                of.share, WHOLE_ROW=plan.tile.whole_row,
                maxnreg=_config.row_loss_registers(plan.tile), **plan.constants,
            )  # fmt: skip
            if logits[0] is not grad:
                grad.copy_(logits[0])
    # a sum in a fixed order
    value = rows if o.reduction == reference.NONE or not with_loss else rows.sum()
    nothing = rows.new_empty(0)
    return (
        value,
        nothing if grad is None else grad,
        nothing if d_temperature is None else d_temperature,
    )


def row_loss_fwd(student: Tensor, teacher: Tensor, *options: Any) -> Tensor:
    """The reduced loss: see reference.row_loss_fwd."""
    loss, _, _ = _run(student, teacher, None, True, False, reference.RowLossOptions(*options))
    return loss


def row_loss_fwd_grad(
    student: Tensor, teacher: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The reduced loss, and the gradients of its sum: see reference.row_loss_fwd_grad."""
    return _run(student, teacher, None, True, True, reference.RowLossOptions(*options))


def row_loss_bwd(
    grad_loss: Tensor, student: Tensor, teacher: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    """The gradients from the logits, which are read again: see reference.row_loss_bwd."""
    o = reference.RowLossOptions(*options)
    _, grad, d_temperature = _run(student, teacher, grad_loss, False, True, o)
    return grad, d_temperature
