"""A cache made by the processes of a Ray cluster, to which Ray carries (epoch, shard) alone.

Identity, commit and resuming are the cache's own: a shard is what the plan says, whoever makes it
and however often, and is there once. So a process that dies costs the shard it was making, which
another makes; Ray restarts and retries nothing, since what it retries it does not count.

An image that kills whoever reads it is left out after three deaths. A machine that is lost counts
against no image. Where nothing moves any more, the error says what waits for what.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from ..._extras import require
from ..config import Config, ConfigError
from ..runtime import Runtime
from . import quarantine
from .build import Made, Maker, Options, begin, clear, held, lacking
from .plan import CacheError, Place
from .read import CachedTeacher
from .worker import Answer, Note, Worker

PATIENCE = 600.0  # seconds without an image read or a shard made anywhere
_LOOK_EVERY = 1.0
_SAY_EVERY = 10.0
_DEATHS = 3  # of the processes that read an image, after which nobody reads it
_HOPELESS = 5  # of the processes that make a shard, of no image in particular


def build(config: Config, folder: Path, options: Options, workers: int | None = None) -> Made:
    """`build.build` by actors of the cluster at RAY_ADDRESS; where it is not set, of this machine.

    Every machine must have the package, and see the images, the weights and the folder at the same
    paths.

    Args:
        workers: processes, each of run.threads CPUs (1, where it is not set); None: as many as the
            cluster has CPUs for, but one, or GPUs.

    Raises:
        ImportError: Ray is not installed.
        CacheError: as `build.build`; a machine comes to another plan; processes keep dying; nothing
            has moved for ten minutes.
        OSError: of any process, such as a full disk.
    """
    require("ray", "vitkd cache --engine ray")
    if dist.is_torchelastic_launched():
        raise ConfigError("--engine: ray starts its processes itself, without torchrun")
    runtime, folder = Runtime.of(config), folder.absolute()
    maker = Maker(config, runtime, options)
    with held(folder, runtime):
        begin(maker, folder)
        todo, bad = lacking(folder, maker.plan, maker.plan.places())
        count = maker.plan.epochs * maker.plan.shards
        if todo:
            with _connected() as ray:
                try:
                    _Driver(ray, maker, folder, options, todo, workers).run()
                finally:
                    clear(folder)
        for index, name in quarantine.read(folder).items():
            print(f"{name}: image {index} is left out, see {folder / quarantine.FILE}", flush=True)
        CachedTeacher(folder)  # complete
    return Made(maker.plan, count - len(todo), len(todo), bad)


@contextmanager
def _connected() -> Iterator[Any]:
    """Ray, without telemetry."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # read when a cluster starts
    import ray

    if ray.is_initialized():
        yield ray
        return
    # a cluster that happens to run, or a killed command left, is not used unless it is named
    address = os.environ.get("RAY_ADDRESS") or "local"
    own = {"include_dashboard": False, "object_store_memory": 80 << 20}  # the least; it stays empty
    ray.init(
        address,
        log_to_driver=False,
        logging_level=logging.WARNING,
        **(own if address == "local" else {}),
    )
    try:
        yield ray
    finally:
        ray.shutdown()


