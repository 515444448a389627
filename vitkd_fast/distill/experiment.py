"""A run: teacher, baseline and distilled student, for every seed, and the report."""

from __future__ import annotations

import copy
import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch import nn

from .. import int8, models
from .._files import replacing
from . import branches, checkpoint, data, evaluate, identity, preflight, scoring, sources
from .cache.read import CachedTeacher
from .config import Config, Teacher
from .loop import Trainer
from .runtime import Runtime
from .task import DistillationTask


def distill(config: Config, *, resume: bool = False, dry_run: bool = False) -> dict[str, Any]:
    """Trains, evaluates and reports what `config` says; the results are report.json's.

    Under torchrun every process calls this, and the first one writes.

    Args:
        config: from `config.load`.
        resume: continue the run in the folder; what is finished is not repeated.
        dry_run: print data, models and cost, and return {}; nothing is written.

    Raises:
        ConfigError, DataError, CheckpointError: what cannot be run, before any training where it
            can be known.
        NonFiniteError, Stopped: as `Trainer.run`.
    """
    threads = torch.get_num_threads()
    runtime = Runtime.of(config)
    try:
        experiment = _Experiment(config, runtime, resume)
        return experiment.estimate() if dry_run else experiment.run()
    finally:
        torch.set_num_threads(threads)
        if dist.is_initialized():
            dist.destroy_process_group()


def trained_teachers(config: Config) -> list[Teacher]:
    """The teachers of a run, trained in its folder where they have epochs; it goes on there.

    Raises:
        As `distill`.
    """
    threads = torch.get_num_threads()
    try:
        experiment = _Experiment(config, Runtime.of(config), resume=True)
        experiment.train_teachers()
        return experiment.trained_teachers()
    finally:
        torch.set_num_threads(threads)


