"""deit_hard_loss beside two cross-entropies: see features.py."""

from __future__ import annotations

import torch.nn.functional as F

from features import draw, every_device, measure
from vitkd_fast.functional import deit_hard_loss

ROWS, CLASSES = 4096, 1000


@every_device
def bench_forward_backward(race, capsys, device, where):
    labels = (draw(ROWS).abs() * 100).long().clamp(max=CLASSES - 1).to(device)

    def public(student, teacher):
        of_labels = F.cross_entropy(student, labels)
        return 0.5 * of_labels + 0.5 * F.cross_entropy(student, teacher.argmax(1))

    def ours(student, teacher):
        return deit_hard_loss(student, teacher, labels)

    pair = draw(ROWS, CLASSES).to(device), draw(ROWS, CLASSES + 1).to(device)[:, 1:]
    measure(race, capsys, device, ours, public, public, [pair[0]], [pair[1]], rounds=5)
