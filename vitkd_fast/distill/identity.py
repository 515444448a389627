"""Whether models and images belong together: classes, what a run was begun with, a teacher's score.

Teacher, student, a resumed run, `vitkd eval` and an int8 file are all compared here; the last two
where there may be no torch.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ..images import DataError
from . import sources

if TYPE_CHECKING:
    from .. import models
    from .config import Config

# validation images, evenly spread, for the teacher's top-1 before training
SCORED_IMAGES = 256


def class_indices(key: str, known: Sequence[str], given: Sequence[str]) -> dict[str, int]:
    """The index of each class of the images among a model's classes.

    Args:
        key: names the model in an error.
        known: the model's class names; the ids of WordNet count too where they are ImageNet's, and
            integers count as indices. Names 0, 1, ... match any names of as many classes, in their
            order.
        given: the images' class names, all or some of the model's, in their order.

    Raises:
        DataError: a class that the model does not have; names the difference.
    """
    numbers = [str(i) for i in range(len(known))]
    for names in _class_names(known):
        indices = {name: i for i, name in enumerate(names)}
        if indices.keys() >= set(given):
            return {name: indices[name] for name in given}
    if all(name.isdecimal() and int(name) < len(known) for name in given):
        return {name: int(name) for name in given}
    if list(known) == numbers and len(given) == len(known):
        return {name: i for i, name in enumerate(given)}
    raise DataError(f"{key}: {_difference(known, given)}")


def _class_names(known: Sequence[str]) -> list[list[str]]:
    if not find_spec("timm"):  # which knows WordNet's ids
        return [list(known)]
    from .. import models

    return models.class_names(known)


def check_classes(key: str, origin: models.Origin, given: Sequence[str]) -> None:
    """Raises DataError where a model's classes are known not to be the images', in their order.

    timm's names for ImageNet are one of many: only a file of ours must have the images'.
    """
    known = origin.classes or ()
    try:
        indices = class_indices(key, known, given)
    except DataError:
        if origin.weights.startswith(("file ", "checkpoint ")):
            raise
        return
    if list(indices.values()) != list(range(len(known))):
        raise DataError(
            f"{key}: its classes are the images' in another order: {_few(known)}, and "
            f"{_few(given)} in the images"
        )


def same_classes(origin: models.Origin, given: Sequence[str]) -> bool:
    """Whether a model's classes may be the images', in their order."""
    try:
        check_classes("", origin, given)
    except DataError:
        return False
    return True


def differences(key: str, origin: models.Origin, used: models.Pixels) -> list[str]:
    """What the images of a run are that a model's weights were not trained on; mean and std are
    the model's own."""
    own = origin.pixels
    pairs = [] if own is None else [
        (name, getattr(own, name), getattr(used, name))
        for name in ("image_size", "crop_pct", "interpolation")
    ]  # fmt: skip
    return [
        f"{key}: {origin} wants {name} {wanted}, and data.{name} is {given}"
        for name, wanted, given in pairs
        if wanted != given
    ]


def _difference(known: Sequence[str], given: Sequence[str]) -> str:
    theirs, ours = set(known), set(given)
    missing = [name for name in given if name not in theirs]
    unused = [name for name in known if name not in ours]
    return f"classes of the images that it lacks: {_few(missing)}; its others: {_few(unused)}"


def _few(names: Sequence[str], most: int = 10) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + more


def fingerprint(splits: sources.Splits) -> dict[str, Any]:
    """What tells a run's images from others: classes, counts, and the files' names below the root.

    The folder may move; the pixels are not read.
    """
    parts = {"train": splits.train, "val": splits.val}
    return {"classes": list(splits.classes)} | {k: _names(x) for k, x in parts.items()}


def _names(source: Any) -> dict[str, Any]:
    images = sources.count(source)
    if sources.streams(source):
        return {"images": images}
    names = [source.name(i) for i in range(len(source))]
    root = os.path.commonpath(names) if names and os.path.isabs(names[0]) else ""
    digest = hashlib.sha256("\n".join(name.removeprefix(root) for name in names).encode())
    return {"images": images, "names": digest.hexdigest()}


def probed_in_training(splits: sources.Splits, probe: sources.Splits | None) -> list[str]:
    """A sentence on images that the student sees, without their labels, and is then scored on."""
    parts = (splits.train, probe.val) if probe else ()
    names = [
        {os.path.realpath(x.name(i)) for i in range(len(x))}
        for x in parts
        if not sources.streams(x)
    ]
    if len(names) < 2 or not (both := names[0] & names[1]):
        return []
    return [
        f"data.probe: {len(both)} of the {len(names[1])} images that models are scored on are "
        "among those of training, which the student sees without their labels"
    ]


def check_resumed(begun: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises DataError unless a run goes on with the images it was begun with."""
    if begun["classes"] != now["classes"]:
        raise DataError(
            f"--resume: the run was begun with the classes {_few(begun['classes'])}; the images "
            f"have {_few(now['classes'])}"
        )
    if begun.get("cache") != now.get("cache"):
        raise DataError(
            "--resume: the run was begun with another teacher.cache, or with one alone: its "
            f"fingerprint was {begun.get('cache')}, and is {now.get('cache')} now"
        )
    for part in ("train", "val"):
        before, after = begun[part], now[part]
        if before != after:
            what = "files of other names"
            if before["images"] != after["images"]:
                what = f"{after['images']}"
            raise DataError(
                f"--resume: the run was begun with {before['images']} images in data.{part}, and "
                f"there are {what} now; order and schedule would not be the run's"
            )


def score(config: Config, predictor: Any, splits: sources.Splits, device: Any) -> tuple[int, int]:
    """How many of some validation images a predictor gets right, and of how many."""
    import torch

    from . import data, evaluate

    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    share = -(-SCORED_IMAGES // ranks)
    found = evaluate.evaluate(
        predictor,
        ((x.images, x.labels) for x in data.sample(config, splits.val, share, ranks)),
        classes=len(splits.classes),
        device=device,
    )
    images = int(found.confusion.sum())
    return round(found.metrics["top1"] * images), images


def score_labels(config: Config, predictor: Any, splits: sources.Splits, device: Any) -> Any:
    """A predictor's mean average precision on some validation images, chance's, and how many."""
    import torch

    from . import data, multilabel

    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    share = -(-SCORED_IMAGES // ranks)
    found = multilabel.evaluate(
        predictor,
        ((x.images, x.labels) for x in data.sample(config, splits.val, share, ranks)),
        classes=len(splits.classes),
        device=device,
    )
    images = int(found.confusion[0].sum())
    return found.metrics["map"], multilabel.chance(found.confusion), images


def is_no_teacher(right: int, images: int, classes: int) -> bool:
    """Whether a top-1 of chance + 10% of what is left above it can be ruled out (p < 0.05)."""
    import scipy.stats  # type: ignore[import-untyped]

    least = 1 / classes + 0.1 * (1 - 1 / classes)
    return bool(scipy.stats.binom.cdf(right, images, least) < 0.05)


def count_classes(labels: Iterable[int], classes: Sequence[str]) -> str:
    """The classes with their counts, as text."""
    counts = Counter(labels)
    pairs = [f"{name} ({counts[i]})" for i, name in enumerate(classes)]
    return _few(pairs, 20)
