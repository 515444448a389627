"""A candidate's training: its trunk and cooldowns, and the teacher that all candidates share."""

from __future__ import annotations

import functools
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from .. import int8, models
from ..distill import config as configuration
from ..distill import data, experiment, preflight, quantized, sources
from ..distill.cache import build
from ..distill.cache.read import CachedTeacher
from ..distill.cache.store import CacheError
from ..distill.config import Config, Teacher
from ..distill.loop import NonFiniteError, Trainer
from ..distill.runtime import Runtime
from ..distill.task import DistillationTask
from .flash import COOLDOWN, Branch, branches

FAILURES = (ValueError, NonFiniteError)  # of a candidate; other errors are of the whole search
_IMAGES = 8  # that an untrained student is quantized on


class Lesson:
    """The recipe's teacher, trained once, and its cache at each resolution, made once.

    Where the recipe's images or losses allow no cache, the teacher is asked in every step.
    """

    def __init__(self, recipe: Config, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        self.teachers: list[Teacher] | None = None
        self.notes: list[str] = []

    def given(self, config: Config) -> Config:
        """A candidate's configuration with the teacher, and the cache, that all share."""
        recipe = self.recipe
        if not config.all_teachers() or recipe.teacher.cache:
            return config
        if self.teachers is None:
            self.teachers = list(recipe.all_teachers().values())
            if any(x.epochs for x in self.teachers):
                run = recipe.run.model_copy(update={"folder": str(self.folder / "teachers")})
                own = recipe.model_copy(update={"run": run})
                self.teachers = experiment.trained_teachers(own)
        size = config.data.image_size
        # of another resolution, the teacher reads images of its own
        own_size = None if size == recipe.data.image_size else recipe.data.image_size
        found = [
            x.model_copy(update={"image_size": x.image_size or own_size}) for x in self.teachers
        ]
        tree = config.model_dump()
        tree |= {"teacher": [x.model_dump() for x in found], "teachers": []}
        taught = configuration.validate(tree)
        if why := taught.why_uncached() or self._lacking(taught):
            note = f"No cache of the teacher: {why}"
            self.notes += [] if note in self.notes else [note]
            return taught
        tree = taught.model_dump()
        tree["teacher"]["cache"] = str(self._cache(taught))
        return configuration.validate(tree)

    def _wanted(self, config: Config) -> list[dict[str, Any]]:
        """What the losses tap of the teacher."""
        return [dict(term.taps()[1]) for _, term in config.losses.terms() if term.distils]

    def _lacking(self, config: Config) -> str:
        wanted = self._wanted(config)
        if any(spec.get("maps") or spec.get("attention") for spec in wanted):
            return "a loss compares maps, queries or keys, which no cache holds"
        return ""

    def _cache(self, config: Config) -> Path:
        """Of this resolution and these features; complete."""
        features = sorted(
            {"pooled" for spec in self._wanted(config) if spec.get("pooled")}
            | {f"patch:{i}" for spec in self._wanted(config) for i in spec.get("tokens", ())}
        )
        named = "-".join([str(config.data.image_size), *(x.replace(":", "") for x in features)])
        folder = (self.folder / f"cache-{named}").absolute()
        try:
            CachedTeacher(folder)
        except (CacheError, FileNotFoundError):
            build.build(config, folder, build.Options(config.run.epochs, features=features))
        return folder


def quantize(config: Config) -> int8.QuantizedModel:
    """A candidate's untrained student in int8, on a few images: as good as its cost needs."""
    splits = sources.open_data(config.data, config.student.options.get("num_classes"))
    data.seed_all(config.run.seeds[0])
    student = preflight.create_student(config, splits.classes)
    return quantized.quantize(
        student,
        quantized.images(config, splits.train, _IMAGES),
        pixels=preflight.pixels(config, student),
        classes=splits.classes,
        multilabel=bool(config.data.labels),
        calibration="minmax",
    )


class Training:
    """A candidate in training, in a folder of its own; every part of it is a run of the loop.

    Attributes:
        total: the steps of a whole run.
        seconds: CPU time that this process has spent on it.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.seconds, self.seed = 0.0, config.run.seeds[0]
        self.splits = sources.open_data(config.data, config.student.options.get("num_classes"))
        data.seed_all(self.seed)
        cache, _ = preflight.open_cache(config, self.splits)
        distils = any(term.distils for _, term in config.losses.terms())
        teachers: list[nn.Module] = []
        if distils and not cache:
            teachers = preflight.create_teachers(config, self.splits.classes)
        data.seed_all(self.seed)
        student = preflight.create_student(config, self.splits.classes)
        preflight.check_losses(config, student, teachers, cache)
        self.save = functools.partial(
            models.save,
            name=config.student.model,
            options=config.student.options,
            num_classes=len(self.splits.classes),
            pixels=preflight.pixels(config, student),
            classes=tuple(self.splits.classes),
            multilabel=bool(config.data.labels),
        )
        runtime = Runtime.of(config)
        self.task = DistillationTask.create(config, student, teachers, runtime, cache)
        self.total = self._trainer("trunk", {}, {}).total

    def score(self, branch: Branch) -> float:
        """Of the trunk at its step `begin`, cooled down until `end`: accuracy, or mAP of labels."""
        begun = time.process_time()
        trunk = self._trainer(
            "trunk", {"max_steps": branch.begin, "eval_every": 0}, {"schedule": "constant"}
        )
        trunk.restore()
        if trunk.step < branch.begin:
            trunk.run()
        name = f"step-{branch.end}"
        cooled = self._trainer(
            name,
            {"max_steps": branch.end, "eval_every": self.config.run.epochs},
            {"schedule": "wsd", "cooldown": (branch.end - branch.begin) / branch.end},
        )
        if not cooled.path.exists():
            shutil.copyfile(trunk.path, cooled.path)
        cooled.restore()
        cooled.run()
        self.seconds += time.process_time() - begun
        return cooled.best

    def whole(self) -> Branch:
        """The full training."""
        return Branch(self.total - max(round(COOLDOWN * self.total), 1), self.total)

    def tidy(self) -> None:
        """Removes what is not of the student that was trained in full."""
        for part in self.folder.iterdir():
            if part.name != f"step-{self.total}":
                shutil.rmtree(part)
        for file in self.folder.glob("*/checkpoint.safetensors"):
            file.unlink()

    def _trainer(self, name: str, run: dict[str, Any], optimizer: dict[str, Any]) -> Trainer:
        # without validation, which refuses an eval_every of 0: never
        config = self.config.model_copy(
            update={
                "run": self.config.run.model_copy(update=run),
                "optimizer": self.config.optimizer.model_copy(update=optimizer),
            }
        )
        return Trainer(
            config,
            self.task,
            self.splits,
            self.folder / name,
            seed=self.seed,
            save_model=self.save,
        )


class Begin(NamedTuple):
    """Asks for the scores of a candidate's first steps.

    Attributes:
        number: of the trial.
        folder: of the trial, which is made.
        share: of the steps, after which it is judged; 0: it is not.
    """

    number: int
    config: Config
    folder: Path
    share: float


class Finish(NamedTuple):
    """Asks for the full training of the candidate that was begun, or for none of it."""

    number: int
    whole: bool


class Outcome(NamedTuple):
    """What a candidate's training has come to.

    Attributes:
        total: the steps of a whole run.
        seconds: CPU time so far.
        early: the steps of annealed runs, and their scores.
        accuracy: of the full training.
        error: one of `FAILURES`, which ended it.
    """

    total: int = 0
    seconds: float = 0.0
    early: tuple[tuple[int, float], ...] = ()
    accuracy: float | None = None
    error: Exception | None = None


class Worker:
    """Trains candidates, one after another, each in two parts, as it is told."""

    training: Training | None = None

    def make(self, piece: Begin | Finish) -> Outcome:
        found = Outcome()
        try:
            if isinstance(piece, Begin):
                self.training = None  # what a failure left
                self.training = Training(piece.config, piece.folder)
                found = found._replace(early=self._early(self.training, piece.share))
            elif piece.whole:
                assert self.training
                found = found._replace(accuracy=self.training.score(self.training.whole()))
        except FAILURES as error:
            found = found._replace(error=error)
        if not (run := self.training):
            return found
        if found.error or isinstance(piece, Finish):
            run.tidy()
            self.training = None
        return found._replace(total=run.total, seconds=run.seconds)

    def _early(self, run: Training, share: float) -> tuple[tuple[int, float], ...]:
        parts = branches(run.total, share) if share else []
        return tuple((part.end, run.score(part)) for part in parts)
