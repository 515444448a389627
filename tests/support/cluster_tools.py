"""A Ray cluster for tests: a pretended one, and one of three machines on this one."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vitkd_fast import _cluster, _extras
from vitkd_fast._cluster import Answer, Note

from .cache_tools import HOOK

of_a_cluster = pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra ray")


class Died(Exception):
    preempted = False


class Pretended:
    """Ray with actors of this process, each on a machine of its own; `dies` says which do."""

    exceptions = SimpleNamespace(
        RayActorError=Died,
        NodeDiedError=Died,
        WorkerCrashedError=Died,
        OutOfMemoryError=Died,
        ObjectLostError=Died,
    )

    def __init__(self, dies: Callable[[Any], None], answers: bool = True) -> None:
        self.dies, self.answers = dies, answers
        self.actors: list[Any] = []
        self.lost: set[str] = set()

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 3.0}

    def remote(self, **takes: Any) -> Any:
        assert takes == {"num_cpus": 1, "max_restarts": 0, "max_task_retries": 0}
        return lambda made: SimpleNamespace(remote=lambda *given: self._create(made(*given)))

    def _create(self, worker: Any) -> Any:
        actor = SimpleNamespace(node=str(len(self.actors)), killed=False)

        def answer() -> Answer:
            if not self.answers:
                raise Died("no library")
            return Answer(actor.node, 0, 1, worker.refused)

        def make(piece: Any, *more: Any) -> Any:
            left_out, note = more or ((), None)
            assert not actor.killed and (note is None or Note.read(note) == (0, -1))
            self.dies(
                SimpleNamespace(piece=piece, left_out=left_out, note=note, actor=actor, ray=self)
            )
            return worker.make(piece, *more)

        actor.answer = SimpleNamespace(remote=lambda: answer)
        actor.make = SimpleNamespace(remote=lambda *given: lambda: make(*given))
        self.actors.append(actor)
        return actor

    def wait(self, references: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        return references[:1], references[1:]

    def get(self, reference: Any) -> Any:
        return reference()

    def kill(self, actor: Any) -> None:
        actor.killed = True

    def nodes(self) -> list[dict[str, Any]]:
        names = [actor.node for actor in self.actors]
        return [{"NodeID": name, "Alive": name not in self.lost} for name in names]


@contextmanager
def pretend(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> Iterator[Pretended]:
    """Instead of Ray; the arguments are `Pretended`'s."""
    made = Pretended(*arguments)

    @contextmanager
    def connected() -> Iterator[Any]:
        yield made

    with monkeypatch.context() as patch:
        patch.setattr(_cluster, "connected", connected)
        patch.setattr(_extras, "find_spec", lambda name: True)
        yield made


@contextmanager
def three_machines(hook: Path) -> Iterator[Any]:
    """Of one CPU each; this process is connected to the first."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray.cluster_utils import Cluster

    (hook / "sitecustomize.py").write_text(HOOK)
    with pytest.MonkeyPatch.context() as patch:
        paths = filter(None, (str(hook), os.environ.get("PYTHONPATH")))
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        patch.delenv("RAY_ADDRESS", raising=False)
        made = Cluster()
        for _ in range(3):
            made.add_node(num_cpus=1, object_store_memory=80 << 20, include_dashboard=False)
        ray.init(address=made.address, log_to_driver=False)
        made.hook = str(hook)
        yield made
        ray.shutdown()
        made.shutdown()


def processes(hook: str) -> list[int]:
    """Of this cluster, that are making a piece."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            title, around = (path / "cmdline").read_bytes(), (path / "environ").read_bytes()
        except OSError:
            continue
        if title.startswith(b"ray::Worker.make") and hook.encode() in around:
            found.append(int(path.name))
    return found


def watch_burials(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The nodes of processes that died, as a driver comes to know."""
    found: list[str] = []
    real = _cluster.Driver._bury

    def bury(self: Any, slot: Any, error: Exception) -> None:
        found.append(slot.answer.node if slot.answer else "")
        real(self, slot, error)

    monkeypatch.setattr(_cluster.Driver, "_bury", bury)
    return found


def when_there_are(files: Callable[[], Iterable[Any]], count: int, act: Callable[[], Any]) -> Any:
    """Acts in a thread, once there are so many files; returns the thread."""

    def wait() -> None:
        end = time.monotonic() + 600
        while len(list(files())) < count and time.monotonic() < end:
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread
