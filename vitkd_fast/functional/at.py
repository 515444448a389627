"""at_loss: where activations are large, from one pass over each side's features."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import (
    REDUCTIONS,
    check_batch,
    check_choice,
    check_inputs,
    check_numbers,
    differentiable_once,
    exactly,
    wide_dtype,
)
from ._features import (
    FORMS,
    UNIT_EPS,
    as_features,
    check_not_empty,
    formed_in_forward,
    grid_of_teacher,
    resized,
    samples_per_tile,
)

_at_fwd_grad = torch.ops.vitkd_fast.at_fwd_grad.default


def _reduced(rows: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return rows
    return rows.sum() / (max(rows.shape[0], 1) if reduction == "mean" else 1)


def _energy(x: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """sum over channels of |x|^p, [batch, positions], of x [batch, channels, positions]."""
    if torch.compiler.is_compiling():
        x = x.to(dtype)
        return (x * x if p == 2 else x.abs().pow(p)).sum(1)
    # torch's norm over a dimension that is strided is six times slower than a product and a sum,
    # and powers of other roots lose digits
    if p in (1, 2) and x.dtype == dtype and x.stride(1) == 1:
        return torch.linalg.vector_norm(x, p, 1).pow(p)
    out = x.new_empty((x.shape[0], x.shape[2]), dtype=dtype)
    step = samples_per_tile(x, x.shape[0], x.shape[1] * x.shape[2])
    for i in range(0, x.shape[0], step):
        part = x[i : i + step].to(dtype)
        part = part * part if p == 2 else part.abs().pow_(p)
        torch.sum(part, 1, out=out[i : i + step])
    return out


class _Energy(torch.autograd.Function):
    """Features are read once; the backward reads them once and writes the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x)
        ctx.p = p
        return _energy(x, p, dtype)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        by = (ctx.p * grad).unsqueeze(1)
        if ctx.p == 2:
            if x.dtype == grad.dtype:
                return x * by, None, None
            out = torch.empty_like(x)
            step = samples_per_tile(x, x.shape[0], x.shape[1] * x.shape[2])
            for i in range(0, x.shape[0], step):
                # in float32: a loss scale may have made of grad what float16 cannot hold
                out[i : i + step].copy_(x[i : i + step] * by[i : i + step])
            return out, None, None
        wide = x.to(grad.dtype)
        slope = wide.sign() if ctx.p == 1 else wide.abs().pow_(ctx.p - 1).copysign_(wide)
        return slope.mul_(by).to(x.dtype), None, None


class _MapDistance(torch.autograd.Function):
    """|| q/||q|| - t/||t|| ||^2 of each row, [batch]: few operations, for maps are small."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, t: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(q, dim=1, keepdim=True).clamp_(min=UNIT_EPS)
        unit = q / length
        apart = unit - F.normalize(t, eps=UNIT_EPS)
        ctx.save_for_backward(unit, apart, length, q)
        return (apart * apart).sum(1)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        unit, apart, length, _ = ctx.saved_tensors
        # of the length that was divided out, nothing is left
        across = torch.addcmul(apart, unit, (unit * apart).sum(1, keepdim=True), value=-1)
        return across.mul_((2 * grad).unsqueeze(1) / length), None


def _form(
    inputs: tuple[Tensor | None, ...], constants: tuple, needed: tuple[bool, ...]
) -> tuple[Tensor, list[Tensor | None]]:
    """The losses of the samples, reduced, and the gradient of x [batch, channels, positions]."""
    (x,) = inputs
    x_t, p, reduction, dtype = constants
    assert x is not None
    if dtype == torch.float64:
        x, x_t = x.double(), x_t.double()
    loss, grad = _at_fwd_grad(x, x_t, p, REDUCTIONS[reduction], needed[0])
    return loss, [grad if needed[0] else None]


def at_loss(
    f_s: Tensor,
    f_t: Tensor,
    *,
    p: float = 2.0,
    teacher_grid: tuple[int, int] | None = None,
    reduction: str = "mean",
) -> Tensor:
    """|| q_s/||q_s|| - q_t/||q_t|| ||^2, q = sum over channels of |F|^p; mean over the batch.

    Attention transfer (Zagoruyko and Komodakis, 2017, arXiv:1612.03928): where a network's
    activations are large. Summed over positions, as in the paper; implementations that take the
    mean over positions too (mdistiller's, weight 1000) give this divided by height * width. The
    teacher is a constant: one that requires grad is an error, unless under torch.no_grad(); it may
    be an inference-mode tensor, and must keep its values until the backward has run. The loss is
    differentiable once, in reverse mode.

    Where the grids are the same and p is 1 or 2, the teacher is read once, and the student's
    gradient is formed while its sample is in cache.

    Args:
        f_s: the student's features, [batch, channels, height, width] of any memory format, or
            [batch, tokens, channels]; float32, float16, bfloat16 or float64. The gradient has their
            dtype; arithmetic is float32 (float64 where either side is float64).
        f_t: the teacher's, in either form, read in place (CLS and register tokens are dropped by
            slicing, f[:, 1:]), or a ready map [batch, tokens], such as the attention of the CLS
            token to the patches. It may have another number of channels.
        p: the power, >= 1.
        teacher_grid: (height, width) of the teacher's tokens. Unless given, they are the student's
            grid if as many, else a square. Where the grids differ, the student's map q_s is
            resized: averaged where it is the larger, else bilinear.
        reduction: "mean" over the batch, "sum", or "none".

    Returns:
        The loss, float32 (float64 for float64): 0-dim, or [batch] for "none". An empty batch gives
        0; a map of zeros stays one.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was given; a teacher
            that requires grad.
        RuntimeError: a second derivative, or one in forward mode.
    """
    name = "at_loss"
    check_inputs(name, {"f_s": f_s, "f_t": f_t}, "f_t")
    check_choice(name, "reduction", reduction, REDUCTIONS)
    check_numbers(name, {"p": p})
    if not p >= 1:
        raise ValueError(f"{name}: p: expected a number >= 1, got {p}")
    student = as_features(name, "f_s", f_s)
    dtype = wide_dtype(f_s, f_t)
    if f_t.dim() == 2:
        check_not_empty(name, "f_t", f_t)
        positions, grid, x_t = f_t.shape[1], None, f_t.to(dtype)
    else:
        if f_t.dim() not in (3, 4):
            raise ValueError(
                f"{name}: f_t: expected {FORMS}, or a map [batch, tokens], got {list(f_t.shape)}"
            )
        teacher = as_features(name, "f_t", f_t)
        positions, grid, x_t = teacher.positions, teacher.grid, teacher.x
    check_batch(name, f_s, f_t)
    new = grid_of_teacher(name, positions, grid, teacher_grid, student)
    if new is None and p in (1, 2):
        return formed_in_forward(_form, (x_t, int(p), reduction, dtype), student.x)
    with exactly(f_s):
        q_s = _Energy.apply(student.x, p, dtype)
        if new is not None:
            q_s = resized(q_s.unsqueeze(1), student.grid, new).squeeze(1)
        q_t = x_t if x_t.dim() == 2 else _energy(x_t, p, dtype)
        return _reduced(_MapDistance.apply(q_s, q_t), reduction)
