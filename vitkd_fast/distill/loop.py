"""The training loop: `Trainer.update` is a step, `Trainer.run` logs, evaluates and saves.

A step never synchronises with the device: losses are added up there, and read at the log interval,
with copies of the weights, from which the steps up to one that fails are taken again.
Exceptions are float16's loss scale, timm's mixing by pair or element, and what a student that is
trained for int8 reads of its ranges.
Every random number is a function of (seed, step, rank), so a resumed run gives the same weights.
"""

from __future__ import annotations

import copy
import itertools
import math
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from timm.utils.distributed import distribute_bn
from timm.utils.model import unwrap_model
from torch import Tensor, nn

from .. import models
from ..int8.aware import QuantizationAware
from ..taps import TapOutputs
from . import checkpoint, data, evaluate, multilabel, nonfinite, optim, sources
from .config import Config
from .logger import Meter, MetricLogger
from .task import DistillationTask
from .threads import Threads
from .watch import Watch

BRANCH = "branch.safetensors"  # the state of training where another run goes on from it
_CALIBRATION_IMAGES = 1024  # for the statistics of teachers' features


class NonFiniteError(RuntimeError):
    """A loss or a weight that is NaN or Inf; the message says where it began."""


class Stopped(RuntimeError):
    """A signal ended the run after its state was saved."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number  # of the command line, as of a process that the signal ended


class Signals:
    """Remembers SIGINT or SIGTERM, so that a step can end and be saved."""

    def __enter__(self) -> Signals:
        self.number = 0
        self.before = {s: signal.signal(s, self._take) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.number = number

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


class _Kept(NamedTuple):
    """Copies, on the device, of what a step changes."""

    step: int
    modules: dict[str, dict[str, Tensor]]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]


class Trainer:
    """One training run, in a folder of its own, whose name is the run's title.

    The folder gets checkpoint.safetensors (the state of training), last.safetensors and
    best.safetensors (weights that `models.load` reads), and the metrics; nonfinite.safetensors (the
    step, for `nonfinite.replay`) where a loss or a weight became NaN or Inf.

    Args:
        config: data, augmentation, optimizer and run; its models and losses are the task's.
        task: student, teacher and losses; the student is trained in place.
        splits: the images.
        folder: of the files above.
        seed: of order, augmentation and everything drawn.
        save_model: writes a model's weights to a path, so that `models.load` reads them.
        rebuild: sections `student`, `teacher` and `teachers` of a configuration that makes the
            task's models, but for the student's weights; the configuration's, unless given.
        branch: the share of the run after which its state is also written to branch.safetensors.

    Raises:
        CheckpointError: the folder cannot be written.
        DataError: naming what is wrong with the images.
    """

    def __init__(
        self,
        config: Config,
        task: DistillationTask,
        splits: sources.Splits,
        folder: Path,
        *,
        seed: int,
        save_model: Callable[[Path, nn.Module], None],
        rebuild: Mapping[str, Any] | None = None,
        branch: float | None = None,
    ) -> None:
        run, optimizer, runtime = config.run, config.optimizer, task.runtime
        self.task, self.runtime, self.seed, self.folder = task, runtime, seed, folder
        self.run_section, self.options, self.save_model = run, optimizer, save_model
        self.title, self.path = folder.name, folder / "checkpoint.safetensors"
        self.loader, self.val_loader = data.loaders(
            config, splits, seed, optimizer.accumulate, task.drawn
        )
        self.classes = splits.classes
        self.config = {**config.model_dump(), **(rebuild or {})}
        self.mixer = data.Mixer(config.augmentation) if config.augmentation.mixes else None
        self.steps_per_epoch = self.loader.batches // optimizer.accumulate
        self.total = min(run.epochs * self.steps_per_epoch, run.max_steps or 2**62)
        self.branch = None if branch is None else max(round(branch * self.total), 1)

        self.model, self.learned = task.student, task.trainable_module.learned
        self.parameters = [*self.model.parameters(), *self.learned.parameters()]
        # not of ranges, whose gradients LSQ scales by itself
        weights: Any = self.model.model if isinstance(self.model, QuantizationAware) else self.model
        self.clipped = [*weights.parameters(), *self.learned.parameters()]
        self.optimizer = optim.create_optimizer(self.model, optimizer, self.learned.parameters())
        self.scheduler = optim.create_scheduler(
            self.optimizer, optimizer, self.total, self.steps_per_epoch
        )
        self.ema = optim.create_ema(self.model, optimizer)
        half = runtime.student_dtype == torch.float16
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=half)
        self.meter = Meter(list(task.trainable_module.terms), runtime.device)
        self.threads = Threads(runtime.threads)
        self.watch, self.watch_every = Watch(config, splits, runtime.ranks), config.int8.watch
        self.step, self.evaluated, self.best = 0, 0, -math.inf
        self._rates: dict[int, float] = {}  # by step, since the last log
        self._since = time.monotonic(), 0
        self._kept: _Kept | None = None
        # signals are agreed on here, so that no rank synchronises with its device
        self._control: Any = dist.new_group(backend="gloo") if runtime.ranks > 1 else None

        # at most: weights, moments, average; old and new
        self.disk = 8 * sum(p.numel() * p.element_size() for p in self.parameters)
        if runtime.rank == 0:
            checkpoint.check_folder(folder, self.disk)
        if run.compile:
            task.compile()
        self.forward = task.trainable_module.predict
        if runtime.ranks > 1:
            task.prepare_distributed()

    def restore(self) -> None:
        """Takes the state of the folder's checkpoint, where there is one.

        Raises:
            CheckpointError: the checkpoint is of another run.
        """
        if not self.path.exists():
            return
        info = checkpoint.restore(self.path, self._modules(), self.optimizer)
        self.step, self.evaluated, self.best = info["step"], info["evaluated"], info["best"]
        if self.scaler.is_enabled() and info["scaler"]:
            self.scaler.load_state_dict(info["scaler"])
        self.meter.reset(*info["meter"])
        self.scheduler.step_update(self.step)

    def update(self, batches: Iterator[data.Batch]) -> None:
        """One step: `accumulate` batches through teacher and student, then the optimiser."""
        runtime, accumulate = self.runtime, self.options.accumulate
        epoch = self.step // self.steps_per_epoch
        data.seed_all(self.seed, self.step, runtime.rank)
        for i in range(accumulate):
            batch = next(batches)
            cached = self.task.cached_outputs(batch, epoch)
            images = batch.images.to(runtime.device, non_blocking=True)
            labels: Any = batch.labels.to(runtime.device, non_blocking=True)
            if self.mixer:
                images, labels = self.mixer(images.float(), labels)
            with self.task.no_sync() if i < accumulate - 1 else nullcontext():
                result = self.task(images, labels, self.step / self.total, cached)
                self.scaler.scale(result["loss"] / accumulate).backward()
            self.meter.add(result["terms"].detach(), self.step)
        if self.options.clip_grad:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.clipped, self.options.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.step += 1
        self.scheduler.step_update(self.step)
        if self.ema:
            self.ema.update(self.model, step=self.step)

    def seconds_per_step(self, steps: int = 3) -> float:
        """The median of a few steps, after one that warms up; the student is trained by them."""
        times = []
        batches = itertools.chain.from_iterable(map(self.loader.epoch, itertools.count()))
        for _ in range(steps + 1):
            start = time.monotonic()
            self.update(batches)
            self._check()  # synchronises with the device
            times.append(time.monotonic() - start)
        return statistics.median(times[1:])

    def run(self) -> nn.Module:
        """Trains to the end and returns the trained weights: their average, where one is kept.

        Raises:
            NonFiniteError: naming the first bad step, the term and the learning rate.
            Stopped: after SIGINT or SIGTERM on any rank, once the step is done and saved.
            DataError: naming a file that cannot be read.
        """
        run, folder = self.run_section, self.folder if self.runtime.rank == 0 else None
        logger = MetricLogger(folder, self.title, self.total, self.step)
        with logger, Signals() as signals:
            if not self.step:
                self.task.calibrate(self._first_images())
            self._since = time.monotonic(), self.step
            self._keep()
            while self.step < self.total or self._is_due():
                if self._is_due():
                    self._look(logger)
                    self._save()
                    self._obey(signals)
                    continue
                epoch, start = divmod(self.step, self.steps_per_epoch)
                batches = self.loader.epoch(epoch, start * self.options.accumulate)
                self.task.train()
                for _ in range(start, min(self.steps_per_epoch, start + self.total - self.step)):
                    self._rates[self.step] = self.optimizer.param_groups[0]["lr"]
                    with self.threads:
                        self.update(batches)
                    logger.advance(self.step)
                    if self.step == self.branch:
                        self._save(self.folder / BRANCH)
                    if self.step % run.log_every == 0:
                        self._log(logger)
                    if run.save_every and self.step % run.save_every == 0:
                        self._save()
                    self._obey(signals)
                if not self._is_due():
                    self._save()
            if skipped := self.skipped:
                logger.say(f"skipped {len(skipped)} images that cannot be read: {_few(skipped)}")
        return self.trained

    @property
    def skipped(self) -> set[str]:
        """Images of this rank that could not be read."""
        return self.loader.skipped | self.val_loader.skipped

    @property
    def trained(self) -> nn.Module:
        """The student, or the moving average of its weights where one is kept."""
        return self.ema.module if self.ema else self.model

    def _modules(self) -> dict[str, nn.Module]:
        modules: dict[str, nn.Module] = {"student": self.model, "losses": self.learned}
        return modules | ({"ema": self.ema.module} if self.ema else {})

    def _first_images(self) -> Iterator[Tensor | list[TapOutputs]]:
        """Of training, about `_CALIBRATION_IMAGES`, on the device, or what was said of them."""
        together = self.loader.batch_size * self.runtime.ranks
        for batch in itertools.islice(self.loader.epoch(), -(-_CALIBRATION_IMAGES // together)):
            cached = self.task.cached_outputs(batch, 0)
            yield batch.images.to(self.runtime.device) if cached is None else cached

    def _is_due(self) -> bool:
        """Whether an evaluation, or a look at int8, is due at this step, and not done yet."""
        due = self._ends(self.run_section.eval_every) or self._ends(self.watch_every)
        return due and self.step > self.evaluated

    def _ends(self, epochs: int) -> bool:
        """Whether so many epochs end here, or all; never of 0."""
        done, inside = divmod(self.step, self.steps_per_epoch)
        return epochs > 0 and (self.step == self.total or not (inside or done % epochs))

    def _obey(self, signals: Signals) -> None:
        """Saves and ends the run where any rank was told to."""
        number = signals.number
        if self._control:
            flag = torch.tensor(number)
            dist.all_reduce(flag, dist.ReduceOp.MAX, self._control)
            number = int(flag)
        if number:
            self._save()
            raise Stopped(
                f"{self.title}: stopped by {signal.Signals(number).name} after step {self.step} of "
                f"{self.total}; --resume goes on",
                number,
            )

    def _share_buffers(self) -> None:
        """Gives every rank the first one's batch-norm statistics: those are what is saved."""
        if self.runtime.ranks > 1:
            for module in self._modules().values():
                distribute_bn(module, self.runtime.ranks)

    def _log(self, logger: MetricLogger) -> None:
        self._check()
        means = self.meter.means()
        now, (then, step) = time.monotonic(), self._since
        images = (self.step - step) * self.options.accumulate * self.loader.batch_size
        row = {
            "epoch": self.step / self.steps_per_epoch,
            "lr": self._rates[self.step - 1],
            "loss": sum(means.values()),
            **means,
            "images_per_s": images * self.runtime.ranks / (now - then),
        }
        logger.write("train", self.step, row)
        self._since = now, self.step
        self._rates = {self.step - 1: self._rates[self.step - 1]}

    def _check(self) -> None:
        """Raises where a loss was NaN or Inf since the last look, or a weight is none."""
        if not (bad := self._bad()):
            if self._kept:
                self._keep()
            return
        # what was found first is said, also if the steps do not end like this again
        file, step = self._capture()
        what = f"{bad[1]} (learning rate {self._rates.get(bad[0], math.nan):.3g})"
        kept = f"{self.path} is the last good one" if self.path.exists() else "none was saved"
        shown = f"; `vitkd replay {file}` shows step {step}, where it began" if file else ""
        raise NonFiniteError(f"{self.title}: {what}; checkpoint: {kept}{shown}")

    def _bad(self) -> tuple[int, str] | None:
        """The first step with a loss or weights that are NaN or Inf, and what is."""
        if bad := self.meter.first_bad():
            return bad[0], f"loss {bad[1]} is not finite at step {bad[0]}"
        if not nn.utils.get_total_norm(self.parameters).isfinite():
            return self.step - 1, f"the weights are not finite after step {self.step - 1}"
        return None

    def _keep(self) -> None:
        """Remembers this step, so that those after it can be taken again."""
        self._kept = _Kept(
            self.step,
            self._copies(),
            copy.deepcopy(self.optimizer.state_dict()),
            self.scaler.state_dict(),
        )

    def _copies(self) -> dict[str, dict[str, Tensor]]:
        modules = {"student": self.model, "losses": self.learned}
        return {
            name: {key: x.detach().clone() for key, x in module.state_dict().items()}
            for name, module in modules.items()
        }

    def _capture(self) -> tuple[Path | None, int]:
        """Takes the steps since the last look again, and writes what the first bad one began with.

        Returns:
            The file, and that step; None where none of them is bad this time.
        """
        # `vitkd replay` makes no QuantizationAware
        if not self._kept or isinstance(self.model, QuantizationAware):
            return None, self.step
        end, kept = self.step, self._kept
        self.model.load_state_dict(kept.modules["student"])
        self.learned.load_state_dict(kept.modules["losses"])
        self.optimizer.load_state_dict(kept.optimizer)
        if self.scaler.is_enabled() and kept.scaler:
            self.scaler.load_state_dict(kept.scaler)
        self.step = kept.step
        self.scheduler.step_update(self.step)
        self.meter.forget()
        self.task.train()
        taken: list[data.Batch] = []
        batches = self._batches_again(taken)
        file, step = None, kept.step
        while self.step < end and not file:
            step, before, scale = self.step, self._copies(), self.scaler.get_scale()
            lr = self.optimizer.param_groups[0]["lr"]
            taken.clear()
            self.update(batches)
            own = self.meter.is_bad()
            if bad := self._bad():
                file = self.folder / nonfinite.NAME
                if self.runtime.rank == self._lowest_rank(own):
                    student, teacher = (str(x).removeprefix("torch.") for x in self.runtime.dtypes)
                    header = nonfinite.Header(
                        self.title, bad[1], self.config, list(self.classes), self.seed, step,
                        self.runtime.rank, self.total, lr, scale,
                        student, teacher, step // self.steps_per_epoch,
                    )  # fmt: skip
                    nonfinite.save(file, header, before, taken)
        self.step = end
        return file, step

    def _batches_again(self, taken: list[data.Batch]) -> Iterator[data.Batch]:
        """The batches from this step on, each kept, too."""
        first, start = divmod(self.step, self.steps_per_epoch)
        for epoch in itertools.count(first):
            for batch in self.loader.epoch(epoch, start * self.options.accumulate):
                # copies: the memory of a loader's tensors is lent by its workers
                taken.append(
                    batch._replace(
                        images=batch.images.clone(),
                        labels=batch.labels.clone(),
                        indices=batch.indices.clone(),
                    )
                )
                yield batch
            start = 0

    def _lowest_rank(self, own: bool) -> int:
        """Of those where it is so; 0 where it is of none."""
        rank = torch.tensor(self.runtime.rank if own else self.runtime.ranks)
        if self._control:
            dist.all_reduce(rank, dist.ReduceOp.MIN, self._control)
        return int(rank) % self.runtime.ranks

    def _look(self, logger: MetricLogger) -> None:
        """What is due at this step, on the trained weights."""
        self._check()
        self._share_buffers()
        self.trained.eval()
        if self._ends(self.run_section.eval_every):
            self._evaluate(logger)
        if self._ends(self.watch_every) and self.runtime.rank == 0:
            epoch = self.step / self.steps_per_epoch
            logger.write("int8", self.step, {"epoch": epoch, **self.watch(self.trained)})
        self.evaluated = self.step
        self._since = time.monotonic(), self.step

    def _evaluate(self, logger: MetricLogger) -> None:
        scores = {"epoch": self.step / self.steps_per_epoch}
        scores |= self._losses() if self.config["data"]["unlabelled"] else self._scores()
        logger.write("val", self.step, scores)
        best = -scores["loss"] if "loss" in scores else scores[evaluate.headline(scores)]
        if self.runtime.rank == 0:
            self.save_model(self.folder / "last.safetensors", self.trained)
            if best > self.best:
                self.save_model(self.folder / "best.safetensors", self.trained)
        self.best = max(self.best, best)

    def _scores(self) -> dict[str, float]:
        """Of the trained weights, on the validation images."""
        judge = multilabel.evaluate if self.config["data"]["labels"] else evaluate.evaluate
        aware = isinstance(self.trained, QuantizationAware)  # which takes images as they are
        result = judge(
            self.trained if aware else models.predictor(self.trained).to(self.runtime.device),
            ((batch.images, batch.labels) for batch in self.val_loader.epoch()),
            classes=len(self.classes),
            device=self.runtime.device,
        )
        return {name: result.metrics[name] for name in (evaluate.headline(result.metrics), "nll")}

    def _losses(self) -> dict[str, float]:
        """Of the trained weights on the validation images: the mean loss, its terms, similarity."""
        trainable: Any = unwrap_model(self.task.trainable_module)
        device, own = self.runtime.device, self._copies()["student"]
        if self.ema:  # the losses' own modules have no average
            self.model.load_state_dict(self.trained.state_dict())
        self.task.eval()
        names = [*trainable.terms, "similarity"]
        sums = torch.zeros(len(names) + 1, dtype=torch.float64, device=device)
        with torch.inference_mode():
            for batch in self.val_loader.epoch():
                images = batch.images.to(device, non_blocking=True)
                teachers = self.task.teacher_outputs(images)
                _, terms = trainable(images, teachers, batch.labels, self.step / self.total)
                alike = trainable.similarity(images, teachers)
                alike = terms.new_zeros(1) if alike is None else alike.mean()[None]
                found = torch.cat([terms, alike, terms.new_ones(1)])
                sums += len(images) * found.double()
        if self.ema:
            self.model.load_state_dict(own)
        if self.runtime.ranks > 1:
            dist.all_reduce(sums)
        *values, images = sums.tolist()
        means = {name: x / images for name, x in zip(names, values, strict=True)}
        similarity = means.pop("similarity")
        scores = {"loss": sum(means.values()), **means}
        return scores | ({"similarity": similarity} if similarity else {})

    def _save(self, path: Path | None = None) -> None:
        """Writes the state of training, unless a loss or a weight in it is NaN or Inf."""
        self._check()
        self._share_buffers()
        meter = self.meter.state()
        if self.runtime.rank == 0:
            info = {
                "step": self.step,
                "evaluated": self.evaluated,
                "best": self.best,
                "scaler": self.scaler.state_dict(),
                "meter": meter,
            }
            checkpoint.save(path or self.path, self._modules(), self.optimizer, info)


def _few(names: set[str]) -> str:
    shown = sorted(names)[:3]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
