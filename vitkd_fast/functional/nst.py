"""nst_loss: Gram matrices of positions, of a few samples at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import REDUCTIONS, check_batch, check_choice, check_inputs, exactly, wide_dtype
from ._features import (
    as_features,
    channel_lengths,
    empty_grad,
    formed_in_forward,
    grid_of_teacher,
    resized,
    samples_per_tile,
)


def _form_nst(
    inputs: tuple[Tensor | None, ...], constants: tuple, needed: tuple[bool, ...]
) -> tuple[Tensor, list[Tensor | None]]:
    """The losses of the samples, reduced, and the gradient of x_s [batch, channels, positions]."""
    (x_s,) = inputs
    x_t, reduction, dtype = constants
    assert x_s is not None
    batch, channels, positions = x_s.shape
    d_x = empty_grad(x_s, needed[0], dtype)
    rows = x_s.new_empty(batch, dtype=dtype)
    scale = 1 / max(batch, 1) if reduction == "mean" else 1.0
    step = samples_per_tile(x_s, batch, positions * max(positions, channels, x_t.shape[1]))
    with torch.no_grad(), exactly(x_s):
        for i in range(0, batch, step):
            s, t = (x[i : i + step].to(dtype) for x in (x_s, x_t))
            length = channel_lengths(s)
            s, t = s / length, t / channel_lengths(t)
            gram = torch.bmm(t.mT, t).div_(-x_t.shape[1])
            gram.baddbmm_(s.mT, s, alpha=1 / channels)  # student - teacher
            rows[i : i + step] = gram.square().sum((1, 2))
            if d_x is None:
                continue
            grad = torch.bmm(s, gram).mul_(4 * scale / channels)
            # of the length that was divided out, nothing is left
            grad.addcmul_(s, (s * grad).sum(2, keepdim=True), value=-1).div_(length)
            d_x[i : i + step] = grad
    return (rows if reduction == "none" else rows.sum() * scale), [d_x]


def nst_loss(
    f_s: Tensor,
    f_t: Tensor,
    *,
    teacher_grid: tuple[int, int] | None = None,
    reduction: str = "mean",
) -> Tensor:
    """|| S^T S / C_s - T^T T / C_t ||_F^2 of channels of length 1; mean over the batch.

    Neuron selectivity transfer (Huang and Wang, 2017, arXiv:1707.01219): the squared maximum mean
    discrepancy between the two sets of channels, each normalised over its positions, under the
    polynomial kernel (x . y)^2, mean k(s, s) + mean k(t, t) - 2 mean k(s, t), by its Gram matrices
    [positions, positions], a few samples at a time, in place of [batch, C_s, C_t, positions]. The
    teacher is a constant: one that requires grad is an error, unless under torch.no_grad(). It may
    be an inference-mode tensor, and must keep its values until the backward has run. The loss is
    differentiable once, in reverse mode.

    Args:
        f_s: the student's features, [batch, C_s, height, width] of any memory format, or
            [batch, tokens, C_s]; float32, float16, bfloat16 or float64. The gradient has their
            dtype; arithmetic is float32 (float64 where either side is float64).
        f_t: the teacher's, in either form, read in place (CLS and register tokens are dropped by
            slicing, f[:, 1:]).
        teacher_grid: (height, width) of the teacher's tokens. Unless given, they are the student's
            grid if as many, else a square. Where the grids differ, the student's features are
            resized: averaged where they are the larger, else bilinear.
        reduction: "mean" over the batch, "sum", or "none".

    Returns:
        The loss, float32 (float64 for float64): 0-dim, or [batch] for "none". An empty batch gives
        0; a channel of zeros stays one.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was given; a teacher
            that requires grad.
        RuntimeError: a second derivative, or one in forward mode.
    """
    name = "nst_loss"
    check_inputs(name, {"f_s": f_s, "f_t": f_t}, "f_t")
    check_choice(name, "reduction", reduction, REDUCTIONS)
    student, teacher = as_features(name, "f_s", f_s), as_features(name, "f_t", f_t)
    check_batch(name, f_s, f_t)
    new = grid_of_teacher(name, teacher.positions, teacher.grid, teacher_grid, student)
    dtype = wide_dtype(f_s, f_t)
    x_s = student.x if new is None else resized(student.x.to(dtype), student.grid, new)
    return formed_in_forward(_form_nst, (teacher.x, reduction, dtype), x_s)
