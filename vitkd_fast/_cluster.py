"""Work in pieces by the processes of a Ray cluster, to which Ray carries what a piece is, no more.

What a piece is, where it is kept and whether it is there are the job's own: a piece is the same
whoever makes it and however often, and is there once. So a process that dies costs the piece it was
making, which another makes; Ray restarts and retries nothing, since what it retries it does not
count.

An image that kills whoever reads it is left out after three deaths. A machine that is lost counts
against no image. Where nothing moves any more, the error says what waits for what.
"""

from __future__ import annotations

import logging
import os
import struct
import time
import uuid
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

PATIENCE = 600.0  # seconds without an image read or a piece made anywhere
# what a process says went wrong instead of dying of it; a note on a full disk is among them
EXPECTED = (ValueError, OSError, RuntimeError, ImportError)
_LOOK_EVERY = 1.0
_ASK_EVERY = 10.0  # where to look is to ask another machine
_SAY_EVERY = 10.0
_DEATHS = 3  # of the processes that read an image, after which nobody reads it
_HOPELESS = 5  # of the processes that make a piece, of no image in particular
_NOTE = struct.Struct("<qq")


class ClusterError(ValueError):
    """Work that a cluster cannot finish; the message says of what."""


class Note(NamedTuple):
    """What a process was doing when it last wrote: 16 bytes, overwritten in place.

    So whoever finds a process dead knows of which image it died; it costs microseconds an image.
    """

    steps: int = 0  # 0: it had not begun
    image: int = -1  # being read; -1: none

    @classmethod
    def read(cls, path: Path) -> Note:
        try:
            return cls(*_NOTE.unpack(path.read_bytes()))
        except FileNotFoundError:
            return cls()

    def write(self, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(_NOTE.pack(*self))


class Noting:
    """Notes which image is being read, in a file; one that was not there is removed at the end."""

    def __init__(self) -> None:
        self._file, self._steps = -1, 0
        self._own: Path | None = None

    def begin(self, path: Path) -> None:
        """Notes go to this file from now on."""
        self.end()
        self._own = None if path.exists() else path
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        self._steps = 0
        self._write(-1)

    def end(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        if self._own:
            self._own.unlink(missing_ok=True)
        self._file, self._own = -1, None

    @contextmanager
    def reading(self, image: int) -> Iterator[None]:
        self._write(image)
        try:
            yield
        finally:
            self._write(-1)

    def _write(self, image: int) -> None:
        self._steps += 1
        # an OSError here would be taken for one of the image; without a note, the driver only
        # knows less
        with suppress(OSError):
            os.pwrite(self._file, _NOTE.pack(self._steps, image), 0)


class Answer(NamedTuple):
    """What a process says when it is ready, or that it will not be."""

    node: str
    pid: int
    threads: int
    refused: Exception | None

    @classmethod
    def here(cls, threads: int, refused: Exception | None) -> Answer:
        """Of this process, which is one of Ray's."""
        import ray

        return cls(ray.get_runtime_context().get_node_id(), os.getpid(), threads, refused)


def named(error: Exception) -> Exception:
    """The error, and on which machine it was raised."""
    where = f"on {os.uname().nodename}, process {os.getpid()}"
    if isinstance(error, OSError) and error.errno is not None:
        return type(error)(error.errno, f"{error.strerror} ({where})", error.filename)
    # of another class only if it can be made from a message
    kind = type(error) if isinstance(error, ValueError) else RuntimeError
    with suppress(TypeError):
        return kind(f"{error} ({where})")
    return RuntimeError(f"{error} ({where})")


class Job(Protocol):
    """What a cluster is to make, for `Driver`.

    A piece is what Ray carries to a process, and is shown by its `str`. Of each process is created
    a `worker`, a class with two methods: `answer()`, which returns an `Answer`, and `make(piece,
    left_out, note)`, which makes a piece without the images that are left out, notes in the file
    `note` what it reads (`Noting`), and returns the exception that ended it, or None.
    """

    pieces: str  # what pieces are called, in the plural
    worker: Any
    given: tuple[Any, ...]  # to `worker`

    def called(self, piece: Any) -> str:
        """The name of a piece, for people."""

    def path(self, piece: Any) -> Path | None:
        """Where on storage that all machines share a piece lies, and beside it the notes of who
        makes it; None: not on such, and notes lie on the machine of who makes it."""

    def images(self, piece: Any) -> int:
        """How many a piece has."""

    def name(self, image: int) -> str:
        """The file of an image."""

    def left_out(self) -> Collection[int]:
        """The images that nobody may read."""

    def leave_out(self, image: int) -> Collection[int]:
        """Puts an image among them, for good."""


@contextmanager
def connected() -> Iterator[Any]:
    """Ray, without telemetry: the cluster at RAY_ADDRESS, or one of this machine."""
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


class Share(NamedTuple):
    """How many processes, and what of a cluster each takes."""

    workers: int
    takes: dict[str, float]


def of_cpus(
    cluster: dict[str, float], threads: int, workers: int | None = None, spare: int = 0
) -> Share:
    """Of a cluster's CPUs but `spare`, some for each process."""
    # a process that has no place would only wait
    most = max(1, int(cluster.get("CPU", 0) - spare) // threads)
    return Share(workers or most, {"num_cpus": threads})


def on_machine(ray: Any, node: str, function: Callable[..., Any], *given: Any) -> Any:
    """What a function returns there; raises an exception of Ray where the machine is lost."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node, soft=False)
    task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(function)
    return ray.get(task.remote(*given), timeout=60)


def _take(path: Path, remove: bool) -> Note:
    note = Note.read(path)
    if remove:
        path.unlink(missing_ok=True)
    return note


class Slot:
    """A process, and the piece that it makes."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.answer: Answer | None = None
        self.piece: Any = None
        self.note = Path()
        self.far = False  # on its machine


class Crew:
    """Processes of a cluster, of which one that dies is replaced.

    Args:
        worker, given: a class with a method `answer()`, which returns an `Answer`, and one `make`,
            of which a process is created with what is given.
        share: how many.

    Raises (`listen`):
        ClusterError: processes keep dying before they are ready.
        Exception: what a process refused with.
    """

    def __init__(self, ray: Any, worker: Any, given: tuple[Any, ...], share: Share) -> None:
        self.ray, self.workers, self.takes = ray, *share
        actor = ray.remote(**self.takes, max_restarts=0, max_task_retries=0)(worker)
        self.create = lambda: actor.remote(*given)
        self.idle: list[Slot] = []
        self.waiting: dict[Any, Slot] = {}  # for an answer, by its reference
        self.unborn = 0  # died before they were ready, one after another

    def start(self) -> None:
        for _ in range(self.workers):
            self._start()

    def busy(self) -> list[Slot]:
        return [slot for slot in self.waiting.values() if slot.piece is not None]

    def make(self, slot: Slot, piece: Any, *more: Any) -> None:
        slot.piece = piece
        self.waiting[slot.actor.make.remote(piece, *more)] = slot

    def listen(self) -> None:
        """For a second at most; `made` and `died` are called of what was heard."""
        heard, _ = self.ray.wait(list(self.waiting), timeout=_LOOK_EVERY)
        for reference in heard:
            self._hear(reference, self.waiting.pop(reference))

    def end(self) -> None:
        for slot in [*self.idle, *self.waiting.values()]:
            self._end(slot)

    def made(self, slot: Slot, said: Any) -> None:
        """What it said of its piece."""
        raise NotImplementedError

    def died(self, slot: Slot, error: Exception) -> None:
        """While it had a piece."""
        raise NotImplementedError

    def alive(self) -> set[str]:
        """The machines; that one is lost is known later than that its processes are."""
        return {node["NodeID"] for node in self.ray.nodes() if node["Alive"]}

    def lacking(self) -> str:
        """What processes that are not there wait for; "": none."""
        if not (absent := [slot for slot in self.waiting.values() if not slot.answer]):
            return ""
        free = self.ray.available_resources()
        has = {name: free.get(name, 0) for name in ("CPU", "GPU")}
        return f"{len(absent)} processes for a place, each takes {self.takes}, and {has} is free"

    def _start(self) -> None:
        slot = Slot(self.create())
        self.waiting[slot.actor.answer.remote()] = slot

    def _end(self, slot: Slot) -> None:
        with suppress(Exception):  # it may be dead
            self.ray.kill(slot.actor)

    def _hear(self, reference: Any, slot: Slot) -> None:
        of = self.ray.exceptions
        dead = (of.RayActorError, of.NodeDiedError, of.WorkerCrashedError, of.OutOfMemoryError)
        try:
            said = self.ray.get(reference)
        except (*dead, of.ObjectLostError) as error:
            self._bury(slot, error)
            return
        if slot.piece is None:
            if said.refused:
                raise said.refused
            slot.answer = said
        else:
            self.made(slot, said)
            slot.piece = None
        self.unborn = 0
        self.idle.append(slot)

    def _bury(self, slot: Slot, error: Exception) -> None:
        """Another process takes its place."""
        self._end(slot)  # it may be out of reach only
        self._start()
        if slot.answer is not None and slot.piece is not None:
            self.died(slot, error)
            return
        self.unborn += 1
        if self.unborn >= _DEATHS * self.workers:
            why = " ".join(str(error).split())
            raise ClusterError(
                f"--engine ray: {self.unborn} processes died before they were ready: {why}"
            )


class _Death(NamedTuple):
    node: str
    piece: Any
    image: int  # -1: it read none


class Driver(Crew):
    """Gives pieces to processes that are ready, one at a time.

    Raises (`run`):
        ClusterError: processes keep dying, or nothing has moved for ten minutes.
        Exception: what a process returned or refused with.
    """

    def __init__(self, ray: Any, job: Job, todo: Iterable[Any], share: Share) -> None:
        self.job = job
        self.todo, self.done = deque(todo), 0
        self.count = len(self.todo)
        self.left_out = job.left_out()
        fewer = Share(min(share.workers, self.count), share.takes)
        super().__init__(ray, job.worker, job.given, fewer)
        self.deaths: list[_Death] = []
        self.seen: dict[Path, Note] = {}
        self.images = 0
        self.began = self.moved = self.looked = self.said = time.monotonic()

    def run(self) -> None:
        try:
            self.start()
            while self.todo or self.busy():
                while self.todo and self.idle:
                    self._give(self.idle.pop(), self.todo.popleft())
                self.listen()
                self._watch()
        finally:
            self.end()

    def _give(self, slot: Slot, piece: Any) -> None:
        path, unique = self.job.path(piece), uuid.uuid4().hex[:12]
        slot.far = path is None
        if path is None:
            slot.note = Path(f"/tmp/.vitkd-{unique}.note")
        else:
            # made here: another machine may learn late of a file that is new
            slot.note = path.with_name(f".{path.name}.{unique}.note.part")
            Note().write(slot.note)
        self.make(slot, piece, list(self.left_out), slot.note)

    def made(self, slot: Slot, said: Any) -> None:
        if not slot.far:
            slot.note.unlink(missing_ok=True)
        if said is not None:
            raise said
        self.done += 1
        self.images += self.job.images(slot.piece)

    def died(self, slot: Slot, error: Exception) -> None:
        """Its piece is made by whoever is ready first."""
        assert slot.answer
        note = self._note(slot, remove=True)
        self.todo.appendleft(slot.piece)
        known = note.image in self.left_out  # since after the piece was given
        if note.steps and not known and not getattr(error, "preempted", False):
            self.deaths.append(_Death(slot.answer.node, slot.piece, note.image))
            self._judge()

    def _note(self, slot: Slot, remove: bool = False) -> Note:
        if not slot.far:
            return _take(slot.note, remove)
        assert slot.answer
        try:
            return on_machine(self.ray, slot.answer.node, _take, slot.note, remove)
        except Exception:  # whatever Ray raises for a machine that is lost
            return Note()

    def _judge(self) -> None:
        """Leaves an image out of which processes died, or gives a piece up."""
        alive = self.alive()
        self.deaths = [death for death in self.deaths if death.node in alive]
        if not self.deaths:
            return
        image, piece = self.deaths[-1].image, self.deaths[-1].piece
        if image >= 0 and sum(death.image == image for death in self.deaths) >= _DEATHS:
            name = self.job.name(image)
            print(f"{name}: {_DEATHS} processes died reading it; it is left out", flush=True)
            self.left_out = self.job.leave_out(image)
            self.deaths = [death for death in self.deaths if death.image != image]
        elif sum(death.piece == piece for death in self.deaths) >= _HOPELESS:
            raise ClusterError(
                f"--engine ray: {self.job.called(piece)}: {_HOPELESS} processes died making it, "
                "and of no image in particular; is there too little memory?"
            )

    def _watch(self) -> None:
        now = time.monotonic()
        far = any(slot.far for slot in self.busy())
        if now - self.looked < (_ASK_EVERY if far else _LOOK_EVERY):
            return
        self.looked = now
        notes = {slot.note: self._note(slot) for slot in self.busy()}
        begun = {path: note for path, note in notes.items() if note.steps}
        if begun != self.seen:
            self.seen, self.moved = begun, now
        elif now - self.moved > PATIENCE:
            raise ClusterError(self._what_waits())
        if now - self.said > _SAY_EVERY:
            self.said = now
            print(
                f"{self.done} of {self.count} {self.job.pieces}, {len(self.busy())} of "
                f"{self.workers} processes, {self.images / (now - self.began):,.0f} images/s",
                flush=True,
            )

    def _what_waits(self) -> str:
        lines = []
        for slot in self.busy():
            assert slot.answer
            note, doing = self._note(slot), "which has not begun"
            if note.steps:
                doing = f"reading {self.job.name(note.image)}" if note.image >= 0 else "computing"
            process = f"process {slot.answer.pid} of node {slot.answer.node[:8]}"
            lines.append(f"{self.job.called(slot.piece)} for {process}, {doing}")
        if lacking := self.lacking():
            lines.append(lacking)
        return (
            f"--engine ray: nothing has moved for {PATIENCE:.0f} s, and {len(self.todo)} "
            f"{self.job.pieces} wait; {'; '.join(lines)}"
        )
