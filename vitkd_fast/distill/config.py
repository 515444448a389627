"""A run's configuration: typed sections, YAML recipes, `key=value` overrides, errors that help."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, Field, ValidationError, model_validator

from .._files import home
from ..int8.calibrate import Calibration
from .losses import Losses, Section, Term
from .yaml_core import Loader

PathText = Annotated[str, AfterValidator(home)]
_RENAMED = {"run.alone": "run.baseline", "int8.pictures": "int8.calibration_images"}  # in 0.2
Positive = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the key."""

    exit_code = 2  # of the command line: wrong usage


class Data(Section):
    """The images. With no `val`, `holdout` of the training images are kept for validation."""

    # "" for a folder of class folders; "digits"; timm's torch/..., hfds/..., wds/...
    dataset: str = ""
    root: PathText = ""  # folder of a named dataset; train and val are then its splits
    train: PathText = ""  # a folder of class folders, or a file of `vitkd pack`
    val: PathText = ""  # another; without it, see holdout
    # further training images, which have no labels, wherever they lie in a folder, or in a file of
    # `vitkd pack`: the teacher's outputs count there, and losses of labels leave them out
    extra: PathText = ""
    # no classes: train and val are folders with images, or a data set whose labels are not read
    unlabelled: bool = False
    # with unlabelled: "digits" or a folder of class folders, small, on which k-NN and a linear
    # classifier judge the features
    probe: PathText = ""
    probe_val: PathText = ""  # another, to score on; without it, see holdout
    # of images with several labels each: a .csv or .json file in the folders train and val
    labels: str = ""
    holdout: float = Field(0.1, gt=0, lt=1)  # share of the training images
    image_size: int = Field(224, ge=8)  # side of the square that both models read
    crop_pct: float = Field(0.875, gt=0, le=1)  # of the resized image, in validation
    interpolation: Literal["bilinear", "bicubic", "nearest"] = "bicubic"  # of the resize
    batch_size: int = Field(128, ge=1)  # per process
    workers: int = Field(4, ge=0)  # processes that decode images; 0: the training process does
    skip_bad: bool = False  # go on without files that cannot be read, and count them


class Model(Section):
    """A timm name or hf-hub:org/name, and where its weights come from."""

    model: PathText = ""  # the name
    pretrained: bool = False  # timm's weights
    checkpoint: PathText = ""  # a file of weights instead
    options: dict[str, Any] = Field({})  # further arguments of timm.create_model


class Student(Model):
    """The student; what is left of it after pruning is trained."""

    # share of each layer's channels, at least, that go before the training, those with the smallest
    # weights: name the weights of a trained student; the extra `prune` does it
    prune: float = Field(0.0, ge=0, lt=1)


class Branch(Section):
    """Specialists on some of the classes each, merged into the student before it is trained.

    Each begins with the weights of one trunk, and all have the run's losses and learning rate. The
    student begins with the mean of their weights, and is then trained on all classes.
    """

    # how many groups of neighbouring classes, or the names of the classes of each group
    groups: Annotated[int, Field(ge=2)] | list[list[str]] = 2
    trunk: int = Field(1, ge=1)  # epochs on all classes, before the specialists
    epochs: int = Field(1, ge=1)  # of each specialist, on its classes' images


class Optimizer(Section):
    """timm's optimisers and schedules; the learning rate is that of an update, not of an image."""

    name: str = "adamw"  # timm's
    lr: float = Field(1e-3, gt=0)  # the highest
    weight_decay: float = Field(0.05, ge=0)
    options: dict[str, Any] = Field({})  # further arguments, such as momentum
    # after the warm-up; wsd is constant, and at the end falls by 1 - sqrt(share of the cooldown)
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    cooldown: float = Field(0.2, gt=0, lt=1)  # the share of the run in which wsd falls
    warmup_epochs: float = Field(0, ge=0)  # from warmup_lr to lr, linearly
    warmup_lr: float = Field(1e-6, ge=0)  # of the first update
    min_lr: float = Field(0.0, ge=0)  # at the end of cosine and wsd
    clip_grad: float | None = Field(None, gt=0)  # the gradient's largest norm
    accumulate: int = Field(1, ge=1)  # batches per update
    ema_decay: float = Field(0.0, ge=0, lt=1)  # 0: no moving average of the weights