def share(
    device: str, threads: int, workers: int | None, cluster: dict[str, float]
) -> tuple[int, dict[str, float]]:
    """How many processes, and what of a cluster each takes."""
    cpus, gpus = cluster.get("CPU", 0), cluster.get("GPU", 0)
    if device != "cuda":
        # one for the driver; a process that has no place would only wait
        return workers or max(1, int(cpus - 1) // threads), {"num_cpus": threads}
    if not gpus:
        raise CacheError("--engine ray: the cluster has no GPU, and run.device is cuda")
    workers = workers or int(gpus)
    return workers, {"num_cpus": threads, "num_gpus": min(1.0, gpus / workers)}


class _Slot:
    """A process, and the shard that it makes."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.answer: Answer | None = None
        self.place: Place | None = None
        self.note = Path()


class _Death(NamedTuple):
    node: str
    place: Place
    image: int  # -1: it read none


class _Driver:
    """Gives shards to processes that are ready, one at a time."""

    def __init__(
        self,
        ray: Any,
        maker: Maker,
        folder: Path,
        options: Options,
        todo: list[Place],
        workers: int | None,
    ) -> None:
        self.ray, self.maker, self.folder = ray, maker, folder
        self.plan, self.count = maker.plan, len(todo)
        self.todo, self.done = deque(todo), 0
        self.left_out = quarantine.read(folder)
        threads = maker.config.run.threads or 1
        device, cluster = maker.runtime.device.type, ray.cluster_resources()
        self.workers, self.takes = share(device, threads, workers, cluster)
        self.workers = min(self.workers, len(todo))
        actor = ray.remote(**self.takes, max_restarts=0, max_task_retries=0)(Worker)
        given = (maker.config, options, maker.plan, folder, os.getcwd(), threads)
        self.create = lambda: actor.remote(*given)
        self.idle: list[_Slot] = []
        self.waiting: dict[Any, _Slot] = {}  # for an answer, by its reference
        self.deaths: list[_Death] = []
        self.unborn = 0  # died before they were ready, one after another
        self.seen: dict[Path, Note] = {}
        self.images = 0
        self.began = self.moved = self.looked = self.said = time.monotonic()

    def run(self) -> None:
        try:
            for _ in range(self.workers):
                self._start()
            while self.todo or self._busy():
                while self.todo and self.idle:
                    self._give(self.idle.pop(), self.todo.popleft())
                heard, _ = self.ray.wait(list(self.waiting), timeout=_LOOK_EVERY)
                for reference in heard:
                    self._hear(reference, self.waiting.pop(reference))
                self._watch()
        finally:
            for slot in [*self.idle, *self.waiting.values()]:
                self._end(slot)

    def _busy(self) -> list[_Slot]:
        return [slot for slot in self.waiting.values() if slot.place]

    def _start(self) -> None:
        slot = _Slot(self.create())
        self.waiting[slot.actor.answer.remote()] = slot

    def _give(self, slot: _Slot, place: Place) -> None:
        slot.place, path = place, self.folder / place.file
        # made here: another machine may learn late of a file that is new
        slot.note = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.note.part")
        Note().write(slot.note)
        self.waiting[slot.actor.make.remote(place, list(self.left_out), slot.note)] = slot

    def _hear(self, reference: Any, slot: _Slot) -> None:
        of = self.ray.exceptions
        dead = (of.RayActorError, of.NodeDiedError, of.WorkerCrashedError, of.OutOfMemoryError)
        try:
            said = self.ray.get(reference)
        except (*dead, of.ObjectLostError) as error:
            self._bury(slot, error)
            return
        if slot.place is None:
            if said.refused:
                raise said.refused
            slot.answer = said
        else:
            slot.note.unlink(missing_ok=True)
            if said is not None:
                raise said
            self.done += 1
            self.images += len(self.plan.rows_of(slot.place))
            slot.place = None
        self.unborn = 0
        self.idle.append(slot)

    def _bury(self, slot: _Slot, error: Exception) -> None:
        """Another process takes its place, and its shard is made by whoever is ready first."""
        self._end(slot)  # it may be out of reach only
        self._start()
        if slot.place is None or slot.answer is None:
            self.unborn += 1
            if self.unborn >= _DEATHS * self.workers:
                why = " ".join(str(error).split())
                raise CacheError(
                    f"--engine ray: {self.unborn} processes died before they were ready: {why}"
                )
            return
        note = Note.read(slot.note)
        slot.note.unlink()
        self.todo.appendleft(slot.place)
        known = note.image in self.left_out  # since after the shard was given
        if note.steps and not known and not getattr(error, "preempted", False):
            self.deaths.append(_Death(slot.answer.node, slot.place, note.image))
            self._judge()

    def _judge(self) -> None:
        """Leaves an image out of which processes died, or gives a shard up."""
        alive = {node["NodeID"] for node in self.ray.nodes() if node["Alive"]}
        # a machine is known to be lost later than its processes
        self.deaths = [death for death in self.deaths if death.node in alive]
        if not self.deaths:
            return
        image, place = self.deaths[-1].image, self.deaths[-1].place
        if image >= 0 and sum(death.image == image for death in self.deaths) >= _DEATHS:
            name = self.maker.source.name(image)
            print(f"{name}: {_DEATHS} processes died reading it; it is left out", flush=True)
            self.left_out = quarantine.add(self.folder, image, name)
            self.deaths = [death for death in self.deaths if death.image != image]
        elif sum(death.place == place for death in self.deaths) >= _HOPELESS:
            raise CacheError(
                f"--engine ray: {self.folder / place.file}: {_HOPELESS} processes died making it, "
                "and of no image in particular; is there too little memory?"
            )

    def _end(self, slot: _Slot) -> None:
        with suppress(Exception):  # it may be dead
            self.ray.kill(slot.actor)

    def _watch(self) -> None:
        now = time.monotonic()
        if now - self.looked < _LOOK_EVERY:
            return
        self.looked = now
        notes = {slot.note: Note.read(slot.note) for slot in self._busy()}
        begun = {path: note for path, note in notes.items() if note.steps}
        if begun != self.seen:
            self.seen, self.moved = begun, now
        elif now - self.moved > PATIENCE:
            raise CacheError(self._what_waits())
        if now - self.said > _SAY_EVERY:
            self.said = now
            print(
                f"{self.done} of {self.count} shards, {len(self._busy())} of {self.workers} "
                f"processes, {self.images / (now - self.began):,.0f} images/s",
                flush=True,
            )

    def _what_waits(self) -> str:
        lines = []
        for slot in self._busy():
            assert slot.answer and slot.place
            note = Note.read(slot.note)
            doing = (
                f"reading {self.maker.source.name(note.image)}"
                if note.image >= 0
                else ("asking the teacher" if note.steps else "which has not begun")
            )
            process = f"process {slot.answer.pid} of node {slot.answer.node[:8]}"
            lines.append(f"{slot.place.file} for {process}, {doing}")
        if absent := [slot for slot in self.waiting.values() if not slot.answer]:
            free = self.ray.available_resources()
            has = {name: free.get(name, 0) for name in ("CPU", "GPU")}
            lines.append(
                f"{len(absent)} processes for a place, each takes {self.takes}, and {has} is free"
            )
        return (
            f"--engine ray: nothing has moved for {PATIENCE:.0f} s, and {len(self.todo)} shards "
            f"wait; {'; '.join(lines)}"
        )
