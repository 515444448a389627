"""A process of a cluster that holds the teacher and makes one shard of a cache at a time.

It leaves a note beside the shard of the image that it is reading, so that whoever finds it dead
knows of which image it died: 16 bytes, (steps taken, index or -1), overwritten in place, which
costs microseconds an image.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..config import Config
from ..datasets import Source
from ..runtime import Runtime
from . import shards
from .build import Maker, Options, check_plan
from .plan import CacheError, Place, Plan

_NOTE = struct.Struct("<qq")
# what the driver raises instead of retrying; a note or a shard on a full disk is among them
_EXPECTED = (ValueError, OSError, RuntimeError, ImportError)


class Note(NamedTuple):
    """What a process was doing when it last wrote."""

    steps: int = 0  # 0: it had not begun
    image: int = -1  # being read; -1: none

    @classmethod
    def read(cls, path: Path) -> Note:
        return cls(*_NOTE.unpack(path.read_bytes()))

    def write(self, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(_NOTE.pack(*self))


class Noted:
    """A source that notes what it reads, in a file that is there."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.classes = source.classes
        self._file, self._steps = -1, 0

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        return self.source.name(index)

    def read(self, index: int) -> tuple[Any, Any]:
        self._write(index)
        try:
            return self.source.read(index)
        finally:
            self._write(-1)

    def begin(self, path: Path) -> None:
        """Notes go to this file from now on."""
        self.end()
        self._file = os.open(path, os.O_WRONLY)
        self._steps = 0
        self._write(-1)

    def end(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

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


class Worker:
    """An actor of Ray, which is told nothing but an epoch and a shard.

    Args:
        config, options, plan: the driver's; this process must come to the same plan.
        folder: the cache, an absolute path on storage that all machines share.
        cwd: the driver's, from which paths of the configuration may be given.
        threads: of torch.
    """

    def __init__(
        self, config: Config, options: Options, plan: Plan, folder: Path, cwd: str, threads: int
    ) -> None:
        self.folder = folder
        self.refused: Exception | None = None
        try:
            os.chdir(cwd)
            of_run = {"threads": threads, "device": plan.computed["device"]}
            # processes are what reads in parallel: one that dies of an image must be this one
            config = config.model_copy(
                update={
                    "run": config.run.model_copy(update=of_run),
                    "data": config.data.model_copy(update={"workers": 0}),
                }
            )
            self.maker = Maker(config, Runtime.of(config), options)
            # the driver's, should the rule for the size of a shard be another one here
            self.maker.plan = replace(self.maker.plan, rows=plan.rows)
            if others := plan.differences(self.maker.plan):
                raise CacheError(f"the driver has another plan: {'; '.join(others)}")
            check_plan(folder, plan)
            self.noted = self.maker.source = Noted(self.maker.source)
        except _EXPECTED as error:
            self.refused = _named(error)

    def answer(self) -> Answer:
        import ray

        node = ray.get_runtime_context().get_node_id()
        return Answer(node, os.getpid(), torch.get_num_threads(), self.refused)

    def make(self, place: Place, left_out: Collection[int], note: Path) -> Exception | None:
        """Computes and commits a shard; what went wrong is a value, as Ray wraps exceptions."""
        try:
            self.noted.begin(note)
            self.maker.left_out = left_out
            for _, columns in self.maker.make([place]):
                shards.commit(self.folder, self.maker.plan, place, columns)
        except _EXPECTED as error:
            return _named(error)
        finally:
            self.noted.end()
        return None


def _named(error: Exception) -> Exception:
    """The error, and on which machine it was raised."""
    where = f"on {os.uname().nodename}, process {os.getpid()}"
    if isinstance(error, OSError) and error.errno is not None:
        return type(error)(error.errno, f"{error.strerror} ({where})", error.filename)
    # of another class only if it can be made from a message
    kind = type(error) if isinstance(error, ValueError) else RuntimeError
    with suppress(TypeError):
        return kind(f"{error} ({where})")
    return RuntimeError(f"{error} ({where})")
