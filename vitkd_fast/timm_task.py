"""timm's training tasks with the fused losses: for timm's train script, or a loop like it.

    loss = task_loss_weight * criterion(student, target) + distill_loss_weight * kd_loss

Arguments, weights, checkpoints, EMA, DDP and compile are those of timm's own tasks, so that one
changed line of a script gives the fused loss: `FusedLogitDistillationTask` for
timm's LogitDistillationTask, `AttentionDistillationTask` for its FeatureDistillationTask.
Unlike theirs, a step never synchronises with the device.
"""

from __future__ import annotations

import copy
import logging
from functools import cached_property
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

try:
    from timm.task import (
        DistillationTeacher,
        FeatureDistillationTask,
        LogitDistillationTask,
        TrainingTask,
    )
    from timm.task.distillation import FeatureDistillationTrainableModule

    TrainingTask.get_task_state  # noqa: B018  the projection is saved by it
except (ImportError, AttributeError) as error:
    raise ImportError(
        f"vitkd_fast.timm_task: expected timm >= 1.0.27, got {timm.__version__}; "
        "pip install 'timm>=1.0.27'"
    ) from error

from timm.utils.model import unwrap_model

from . import functional
from .models import input_size
from .nn import AttentionMapProjection
from .taps import Taps

_logger = logging.getLogger(__name__)


class _Distillation(TrainingTask):
    """Shared by both tasks: the teacher's input, and the result."""

    criterion: Any
    teacher: Any
    student_mean: Tensor
    student_std: Tensor
    task_loss_weight: float
    distill_loss_weight: float

    def _teacher_input(self, input: Tensor) -> Tensor:
        """The student's input, normalised for the teacher."""
        teacher, mean, std = self.teacher, self.student_mean, self.student_std
        if type(teacher).normalize_input is not DistillationTeacher.normalize_input:
            return teacher.normalize_input(input, mean, std)
        if self._normalised_alike:
            return input
        return (input * std + mean - teacher.mean_kd) / teacher.std_kd

    @cached_property
    def _normalised_alike(self) -> bool:
        # timm's normalize_input compares at every step, and that synchronises with the device
        pairs = (self.student_mean, self.teacher.mean_kd), (self.student_std, self.teacher.std_kd)
        return all(torch.equal(a, b) for a, b in pairs)

    def _result(self, output: Tensor, target: Tensor, kd_loss: Tensor) -> dict[str, Tensor]:
        task_loss = self.criterion(output, target)
        loss = self.task_loss_weight * task_loss + self.distill_loss_weight * kd_loss
        return {"loss": loss, "output": output, "task_loss": task_loss, "kd_loss": kd_loss}


