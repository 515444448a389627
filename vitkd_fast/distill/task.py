"""The losses of a batch as a timm training task: student, teacher, and modules of the losses."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
from timm.task import TrainingTask
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .. import models
from ..functional import average_logits
from ..int8.aware import QuantizationAware
from ..nn import PHIStandardize
from ..taps import TapOutputs, Taps
from .cache.read import CachedTeacher
from .config import Config
from .data import Batch, Drawn
from .losses import Features, Losses, StepOutputs, TapSpec, Term
from .runtime import Runtime


class Average(NamedTuple):
    """How several teachers are one: the weight of each, which add up to 1, and the space."""

    weights: tuple[float, ...] = (1.0,)
    space: str = "probability"
    independent: bool = False  # of images with several labels

    @classmethod
    def of(cls, config: Config) -> Average:
        weights = [teacher.weight for teacher in config.all_teachers().values()]
        shares = tuple(w / sum(weights) for w in weights)
        return cls(shares, config.teacher_average, bool(config.data.labels))

    def logits(self, logits: Sequence[Tensor], temperature: float = 1.0) -> Tensor:
        """One teacher's as they are; of several `functional.average_logits`."""
        if len(logits) == 1:
            return logits[0]
        return average_logits(
            logits,
            self.weights,
            self.space,
            temperature=temperature,
            independent=self.independent,
        )


class Ensemble(nn.Module):
    """uint8 images [B, 3, H, W] to the averaged logits of several teachers' predictors."""

    def __init__(self, predictors: Sequence[nn.Module], average: Average) -> None:
        super().__init__()
        self.predictors, self.average = nn.ModuleList(predictors), average

    def forward(self, images: Tensor) -> Tensor:
        return self.average.logits([predict(images).float() for predict in self.predictors])


