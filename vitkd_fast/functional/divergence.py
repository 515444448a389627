"""reverse_kl_loss, js_loss and tv_loss: other divergences than kd_loss's, in the same pass."""

from __future__ import annotations

from torch import Tensor

from ._common import check_numbers
from ._rows import Labels, row_loss


def reverse_kl_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    labels: Labels | None = None,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    row_weights: Tensor | None = None,
    class_dim: int = -1,
    reduction: str = "mean",
) -> Tensor:
    """kd_weight * T^2 * KL(softmax(student/T) || softmax(teacher/T)) + ce_weight * CE(student, y).

    The divergence that seeks the teacher's modes (for language models: Gu et al., 2024,
    arXiv:2306.08543). A class where both probabilities underflow counts 0, never NaN.

    Args, returns and raises are those of `kd_loss`, and so are the derivatives; +inf where the
    teacher is -inf and the student is finite.
    """
    return row_loss(
        "reverse_kl_loss", "reverse_kl", student, teacher, temperature=temperature, labels=labels,
        kd_weight=kd_weight, ce_weight=ce_weight, label_smoothing=label_smoothing,
        ignore_index=ignore_index, row_weights=row_weights, class_dim=class_dim,
        reduction=reduction,
    )  # fmt: skip


def js_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    beta: float = 0.5,
    temperature: float | Tensor = 1.0,
    labels: Labels | None = None,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    row_weights: Tensor | None = None,
    class_dim: int = -1,
    reduction: str = "mean",
) -> Tensor:
    """kd_weight * T^2 * (b KL(p || m) + (1 - b) KL(q || m)) + ce_weight * CE, m = b p + (1 - b) q.

    The generalised Jensen-Shannon divergence of p = softmax(teacher/T) and q = softmax(student/T)
    (Agarwal et al., 2024, arXiv:2306.13649); it is at most T^2 * log 2 for b = 1/2, and finite also
    where classes are masked on one side. Divided by b it tends to kd_loss for b to 0, and divided
    by 1 - b to reverse_kl_loss for b to 1.

    Args:
        beta: b, between 0 and 1, both excluded.

    Other args, returns and raises are those of `kd_loss`, and so are the derivatives.
    """
    check_numbers("js_loss", {"beta": beta})
    if not 0 < beta < 1:
        raise ValueError(
            f"js_loss: beta: expected a number between 0 and 1, got {beta}; the limits are kd_loss "
            "and reverse_kl_loss"
        )
    return row_loss(
        "js_loss", "js", student, teacher, beta=beta, temperature=temperature, labels=labels,
        kd_weight=kd_weight, ce_weight=ce_weight, label_smoothing=label_smoothing,
        ignore_index=ignore_index, row_weights=row_weights, class_dim=class_dim,
        reduction=reduction,
    )  # fmt: skip


def tv_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    labels: Labels | None = None,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    row_weights: Tensor | None = None,
    class_dim: int = -1,
    reduction: str = "mean",
) -> Tensor:
    """kd_weight * T^2 * sum |q - p| / 2 + ce_weight * CE(student, y).

    The total variation distance of p = softmax(teacher/T) and q = softmax(student/T), 0 to 1 before
    its factors (for language models: Wen et al., 2023, arXiv:2307.15190). Where q = p the gradient
    is 0.

    Args, returns and raises are those of `kd_loss`, and so are the derivatives; masked classes
    count 0 where both are masked, and are finite.
    """
    return row_loss(
        "tv_loss", "tv", student, teacher, temperature=temperature, labels=labels,
        kd_weight=kd_weight, ce_weight=ce_weight, label_smoothing=label_smoothing,
        ignore_index=ignore_index, row_weights=row_weights, class_dim=class_dim,
        reduction=reduction,
    )  # fmt: skip
