"""ofa_loss of five branches beside OFA-KD's code: see features.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from features import draw, every_device, measure
from vitkd_fast.functional import ofa_loss

ROWS, CLASSES, BRANCHES, EPS = 4096, 1000, 5, 1.5


@every_device
def bench_forward_backward(race, capsys, device, where):
    labels = (draw(ROWS).abs() * 100).long().clamp(max=CLASSES - 1).to(device)

    def public(student, teacher):
        mask = F.one_hot(labels, CLASSES)
        losses = []
        for x in student.unbind(0):
            prod = (F.softmax(teacher, dim=1) + mask) ** EPS
            losses.append(torch.sum(-(prod - mask) * torch.log(F.softmax(x, dim=1)), -1).mean())
        return sum(losses)

    def ours(student, teacher):
        return ofa_loss(student.unbind(0), teacher, labels, eps=EPS)

    students, teacher = draw(BRANCHES, ROWS, CLASSES), draw(ROWS, CLASSES + 1)[:, 1:]
    students, teacher = students.to(device), teacher.to(device)
    measure(race, capsys, device, ours, public, public, [students], [teacher], rounds=5)
