"""Where the time of a training step goes: the real `Trainer.update` on a run's data and models.

A stopwatch is told when a part begins, by wrappers that replace methods of this trainer and its
task for as long as steps are measured. A training run has none of them, and pays nothing.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.utils.model import unwrap_model

from . import data, preflight
from .config import Config
from .loop import Trainer
from .prepared import Prepared
from .runtime import Runtime
from .task import DistillationTask

PARTS = ("data", "teacher", "student forward", "loss", "backward", "optimiser")
_WARM_UP = 5  # steps; and as many as the search for a number of threads needs


@dataclass(frozen=True)
class Profile:
    """Milliseconds of a step, by part; they add up to the step.

    On a CPU a part has the CPU time of the training thread, and `idle` is what is left by the
    clock: that thread sleeps, or another process has its core. Threads that wait for each other
    compute, as far as can be told. `data` is by the clock where workers read: it is waited for.
    On a GPU each part ends with a synchronisation, so that what runs on the device is its own, and
    the parts of a step that is not measured overlap: it takes `overlapped`. There is no `idle`.
    """

    device: str
    threads: int
    images: int  # of a step, on all processes
    steps: int  # that were measured
    parts: dict[str, float]
    step: float
    overlapped: float | None

    @property
    def images_per_s(self) -> float:
        """Of the step as it is in a run."""
        return 1e3 * self.images / (self.overlapped or self.step)

    def __str__(self) -> str:
        threads = "" if self.overlapped else f", {self.threads} threads"
        lines = [
            f"{self.images} images a step, {self.device}{threads}, {self.steps} steps",
            f"{'part':16} {'ms a step':>10} {'share':>7}",
        ]
        for name, ms in (*self.parts.items(), ("step", self.step)):
            lines.append(f"{name:16} {ms:10.2f} {ms / self.step:7.1%}")
        if self.overlapped:
            lines.append(f"{'overlapped':16} {self.overlapped:10.2f} {'':7}")
        return "\n".join([*lines, f"{self.images_per_s:,.0f} images/s"])

    def json(self) -> dict[str, Any]:
        """The fields, and images a second."""
        return {**asdict(self), "images_per_s": self.images_per_s}


class _Stopwatch:
    """Seconds of each part by the clock, and of the CPU time of this thread."""

    def __init__(self, synchronize: Callable[[], object]) -> None:
        self.synchronize = synchronize
        self.wall = dict.fromkeys(PARTS, 0.0)
        self.cpu = dict.fromkeys(PARTS, 0.0)
        self.part, self._since = PARTS[0], (0.0, 0.0)

    def enter(self, part: str) -> None:
        """From now on time is this part's."""
        self.synchronize()
        wall, cpu = time.perf_counter(), time.thread_time()
        self.wall[self.part] += wall - self._since[0]
        self.cpu[self.part] += cpu - self._since[1]
        self.part, self._since = part, (wall, cpu)

    def start(self) -> None:
        self.synchronize()
        self.part, self._since = PARTS[0], (time.perf_counter(), time.thread_time())


def _wrapped(
    function: Callable[..., Any], before: Callable[[], None], after: Callable[[], None]
) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        before()
        result = function(*args, **kwargs)
        after()
        return result

    return call


@contextmanager
def _watched(trainer: Trainer, watch: _Stopwatch) -> Iterator[None]:
    """The trainer's methods tell the stopwatch which part of a step begins."""

    def enter(part: str) -> Callable[[], None]:
        return lambda: watch.enter(part)

    def nothing() -> None: ...

    task: Any = trainer.task
    module = unwrap_model(task.trainable_module)
    replaced: list[tuple[Any, str, Callable[[], None], Callable[[], None]]] = [
        (task, "cached_outputs", enter("teacher"), enter("data")),
        (task, "teacher_outputs", enter("teacher"), enter("student forward")),
        (module, "_term", enter("loss"), nothing),
        (task, "forward", enter("student forward"), enter("backward")),
        (trainer.meter, "add", enter("optimiser"), nothing),
    ]
    for owner, name, before, after in replaced:
        setattr(owner, name, _wrapped(getattr(owner, name), before, after))
    try:
        yield
    finally:
        for owner, name, *_ in replaced:
            delattr(owner, name)  # the class's own is there again


def measure(trainer: Trainer, steps: int) -> Profile:
    """Takes steps, which train the student, and returns where their time went."""
    runtime, options = trainer.runtime, trainer.options
    cuda = runtime.device.type == "cuda"
    synchronize: Callable[[], object] = torch.cuda.synchronize if cuda else int
    batches = itertools.chain.from_iterable(map(trainer.loader.epoch, itertools.count()))
    trainer.task.train()
    warm = 0
    while warm < _WARM_UP or trainer.threads.tries:
        with trainer.threads:
            trainer.update(batches)
        warm += 1
    if trainer.threads.counts:
        torch.set_num_threads(trainer.threads.count)
    overlapped = None
    if cuda:
        synchronize()
        begun = time.perf_counter()
        for _ in range(steps):
            trainer.update(batches)
        synchronize()
        overlapped = (time.perf_counter() - begun) / steps

    watch = _Stopwatch(synchronize)

    def watched() -> Iterator[data.Batch]:
        while True:
            watch.enter("data")
            yield next(batches)

    with _watched(trainer, watch):
        one_by_one = watched()
        watch.start()
        begun = time.perf_counter()
        for _ in range(steps):
            trainer.update(one_by_one)
            watch.enter("data")
        step = (time.perf_counter() - begun) / steps
    parts = {name: seconds / steps for name, seconds in watch.wall.items()}
    if not cuda:
        waits = ("data",) if trainer.config["data"]["workers"] else ()
        parts |= {k: seconds / steps for k, seconds in watch.cpu.items() if k not in waits}
        parts["idle"] = max(sum(watch.wall.values()) / steps - sum(parts.values()), 0.0)
    return Profile(
        device=str(runtime.device),
        threads=torch.get_num_threads(),
        images=trainer.loader.batch_size * options.accumulate * runtime.ranks,
        steps=steps,
        parts={name: 1e3 * seconds for name, seconds in parts.items()},
        step=1e3 * step,
        overlapped=None if overlapped is None else 1e3 * overlapped,
    )


def bench_loop(config: Config, steps: int = 20) -> Profile:
    """Where the time of a step of this run goes; writes nothing, and looks at no run's folder.

    A teacher that the run would train first is as it is made.

    Raises:
        ConfigError, DataError: what cannot be run.
    """
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        run = config.run.model_copy(update={"folder": str(Path(folder) / "run")})
        config = config.model_copy(update={"run": run})
        try:
            runtime = Runtime.of(config)
            prepared = Prepared(config, runtime, False)
            data.seed_all(0)
            student = preflight.create_student(config, prepared.classes)
            task = DistillationTask.create(
                config, student, prepared.teachers, runtime, prepared.cache
            )
            trainer = Trainer(
                config,
                task,
                prepared.splits,
                Path(folder) / "run",
                seed=config.run.seeds[0],
                save_model=lambda *_: None,
            )
            return measure(trainer, steps)
        finally:
            torch.set_num_threads(threads)
            if dist.is_initialized():
                dist.destroy_process_group()
