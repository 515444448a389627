"""binary_kd_loss beside unfused PyTorch: see features.py. Bound by exponentials and divisions."""

from __future__ import annotations

import pytest
import torch.nn.functional as F

from features import draw, every_device, measure
from vitkd_fast.functional import binary_kd_loss

ROWS, CLASSES, TEMPERATURE = 4096, 1000, 2.0


def loss(student, teacher, labels):
    return binary_kd_loss(
        student, teacher, labels, temperature=TEMPERATURE, kd_weight=0.5, bce_weight=0.5
    )


def public(student, teacher, labels):
    """Cross-entropies of soft labels, less the teacher's entropy."""
    p = (teacher / TEMPERATURE).sigmoid()
    cross = F.binary_cross_entropy_with_logits(student / TEMPERATURE, p)
    entropy = F.binary_cross_entropy_with_logits(teacher / TEMPERATURE, p)
    hard = F.binary_cross_entropy_with_logits(student, labels)
    return 0.5 * TEMPERATURE**2 * (cross - entropy) + 0.5 * hard


@pytest.mark.parametrize(("name", "form"), [("binary_kd", "logits")])
@every_device
def bench_forward_backward(race, capsys, device, where, name, form):
    student, teacher = draw(ROWS, CLASSES).to(device), 3 * draw(ROWS, CLASSES).flip(0).to(device)
    labels = (draw(ROWS, CLASSES).flip(1) > 1.5).float().to(device)
    measure(race, capsys, device, loss, public, public, [student], [teacher, labels])