class Teacher(Model):
    """The teacher; `model` may be a file that `vitkd distill` wrote.

    With `epochs`, it is trained on the labels first. A list stands for several teachers: their
    logits are averaged, and features have a term of each, by its weight.
    """

    weight: float = Field(1.0, gt=0)  # among several teachers; they are divided by their sum
    # side of the square that it reads, to which the student's images are resized (bicubic);
    # data.image_size, unless given
    image_size: int | None = Field(None, ge=8)
    epochs: int = Field(0, ge=0)  # of training the teacher; 0: it is trained already
    # a folder of `vitkd cache`: what this teacher said of the images, which is not asked again;
    # augmentation is then the cache's, and its epochs come again after the last
    cache: PathText = ""
    optimizer: Optimizer | None = None  # the student's, where there is none


class Augmentation(Section):
    """timm's transforms, and its mixup and cutmix; teacher and student see the same image."""

    scale: list[Positive] = Field([0.08, 1.0], min_length=2, max_length=2)  # of the area
    ratio: list[Positive] = Field([3 / 4, 4 / 3], min_length=2, max_length=2)  # width / height
    hflip: float = Field(0.5, ge=0, le=1)  # probability of a horizontal flip
    color_jitter: float = Field(0.0, ge=0)  # strength
    # probability of a rectangle, 2% to a third of the image, in ImageNet's mean colour
    erasing: float = Field(0.0, ge=0, le=1)
    auto_augment: str = ""  # timm's, such as rand-m9-mstd0.5
    mixup: float = Field(0.0, ge=0)  # alpha of the Beta distribution; 0: off
    cutmix: float = Field(0.0, ge=0)  # likewise
    mix_prob: float = Field(1.0, ge=0, le=1)  # of mixing at all
    switch_prob: float = Field(0.5, ge=0, le=1)  # of cutmix, where both are on
    mix_mode: Literal["batch", "pair", "elem"] = "batch"  # what shares a lambda

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0


class Aware(Section):
    """Quantisation-aware training: a copy of the student that goes on in the engine's arithmetic.

    It branches off the float student's run, which goes on to its end, and sees the same images.
    """

    # the share of the run from which on it trains so; 0: from student.checkpoint's weights on, and
    # there is no float training
    start: float = Field(0.7, ge=0, lt=1)
    learn_ranges: bool = True  # train the steps of maps and weights, and zero points
    # share from which on batch norms keep statistics; ranges are found again right before
    freeze_bn: float = Field(0.85, ge=0, le=1)
    # who teaches it: the run's teachers, the float student of the end of its run, or both, of which
    # the float student is one more teacher of weight 1
    teacher: Literal["teacher", "float", "both"] = "teacher"


class Int8(Section):
    """The student for the int8 engine: last.int8.safetensors in each seed's folder, and a row."""

    enabled: bool = True  # quantize the distilled student
    calibration: Calibration = "mse"  # how ranges of maps are found
    calibration_images: int = Field(
        256, ge=1
    )  # of training, without augmentation, for the maps' ranges
    aware: Aware | None = None  # also a student trained for int8, and its row
    # every so many epochs the student is quantized as it is, and its agreement with itself in
    # float32 and the SQNR of its logits are logged; 0: never
    watch: int = Field(0, ge=0)
    watch_images: int = Field(64, ge=1)  # of training to calibrate on, of validation to judge by


class Run(Section):
    """Length, device and output of a run."""

    folder: PathText = "runs/distill"  # where results go; one run each
    epochs: int = Field(300, ge=1)  # of the student
    max_steps: int | None = Field(None, ge=1)  # the end after so many updates, schedules included
    seeds: list[Seed] = Field([0], min_length=1)  # a student each
    baseline: bool = True  # also train the student without its teacher, and compare
    device: str = ""  # "": the GPU where there is one
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of autocast
    channels_last: bool = True  # memory format of convolutions
    compile: bool = False  # torch.compile
    threads: int | None = Field(None, ge=1)  # of a CPU, per process; unset: what is fastest
    log_every: int = Field(50, ge=1)  # steps
    eval_every: int = Field(1, ge=1)  # epochs
    save_every: int | None = Field(None, ge=1)  # steps; also saved at the end of every epoch


