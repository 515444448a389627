"""dist_loss: the unfused PyTorch implementation differentiated by autograd, and its operations."""

from __future__ import annotations

import torch
from torch import Tensor

from .kd import _accumulator

EPS = 1e-8  # of the authors' code


def _probabilities(x: Tensor, temperature: float) -> Tensor:
    return torch.softmax(x.to(_accumulator(x)) / temperature, -1)


def _correlation(q: Tensor, p: Tensor, dim: int) -> Tensor:
    q, p = q - q.mean(dim, keepdim=True), p - p.mean(dim, keepdim=True)
    norms = q.norm(dim=dim) * p.norm(dim=dim)
    return (q * p).sum(dim) / (norms + EPS)


def dist_loss(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
) -> Tensor:
    """T^2 (beta mean_b (1 - rho(q_b, p_b)) + gamma mean_c (1 - rho(q_:c, p_:c)))."""
    q, p = (_probabilities(x, temperature) for x in (student, teacher))
    inter = 1 - _correlation(q, p, 1).mean()
    intra = 1 - _correlation(q, p, 0).mean()
    return temperature**2 * (beta * inter + gamma * intra)


def dist_moments(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """What the correlations are made of.

    [7, rows]: max s, 1 / sum exp((s - max s)/T), the same of t; and sum (q - u)^2, sum (p - u)^2,
    sum (q - u)(p - u) with u = 1 / classes. [5, classes], in float64: sums of q, p, q^2, p^2, qp
    over the rows, which can be added up over processes.
    """
    dtype = _accumulator(student)
    s, t = student.to(dtype), teacher.to(dtype)
    stats: list[Tensor] = []
    for x in (s, t):
        top = x.amax(-1, keepdim=True)
        stats += [top.squeeze(-1), 1 / ((x - top) / temperature).exp().sum(-1)]
    q, p = (_probabilities(x, temperature) for x in (s, t))
    u = 1 / student.shape[1]
    stats += [(q - u).square().sum(-1), (p - u).square().sum(-1), ((q - u) * (p - u)).sum(-1)]
    q, p = q.double(), p.double()
    columns = [q.sum(0), p.sum(0), q.square().sum(0), p.square().sum(0), (q * p).sum(0)]
    return torch.stack(stats), torch.stack(columns)


def dist_bwd(
    grad_loss: Tensor, student: Tensor, teacher: Tensor, stats: Tensor, row_factors: Tensor,
    column_factors: Tensor, temperature: float,
) -> Tensor:  # fmt: skip
    """grad_loss / T * q (g - sum q g), from g = dloss/dq up to what is constant in a row.

    g = row_p (p - u) - row_q (q - u) + by_p (p - mean_p) - by_q (q - mean_q), with u = 1 / classes.

    Args:
        row_factors: row_q, row_p: [2, rows].
        column_factors: mean_q, mean_p, by_q, by_p: [4, classes].
    """
    q, p = (_probabilities(x, temperature) for x in (student, teacher))
    u = 1 / student.shape[1]
    row_q, row_p = row_factors.unsqueeze(-1)
    mean_q, mean_p, by_q, by_p = column_factors
    g = row_p * (p - u) - row_q * (q - u) + by_p * (p - mean_p) - by_q * (q - mean_q)
    grad = q * (g - (q * g).sum(-1, keepdim=True)) * (grad_loss / temperature)
    return student.new_empty(student.shape).copy_(grad)
