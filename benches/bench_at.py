"""at_loss beside unfused PyTorch: see features.py. Bound by the bytes of a copy."""

from __future__ import annotations

import pytest
import torch.nn.functional as F

from features import as_map, every_device, every_form, features, measure
from vitkd_fast.functional import at_loss


def public(f_s, tokens):
    def attention(f):
        return F.normalize(f.pow(2).mean(1).flatten(1))

    return (attention(f_s) - attention(as_map(tokens))).pow(2).sum(1).mean()


@every_form
@pytest.mark.parametrize("name", ["at"])
@every_device
def bench_forward_backward(race, capsys, device, where, name, form):
    student, teacher = features(device, form)
    measure(race, capsys, device, at_loss, public, public, [student], [teacher])
