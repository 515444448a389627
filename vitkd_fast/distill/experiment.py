"""A run: teacher, baseline and distilled student, for every seed, and the report."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn

from .. import int8, models
from .._files import replacing
from . import (
    aware,
    checkpoint,
    data,
    evaluate,
    multilabel,
    preflight,
    probe,
    quantized,
    report,
    results,
    sources,
)
from .cache.read import CachedTeacher
from .config import Config, Model, Teacher
from .loop import Trainer
from .runtime import Runtime
from .task import Average, DistillationTask, Ensemble


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


class _Experiment(aware.ForInt8):
    def _train(
        self,
        name: str,
        config: Config,
        student: nn.Module,
        teachers: list[nn.Module],
        seed: int,
        cache: CachedTeacher | None = None,
    ) -> nn.Module:
        """Trains one model, which may be a teacher, in the folder of this name."""
        section = config.all_teachers().get(name, config.student)
        branches = self.config.int8.aware if name.startswith(f"{self.role}-") else None
        rebuild: dict[str, Any] = {"student": preflight.rebuilding(section, student).model_dump()}
        rebuild |= self._sources() if teachers or cache else {"teacher": {}, "teachers": []}
        trainer = Trainer(
            config,
            DistillationTask.create(config, student, teachers, self.runtime, cache),
            self.splits if config.data.extra else sources.without_extra(self.splits),
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

    def _sources(self) -> dict[str, Any]:
        """The sections of the teachers, without training: what this run trained is a file."""
        found = [
            Teacher(
                model=str(self._file(name).absolute()),
                weight=section.weight,
                image_size=section.image_size,
            )
            if section.epochs
            else section
            for name, section in self.config.all_teachers().items()
        ]
        return {"teacher": [section.model_dump() for section in found], "teachers": []}

    def _file(self, role: str) -> Path:
        """Of a model's last weights."""
        return self.folder / role / "last.safetensors"

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
        self.describe()
        self.score_teachers(trained=False)
        for i, ((name, section), model) in enumerate(list(self.named_teachers())):
            if section.epochs:
                self.teachers[i] = self._train(name, config.for_teacher(section), model, [], 0)
        self.score_teachers(trained=True)
        students: dict[str, dict[int, nn.Module]] = {}
        trained: dict[int, int8.QuantizationAware] = {}  # for int8
        given = config.int8.aware and not config.int8.aware.start  # a float student that is trained
        for seed in config.run.seeds:
            for role in self._roles():
                data.seed_all(seed)
                student = preflight.create_student(config, self.classes)
                distilled = role == self.role
                if not given:
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
        if given:
            self.notes.append("int8.aware.start is 0: the float student is the given one.")
        if self.cache and (teacher := preflight.teacher_at_hand(config, self.classes)):
            self.teachers = [teacher]  # has a row
        found: dict[str, Any]
        measured: dict[str, list[dict[str, float]]] = {}
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

    def _written(self, found: dict[str, Any]) -> dict[str, Any]:
        """What the first rank found, once the report is written; {} on the others."""
        if self.runtime.rank != 0:
            return {}
        report.write(found, self.folder)
        return found

    def _probed(self, model: nn.Module) -> tuple[float, probe.Head]:
        """Top-1 of the nearest neighbours on the probe's images, and a classifier for them."""
        assert self.probe
        classes = len(self.probe.classes)
        bank, scored = (self.features(model, x) for x in (self.probe.train, self.probe.val))
        return probe.knn(bank, scored, classes), probe.fit(bank, classes)

    def _measure(
        self, students: dict[str, dict[int, nn.Module]]
    ) -> dict[str, list[dict[str, float]]]:
        """k-NN and similarity of each model by role; with a probe, all get their classifiers.

        A student's is saved beside it: classifier.safetensors.
        """
        measured: dict[str, list[dict[str, float]]] = {}
        for role, trained in students.items():
            for seed, model in trained.items():
                values = results.similarity(self.folder / f"{role}-{seed}")
                if self.probe:
                    values["knn"], head = self._probed(model)
                    trained[seed] = models.with_classifier(model, *head)
                    self._save_classifier(f"{role}-{seed}", trained[seed])
                measured.setdefault(role, []).append(values)
        if self.probe:
            for i, ((name, _), teacher) in enumerate(list(self.named_teachers())):
                neighbours, head = self._probed(teacher)
                measured[name] = [{"knn": neighbours}]
                self.teachers[i] = models.with_classifier(teacher, *head)
        return measured

    def _save_classifier(self, name: str, model: nn.Module) -> None:
        """A student with its fitted classifier, where `models.load` finds its classes."""
        if self.runtime.rank == 0:
            models.save(
                self.folder / name / "classifier.safetensors",
                model,
                name=self.config.student.model,
                options=self.config.student.options,
                num_classes=len(self.scored.classes),
                pixels=preflight.pixels(self.config, model),
                classes=self.scored.classes,
            )

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
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(
                config,
                DistillationTask.create(config, student, self.teachers, self.runtime, self.cache),
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
        given = self.config.int8.aware and not self.config.int8.aware.start
        compared = self.config.run.baseline and distils and not given
        return ["baseline", self.role] if compared else [self.role]

    def _engines(self, trained: dict[int, nn.Module]) -> list[int8.Session]:
        """The students in the int8 engine, of the same files on every rank; [] where it cannot."""
        files: list[bytes] = []
        if self.runtime.rank == 0:
            try:
                images = self.calibration_images()
                assert images is not None
                for seed, model in trained.items():
                    file = self._int8_file(seed)
                    file.parent.mkdir(exist_ok=True)
                    files.append(quantized.save(file, model, images, **self.quantize_as(model)))
            except ValueError as error:  # the engine lacks an operation, or an image is bad
                files, why = [], " ".join(str(error).split())
                self.notes.append(f"No int8 row: {why}")
                print(f"int8: no row: {why}", flush=True)
        if dist.is_initialized():
            box = [files]
            dist.broadcast_object_list(box)
            files = box[0]
        return [int8.load(file) for file in files]

    def _int8_file(self, seed: int) -> Path:
        return self.folder / f"{self.role}-{seed}" / "last.int8.safetensors"

    def _results(
        self,
        students: dict[str, dict[int, nn.Module]],
        engines: list[int8.Session],
        evaluations: dict[str, list[evaluate.Evaluation]],
        trained: dict[int, int8.QuantizationAware],
    ) -> dict[str, Any]:
        """Of float students, of them in the engine, and of those trained for it."""
        config, seeds = self.config, self.config.run.seeds
        classes = self.scored.classes
        rows = []
        for (name, section), teacher in self.named_teachers():
            scored, file = evaluations[name], self._file(name)
            rows.append(self._row(name, section, teacher, file, scored, [0]))
        if (together := self._ensemble()) and len(self.teachers) > 1:
            names = " + ".join(section.model for section in config.all_teachers().values())
            scored = evaluations["teacher"]
            rows.append(self._row("teacher", Model(model=names), together, None, scored, [0]))
        for role, of_seeds in students.items():
            name = "classifier.safetensors" if config.data.unlabelled else "last.safetensors"
            file = self.folder / f"{role}-{seeds[0]}" / name
            model, scored = of_seeds[seeds[0]], evaluations[role]
            rows.append(self._row(role, config.student, model, file, scored, seeds))
        if engines:
            model, file = students[self.role][seeds[0]], self._int8_file(seeds[0])
            scored, engine = evaluations["int8"], engines[0]
            rows.append(self._row("int8", config.student, model, file, scored, seeds, engine))
        if trained:
            file = self.folder / f"int8-aware-{seeds[0]}" / "last.int8.safetensors"
            model, engine = trained[seeds[0]], int8.load(trained[seeds[0]].graph())
            scored = evaluations["int8-aware"]
            rows.append(
                self._row("int8-aware", config.student, model.model, file, scored, seeds, engine)
            )
        comparison = results.compare(evaluations, "distilled", "baseline")
        others = {
            other: results.compare(evaluations, "int8-aware", other)
            for other in (self.role, "int8")
        }
        if trained:
            self.notes += [results.sentence("int8-aware", *item) for item in others.items()]
        first, val = evaluations[self.role][0], self.scored.val
        several = bool(config.data.labels)
        # each rank saw its own images
        shows = hasattr(val, "read") and self.runtime.ranks == 1 and not several
        table = multilabel.per_class if several else evaluate.per_class
        return {
            **self._about(students),
            "data": {
                "train": sources.count(self.splits.train),
                "val": int(first.confusion[0].sum() if several else first.confusion.sum()),
                "classes": classes,
            },
            "models": rows,
            "comparison": comparison,
            "int8_comparisons": others if trained else {},
            "verdict": results.verdict_without_labels(rows)
            if config.data.unlabelled
            else results.verdict(comparison, config.run.baseline and self.role == "distilled"),
            "confusion": None
            if several
            else {"role": self.role, "seed": seeds[0], "matrix": first.confusion.tolist()},
            "int8_confusion": {
                "role": "int8",
                "seed": seeds[0],
                "matrix": evaluations["int8"][0].confusion.tolist(),
            }
            if engines and not several
            else None,
            # of all seeds together
            "per_class": {
                role: table(torch.stack([one.confusion for one in scored]).sum(0), classes)
                for role, scored in evaluations.items()
            },
            "disagreements": results.disagreements(first, val, self.places) if shows else None,
        }

    def _without_scores(
        self,
        students: dict[str, dict[int, nn.Module]],
        measured: dict[str, list[dict[str, float]]],
    ) -> dict[str, Any]:
        """Results where no image has a label: costs, and how alike features are."""
        config, seeds = self.config, self.config.run.seeds
        nothing = evaluate.Scores({}, {})
        rows = [
            self._row(name, section, teacher, None, [nothing], [0])
            for (name, section), teacher in self.named_teachers()
        ]
        for role, trained in students.items():
            file = self._file(f"{role}-{seeds[0]}")
            scored = [evaluate.Scores({}, values) for values in measured[role]]
            rows.append(self._row(role, config.student, trained[seeds[0]], file, scored, seeds))
        return {
            **self._about(students),
            "data": {
                "train": sources.count(self.splits.train),
                "val": sources.count(self.splits.val),
                "classes": [],
            },
            "models": rows,
            "comparison": None,
            "verdict": results.verdict_without_labels(rows),
        }

    def _about(self, students: dict[str, dict[int, nn.Module]]) -> dict[str, Any]:
        """What the results of every run begin with: how they were found."""
        return {
            "version": report.VERSION,
            "title": self.folder.name,
            "config": self.config.model_dump(),
            "environment": {
                "vitkd_fast": version("vitkd-fast"),
                "torch": torch.__version__,
                "timm": version("timm"),
                "device": results.device_name(self.runtime),
            },
            "curves": results.curves(self._curve_folders(list(students))),
            "notes": self._notes(),
        }

    def _ensemble(self) -> nn.Module | None:
        """The teacher's predictor, or the average of several teachers'."""
        predictors = [self.predictor(teacher) for teacher in self.teachers]
        if len(predictors) > 1:
            return Ensemble(predictors, Average.of(self.config)).eval()
        return predictors[0] if predictors else None

    def _evaluate(
        self,
        predictor: evaluate.Predictor,
        teacher: evaluate.Remembered | None,
        exact: evaluate.Evaluation | None = None,
    ) -> evaluate.Evaluation:
        """Scores on the validation images; `exact` is of the weights that were quantised."""
        loader = data.val_loader(self.config, self.scored)
        places = []

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for batch in loader.epoch():
                places.append(batch.indices.clone())  # the worker reuses its memory
                yield batch.images, batch.labels

        judge = multilabel.evaluate if self.config.data.labels else evaluate.evaluate
        result = judge(
            predictor,
            batches(),
            classes=len(self.scored.classes),
            device=self.runtime.device,
            teacher=teacher.epoch() if teacher else None,
        )
        self.places = torch.cat(places)  # in the images, without those that cannot be read
        self.skipped |= loader.skipped
        if exact:
            same = (result.student == exact.student).double()
            counts = torch.stack([same.sum(), same.new_tensor(same.numel())]).to(
                self.runtime.device
            )
            if dist.is_initialized():
                dist.all_reduce(counts)
            result.fidelity["unchanged"] = float(counts[0] / counts[1])
        return result

    def _row(
        self,
        role: str,
        section: Model,
        model: nn.Module,
        file: Path | None,
        scored: Sequence[evaluate.Scores],
        seeds: list[int],
        engine: int8.Session | None = None,
    ) -> dict[str, Any]:
        """A model's row of the table: its cost, in the engine or torch, and its scores."""
        cost = evaluate.cost(
            evaluate.engine(engine) if engine else self.predictor(model),
            model,
            image_size=self.config.data.image_size,
            device="cpu" if engine else self.runtime.device,
            file=file if file and file.exists() else None,
        )
        runs = [
            {"seed": seed, "metrics": result.metrics, "fidelity": result.fidelity}
            for seed, result in zip(seeds, scored, strict=True)
        ]
        mean, std = evaluate.summarize([r.metrics | r.fidelity for r in scored])
        return {
            "role": role,
            "model": section.model,
            **asdict(cost),
            "conditions": results.conditions(self.runtime, engine),
            "runs": runs,
            "mean": mean,
            "std": std,
        }

    def _curve_folders(self, roles: list[str]) -> dict[str, Path]:
        """By title; the teacher's too, where the run trains it."""
        roles = [*roles, "int8-aware"] if self.config.int8.aware else roles
        names = {
            f"{role}, seed {i}": f"{role}-{i}" for role in roles for i in self.config.run.seeds
        }
        for name, section in self.config.all_teachers().items():
            if section.epochs:
                names = {f"{name}, seed 0": name} | names
        return {title: self.folder / name for title, name in names.items()}

    def _notes(self) -> list[str]:
        notes = [
            "Scores are those of the last epoch's weights: to choose the best epoch on the "
            "images that it is then scored on would flatter.",
        ]
        if self.skipped:
            shown = "; ".join(sorted(self.skipped)[:10])
            notes.append(f"Left out, {len(self.skipped)} in all: {shown}")
        section = self.config.data
        if self.probe:
            notes.append(
                "Accuracies are those of a linear classifier of frozen features, fitted on "
                f"{sources.count(self.probe.train)} labelled images of data.probe."
            )
        if not section.val and section.dataset in ("", "digits"):
            notes.append(f"Validation: {section.holdout:.0%} of the images, kept from training.")
        return notes + self.notes
