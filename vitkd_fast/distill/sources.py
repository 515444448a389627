"""Opens what a configuration names: folders, digits, and timm's torch/..., hfds/... and wds/...

Folders need no torch, which `vitkd eval` of an int8 file goes without.
"""

from __future__ import annotations

import csv
import json
import os
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..images import EXTENSIONS, ending, find, is_above, is_image, is_ours, natural_key
from ..images import DataError as DataError
from .datasets import NO_LABEL, Digits, Folder, Joined, Labelled, Part, Timm, Unlabelled
from .pack import Pack, is_packed, open_pack, unknown_class

if TYPE_CHECKING:
    from .config import Data

# folders of splits: the given folder is above a data set
_SPLITS = {"train", "training", "val", "valid", "validation", "test"}


class Splits(NamedTuple):
    """Training and validation images; a dataset that streams is timm's, and has no indices."""

    train: Any  # Source, or an IterableDataset
    val: Any
    classes: list[str]
    skipped: list[str]  # what `skip_bad` left out: class folders without images, images outside
    notes: list[str]  # a sentence each on what is worth a look, such as ignored files


def open_data(config: Data, classes: int | None = None) -> Splits:
    """Opens the training and validation images that a configuration names.

    Args:
        config: with `dataset` empty, `train` and `val` are folders that hold one folder per class.
        classes: how many there are, for a dataset that does not say so itself.

    Raises:
        DataError: naming what is missing, empty or in both parts (with `skip_bad`, what belongs to
            no class is left out and listed).
    """
    if config.unlabelled:
        return _open_unlabelled(config)
    splits = _open_classes(config, classes)
    return _with_extra(splits, config) if config.extra else splits


def _open_classes(config: Data, classes: int | None) -> Splits:
    if config.dataset == "digits":
        return _hold_out(Digits(), config, [], [])
    if config.dataset:
        return _open_named(config, classes)
    if config.labels:
        return _open_labelled(config)
    train = _open_folder(config.train, "data.train", config.skip_bad, None)
    if len(train.source.classes) == 1:
        raise DataError(
            f"data.train: {config.train} expected to hold two or more classes, got one: "
            f"{train.source.classes[0]!r}"
        )
    if not config.val:
        return _hold_out(train.source, config, train.bad, train.notes)
    known = {name: i for i, name in enumerate(train.source.classes)}
    val = _open_folder(config.val, "data.val", config.skip_bad, known)
    _check_apart(train.real, val.real)
    absent = _absent(labels(val.source) or (), train.source.classes, "data.val")
    notes = train.notes + val.notes + absent
    return Splits(train.source, val.source, train.source.classes, train.bad + val.bad, notes)


def _real(source: Folder | Labelled | Pack) -> Iterable[str]:
    """The real path of each image."""
    if isinstance(source, Pack):
        return [f"{os.path.realpath(source.path)}/{name}" for name in source.names]
    return [os.path.realpath(file) for file in source.files]


def _check_apart(train: Iterable[str], val: Iterable[str]) -> None:
    if both := set(train) & (every := set(val)):
        raise DataError(
            f"data.val: {len(both)} of its {len(every)} images are in data.train too, such as "
            f"{min(both)}; without data.val, data.holdout keeps some from training"
        )


def _open_unlabelled(config: Data) -> Splits:
    """The images of folders, wherever they lie there, or of a data set, without labels."""
    if config.dataset:
        # the parts are those of the labelled data, so that a probe's are not trained on
        labelled = open_data(config.model_copy(update={"unlabelled": False}), classes=1)
        train, val = (
            part if streams(part) else Unlabelled(part) for part in (labelled.train, labelled.val)
        )
        return Splits(train, val, [], labelled.skipped, [])
    notes: list[str] = []
    keys = ("train", "val") if config.val else ("train",)
    opened = [_images(getattr(config, key), f"data.{key}", notes) for key in keys]
    train, *others = opened
    if not others:
        return _hold_out(train, config, [], notes)
    _check_apart(_real(train), _real(others[0]))
    return Splits(train, others[0], [], [], notes)


def _images(path: str, key: str, notes: list[str]) -> Folder | Pack:
    """The images of a folder, wherever they lie in it, or of a packed file, without labels."""
    if is_packed(path):
        packed = Pack(path, key)
        return packed.labelled([NO_LABEL] * len(packed), [])
    if not os.path.isdir(path):
        raise DataError(f"{key}: {path} is no folder")
    found = find(path)
    if not found.files:
        raise DataError(f"{key}: {path} holds no images ({', '.join(EXTENSIONS)})")
    notes += _ignored(key, found.ignored)
    files = list(found.files.values())
    return Folder(files, [NO_LABEL] * len(files), [])


