"""The launchers of kd_loss's kernels (_kd.py): how rows are dealt out, and what is allocated."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _config
from ._kd import _kd_bwd_kernel, _kd_fwd_kernel, _kd_scale_kernel, _kd_total_kernel

_NONE, _MEAN = 0, 1  # values of `reduction`


def _merged(sizes: Sequence[int], strides: Sequence[int]) -> int | None:
    """The stride of neighbouring dimensions seen as one, or None where there is no such stride."""
    size, stride = 1, 0
    for n, step in zip(reversed(sizes), reversed(strides), strict=True):
        if size == 1:
            size, stride = n, step if n > 1 else 0
        elif n > 1:
            if step != size * stride:
                return None
            size *= n
    return stride


class _Plan(NamedTuple):
    """How the rows of a call are dealt out to programs."""

    copied: tuple[bool, ...]  # of gradient, student and teacher: no such strides, take a copy
    strides: tuple[int, ...]  # (outer, row, class) of each
    rows: int
    inner: int  # rows of a slice
    classes: int
    programs: int
    tile: _config.KdTile
    constants: dict[str, Any]


@lru_cache(maxsize=4096)
def _plan(
    shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...], class_dim: int, itemsize: int,
    has_kd: bool, has_ce: bool, has_smoothing: bool,
) -> _Plan:  # fmt: skip
    before, classes, behind = shape[:class_dim], shape[class_dim], shape[class_dim + 1 :]
    rows, inner = prod(before) * prod(behind), prod(behind)
    copied, views = [], []
    for of_x in strides:
        outer = _merged(before, of_x[:class_dim])
        row = _merged(behind, of_x[class_dim + 1 :])
        copied.append(outer is None or row is None)
        if outer is None or row is None:
            outer, row, step = classes * inner, 1, inner
        else:
            step = of_x[class_dim]
        # with nothing behind the classes, all rows are one slice
        views.append((outer, row, step) if inner > 1 else (0, outer, step))
    inner = inner if inner > 1 else rows
    # the gradient's layout decides: it mostly is the student's, too
    _, row, step = views[0]
    bits = 16 | classes
    for outer, row_step, _ in views:
        bits |= outer | row_step
    tile = _config.kd(inner, classes, itemsize, bits & -bits, row == 1 and step != 1)
    constants = {
        "HAS_KD": has_kd,
        "HAS_CE": has_ce,
        "HAS_SMOOTHING": has_smoothing,
        "STEPS": tile.steps,
        "BLOCK_ROWS": tile.block_rows,
        "LANES": tile.lanes,
        "VEC": tile.vec,
        "num_warps": tile.num_warps,
        "enable_fp_fusion": False,
    }
    programs = rows // inner * -(-inner // tile.block_rows)
    return _Plan(tuple(copied), sum(views, ()), rows, inner, classes, programs, tile, constants)


def _plan_of(
    student: Tensor, teacher: Tensor, grad: Tensor | None, class_dim: int,
    kd_weight: float, ce_weight: float, smoothing: float,
) -> tuple[_Plan, list[Tensor | None]]:  # fmt: skip
    """The plan, and [grad, student, teacher] or copies of them with the plan's strides."""
    tensors = [grad, student, teacher]
    plan = _plan(
        student.shape,
        tuple((student if x is None else x).stride() for x in tensors),
        class_dim,
        max(student.element_size(), teacher.element_size()),
        kd_weight != 0,
        ce_weight != 0,
        ce_weight != 0 and smoothing != 0,
    )
    if any(plan.copied):
        for i, x in enumerate(tensors):
            if x is not None and plan.copied[i]:
                tensors[i] = x.contiguous()
    return plan, tensors


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _per_row_and_step(x: Tensor | None) -> tuple[Tensor | None, int]:
    """A tensor of one number, or of one per row, and the step from row to row."""
    if x is None or not any(x.stride()):
        return x, 0
    return x.contiguous(), 1


