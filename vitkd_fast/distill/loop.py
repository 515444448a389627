"""The training loop: `Trainer.update` is the whole step, and `Trainer.run` what goes on around it.

A step never synchronises with the device: losses are added up there, and read at the log interval.
(float16's loss scale does wait, and timm's mixing by pair or element, which copies its shares.)
Every random number is a function of (seed, step, rank), so a resumed run is the run.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import itertools
import math
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers
from timm.scheduler.scheduler_factory import create_scheduler_v2
from timm.utils.distributed import distribute_bn
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from .. import models
from .._timing import warn_of_threads
from . import checkpoint, data, evaluate, sources
from .config import Config, ConfigError, Optimizer
from .logger import MetricLogger
from .losses import Losses
from .task import DistillationTask


class NonFiniteError(RuntimeError):
    """A loss or a weight that is NaN or Inf; the message says where it began."""


class Stopped(RuntimeError):
    """A signal ended the run, which is saved."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number  # of the command line, as of a process that the signal ended


@dataclass(frozen=True)
class Runtime:
    """Where a process computes: its device, and its rank among the processes of torchrun."""

    device: torch.device
    student: torch.dtype  # of autocast
    teacher: torch.dtype  # of its weights
    rank: int = 0
    ranks: int = 1

    @classmethod
    def of(cls, config: Config) -> Runtime:
        """This process's; joins the others where there are any."""
        run = config.run
        if run.threads:
            warn_of_threads("run.threads", run.threads)
            torch.set_num_threads(run.threads)
        name = run.device or ("cuda" if torch.cuda.is_available() else "cpu")
        device = torch.device(name)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"run.device: {name}, and torch sees no GPU")
        rank, ranks = 0, 1
        if dist.is_torchelastic_launched() and not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if dist.is_initialized():
            rank, ranks = dist.get_rank(), dist.get_world_size()
        if device.type == "cuda":
            if device.index is None:
                device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            elif ranks > 1:
                raise ConfigError(f"run.device: {name} for {ranks} processes; accepted is cuda")
            torch.cuda.set_device(device)
        if run.precision != "auto":
            student = teacher = getattr(torch, run.precision)
        elif device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
            student = torch.bfloat16 if native else torch.float16
            teacher = student
        else:
            # depthwise convolutions in bfloat16 are slower on a CPU, a transformer's GEMMs faster
            can = cpu_capabilities()
            fast = can.get("avx512_bf16") or can.get("amx_bf16")
            student, teacher = torch.float32, torch.bfloat16 if fast else torch.float32
        return cls(device, student, teacher, rank, ranks)

    def autocast(self) -> torch.autocast:
        """For the student: nothing in float32."""
        return torch.autocast(self.device.type, self.student, self.student != torch.float32)


def cpu_capabilities() -> dict[str, Any]:
    """What torch knows of the CPU; nothing where torch is too old to say."""
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return known


class Meter:
    """Sums of the losses and their first bad step, on the device until they are read."""

    NEVER = 2**62

    def __init__(self, names: list[str], device: torch.device) -> None:
        self.names = names
        self.sums = torch.zeros(len(names), device=device)
        self.bad = torch.full((len(names),), self.NEVER, device=device)
        self.count = 0

    def add(self, losses: Tensor, step: int) -> None:
        """Takes one batch's losses, [terms]."""
        self.sums += losses
        self.bad = torch.where(losses.isfinite(), self.bad, self.bad.clamp(max=step))
        self.count += 1

    def first_bad(self) -> tuple[int, str] | None:
        """The first step of any rank with a loss that is NaN or Inf, and that loss's name."""
        if dist.is_initialized():
            dist.all_reduce(self.bad, dist.ReduceOp.MIN)
        step, name = min(zip(self.bad.tolist(), self.names, strict=True))
        return None if step == self.NEVER else (step, name)

    def state(self) -> tuple[list[float], int]:
        """The sums since the last reset, a mean over the ranks, and how many batches they hold."""
        sums = self.sums.clone()
        if dist.is_initialized():
            dist.all_reduce(sums)
            sums /= dist.get_world_size()
        return sums.tolist(), self.count

    def reset(self, sums: list[float] | None = None, count: int = 0) -> None:
        """Begins anew, or where `state` was taken."""
        self.sums.copy_(torch.tensor(sums or [0.0] * len(self.names)))
        self.count = count

    def means(self) -> dict[str, float]:
        """The mean of each loss over batches and ranks since the last call."""
        sums, count = self.state()
        self.reset()
        return {name: total / count for name, total in zip(self.names, sums, strict=True)}


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