class Config(Section):
    """The configuration of a run; the recipes are complete examples."""

    data: Data = Data()
    teacher: Teacher = Teacher()
    teachers: list[Teacher] = Field([])  # several; `teacher` may be a list instead
    # of several teachers' logits: the mean of probabilities, or of their logarithms
    teacher_average: Literal["probability", "log"] = "probability"
    student: Student = Student()
    losses: Losses = Losses()
    branch: Branch | None = None  # merge specialists into the student first
    optimizer: Optimizer = Optimizer()
    augmentation: Augmentation = Augmentation()
    int8: Int8 = Int8()
    run: Run = Run()

    @property
    def given(self) -> bool:
        """Whether the float student is a given one, which this run trains for int8 alone."""
        return self.int8.aware is not None and not self.int8.aware.start

    @property
    def headless(self) -> bool:
        """Whether no model has a classifier: there are no labels, and no student that has one."""
        return self.data.unlabelled and not self.given

    def for_baseline(self) -> Config:
        """The student's training without its teacher, on the labels."""
        data = self.data.model_copy(update={"extra": ""})
        return self.model_copy(update={"losses": self.losses.baseline(), "data": data})

    def all_teachers(self) -> dict[str, Teacher]:
        """By name: "teacher", or of several "teacher-0" and so on."""
        if self.teacher.model:
            return {"teacher": self.teacher}
        return {f"teacher-{i}": teacher for i, teacher in enumerate(self.teachers)}

    def why_uncached(self) -> str:
        """Why what a teacher says of these images cannot be kept in a cache; "" if it can."""
        mixed = "mixup" if self.augmentation.mixup else "cutmix"
        teachers = list(self.all_teachers().values())
        if self.augmentation.mixes:
            return (
                f"augmentation.{mixed}: expected 0, as it mixes the images of a batch, and a cache "
                "holds what the teacher said of each image alone"
            )
        if self.data.unlabelled:
            return (
                "data.unlabelled: expected false, as validation without labels compares with the "
                "teacher, and a cache is of the training images"
            )
        if len(teachers) > 1:
            return "teachers: expected one, as a cache is of one teacher"
        if teachers and teachers[0].epochs:
            return (
                "teacher.epochs: expected 0, as a cache is of a trained teacher; a run of `vitkd "
                "distill` leaves it in teacher/last.safetensors: teacher={model: FILE}"
            )
        return ""

    def for_teacher(self, teacher: Teacher) -> Config:
        """A teacher's own training, on the labels, with its optimizer and epochs."""
        epochs = {"epochs": teacher.epochs}
        alone = self.for_baseline()
        return alone.model_copy(
            update={
                "losses": alone.losses.without("kure"),
                "optimizer": teacher.optimizer or self.optimizer,
                "int8": self.int8.model_copy(update={"watch": 0}),
                "run": self.run.model_copy(update=epochs),
            }
        )

    @model_validator(mode="before")
    @classmethod
    def _default_losses(cls, tree: Any) -> Any:
        """Without `losses`: kd at temperature 4 with a teacher, else the cross-entropy."""
        if not isinstance(tree, dict):
            return tree
        teacher = tree.get("teacher")
        if isinstance(teacher, list) and not tree.get("teachers"):
            tree = {**tree, "teacher": {}, "teachers": teacher}
            if len(teacher) == 1:
                tree |= {"teacher": teacher[0], "teachers": []}
        if "losses" in tree:
            return tree
        teacher = tree["teacher"] if "teacher" in tree else None
        distilled = (isinstance(teacher, dict) and teacher.get("model")) or tree.get("teachers")
        data, aware = tree.get("data"), (tree.get("int8") or {}).get("aware") or {}
        if aware.get("start") == 0:
            distilled = distilled or aware.get("teacher") == "float"
        elif isinstance(data, dict) and data.get("unlabelled"):
            return {**tree, "losses": {"features": {}}}
        if isinstance(data, dict) and data.get("labels"):
            return {
                **tree,
                "losses": {"binary_kd": {"bce_weight": 1.0}} if distilled else {"bce": {}},
            }
        return {**tree, "losses": {"kd": {"temperature": 4.0}} if distilled else {"ce": {}}}

    @model_validator(mode="after")
    def _whole(self) -> Config:
        if not self.student.model:
            raise ConfigError("student.model: missing; name a timm model, such as mobilenetv2_100")
        if not list(self.losses.terms()):
            raise ConfigError(
                f"losses: expected one or more of {', '.join(Losses.model_fields)}, got none"
            )
        terms = dict(self.losses.terms())
        distil = [name for name, term in terms.items() if term.distils]
        teachers = self.all_teachers()
        if self.teacher.model and self.teachers:
            raise ConfigError("teachers: expected none beside teacher.model; put all into the list")
        for i, teacher in enumerate(self.teachers):
            if not teacher.model:
                raise ConfigError(f"teachers.{i}.model: missing")
        # a given student teaches itself
        float_ = self.given and self.int8.aware and self.int8.aware.teacher == "float"
        if bool(distil) != bool(teachers or float_):
            names = " and ".join(teacher.model for teacher in teachers.values())
            raise ConfigError(
                f"teacher.model: missing, and losses.{distil[0]} needs a teacher"
                if distil
                else f"teacher.model: {names} teaches nothing without losses.kd or another loss "
                "that compares with it"
            )
        if any(teacher.cache for teacher in teachers.values()) and (why := self.why_uncached()):
            raise ConfigError(f"teacher.cache: {why}")
        if self.data.extra:
            self._check_extra(terms)
        if self.data.unlabelled:
            self._check_unlabelled(terms)
        elif self.data.probe:
            raise ConfigError("data.probe: has no meaning without data.unlabelled=true")
        elif not any(term.classifies for term in terms.values()):
            raise ConfigError(
                f"losses.{next(iter(terms))}: trains no classifier; add losses.kd or losses.ce"
            )
        for name, term in terms.items():
            if term.classifies and term.independent != bool(self.data.labels):
                one, several = "losses.kd or losses.ce", "losses.binary_kd or losses.bce"
                raise ConfigError(
                    f"losses.{name}: is of images with one class each, and data.labels gives them "
                    f"several labels: use {several}"
                    if self.data.labels
                    else f"losses.{name}: is of images with several labels, and data.labels is "
                    f"missing: name their file, or use {one}"
                )
        if self.data.labels and not (self.data.train and not self.data.dataset):
            raise ConfigError("data.labels: expected a folder data.train and no data.dataset")
        for name, teacher in teachers.items():
            if Path(teacher.model).is_file() and (
                teacher.pretrained or teacher.checkpoint or teacher.options or teacher.epochs
            ):
                raise ConfigError(
                    f"{name}.model: {teacher.model} is a file, with which pretrained, checkpoint, "
                    "options and epochs have no meaning"
                )
        for key in ("unlabelled", "labels", "extra"):
            if self.branch and getattr(self.data, key):
                raise ConfigError(f"branch: needs one class for each image, and data.{key} has not")
        if self.branch and self.given:
            raise ConfigError(
                "branch: expected none with int8.aware.start=0, whose student is given"
            )
        if self.int8.aware:
            self._check_aware(self.int8.aware)
        if self.int8.watch and self.headless:
            raise ConfigError(
                "int8.watch: needs a student with a classifier, which data.unlabelled=true has not"
            )
        if self.data.probe_val and not self.data.probe:
            raise ConfigError("data.probe: missing, and data.probe_val is the other part of it")
        if len(set(self.run.seeds)) < len(self.run.seeds):
            raise ConfigError(f"run.seeds: {self.run.seeds} names a seed twice")
        if not (self.data.train or self.data.dataset):
            what = "images" if self.data.unlabelled else "a folder for each class"
            raise ConfigError(f"data.train: missing; name a folder with {what}")
        if self.augmentation.mixes and self.data.batch_size % 2:
            raise ConfigError(
                f"data.batch_size: {self.data.batch_size} is odd, and mixing pairs the images"
            )
        return self

    def _check_aware(self, aware: Aware) -> None:
        if not self.int8.enabled:
            raise ConfigError("int8.enabled: expected true with int8.aware, got false")
        if self.data.unlabelled and aware.start:
            raise ConfigError(
                "int8.aware: needs a student with a classifier: expected start 0, and the weights "
                f"of one, with data.unlabelled=true, got start {aware.start:g}"
            )
        if not aware.start and not (self.student.checkpoint or self.student.pretrained):
            raise ConfigError(
                "int8.aware.start: expected more than 0, or the weights of a trained student in "
                "student.checkpoint, got 0 and none"
            )
        if aware.teacher != "teacher" and not any(term.distils for _, term in self.losses.terms()):
            raise ConfigError(
                "int8.aware.teacher: expected teacher without losses that compare with one, got "
                f"{aware.teacher}"
            )
        if aware.teacher == "both" and any(x.cache for x in self.all_teachers().values()):
            raise ConfigError(
                "int8.aware.teacher: expected teacher or float with teacher.cache, got both"
            )

    def _check_unlabelled(self, terms: dict[str, Term]) -> None:
        if self.data.labels:
            raise ConfigError("data.labels: expected none with data.unlabelled=true")
        for name, term in terms.items():
            of_labels = "is of labels" if term.classifies and not term.distils else ""
            if self.given and (why := term.why_labels() or of_labels):
                raise ConfigError(f"losses.{name}: {why}, and data.unlabelled has none")
            if term.classifies and not self.given:
                raise ConfigError(
                    f"losses.{name}: is of classes, and data.unlabelled has none; use "
                    "losses.features or another loss of features"
                )
        for name, teacher in self.all_teachers().items():
            if teacher.epochs:
                raise ConfigError(
                    f"{name}.epochs: expected 0, as data.unlabelled has no labels to train on, "
                    f"got {teacher.epochs}"
                )
        if self.given and self.data.probe:
            raise ConfigError(
                "data.probe: expected none with int8.aware.start=0, whose student has a classifier"
            )

    def _check_extra(self, terms: dict[str, Term]) -> None:
        for name in ("unlabelled", "labels"):
            if getattr(self.data, name):
                raise ConfigError(f"data.extra: expected none with data.{name}")
        for name, term in terms.items():
            if why := term.why_labels():
                raise ConfigError(f"losses.{name}: {why}, and the images of data.extra have none")
        if not any(term.distils for term in terms.values()):
            raise ConfigError("data.extra: nothing learns from images without labels but a teacher")


