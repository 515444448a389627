"""nst_loss beside unfused PyTorch: see features.py. Bound by products of matrices."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from features import C_S, C_T, POSITIONS, ROWS, as_map, every_device, every_form, features, measure
from vitkd_fast.functional import nst_loss


def public(f_s, tokens):
    def kernel(a, b):
        return (a.unsqueeze(1) * b.unsqueeze(2)).sum(-1).pow(2).mean((1, 2))

    s = F.normalize(f_s.flatten(2), dim=2)
    t = F.normalize(as_map(tokens).flatten(2), dim=2)
    return (kernel(t, t) + kernel(s, s) - 2 * kernel(s, t)).mean()


def public_bmm(f_s, tokens):
    """The same kernel matrices as products of matrices, which no repository seems to do."""

    def kernel(a, b):
        return torch.bmm(a, b.mT).pow(2).mean((1, 2))

    s = F.normalize(f_s.flatten(2), dim=2)
    t = F.normalize(as_map(tokens).flatten(2), dim=2)
    return (kernel(t, t) + kernel(s, s) - 2 * kernel(s, t)).mean()


def exact(f_s, tokens):
    s = F.normalize(f_s.flatten(2), dim=2)
    t = F.normalize(tokens.mT, dim=2)
    return (torch.bmm(s.mT, s) / C_S - torch.bmm(t.mT, t) / C_T).square().sum((1, 2)).mean()


@every_form
@pytest.mark.parametrize("name", ["nst"])
@every_device
def bench_forward_backward(race, capsys, device, where, name, form):
    student, teacher = features(device, form)
    measure(
        race, capsys, device, nst_loss, public, exact, [student], [teacher],
        flops=2 * ROWS * POSITIONS * (2 * C_S + C_T), rounds=3, others={"eager, bmm": public_bmm},
    )  # fmt: skip
