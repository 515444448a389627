"""What the losses of feature maps share: their forms, grids and tiles, gradients in the forward."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import differentiable_once

_scale_ = torch.ops.vitkd_fast.kd_scale_.default

FORMS = "[batch, channels, height, width] or [batch, tokens, channels]"
TILE = 2**18  # numbers of a tile: 1 MB of float32, which stays in a CPU's L2
GPU_TILE = 2**24  # on a GPU 64 MB: each operation on a tile starts kernels of its own
UNIT_EPS = 1e-12  # as torch.nn.functional.normalize


class Features(NamedTuple):
    """A feature map or tokens as [batch, channels, positions], in place."""

    x: Tensor
    grid: tuple[int, int] | None  # of a map, or of tokens of which it is known

    @property
    def positions(self) -> int:
        return self.x.shape[2]


def as_features(name: str, argument: str, x: Tensor) -> Features:
    if x.dim() not in (3, 4):
        raise ValueError(f"{name}: {argument}: expected {FORMS}, got {list(x.shape)}")
    check_not_empty(name, argument, x)
    if x.dim() == 4:
        return Features(x.flatten(2), (x.shape[2], x.shape[3]))
    return Features(x.mT, None)


def check_not_empty(name: str, argument: str, x: Tensor) -> None:
    if 0 in x.shape[1:]:
        raise ValueError(
            f"{name}: {argument}: expected no empty dimension but the batch, got {list(x.shape)}"
        )


def grid_of_teacher(
    name: str, positions: int, grid: tuple[int, int] | None, given: tuple[int, int] | None,
    student: Features,
) -> tuple[int, int] | None:  # fmt: skip
    """The grid of the teacher's positions; None where it is the student's."""
    if given is not None:
        if grid is not None and tuple(given) != grid:
            raise ValueError(
                f"{name}: teacher_grid: expected that of f_t, {grid}, got {tuple(given)}"
            )
        if given[0] * given[1] != positions:
            raise ValueError(
                f"{name}: teacher_grid: expected one of the {positions} positions of f_t, got "
                f"{tuple(given)}"
            )
        grid = (given[0], given[1])
    if grid is None and positions != student.positions:
        side = math.isqrt(positions)
        if side * side != positions:
            raise ValueError(
                f"{name}: f_t: expected the {student.positions} positions of f_s, a square grid or "
                f"teacher_grid=(height, width), got {positions} positions (CLS and register tokens "
                "are to be sliced off)"
            )
        grid = (side, side)
    if grid is None or grid == student.grid:
        return None
    if student.grid is None:
        if positions == student.positions:
            return None
        side = math.isqrt(student.positions)
        if side * side != student.positions:
            raise ValueError(
                f"{name}: f_s: expected the {positions} positions of f_t or a square grid, got "
                f"{student.positions} tokens"
            )
    return grid


def resize_map(x: Tensor, grid: tuple[int, int], *, shrink: str = "average") -> Tensor:
    """A student's map [batch, channels, height, width] on a teacher's grid (height, width).

    The one policy of all losses: the student is resized (its features; the map q of at_loss; the
    queries and keys of AttentionMapProjection), the teacher never. A map grows by bilinear
    interpolation with align_corners=False. It shrinks in one of two ways, which differ in numbers:

    Args:
        shrink: "average" takes the means of cells (adaptive pooling) where neither side grows, and
            interpolates without a filter where one does: at_loss, feature_loss and nst_loss.
            "antialias" interpolates with a filter where either side shrinks: the modules of
            `vitkd_fast.nn`, AttentionMapProjection and CrossAttentionProjector.
    """
    height, width = x.shape[2:]
    if (height, width) == grid:
        return x
    if shrink == "average" and height >= grid[0] and width >= grid[1]:
        return F.adaptive_avg_pool2d(x, grid)
    if shrink == "antialias" and (height > grid[0] or width > grid[1]):
        # torch has this in float32 alone
        return F.interpolate(x.float(), grid, mode="bilinear", antialias=True).to(x.dtype)
    return F.interpolate(x, grid, mode="bilinear")


def resized(x: Tensor, old: tuple[int, int] | None, new: tuple[int, int]) -> Tensor:
    """[batch, channels, positions] on another grid, by `resize_map`."""
    side = math.isqrt(x.shape[2])
    return resize_map(x.unflatten(2, old or (side, side)), new).flatten(2)


def channel_lengths(x: Tensor) -> Tensor:
    """Of x [batch, channels, positions], [batch, channels, 1], at least UNIT_EPS."""
    # torch's norm over a dimension that is strided is several times slower
    return (x * x).sum(2, keepdim=True).sqrt_().clamp_(min=UNIT_EPS)


def tile_size(x: Tensor) -> int:
    """Numbers of a tile where x is."""
    return TILE if x.device.type == "cpu" else GPU_TILE


def samples_per_tile(x: Tensor, samples: int, numbers: int) -> int:
    """Of `numbers` each; all of them where a compiler makes the tiles."""
    if torch.compiler.is_compiling():
        return max(samples, 1)
    return max(1, tile_size(x) // max(numbers, 1))


def tiles(x: Tensor, batch: int, positions: int, channels: int) -> list[tuple[slice, slice]]:
    """Samples and positions of each tile: whole samples, or a part of a large one."""
    some = samples_per_tile(x, batch, positions * channels)
    part = max(1, tile_size(x) // channels)
    if torch.compiler.is_compiling() or positions * channels <= 2 * tile_size(x):
        part = positions
    return [
        (slice(i, i + some), slice(j, j + part))
        for i in range(0, batch, some)
        for j in range(0, positions, part)
    ]


class _InForward(torch.autograd.Function):
    """Gradients are formed with the loss, while tiles are in cache."""

    @staticmethod
    def forward(ctx: Any, form: Any, constants: tuple, *inputs: Tensor | None) -> Tensor:
        needed = ctx.needs_input_grad[2:]
        loss, grads = form(inputs, constants, needed)
        ctx.form, ctx.constants, ctx.needed = form, constants, needed
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        ctx.compiled = torch.compiler.is_compiling()
        if ctx.compiled:  # saved tensors alone, and no in-place operation
            ctx.save_for_backward(*grads)
        else:
            ctx.save_for_backward(*inputs)
            ctx.grads = grads
        return loss

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.compiled:
            grads = [None if x is None else x * _beside(grad_loss, x) for x in ctx.saved_tensors]
        else:
            # handed over, not shared: they are scaled in place and then belong to the caller
            grads, ctx.grads = ctx.grads, None
            if grads is None:  # a second backward, after retain_graph=True
                _, grads = ctx.form(ctx.saved_tensors, ctx.constants, ctx.needed)
            for grad in grads:
                if grad is not None and grad_loss.dim() == 0:
                    _scale_(grad, grad_loss)
                elif grad is not None:
                    grad.mul_(_beside(grad_loss, grad))
        return None, None, *(
            None if x is None else x.to(dtype) for x, dtype in zip(grads, ctx.dtypes, strict=True)
        )  # fmt: skip


def _beside(grad_loss: Tensor, grad: Tensor) -> Tensor:
    """grad_loss, 0-dim or [batch], to multiply grad with."""
    return grad_loss if grad_loss.dim() == 0 else grad_loss.view(-1, *[1] * (grad.dim() - 1))


def empty_grad(x: Tensor, needed: bool, dtype: torch.dtype) -> Tensor | None:
    """In x's layout. Float16 is kept in float32 until the loss scale is applied."""
    if not needed:
        return None
    narrow = x.dtype is torch.bfloat16 and dtype is torch.float32
    return torch.empty_like(x, dtype=torch.bfloat16 if narrow else dtype)


def formed_in_forward(form: Any, constants: tuple, *inputs: Tensor | None) -> Tensor:
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        return _InForward.apply(form, constants, *inputs)
    return form(inputs, constants, [False] * len(inputs))[0]
