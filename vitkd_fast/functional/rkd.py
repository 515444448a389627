"""rkd_loss: the relations of a batch's embeddings, from two Gram matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import check_numbers
from ._gram import check_embeddings, of_grams

_rkd_fwd_grad = torch.ops.vitkd_fast.rkd_fwd_grad.default


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
    check_embeddings(name, x_s, x_t)
    check_numbers(name, {"distance_weight": distance_weight, "angle_weight": angle_weight})
    # the square of the embeddings' mean would swamp the distances
    return of_grams(_rkd_fwd_grad, x_s, x_t, distance_weight, angle_weight, centred=True)