class Trainer:
    """One run: a student, perhaps a teacher, their images, and a folder for what comes out.

    Args:
        config: data, augmentation and run; models and losses come as arguments.
        student: trained in place.
        teacher: a constant, or None.
        losses: the terms that are added up.
        optimizer: its section, which a teacher in training has of its own.
        epochs: of the training images.
        splits: the images.
        folder: of checkpoint.safetensors (the last whole state), last.safetensors and
            best.safetensors (weights that `models.load` reads), and the logger.
        seed: of order, augmentation and everything drawn.
        title: for the logger.
        runtime: where to compute.
        save_model: writes a model's weights to a path, so that `models.load` reads them.
        resume: go on from the folder's checkpoint, where there is one.

    Raises:
        CheckpointError: a folder that cannot be written, or holds another run.
        DataError: naming what is wrong with the images.
    """

    def __init__(
        self,
        config: Config,
        student: nn.Module,
        teacher: nn.Module | None,
        losses: Losses,
        optimizer: Optimizer,
        epochs: int,
        splits: sources.Splits,
        folder: Path,
        *,
        seed: int,
        title: str,
        runtime: Runtime,
        save_model: Callable[[Path, nn.Module], None],
        resume: bool = False,
    ) -> None:
        run = config.run
        self.runtime, self.seed, self.folder, self.title = runtime, seed, folder, title
        self.run_section, self.options, self.save_model = run, optimizer, save_model
        self.loader, self.val_loader = data.loaders(config, splits, seed, optimizer.accumulate)
        self.classes = len(splits.classes)
        self.mixer = data.Mixer(config.augmentation) if config.augmentation.mixes else None
        self.steps_per_epoch = self.loader.batches // optimizer.accumulate
        self.total = min(epochs * self.steps_per_epoch, run.max_steps or 2**62)

        layout = torch.channels_last if run.channels_last else torch.contiguous_format
        self.model = student.to(memory_format=layout)
        predict = models.predictor(self.model).to(runtime.device)
        teacher = _frozen(teacher, runtime, layout) if teacher else None
        size = config.data.image_size
        image = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=runtime.device)
        task = DistillationTask(losses, predict, teacher, image, runtime.autocast)
        self.task, self.learned = task, task.trainable_module.learned
        self.optimizer = build_optimizer(self.model, optimizer)
        learned = list(self.learned.parameters())
        for decayed in (True, False):  # as the student's: weights, not biases
            if group := [p for p in learned if (p.dim() > 1) == decayed]:
                decay = optimizer.weight_decay if decayed else 0.0
                self.optimizer.add_param_group({"params": group, "weight_decay": decay})
        self.parameters = [*self.model.parameters(), *learned]
        self.scheduler = create_scheduler_v2(
            self.optimizer,
            optimizer.schedule,
            num_epochs=self.total,
            warmup_epochs=optimizer.warmup_epochs * self.steps_per_epoch,
            warmup_lr=optimizer.warmup_lr,
            min_lr=optimizer.min_lr,
            step_on_epochs=False,
            updates_per_epoch=1,
        )[0]
        self.ema = None
        if optimizer.ema_decay:
            self.ema = ModelEmaV3(self.model, decay=optimizer.ema_decay, use_warmup=True)
        self.scaler = torch.amp.GradScaler(
            runtime.device.type, enabled=runtime.student == torch.float16
        )
        self.meter = Meter(list(task.trainable_module.terms), runtime.device)
        self.step, self.evaluated, self.best = 0, 0, -1.0
        self._rates: dict[int, float] = {}  # by step, since the last log
        self._since = time.monotonic(), 0
        # signals are agreed on here, so that no rank synchronises with its device
        self._control: Any = dist.new_group(backend="gloo") if runtime.ranks > 1 else None

        # at most: weights, moments, average; old and new
        self.disk = 8 * sum(p.numel() * p.element_size() for p in self.parameters)
        if runtime.rank == 0:
            checkpoint.check_folder(folder, self.disk)
        self.path = folder / "checkpoint.safetensors"
        if resume and self.path.exists():
            info = checkpoint.restore(self.path, self._modules(), self.optimizer)
            self.step, self.evaluated, self.best = info["step"], info["evaluated"], info["best"]
            if self.scaler.is_enabled() and info["scaler"]:
                self.scaler.load_state_dict(info["scaler"])
            self.meter.reset(*info["meter"])
            self.scheduler.step_update(self.step)
        if run.compile:
            task.compile()
        self.forward, self.teacher = task.trainable_module.predict, task.teacher
        if runtime.ranks > 1:
            task.prepare_distributed()

    def update(self, batches: Iterator[data.Batch]) -> None:
        """One step: `accumulate` batches through teacher and student, then the optimiser."""
        runtime, accumulate = self.runtime, self.options.accumulate
        data.seed_all(self.seed, self.step, runtime.rank)
        for i in range(accumulate):
            batch = next(batches)
            images = batch.images.to(runtime.device, non_blocking=True)
            labels: Any = batch.labels.to(runtime.device, non_blocking=True)
            if self.mixer:
                images, labels = self.mixer(images.float(), labels)
            with self.task.no_sync() if i < accumulate - 1 else nullcontext():
                result = self.task(images, labels, self.step / self.total)
                self.scaler.scale(result["loss"] / accumulate).backward()
            self.meter.add(result["terms"].detach(), self.step)
        if self.options.clip_grad:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, self.options.clip_grad)
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
            self._since = time.monotonic(), self.step
            while self.step < self.total or self._is_due():
                if self._is_due():
                    self._evaluate(logger)
                    self._save()
                    self._obey(signals)
                    continue
                epoch, start = divmod(self.step, self.steps_per_epoch)
                batches = self.loader.epoch(epoch, start * self.options.accumulate)
                self.task.train()
                for _ in range(start, min(self.steps_per_epoch, start + self.total - self.step)):
                    self._rates[self.step] = self.optimizer.param_groups[0]["lr"]
                    self.update(batches)
                    logger.advance(self.step)
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
        """The weights that count: the moving average, where one is kept."""
        return self.ema.module if self.ema else self.model

    def _modules(self) -> dict[str, nn.Module]:
        modules: dict[str, nn.Module] = {"student": self.model, "losses": self.learned}
        return modules | ({"ema": self.ema.module} if self.ema else {})

    def _is_due(self) -> bool:
        """Whether the weights as they are should be evaluated, and are not yet."""
        epochs, inside = divmod(self.step, self.steps_per_epoch)
        ended = self.step == self.total or not (inside or epochs % self.run_section.eval_every)
        return ended and self.step > self.evaluated

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
        if bad := self.meter.first_bad():
            step, what = bad[0], f"loss {bad[1]} is not finite at step {bad[0]}"
        elif not nn.utils.get_total_norm(self.parameters).isfinite():
            step = self.step - 1
            what = f"the weights are not finite after step {step}"
        else:
            return
        what += f" (learning rate {self._rates.get(step, math.nan):.3g})"
        kept = f"{self.path} is the last good one" if self.path.exists() else "none was saved"
        raise NonFiniteError(f"{self.title}: {what}; checkpoint: {kept}")

    def _evaluate(self, logger: MetricLogger) -> None:
        self._check()
        self._share_buffers()
        self.trained.eval()
        result = evaluate.evaluate(
            models.predictor(self.trained).to(self.runtime.device),
            ((batch.images, batch.labels) for batch in self.val_loader.epoch()),
            classes=self.classes,
            device=self.runtime.device,
        )
        scores = {"epoch": self.step / self.steps_per_epoch}
        scores |= {name: result.metrics[name] for name in ("top1", "nll")}
        logger.write("val", self.step, scores)
        if self.runtime.rank == 0:
            self.save_model(self.folder / "last.safetensors", self.trained)
            if scores["top1"] > self.best:
                self.save_model(self.folder / "best.safetensors", self.trained)
        self.best, self.evaluated = max(self.best, scores["top1"]), self.step
        self._since = time.monotonic(), self.step

    def _save(self) -> None:
        """Writes the whole state, unless a loss or a weight in it is NaN or Inf."""
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
            checkpoint.save(self.path, self._modules(), self.optimizer, info)


