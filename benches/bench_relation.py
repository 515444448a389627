"""relation_loss beside unfused PyTorch: see features.py. Bound by four products of matrices."""

from __future__ import annotations

import pytest
import torch.nn.functional as F

from features import BATCH, POSITIONS, draw, every_device, measure
from vitkd_fast.functional import relation_loss

HEADS, DIM_S, DIM_T = 6, 32, 64


def public(x_s, x_t):
    def log_relations(x):
        return F.log_softmax(x @ x.mT / x.shape[-1] ** 0.5, -1)

    loss = F.kl_div(log_relations(x_s), log_relations(x_t), reduction="none", log_target=True)
    return loss.sum(-1).mean()


@pytest.mark.parametrize("name", ["relation"])
@every_device
def bench_forward_backward(race, capsys, device, where, name):
    student = draw(BATCH, HEADS, POSITIONS, DIM_S).to(device)
    teacher = draw(BATCH, HEADS, POSITIONS + 1, DIM_T).to(device)[:, :, 1:]
    measure(
        race, capsys, device, relation_loss, public, public, [student], [teacher],
        flops=2 * BATCH * HEADS * POSITIONS**2 * (3 * DIM_S + DIM_T), rounds=5,
    )  # fmt: skip
