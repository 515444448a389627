"""Trials: a candidate trained on one split and scored on what the split left out.

Of each trial one small file is kept, under a name that says of what it is: the configuration, the
images, the teacher's weights, and how splits are drawn. So a selection that was interrupted goes
on, and one with more candidates, or values, trains only what is new.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sklearn.model_selection import ShuffleSplit, StratifiedShuffleSplit

from .._files import replacing
from ..distill import data, logger, preflight, sources
from ..distill.augment import draw
from ..distill.cache import build
from ..distill.cache.shared import weights
from ..distill.config import Config, ConfigError
from ..distill.datasets import Part, Share
from ..distill.evaluate import headline
from ..distill.loop import Trainer
from ..distill.prepared import Prepared
from ..distill.runtime import Runtime
from ..distill.task import DistillationTask
from ..images import DataError

_FEATURES = {"pooled", "tokens"}  # what a cache holds of those that a loss may tap


class Splitter(NamedTuple):
    """Draws splits: number i is a function of (seed, i)."""

    share: float  # of the images, which the others are tested on
    seed: int

    def split(self, splits: sources.Splits, number: int) -> sources.Splits:
        """The training images in two parts, each class by the same share where each has one.

        Raises:
            DataError: a class, or a part, is too small.
        """
        pool = splits.train
        labels = sources.labels(pool)
        of_one = labels is not None and len(labels) == len(pool)
        kind = StratifiedShuffleSplit if of_one else ShuffleSplit
        draws = kind(1, test_size=self.share, random_state=draw(self.seed, number) % 2**32)
        try:
            [(train, test)] = draws.split(np.zeros(len(pool)), labels if of_one else None)
        except ValueError as error:
            raise DataError(f"--share: {self.share} of {len(pool)} images: {error}") from error
        parts = Share(pool, sorted(map(int, train))), Part(pool, sorted(map(int, test)))
        return splits._replace(train=parts[0], val=parts[1])


class Variant:
    """A configuration that is trained on splits, all of whose trials share data and teacher."""

    def __init__(
        self, name: str, config: Config, runtime: Runtime, splitter: Splitter, folder: Path
    ) -> None:
        """Checks data, models and losses before any training.

        Raises:
            ConfigError, DataError, CacheError: what cannot be run.
        """
        self.title = re.sub(r"[^\w.-]", "_", name)
        self.runtime, self.splitter = runtime, splitter
        self.prepared = Prepared(config, runtime, resume=False)
        self.config = self.prepared.config
        if sources.streams(self.prepared.splits.train):
            raise DataError("data.dataset: it streams, and splits are of images with an index")
        self.folder = folder / self._digest()

    def _digest(self) -> str:
        """Of all that a score depends on."""
        paths = {"data": {"root", "train", "val", "workers"}, "teacher": {"cache"}}
        paths["run"] = {"folder", "seeds", "device", "log_every"}
        about = self.config.model_dump(exclude=paths)
        prepared = self.prepared
        about |= {"images": prepared.fingerprint, "splits": self.splitter._asdict()}
        about["teachers"] = [weights(x) for x in prepared.teachers]
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]

    def known(self, number: int) -> dict[str, Any] | None:
        """The result of a trial that is done."""
        file = self.folder / f"{number:03}.json"
        return json.loads(file.read_text()) if file.exists() else None

    def score(self, number: int) -> dict[str, Any]:
        """Trains on a split, unless that is done, and scores the trained weights.

        Returns:
            metric, score, seconds.

        Raises:
            NonFiniteError, Stopped: as `Trainer.run`.
        """
        if found := self.known(number):
            return found
        prepared, start = self.prepared, time.monotonic()
        splits = self.splitter.split(prepared.splits, number)
        seed = draw(self.splitter.seed, number) >> 1
        data.seed_all(seed)
        student = preflight.create_student(self.config, prepared.classes)
        trainer = Trainer(
            self.config,
            DistillationTask.create(
                self.config, student, prepared.teachers, self.runtime, prepared.cache
            ),
            splits,
            self.folder / f"{self.title}-{number:03}",
            seed=seed,
            save_model=lambda *_: None,
        )
        trainer.restore()
        trainer.run()
        row = [x for x in logger.read(trainer.folder) if x["kind"] == "val"][-1]
        metric = headline(row)
        found = {"metric": metric, "score": row[metric], "seconds": time.monotonic() - start}
        with replacing(self.folder / f"{number:03}.json") as part:
            part.write_text(json.dumps(found))
        shutil.rmtree(trainer.folder)
        return found


def with_caches(configs: Sequence[Config], folder: Path) -> list[Config]:
    """The configurations, with a cache of each teacher that several trials may share.

    A teacher is asked about all augmented images of a run once, before the first trial. Those that
    cannot be cached, or are, stay as they are.
    """
    groups: dict[str, list[int]] = {}
    for i, config in enumerate(configs):
        teachers = list(config.all_teachers().values())
        if len(teachers) != 1 or teachers[0].cache or config.why_uncached():
            continue
        if _features(config) is not None:
            groups.setdefault(_shared(config), []).append(i)
    found = list(configs)
    for key, members in groups.items():
        epochs = max(configs[i].run.epochs for i in members)
        features = sorted({x for i in members for x in _features(configs[i]) or ()})
        name = hashlib.sha256(f"{key} {epochs} {features}".encode()).hexdigest()[:16]
        path, config = folder / name, configs[members[0]]
        path.mkdir(parents=True, exist_ok=True)
        build.build(config, path, build.Options(epochs, features=features, temperatures=(1.0,)))
        for i in members:
            [teacher] = configs[i].all_teachers().values()
            update = {"teacher": teacher.model_copy(update={"cache": str(path)}), "teachers": []}
            found[i] = configs[i].model_copy(update=update)
    return found


def _features(config: Config) -> set[str] | None:
    """What a cache must hold beside logits; None: what none does."""
    wanted: list[Any] = [term.taps()[1] for _, term in config.losses.terms() if term.distils]
    if any(spec.get(key) for spec in wanted for key in spec.keys() - _FEATURES):
        return None
    pooled = {"pooled" for spec in wanted if spec.get("pooled")}
    return pooled | {f"patch:{block}" for spec in wanted for block in spec.get("tokens", ())}


def _shared(config: Config) -> str:
    """What configurations with one cache have in common."""
    run = {"device", "precision", "channels_last"}
    parts = (config.teacher, config.teachers, config.data, config.augmentation)
    dumped = [x.model_dump() if not isinstance(x, list) else [y.model_dump() for y in x]
              for x in parts]  # fmt: skip
    dumped.append(config.run.model_dump(include=run))
    return json.dumps(dumped, sort_keys=True)


def trial_config(config: Config, folder: Path) -> Config:
    """One training, which is scored at its end."""
    run = {"folder": str(folder), "eval_every": config.run.epochs, "log_every": 2**31}
    return config.model_copy(update={"run": config.run.model_copy(update=run)})


def same_pool(variants: Iterable[Variant]) -> None:
    """ConfigError where variants are not of the same images."""
    first, *others = variants
    if any(
        x.prepared.fingerprint[key] != first.prepared.fingerprint[key]
        for x in others
        for key in ("classes", "train")
    ):
        raise ConfigError("--candidate: expected the same training images of all")