class FusedLogitDistillationTask(_Distillation, LogitDistillationTask):
    """task_loss_weight * criterion + distill_loss_weight * T^2 * KL(teacher || student) at T.

    timm's LogitDistillationTask with `functional.kd_loss` for its KL term: the same arguments,
    loss and gradient, and the arithmetic in float32 whatever the logits' dtype. The criterion is
    called as it is, so targets are what it takes: class ids, or mixup's dense targets for
    timm.loss.SoftTargetCrossEntropy.
    """

    temperature: float

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The losses of a batch.

        Args:
            input: [B, C, H, W], normalised for the student.
            target: what the criterion takes.

        Returns:
            loss, output (the student's logits), task_loss and kd_loss (both without their weight).
        """
        output = self.trainable_module(input)
        with torch.no_grad():
            teacher = self.teacher(self._teacher_input(input))
        kd_loss = functional.kd_loss(output, teacher, temperature=self.temperature)
        return self._result(output, target, kd_loss)


class AttentionDistillationTask(_Distillation, FeatureDistillationTask):
    """task_loss_weight * criterion + distill_loss_weight * attention_map_loss.

    The student's queries and keys are learned from its feature map, by
    `nn.AttentionMapProjection`, and their attention is to be that of a block of the teacher, a
    vision transformer. timm's FeatureDistillationTask with another feature: the projection is part
    of the trainable module, and so of timm's optimiser, DDP, EMA and task state; what is evaluated
    and only the student is saved as the model.

    Args:
        student_model: from timm, with a feature map of `stride`.
        teacher_model: a name of timm's, a module, or a DistillationTeacher: a ViT, DeiT or another
            whose blocks share one grid of patches.
        criterion: of the student's logits and the target.
        block: of the teacher; negative numbers count from the end.
        stride: of the student's map.
        heads: in which the two are compared; the teacher's, unless given.
        head_dim, teacher_heads, temperature, kind: as in `nn.AttentionMapProjection`.
        student_feature_dim, teacher_feature_dim: None: no pooled features are compared.
        verbose: log the options.
        options: what else timm.task.FeatureDistillationTask takes.

    Raises:
        ValueError: naming the argument, what was expected and what was given.
    """

    def __init__(
        self,
        student_model: nn.Module,
        teacher_model: str | nn.Module,
        criterion: nn.Module | None = None,
        *,
        block: int = -1,
        stride: int = 16,
        heads: int | None = None,
        head_dim: int | None = None,
        teacher_heads: Literal["split", "mean"] = "split",
        temperature: float = 1.0,
        kind: str = "kl",
        student_feature_dim: int | None = None,
        teacher_feature_dim: int | None = None,
        verbose: bool = True,
        **options: Any,
    ) -> None:
        dims = {
            "student_feature_dim": student_feature_dim,
            "teacher_feature_dim": teacher_feature_dim,
        }
        for name, given in dims.items():
            if given is not None:
                raise ValueError(f"AttentionDistillationTask: {name}: expected None, got {given}")
            options[name] = 1  # alike: timm adds no projection of pooled features
        super().__init__(student_model, teacher_model, criterion, verbose=False, **options)
        self.verbose, self.block = verbose, block
        teacher, student = unwrap_model(self.teacher.model), unwrap_model(student_model)
        self.teacher_taps = Taps(teacher, attention=(block,))
        self.teacher_taps.model = self.teacher
        # a copy, whose batch norms may be in evaluation mode
        looked_at = Taps(copy.deepcopy(student).eval(), maps=(stride,))
        with torch.no_grad():
            projection = AttentionMapProjection.between(
                looked_at(_zeros(student)).maps[stride],
                self.teacher_taps(_zeros(teacher)).queries[block],
                self.teacher_taps,
                block,
                heads=heads,
                head_dim=head_dim,
                teacher_heads=teacher_heads,
                temperature=temperature,
                kind=kind,
            )
        projection.to(device=self.device, dtype=self.dtype)
        self.trainable_module = _Student(student_model, projection, stride)
        if verbose:
            _logger.info(
                f"AttentionDistillationTask: task_weight={self.task_loss_weight}, "
                f"distill_weight={self.distill_loss_weight}, {block=}, {stride=}, {projection}"
            )

    def compile(  # type: ignore[override]
        self, backend: str = "inductor", mode: str | None = None, **options: Any
    ) -> Any:
        """Compiles student and teacher; the loss is fused as it is."""
        student: Any = self.trainable_module
        self.eval_model = torch.compile(student.student, backend=backend, mode=mode, **options)
        for taps in (student.taps, self.teacher_taps):
            taps.compile(backend=backend, mode=mode, **options)
        return self.eval_model

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The losses of a batch; as `FusedLogitDistillationTask.forward`."""
        with torch.no_grad():
            teacher = self.teacher_taps(self._teacher_input(input))
        queries, keys = teacher.queries[self.block], teacher.keys[self.block]
        output, kd_loss = self.trainable_module(input, queries, keys)
        return self._result(output, target, kd_loss)


class _Student(FeatureDistillationTrainableModule):
    """Student and projection in one module, so that DDP sees every parameter that learns."""

    projection: nn.Module

    def __init__(self, student: nn.Module, projection: nn.Module, stride: int) -> None:
        super().__init__(student, projection)
        self.stride = stride
        self.taps = Taps(unwrap_model(student), maps=(stride,))
        self.taps.model = student

    def forward(  # type: ignore[override]
        self, input: Tensor, queries: Tensor, keys: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logits, and the loss of the map for the teacher's queries and keys."""
        tapped = self.taps(input)
        return tapped.logits, self.projection(tapped.maps[self.stride], queries, keys)


def _zeros(model: nn.Module) -> Tensor:
    """An image that the model takes."""
    weight = next(model.parameters())
    channels: Any = getattr(model, "in_chans", 3)
    return weight.new_zeros(1, channels, *input_size(model))
