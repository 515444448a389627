"""Losses as modules: the functions of `vitkd_fast.functional` with their options kept."""

from __future__ import annotations

from torch import Tensor, nn

from . import functional


class KDLoss(nn.Module):
    """kd_weight * T^2 * KL(softmax(teacher/T) || softmax(student/T)) + ce_weight * CE(student, y).

    The arguments are those of `vitkd_fast.functional.kd_loss`, which says what they mean and what
    is raised.
    """

    def __init__(
        self,
        temperature: float | Tensor = 1.0,
        kd_weight: float = 1.0,
        ce_weight: float = 0.0,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        class_dim: int = -1,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.kd_weight = kd_weight
        self.ce_weight = ce_weight
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.class_dim = class_dim
        self.reduction = reduction

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: functional.Labels | None = None,
        row_weights: Tensor | None = None,
    ) -> Tensor:
        """The loss of student and teacher logits; see `vitkd_fast.functional.kd_loss`."""
        return functional.kd_loss(
            student,
            teacher,
            temperature=self.temperature,
            labels=labels,
            kd_weight=self.kd_weight,
            ce_weight=self.ce_weight,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            row_weights=row_weights,
            class_dim=self.class_dim,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, kd_weight={self.kd_weight}, "
            f"ce_weight={self.ce_weight}, label_smoothing={self.label_smoothing}, "
            f"reduction={self.reduction!r}"
        )
