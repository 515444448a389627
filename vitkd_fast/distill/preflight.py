"""The models of a run, and the checks of models, losses and folder before any training."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from .. import models, pruning
from ..int8.lower import lower
from . import config as configuration
from . import data, identity, sources
from .cache import shared
from .cache.read import CachedTeacher
from .config import Config, ConfigError, Model, Student, Teacher
from .runtime import Runtime
from .task import Average, DistillationTask

# keys that may change when a run is resumed: paths and how things are computed
_MAY_CHANGE = {
    *("data.root", "data.train", "data.val", "data.extra", "data.workers", "data.skip_bad"),
    *("data.probe", "data.probe_val"),
    *("teacher.checkpoint", "teacher.cache"),
    *("int8.enabled", "int8.calibration", "int8.calibration_images"),
    *("int8.watch", "int8.watch_images"),
    *("run.folder", "run.device", "run.precision", "run.channels_last", "run.compile"),
    *("run.threads", "run.log_every", "run.eval_every", "run.save_every"),
    *("run.seeds", "run.baseline"),
}


def holds_run(config: Config, resume: bool) -> bool:
    """Whether the folder holds a run to resume: one that has saved weights.

    Raises:
        ConfigError: it holds a run, and this one does not resume it or trains differently.
    """
    folder = Path(config.run.folder)
    file = folder / "config.yaml"
    if not file.exists() or not any(folder.glob("*/*.safetensors")):
        return False
    if not resume:
        raise ConfigError(
            f"run.folder: {folder} holds a run; --resume goes on with it, or name another"
        )
    begun = yaml.safe_load(file.read_text())
    keys = [key for key in configuration.differing(begun, config) if key not in _MAY_CHANGE]
    if keys:
        raise ConfigError(f"--resume: {folder} was begun with another {', '.join(keys)}")
    return True


def pixels(config: Config, model: nn.Module) -> models.Pixels:
    """The model's own mean and std, and this run's size, crop and interpolation."""
    own, section = models.Pixels.of(model), config.data
    size = models.Origin.of(model).resized or section.image_size
    return models.Pixels(size, own.mean, own.std, section.interpolation, section.crop_pct)


def create_student(config: Config, classes: Sequence[str]) -> nn.Module:
    """The untrained student, with a new classifier if its weights are of other classes.

    Without labels it has none.
    """
    if config.headless:
        body = _create(config, config.student, 1, new_head=True)
        return models.headless(_pruned(config, body))
    student: Any = _create(config, config.student, len(classes), new_head=True)
    origin = models.Origin.of(student)
    if origin.classes and not identity.same_classes(origin, classes):
        student.reset_classifier(len(classes))
        origin = dataclasses.replace(
            origin, classes=None, new_head="new classifier: its classes are others"
        )
        student.origin = origin
    if not origin.trained:
        _start_small(student)
    return _pruned(config, student)


def _pruned(config: Config, student: nn.Module) -> nn.Module:
    """The student without the channels that are not to be trained; ConfigError where it cannot."""
    if not config.student.prune:
        return student
    try:
        return pruning.prune(student, config.student.prune, config.data.image_size)
    except ValueError as error:
        raise ConfigError(f"student.prune: {config.student.model}: {error}") from error


def own_classes(config: Config) -> list[str]:
    """The classes of a student that is trained already.

    Raises:
        ConfigError: it does not name them, or has several labels for an image.
    """
    student: Any
    if config.student.checkpoint:
        try:
            student = models.load(config.student.checkpoint).model
        except ValueError as error:
            raise ConfigError(
                "student.checkpoint: expected a file of `vitkd distill`, which names its classes, "
                f"with data.unlabelled=true: {error}"
            ) from error
    else:
        student = _create(config, config.student, None, new_head=False)
    origin = models.Origin.of(student)
    if origin.multilabel:
        raise ConfigError(
            f"student.checkpoint: {origin} was trained on several labels for each image, and "
            "data.unlabelled=true is of students with one class for each"
        )
    return list(origin.classes or map(str, range(student.num_classes)))


def _start_small(model: Any) -> None:
    """Gives a random classifier torch's own initial weights where the model's are larger.

    timm draws a MobileNet's within 1 / sqrt(classes): with 10 classes, logits that begin at 5 and a
    loss that takes hundreds of steps to come down to that of guessing.
    """
    heads = model.get_classifier()
    for layer in heads if isinstance(heads, tuple) else (heads,):
        if isinstance(layer, nn.Linear) and layer.weight.std() > layer.in_features**-0.5:
            layer.reset_parameters()


def create_teachers(config: Config, classes: Sequence[str]) -> list[nn.Module]:
    """The teachers, each with weights for these classes unless its epochs train it.

    Raises:
        ConfigError, DataError: the weights of one are random, or of other classes.
    """
    teachers = []
    for key, section in config.all_teachers().items():
        teacher: Any = _create_teacher(key, config, section, classes)
        if section.image_size:
            origin = models.Origin.of(teacher)
            teacher.origin = dataclasses.replace(origin, resized=section.image_size)
        teachers.append(teacher)
    return teachers


def _create_teacher(key: str, config: Config, section: Teacher, names: Sequence[str]) -> nn.Module:
    classes = len(names)
    data.seed_all(0)
    if Path(section.model).is_file():
        teacher = models.load(section.model).model
    elif config.headless:
        # of any classes, or without a classifier, as self-supervised teachers are
        teacher = _create(config, section, 1, new_head=True)
    else:
        # weights of timm's keep timm's classes, so that a mismatch is seen
        own = section.options.get("num_classes", classes if section.checkpoint else None)
        teacher = _create(
            config, section, classes if section.epochs else own, new_head=section.epochs > 0
        )
    if section.epochs:
        if not models.Origin.of(teacher).trained:
            _start_small(teacher)
        return teacher
    if config.headless:
        teacher = models.headless(teacher)
    origin = models.Origin.of(teacher)
    if not origin.trained:
        raise ConfigError(
            f"{key}.model: {section.model} would teach with random weights ({origin}); "
            "name its weights by teacher.checkpoint or teacher.pretrained=true, or train "
            "it first by teacher.epochs"
        )
    if config.headless:
        return teacher
    if (found := getattr(teacher, "num_classes", classes)) != classes:
        raise ConfigError(
            f"{key}.model: {section.model} has {found} classes, and the images have "
            f"{classes}; name one trained on them, or let teacher.epochs train it first"
        )
    if origin.classes:
        identity.check_classes(f"{key}.model: {origin}", origin, names)
    ours = origin.weights.startswith(("file ", "checkpoint ")) and origin.classes
    if ours and origin.multilabel != bool(config.data.labels):
        one, several = "one class for each image", "several labels for each image"
        theirs, images = (several, one) if origin.multilabel else (one, several)
        raise ConfigError(f"{key}.model: {origin} was trained on {theirs}; there is {images} here")
    return teacher


def open_cache(config: Config, splits: sources.Splits) -> tuple[CachedTeacher | None, list[str]]:
    """The teacher's outputs that `teacher.cache` names, and sentences on what was not compared.

    Raises:
        CacheError: it is not complete, or of another teacher, other images or augmentation.
        ConfigError: a loss needs what it lacks.
    """
    if not config.teacher.cache:
        return None, []
    cache = CachedTeacher(config.teacher.cache)
    teacher = teacher_at_hand(config, splits.classes)
    shared.check(cache.plan, config.teacher.cache, config, splits, teacher)
    for name, term in config.losses.terms():
        if not term.distils:
            continue
        if lacking := cache.lacks(term.taps()[1]):
            raise ConfigError(f"losses.{name}: {config.teacher.cache} lacks {lacking}")
        record = cache.plan.record
        if not cache.dense and (why := term.why_dense(record["temperatures"])):
            raise ConfigError(
                f"losses.{name}: {why}; {config.teacher.cache} holds {record['topk']} of "
                f"{record['classes']} classes"
            )
    plan = cache.plan
    note = (
        f"The teacher was asked before: {plan.record['topk']} of {plan.record['classes']} classes, "
        f"{plan.epochs} epochs of augmentations."
    )
    if teacher is not None:
        return cache, [note]
    return cache, [
        note,
        f"teacher.cache: the weights of {config.teacher.model} are not here: they were not "
        "compared with the cache's, and the teacher has no row",
    ]


def teacher_at_hand(config: Config, classes: Sequence[str]) -> nn.Module | None:
    """The teacher of a cache, where its weights can be loaded."""
    try:
        [teacher] = create_teachers(config, classes)
    except (ValueError, FileNotFoundError):
        return None
    return teacher


def rebuilding(section: Model, model: nn.Module) -> Model:
    """A section that makes the same model with other weights, without a file of its weights.

    But for one that was pruned before this run: its file alone knows the widths.
    """
    options = {**models.Origin.of(model).options, **section.options}
    share = section.prune if isinstance(section, Student) else 0.0
    known = models.Origin.of(model).pruned and not share
    checkpoint = section.checkpoint if known else ""
    return Student(model=section.model, options=options, prune=share, checkpoint=checkpoint)


def _image_size(config: Config, section: Model) -> int:
    own = section.image_size if isinstance(section, Teacher) else None
    return own or config.data.image_size


def _create(
    config: Config, section: Model, num_classes: int | None, *, new_head: bool
) -> nn.Module:
    options = {k: v for k, v in section.options.items() if k != "num_classes"}
    return models.create(
        section.model,
        num_classes=num_classes,
        pretrained=section.pretrained,
        checkpoint=section.checkpoint,
        new_head=new_head,
        image_size=None if "img_size" in options else _image_size(config, section),
        options=options,
    )


def check_image(name: str, config: Config, model: nn.Module) -> None:
    """Shows the model one image of the run's size; ConfigError where it cannot read it."""
    try:
        with torch.inference_mode():
            models.predictor(model).eval()(_image(config))
    except (AssertionError, RuntimeError, ValueError) as error:
        why = " ".join(str(error).split())
        resized = models.Origin.of(model).resized
        size = (
            f"{name}.image_size {resized}"
            if resized
            else f"data.image_size {config.data.image_size}"
        )
        raise ConfigError(f"{name}.model: cannot read images of {size}: {why}") from error


def check_aware(
    config: Config,
    student: nn.Module,
    teachers: Sequence[nn.Module],
    cache: CachedTeacher | None,
    learned: dict[str, torch.Size],
) -> None:
    """ConfigError where the student cannot be trained for int8, or not by who is to teach it.

    learned is of `check_losses`, of the float student's training.
    """
    assert config.int8.aware
    try:
        lower(copy.deepcopy(student).eval(), config.data.image_size)
    except ValueError as error:
        raise ConfigError(
            f"int8.aware: {config.student.model} cannot run in int8: {error}"
        ) from error
    by = config.int8.aware.teacher
    lesson, everyone = aware_lesson(config, teachers, copy.deepcopy(student))
    try:
        found = check_losses(lesson, student, everyone, cache if by == "teacher" else None)
    except ConfigError as error:
        raise ConfigError(f"int8.aware.teacher: {by}: {error}") from error
    if config.int8.aware.start and found != learned:
        # the branch has those of other teachers
        raise ConfigError(
            "int8.aware.teacher: expected teacher, as the losses learn layers beside the student "
            f"that depend on who teaches, got {by}"
        )


def aware_lesson(
    config: Config, teachers: Sequence[nn.Module], student: nn.Module
) -> tuple[Config, list[nn.Module]]:
    """Configuration and teachers of a student that is trained for int8.

    teachers are the run's, student is the float one, of which `int8.aware.teacher` chooses.
    """
    assert config.int8.aware
    by, sections = config.int8.aware.teacher, list(config.all_teachers().values())
    update: dict[str, Any] = {
        "losses": config.losses.without("kure"),  # what rounding costs is in the loss already
        "run": config.run.model_copy(update={"compile": False}),
        "int8": config.int8.model_copy(update={"watch": 0}),
    }
    if by == "teacher":
        return config.model_copy(update=update), list(teachers)
    sections = [*(sections if by == "both" else []), Teacher(model=config.student.model)]
    everyone = [*(teachers if by == "both" else []), student]
    update |= {"teacher": Teacher(), "teachers": sections}
    return config.model_copy(update=update), everyone


def check_batch(name: str, config: Config, model: nn.Module) -> list[str]:
    """Warnings on the training of a model; ConfigError where its batches are too small."""
    if config.data.batch_size == 1:
        trained = models.predictor(copy.deepcopy(model).train())
        try:
            with torch.no_grad():
                trained(_image(config))
        except ValueError as error:  # a batch norm without a second value
            raise ConfigError(
                f"data.batch_size: expected 2 or more for the batch norms of {name}.model, got 1"
            ) from error
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if (momentum := max((m.momentum or 0.0 for m in norms), default=0.0)) > 0.5:
        return [
            f"{name}.model: its batch norms have momentum {momentum:g}, so that their running "
            "statistics are the last batch's; usual is 0.1"
        ]
    return []


def check_losses(
    config: Config,
    student: nn.Module,
    teachers: Sequence[nn.Module],
    cache: CachedTeacher | None = None,
) -> dict[str, torch.Size]:
    """The shapes of what the losses learn beside the student.

    Raises:
        ConfigError: the losses need what student or a teacher do not have.
    """
    predictors = [models.predictor(teacher).eval() for teacher in teachers]
    cpu = Runtime(torch.device("cpu"))
    try:
        task = DistillationTask(
            config.losses,
            models.predictor(student),
            predictors,
            cpu,
            config.data.image_size,
            Average.of(config),
            cache,
        ).eval()
        with torch.no_grad():
            classes = task.student(_image(config).float()).shape[1:]
            several = torch.zeros(1, *classes)
            labels = several if config.data.labels else several[:, 0].long()
            task(_image(config), labels, teachers=[cache.example()] if cache else None)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"losses: {error}") from error
    learned: nn.Module = task.trainable_module.learned
    return {name: x.shape for name, x in learned.state_dict().items()}


def _image(config: Config) -> torch.Tensor:
    size = config.data.image_size
    return torch.zeros(1, 3, size, size, dtype=torch.uint8)
