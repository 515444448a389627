"""feature_loss beside unfused PyTorch: see features.py. Bound by three products of matrices."""

from __future__ import annotations

from functools import partial

import pytest
import torch.nn.functional as F

from features import C_S, C_T, ROWS, as_map, draw, every_device, every_form, features, measure
from vitkd_fast.functional import feature_loss


def public(kind):
    def loss(f_s, tokens, weight):
        y, t = F.conv2d(f_s, weight[:, :, None, None]), as_map(tokens)
        if kind == "cosine":
            return (1 - F.cosine_similarity(y, t, 1)).mean()
        return F.mse_loss(y, t) if kind == "mse" else F.smooth_l1_loss(y, t)

    return loss


@every_form
@pytest.mark.parametrize("kind", ["mse", "cosine", "smooth_l1"])
@every_device
def bench_forward_backward(race, capsys, device, where, kind, form):
    student, teacher = features(device, form)
    weight = (draw(C_T, C_S) / C_S**0.5).to(device)
    measure(
        race, capsys, device, partial(feature_loss, kind=kind), public(kind), public(kind),
        [student, weight], [teacher], flops=6 * ROWS * C_S * C_T,
    )  # fmt: skip
