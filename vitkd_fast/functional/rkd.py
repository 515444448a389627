"""rkd_loss: the relations of a batch's embeddings, from two Gram matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._common import (
    check_batch,
    check_inputs,
    check_numbers,
    differentiable_once,
    exactly,
    wide_dtype,
)

_rkd_fwd_grad = torch.ops.vitkd_fast.rkd_fwd_grad.default


def _centred(x: Tensor, begin: int, end: int, dtype: torch.dtype) -> Tensor:
    """Columns of x without their mean, whose square would swamp the distances."""
    part = x[:, begin:end].to(dtype)
    return part - part.mean(0)


def _column_tiles(x: Tensor) -> list[tuple[int, int]]:
    """[begin, end) of columns: copies of as many numbers as a Gram matrix has, or 256 columns."""
    step = max(256, x.shape[0])
    return [(i, min(i + step, x.shape[1])) for i in range(0, x.shape[1], step)]


def _gram(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x x^T of the centred embeddings, a few columns at a time."""
    gram = x.new_zeros((x.shape[0], x.shape[0]), dtype=dtype)
    for begin, end in _column_tiles(x):
        part = _centred(x, begin, end, dtype)
        gram = gram.addmm_(part, part.mT)
    return gram


class _RKD(torch.autograd.Function):
    """Keeps the gradient in the Gram matrix, [batch, batch]."""

    @staticmethod
    def forward(
        ctx: Any, x_s: Tensor, x_t: Tensor, distance_weight: float, angle_weight: float
    ) -> Tensor:
        dtype = wide_dtype(x_s, x_t)
        with exactly(x_s):
            grams = _gram(x_s, dtype), _gram(x_t, dtype)
        loss, grad = _rkd_fwd_grad(*grams, distance_weight, angle_weight)
        ctx.save_for_backward(x_s, grad)
        return loss

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        x, grad = ctx.saved_tensors
        by = grad * (2 * grad_loss)
        out = torch.empty_like(x)
        with exactly(x):
            for begin, end in _column_tiles(x):
                out[:, begin:end] = by @ _centred(x, begin, end, grad.dtype)
        return out, None, None, None


def rkd_loss(
    x_s: Tensor, x_t: Tensor, *, distance_weight: float = 25.0, angle_weight: float = 50.0
) -> Tensor:
    """w_d mean h(d_s/mu_s - d_t/mu_t) + w_a mean h(cos_s - cos_t), h: smooth-L1.

    Relational distillation (Park et al., 2019, arXiv:1904.05068): distances of all pairs of
    embeddings, over their mean mu, and the cosines of the angles of all triplets. Both are taken
    from Gram matrices, cos_ijk = (G_jk - G_ij - G_ik + G_ii) / (d_ij d_ik): memory is a few
    [batch, batch] in place of [batch, batch, dim] and [batch, batch, batch]. Means are over
    batch^2 and batch^3, as in the authors' code. The teacher is a constant: one that requires
    grad is an error, unless under torch.no_grad(); it may be an inference-mode tensor. The loss is
    differentiable once, in reverse mode.

    Args:
        x_s: the student's embeddings, [batch, dim_s], float32, float16, bfloat16 or float64. The
            gradient has their dtype; arithmetic is float32 (float64 where either is float64).
        x_t: the teacher's, [batch, dim_t].
        distance_weight: w_d; 0 switches the term off. The defaults are those of the paper for
            classification and of the authors' code; for metric learning, 1 and 2.
        angle_weight: w_a.

    Returns:
        The loss, 0-dim, float32 (float64 for float64). A pair of identical embeddings has the
        distance 0, cosines of 0 and no gradient; so has one whose squared distance is below 1e-6
        (float64: 2e-15) of its two squared lengths around the batch's mean, which float32 cannot
        tell from it. One embedding, and an empty batch, give 0.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was given; a teacher
            that requires grad.
        RuntimeError: a second derivative, or one in forward mode.
    """
    name = "rkd_loss"
    given = {"x_s": x_s, "x_t": x_t}
    check_inputs(name, given, "x_t")
    check_numbers(name, {"distance_weight": distance_weight, "angle_weight": angle_weight})
    for argument, x in given.items():
        if x.dim() != 2 or x.shape[1] == 0:
            raise ValueError(f"{name}: {argument}: expected [batch, dim], got {list(x.shape)}")
    check_batch(name, x_s, x_t, "x_s", "x_t")
    return _RKD.apply(x_s, x_t, distance_weight, angle_weight)