class _Experiment(scoring.Scoring):
    def _train(
        self,
        name: str,
        config: Config,
        student: nn.Module,
        teachers: list[nn.Module],
        seed: int,
        cache: CachedTeacher | None = None,
        splits: sources.Splits | None = None,
    ) -> nn.Module:
        """Trains one model, which may be a teacher, in the folder of this name.

        On all images of the run, unless others are given.
        """
        section = config.all_teachers().get(name, config.student)
        branches = self.config.int8.aware if name.startswith(f"{self.role}-") else None
        rebuild: dict[str, Any] = {"student": preflight.rebuilding(section, student).model_dump()}
        rebuild |= self._sources() if teachers or cache else {"teacher": {}, "teachers": []}
        if splits is None:
            splits = self.splits if config.data.extra else sources.without_extra(self.splits)
        trainer = Trainer(
            config,
            DistillationTask.create(config, student, teachers, self.runtime, cache),
            splits,
            self.folder / name,
            seed=seed,
            save_model=functools.partial(models.save, **self.about_model(section, student)),
            rebuild=rebuild,
            branch=branches.start if branches else None,
        )
        if self.resume:
            trainer.restore()
        trained = trainer.run()
        self.skipped |= trainer.skipped
        return trained

    def _merged(self, seed: int, student: nn.Module) -> nn.Module:
        """The mean of a seed's specialists, which begin with one trunk, trained here."""
        section = self.config.branch
        assert section
        taught = seed, self.cache
        trunk = self._train(
            f"trunk-{seed}", branches.shorter(self.config, section.trunk), student,
            self.teachers, *taught,
        )  # fmt: skip
        specialists = []
        for i, group in enumerate(branches.groups(section, self.classes)):
            name, part = f"specialist-{seed}-{i}", branches.images_of(self.splits, group)
            config = branches.shorter(self.config, section.epochs)
            beginning = copy.deepcopy(trunk)
            specialists.append(
                self._train(name, config, beginning, self.teachers, *taught, splits=part)
            )
            self._say_top1(name, specialists[-1], part)
        merged = branches.merge(specialists, self.config, self.splits)
        self._say_top1(f"merged-{seed}", merged, self.splits)
        return merged

    def _say_top1(self, name: str, model: nn.Module, splits: sources.Splits) -> None:
        training = model.training
        right, images = identity.score(
            self.config, self.predictor(model), splits, self.runtime.device
        )
        model.train(training)
        line = f"{name}: top-1 {right / images:.1%} of {images} images of its classes, before "
        line += "distillation." if name.startswith("merged") else "it is merged."
        self.notes.append(line)
        self.say(line)

    def _sources(self) -> dict[str, Any]:
        """The sections of the teachers, without training: what this run trained is a file."""
        return {"teacher": [x.model_dump() for x in self.trained_teachers()], "teachers": []}

    def trained_teachers(self) -> list[Teacher]:
        """The sections of the teachers, of which those that this run trained are files."""
        return [
            Teacher(
                model=str(self._file(name).absolute()),
                weight=section.weight,
                image_size=section.image_size,
            )
            if section.epochs
            else section
            for name, section in self.config.all_teachers().items()
        ]

    def run(self) -> dict[str, Any]:
        config = self.config
        if dist.is_initialized():
            dist.barrier()  # every rank has looked at the folder
        if self.runtime.rank == 0:
            checkpoint.check_folder(self.folder, 1 << 20)
            self.lock = checkpoint.lock(self.folder)
            with replacing(self.folder / "config.yaml") as part:
                part.write_text(yaml.safe_dump(config.model_dump(), sort_keys=False))
            with replacing(self.folder / "data.json") as part:
                part.write_text(json.dumps(self.fingerprint))
        self.train_teachers()
        students: dict[str, dict[int, nn.Module]] = {}
        trained: dict[int, int8.QuantizationAware] = {}  # for int8
        for seed in config.run.seeds:
            for role in self._roles():
                data.seed_all(seed)
                student = preflight.create_student(config, self.classes)
                distilled = role == self.role
                if config.branch and distilled:
                    student = self._merged(seed, student)
                if not config.given:
                    student = self._train(
                        f"{role}-{seed}",
                        config if distilled else self._baseline(),
                        student,
                        self.teachers if distilled else [],
                        seed,
                        self.cache if distilled else None,
                    )
                students.setdefault(role, {})[seed] = student
            if config.int8.aware:
                trained[seed] = self.train_aware(seed, students[self.role][seed])
        if config.given:
            self.notes.append("int8.aware.start is 0: the float student is the given one.")
        if self.cache and (teacher := preflight.teacher_at_hand(config, self.classes)):
            self.teachers = [teacher]  # has a row
        found: dict[str, Any]
        measured: dict[str, list[dict[str, float]]] = {}
        if config.data.unlabelled and config.given:
            return self._written(self._compared_with_itself(students, trained))
        if config.data.unlabelled:
            measured = self._measure(students)
            if not self.probe:
                found = self._without_scores(students, measured)
                return self._written(found)
        evaluations: dict[str, list[evaluate.Evaluation]] = {}
        ensemble = self._ensemble()
        together = evaluate.Remembered(ensemble) if ensemble else None
        if together:
            evaluations["teacher"] = [self._evaluate(together.epoch(), None)]
        if len(self.teachers) > 1:
            for (name, _), one in self.named_teachers():
                evaluations[name] = [self._evaluate(self.predictor(one), together)]
        for role, of_seeds in students.items():
            predictors = map(self.predictor, of_seeds.values())
            evaluations[role] = [self._evaluate(predictor, together) for predictor in predictors]
        engines = self._engines(students[self.role]) if config.int8.enabled else []
        if engines:
            evaluations["int8"] = [
                self._evaluate(evaluate.engine(engine), together, exact)
                for engine, exact in zip(engines, evaluations[self.role], strict=True)
            ]
        if trained:
            evaluations["int8-aware"] = [
                self._evaluate(evaluate.engine(int8.load(module.graph())), together, exact)
                for module, exact in zip(trained.values(), evaluations[self.role], strict=True)
            ]
        for role, values in measured.items():
            for result, more in zip(evaluations[role], values, strict=True):
                result.fidelity |= more
        return self._written(self._results(students, engines, evaluations, trained))

    def train_teachers(self) -> None:
        """Trains those with epochs, and prints what all are worth."""
        self.describe()
        self.score_teachers(trained=False)
        for i, ((name, section), model) in enumerate(list(self.named_teachers())):
            if section.epochs:
                own = self.config.for_teacher(section)
                self.teachers[i] = self._train(name, own, model, [], 0)
        self.score_teachers(trained=True)

    def estimate(self) -> dict[str, Any]:
        """Prints data, models, the teacher's top-1, the time of a step, and disk space."""
        config, size = self.config, self.config.data.image_size
        self.describe()
        self.score_teachers(trained=False)
        data.seed_all(0)
        student = preflight.create_student(config, self.classes)
        named = {name: teacher for (name, _), teacher in self.named_teachers()}
        for name, model in (named | {"student": student}).items():
            parameters = sum(x.numel() for x in model.parameters())
            macs = evaluate.count_macs(model, size)
            self.say(f"{name}: {parameters:,} parameters, {macs / 1e6:.4g} MMACs an image")
        if config.given:
            final = preflight.create_student(config, self.classes)
            config, task = self.aware_task(student, final)
        else:
            task = DistillationTask.create(config, student, self.teachers, self.runtime, self.cache)
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(
                config,
                task,
                self.splits,
                Path(folder) / "dry-run",
                seed=config.run.seeds[0],
                save_model=lambda *_: None,
            )
            seconds = trainer.seconds_per_step()
        runs = len(config.run.seeds)
        compared = ", and as often without the teacher" if "baseline" in self._roles() else ""
        if any(section.epochs for section in config.all_teachers().values()):
            compared += "; the teacher's own training is not counted"
        self.say(
            f"a step: {seconds:.3g} s; {trainer.total:,} steps for each of {runs} seeds: "
            f"{seconds * trainer.total * runs / 3600:.2g} h{compared}"
        )
        need = trainer.disk * runs * len(self._roles())
        free = checkpoint.free(self.folder)
        self.say(f"disk: {need / 1e6:,.0f} MB at most in {self.folder}, {free / 1e6:,.0f} MB free")
        return {}

    def _baseline(self) -> Config:
        """The student without its teacher: as many updates, of images with labels."""
        config = self.config.for_baseline()
        if not self.config.data.extra:
            return config
        together = config.data.batch_size * self.runtime.ranks * config.optimizer.accumulate
        labelled = sources.without_extra(self.splits)
        distilled, alone = (sources.count(x.train) // together for x in (self.splits, labelled))
        steps = min(config.run.epochs * distilled, config.run.max_steps or 2**62)
        epochs = -(-steps // max(alone, 1))
        longer = epochs / config.run.epochs
        run = {
            "epochs": epochs,
            "max_steps": steps,
            "eval_every": round(config.run.eval_every * longer) or 1,
        }
        warmup = {"warmup_epochs": round(config.optimizer.warmup_epochs * longer)}
        return config.model_copy(
            update={
                "run": config.run.model_copy(update=run),
                "optimizer": config.optimizer.model_copy(update=warmup),
            }
        )

    def _roles(self) -> list[str]:
        """The students that each seed trains."""
        distils = self.role == "distilled" and not self.config.data.unlabelled
        compared = self.config.run.baseline and distils and not self.config.given
        return ["baseline", self.role] if compared else [self.role]
