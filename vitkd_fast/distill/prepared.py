"""A run before any training: data, models and losses, checked, and the teachers' scores."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from .. import models
from . import branches, data, identity, optim, preflight, probe, sources
from .cache.read import CachedTeacher
from .config import Config, ConfigError, Teacher
from .runtime import Runtime
from .task import Ensemble


class Prepared:
    """What a run is made of; nothing is written."""

    def __init__(self, config: Config, runtime: Runtime, resume: bool) -> None:
        """Checks data, models and losses before any training; writes nothing."""
        self.config, self.runtime, self.resume = config, runtime, resume
        self.folder = Path(config.run.folder)
        self.warnings: list[str] = []
        resumes = preflight.holds_run(config, resume)
        self.splits = sources.open_data(config.data, config.student.options.get("num_classes"))
        if config.data.unlabelled and config.given:
            self.splits = self.splits._replace(classes=preflight.own_classes(config))
        self.classes = self.splits.classes  # none without labels and a student that has them
        self.probe = sources.open_probe(config.data)
        self.scored = self.probe or self.splits  # what models are scored on
        self.fingerprint = identity.fingerprint(self.splits)
        self.cache, notes = preflight.open_cache(config, self.splits)
        if self.cache:
            self.fingerprint["cache"] = self.cache.plan.fingerprint
        if resumes and (begun := self.folder / "data.json").exists():
            identity.check_resumed(json.loads(begun.read_text()), self.fingerprint)
        self.teachers = [] if self.cache else preflight.create_teachers(config, self.classes)
        for (name, section), teacher in self.named_teachers():
            origin, used = models.Origin.of(teacher), preflight.pixels(config, teacher)
            self.warnings += identity.differences(name, origin, used)
            preflight.check_image(name, config, teacher)
            if section.epochs:
                self.warnings += preflight.check_batch(name, config, teacher)
        student = preflight.create_student(config, self.classes)
        self.student = models.Origin.of(student)
        preflight.check_image("student", config, student)
        self.warnings += preflight.check_batch("student", config, student)
        optim.create_optimizer(student, config.optimizer)
        learned = {}
        if not config.given:
            learned = preflight.check_losses(config, student, self.teachers, self.cache)
        if config.branch:
            for group in branches.groups(config.branch, self.classes):
                data.loaders(config, branches.images_of(self.splits, group), 0)
        if config.int8.aware:
            preflight.check_aware(config, student, self.teachers, self.cache, learned)
        data.loaders(config, self.splits, 0, config.optimizer.accumulate)
        self.skipped = set(self.splits.skipped)
        # whose weights become int8, and whose predictions the report shows
        distils = any(term.distils for _, term in config.losses.terms())
        self.role = "distilled" if distils else "baseline"
        self.notes = [*notes, *self.splits.notes, *(self.probe.notes if self.probe else ())]
        self.notes += identity.probed_in_training(self.splits, self.probe)

    def named_teachers(self) -> Iterator[tuple[tuple[str, Teacher], nn.Module]]:
        """Names, sections and models, of those that are models."""
        sections = list(self.config.all_teachers().items())[: len(self.teachers)]
        return zip(sections, self.teachers, strict=True)

    def predictor(self, model: nn.Module) -> nn.Module:
        if isinstance(model, Ensemble):
            return model
        return models.predictor(model).to(self.runtime.device).eval()

    def features(self, model: nn.Module, source: Any) -> probe.Features:
        """Of every image of a source, by a model without a classifier."""
        loader = data.whole_loader(self.config, source)
        found = probe.features(self.predictor(model), loader.epoch(), self.runtime.device)
        self.skipped |= loader.skipped
        return found

    def say(self, line: str) -> None:
        if self.runtime.rank == 0:
            print(line, flush=True)

    def describe(self) -> None:
        """Prints data, classes, student and warnings before any training."""
        splits = self.splits
        train, val = sources.count(splits.train), sources.count(splits.val)
        classes = len(self.classes) or "no"
        self.say(f"data: {train} training images, {val} for validation, {classes} classes")
        if self.probe:
            sizes = [sources.count(x) for x in (self.probe.train, self.probe.val)]
            self.say(
                f"probe: {sizes[0]} labelled images to fit a classifier on, {sizes[1]} to score "
                f"on, {len(self.probe.classes)} classes"
            )
        counted = None if self.config.data.unlabelled else sources.labels(splits.train)
        if counted is not None:
            self.say(f"classes (training images): {identity.count_classes(counted, self.classes)}")
        self.say(f"student: {self.config.student.model}: weights: {self.student}")
        for line in [*self.notes, *(f"warning: {x}" for x in self.warnings)]:
            self.say(line)

    def score_teachers(self, trained: bool) -> None:
        """Of the teachers that this run trained, or of the others."""
        if self.cache and not trained:
            self._score_cache(self.cache)
        for (name, section), teacher in self.named_teachers():
            if (section.epochs > 0) == trained:
                self._score_teacher(name, section, teacher)

    def _score_teacher(self, name: str, section: Teacher, teacher: nn.Module) -> None:
        """Prints a teacher's top-1; ConfigError if a given teacher is no better than guessing."""
        config, classes = self.config, len(self.classes)
        origin = str(models.Origin.of(teacher))
        if config.data.unlabelled:
            self._score_features(name, section, teacher, origin)
            return
        if section.epochs:
            origin = f"trained here for {section.epochs} epochs, from {origin}"
        if config.data.labels:
            self._score_labels(name, section, teacher, origin)
            return
        right, images = identity.score(
            config, self.predictor(teacher), self.splits, self.runtime.device
        )
        self.say(
            f"{name}: {section.model}: top-1 {right / images:.1%} of {images} validation "
            f"images (guessing: {1 / classes:.1%}); weights: {origin}"
        )
        if not identity.is_no_teacher(right, images, classes):
            return
        pixels = preflight.pixels(config, teacher)
        why = (
            f"{name}.model: {section.model} gets {right} of {images} validation images "
            f"right, where guessing gets {images / classes:.0f}"
        )
        if section.epochs:
            self.say(f"warning: {why}: it has hardly learned; try more teacher.epochs")
        else:
            raise ConfigError(
                f"{why}: it cannot teach these classes. Check its weights ({origin}), that "
                f"its classes are the images' in this order, and its mean {pixels.mean} and std "
                f"{pixels.std}"
            )

    def _score_cache(self, cache: CachedTeacher) -> None:
        """Prints a cache, and the top-1 of its teacher on training images."""
        plan, train = cache.plan, self.splits.train
        line = (
            f"teacher: {plan.teacher['name']}: {plan.epochs} epochs in {cache.folder}, "
            f"{plan.record['topk']} of {plan.record['classes']} classes"
        )
        known = None if self.config.data.labels else sources.labels(train)
        if known is None:
            self.say(line)
            return
        # those with labels are the first
        chosen = np.array(sources.spread(len(known), identity.SCORED_IMAGES))
        right = int((cache.choices(chosen) == np.array(known)[chosen]).sum())
        self.say(f"{line}; top-1 {right / len(chosen):.1%} of {len(chosen)} training images")
        if identity.is_no_teacher(right, len(chosen), len(self.classes)):
            raise ConfigError(
                f"teacher.cache: {cache.folder} gets {right} of {len(chosen)} training images "
                "right: it cannot teach these classes"
            )

    def _score_features(self, name: str, section: Teacher, teacher: nn.Module, origin: str) -> None:
        """Prints the top-1 of a teacher's neighbours; ConfigError if they are no better than
        guessing."""
        if not self.probe:
            self.say(f"{name}: {section.model}: weights: {origin}")
            return
        bank, scored = (self.features(teacher, x) for x in (self.probe.train, self.probe.val))
        classes, images = len(self.probe.classes), len(scored.labels)
        top1 = probe.knn(bank, scored, classes)
        self.say(
            f"{name}: {section.model}: {bank.x.shape[1]} features, k-NN top-1 {top1:.1%} of "
            f"{images} images of the probe (guessing: {1 / classes:.1%}); weights: {origin}"
        )
        if identity.is_no_teacher(round(top1 * images), images, classes):
            pixels = preflight.pixels(self.config, teacher)
            raise ConfigError(
                f"{name}.model: {section.model} has features whose k-NN gets {top1:.1%} of the "
                f"probe's images right, where guessing gets {1 / classes:.1%}: they cannot teach. "
                f"Check its weights ({origin}), its mean {pixels.mean} and std {pixels.std}"
            )

    def _score_labels(self, name: str, section: Teacher, teacher: nn.Module, origin: str) -> None:
        found, chance, images = identity.score_labels(
            self.config, self.predictor(teacher), self.splits, self.runtime.device
        )
        self.say(
            f"{name}: {section.model}: mAP {found:.1%} of {images} validation images (guessing: "
            f"{chance:.1%}); weights: {origin}"
        )
        if found <= chance:
            why = (
                f"{name}.model: {section.model} has a mAP of {found:.1%}, and guessing {chance:.1%}"
            )
            if not section.epochs:
                raise ConfigError(f"{why}: it cannot teach these classes ({origin})")
            self.say(f"warning: {why}: it has hardly learned; try more teacher.epochs")