def recipes() -> list[str]:
    """The names of the recipes that ship with the package."""
    folder = resources.files("vitkd_fast") / "recipes"
    return sorted(file.name[:-5] for file in folder.iterdir() if file.name.endswith(".yaml"))


def about(recipe: str) -> str:
    """A recipe's teacher, student, losses and length, in a line."""
    tree = _read(recipe)
    teacher = tree["teacher"]["model"] if "teacher" in tree else "a trained student"
    return (
        f"{teacher} -> {tree['student']['model']}; losses: "
        f"{', '.join(tree['losses'])}; {tree['run']['epochs']} epochs"
    )


def load(source: str | Path | None, overrides: Iterable[str] = ()) -> Config:
    """The configuration of a recipe's name or a YAML file, with `key=value` put over it.

    Args:
        source: a name out of `recipes()`, a path ending in .yaml or .yml, or None: the defaults.
        overrides: such as "optimizer.lr=1e-3" or "losses.kd={temperature: 4}"; a value is YAML.

    Raises:
        ConfigError: naming the key, what was given, and the nearest valid key.
    """
    tree = {} if source is None else _read(str(source))
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"override: expected key=value, got {override!r}")
        *path, last = key.split(".")
        section = tree
        for part in path:
            # a section that is missing or null is replaced by an empty one
            section[part] = section[part] if section.get(part) is not None else {}
            section = section[part]
            if not isinstance(section, dict):
                raise ConfigError(
                    f"{key}: expected a section {part}, got a {type(section).__name__}"
                )
        section[last] = parse(value, key)
    return validate(tree)


