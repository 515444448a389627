"""Making a cache, and asking the teacher again: one shard after another, by any number of ranks.

Shard i of the plan is of rank i modulo their number, in the fixed batches of the plan: its bytes do
not depend on ranks, workers, or on where an interrupted run went on. What is there and sound stays.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import yaml
from torch import Tensor

from ...taps import TapOutputs, Taps, transformer_blocks
from .. import augment, data, preflight, sources
from .. import config as configuration
from ..config import Config, ConfigError
from ..runtime import Runtime
from ..task import frozen
from . import quarantine, shards
from .plan import FILE, Place, Plan
from .read import CachedTeacher, checksum
from .shared import of_teacher, sections
from .store import CacheError, Store, Where, at

_SAY_EVERY = 10.0  # seconds
_F16 = 65504.0


class Options(NamedTuple):
    """What a cache keeps of the teacher."""

    epochs: int
    topk: int | None = None  # None: every class
    features: Sequence[str] = ()  # "pooled", "patch:BLOCK"
    feature_dtype: str = "float16"  # or int8
    temperatures: Sequence[float] = ()  # of log-sum-exps; (): losses.kd's


class Maker:
    """A teacher on a run's device, and the plan of what is kept of it.

    Raises:
        ConfigError, DataError, ValueError: the configuration has no such teacher, images or
            features.
    """

    def __init__(self, config: Config, runtime: Runtime, options: Options) -> None:
        if why := config.why_uncached():
            raise ConfigError(why)
        if not config.all_teachers():
            raise ConfigError("teacher.model: missing, and a cache is of a teacher")
        # which is asked here, also where runs of this configuration do not
        teacher = next(iter(config.all_teachers().values())).model_copy(update={"cache": ""})
        config = config.model_copy(update={"teacher": teacher, "teachers": []})
        self.config, self.runtime = config, runtime
        splits = sources.open_data(config.data, config.student.options.get("num_classes"))
        self.source, shared = splits.train, sections(config, splits)
        [model] = preflight.create_teachers(config, splits.classes)
        preflight.check_image("teacher", config, model)
        predictor = frozen(model, runtime)
        blocks = len(transformer_blocks(model))
        self.features = {_feature(name, blocks): name for name in options.features}
        tokens = [int(name[6:]) for name in self.features if name != "pooled"]
        self.taps = Taps(predictor[1], pooled="pooled" in self.features, tokens=tokens)
        self.taps.model = predictor
        size = config.data.image_size
        blank = self.ask(torch.zeros(1, 3, size, size, dtype=torch.uint8))
        shapes = {name: list(_of(blank, name).shape[1:]) for name in self.features}
        classes, kd = blank.logits.shape[1], config.losses.kd
        topk = classes if options.topk is None else options.topk
        if not 1 <= topk <= classes:
            raise ValueError(f"--topk: expected 1 to {classes} classes, got {topk}")
        own = kd.temperature if kd and isinstance(kd.temperature, (int, float)) else 1.0
        self.plan = Plan(
            teacher={"name": config.teacher.model}
            | {key: value for key, value in of_teacher(model).items() if value is not None},
            data=shared["data"],
            augmentation=shared["augmentation"],
            versions=shared["versions"],
            record={
                "topk": topk,
                "classes": classes,
                "shift": "none" if config.data.labels else "largest",
                "temperatures": [float(t) for t in options.temperatures or (own,)],
                "features": shapes,
                "feature_dtype": options.feature_dtype,
                "grid": list(self.taps.grid) if self.taps.grid else None,
                "blocks": blocks,
            },
            computed={
                "device": runtime.device.type,
                "dtype": str(runtime.teacher_dtype).removeprefix("torch."),
                "channels_last": config.run.channels_last,
                "torch": torch.__version__,
            },
            images=len(self.source),
            epochs=options.epochs,
            seed=config.run.seeds[0],
            batch_size=min(config.data.batch_size, len(self.source)),
        )
        self.drawn = data.Drawn(self.plan.seed, self.plan.epochs)
        self.transform = augment.Augment(config.data, config.augmentation)
        self.left_out: Collection[int] = ()  # images that nobody may read

    @torch.inference_mode()
    def ask(self, images: Tensor) -> TapOutputs:
        return self.taps(images.to(self.runtime.device))

    def batches(self, keys: Iterable[list[tuple[int, int]]]) -> Iterator[data.Batch]:
        """Of (epoch, index) keys, as a run of this plan augments them."""
        keys = ([key for key in batch if key[1] not in self.left_out] for batch in keys)
        return data.of_keys(self.source, self.transform, self.config.data, self.drawn, keys)

    def keys(self, place: Place) -> Iterator[list[tuple[int, int]]]:
        """Of a shard, batch by batch."""
        rows, size = self.plan.rows_of(place), self.plan.batch_size
        for i in range(0, len(rows), size):
            yield [(place.epoch, index) for index in rows[i : i + size]]

    def make(self, places: Sequence[Place]) -> Iterator[tuple[Place, dict[str, Any]]]:
        """The columns of each shard; the images of all are read in one stream."""
        # an iterator: the keys of all epochs would not fit
        batches = self.batches(itertools.chain.from_iterable(map(self.keys, places)))
        for place in places:
            rows = self.plan.rows_of(place)
            columns = {
                name: np.zeros((len(rows), *column.shape), column.dtype)
                for name, column in self.plan.columns.items()
            }
            columns["log_sum_exp"][:] = np.nan  # until an image is read
            for _ in self.keys(place):
                batch = next(batches)
                if len(batch.indices):
                    where = batch.indices.numpy() - rows.start
                    for name, x in self.columns(batch).items():
                        columns[name][where] = x
            yield place, columns

    def columns(self, batch: data.Batch) -> dict[str, np.ndarray[Any, Any]]:
        """What is kept of a batch, row by row."""
        record, said = self.plan.record, self.ask(batch.images)
        logits = said.logits.float()
        largest = logits.amax(1, keepdim=True)
        if (bad := ~largest.isfinite().flatten() | logits.isnan().any(1)).any():
            name = self.source.name(int(batch.indices[int(bad.nonzero()[0])]))
            raise ValueError(f"teacher: its logits are NaN or Inf for {name}")
        if record["shift"] == "largest":
            logits = logits - largest
        sums = [(logits / t).logsumexp(1) for t in record["temperatures"]]
        found = {"log_sum_exp": torch.stack(sums, 1), "values": logits}
        if record["topk"] < record["classes"]:
            # stable: equal logits in the order of their classes
            order = logits.sort(stable=True, dim=1, descending=True)
            found["values"], found["indices"] = (x[:, : record["topk"]] for x in order)
        found["values"] = _half(found["values"])
        for name in self.features:
            x = _of(said, name).float()
            if not x.isfinite().all():
                raise ValueError(f"teacher: its {name} features are NaN or Inf")
            if record["feature_dtype"] == "int8":
                scale = x.abs().amax(-1) / 127
                found[f"{name}.scale"] = scale
                x = (x / scale.clamp_min(1e-30).unsqueeze(-1)).round()
            else:
                x = _half(x)
            found[name] = x
        columns = {
            name: x.cpu().numpy().astype(self.plan.columns[name].dtype) for name, x in found.items()
        }
        columns["pixels"] = np.array([checksum(x) for x in batch.images], "<u4")
        return columns


def _half(x: Tensor) -> Tensor:
    """float16; what is finite stays so."""
    return torch.where(x.isfinite(), x.clamp(-_F16, _F16), x).half()


def _feature(name: str, blocks: int) -> str:
    """The column of "pooled" or "patch:BLOCK"."""
    kind, _, block = name.partition(":")
    if name == "pooled":
        return name
    if kind != "patch" or not block.removeprefix("-").isdecimal():
        raise ValueError(f"--features: expected pooled or patch:BLOCK, got {name}")
    if not -blocks <= int(block) < blocks:
        raise ValueError(f"--features: expected a block from {-blocks} to {blocks - 1}, got {name}")
    return f"patch.{int(block) % blocks}"


def _of(said: TapOutputs, name: str) -> Tensor:
    """[B, features], or patches, [B, N, C]."""
    if name == "pooled":
        assert said.pooled is not None
        return said.pooled.flatten(1)
    return said.patches(int(name.removeprefix("patch.")))


class Made(NamedTuple):
    """What `build` found and did."""

    plan: Plan
    kept: int  # shards that were there
    made: int  # by this rank
    bad: list[str]  # shards that were damaged, and what was wrong with each


def build(config: Config, folder: Where, options: Options, thorough: bool = False) -> Made:
    """Makes what is missing of a cache, or damaged; under torchrun every process calls this.

    Args:
        folder: a path, or the URL of a store.
        thorough: compare the checksums of shards that are in a bucket, too, whose every byte is
            fetched for that.

    Raises:
        ConfigError, DataError, ValueError: as `Maker`.
        CacheError: the folder holds a cache of another plan, or is in use.
        OSError: such as a full disk; what is complete by then stays, and the next call goes on.
    """
    store, runtime = at(folder), Runtime.of(config)
    try:
        return _build(Maker(config, runtime, options), store, thorough)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _build(maker: Maker, folder: Store, thorough: bool) -> Made:
    plan, runtime = maker.plan, maker.runtime
    with held(folder, runtime):
        if runtime.rank == 0:
            begin(maker, folder)
        if runtime.ranks > 1:
            dist.barrier()
        check_plan(folder, plan)
        mine = [x for i, x in enumerate(plan.places()) if i % runtime.ranks == runtime.rank]
        maker.left_out = quarantine.read(folder)
        todo, bad = lacking(folder, plan, mine, thorough)
        start = said = time.monotonic()
        for i, (place, columns) in enumerate(maker.make(todo), 1):
            shards.commit(folder, plan, place, columns)
            now = time.monotonic()
            if runtime.rank == 0 and (now - said > _SAY_EVERY):
                images = sum(len(plan.rows_of(x)) for x in todo[:i])
                print(
                    f"{i} of {len(todo)} shards of this process, {images / (now - start):,.0f} "
                    "images/s",
                    flush=True,
                )
                said = now
        if runtime.ranks > 1:
            dist.barrier()
        CachedTeacher(folder)  # complete
    return Made(plan, len(mine) - len(todo), len(todo), bad)


def lacking(
    store: Store, plan: Plan, places: Iterable[Place], thorough: bool = False
) -> tuple[list[Place], list[str]]:
    """Of these shards those to make, and what is wrong with the damaged ones among them."""
    places, faults = list(places), shards.lengths(store, plan)
    if store.shared or thorough:
        faults |= {x: shards.fault(store, plan, x) for x in places if x not in faults}
    todo = [place for place in places if faults.get(place)]
    bad = [f"{store.name(x.file)}: {faults[x]}" for x in todo if faults[x] != "is missing"]
    for line in bad:
        print(f"{line}; it is made again", flush=True)
    return todo, bad


@contextmanager
def held(store: Store, runtime: Runtime) -> Iterator[None]:
    """Keeps other runs out of a folder."""
    with store.locked() if runtime.rank == 0 else nullcontext():
        yield


def begin(maker: Maker, store: Store) -> None:
    """Writes the plan where there is none, and the configuration, whose paths may have moved."""
    if FILE not in (there := store.sizes()):
        if there:
            raise CacheError(f"-o: {store} is no cache, and holds {next(iter(there))}")
        if (free := store.free()) is not None and free < maker.plan.bytes:
            raise CacheError(
                f"-o: {store} has {free >> 20:,} MiB left, and the cache takes "
                f"{maker.plan.bytes >> 20:,} MiB"
            )
        maker.plan.write(store)
    check_plan(store, maker.plan)
    if store.create(FILE, store.read(FILE)):
        raise CacheError(
            f"-o: {store}: its server replaces a file that a put should only create: it does not "
            "know If-None-Match or ifGenerationMatch, and two processes could mix their shards"
        )
    store.clear()
    text = yaml.safe_dump(maker.config.model_dump(), sort_keys=False)
    store.replace("config.yaml", text.encode())


def check_plan(folder: Where, plan: Plan) -> None:
    """Raises CacheError, naming each key, unless the folder's cache has this plan."""
    begun = Plan.read(folder)
    if begun.fingerprint != plan.fingerprint:
        raise CacheError(f"-o: {folder} holds another cache: {'; '.join(begun.differences(plan))}")