def _with_extra(splits: Splits, config: Data) -> Splits:
    """With `data.extra`, which may hold training images again, but none of validation."""
    if streams(splits.train):
        raise DataError(f"data.extra: {config.dataset} streams, and extra images have an index")
    notes = list(splits.notes)
    extra = _images(config.extra, "data.extra", notes)
    every = list(_real(extra))
    known, scored = (set(_paths(part)) for part in (splits.train, splits.val))
    if both := scored & set(every):
        raise DataError(
            f"data.extra: {len(both)} of its {len(every)} images are validation images, such as "
            f"{min(both)}"
        )
    new = [i for i, path in enumerate(every) if path not in known]
    if not new:
        raise DataError(f"data.extra: {config.extra} holds no image that data.train does not")
    notes.append(f"data.extra: {len(new):,} images without labels join the training images")
    train = Joined(splits.train, labels(splits.train) or [], Part(extra, new))
    return splits._replace(train=train, notes=notes)


def _paths(source: Any) -> Iterable[str]:
    """The real path of each image that is a file."""
    if isinstance(source, Part):
        every = list(_paths(source.source))
        return [every[i] for i in source.index] if every else []
    return _real(source) if isinstance(source, (Folder, Labelled, Pack)) else []


def open_probe(config: Data) -> Splits | None:
    """The labelled images of `data.probe`: those to fit a classifier on, and those to score on.

    Raises:
        DataError: as `open_data`; a class without an image to fit on.
    """
    if not config.probe:
        return None
    digits = config.probe == "digits"
    section = config.model_copy(
        update={
            "unlabelled": False,
            "dataset": "digits" if digits else "",
            "train": "" if digits else config.probe,
            "val": config.probe_val,
        }
    )
    try:
        found = open_data(section)
    except DataError as error:
        text = str(error).replace("data.train", "data.probe").replace("data.val", "data.probe_val")
        raise DataError(text) from None
    if absent := _absent(labels(found.train) or (), found.classes, "data.probe"):
        raise DataError(f"{absent[0]} to fit a classifier on")
    return found


class Opened(NamedTuple):
    """A folder of class folders, or a packed file."""

    source: Folder | Pack
    bad: list[str]  # what belongs to no class and was left out
    notes: list[str]
    real: Iterable[str]  # the real paths of its images


def open_folder(path: str, known: dict[str, int] | None, skip_bad: bool) -> Opened:
    """The images of a folder, for a trained model or to be packed.

    Args:
        path: a folder with a folder for each class.
        known: the model's index of each class, such as `identity.class_indices` finds; None: its
            own.

    Raises:
        DataError: as `open_data` does, and for a folder whose name is no class.
    """
    return _open_folder(path, "DIR", skip_bad, known)


def _open_labelled(config: Data) -> Splits:
    """Training and validation images of folders with a file of labels."""
    train, bad = open_labelled(config.train, config.labels, "data.train", config.skip_bad)
    if not config.val:
        return _hold_out(train, config, bad, [])
    val, more = open_labelled(config.val, config.labels, "data.val", config.skip_bad, train.classes)
    _check_apart(_real(train), _real(val))
    notes = _absent(labels(val) or (), train.classes, "data.val")
    return Splits(train, val, train.classes, bad + more, notes)


def open_labelled(
    folder: str, file: str, key: str, skip_bad: bool, known: Sequence[str] | None = None
) -> tuple[Labelled | Pack, list[str]]:
    """The images that a file in a folder names, with their labels, and what was left out.

    A .csv has a line of names, the first of which is not looked at, and then a line for each image:
    its path below the folder, and 1 or 0 for each class. A .json is a mapping of paths to lists of
    names; the classes are those that occur, in natural order.

    Args:
        known: the classes, of which the file may name some; its own, unless given.

    Raises:
        DataError: naming what is missing, unknown, or not readable.
    """
    if is_packed(folder):
        index = known and {name: i for i, name in enumerate(known)}
        return open_pack(folder, key, file, index or None), []
    path = os.path.join(folder, file)
    try:
        with open(path, encoding="utf-8-sig", newline="") as text:
            rows, named = _read_json(text) if file.endswith(".json") else _read_csv(text)
    except OSError as error:
        raise DataError(f"{key}: {path} cannot be read: {error}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{key}: {path}: {error}") from error
    classes = list(named if known is None else known)
    index = {name: i for i, name in enumerate(classes)}
    if unknown := [name for name in named if name not in index]:
        raise DataError(f"{key}: {path} has a class {unknown[0]!r} that is not known")
    missing = [name for name in rows if not os.path.isfile(os.path.join(folder, name))]
    bad = [f"image {os.path.join(folder, name)} of {file} does not exist" for name in missing]
    if bad and not skip_bad:
        raise DataError(f"{key}: {bad[0]}; --skip-bad goes on without")
    for name in missing:
        del rows[name]
    if not rows or not classes:
        raise DataError(f"{key}: {path} names no image, or no class")
    files = [os.path.join(folder, name) for name in rows]
    return Labelled(files, [[index[x] for x in row] for row in rows.values()], classes), bad


