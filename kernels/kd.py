"""The launchers of kd_loss's kernels (_kd.py): how rows are dealt out, and what is allocated."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from . import _config
from ._kd import _kd_bwd_kernel, _kd_fwd_kernel, _kd_scale_kernel, _kd_total_kernel


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
    per_thread: int, **constants: Any,
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
    tile = _config.kd(inner, classes, itemsize, bits & -bits, row == 1 and step != 1, per_thread)
    constants |= {
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
    student: Tensor, teacher: Tensor, grad: Tensor | None,
    o: reference.KDOptions | reference.RowLossOptions, per_thread: int = 32, **constants: Any,
) -> tuple[_Plan, list[Tensor | None]]:  # fmt: skip
    """The plan, and [grad, student, teacher] or copies of them with the plan's strides.

    Args:
        per_thread: classes that a thread may keep in registers.
        constants: of the kernel.
    """
    tensors = [grad, student, teacher]
    plan = _plan(
        student.shape,
        tuple((student if x is None else x).stride() for x in tensors),
        o.class_dim,
        max(student.element_size(), teacher.element_size()),
        per_thread,
        HAS_KD=o.kd_weight != 0,
        HAS_CE=o.ce_weight != 0,
        HAS_SMOOTHING=o.ce_weight != 0 and o.label_smoothing != 0,
        **constants,
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


class _Shares(NamedTuple):
    """What a row's share of the loss is formed from: arguments of kernels."""

    labels: Tensor | None
    labels_b: Tensor | None
    row_weights: Tensor | None
    totals: Tensor  # [parts]; read where there is a mean to take
    mean: int  # 1: divide by the sum of what counts
    parts: int  # 0: each program adds it up by itself
    share: float  # of each row, where none differs


def _shares_of(o: reference.KDOptions | reference.RowLossOptions, like: Tensor) -> _Shares:
    """Adds up the rows' weights where a mean needs them; `like`: [rows] in the accumulation type.

    `totals` is `like` where nothing is added up beforehand.
    """
    rows = like.numel()
    labels, labels_b = _contiguous(o.labels), _contiguous(o.labels_b)
    row_weights = _contiguous(o.row_weights)
    mean = o.reduction == reference.MEAN
    total = mean and (labels is not None or row_weights is not None)
    totals, parts = like, _config.kd_total_parts(rows) if total else 0
    if parts:
        totals = like.new_empty(parts)
        _kd_total_kernel[(parts,)](
            totals, labels, labels_b, row_weights, o.ignore_index, rows,
            BLOCK=_config.TOTAL_BLOCK, enable_fp_fusion=False,
        )  # fmt: skip
    share = 1 / rows if mean and not total else 1.0
    return _Shares(labels, labels_b, row_weights, totals, int(total), parts, share)


def _forward(
    student: Tensor, teacher: Tensor, with_grad: bool, o: reference.KDOptions
) -> tuple[Tensor, Tensor]:
    """The reduced loss, and the gradient of its sum or what backward needs."""
    wide = torch.float64 if student.dtype == torch.float64 else torch.float32
    shape = student.shape[: o.class_dim] + student.shape[o.class_dim + 1 :]
    rows = prod(shape)
    grad = stats = None
    if with_grad:
        grad = torch.empty_like(student)
    else:
        stats = student.new_empty((6, rows), dtype=wide)
    kept = stats if grad is None else grad
    if student.numel() == 0:
        return student.new_zeros(shape if o.reduction == reference.NONE else (), dtype=wide), kept
    with torch.cuda.device_of(student):
        loss = student.new_empty(shape if o.reduction == reference.NONE else rows, dtype=wide)
        of = _shares_of(o, loss)
        plan, logits = _plan_of(student, teacher, grad, o)
        _kd_fwd_kernel[(plan.programs,)](
            loss, stats, *logits, *plan.strides, of.labels, of.labels_b, of.row_weights,
            *_per_row_and_step(o.lam_rows), *_per_row_and_step(o.temperature_rows),
            of.totals, of.mean, of.parts, rows, plan.inner, plan.classes, o.ignore_index,
            o.temperature, o.lam, o.kd_weight, o.ce_weight, o.label_smoothing,
            of.share,
            WHOLE_ROW=plan.tile.whole_row, **plan.constants,
        )  # fmt: skip
        if logits[0] is not grad:
            grad.copy_(logits[0])
        # a sum in a fixed order
        return loss if o.reduction == reference.NONE else loss.sum(), kept


def kd_fwd(student: Tensor, teacher: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """The reduced loss, and six numbers per row: see reference.kd_fwd."""
    return _forward(student, teacher, False, reference.KDOptions(*options))


def kd_fwd_grad(student: Tensor, teacher: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """The reduced loss, and the gradient of its sum: see reference.kd_fwd_grad."""
    return _forward(student, teacher, True, reference.KDOptions(*options))


def kd_bwd(
    grad_loss: Tensor, student: Tensor, teacher: Tensor, stats: Tensor, *options: Any
) -> Tensor:
    """The gradient from the logits and six numbers per row: see reference.kd_bwd."""
    o = reference.KDOptions(*options)
    grad = torch.empty_like(student)
    if student.numel() == 0:
        return grad
    with torch.cuda.device_of(student):
        plan, logits = _plan_of(student, teacher, grad, o)
        tile = plan.tile
        tiles = -(-plan.classes // (tile.steps * tile.lanes * tile.vec))
        _kd_bwd_kernel[(plan.programs, tiles)](
            *_per_row_and_step(grad_loss), stats, *logits, *plan.strides,
            _contiguous(o.labels), _contiguous(o.labels_b), o.row_weights,
            *_per_row_and_step(o.lam_rows), *_per_row_and_step(o.temperature_rows),
            plan.rows, plan.inner, plan.classes,
            o.temperature, o.lam, o.kd_weight, o.ce_weight, o.label_smoothing, **plan.constants,
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