def _read(name: str) -> dict[str, Any]:
    if name.endswith((".yaml", ".yml")):
        try:
            text = Path(home(name)).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{name}: cannot be read: {error}") from error
    elif name in recipes():
        text = (resources.files("vitkd_fast") / "recipes" / f"{name}.yaml").read_text()
    else:
        raise ConfigError(
            f"expected a .yaml file or a recipe ({', '.join(recipes())}), got {name}"
            + _nearest(name, recipes())
        )
    tree = parse(text, name)
    if not isinstance(tree, dict):
        raise ConfigError(f"{name}: expected a mapping, got a {type(tree).__name__}")
    return tree


def validate(tree: dict[str, Any]) -> Config:
    """The configuration in nested mappings, as YAML or `Config.model_dump` give them.

    Raises:
        ConfigError: naming every wrong key, what was given, and the nearest valid key.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("; ".join(map(_explain, error.errors()))) from None


def parse(text: str, name: str) -> Any:
    """A value, as YAML 1.2 reads it; ConfigError, with the key's name, where it is no YAML."""
    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a tag that its value does not fit
        raise ConfigError(f"{name}: no YAML: {' '.join(str(error).split())}") from error


def _nearest(word: str, words: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"; the nearest is {close[0]}" if close else ""


def _explain(error: Any) -> str:
    """One of pydantic's errors as `key: what is wrong`."""
    if isinstance(wrong := error.get("ctx", {}).get("error"), ConfigError):
        return str(wrong)
    *path, last = (str(part) for part in error["loc"])
    key = ".".join([*path, last])
    if (new := _RENAMED.get(key)) and error["type"] == "extra_forbidden":
        return f"{key}: it is called {new} now"
    if error["type"] != "extra_forbidden":
        given = f"{error['input']!r} ({type(error['input']).__name__})"
        quote = "; quote it: \"'...'\"" if error["type"] == "string_type" else ""
        # pydantic adds "or instance of" one of our classes
        return f"{key}: {given} given; {error['msg'].split(' or instance')[0].lower()}{quote}"
    # without the path, which would make all names alike; places in a list are no part of the key
    section = sections()[".".join(part for part in path if not part.isdecimal())]
    valid = {name: ".".join([*path, name]) for name in section.model_fields}
    if close := difflib.get_close_matches(last, valid, n=1, cutoff=0.5):
        return f"{key}: unknown key; the nearest is {valid[close[0]]}"
    return f"{key}: unknown key; expected one of {', '.join(valid.values())}"


@functools.cache
def sections() -> dict[str, type[Section]]:
    """Every section by its key, such as "losses.kd", in their order; Config itself is ""."""
    found: dict[str, type[Section]] = {}

    def walk(key: str, section: type[Section]) -> None:
        found[key] = section
        for name, field in section.model_fields.items():
            # annotations such as `KD | None` or `list[Teacher]` hold a section as an argument
            for kind in (field.annotation, *get_args(field.annotation)):
                if isinstance(kind, type) and issubclass(kind, Section):
                    walk(f"{key}.{name}".lstrip("."), kind)

    walk("", Config)
    return found


def differing(begun: dict[str, Any], config: Config) -> list[str]:
    """The keys, such as "data.image_size", in which a run's saved configuration is another."""
    keys, defaults = [], Config.model_construct().model_dump()
    for name, section in config.model_dump().items():
        before = begun.get(name, defaults[name])
        if isinstance(section, dict):
            # a key that a run began without had its default
            before = (defaults[name] or {}) | (before or {})
            keys += [f"{name}.{key}" for key, value in section.items() if before.get(key) != value]
        elif before != section:
            keys.append(name)
    return keys
