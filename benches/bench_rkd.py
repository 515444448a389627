"""rkd_loss beside unfused PyTorch: see features.py.

16 vector instructions per register of triplets, n^2 (n - 1) / 2 of them, and three products
[n, n, dim].
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from features import draw, every_device, measure
from vitkd_fast import reference
from vitkd_fast.functional import rkd_loss

N, DIM = 256, 1280


def public(x_s, x_t):
    def distances(e):
        square = e.pow(2).sum(1)
        d = (square.unsqueeze(1) + square.unsqueeze(0) - 2 * e @ e.t()).clamp(min=1e-12).sqrt()
        d = d * (1 - torch.eye(len(e), device=e.device))
        return d / (d.sum() / (len(e) * (len(e) - 1)))

    def cosines(e):
        unit = F.normalize(e.unsqueeze(0) - e.unsqueeze(1), p=2, dim=2)
        return torch.bmm(unit, unit.transpose(1, 2)).view(-1)

    with torch.no_grad():
        d_t, cos_t = distances(x_t), cosines(x_t)
    distance_loss = F.smooth_l1_loss(distances(x_s), d_t)
    return 25 * distance_loss + 50 * F.smooth_l1_loss(cosines(x_s), cos_t)


class Exact(torch.autograd.Function):
    """By the reference of the operation, whose gradient is in the Gram matrix."""

    @staticmethod
    def forward(ctx, x_s, x_t):
        x_s, x_t = (x - x.mean(0) for x in (x_s, x_t))
        loss, grad = reference.rkd_fwd_grad(x_s @ x_s.T, x_t @ x_t.T, 25.0, 50.0)
        ctx.save_for_backward(2 * grad @ x_s)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        return grad_loss * ctx.saved_tensors[0], None


@pytest.mark.parametrize(("name", "form"), [("rkd", "embeddings")])
@every_device
def bench_forward_backward(race, capsys, device, where, name, form):
    student, teacher = draw(N, DIM).to(device), draw(N, DIM + 1).to(device)[:, 1:]
    measure(
        race, capsys, device, rkd_loss, public, Exact.apply, [student], [teacher],
        flops=32 * N * N * (N - 1) // 2 + 6 * N * N * DIM, rounds=3,
    )  # fmt: skip
