"""The losses of a batch as a timm training task: student, teacher, and modules of the losses."""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.task import TrainingTask
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .. import models
from ..taps import TapOutputs, Taps
from .config import Config
from .losses import Losses, StepOutputs, TapSpec, Term
from .runtime import Runtime


class DistillationTask(TrainingTask):
    """A student, its teacher, and the losses of a batch: a training task like timm's own.

    Args:
        losses: the terms.
        student: the student's predictor, on the runtime's device.
        teacher: the teacher's, or None.
        runtime: device, and precision of the student and of what the losses learn.
        image_size: of a blank image, which shows the shapes that both return.

    Attributes:
        student: the model that is trained, without its normalisation.
        trainable_module: the student and the modules that its losses train.

    Raises:
        ValueError: a term taps a stride or block that student or teacher do not have.
    """

    def __init__(
        self,
        losses: Losses,
        student: nn.Sequential,
        teacher: nn.Sequential | None,
        runtime: Runtime,
        image_size: int,
    ) -> None:
        super().__init__(device=runtime.device, verbose=False)
        self.runtime = runtime
        self.student: nn.Module = student[1]
        terms = dict(losses.terms())
        wanted = [term.taps() for term in terms.values()]
        self.teacher: nn.Module | None = teacher
        self.teacher_taps = (
            None if teacher is None else _taps(teacher, [teacher for _, teacher in wanted])
        )
        taps = _taps(student, [student for student, _ in wanted])
        learned = nn.ModuleDict()
        if taps and self.teacher_taps:
            training = self.student.training
            student.eval()  # one image is no batch to take statistics from
            image = torch.zeros(
                1, 3, image_size, image_size, dtype=torch.uint8, device=runtime.device
            )
            with torch.no_grad():
                outputs = taps(image), self.teacher_taps(image)
            student.train(training)
            for name, term in terms.items():
                if module := term.learned(*outputs, self.teacher_taps):
                    learned[name] = module.to(runtime.device)
        self.trainable_module: Any = _Trainable(student, taps, terms, learned, runtime)

    @classmethod
    def create(
        cls, config: Config, student: nn.Module, teacher: nn.Module | None, runtime: Runtime
    ) -> DistillationTask:
        """The task of a run: the student itself and a frozen copy of its teacher, on the device."""
        student = student.to(memory_format=runtime.memory_format)
        predictor = models.predictor(student).to(runtime.device)
        frozen = None
        if teacher:
            dtype = runtime.teacher_dtype
            teacher = copy.deepcopy(teacher).eval().requires_grad_(False)
            teacher = teacher.to(dtype).to(memory_format=runtime.memory_format)
            frozen = models.predictor(teacher, dtype=dtype).to(runtime.device).eval()
        return cls(config.losses, predictor, frozen, runtime, config.data.image_size)

    def train(self, mode: bool = True) -> DistillationTask:
        """Sets the mode of all but the teacher, which stays in evaluation mode."""
        super().train(mode)
        if self.teacher:
            self.teacher.eval()
        return self

    def compile(self, **options: Any) -> None:  # type: ignore[override]
        """Compiles student and teacher, by torch.compile; before `prepare_distributed`."""
        student = self.trainable_module
        if student.taps:
            student.taps.compile(**options)
        else:
            student.predict = torch.compile(student.predict, **options)
        if self.teacher_taps:
            self.teacher_taps.compile(**options)
        elif self.teacher:
            self.teacher = torch.compile(self.teacher, **options)  # type: ignore[assignment]

    def prepare_distributed(
        self, device_ids: list[Any] | None = None, **options: Any
    ) -> DistillationTask:
        """Wraps what learns in DistributedDataParallel; the teacher stays as it is."""
        self.trainable_module = DistributedDataParallel(
            self.trainable_module, device_ids=device_ids, **options
        )
        return self

    def teacher_outputs(self, images: Tensor) -> TapOutputs | None:
        """The teacher's outputs, without gradients."""
        if self.teacher is None:
            return None
        with torch.inference_mode():
            if self.teacher_taps:
                return self.teacher_taps(images)
            return TapOutputs(self.teacher(images))

    def forward(self, input: Tensor, target: Any, done: float = 0.0) -> dict[str, Tensor]:
        """The losses of a batch after the share `done` of the run.

        Args:
            input: [B, 3, H, W], uint8 or floats in 0..255.
            target: class ids, or mixup's; as of `functional.kd_loss`.
            done: of the schedules, 0 to 1.

        Returns:
            loss, output (the student's logits) and terms, [terms], whose sum the loss is.
        """
        output, terms = self.trainable_module(input, self.teacher_outputs(input), target, done)
        return {"loss": terms.sum(), "output": output, "terms": terms}


class _Trainable(nn.Module):
    """One module, so that DistributedDataParallel sees every parameter that learns."""

    def __init__(
        self,
        predict: nn.Module,
        taps: Taps | None,
        terms: dict[str, Term],
        learned: nn.ModuleDict,
        runtime: Runtime,
    ) -> None:
        super().__init__()
        self.predict, self.taps, self.terms = predict, taps, terms
        self.learned = learned  # by name of its term; of most terms nothing
        self.runtime = runtime

    def forward(
        self, images: Tensor, teacher_outputs: TapOutputs | None, labels: Any, done: float
    ) -> tuple[Tensor, Tensor]:
        with self.runtime.autocast():
            student = self.taps(images) if self.taps else TapOutputs(self.predict(images))
            outputs = StepOutputs(student, teacher_outputs, labels)
            losses = [
                term(outputs, done, self.learned[name] if name in self.learned else None)
                for name, term in self.terms.items()
            ]
        return student.logits, torch.stack(losses)


def _taps(predict: nn.Sequential, wanted: list[TapSpec]) -> Taps | None:
    """Taps of a predictor's model for all terms; None if they need only logits."""
    merged: dict[str, Any] = {}
    for arguments in wanted:
        for name, places in arguments.items():
            if isinstance(places, bool):
                merged[name] = places
            else:
                merged[name] = tuple(dict.fromkeys((*merged.get(name, ()), *places)))
    if not merged:
        return None
    taps = Taps(predict[1], **merged)
    taps.model = predict
    return taps
