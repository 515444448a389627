"""sp_loss: which samples of a batch are alike, from two Gram matrices."""

from __future__ import annotations

from torch import Tensor

from ._gram import check_embeddings, of_grams, symmetric, through_unit_rows, unit_rows


def _form(gram_s: Tensor, gram_t: Tensor) -> tuple[Tensor, Tensor]:
    by = 1 / max(gram_s.numel(), 1)
    unit, inverse = unit_rows(gram_s)
    apart = unit - unit_rows(gram_t)[0]
    loss = (apart * apart).sum() * by
    return loss, symmetric(through_unit_rows(2 * by * apart, unit, inverse))


def sp_loss(x_s: Tensor, x_t: Tensor) -> Tensor:
    """|| N(x_s x_s^T) - N(x_t x_t^T) ||_F^2 / batch^2, N: rows of length 1.

    Similarity-preserving distillation (Tung and Mori, 2019, arXiv:1907.09682): pairs of samples
    that excite the teacher alike shall excite the student alike. The teacher is a constant: one
    that requires grad is an error, unless under torch.no_grad(); it may be an inference-mode
    tensor. Memory is that of the two matrices, [batch, batch]. The loss is differentiable once, in
    reverse mode.

    Args:
        x_s: the student's embeddings, [batch, dim] (of maps, `f.flatten(1)`); float32, float16,
            bfloat16 or float64. The gradient has their dtype; arithmetic is float32 (float64 where
            either is float64).
        x_t: the teacher's, [batch, dim_t].

    Returns:
        The loss, 0-dim, float32 (float64 for float64). The row of an embedding of zeros is zeros,
        and has no gradient. An empty batch gives 0.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was given; a teacher
            that requires grad.
        RuntimeError: a second derivative, or one in forward mode.
    """
    check_embeddings("sp_loss", x_s, x_t)
    return of_grams(_form, x_s, x_t)