def _read_csv(text: Iterable[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Names of classes by file, and all names."""
    lines = csv.reader(text)
    _, *names = next(lines, [""])
    rows: dict[str, list[str]] = {}
    for number, (file, *cells) in enumerate(filter(None, lines), 2):
        if len(cells) != len(names) or not {x.strip() for x in cells} <= {"0", "1", ""}:
            raise ValueError(f"line {number}: expected a file and {len(names)} of 0 and 1")
        if file in rows:
            raise ValueError(f"line {number}: {file} stands twice")
        rows[file] = [name for name, x in zip(names, cells, strict=True) if x.strip() == "1"]
    if len(set(names)) < len(names):
        raise ValueError("a class stands twice")
    return rows, names


def _read_json(text: Any) -> tuple[dict[str, list[str]], list[str]]:
    tree = json.load(text)
    if not all(isinstance(x, list) and all(isinstance(n, str) for n in x) for x in tree.values()):
        raise ValueError("expected a mapping of files to lists of names")
    return tree, sorted({name for row in tree.values() for name in row}, key=natural_key)


def spread(size: int, count: int) -> list[int]:
    """Up to `count` of the indices below `size`, evenly spread: i size // count."""
    count = min(size, count)
    return [i * size // count for i in range(count)]


def class_folders(path: str, key: str = "DIR") -> list[str]:
    """The names of the folders in a folder, in natural order; DataError where there is none.

    Of a packed file, its classes.
    """
    if is_packed(path):
        return Pack(path, key).classes
    if not os.path.isdir(path):
        raise DataError(f"{key}: {path} is no folder")
    real = os.path.realpath(path)
    return [
        name
        for name in sorted(os.listdir(path), key=natural_key)
        if os.path.isdir(file := os.path.join(path, name))
        and is_ours(name)
        and not is_above(os.path.realpath(file), real)
    ]


def _outside(path: str) -> tuple[list[str], list[str], Counter[str]]:
    """Files outside the class folders: images, broken links, and counts of others."""
    images, broken, others = [], [], Counter[str]()
    for name in sorted(os.listdir(path), key=natural_key):
        file = os.path.join(path, name)
        if os.path.isdir(file):
            continue
        if not (os.path.exists(file) or name.startswith(".")):
            broken.append(file)
        elif is_image(name):
            images.append(file)
        else:
            others[ending(name)] += 1
    return images, broken, others


def _open_folder(path: str, key: str, skip_bad: bool, known: dict[str, int] | None) -> Opened:
    if is_packed(path):
        packed = open_pack(path, key, "classes", known)
        return Opened(packed, [], [], _real(packed))
    every = {x: find(os.path.join(path, x)) for x in class_folders(path, key)}
    found = {name: x for name, x in every.items() if x.files}
    images, broken, others = _outside(path)
    ignored = sum((x.ignored for x in every.values()), others)
    if not found and images:
        raise DataError(
            f"{key}: {path} holds {len(images)} images and no class folder with images; put the "
            "images of each class into a folder of its name"
        )
    if not found:
        endings = ", ".join(EXTENSIONS)
        raise DataError(f"{key}: {path} holds no class folder with images ({endings})")
    bad = [f"class folder {os.path.join(path, x)} holds no image" for x in every if x not in found]
    bad += [f"{file} is a broken link" for file in broken]
    bad += [f"image {file} lies in no class folder" for file in images]
    if bad and not skip_bad:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise DataError(f"{key}: {bad[0]}{more}; --skip-bad goes on without")
    if known is None:
        if {name.lower() for name in found} <= _SPLITS:
            raise DataError(
                f"{key}: {path} holds {', '.join(found)}, which are no classes; name the folder "
                f"of one, such as {os.path.join(path, next(iter(found)))}"
            )
        known = {name: i for i, name in enumerate(found)}
    elif unknown := [name for name in found if name not in known]:
        raise unknown_class(path, key, unknown[0])
    of: dict[str, str] = {}  # each image's path, by its real one
    for x in found.values():
        if twice := x.files.keys() & of:
            one = min(twice)
            raise DataError(f"{key}: {of[one]} and {x.files[one]} are one file in two classes")
        of |= x.files
    labels = [known[name] for name, x in found.items() for _ in x.files]
    # every class's images in natural order, and the classes in theirs
    source = Folder(list(of.values()), labels, list(known))
    return Opened(source, bad, _ignored(key, ignored), of.keys())


def _ignored(key: str, kinds: Counter[str]) -> list[str]:
    """A sentence on files that are no images."""
    if not kinds:
        return []
    most = sorted(kinds.items(), key=lambda kind: (-kind[1], kind[0]))[:5]
    named = ", ".join(f"{count:,} {kind}" for kind, count in most)
    return [f"{key}: files that are no images, ignored: {kinds.total():,} ({named})"]


def _absent(labels: Iterable[int], classes: list[str], key: str) -> list[str]:
    """A sentence on classes without an image."""
    seen = set(labels)
    if not (absent := [name for i, name in enumerate(classes) if i not in seen]):
        return []
    more = ", ..." if len(absent) > 3 else ""
    named = ", ".join(map(repr, absent[:3]))
    return [f"{key}: {len(absent)} of {len(classes)} classes have no image: {named}{more}"]


def _open_named(config: Data, classes: int | None) -> Splits:
    from timm.data.dataset_factory import create_dataset

    prefixes = ("torch/", "hfds/", "hfids/", "tfds/", "wds/")
    if not config.dataset.startswith(prefixes):
        raise DataError(
            f"data.dataset: expected digits, {', '.join(prefixes)}..., got {config.dataset}"
        )
    parts = []
    for split, default in ((config.train, "train"), (config.val, "validation")):
        try:
            part = create_dataset(
                config.dataset,
                root=config.root or None,
                split=split or default,
                is_training=default == "train",
                batch_size=config.batch_size,
                # TensorFlow has decoded its own; of others Pillow's mode is wanted, for `to_rgb`
                input_img_mode="RGB" if config.dataset.startswith("tfds/") else "",
            )
        except Exception as error:  # every kind that timm and the datasets' libraries raise
            raise DataError(
                f"data.dataset: {config.dataset}, split {split or default!r} of "
                f"{config.root or 'no data.root'}, does not open: {error}"
            ) from error
        parts.append(part)
    train, val = parts
    names, others = (getattr(getattr(x, "reader", x), "class_to_idx", None) for x in parts)
    if names != others:
        raise DataError(f"data.dataset: {config.dataset}: train and val differ in their classes")
    if names:
        names = sorted(names, key=names.__getitem__)
    elif classes:
        names = [str(i) for i in range(classes)]
    else:
        raise DataError(
            f"data.dataset: {config.dataset} does not name its classes; student.options must say "
            "how many there are: {num_classes: ...}"
        )
    wrapped = [x if streams(x) else Timm(x, names) for x in (train, val)]
    return Splits(wrapped[0], wrapped[1], names, [], [])


def _hold_out(
    source: Digits | Folder | Labelled | Pack, config: Data, skipped: list[str], notes: list[str]
) -> Splits:
    """Keeps a share of every class for validation, always the same images."""
    groups: dict[int, list[int]] = defaultdict(list)
    for i, label in enumerate(source.labels):
        groups[0 if isinstance(label, list) else label].append(i)
    shuffled = random.Random(0)
    kept = set()
    for group in groups.values():
        shuffled.shuffle(group)
        kept.update(group[: round(config.holdout * len(group))])
    size = len(source)
    if not 0 < len(kept) < size:
        raise DataError(f"data.holdout: {config.holdout} of {size} images leaves none on one side")
    parts = [[i for i in range(size) if i not in kept], sorted(kept)]
    for part, name in zip(parts, ("training", "validation"), strict=True):
        key = f"data.holdout: {config.holdout}: in {name}"
        notes = notes + _absent(labels(Part(source, part)) or (), source.classes, key)
    train, val = (Part(source, part) for part in parts)
    return Splits(train, val, source.classes, skipped, notes)


def labels(source: Any) -> list[int] | None:
    """The labels of each image, one after another, where that takes no reading of images."""
    known = _of_images(source)
    if known is None:
        return None
    every = [int(x) for label in known for x in (label if isinstance(label, list) else [label])]
    return [label for label in every if label != NO_LABEL]


def _of_images(source: Any) -> Any:
    """What each image has: a label, several, or nothing known (None)."""
    if not isinstance(source, Part):
        return getattr(source, "labels", None)
    known = _of_images(source.source)
    return known if known is None else [known[i] for i in source.index]


def without_extra(splits: Splits) -> Splits:
    """The labelled images alone."""
    train = splits.train
    return splits._replace(train=train.labelled) if isinstance(train, Joined) else splits


def streams(source: Any) -> bool:
    """Whether it is one of timm's that stream: without indices."""
    from torch.utils.data import IterableDataset

    return isinstance(source, IterableDataset)


def count(source: Any) -> int:
    """The images of all ranks together."""
    return source.reader.num_samples if streams(source) else len(source)