def _forward(
    student: Tensor, teacher: Tensor, with_grad: bool, temperature: float, kd_weight: float,
    class_dim: int, reduction: int, labels: Tensor | None, labels_b: Tensor | None,
    lam_rows: Tensor | None, temperature_rows: Tensor | None, row_weights: Tensor | None,
    lam: float, ce_weight: float, label_smoothing: float, ignore_index: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The reduced loss, and the gradient of its sum or what backward needs."""
    wide = torch.float64 if student.dtype == torch.float64 else torch.float32
    shape = student.shape[:class_dim] + student.shape[class_dim + 1 :]
    rows = prod(shape)
    grad = stats = None
    if with_grad:
        grad = torch.empty_like(student)
    else:
        stats = student.new_empty((6, rows), dtype=wide)
    kept = stats if grad is None else grad
    if student.numel() == 0:
        return student.new_zeros(shape if reduction == _NONE else (), dtype=wide), kept
    with torch.cuda.device_of(student):
        labels, labels_b = _contiguous(labels), _contiguous(labels_b)
        row_weights = _contiguous(row_weights)
        loss = student.new_empty(shape if reduction == _NONE else rows, dtype=wide)
        total = reduction == _MEAN and (labels is not None or row_weights is not None)
        totals, parts = loss, _config.kd_total_parts(rows) if total else 0
        if parts:
            totals = loss.new_empty(parts)
            _kd_total_kernel[(parts,)](
                totals, labels, labels_b, row_weights, ignore_index, rows,
                BLOCK=_config.TOTAL_BLOCK, enable_fp_fusion=False,
            )  # fmt: skip
        plan, logits = _plan_of(
            student, teacher, grad, class_dim, kd_weight, ce_weight, label_smoothing
        )
        _kd_fwd_kernel[(plan.programs,)](
            loss, stats, *logits, *plan.strides, labels, labels_b, row_weights,
            *_per_row_and_step(lam_rows), *_per_row_and_step(temperature_rows),
            totals, int(total), parts, rows, plan.inner, plan.classes, ignore_index,
            temperature, lam, kd_weight, ce_weight, label_smoothing,
            1 / rows if reduction == _MEAN and not total else 1.0,
            WHOLE_ROW=plan.tile.whole_row, **plan.constants,
        )  # fmt: skip
        if logits[0] is not grad:
            grad.copy_(logits[0])
        # a sum in a fixed order
        return loss if reduction == _NONE else loss.sum(), kept


def kd_fwd(
    student: Tensor, teacher: Tensor, temperature: float, kd_weight: float, class_dim: int,
    reduction: int, labels: Tensor | None = None, labels_b: Tensor | None = None,
    lam_rows: Tensor | None = None, temperature_rows: Tensor | None = None,
    row_weights: Tensor | None = None, lam: float = 1.0, ce_weight: float = 0.0,
    label_smoothing: float = 0.0, ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The reduced loss, and six numbers per row: see reference.kd_fwd."""
    return _forward(
        student, teacher, False, temperature, kd_weight, class_dim, reduction, labels, labels_b,
        lam_rows, temperature_rows, row_weights, lam, ce_weight, label_smoothing, ignore_index,
    )  # fmt: skip


def kd_fwd_grad(
    student: Tensor, teacher: Tensor, temperature: float, kd_weight: float, class_dim: int,
    reduction: int, labels: Tensor | None = None, labels_b: Tensor | None = None,
    lam_rows: Tensor | None = None, temperature_rows: Tensor | None = None,
    row_weights: Tensor | None = None, lam: float = 1.0, ce_weight: float = 0.0,
    label_smoothing: float = 0.0, ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The reduced loss, and the gradient of its sum: see reference.kd_fwd_grad."""
    return _forward(
        student, teacher, True, temperature, kd_weight, class_dim, reduction, labels, labels_b,
        lam_rows, temperature_rows, row_weights, lam, ce_weight, label_smoothing, ignore_index,
    )  # fmt: skip


def kd_bwd(
    grad_loss: Tensor, student: Tensor, teacher: Tensor, stats: Tensor, temperature: float,
    kd_weight: float, class_dim: int, reduction: int, labels: Tensor | None = None,
    labels_b: Tensor | None = None, lam_rows: Tensor | None = None,
    temperature_rows: Tensor | None = None, row_weights: Tensor | None = None, lam: float = 1.0,
    ce_weight: float = 0.0, label_smoothing: float = 0.0, ignore_index: int = -100,
) -> Tensor:  # fmt: skip
    """The gradient from the logits and six numbers per row: see reference.kd_bwd."""
    grad = torch.empty_like(student)
    if student.numel() == 0:
        return grad
    with torch.cuda.device_of(student):
        plan, logits = _plan_of(
            student, teacher, grad, class_dim, kd_weight, ce_weight, label_smoothing
        )
        tile = plan.tile
        tiles = -(-plan.classes // (tile.steps * tile.lanes * tile.vec))
        _kd_bwd_kernel[(plan.programs, tiles)](
            *_per_row_and_step(grad_loss), stats, *logits, *plan.strides,
            _contiguous(labels), _contiguous(labels_b), row_weights,
            *_per_row_and_step(lam_rows), *_per_row_and_step(temperature_rows),
            plan.rows, plan.inner, plan.classes,
            temperature, lam, kd_weight, ce_weight, label_smoothing, **plan.constants,
        )  # fmt: skip
        if logits[0] is not grad:
            grad.copy_(logits[0])
    return grad


def kd_scale_(grad: Tensor, factor: Tensor) -> None:
    """grad *= factor, in place; no memory is touched where the factor is 1."""
    if not grad.is_contiguous() and torch.empty_like(grad, device="meta").stride() != grad.stride():
        grad.mul_(factor)  # has gaps
    elif grad.numel():
        with torch.cuda.device_of(grad):
            _kd_scale_kernel[(_config.kd_scale_programs(grad.numel()),)](
                grad, factor, grad.numel(), BLOCK=_config.SCALE_BLOCK, num_warps=8,
                enable_fp_fusion=False,
            )  # fmt: skip
