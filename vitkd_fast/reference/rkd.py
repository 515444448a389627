"""rkd_loss, the unfused PyTorch implementation differentiated by autograd, and its operation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .kd import _accumulator


def rkd_loss(
    x_s: Tensor, x_t: Tensor, distance_weight: float = 25.0, angle_weight: float = 50.0
) -> Tensor:
    """smooth-L1 between pairwise distances over their mean, and between the cosines of triplets.

    Both are [batch, dim]. A pair of identical samples has the distance 0 and no direction, so its
    cosines are 0.
    """
    dtype = _accumulator(x_s)
    distances: list[Tensor] = []
    cosines: list[Tensor] = []
    for x in (x_s.to(dtype), x_t.to(dtype)):
        apart = x.unsqueeze(0) - x.unsqueeze(1)
        squared = apart.square().sum(2)
        same = squared == 0
        distance = torch.where(same, 0, torch.where(same, 1, squared).sqrt())
        pairs = max(x.shape[0] * (x.shape[0] - 1), 1)
        mean = distance.sum() / pairs
        distances.append(distance / torch.where(mean == 0, 1, mean))
        unit = torch.where(same, 0, 1 / torch.where(same, 1, distance)).unsqueeze(2) * apart
        cosines.append(torch.bmm(unit, unit.mT))
    if x_s.shape[0] == 0:
        return distances[0].sum() + cosines[0].sum()
    distance_loss = F.smooth_l1_loss(distances[0], distances[1])
    angle_loss = F.smooth_l1_loss(cosines[0], cosines[1])
    return distance_weight * distance_loss + angle_weight * angle_loss


def _lengths(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Distances from a Gram matrix and their inverses; 0 for pairs that rounding cannot tell."""
    limits = torch.finfo(gram.dtype)
    norms = gram.diagonal()
    total = norms.unsqueeze(1) + norms
    squared = total - 2 * gram
    same = squared < (8 * limits.eps * total).clamp(min=limits.tiny)
    distance = squared.masked_fill(same, 0).sqrt()
    return distance, distance.reciprocal().masked_fill(same, 0)


def _smooth_l1(x: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of h(x), and its derivative."""
    slope = x.clamp(-1, 1)
    return (slope * (x - 0.5 * slope)).sum(), slope


def rkd_fwd_grad(
    gram_s: Tensor, gram_t: Tensor, distance_weight: float, angle_weight: float
) -> tuple[Tensor, Tensor]:
    """rkd_loss from the Gram matrices x x^T, and its gradient in the student's, a symmetric matrix.

    dloss/dx_s = 2 grad x_s, and rows of grad sum to 0. With d2 the squared distance,
    cos_ijk = r_ij r_ik (G_jk - G_ij - G_ik + G_ii) for r = 1/d; it is visited for one i at a time,
    so that memory is batch^2. Pairs with d2 < 8 eps (G_ii + G_jj) count as identical.

    Args:
        gram_s: [batch, batch], symmetric, float32 or float64. Embeddings are centred first: the
            square of their mean would swamp the distances.
        gram_t: the teacher's, in the same dtype.
    """
    n = gram_s.shape[0]
    loss = gram_s.new_zeros(())
    pull = torch.zeros_like(gram_s, memory_format=torch.contiguous_format)  # dloss/dd2 of a pair
    if n == 0:
        return loss, pull
    (d_s, r_s), (d_t, r_t) = _lengths(gram_s), _lengths(gram_t)
    if distance_weight != 0:
        pairs = max(n * (n - 1), 1)
        psi = []
        for d in (d_s, d_t):
            mean = d.sum() / pairs
            psi.append(torch.where(mean == 0, 0, mean.reciprocal()))
        by_s, by_t = psi
        total, slope = _smooth_l1(d_s * by_s - d_t * by_t)
        mean_slope = (slope * d_s).sum() * by_s / pairs
        loss = loss + total * (distance_weight / n**2)
        pull += (distance_weight / n**2) * by_s * (slope - mean_slope) * r_s
    if angle_weight != 0:
        weight = angle_weight / n**3
        for i in range(n):
            cosines = []
            for gram, r in ((gram_s, r_s[i]), (gram_t, r_t[i])):
                alpha = gram[i, i] / 2 - gram[i]
                cosines.append(r.unsqueeze(1) * r * (gram + alpha.unsqueeze(1) + alpha))
            total, slope = _smooth_l1(cosines[0] - cosines[1])
            slope.fill_diagonal_(0)  # of cosines that are 1, or 0 for a pair that counts as one
            loss = loss + weight * total
            pull -= weight * (r_s[i].unsqueeze(1) * r_s[i] * slope)
            row = weight * r_s[i] * (slope @ r_s[i] - r_s[i] * (slope * cosines[0]).sum(1))
            pull[i] += row
            pull[:, i] += row
    pull.fill_diagonal_(0)
    return loss, torch.diag(pull.sum(1)) - pull
