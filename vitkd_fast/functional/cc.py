"""cc_loss: the correlations between the samples of a batch, from two Gram matrices."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._common import check_numbers
from ._gram import check_embeddings, cosines, of_grams, through_cosines


def _polynomial(x: Tensor, coefficients: list[float]) -> Tensor:
    """coefficients[p] x^p, added up."""
    out = torch.full_like(x, coefficients[-1])
    for c in coefficients[-2::-1]:
        out = out.mul_(x).add_(c)
    return out


def _form(gram_s: Tensor, gram_t: Tensor, gamma: float, order: int) -> tuple[Tensor, Tensor]:
    by = 1 / max(gram_s.numel(), 1)
    factors = [
        math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p) for p in range(order + 1)
    ]
    slopes = [p * factors[p] for p in range(1, order + 1)]
    cosine, inverse = cosines(gram_s)
    # without the constant, which falls out
    apart = _polynomial(cosine, [0.0, *factors[1:]])
    apart = apart.sub_(_polynomial(cosines(gram_t)[0], [0.0, *factors[1:]]))
    grad = _polynomial(cosine, slopes).mul_(apart).mul_(2 * by)
    return (apart * apart).sum() * by, through_cosines(grad, cosine, inverse)


def cc_loss(x_s: Tensor, x_t: Tensor, *, gamma: float = 0.4, order: int = 2) -> Tensor:
    """mean over pairs of (k(s_i, s_j) - k(t_i, t_j))^2, k the Gaussian kernel's Taylor polynomial.

    The correlation part of correlation congruence (Peng et al., 2019, arXiv:1904.01802), whose
    other part is a cross-entropy and a kd_loss. k(x, y) = sum over p <= order of
    exp(-2 gamma) (2 gamma)^p / p! cos(x, y)^p, which is exp(-gamma |x - y|^2) of embeddings of
    length 1 for large orders. The teacher is a constant: one that requires grad is an error,
    unless under torch.no_grad(); it may be an inference-mode tensor. Memory is that of a few
    matrices [batch, batch]. The loss is differentiable once, in reverse mode.

    Args:
        x_s: the student's embeddings, [batch, dim] (of maps, `f.flatten(1)`); float32, float16,
            bfloat16 or float64. The gradient has their dtype; arithmetic is float32 (float64 where
            either is float64).
        x_t: the teacher's, [batch, dim_t].
        gamma: > 0, of the kernel.
        order: of the polynomial, >= 1. Both defaults are the paper's.

    Returns:
        The loss, 0-dim, float32 (float64 for float64). An embedding of zeros has the cosine 0 with
        all, and no gradient. An empty batch gives 0.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was given; a teacher
            that requires grad.
        RuntimeError: a second derivative, or one in forward mode.
    """
    name = "cc_loss"
    check_embeddings(name, x_s, x_t)
    check_numbers(name, {"gamma": gamma, "order": order})
    if not gamma > 0:
        raise ValueError(f"{name}: gamma: expected a number > 0, got {gamma}")
    if not (isinstance(order, int) and order >= 1):
        raise ValueError(f"{name}: order: expected an integer >= 1, got {order}")
    return of_grams(_form, x_s, x_t, gamma, order)
