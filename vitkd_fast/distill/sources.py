"""Datasets before any transform: folders, digits, and timm's torch/..., hfds/... and wds/..."""

from __future__ import annotations

import os
import random
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image
from timm.data.dataset_factory import create_dataset
from timm.data.readers.img_extensions import get_img_extensions
from timm.utils.misc import natural_key
from torch.utils.data import IterableDataset

from ..pictures import UNREADABLE as UNREADABLE
from ..pictures import DataError as DataError
from .config import Data


class Source(Protocol):
    """A dataset before any transform."""

    classes: list[str]

    def __len__(self) -> int: ...
    def read(self, index: int) -> tuple[Image.Image, int]: ...
    def name(self, index: int) -> str: ...


class Digits:
    """scikit-learn's 1,797 scans of 8x8 pixels, which need no network."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        self.images = np.round(digits.images * (255 / 16)).astype(np.uint8)
        self.labels = digits.target
        self.classes = [str(name) for name in digits.target_names]

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]).convert("RGB"), int(self.labels[index])

    def name(self, index: int) -> str:
        return f"digits/{index}"


class Timm:
    """One of timm's datasets whose pictures have an index: folders, torch/... and hfds/..."""

    def __init__(self, dataset: Any, classes: list[str]) -> None:
        self.dataset = dataset
        self.classes = classes

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> tuple[Image.Image, int]:
        # past timm's ImageDataset, which replaces what it cannot read without a word of which
        image, label = getattr(self.dataset, "reader", self.dataset)[index]
        if not isinstance(image, Image.Image):
            with image:
                return Image.open(image).convert("RGB"), int(label)
        return image.convert("RGB"), int(label)

    def name(self, index: int) -> str:
        if hasattr(self.dataset, "samples"):  # torchvision's folders
            return str(self.dataset.samples[index][0])
        reader = getattr(self.dataset, "reader", None)
        return reader.filename(index, absolute=True) if reader else f"picture {index}"


class Part:
    """Some of a source's pictures."""

    def __init__(self, source: Source, index: list[int]) -> None:
        self.source = source
        self.index = index
        self.classes = source.classes

    def __len__(self) -> int:
        return len(self.index)

    def read(self, index: int) -> tuple[Image.Image, int]:
        return self.source.read(self.index[index])

    def name(self, index: int) -> str:
        return self.source.name(self.index[index])


class Splits(NamedTuple):
    """Training and validation pictures; a dataset that streams is timm's, and has no indices."""

    train: Any  # Source, or an IterableDataset
    val: Any
    classes: list[str]
    skipped: list[str]  # files and folders that hold no picture


def open_data(config: Data, classes: int | None = None) -> Splits:
    """Opens the training and validation pictures that a configuration names.

    Args:
        config: with `dataset` empty, `train` and `val` are folders that hold one folder per class.
        classes: how many there are, for a dataset that does not say so itself.

    Raises:
        DataError: naming what is missing, empty or no picture (with `skip_bad`, files are left out
            and listed).
    """
    if config.dataset == "digits":
        return _hold_out(Digits(), config, [])
    if config.dataset:
        return _open_named(config, classes)
    train, skipped = _open_folder(config.train, "data.train", config.skip_bad, None)
    if not config.val:
        return _hold_out(train, config, skipped)
    known = {name: i for i, name in enumerate(train.classes)}
    val, more = _open_folder(config.val, "data.val", config.skip_bad, known)
    return Splits(train, val, train.classes, skipped + more)


def open_folder(path: str, names: list[list[str]], skip_bad: bool) -> tuple[Timm, list[str]]:
    """The pictures of a folder for a trained model, and the files that were left out.

    Args:
        path: a folder with a folder for each class.
        names: what the model's classes may be called, such as words and WordNet ids; the first
            list that holds every folder's name counts. As many folders as classes, of whatever
            names, are the classes in their natural order.

    Raises:
        DataError: as `open_data` does, and for a folder whose name is no class.
    """
    folders = [x.name for x in Path(path).iterdir() if x.is_dir()] if Path(path).is_dir() else []
    folders = sorted((x for x in folders if not x.startswith(".")), key=natural_key)
    for known in names:
        if set(folders) <= set(known):
            break
    else:
        known = folders if len(folders) == len(names[0]) else names[0]
    return _open_folder(path, "DIR", skip_bad, {name: i for i, name in enumerate(known)})


