"""wkd_feature_loss: means and deviations of channels, from one pass over each side's features."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._common import (
    REDUCTIONS,
    check_batch,
    check_choice,
    check_inputs,
    check_numbers,
    exactly,
    wide_dtype,
)
from ._features import Features, as_features, empty_grad, formed_in_forward, samples_per_tile

_wkd_feature_fwd_grad = torch.ops.vitkd_fast.wkd_feature_fwd_grad.default

EPS = 1e-5  # of a variance, as in the authors' code

Grid = tuple[int, int]


def _own_grid(name: str, argument: str, of: Features, given: Grid | None, other: Features) -> Grid:
    """Of a map, or of tokens: as given, the other side's if as many, else a square."""
    if grid := of.grid or given:
        return grid
    if other.grid is not None and other.positions == of.positions:
        return other.grid
    side = math.isqrt(of.positions)
    if side * side != of.positions:
        raise ValueError(
            f"{name}: {argument}: expected a map or a square grid of tokens for cells, got "
            f"{of.positions} tokens"
        )
    return side, side


def _cells(grid: Grid, cells: int) -> list[tuple[slice, slice]]:
    """Rows and columns of each cell, those of adaptive pooling."""
    rows, columns = (
        [slice(i * n // cells, -(-(i + 1) * n // cells)) for i in range(cells)] for n in grid
    )
    return [(a, b) for a in rows for b in columns]


def _moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [batch, channels, positions] without its mean; the mean and the deviation."""
    n = x.shape[2]
    mean = x.sum(2, keepdim=True) / n
    centred = x - mean
    if centred.stride(2) == 1:  # torch's norm over a dimension that is strided is slow
        squares = torch.linalg.vector_norm(centred, dim=2, keepdim=True).square()
    else:
        squares = (centred * centred).sum(2, keepdim=True)
    return centred, mean, (squares / max(n - 1, 1) + EPS).sqrt()


def _form_whole(
    inputs: tuple[Tensor | None, ...], constants: tuple, needed: tuple[bool, ...]
) -> tuple[Tensor, list[Tensor | None]]:
    """Of one cell: by the operation."""
    (x_s,) = inputs
    x_t, mean_weight, reduction, dtype = constants
    assert x_s is not None
    if dtype == torch.float64:
        x_s, x_t = x_s.double(), x_t.double()
    loss, grad = _wkd_feature_fwd_grad(x_s, x_t, mean_weight, REDUCTIONS[reduction], needed[0])
    return loss, [grad if needed[0] else None]


def _form(
    inputs: tuple[Tensor | None, ...], constants: tuple, needed: tuple[bool, ...]
) -> tuple[Tensor, list[Tensor | None]]:
    """The losses of the samples, reduced, and the gradient of x_s [batch, channels, positions]."""
    (x_s,) = inputs
    x_t, grids, cells, mean_weight, reduction, dtype = constants
    assert x_s is not None
    batch, channels, positions = x_s.shape
    d_x = empty_grad(x_s, needed[0], dtype)
    rows = x_s.new_zeros(batch, dtype=dtype)
    scale = 1 / max(batch, 1) if reduction == "mean" else 1.0
    by = 1 / cells**2
    step = samples_per_tile(x_s, batch, channels * max(positions, x_t.shape[2]))

    def of_cell(x: Tensor, grid: Grid, cell: tuple[slice, slice]) -> Tensor:
        return x.unflatten(2, grid)[:, :, cell[0], cell[1]].flatten(2)

    with torch.no_grad(), exactly(x_s):
        for i in range(0, batch, step):
            s, t = (x[i : i + step].to(dtype) for x in (x_s, x_t))
            total = None if d_x is None else torch.zeros_like(s)
            for cell_s, cell_t in zip(*(_cells(grid, cells) for grid in grids), strict=True):
                centred, mean, deviation = _moments(of_cell(s, grids[0], cell_s))
                _, mean_t, deviation_t = _moments(of_cell(t, grids[1], cell_t))
                apart, wider = mean - mean_t, deviation - deviation_t
                rows[i : i + step] += (mean_weight * apart * apart + wider * wider).sum((1, 2)) * by
                if total is None:
                    continue
                n = centred.shape[2]
                slope = wider / deviation * (2 * by * scale / max(n - 1, 1))
                shift = apart * (2 * mean_weight * by * scale / n)
                part = total.unflatten(2, grids[0])[:, :, cell_s[0], cell_s[1]]
                part.add_(centred.mul_(slope).add_(shift).view(part.shape))
            if d_x is not None and total is not None:
                d_x[i : i + step] = total
    return (rows if reduction == "none" else rows.sum() * scale), [d_x]


def wkd_feature_loss(
    f_s: Tensor,
    f_t: Tensor,
    *,
    cells: int = 1,
    mean_weight: float = 2.0,
    teacher_grid: tuple[int, int] | None = None,
    reduction: str = "mean",
) -> Tensor:
    """w |mu_s - mu_t|^2 + |sigma_s - sigma_t|^2 of channels, mean over cells and the batch.

    Wasserstein distillation of features (WKD-F; Lv et al., 2024, arXiv:2412.08139): for w = 1 the
    squared 2-Wasserstein distance between Gaussians with diagonal covariances, one of each side,
    over the positions of a cell. sigma^2 is the unbiased variance + 1e-5, as in the authors' code.
    The grids may differ; the channels are the same, through a 1x1 convolution of the student where
    they are not. The teacher is a constant: one that requires grad is an error, unless under
    torch.no_grad(). It may be an inference-mode tensor, and must keep its values until the backward
    has run. The loss is differentiable once, in reverse mode.

    Args:
        f_s: the student's features, [batch, channels, height, width] of any memory format, or
            [batch, tokens, channels]; float32, float16, bfloat16 or float64. The gradient has their
            dtype; arithmetic is float32 (float64 where either side is float64).
        f_t: the teacher's, in either form, read in place (CLS and register tokens are dropped by
            slicing, f[:, 1:]).
        cells: of each side of the grid: cells * cells parts, those of adaptive pooling, have
            moments of their own; 1 is the whole.
        mean_weight: w.
        teacher_grid: (height, width) of the teacher's tokens, for cells. Unless given, they are the
            student's grid if as many, else a square.
        reduction: "mean" over the batch, "sum", or "none".

    Returns:
        The loss, float32 (float64 for float64): 0-dim, or [batch] for "none". An empty batch gives
        0. The deviation of one position is that of a constant.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was given; a teacher
            that requires grad.
        RuntimeError: a second derivative, or one in forward mode.
    """
    name = "wkd_feature_loss"
    check_inputs(name, {"f_s": f_s, "f_t": f_t}, "f_t")
    check_choice(name, "reduction", reduction, REDUCTIONS)
    check_numbers(name, {"mean_weight": mean_weight, "cells": cells})
    if not (isinstance(cells, int) and cells >= 1):
        raise ValueError(f"{name}: cells: expected an integer >= 1, got {cells}")
    student, teacher = as_features(name, "f_s", f_s), as_features(name, "f_t", f_t)
    check_batch(name, f_s, f_t)
    if student.x.shape[1] != teacher.x.shape[1]:
        raise ValueError(
            f"{name}: f_t: expected the {student.x.shape[1]} channels of f_s (a 1x1 convolution "
            f"gives the student those of its teacher), got {teacher.x.shape[1]}"
        )
    if teacher_grid is not None:
        height, width = teacher_grid
        if height * width != teacher.positions or teacher.grid not in (None, (height, width)):
            raise ValueError(
                f"{name}: teacher_grid: expected one of the {teacher.positions} positions of f_t, "
                f"got {tuple(teacher_grid)}"
            )
    dtype = wide_dtype(f_s, f_t)
    if cells == 1:
        whole = teacher.x, float(mean_weight), reduction, dtype
        return formed_in_forward(_form_whole, whole, student.x)
    grids = (
        _own_grid(name, "f_s", student, None, teacher),
        _own_grid(name, "f_t", teacher, teacher_grid, student),
    )
    constants = teacher.x, grids, cells, mean_weight, reduction, dtype
    return formed_in_forward(_form, constants, student.x)