class DistillationTask(TrainingTask):
    """A student, its teachers, and the losses of a batch: a training task like timm's own.

    Args:
        losses: the terms.
        student: the student's predictor, on the runtime's device.
        teachers: the teachers', one, several or none.
        runtime: device, and precision of the student and of what the losses learn.
        image_size: of a blank image, which shows the shapes that all return.
        average: of several teachers.
        cache: what a teacher said before, instead of teachers.

    Attributes:
        student: the model that is trained, without its normalisation.
        freeze_bn: the share of the run from which on the batch norms of a `QuantizationAware`
            student keep their statistics.
        teachers: the teachers' predictors.
        trainable_module: the student and the modules that its losses train.

    Raises:
        ValueError: a term taps a stride or block that student or teacher do not have.
    """

    def __init__(
        self,
        losses: Losses,
        student: nn.Sequential,
        teachers: Sequence[nn.Sequential],
        runtime: Runtime,
        image_size: int,
        average: Average | None = None,
        cache: CachedTeacher | None = None,
    ) -> None:
        super().__init__(device=runtime.device, verbose=False)
        self.runtime, self.cache, self.freeze_bn = runtime, cache, 1.0
        self.student: nn.Module = student[1]
        average = average or Average((1 / max(len(teachers), 1),) * len(teachers))
        terms = dict(losses.terms())
        if len(teachers) > 1:
            terms = {name: term.among_teachers() for name, term in terms.items()}
        wanted = [term.taps() for term in terms.values()]
        self.teachers = nn.ModuleList(teachers)
        self.teacher_taps = [_taps(x, [of_teacher for _, of_teacher in wanted]) for x in teachers]
        if cache:
            cache.select(of_teacher for _, of_teacher in wanted)
        taps = _taps(student, [student for student, _ in wanted])
        learned = nn.ModuleDict()
        for name, term in terms.items():
            if alone := term.learned_alone():
                learned[_place(name, 0, 1)] = alone.to(runtime.device)
        if taps and (cache or any(self.teacher_taps)):
            training = self.student.training
            student.eval()  # one image is no batch to take statistics from
            image = torch.zeros(
                1, 3, image_size, image_size, dtype=torch.uint8, device=runtime.device
            )
            with torch.no_grad():
                of_student = taps(image)
                of_teachers: list[Any] = [
                    tapped and (tapped(image), tapped) for tapped in self.teacher_taps
                ]
            if cache:
                of_teachers = [(cache.example(device=runtime.device), _CACHED)]
            student.train(training)
            for name, term in terms.items():
                count = 1 if _averages(term) else len(of_teachers)
                for i, of_teacher in enumerate(of_teachers[:count]):
                    if of_teacher and (module := term.learned(of_student, *of_teacher)):
                        learned[_place(name, i, count)] = module.to(runtime.device)
        self.trainable_module: Any = _Trainable(student, taps, terms, learned, runtime, average)

    @classmethod
    def create(
        cls,
        config: Config,
        student: nn.Module,
        teachers: nn.Module | Sequence[nn.Module] | None,
        runtime: Runtime,
        cache: CachedTeacher | None = None,
    ) -> DistillationTask:
        """The task of a run: the student itself and frozen copies of teachers, on the device."""
        student = student.to(memory_format=runtime.memory_format)
        if isinstance(student, QuantizationAware):  # takes images as they are
            predictor = nn.Sequential(nn.Identity(), student)
        else:
            predictor = models.predictor(student).to(runtime.device)
        if isinstance(teachers, nn.Module):
            teachers = [teachers]
        copies = [frozen(teacher, runtime) for teacher in teachers or ()]
        average = Average.of(config) if len(copies) > 1 else None
        size = config.data.image_size
        task = cls(config.losses, predictor, copies, runtime, size, average, cache)
        task.freeze_bn = config.int8.aware.freeze_bn if config.int8.aware else 1.0
        return task

    @property
    def drawn(self) -> Drawn | None:
        """How images must be augmented, where a cached teacher saw them before."""
        return self.cache.drawn if self.cache else None

    def train(self, mode: bool = True) -> DistillationTask:
        """Sets the mode of all but the teachers, which stay in evaluation mode."""
        super().train(mode)
        self.teachers.eval()
        return self

    def compile(self, **options: Any) -> None:  # type: ignore[override]
        """Compiles student and teachers, by torch.compile; before `prepare_distributed`."""
        student = self.trainable_module
        if student.taps:
            student.taps.compile(**options)
        else:
            student.predict = torch.compile(student.predict, **options)
        for i, taps in enumerate(self.teacher_taps):
            if taps:
                taps.compile(**options)
            else:
                self.teachers[i] = cast(nn.Module, torch.compile(self.teachers[i], **options))

    def prepare_distributed(
        self, device_ids: list[Any] | None = None, **options: Any
    ) -> DistillationTask:
        """Wraps what learns in DistributedDataParallel; the teachers stay as they are."""
        self.trainable_module = DistributedDataParallel(
            self.trainable_module, device_ids=device_ids, **options
        )
        return self

    def teacher_outputs(self, images: Tensor) -> list[TapOutputs]:
        """Each teacher's outputs, without gradients."""
        with torch.inference_mode():
            return [
                taps(images) if taps else TapOutputs(teacher(images))
                for taps, teacher in zip(self.teacher_taps, self.teachers, strict=True)
            ]

    def cached_outputs(self, batch: Batch, epoch: int) -> list[TapOutputs] | None:
        """What a cached teacher said of a batch in an epoch; None where teachers are asked."""
        return [self.cache.outputs(batch, epoch, self.runtime.device)] if self.cache else None

    def calibrate(self, images: Iterable[Tensor | list[TapOutputs]]) -> None:
        """Takes what terms learn of the teachers' statistics, before any training, from images.

        Or from what teachers said of them.

        Does nothing, and reads no image, where no term does.
        """
        module = self.trainable_module
        standardized = [m for m in module.modules() if isinstance(m, PHIStandardize)]
        if not standardized:
            return
        for batch in images:
            teachers = self.teacher_outputs(batch) if isinstance(batch, Tensor) else batch
            for name, term in module.terms.items():
                for i, teacher in enumerate(teachers):
                    if (place := _place(name, i, len(teachers))) in module.learned:
                        term.observe(teacher, module.learned[place])
        for found in standardized:
            found.fit()

    def forward(
        self,
        input: Tensor,
        target: Any,
        done: float = 0.0,
        teachers: list[TapOutputs] | None = None,
    ) -> dict[str, Tensor]:
        """The losses of a batch after the share `done` of the run.

        Args:
            input: [B, 3, H, W], uint8 or floats in 0..255.
            target: class ids, or mixup's; as of `functional.kd_loss`.
            done: of the schedules, 0 to 1.
            teachers: what they say, where they are not to be asked.

        Returns:
            loss, output (the student's logits) and terms, [terms], whose sum the loss is.
        """
        teachers = self.teacher_outputs(input) if teachers is None else teachers
        if isinstance(self.student, QuantizationAware):
            self.student.freeze_batch_norm(done >= self.freeze_bn)
        output, terms = self.trainable_module(input, teachers, target, done)
        return {"loss": terms.sum(), "output": output, "terms": terms}


def frozen(teacher: nn.Module, runtime: Runtime) -> nn.Sequential:
    """The predictor of a copy that does not learn, on the device and in the teachers' precision."""
    dtype = runtime.teacher_dtype
    teacher = copy.deepcopy(teacher).eval().requires_grad_(False)
    teacher = teacher.to(dtype).to(memory_format=runtime.memory_format)
    return models.predictor(teacher, dtype=dtype).to(runtime.device).eval()


_CACHED: Any = SimpleNamespace(classifier=None)  # the taps of a teacher that is not there


class _Trainable(nn.Module):
    """One module, so that DistributedDataParallel sees every parameter that learns."""

    def __init__(
        self,
        predict: nn.Module,
        taps: Taps | None,
        terms: dict[str, Term],
        learned: nn.ModuleDict,
        runtime: Runtime,
        average: Average,
    ) -> None:
        super().__init__()
        self.predict, self.taps, self.terms = predict, taps, terms
        self.learned = learned  # by `_place`; of most terms nothing
        self.runtime, self.average = runtime, average

    def forward(
        self, images: Tensor, teachers: list[TapOutputs], labels: Any, done: float
    ) -> tuple[Tensor, Tensor]:
        with self.runtime.autocast():
            student = self.taps(images) if self.taps else TapOutputs(self.predict(images))
            losses = [
                self._term(name, term, student, teachers, labels, done)
                for name, term in self.terms.items()
            ]
        return student.logits, torch.stack(losses)

    def similarity(self, images: Tensor, teachers: list[TapOutputs]) -> Tensor | None:
        """Of student and teachers, [B], by the term `features`; None without it."""
        term = self.terms.get("features")
        if not isinstance(term, Features) or not self.taps:
            return None
        with self.runtime.autocast():
            student = self.taps(images)
            found = [
                term.similarity(student, x, self.learned[_place("features", i, len(teachers))])
                for i, x in enumerate(teachers)
            ]
        alike = [x for x in found if x is not None]
        return torch.stack(alike).mean(0) if alike else None

    def _term(
        self,
        name: str,
        term: Term,
        student: TapOutputs,
        teachers: list[TapOutputs],
        labels: Any,
        done: float,
    ) -> Tensor:
        """Of logits, one term for their average; of features, one for each teacher, by weight."""
        if len(teachers) > 1 and _averages(term):
            temperature = getattr(term, "temperature", 1.0)
            logits = self.average.logits(
                [teacher.logits for teacher in teachers],
                temperature if isinstance(temperature, float) else 1.0,
            )
            teachers = [TapOutputs(logits)]
        losses = []
        for i, teacher in enumerate(teachers or [None]):
            place = _place(name, i, len(teachers))
            learned = self.learned[place] if place in self.learned else None
            outputs = StepOutputs(student, teacher, labels, self.predict)
            losses.append(term(outputs, done, learned))
        if len(losses) == 1:
            return losses[0]
        return torch.stack([w * x for w, x in zip(self.average.weights, losses, strict=True)]).sum()


def _averages(term: Term) -> bool:
    """Whether the term of several teachers is one of their average."""
    return term.averages or not term.taps()[1]


def _place(name: str, teacher: int, teachers: int) -> str:
    """The name of what a term learns for one of the teachers."""
    return f"{name}-{teacher}" if teachers > 1 else name


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