def build_optimizer(model: nn.Module, options: Optimizer) -> torch.optim.Optimizer:
    """timm's optimiser of this name, without weight decay for biases and norms.

    Raises:
        ConfigError: naming an unknown optimiser or option.
    """
    try:
        kind = get_optimizer_class(options.name, bind_defaults=False)
    except ValueError as error:
        near = difflib.get_close_matches(options.name, list_optimizers(), 1, cutoff=0)[0]
        raise ConfigError(
            f"optimizer.name: timm has no {options.name!r}; the nearest is {near}"
        ) from error
    # torch's own update all weights in one pass, where they can: a quarter of the time
    fused = {"fused": True} if "fused" in inspect.signature(kind).parameters else {}
    try:
        return create_optimizer_v2(
            model,
            opt=options.name,
            lr=options.lr,
            weight_decay=options.weight_decay,
            **(fused | options.options),
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optimizer.options: {options.options}: {error}") from error


def _frozen(teacher: nn.Module, runtime: Runtime, layout: torch.memory_format) -> nn.Sequential:
    """A frozen copy on the device, in its precision, for images as they are loaded."""
    teacher = copy.deepcopy(teacher).eval().requires_grad_(False)
    teacher = teacher.to(runtime.teacher).to(memory_format=layout)
    return models.predictor(teacher, dtype=runtime.teacher).to(runtime.device).eval()


def _few(names: set[str]) -> str:
    shown = sorted(names)[:3]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
