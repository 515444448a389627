"""A search by the processes of a Ray cluster, each of which trains a candidate at a time.

Ray carries configurations to processes and scores back, by plain actors: Ray Tune's OptunaSearch
sets Optuna's pruner to none, has no place for what a constraint reads, and goes on from a file of
its own instead of the study.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from .. import _cluster
from .._cluster import EXPECTED, PATIENCE, Answer, ClusterError, Slot, named
from .._extras import require
from ..distill.cache.cluster import share
from ..distill.config import Config
from ..distill.loop import Stopped
from ..distill.runtime import Runtime
from . import training
from .device import Here
from .study import FILE, Died, Search


def run(
    search: Search, trials: int, cpu_seconds: float | None = None, workers: int | None = None
) -> None:
    """`Search.run` by actors of the cluster at RAY_ADDRESS; where it is not set, of this machine.

    Every machine must have the package, and see the images, the weights and the search's folder at
    the same paths. This process measures, and makes the caches.

    Args:
        workers: processes, each of run.threads CPUs (1, where it is not set); None: as many as the
            cluster has CPUs for, but those that latency is measured on, or GPUs.

    Raises:
        ImportError: Ray is not installed.
        ClusterError: processes keep dying before they are ready; there is no place for one.
        Exception: as `Search.run`, of any process.
    """
    require("ray", "vitkd search --engine ray")
    if (todo := trials - len(search.trained())) < 1:
        return
    recipe = search.recipe
    threads, device = recipe.run.threads or 1, Runtime.of(recipe).device.type
    spare = search.device.threads if isinstance(search.device, Here) else 1
    with _cluster.connected() as ray:
        most = share(device, threads, workers, ray.cluster_resources(), spare)
        given = (search.folder, os.getcwd(), threads, device)
        crew = Crew(ray, given, most._replace(workers=min(most.workers, todo)))
        try:
            crew.start()
            search.run(trials, cpu_seconds, crew)
        finally:
            crew.end()


class Crew(_cluster.Crew):
    """Actors of Ray, as a `study.Crew`."""

    def __init__(self, ray: Any, given: tuple[Any, ...], most: _cluster.Share) -> None:
        super().__init__(ray, Worker, given, most)
        self.slots: dict[int, Slot] = {}  # by the trial
        self.found: list[tuple[int, training.Outcome | Died]] = []
        self.moved = time.monotonic()

    def free(self) -> bool:
        return bool(self.idle)

    def begin(self, piece: training.Begin) -> None:
        self.slots[piece.number] = slot = self.idle.pop()
        self.make(slot, piece)

    def finish(self, piece: training.Finish) -> None:
        self.idle.remove(slot := self.slots[piece.number])
        self.make(slot, piece)

    def heard(self) -> Iterable[tuple[int, training.Outcome | Died]]:
        self.found = []
        self.listen()
        now = time.monotonic()
        if self.idle or self.busy():
            self.moved = now
        elif now - self.moved > PATIENCE:
            raise ClusterError(f"--engine ray: after {PATIENCE:.0f} s, {self.lacking()}")
        return self.found

    def made(self, slot: Slot, said: Any) -> None:
        if isinstance(said, Exception):
            raise said
        self.found.append((slot.piece.number, said))

    def died(self, slot: Slot, error: Exception) -> None:
        assert slot.answer
        machine = "" if getattr(error, "preempted", False) else slot.answer.node
        self.found.append((slot.piece.number, Died(machine)))


class Worker:
    """An actor of Ray.

    Args:
        folder: the search's, on storage that all machines share.
        cwd: the driver's, from which paths of the configuration may be given.
        threads, device: of torch.
    """

    def __init__(self, folder: Path, cwd: str, threads: int, device: str) -> None:
        self.worker, self.threads, self.device = training.Worker(), threads, device
        self.refused: Exception | None = None
        try:
            os.chdir(cwd)
            if not (folder / FILE).exists():
                raise ClusterError(f"{folder}: is not on storage that this machine shares")
            torch.set_num_threads(threads)
        except EXPECTED as error:
            self.refused = named(error)

    def answer(self) -> Answer:
        return Answer.here(self.threads, self.refused)

    def make(self, piece: training.Begin | training.Finish) -> training.Outcome | Exception:
        """What went wrong with more than a candidate is a value, as Ray wraps exceptions."""
        if isinstance(piece, training.Begin):
            piece = piece._replace(config=self._placed(piece.config))
        try:
            found = self.worker.make(piece)
            return found._replace(error=named(found.error)) if found.error else found
        except Stopped:  # by a signal: as good as dead
            os._exit(1)
        except EXPECTED as error:
            return named(error)

    def _placed(self, config: Config) -> Config:
        """With the threads that this process has a place for, which read images on a CPU, too."""
        of_run = {"threads": self.threads, "device": self.device}
        of_data = {"workers": 0} if self.device == "cpu" else {}
        return config.model_copy(
            update={
                "run": config.run.model_copy(update=of_run),
                "data": config.data.model_copy(update=of_data),
            }
        )
