"""A student trained for int8: branches off a float student's run, through `QuantizationAware`.

The float run leaves branch.safetensors at the step `int8.aware.start` of it; from there the same
images, losses and learning rates go on in the engine's arithmetic, in a folder of their own. Ranges
are found again several times: weights and statistics move, LSQ is too slow to follow, and a student
learns to live with what is clipped. Until batch norms freeze, they are those of a student with the
statistics of each batch: there a channel that one image alone moves is as wide as any, and cut off
it loses its variance, by which the batch norm after it divides.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import int8, models
from . import checkpoint, data, optim, preflight, quantized
from .config import Config, Model
from .loop import BRANCH, Trainer
from .prepared import Prepared
from .runtime import Runtime
from .task import DistillationTask


def module(
    config: Config, student: nn.Module, images: Tensor | None, runtime: Runtime, **options: Any
) -> int8.QuantizationAware:
    """A student, quantised by the first rank on its images, as all ranks train it.

    Options are those of `quantized_by_first`.

    Raises:
        UnsupportedError: the model holds an operation that the engine lacks; names it.
    """
    section = config.int8.aware
    assert section
    student = student.to(runtime.device).to(memory_format=runtime.memory_format)
    start = quantized_by_first(student, images, runtime, **options)
    return int8.QuantizationAware(student, start, learn_ranges=section.learn_ranges)


@torch.no_grad()
def with_statistics(model: nn.Module, images: Tensor, batch_size: int) -> nn.Module:
    """A copy whose batch norms hold the means of these batches' statistics, for evaluation.

    Wu & Johnson, "Rethinking 'Batch' in BatchNorm", arXiv:2105.07576: precise BN.

    Args:
        images: uint8 [N, H, W, 3]; what is left after whole batches is not looked at.
    """
    made = copy.deepcopy(model).eval()
    for norm in (x for x in made.modules() if isinstance(x, nn.modules.batchnorm._BatchNorm)):
        norm.train()
        norm.reset_running_stats()
        norm.momentum = None
    logits = models.predictor(made)
    device = next(made.parameters()).device
    whole = max(len(images) // batch_size, 1) * batch_size
    for batch in images[:whole].split(batch_size):
        logits(batch.permute(0, 3, 1, 2).to(device))
    return made.eval()


def quantized_by_first(
    student: nn.Module,
    images: Tensor | None,
    runtime: Runtime,
    *,
    batch_size: int = 0,
    **options: Any,
) -> int8.QuantizedModel:
    """What the first rank makes of a student with its images, on all ranks.

    Args:
        batch_size: of batches whose statistics the student's batch norms take; 0: they are frozen.
        options: those of `quantized.quantize`.
    """
    box: list[Any] = [None]
    if runtime.rank == 0:
        assert images is not None
        if batch_size > 1 and len(images) > 1:
            student = with_statistics(student, images, batch_size)
        box[0] = quantized.quantize(student, images, **options)
    if runtime.ranks > 1:
        dist.broadcast_object_list(box)
    return box[0]


def searches(start: float, freeze: float) -> list[float]:
    """The shares of a run at which ranges are found again.

    Three are evenly spread until batch norms freeze, the third of them there; with frozen ones maps
    still drift, and one is halfway to the end. None where batch norms are frozen from the start.
    """
    if freeze <= start:
        return []
    step = (freeze - start) / 3
    return [start + step, start + 2 * step, freeze, (freeze + 1) / 2]


class AwareTrainer(Trainer):
    """Trains a student for int8, and finds ranges again, at the shares of `searches`.

    Args:
        start: the share of the run at which it begins.
        requantize: what `quantize` makes of a student now, on every rank; told whether its batch
            norms are frozen.
        others: as `Trainer`'s.
    """

    def __init__(
        self,
        *others: Any,
        start: float,
        requantize: Callable[[nn.Module, bool], int8.QuantizedModel],
        **options: Any,
    ) -> None:
        super().__init__(*others, **options)
        self.start, self.requantize = start, requantize

    def update(self, batches: Iterator[data.Batch]) -> None:
        freeze = self.task.freeze_bn
        done, before = self.step / self.total, (self.step - 1) / self.total
        if any(before < x <= done for x in searches(self.start, freeze)):
            self._find_ranges(frozen=done >= freeze)
        super().update(batches)

    def _find_ranges(self, frozen: bool) -> None:
        self._check()  # what is not finite cannot be quantized
        student: Any = self.model
        start = self.requantize(student.model, frozen)
        student.take_ranges(start)  # and sets the mode of what was quantized
        if self.ema:
            average: Any = self.ema.module
            average.take_ranges(start)


def take_weights(student: nn.Module, branch: Path) -> None:
    """Gives a student the weights of the branch."""
    prefix = "student."
    tensors = checkpoint.tensors(branch, prefix)
    student.load_state_dict({key.removeprefix(prefix): x for key, x in tensors.items()})


def take_state(trainer: Trainer, branch: Path) -> None:
    """Gives a trainer the branch's step, its average and the optimiser's state of all weights.

    Raises:
        CheckpointError: the branch is of another run.
    """
    student: Any = trainer.model
    options, learned = trainer.options, trainer.learned
    # as the float run's, of the same parameters
    optimizer = optim.create_optimizer(student.model, options, learned.parameters())
    modules: dict[str, nn.Module] = {"student": student.model, "losses": learned}
    if trainer.ema:
        average: Any = trainer.ema.module
        modules["ema"] = average.model
    trainer.step = checkpoint.restore(branch, modules, optimizer)["step"]
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if state := optimizer.state.get(parameter):
                trainer.optimizer.state[parameter] = state
    trainer.scheduler.step_update(trainer.step)


def save(path: Path, trained: nn.Module, **about: Any) -> None:
    """Writes the weights for `models.load`, and beside them the engine's file."""
    assert isinstance(trained, int8.QuantizationAware)
    models.save(path, trained.model, **about)
    with torch.no_grad():
        trained.save(path.with_suffix(".int8.safetensors"))


