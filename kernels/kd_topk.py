"""The launchers of kd_loss_topk's kernels (_kd_topk.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import _config
from ._kd import _kd_total_kernel
from ._kd_topk import _kd_topk_bwd_kernel, _kd_topk_fwd_kernel
from .kd import _contiguous, _per_row_and_step


def _constants(student: Tensor, indices: Tensor, o: reference.KDTopKOptions) -> dict[str, Any]:
    block, num_warps = _config.kd_topk(student.shape[-1], student.element_size())
    return {
        "TAIL": o.tail,
        "HAS_KD": o.kd_weight != 0,
        "HAS_CE": o.ce_weight != 0,
        "TOP": _config._power_of_2(indices.shape[-1]),
        "BLOCK": block,
        "num_warps": num_warps,
        "enable_fp_fusion": False,
        # without a bound, ptxas would rather take a few bytes of stack than a few registers more
        "maxnreg": 255 if student.dtype == torch.float64 else 128,
    }


def _forward(
    student: Tensor, indices: Tensor, values: Tensor, with_grad: bool, o: reference.KDTopKOptions
) -> tuple[Tensor, Tensor]:
    """The reduced loss, and the gradient of its sum or what backward needs."""
    wide = torch.float64 if student.dtype == torch.float64 else torch.float32
    shape, classes = student.shape[:-1], student.shape[-1]
    rows = shape.numel()
    grad = stats = kept = None
    if with_grad:
        grad = torch.empty_like(student)
    else:
        stats = student.new_empty((6, rows), dtype=wide)
    if rows == 0:
        loss = student.new_zeros(shape if o.reduction == reference.NONE else (), dtype=wide)
        return loss, stats if grad is None else grad
    with torch.cuda.device_of(student):
        labels, labels_b = _contiguous(o.labels), _contiguous(o.labels_b)
        row_weights = _contiguous(o.row_weights)
        loss = student.new_empty(shape if o.reduction == reference.NONE else rows, dtype=wide)
        mean = o.reduction == reference.MEAN
        total = mean and (labels is not None or row_weights is not None)
        totals, parts = loss, _config.kd_total_parts(rows) if total else 0
        if parts:
            totals = loss.new_empty(parts)
            _kd_total_kernel[(parts,)](
                totals, labels, labels_b, row_weights, o.ignore_index, rows,
                BLOCK=_config.TOTAL_BLOCK, enable_fp_fusion=False,
            )  # fmt: skip
        if grad is not None:
            kept = grad if grad.is_contiguous() else student.new_empty(student.shape)
        _kd_topk_fwd_kernel[(rows,)](
            loss, stats, kept, student.contiguous(), indices.contiguous(), values.contiguous(),
            _contiguous(o.log_sum_exp), labels, labels_b, row_weights,
            *_per_row_and_step(o.lam_rows), *_per_row_and_step(o.temperature_rows),
            totals, int(total), parts, rows, classes, indices.shape[-1], o.ignore_index,
            o.temperature, o.lam, o.kd_weight, o.ce_weight, o.label_smoothing, 1 / o.temperature,
            1 / rows if mean and not total else 1.0,
            HAS_SMOOTHING=o.ce_weight != 0 and o.label_smoothing != 0,
            **_constants(student, indices, o),
        )  # fmt: skip
        if kept is not grad:
            grad.copy_(kept)
        # a sum in a fixed order
        loss = loss if o.reduction == reference.NONE else loss.sum()
        return loss, stats if grad is None else grad


def kd_topk_fwd(
    student: Tensor, indices: Tensor, values: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    """The reduced loss, and six numbers per row: see reference.kd_topk_fwd."""
    return _forward(student, indices, values, False, reference.KDTopKOptions(*options))


def kd_topk_fwd_grad(
    student: Tensor, indices: Tensor, values: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    """The reduced loss, and the gradient of its sum: see reference.kd_topk_fwd_grad."""
    return _forward(student, indices, values, True, reference.KDTopKOptions(*options))


def kd_topk_bwd(
    grad_loss: Tensor, student: Tensor, indices: Tensor, values: Tensor, stats: Tensor,
    *options: Any,
) -> Tensor:  # fmt: skip
    """The gradient from the logits and six numbers per row: see reference.kd_topk_bwd."""
    o = reference.KDTopKOptions(*options)
    grad = torch.empty_like(student)
    rows, classes = student.shape[:-1].numel(), student.shape[-1]
    if rows == 0:
        return grad
    kept = grad if grad.is_contiguous() else student.new_empty(student.shape)
    with torch.cuda.device_of(student):
        _kd_topk_bwd_kernel[(rows,)](
            *_per_row_and_step(grad_loss), stats, kept, student.contiguous(),
            indices.contiguous(), values.contiguous(), _contiguous(o.log_sum_exp),
            _contiguous(o.labels), _contiguous(o.labels_b),
            *_per_row_and_step(o.lam_rows), *_per_row_and_step(o.temperature_rows),
            rows, classes, indices.shape[-1],
            o.temperature, o.lam, o.kd_weight, o.ce_weight, o.label_smoothing, 1 / o.temperature,
            **_constants(student, indices, o),
        )  # fmt: skip
        if kept is not grad:
            grad.copy_(kept)
    return grad
