"""fused_linear_kd_loss beside a linear layer and the naive loss: see features.py.

A head's product three times (logits, and the gradients of features and weight) is what either does
at least; memory is what each makes, gradients included.
"""

from __future__ import annotations

import pytest
import torch.nn.functional as F

from features import draw, every_device, measure
from vitkd_fast.functional import fused_linear_kd_loss, kd_loss

DIM, T = 1280, 2.0


def public(x, teacher, weight, bias):
    s = F.linear(x, weight, bias)
    log_q, p = F.log_softmax(s / T, 1), F.softmax(teacher / T, 1)
    return F.kl_div(log_q, p, reduction="batchmean") * T * T


def kd_of_logits(x, teacher, weight, bias):
    return kd_loss(F.linear(x, weight, bias), teacher, temperature=T)


def ours(x, teacher, weight, bias):
    return fused_linear_kd_loss(x, weight, bias, teacher, temperature=T)


@pytest.mark.parametrize(("rows", "classes"), [(4096, 1000), (1024, 21841)])
@every_device
def bench_forward_backward(race, capsys, device, where, rows, classes):
    inputs = [x.to(device) for x in (draw(rows, DIM), draw(classes, DIM) / 36, draw(classes))]
    measure(
        race, capsys, device, ours, public, public, inputs, [draw(rows, classes).to(device)],
        flops=3 * 2 * rows * DIM * classes, rounds=3, others={"kd_loss of logits": kd_of_logits},
    )  # fmt: skip
