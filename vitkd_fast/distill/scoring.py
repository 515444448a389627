"""A run's trained students and their teachers: scores, costs, and the results of the report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import int8, models
from . import (
    aware,
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
from .config import Model
from .task import Average, Ensemble


class Scoring(aware.ForInt8):
    """What is found out about trained students."""

    def _file(self, role: str) -> Path:
        """Of a model's last weights."""
        return self.folder / role / "last.safetensors"

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
        """Scores on the validation images; `exact` is of the weights that were quantised.

        Where they have no labels, only fidelity is left.
        """
        loader, given = data.val_loader(self.config, self.scored), self.config.data.unlabelled
        unlabelled = given and not self.probe
        places = []

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for batch in loader.epoch():
                places.append(batch.indices.clone())  # the worker reuses its memory
                # any class stands for what is not known
                yield batch.images, batch.labels.clamp(min=0) if unlabelled else batch.labels

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
        if unlabelled:
            result.metrics = {}
        if exact:
            same = (result.student == exact.student).double()
            counts = torch.stack([same.sum(), same.new_tensor(same.numel())]).to(
                self.runtime.device
            )
            if dist.is_initialized():
                dist.all_reduce(counts)
            result.fidelity["unchanged"] = float(counts[0] / counts[1])
        return result

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

    def _compared_with_itself(
        self,
        students: dict[str, dict[int, nn.Module]],
        trained: dict[int, int8.QuantizationAware],
    ) -> dict[str, Any]:
        """Results of a given student where no image has a label: how true int8 is to it.

        To the teachers, too, where the run has any.
        """
        config, seeds, role = self.config, self.config.run.seeds, self.role
        floats, ensemble = students[role], self._ensemble()
        together = evaluate.Remembered(ensemble) if ensemble else None
        engines = self._engines(floats)
        found: dict[str, list[evaluate.Evaluation]] = {role: [], "int8": [], "int8-aware": []}
        for seed, engine in zip(seeds, engines, strict=True):
            predictor = self.predictor(floats[seed])
            teacher = together or evaluate.Remembered(predictor)
            exact = self._evaluate(predictor, teacher)
            made = int8.load(trained[seed].graph())
            found["int8"].append(self._evaluate(evaluate.engine(engine), teacher, exact))
            found["int8-aware"].append(self._evaluate(evaluate.engine(made), teacher, exact))
            if not together:
                exact.fidelity = {}  # with itself
            found[role].append(exact)
        nothing = evaluate.Scores({}, {})
        rows = [
            self._row(name, section, teacher, None, [nothing], [0])
            for (name, section), teacher in self.named_teachers()
        ]
        model, first = config.student, seeds[0]
        aware_file = self.folder / f"int8-aware-{first}" / "last.int8.safetensors"
        rows += [
            self._row(role, model, floats[first], None, found[role], seeds),
            self._row(
                "int8", model, floats[first], self._int8_file(first), found["int8"], seeds,
                engines[0],
            ),
            self._row(
                "int8-aware", model, trained[first].model, aware_file, found["int8-aware"], seeds,
                int8.load(trained[first].graph()),
            ),
        ]  # fmt: skip
        return {
            **self._about(students),
            "data": {
                "train": sources.count(self.splits.train),
                "val": sources.count(self.splits.val),
                "classes": list(self.classes),
            },
            "models": rows,
            "comparison": None,
            "verdict": results.verdict_of_int8(rows),
        }

    def _about(self, students: dict[str, dict[int, nn.Module]]) -> dict[str, Any]:
        """What the results of every run begin with: how they were found."""
        curves = results.curves(self._curve_folders(list(students)))
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
            "curves": curves,
            "notes": [*self._notes(), *results.unquantised(curves)],
        }

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
