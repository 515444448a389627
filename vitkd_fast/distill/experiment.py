"""A whole run: teacher, baseline and distilled student, for every seed, and the report."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import tempfile
from collections.abc import Iterator
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
from . import checkpoint, data, evaluate, identity, quantized, report, results, sources
from .config import Config, ConfigError, Model, Optimizer
from .loop import Runtime, Trainer, build_optimizer
from .losses import Losses
from .task import DistillationTask

# what may differ when a run goes on: where things are, and how they are computed
_MAY_CHANGE = {
    "data": {"root", "train", "val", "workers", "skip_bad"},
    "teacher": {"checkpoint"},
    "int8": {"enabled", "calibration", "calibration_images"},
    "run": {"folder", "device", "precision", "channels_last", "compile", "threads"}
    | {"log_every", "eval_every", "save_every", "seeds", "baseline"},
}


def distill(config: Config, *, resume: bool = False, dry_run: bool = False) -> dict[str, Any]:
    """Trains, evaluates and reports what `config` says; the results are report.json's.

    Under torchrun every process calls this, and the first one writes.

    Args:
        config: from `config.load`.
        resume: go on in a folder that holds a run; what is done there is not done again.
        dry_run: say what there is and what it would cost, and return {}; nothing is written.

    Raises:
        ConfigError, DataError, CheckpointError: what cannot be run, before any training where it
            can be known.
        NonFiniteError, Stopped: as `Trainer.run`.
    """
    runtime = Runtime.of(config)
    try:
        experiment = _Experiment(config, runtime, resume)
        return experiment.estimate() if dry_run else experiment.run()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


class _Experiment:
    def __init__(self, config: Config, runtime: Runtime, resume: bool) -> None:
        """Finds out what can be known before any training; writes nothing."""
        self.config, self.runtime, self.resume = config, runtime, resume
        self.folder = Path(config.run.folder)
        self.warnings: list[str] = []
        resumes = self._check_folder()
        self.splits = sources.open_data(config.data, config.student.options.get("num_classes"))
        self.classes = self.splits.classes
        self.fingerprint = identity.fingerprint(self.splits)
        if resumes and (begun := self.folder / "data.json").exists():
            identity.check_resumed(json.loads(begun.read_text()), self.fingerprint)
        self.teacher = self._create_teacher() if config.teacher.model else None
        student = self._create_student()
        self.student = models.Origin.of(student)
        self._try("student", student)
        self._try_batch("student", student)
        build_optimizer(student, config.optimizer)
        self._try_losses(student)
        data.loaders(config, self.splits, 0, config.optimizer.accumulate)
        self.skipped = set(self.splits.skipped)
        # whose weights become int8, and whose predictions the report shows
        self.role = "distilled" if self.teacher else "baseline"
        self.notes = list(self.splits.notes)

    def _check_folder(self) -> bool:
        """Whether the folder holds a run to go on with; refuses another's.

        What failed before it saved anything is no run.
        """
        file = self.folder / "config.yaml"
        if not file.exists() or not any(self.folder.glob("*/*.safetensors")):
            return False
        if not self.resume:
            raise ConfigError(
                f"run.folder: {self.folder} holds a run; --resume goes on with it, or name another"
            )
        if keys := _differing(yaml.safe_load(file.read_text()), self.config.model_dump()):
            raise ConfigError(f"--resume: {self.folder} was begun with another {', '.join(keys)}")
        return True

    def _create(
        self, model: Model, num_classes: int | None, *, new_head: bool = False
    ) -> nn.Module:
        options = {k: v for k, v in model.options.items() if k != "num_classes"}
        return models.create(
            model.model,
            num_classes=num_classes,
            pretrained=model.pretrained,
            checkpoint=model.checkpoint,
            new_head=new_head,
            image_size=None if "img_size" in options else self.config.data.image_size,
            options=options,
        )

    def _try(self, name: str, model: nn.Module) -> None:
        """Shows the model one image of the run's size."""
        size = self.config.data.image_size
        try:
            with torch.inference_mode():
                models.predictor(model).eval()(torch.zeros(1, 3, size, size, dtype=torch.uint8))
        except (AssertionError, RuntimeError, ValueError) as error:
            why = " ".join(str(error).split())
            raise ConfigError(
                f"{name}.model: cannot read images of data.image_size {size}: {why}"
            ) from error

    def _create_student(self) -> nn.Module:
        """Before its training; with a new classifier where its weights are of other classes."""
        student: Any = self._create(self.config.student, len(self.classes), new_head=True)
        origin = models.Origin.of(student)
        if origin.classes and not identity.same_classes(origin, self.classes):
            student.reset_classifier(len(self.classes))
            student.origin = dataclasses.replace(
                origin, classes=None, new_head="new classifier: its classes are others"
            )
        return student

    def _try_batch(self, name: str, model: nn.Module) -> None:
        """Finds out whether the model can be trained on batches of the run's size."""
        size = self.config.data.image_size
        if self.config.data.batch_size == 1:
            trained = models.predictor(copy.deepcopy(model).train())
            try:
                with torch.no_grad():
                    trained(torch.zeros(1, 3, size, size, dtype=torch.uint8))
            except ValueError as error:  # a batch norm without a second value
                raise ConfigError(
                    f"data.batch_size: 1 given; {name}.model has batch norms that take 2 or more"
                ) from error
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        if (momentum := max((m.momentum or 0.0 for m in norms), default=0.0)) > 0.5:
            self.warnings.append(
                f"{name}.model: its batch norms have momentum {momentum:g}, so that their running "
                "statistics are the last batch's; usual is 0.1"
            )

    def _try_losses(self, student: nn.Module) -> None:
        """Finds out whether the losses get what they need of student and teacher."""
        teacher = models.predictor(self.teacher).eval() if self.teacher else None
        size = self.config.data.image_size
        image = torch.zeros(1, 3, size, size, dtype=torch.uint8)
        try:
            task = DistillationTask(
                self.config.losses, models.predictor(student), teacher, image
            ).eval()
            with torch.no_grad():
                task(image, torch.zeros(1, dtype=torch.int64))
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"losses: {error}") from error

    def _create_teacher(self) -> nn.Module:
        section, classes = self.config.teacher, len(self.classes)
        data.seed_all(0)
        if Path(section.model).is_file():
            teacher = models.load(section.model).model
        else:
            # weights of timm's keep timm's classes, so that a mismatch is seen
            own = section.options.get("num_classes", classes if section.checkpoint else None)
            teacher = self._create(
                section, classes if section.epochs else own, new_head=section.epochs > 0
            )
        origin = models.Origin.of(teacher)
        if not section.epochs:
            if not origin.trained:
                raise ConfigError(
                    f"teacher.model: {section.model} would teach with random weights ({origin}); "
                    "name its weights by teacher.checkpoint or teacher.pretrained=true, or train "
                    "it first by teacher.epochs"
                )
            if (found := getattr(teacher, "num_classes", classes)) != classes:
                raise ConfigError(
                    f"teacher.model: {section.model} has {found} classes, and the images have "
                    f"{classes}; name one trained on them, or let teacher.epochs train it first"
                )
            if origin.classes:
                identity.check_classes(f"teacher.model: {origin}", origin, self.classes)
        self.warnings += identity.differences("teacher", origin, self._pixels(teacher))
        self._try("teacher", teacher)
        if section.epochs:
            self._try_batch("teacher", teacher)
        return teacher

    def _train(
        self,
        name: str,
        section: Model,
        model: nn.Module,
        teacher: nn.Module | None,
        losses: Losses,
        optimizer: Optimizer,
        epochs: int,
        seed: int,
    ) -> nn.Module:
        save_model = functools.partial(
            models.save,
            name=section.model,
            options=section.options,
            num_classes=len(self.classes),
            pixels=self._pixels(model),
            classes=tuple(self.classes),
        )
        trainer = Trainer(
            self.config,
            model,
            teacher,
            losses,
            optimizer,
            epochs,
            self.splits,
            self.folder / name,
            seed=seed,
            title=name,
            runtime=self.runtime,
            resume=self.resume,
            save_model=save_model,
        )
        trained = trainer.run()
        self.skipped |= trainer.skipped
        return trained

    def _pixels(self, model: nn.Module) -> models.Pixels:
        """The model's own mean and std, and this run's size, crop and interpolation."""
        own, config = models.Pixels.of(model), self.config.data
        return models.Pixels(
            config.image_size, own.mean, own.std, config.interpolation, config.crop_pct
        )

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
        self._describe()
        if self.teacher and not config.teacher.epochs:
            self._score_teacher()
        if self.teacher and config.teacher.epochs:
            self.teacher = self._train(
                "teacher",
                config.teacher,
                self.teacher,
                None,
                config.losses.baseline(),
                config.teacher.optimizer or config.optimizer,
                config.teacher.epochs,
                seed=0,
            )
            self._score_teacher()
        students: dict[str, dict[int, nn.Module]] = {}
        for seed in config.run.seeds:
            for role, (teacher, losses) in self._roles().items():
                data.seed_all(seed)
                student = self._create_student()
                students.setdefault(role, {})[seed] = self._train(
                    f"{role}-{seed}",
                    config.student,
                    student,
                    teacher,
                    losses,
                    config.optimizer,
                    config.run.epochs,
                    seed,
                )
        evaluations: dict[str, list[evaluate.Evaluation]] = {}
        teacher = self.teacher and self._predictor(self.teacher)
        if teacher:
            evaluations["teacher"] = [self._evaluate(teacher, None)]
        for role, trained in students.items():
            predictors = map(self._predictor, trained.values())
            evaluations[role] = [self._evaluate(predictor, teacher) for predictor in predictors]
        engines = self._engines(students[self.role]) if config.int8.enabled else []
        if engines:
            evaluations["int8"] = [
                self._evaluate(evaluate.engine(engine), teacher, exact)
                for engine, exact in zip(engines, evaluations[self.role], strict=True)
            ]
        if self.runtime.rank != 0:
            return {}
        found = self._results(students, engines, evaluations)
        report.write(found, self.folder)
        return found

    def _say(self, line: str) -> None:
        if self.runtime.rank == 0:
            print(line, flush=True)

    def _describe(self) -> None:
        """Says what there is before anything is trained."""
        splits = self.splits
        train, val = sources.count(splits.train), sources.count(splits.val)
        self._say(
            f"data: {train} training images, {val} for validation, {len(self.classes)} classes"
        )
        counted = sources.labels(splits.train)
        if counted is not None:
            self._say(f"classes (training images): {identity.count_classes(counted, self.classes)}")
        self._say(f"student: {self.config.student.model}: weights: {self.student}")
        for line in [*self.notes, *(f"warning: {x}" for x in self.warnings)]:
            self._say(line)

    def _score_teacher(self) -> None:
        """Says what the teacher knows of the images; refuses one given that knows nothing."""
        config, classes = self.config, len(self.classes)
        assert self.teacher is not None
        origin = str(models.Origin.of(self.teacher))
        if config.teacher.epochs:
            origin = f"trained here for {config.teacher.epochs} epochs, from {origin}"
        right, images = identity.score(
            config, self._predictor(self.teacher), self.splits, self.runtime.device
        )
        self._say(
            f"teacher: {config.teacher.model}: top-1 {right / images:.1%} of {images} validation "
            f"images (guessing: {1 / classes:.1%}); weights: {origin}"
        )
        if not identity.is_no_teacher(right, images, classes):
            return
        pixels = self._pixels(self.teacher)
        why = (
            f"teacher.model: {config.teacher.model} gets {right} of {images} validation images "
            f"right, where guessing gets {images / classes:.0f}"
        )
        if config.teacher.epochs:
            self._say(f"warning: {why}: it has hardly learned; try more teacher.epochs")
        else:
            raise ConfigError(
                f"{why}: it cannot teach these classes. Check its weights ({origin}), that "
                f"its classes are the images' in this order, and its mean {pixels.mean} and std "
                f"{pixels.std}"
            )

    def estimate(self) -> dict[str, Any]:
        """Says what a run would be: data, models, the teacher's score, a step's cost, disk."""
        config, size = self.config, self.config.data.image_size
        self._describe()
        if self.teacher and not config.teacher.epochs:
            self._score_teacher()
        data.seed_all(0)
        student = self._create_student()
        for name, model in (("teacher", self.teacher), ("student", student)):
            if model:
                parameters = sum(x.numel() for x in model.parameters())
                macs = evaluate.count_macs(model, size)
                self._say(f"{name}: {parameters:,} parameters, {macs / 1e6:.4g} MMACs an image")
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(
                config, student, self.teacher, config.losses, config.optimizer, config.run.epochs,
                self.splits, Path(folder), seed=config.run.seeds[0], title="dry run",
                runtime=self.runtime, save_model=lambda *_: None,
            )  # fmt: skip
            seconds = trainer.seconds_per_step()
        runs = len(config.run.seeds)
        compared = ", and as often without the teacher" if "baseline" in self._roles() else ""
        if config.teacher.epochs:
            compared += "; the teacher's own training is not counted"
        self._say(
            f"a step: {seconds:.3g} s; {trainer.total:,} steps for each of {runs} seeds: "
            f"{seconds * trainer.total * runs / 3600:.2g} h{compared}"
        )
        need = trainer.disk * runs * len(self._roles())
        free = checkpoint.free(self.folder)
        self._say(f"disk: {need / 1e6:,.0f} MB at most in {self.folder}, {free / 1e6:,.0f} MB free")
        return {}

    def _roles(self) -> dict[str, tuple[nn.Module | None, Losses]]:
        """What each seed trains: the teacher it learns from, and its losses."""
        roles: dict[str, tuple[nn.Module | None, Losses]] = {}
        if self.config.run.baseline and self.teacher:
            roles["baseline"] = None, self.config.losses.baseline()
        roles[self.role] = self.teacher, self.config.losses
        return roles

    def _engines(self, trained: dict[int, nn.Module]) -> list[int8.Session]:
        """The students in the int8 engine, of the same files on every rank; [] where it cannot."""
        files: list[bytes] = []
        if self.runtime.rank == 0:
            try:
                images = quantized.calibration_images(
                    self.config, self.splits.train, self.runtime.ranks
                )
                files = [
                    quantized.save(
                        self._int8_file(seed),
                        model,
                        images,
                        pixels=self._pixels(model),
                        classes=self.classes,
                        calibration=self.config.int8.calibration,
                    )
                    for seed, model in trained.items()
                ]
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
    ) -> dict[str, Any]:
        config, seeds = self.config, self.config.run.seeds
        rows = []
        if self.teacher:
            file = self.folder / "teacher" / "last.safetensors"
            scored = evaluations["teacher"]
            rows.append(self._row("teacher", config.teacher, self.teacher, file, scored, [0]))
        for role, trained in students.items():
            file = self.folder / f"{role}-{seeds[0]}" / "last.safetensors"
            model, scored = trained[seeds[0]], evaluations[role]
            rows.append(self._row(role, config.student, model, file, scored, seeds))
        if engines:
            model, file = students[self.role][seeds[0]], self._int8_file(seeds[0])
            scored, engine = evaluations["int8"], engines[0]
            rows.append(self._row("int8", config.student, model, file, scored, seeds, engine))
        comparison = results.compare(evaluations)
        first, val = evaluations[self.role][0], self.splits.val
        shows = hasattr(val, "read") and self.runtime.ranks == 1  # each rank saw its own images
        return {
            "version": report.VERSION,
            "title": self.folder.name,
            "config": config.model_dump(),
            "environment": {
                "vitkd_fast": version("vitkd-fast"),
                "torch": torch.__version__,
                "timm": version("timm"),
                "device": results.device_name(self.runtime),
            },
            "data": {
                "train": sources.count(self.splits.train),
                "val": int(first.confusion.sum()),
                "classes": self.classes,
            },
            "models": rows,
            "comparison": comparison,
            "verdict": results.verdict(
                comparison, config.run.baseline and self.teacher is not None
            ),
            "curves": results.curves(self._curve_folders(list(students))),
            "confusion": {"role": self.role, "seed": seeds[0], "matrix": first.confusion.tolist()},
            "int8_confusion": {
                "role": "int8",
                "seed": seeds[0],
                "matrix": evaluations["int8"][0].confusion.tolist(),
            }
            if engines
            else None,
            # of all seeds together
            "per_class": {
                role: evaluate.per_class(
                    torch.stack([one.confusion for one in scored]).sum(0), self.classes
                )
                for role, scored in evaluations.items()
            },
            "disagreements": results.disagreements(first, val, self.places) if shows else None,
            "notes": self._notes(),
        }

    def _predictor(self, model: nn.Module) -> nn.Module:
        return models.predictor(model).to(self.runtime.device).eval()

    def _evaluate(
        self,
        predictor: evaluate.Predictor,
        teacher: evaluate.Predictor | None,
        exact: evaluate.Evaluation | None = None,
    ) -> evaluate.Evaluation:
        """Scores on the validation images; `exact` is of the weights that were quantised."""
        loader = data.val_loader(self.config, self.splits)
        places = []

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for batch in loader.epoch():
                places.append(batch.indices.clone())  # a worker lends its memory
                yield batch.images, batch.labels

        result = evaluate.evaluate(
            predictor,
            batches(),
            classes=len(self.classes),
            device=self.runtime.device,
            teacher=teacher,
        )
        self.places = torch.cat(places)  # in the images, without those that cannot be read
        self.skipped |= loader.skipped
        if exact:
            same = (result.student == exact.student).double()
            counts = torch.stack([same.sum(), same.new_tensor(len(same))]).to(self.runtime.device)
            if dist.is_initialized():
                dist.all_reduce(counts)
            result.fidelity["unchanged"] = float(counts[0] / counts[1])
        return result

    def _row(
        self,
        role: str,
        section: Model,
        model: nn.Module,
        file: Path,
        scored: list[evaluate.Evaluation],
        seeds: list[int],
        engine: int8.Session | None = None,
    ) -> dict[str, Any]:
        """A model's line of the table: what it costs, in the engine or torch, and each score."""
        cost = evaluate.cost(
            evaluate.engine(engine) if engine else self._predictor(model),
            model,
            image_size=self.config.data.image_size,
            device="cpu" if engine else self.runtime.device,
            file=file if file.exists() else None,
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
        names = {
            f"{role}, seed {i}": f"{role}-{i}" for role in roles for i in self.config.run.seeds
        }
        if self.teacher and self.config.teacher.epochs:
            names = {"teacher, seed 0": "teacher"} | names
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
        if not section.val and section.dataset in ("", "digits"):
            notes.append(f"Validation: {section.holdout:.0%} of the images, kept from training.")
        return notes + self.notes


def _differing(found: Any, wanted: dict[str, Any]) -> list[str]:
    """The keys in which two configurations would train differently."""
    return [
        f"{name}.{key}"
        for name, section in wanted.items()
        for key, value in section.items()
        if key not in _MAY_CHANGE.get(name, ()) and (found.get(name) or {}).get(key) != value
    ]
