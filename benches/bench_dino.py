"""dino_loss beside its authors' double loop: see features.py. Ten views, two of the teacher."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from features import draw, every_device, measure
from vitkd_fast.functional import dino_loss

VIEWS, BATCH, CLASSES = 10, 16, 65536


def public(student, teacher):
    s, p = (student / 0.1).unbind(0), (teacher / 0.04).softmax(-1).unbind(0)
    loss, pairs = 0, 0
    for i, target in enumerate(p):
        for j, view in enumerate(s):
            if i != j:
                loss = loss + torch.sum(-target * F.log_softmax(view, -1), -1).mean()
                pairs += 1
    return loss / pairs


@every_device
def bench_forward_backward(race, capsys, device, where):
    student, teacher = draw(VIEWS, BATCH, CLASSES).to(device), draw(2, BATCH, CLASSES).to(device)
    measure(race, capsys, device, dino_loss, public, public, [student], [teacher], rounds=3)
