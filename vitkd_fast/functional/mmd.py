"""mmd_loss: Gaussian kernels between channels, of a few samples at a time."""

from __future__ import annotations

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
from ._features import (
    UNIT_EPS,
    as_features,
    channel_lengths,
    empty_grad,
    formed_in_forward,
    grid_of_teacher,
    resized,
    samples_per_tile,
)

HEURISTICS = ("mean", "median")


def _distances(x: Tensor, y: Tensor, of_x: Tensor, of_y: Tensor) -> Tensor:
    """|x_i - y_j|^2, [batch, C_x, C_y], from the squared lengths [batch, C]."""
    sums = of_x.unsqueeze(2) + of_y.unsqueeze(1)
    return torch.baddbmm(sums, x, y.mT, alpha=-2).clamp_(min=0)


def _variance(apart: Tensor, bandwidth: float | str) -> Tensor | float:
    """sigma^2: of the squared distances between the two sides, [batch, 1, 1], or given."""
    if bandwidth == "mean":
        found = apart.mean((1, 2), keepdim=True)
    elif bandwidth == "median":
        found = apart.flatten(1).median(1).values.view(-1, 1, 1)
    else:
        return float(bandwidth) ** 2
    return found.clamp_(min=torch.finfo(found.dtype).tiny)


def _form_mmd(
    inputs: tuple[Tensor | None, ...], constants: tuple, needed: tuple[bool, ...]
) -> tuple[Tensor, list[Tensor | None]]:
    """The losses of the samples, reduced, and the gradient of x_s [batch, channels, positions]."""
    (x_s,) = inputs
    x_t, bandwidth, reduction, dtype = constants
    assert x_s is not None
    batch, c_s, positions = x_s.shape
    c_t = x_t.shape[1]
    d_x = empty_grad(x_s, needed[0], dtype)
    rows = x_s.new_empty(batch, dtype=dtype)
    scale = 1 / max(batch, 1) if reduction == "mean" else 1.0
    step = samples_per_tile(x_s, batch, max(c_s, c_t) * max(positions, c_s, c_t))
    with torch.no_grad(), exactly(x_s):
        for i in range(0, batch, step):
            s, t = (x[i : i + step].to(dtype) for x in (x_s, x_t))
            length = channel_lengths(s)
            s, t = s / length, t / channel_lengths(t)
            of_s, of_t = ((x * x).sum(2) for x in (s, t))
            between = _distances(s, t, of_s, of_t)
            by = -0.5 / _variance(between, bandwidth)
            between = between.mul_(by).exp_()
            own = _distances(s, s, of_s, of_s).mul_(by).exp_()
            other = _distances(t, t, of_t, of_t).mul_(by).exp_()
            own_mean, other_mean, mean = (k.mean((1, 2)) for k in (own, other, between))
            rows[i : i + step] = (own_mean - mean) + (other_mean - mean)
            if d_x is None:
                continue
            grad = torch.bmm(own, s).mul_(1 / c_s**2)
            grad = grad.baddbmm_(between, t, alpha=-1 / (c_s * c_t)).mul_(-4 * scale * by)
            # of the length that was divided out, nothing is left
            grad.addcmul_(s, (s * grad).sum(2, keepdim=True), value=-1).div_(length)
            d_x[i : i + step] = grad.masked_fill_(length == UNIT_EPS, 0)
    return (rows if reduction == "none" else rows.sum() * scale), [d_x]


def mmd_loss(
    f_s: Tensor,
    f_t: Tensor,
    *,
    bandwidth: float | str = "mean",
    teacher_grid: tuple[int, int] | None = None,
    reduction: str = "mean",
) -> Tensor:
    """mean k(s, s') + mean k(t, t') - 2 mean k(s, t), k(x, y) = exp(-|x - y|^2 / (2 sigma^2)).

    The squared maximum mean discrepancy between the two sets of channels, each of length 1 over its
    positions, under a Gaussian kernel (Huang and Wang, 2017, arXiv:1707.01219, of which nst_loss is
    the polynomial kernel). Kernel matrices are formed by products of matrices, a few samples at a
    time, in place of [batch, C_s, C_t, positions]. The teacher is a constant: one that requires
    grad is an error, unless under torch.no_grad(). It may be an inference-mode tensor, and must
    keep its values until the backward has run. The loss is differentiable once, in reverse mode.

    Args:
        f_s: the student's features, [batch, C_s, height, width] of any memory format, or
            [batch, tokens, C_s]; float32, float16, bfloat16 or float64. The gradient has their
            dtype; arithmetic is float32 (float64 where either side is float64).
        f_t: the teacher's, in either form, read in place (CLS and register tokens are dropped by
            slicing, f[:, 1:]).
        bandwidth: sigma > 0 as a number, or "mean" or "median": sigma^2 is that of the squared
            distances between a sample's channels of both sides, and a constant for the gradient.
        teacher_grid: (height, width) of the teacher's tokens. Unless given, they are the student's
            grid if as many, else a square. Where the grids differ, the student's features are
            resized: averaged where they are the larger, else bilinear.
        reduction: "mean" over the batch, "sum", or "none".

    Returns:
        The loss, float32 (float64 for float64): 0-dim, or [batch] for "none". An empty batch gives
        0; a channel of zeros stays one, and has no gradient.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was given; a teacher
            that requires grad.
        RuntimeError: a second derivative, or one in forward mode.
    """
    name = "mmd_loss"
    check_inputs(name, {"f_s": f_s, "f_t": f_t}, "f_t")
    check_choice(name, "reduction", reduction, REDUCTIONS)
    check_numbers(name, {"bandwidth": bandwidth})
    if isinstance(bandwidth, str):
        check_choice(name, "bandwidth", bandwidth, ("a number > 0", *HEURISTICS))
    elif not bandwidth > 0:
        raise ValueError(f"{name}: bandwidth: expected a number > 0, got {bandwidth}")
    student, teacher = as_features(name, "f_s", f_s), as_features(name, "f_t", f_t)
    check_batch(name, f_s, f_t)
    new = grid_of_teacher(name, teacher.positions, teacher.grid, teacher_grid, student)
    dtype = wide_dtype(f_s, f_t)
    x_s = student.x if new is None else resized(student.x.to(dtype), student.grid, new)
    return formed_in_forward(_form_mmd, (teacher.x, bandwidth, reduction, dtype), x_s)
