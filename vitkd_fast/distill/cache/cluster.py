"""A cache made by the processes of a Ray cluster: each piece is a shard, as the plan has it."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ... import _cluster
from ..._cluster import ClusterError, Share
from ..._extras import require
from ..config import Config, ConfigError
from ..runtime import Runtime
from . import quarantine
from .build import Made, Maker, Options, begin, held, lacking
from .plan import Place
from .read import CachedTeacher
from .store import Store, Where, at
from .worker import Worker


def build(config: Config, folder: Where, options: Options, workers: int | None = None) -> Made:
    """`build.build` by actors of the cluster at RAY_ADDRESS; where it is not set, of this machine.

    Every machine must have the package, and see the images, the weights and the folder, where it is
    no URL, at the same paths.

    Args:
        workers: processes, each of run.threads CPUs (1, where it is not set); None: as many as the
            cluster has CPUs for, but one, or GPUs.

    Raises:
        ImportError: Ray is not installed.
        CacheError: as `build.build`; a machine comes to another plan.
        ClusterError: processes keep dying; nothing has moved for ten minutes.
        OSError: of any process, such as a full disk.
    """
    require("ray", "vitkd cache --engine ray")
    if dist.is_torchelastic_launched():
        raise ConfigError("--engine: ray starts its processes itself, without torchrun")
    runtime, store = Runtime.of(config), at(folder).absolute()
    maker = Maker(config, runtime, options)
    with held(store, runtime):
        begin(maker, store)
        todo, bad = lacking(store, maker.plan, maker.plan.places())
        count = maker.plan.epochs * maker.plan.shards
        if todo:
            threads = config.run.threads or 1
            with _cluster.connected() as ray:
                taken = share(runtime.device.type, threads, workers, ray.cluster_resources())
                try:
                    _cluster.Driver(ray, _Shards(maker, store, options), todo, taken).run()
                finally:
                    store.clear()
        for index, name in quarantine.read(store).items():
            print(
                f"{name}: image {index} is left out, see {store.name(quarantine.FILE)}", flush=True
            )
        CachedTeacher(store)  # complete
    return Made(maker.plan, count - len(todo), len(todo), bad)


def share(
    device: str, threads: int, workers: int | None, cluster: dict[str, float], spare: int = 1
) -> Share:
    """Of CPUs but those that the driver is spared, or of GPUs.

    Raises ClusterError where there is no such device.
    """
    if device != "cuda":
        return _cluster.of_cpus(cluster, threads, workers, spare)
    if not (gpus := cluster.get("GPU", 0)):
        raise ClusterError("--engine ray: the cluster has no GPU, and run.device is cuda")
    workers = workers or int(gpus)
    return Share(workers, {"num_cpus": threads, "num_gpus": min(1.0, gpus / workers)})


class _Shards:
    """The shards of a cache, as a `_cluster.Job`."""

    pieces = "shards"
    worker: Any = Worker

    def __init__(self, maker: Maker, store: Store, options: Options) -> None:
        self.maker, self.store = maker, store
        threads = maker.config.run.threads or 1
        self.given = (maker.config, options, maker.plan, str(store), os.getcwd(), threads)

    def called(self, piece: Place) -> str:
        return self.store.name(piece.file)

    def path(self, piece: Place) -> Path | None:
        return self.store.shared and self.store.shared / piece.file

    def images(self, piece: Place) -> int:
        return len(self.maker.plan.rows_of(piece))

    def name(self, image: int) -> str:
        return self.maker.source.name(image)

    def left_out(self) -> Collection[int]:
        return quarantine.read(self.store)

    def leave_out(self, image: int) -> Collection[int]:
        return quarantine.add(self.store, image, self.name(image))
