"""deit_hard_loss: the labels and the teacher's choice, in one pass where there is one head."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import check_numbers
from ._rows import Labels, checked
from .kd import kd_loss

_NAME = "deit_hard_loss"


def _cross_entropy(
    student: Tensor, labels: Labels, weight: float, smoothing: float, ignore: int, reduction: str
) -> Tensor:
    """In kd_loss's pass, without its other term: the student is a teacher of weight 0."""
    return kd_loss(
        student, student.detach(), labels=labels, kd_weight=0.0, ce_weight=weight,
        label_smoothing=smoothing, ignore_index=ignore, reduction=reduction,
    )  # fmt: skip


def deit_hard_loss(
    student: Tensor | tuple[Tensor, Tensor],
    teacher: Tensor,
    labels: Labels,
    *,
    alpha: float = 0.5,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """(1 - alpha) CE(student, y) + alpha CE(student, argmax(teacher)).

    Hard-label distillation (Touvron et al., 2021, arXiv:2012.12877). Of one head it is the
    cross-entropy of one mixed target, and so one pass over the logits; two heads take one each.
    The teacher is a constant: one that requires grad is an error, unless under torch.no_grad(). The
    loss is differentiable once, in reverse mode.

    Args:
        student: logits [..., classes], or those of two heads: the first learns the labels, the
            second what the teacher chooses. float32, float16, bfloat16 or float64.
        teacher: logits of the same shape. Of equal ones the first class is chosen.
        labels: int64 class ids, or mixup's (labels_a, labels_b, lam), as in `kd_loss`.
        alpha: the teacher's share, 0 to 1.
        label_smoothing: of the labels' term; the teacher's choice is never smoothed.
        ignore_index: a label whose rows are left out of both terms.
        reduction: "mean" over the rows that are not ignored, "sum", or "none".

    Returns:
        The loss, float32 (float64 for float64): 0-dim, or one number per row for "none".

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was given; a teacher
            that requires grad.
        RuntimeError: a label out of range, on the CPU; a second derivative, or one in forward mode.
    """
    two = isinstance(student, tuple) and len(student) == 2
    given: tuple[Tensor, ...] = student if two else (student,)  # type: ignore[assignment]
    check_numbers(_NAME, {"alpha": alpha})
    heads = [
        checked(
            _NAME, head, teacher, temperature=1.0, labels=labels, kd_weight=0.0, ce_weight=1.0,
            label_smoothing=label_smoothing, ignore_index=ignore_index, row_weights=None,
            class_dim=-1, reduction=reduction,
        )[0]
        for head in given
    ]  # fmt: skip
    if not 0 <= alpha <= 1:
        raise ValueError(f"{_NAME}: alpha: expected 0 to 1, got {alpha}")
    chosen = teacher.argmax(-1)
    for ids in labels[:2] if isinstance(labels, (tuple, list)) else (labels,):
        chosen = torch.where(ids == ignore_index, ignore_index, chosen)
    rest = ignore_index, reduction
    if two or not isinstance(labels, Tensor):
        loss = _cross_entropy(heads[0], labels, 1 - alpha, label_smoothing, *rest)
        return loss + _cross_entropy(heads[-1], chosen, alpha, 0.0, *rest)
    # (1 - alpha) ((1 - e) onehot(y) + e / V) + alpha onehot(chosen), as kd_loss mixes and smooths
    smoothing = (1 - alpha) * label_smoothing
    hard = 1 - smoothing
    lam = (1 - alpha) * (1 - label_smoothing) / hard if hard > 0 else 1.0
    return _cross_entropy(heads[0], (labels, chosen, lam), 1.0, smoothing, *rest)
