"""Losses of logits as modules."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import functional
from ..functional.dino import dino
from .losses import Loss


class KDLoss(nn.Module):
    """kd_weight * T^2 * KL(softmax(teacher/T) || softmax(student/T)) + ce_weight * CE(student, y).

    The arguments are those of `vitkd_fast.functional.kd_loss`, which says what they mean and what
    is raised.
    """

    def __init__(
        self,
        temperature: float | Tensor = 1.0,
        kd_weight: float = 1.0,
        ce_weight: float | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        class_dim: int = -1,
        reduction: str = "mean",
        compat: str | None = None,
        standardize: bool = False,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.kd_weight = kd_weight
        self.ce_weight = ce_weight
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.class_dim = class_dim
        self.reduction = reduction
        self.compat = compat
        self.standardize = standardize

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
            compat=self.compat,
            standardize=self.standardize,
        )

    def extra_repr(self) -> str:
        compat = f", compat={self.compat!r}" if self.compat else ""
        compat += ", standardize=True" if self.standardize else ""
        return (
            f"temperature={self.temperature}, kd_weight={self.kd_weight}, "
            f"ce_weight={self.ce_weight}, label_smoothing={self.label_smoothing}, "
            f"reduction={self.reduction!r}{compat}"
        )


class KDLossTopK(nn.Module):
    """kd_weight * T^2 * KL(p || softmax(student/T)) + ce_weight * CE(student, y), p of K classes.

    The arguments are those of `vitkd_fast.functional.kd_loss_topk`, which says what they mean and
    what is raised.
    """

    def __init__(
        self,
        temperature: float | Tensor = 1.0,
        tail: str = "smooth",
        kd_weight: float = 1.0,
        ce_weight: float = 0.0,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.tail = tail
        self.kd_weight = kd_weight
        self.ce_weight = ce_weight
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.reduction = reduction

    def forward(
        self,
        student: Tensor,
        indices: Tensor,
        values: Tensor,
        log_sum_exp: Tensor | None = None,
        labels: functional.Labels | None = None,
        row_weights: Tensor | None = None,
    ) -> Tensor:
        """The loss of student logits and a teacher's K classes; see `functional.kd_loss_topk`."""
        return functional.kd_loss_topk(
            student,
            indices,
            values,
            log_sum_exp=log_sum_exp,
            temperature=self.temperature,
            tail=self.tail,
            labels=labels,
            kd_weight=self.kd_weight,
            ce_weight=self.ce_weight,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            row_weights=row_weights,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, tail={self.tail!r}, ce_weight={self.ce_weight}"


class DISTLoss(nn.Module):
    """T^2 (beta mean_b (1 - rho(q_b, p_b)) + gamma mean_c (1 - rho(q_:c, p_:c))), rho: Pearson's.

    The arguments are those of `vitkd_fast.functional.dist_loss`, which says what they mean and what
    is raised.
    """

    def __init__(
        self, temperature: float = 1.0, beta: float = 1.0, gamma: float = 1.0, sync: bool = False
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.beta = beta
        self.gamma = gamma
        self.sync = sync

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of student and teacher logits; see `vitkd_fast.functional.dist_loss`."""
        return functional.dist_loss(
            student,
            teacher,
            temperature=self.temperature,
            beta=self.beta,
            gamma=self.gamma,
            sync=self.sync,
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, beta={self.beta}, gamma={self.gamma}"


class _RowLoss(Loss):
    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: functional.Labels | None = None,
        row_weights: Tensor | None = None,
    ) -> Tensor:
        """The loss of student and teacher logits."""
        return super().forward(student, teacher, labels=labels, row_weights=row_weights)


class ReverseKLLoss(_RowLoss):
    """kd_weight * T^2 * KL(softmax(student/T) || softmax(teacher/T)) + ce_weight * CE(student, y).

    The arguments are those of `vitkd_fast.functional.reverse_kl_loss`, by name.
    """

    function = staticmethod(functional.reverse_kl_loss)


class JSLoss(_RowLoss):
    """kd_weight * T^2 * (b KL(p || m) + (1 - b) KL(q || m)) + ce_weight * CE, m = b p + (1 - b) q.

    The arguments are those of `vitkd_fast.functional.js_loss`, by name.
    """

    function = staticmethod(functional.js_loss)


class TVLoss(_RowLoss):
    """kd_weight * T^2 * sum |q - p| / 2 + ce_weight * CE(student, y).

    The arguments are those of `vitkd_fast.functional.tv_loss`, by name.
    """

    function = staticmethod(functional.tv_loss)


class DKDLoss(_RowLoss):
    """kd_weight * T^2 * (alpha KL(b_t || b_s) + beta KL(p' || q')) + ce_weight * CE(student, y).

    The arguments are those of `vitkd_fast.functional.dkd_loss`, by name.
    """

    function = staticmethod(functional.dkd_loss)


class DINOLoss(nn.Module):
    """dino_loss, with the centre that follows the teacher's logits: c <- m c + (1 - m) mean(t).

    Self-distillation with no labels (Caron et al., 2021, arXiv:2104.14294). In training mode each
    call moves the centre after the loss, by the mean over all views and images, which is formed
    while the teacher's logits are read. It is the mean over all processes where torch.distributed
    is initialised.

    Args:
        classes: of the heads.
        temperature: of the student.
        teacher_temperature: may be changed, or given to a call: DINO warms it up to 0.07.
        momentum: m of the centre.

    Attributes:
        centre: [classes], a buffer, float32.
    """

    centre: Tensor

    def __init__(
        self,
        classes: int,
        temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        momentum: float = 0.9,
    ) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise ValueError(f"DINOLoss: momentum: expected 0 to 1, got {momentum}")
        self.temperature, self.teacher_temperature = temperature, teacher_temperature
        self.momentum = momentum
        self.register_buffer("centre", torch.zeros(classes))

    def forward(
        self, student: Tensor, teacher: Tensor, teacher_temperature: float | None = None
    ) -> Tensor:
        """The loss, 0-dim; arguments are those of `vitkd_fast.functional.dino_loss`."""
        if teacher_temperature is None:
            teacher_temperature = self.teacher_temperature
        centre = self.centre.clone()  # the graph's own: the next call must not change it
        if not self.training:
            return functional.dino_loss(
                student, teacher, centre, temperature=self.temperature,
                teacher_temperature=teacher_temperature,
            )  # fmt: skip
        sums = torch.zeros_like(centre, dtype=torch.promote_types(centre.dtype, teacher.dtype))
        loss = dino(student, teacher, centre, self.temperature, teacher_temperature, sums)
        with torch.no_grad():
            mean = sums / max(teacher.shape[0] * teacher.shape[1], 1)
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(mean)
                mean /= dist.get_world_size()
            if teacher.shape[1]:
                self.centre.lerp_(mean.to(self.centre.dtype), 1 - self.momentum)
        return loss

    def extra_repr(self) -> str:
        return (
            f"classes={self.centre.numel()}, temperature={self.temperature}, "
            f"teacher_temperature={self.teacher_temperature}, momentum={self.momentum}"
        )
