"""pkt_loss: whom each sample of a batch is close to, from two Gram matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import check_numbers
from ._gram import check_embeddings, cosines, of_grams, symmetric, through_cosines


def _form(gram_s: Tensor, gram_t: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    by = 1 / max(gram_s.shape[0], 1)
    cosine, inverse = cosines(gram_s)
    near_s, near_t = ((x + 1).clamp_(min=0) for x in (cosine, cosines(gram_t)[0]))
    total = near_s.sum(1, keepdim=True)  # >= 1, that of itself
    s, t = near_s / total, near_t / near_t.sum(1, keepdim=True)
    apart = s - t  # of which the row's sum is 0: it is added, so that each number is >= 0
    off = apart / (t + epsilon)
    log = torch.where(off.abs() < 0.5, off.log1p(), ((s + epsilon) / (t + epsilon)).log())
    loss = ((t + epsilon) * (off - log)).sum() * by
    grad = apart.mul_(by).div_(s + epsilon)
    grad = grad.sub_((grad * s).sum(1, keepdim=True)).div_(total)
    return loss, through_cosines(symmetric(grad), cosine, inverse)


def pkt_loss(x_s: Tensor, x_t: Tensor, *, epsilon: float = 1e-7) -> Tensor:
    """mean over i of sum_j (p_ij + eps) log((p_ij + eps) / (q_ij + eps)), p and q of cosines.

    Probabilistic knowledge transfer (Passalis and Tefas, 2018, arXiv:1803.10837): p_ij is the
    teacher's (1 + cos(x_i, x_j)) / 2 over its sum in the row, q_ij the student's. As in the
    authors' code a sample is its own neighbour, too; they take the mean over all pairs, which is
    this divided by the batch, and leave out the first eps, so that equal embeddings have a
    gradient. The teacher is a constant: one that requires grad is an error, unless
    under torch.no_grad(); it may be an inference-mode tensor. Memory is that of a few matrices
    [batch, batch]. The loss is differentiable once, in reverse mode.

    Args:
        x_s: the student's embeddings, [batch, dim] (of maps, `f.flatten(1)`); float32, float16,
            bfloat16 or float64. The gradient has their dtype; arithmetic is float32 (float64 where
            either is float64).
        x_t: the teacher's, [batch, dim_t].
        epsilon: > 0, keeps the logarithm finite where embeddings are opposite.

    Returns:
        The loss, 0-dim, float32 (float64 for float64). An embedding of zeros has the cosine 0 with
        all, and no gradient. An empty batch gives 0.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was given; a teacher
            that requires grad.
        RuntimeError: a second derivative, or one in forward mode.
    """
    name = "pkt_loss"
    check_embeddings(name, x_s, x_t)
    check_numbers(name, {"epsilon": epsilon})
    if not epsilon > 0:
        raise ValueError(f"{name}: epsilon: expected a number > 0, got {epsilon}")
    return of_grams(_form, x_s, x_t, epsilon)
