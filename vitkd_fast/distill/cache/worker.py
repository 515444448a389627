"""A process of a cluster that holds the teacher and makes one shard of a cache at a time."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..._cluster import EXPECTED, Answer, Noting, named
from ..config import Config
from ..datasets import Source
from ..runtime import Runtime
from . import shards
from .build import Maker, Options, check_plan
from .plan import Place, Plan
from .store import CacheError, at


class Noted:
    """A source that notes what it reads."""

    def __init__(self, source: Source) -> None:
        self.source, self.notes = source, Noting()
        self.classes = source.classes

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        return self.source.name(index)

    def read(self, index: int) -> tuple[Any, Any]:
        with self.notes.reading(index):
            return self.source.read(index)


class Worker:
    """An actor of Ray, which is told nothing but an epoch and a shard.

    Args:
        config, options, plan: the driver's; this process must come to the same plan.
        folder: the cache: an absolute path on storage that all machines share, or a URL.
        cwd: the driver's, from which paths of the configuration may be given.
        threads: of torch.
    """

    def __init__(
        self, config: Config, options: Options, plan: Plan, folder: str, cwd: str, threads: int
    ) -> None:
        self.refused: Exception | None = None
        try:
            self.folder = at(folder)
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
            check_plan(self.folder, plan)
            self.noted = self.maker.source = Noted(self.maker.source)
        except EXPECTED as error:
            self.refused = named(error)

    def answer(self) -> Answer:
        return Answer.here(torch.get_num_threads(), self.refused)

    def make(self, place: Place, left_out: Collection[int], note: Path) -> Exception | None:
        """Computes and commits a shard; what went wrong is a value, as Ray wraps exceptions."""
        try:
            self.noted.notes.begin(note)
            self.maker.left_out = left_out
            for _, columns in self.maker.make([place]):
                shards.commit(self.folder, self.maker.plan, place, columns)
        except EXPECTED as error:
            return named(error)
        finally:
            self.noted.notes.end()
        return None
