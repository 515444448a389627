"""deit_hard_loss, by torch's cross-entropy, differentiated by autograd."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .kd import _accumulator


def deit_hard_loss(
    student: Tensor,
    student_kd: Tensor,
    teacher: Tensor,
    labels: Tensor,
    alpha: float = 0.5,
    label_smoothing: float = 0.0,
) -> Tensor:
    """(1 - alpha) CE(student, labels) + alpha CE(student_kd, argmax(teacher)), [batch].

    All logits are [batch, classes]; of one head, both students are the same.
    """
    s, s_kd = (x.to(_accumulator(x)) for x in (student, student_kd))
    of_labels = F.cross_entropy(s, labels, label_smoothing=label_smoothing, reduction="none")
    of_teacher = F.cross_entropy(s_kd, teacher.argmax(1), reduction="none")
    return (1 - alpha) * of_labels + alpha * of_teacher
