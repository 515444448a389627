"""What teacher and student say of every image of a folder: logits, once, for all that is measured.

A model reads images as it was made for: each is prepared as `vitkd eval` would for that model.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._opened import Opened, is_int8, open_model
from .._preprocessing import Array
from ..distill import identity, sources
from ..images import UNREADABLE, DataError, prepare, unreadable


@dataclass(frozen=True)
class Model:
    """One of the two, behind a function of uint8 images [N, H, W, 3]."""

    file: str  # or the name of a timm model
    opened: Opened
    order: tuple[int, ...] | None = None  # its logit of each of the student's classes

    @property
    def int8(self) -> bool:
        return is_int8(self.file)

    def __call__(self, images: Array) -> Tensor:
        """Logits of images that are prepared for it, float32 [N, classes], on the CPU."""
        given = torch.as_tensor(images).to(self.opened.device)
        logits = torch.as_tensor(self.opened.logits(given)).float().cpu()
        return logits if self.order is None else logits[:, list(self.order)]

    def prepare(self, frame: Array) -> Array:
        """A frame, uint8 [H, W, 3], as it reads it."""
        return prepare(frame, self.opened.pixels)


class Pair(NamedTuple):
    """A teacher and its student, whose classes are those of both."""

    teacher: Model
    student: Model

    @property
    def classes(self) -> tuple[str, ...]:
        return self.student.opened.classes

    @property
    def same_pixels(self) -> bool:
        """Whether an image is prepared alike for both."""
        wanted = [
            (x.opened.pixels.image_size, x.opened.pixels.crop_pct, x.opened.pixels.interpolation)
            for x in self
        ]
        return wanted[0] == wanted[1]

    def prepare(self, frame: Array) -> tuple[Array, Array]:
        """The frame as teacher and student read it; one array where they do so alike."""
        first = self.teacher.prepare(frame)
        return first, first if self.same_pixels else self.student.prepare(frame)


def open_pair(teacher: str, student: str, threads: int | None = None) -> Pair:
    """Two models of the same classes; the teacher's may have another order.

    Raises:
        ValueError: a file that cannot be loaded, a model of several labels, or other classes.
    """
    opened = {name: open_model(name, threads, accelerated=True) for name in (teacher, student)}
    for name, model in opened.items():
        if model.multilabel:
            raise ValueError(f"audit: {name}: expected exclusive classes, got several labels")
        if len(model.classes) < 2:
            raise ValueError(f"audit: {name}: expected 2 classes or more, got {len(model.classes)}")
    known, wanted = opened[teacher].classes, opened[student].classes
    if len(known) != len(wanted):
        raise ValueError(
            f"audit: TEACHER and STUDENT: expected the same classes, got {len(known)} and "
            f"{len(wanted)}"
        )
    order = tuple(identity.class_indices(teacher, known, wanted).values())
    same = order == tuple(range(len(known)))
    return Pair(
        Model(teacher, opened[teacher], None if same else order), Model(student, opened[student])
    )


class Images(NamedTuple):
    """A labelled folder, or its packed file."""

    source: Any
    folder: str
    skipped: list[str]  # what belongs to no class, or cannot be read
    notes: list[str]

    def name(self, index: int) -> str:
        """The path below the folder."""
        return os.path.relpath(self.source.name(index), self.folder)


def open_images(folder: str, pair: Pair, skip_bad: bool = False) -> Images:
    """The images of a folder with a folder for each class, or of a packed file.

    Raises:
        DataError: as `vitkd eval` does.
    """
    given = sources.class_folders(folder)
    known = identity.class_indices(pair.student.file, pair.classes, given)
    found = sources.open_folder(folder, known, skip_bad)
    return Images(found.source, folder, list(found.bad), list(found.notes))


class Read(NamedTuple):
    """Images that were read, prepared for both models."""

    indices: list[int]
    labels: list[int]
    teacher: Array  # uint8 [N, H, W, 3]
    student: Array


def read(
    images: Images, pair: Pair, indices: Iterable[int], *, batch_size: int, skip_bad: bool = False
) -> Iterator[Read]:
    """Batches of images, in order; with `skip_bad`, what cannot be read is left out and listed.

    Raises:
        DataError: naming an image that cannot be read.
    """

    def one(index: int) -> tuple[int, int, tuple[Array, Array]] | DataError:
        try:
            frame, label = images.source.read(index)
            return index, int(label), pair.prepare(frame)
        except UNREADABLE as error:
            return unreadable(images.source.name(index), error)

    every = list(indices)
    with ThreadPoolExecutor(2) as pool:
        for first in range(0, len(every), batch_size):
            found = []
            for index, x in zip(
                every[first : first + batch_size],
                pool.map(one, every[first : first + batch_size]),
                strict=True,
            ):
                if not isinstance(x, DataError):
                    found.append(x)
                elif skip_bad:
                    images.skipped.append(images.source.name(index))
                else:
                    raise x
            if found:
                places, labels, pixels = zip(*found, strict=True)
                teacher, student = zip(*pixels, strict=True)
                own = np.stack(teacher)
                yield Read(
                    list(places), list(labels), own, own if pair.same_pixels else np.stack(student)
                )


@dataclass(frozen=True)
class Answers:
    """Of N images, in the order of the folder."""

    indices: list[int]  # places in the source
    names: list[str]  # paths below the folder
    labels: Tensor  # [N] int64
    teacher: Tensor  # logits, float32 [N, classes]
    student: Tensor  # likewise

    def right(self, who: str) -> np.ndarray[Any, Any]:
        """Whether the most probable class is the label, bool [N]."""
        logits: Tensor = getattr(self, who)
        return (logits.argmax(1) == self.labels).numpy()


def ask(images: Images, pair: Pair, *, batch_size: int = 64, skip_bad: bool = False) -> Answers:
    """Logits of both models for every image.

    They are kept: 8 bytes a class and image, 400 MB for the 50,000 images of ImageNet.

    Raises:
        DataError: naming an image that cannot be read.
        ValueError: logits that are not finite.
    """
    indices: list[int] = []
    labels: list[int] = []
    logits: dict[str, list[Tensor]] = {"teacher": [], "student": []}
    every = range(len(images.source))
    for batch in read(images, pair, every, batch_size=batch_size, skip_bad=skip_bad):
        indices += batch.indices
        labels += batch.labels
        for name, model, pixels in zip(logits, pair, (batch.teacher, batch.student), strict=True):
            found = model(pixels)
            if not found.isfinite().all():
                raise ValueError(f"audit: {model.file}: expected finite logits, got NaN or Inf")
            logits[name].append(found)
    if not indices:
        raise DataError(f"{images.folder}: not one of {len(every)} images can be read")
    return Answers(
        indices,
        [images.name(i) for i in indices],
        torch.tensor(labels),
        torch.cat(logits["teacher"]),
        torch.cat(logits["student"]),
    )


def groups_of(names: Sequence[str], given: str, skip_bad: bool = False) -> list[str | None]:
    """The group of each image, None for those without one.

    Args:
        names: paths below the folder, "class/.../file".
        given: "folders", the folder in which an image lies below its class folder (that of
            "cat/night/1.png" is "night"); or a .csv: "image,group", and a line for each image.
        skip_bad: images of the file that are not among `names` are left out.

    Raises:
        DataError: a file that cannot be read or names an image twice or one that is not there; not
            one image has a group.
    """
    if given == "folders":
        parts = [name.split(os.sep) for name in names]
        found: list[str | None] = [os.sep.join(x[1:-1]) or None for x in parts]
        if not any(found):
            raise DataError("--groups folders: no image lies in a folder below its class folder")
        return found
    rows = _read_groups(given)
    if unknown := rows.keys() - set(names):
        if not skip_bad:
            raise DataError(
                f"--groups: {given}: {len(unknown)} of its {len(rows)} images are not in DIR, such "
                f"as {min(unknown)}; images are paths below DIR, such as {names[0]}"
            )
    found = [rows.get(name) for name in names]
    if not any(found):
        raise DataError(f"--groups: {given} names no image of DIR")
    return found


def _read_groups(file: str) -> dict[str, str]:
    import csv

    rows: dict[str, str] = {}
    try:
        with open(file, encoding="utf-8-sig", newline="") as text:
            lines = csv.reader(text)
            head = [x.strip() for x in next(lines, [])]
            if head != ["image", "group"]:
                raise ValueError(f"line 1: expected image,group, got {','.join(head)}")
            for number, row in enumerate(lines, 2):
                if not row:
                    continue
                if len(row) != 2 or not all(row):
                    raise ValueError(f"line {number}: expected an image and a group")
                image = os.path.normpath(row[0])
                if image in rows:
                    raise ValueError(f"line {number}: {row[0]} stands twice")
                rows[image] = row[1]
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"--groups: {file}: {error}") from error
    return rows