class ForInt8(Prepared):
    """What a run's students for int8 are made by."""

    def train_aware(self, seed: int, final: nn.Module) -> int8.QuantizationAware:
        """Trains a seed's student for int8, from its branch; given is the float run's end."""
        section = self.config.int8.aware
        assert section
        data.seed_all(seed)
        student = preflight.create_student(self.config, self.classes)
        branch = self.folder / f"{self.role}-{seed}" / BRANCH
        if section.start:
            take_weights(student, branch)
        about = self.about_model(self.config.student, student)
        config, task = self.aware_task(student, final)
        trainer = AwareTrainer(
            config,
            task,
            self.splits,
            self.folder / f"int8-aware-{seed}",
            seed=seed,
            save_model=functools.partial(save, **about),
            start=section.start,
            requantize=self.requantize,
        )
        if self.resume and trainer.path.exists():
            trainer.restore()
        elif section.start:
            take_state(trainer, branch)
        trained: Any = trainer.run()
        self.skipped |= trainer.skipped
        return trained.eval()

    def aware_task(self, student: nn.Module, final: nn.Module) -> tuple[Config, DistillationTask]:
        """Of a student that is trained for int8, and of who teaches it: `final` is the float one.

        Raises:
            UnsupportedError: the model holds an operation that the engine lacks; names it.
        """
        section = self.config.int8.aware
        assert section
        images, options = self.calibration_images(), self.quantize_as(student)
        live = section.start < section.freeze_bn
        options["batch_size"] = self.config.data.batch_size if live else 0
        made = module(self.config, student, images, self.runtime, **options)
        config, teachers = preflight.aware_lesson(self.config, self.teachers, final)
        section = config.int8.aware
        cache = self.cache if section and section.teacher == "teacher" else None
        return config, DistillationTask.create(config, made, teachers, self.runtime, cache)

    def requantize(self, student: nn.Module, frozen: bool) -> int8.QuantizedModel:
        """A student as it is now, its batch norms frozen or not, on all ranks."""
        images, options = self.calibration_images(), self.quantize_as(student)
        options["batch_size"] = 0 if frozen else self.config.data.batch_size
        return quantized_by_first(student, images, self.runtime, **options)

    def about_model(self, section: Model, model: nn.Module) -> dict[str, Any]:
        """What `models.save` is told."""
        return {
            "name": section.model,
            "options": section.options,
            "num_classes": len(self.classes),
            "pixels": preflight.pixels(self.config, model),
            "classes": tuple(self.classes),
            "multilabel": bool(self.config.data.labels),
        }

    def quantize_as(self, model: nn.Module) -> dict[str, Any]:
        """What `quantized.quantize` is told."""
        return {
            "pixels": preflight.pixels(self.config, model),
            "classes": self.scored.classes,
            "multilabel": bool(self.config.data.labels),
            "calibration": self.config.int8.calibration,
        }

    def calibration_images(self) -> Tensor | None:
        """On the first rank."""
        if self.runtime.rank:
            return None
        count = self.config.int8.calibration_images
        return quantized.images(self.config, self.splits.train, count, self.runtime.ranks)