class Findings(NamedTuple):
    """What `verify` found."""

    plan: Plan
    bad: list[str]  # shards, and what is wrong with each
    asked: int  # images that the teacher was asked about again
    equal: int  # of them, bit by bit
    pixels: list[str]  # images that are others now
    distance: float  # the largest, of probabilities and features
    allowed: float


def reopen(folder: Where, overrides: Sequence[str] = ()) -> tuple[Config, Options]:
    """Of what a cache was made, with `key=value` put over it, such as data that moved."""
    store = at(folder)
    plan = Plan.read(store)
    with store.local("config.yaml") as path:
        config = configuration.load(path, overrides)
    record = plan.record
    names = [name.replace(".", ":") for name in record["features"]]
    return config, Options(
        plan.epochs, record["topk"], names, record["feature_dtype"], record["temperatures"]
    )


def verify(
    folder: Where, overrides: Sequence[str] = (), samples: int = 64, seed: int | None = None
) -> Findings:
    """Compares the checksum of every shard, and asks the teacher about random images again.

    Raises:
        CacheError: there is no cache, or the teacher, the images or the libraries are others.
    """
    folder = at(folder)
    plan = Plan.read(folder)
    faults = {place: shards.fault(folder, plan, place) for place in plan.places()}
    bad = [f"{folder.name(place.file)}: {why}" for place, why in faults.items() if why]
    config, options = reopen(folder, overrides)
    maker = Maker(config, Runtime.of(config), options)
    check_plan(folder, maker.plan)
    maker.left_out = quarantine.read(folder)
    draw = random.Random(seed)
    sound = [place for place, why in faults.items() if not why]
    places = sorted(draw.choices(sound, k=samples if sound else 0))
    chosen = [(place, draw.choice(plan.rows_of(place))) for place in places]
    equal, pixels, distance = 0, [], 0.0
    keys = [[(place.epoch, index)] for place, index in chosen]
    for (place, index), batch in zip(chosen, maker.batches(keys), strict=True):
        row = index - plan.rows_of(place).start
        stored = {name: x[row] for name, x in shards.opened(folder, plan, place, True).items()}
        if not len(batch.indices):
            same = bool(np.isnan(stored["log_sum_exp"]).all())
            equal += same
            pixels += [] if same else [maker.source.name(index)]
            continue
        now = {name: x[0] for name, x in maker.columns(batch).items()}
        if now["pixels"] != stored["pixels"]:
            pixels.append(maker.source.name(index))
            continue
        equal += all(np.array_equal(now[name], x) for name, x in stored.items())
        distance = max(distance, _distance(now, stored, plan))
    half = plan.computed["dtype"] != "float32"
    return Findings(plan, bad, len(chosen), equal, pixels, distance, 0.05 if half else 0.01)


def _distance(now: dict[str, Any], stored: dict[str, Any], plan: Plan) -> float:
    """The largest of: half the sum of |p - q| over the classes that were kept, at the first
    temperature; and each feature's |x - y| / |y|."""
    classes, t = plan.record["classes"], plan.record["temperatures"][0]
    p, q = np.zeros(classes), np.zeros(classes)
    for x, row in ((p, now), (q, stored)):
        indices = row.get("indices", slice(None))
        x[indices] = np.exp(row["values"].astype(np.float64) / t - row["log_sum_exp"][0])
    found = [np.abs(p - q).sum() / 2]
    for name in plan.record["features"]:
        x, y = (
            row[name] * row.get(f"{name}.scale", np.ones(1))[..., None] for row in (now, stored)
        )
        found.append(np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-30))
    return float(max(found))