def list_pictures(path: str | Path) -> list[Path]:
    """The picture files anywhere under a folder, in natural order, hidden ones left out.

    Raises:
        DataError: no folder, or no picture in it.
    """
    if not Path(path).is_dir():
        raise DataError(f"{path} is no folder")
    extensions = get_img_extensions(as_set=True)
    found = []
    for folder, subfolders, files in os.walk(path, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += [os.path.join(folder, file) for file in files if not file.startswith(".")]
    found = [file for file in found if Path(file).suffix.lower() in extensions]
    if not found:
        raise DataError(f"{path} holds no pictures ({', '.join(sorted(extensions))})")
    return [Path(file) for file in sorted(found, key=natural_key)]


def spread(size: int, count: int) -> list[int]:
    """Up to `count` of the indices below `size`, evenly spread: i size // count."""
    count = min(size, count)
    return [i * size // count for i in range(count)]


def _open_folder(
    path: str, key: str, skip_bad: bool, known: dict[str, int] | None
) -> tuple[Timm, list[str]]:
    root = Path(path)
    if not root.is_dir():
        raise DataError(f"{key}: {path} is no folder")
    extensions = get_img_extensions(as_set=True)
    found, bad = set(), []
    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        files = [file for file in files if not file.startswith(".")]
        pictures = {file for file in files if Path(file).suffix.lower() in extensions}
        at_root = Path(folder) == root
        bad += [
            f"{Path(folder) / file} is no picture in a class's folder"
            for file in sorted(files)
            if at_root or file not in pictures
        ]
        if pictures and not at_root:
            found.add(Path(folder).name)
        elif not subfolders:
            bad.append(f"class folder {folder} holds no picture")
    if bad and not skip_bad:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise DataError(f"{key}: {bad[0]}{more}; --skip-bad goes on without")
    if not found:
        raise DataError(
            f"{key}: {path} holds no class folders with pictures ({', '.join(sorted(extensions))})"
        )
    if known is None:
        known = {name: i for i, name in enumerate(sorted(found, key=natural_key))}
    elif unknown := sorted(found - known.keys()):
        raise DataError(f"{key}: {path} has a class {unknown[0]!r} that the model does not know")
    dataset = create_dataset("", root=path, search_split=False, class_map=known)
    # timm takes hidden pictures too, and ._1.jpg is none
    at = len(os.path.join(path, "")) - 1
    dataset.reader.samples = [x for x in dataset.reader.samples if f"{os.sep}." not in x[0][at:]]
    return Timm(dataset, list(known)), bad


def _open_named(config: Data, classes: int | None) -> Splits:
    accepted = ("torch/", "hfds/", "hfids/", "tfds/", "wds/")
    if not config.dataset.startswith(accepted):
        raise DataError(
            f"data.dataset: {config.dataset} is unknown; accepted are digits, {', '.join(accepted)}"
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
    wrapped = [x if isinstance(x, IterableDataset) else Timm(x, names) for x in (train, val)]
    return Splits(wrapped[0], wrapped[1], names, [])


def _hold_out(source: Source, config: Data, skipped: list[str]) -> Splits:
    """Keeps a share of every class for validation, always the same pictures."""
    found = labels(source)
    assert found is not None  # of folders and digits
    groups: dict[int, list[int]] = defaultdict(list)
    for i, label in enumerate(found):
        groups[label].append(i)
    shuffled = random.Random(0)
    kept = set()
    for group in groups.values():
        shuffled.shuffle(group)
        kept.update(group[: round(config.holdout * len(group))])
    if not 0 < len(kept) < len(found):
        raise DataError(
            f"data.holdout: {config.holdout} of {len(found)} pictures leaves none on one side"
        )
    train = Part(source, [i for i in range(len(found)) if i not in kept])
    return Splits(train, Part(source, sorted(kept)), source.classes, skipped)


def labels(source: Any) -> list[int] | None:
    """The label of each picture, where that takes no reading of pictures."""
    if isinstance(source, Part):
        known = labels(source.source)
        return known and [known[i] for i in source.index]
    if isinstance(source, Digits):
        return [int(label) for label in source.labels]
    samples = getattr(getattr(getattr(source, "dataset", None), "reader", None), "samples", None)
    return samples and [int(label) for _, label in samples]


def count(source: Any) -> int:
    """The pictures of all ranks together."""
    streams: bool = isinstance(source, IterableDataset)
    return source.reader.num_samples if streams else len(source)
