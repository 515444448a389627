"""Packed data sets: one memory-mapped file of images, labels and names, which reads like a folder.

64 bytes (magic, place and length of the tail, its BLAKE2b-256), the images, each from a multiple of
64 bytes on, and the tail: the length of a JSON header, the header, a record of each image, labels,
names. Pixels are uint8 [height, width, 3], or an image is its file's bytes. A record holds the sum
of the image's 64-bit words, which every read compares: it costs a tenth of a crop at most.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import _int8
from .._files import replacing
from .._preprocessing import Array
from ..images import (
    UNREADABLE,
    DataError,
    decode,
    is_plain,
    list_images,
    open_pixels,
    unreadable,
)

SUFFIX = ".pack"
_MAGIC = b"vitkdpak"
_HEAD = struct.Struct("<8sQQ32s8x")
_ALIGNED = 64
_TOLD = 10_000  # images between two lines on how far it is
_RECORD = np.dtype(
    [
        ("begin", "<i8"),
        ("bytes", "<i8"),
        ("height", "<i4"),
        ("width", "<i4"),
        ("sum", "<u8"),
        ("plain", "<i8"),  # whether the bytes are `images.is_plain`
    ]
)
Labels = list[int] | list[list[int]]


def is_packed(path: str) -> bool:
    """Whether this names a packed file, and no folder."""
    return path.endswith(SUFFIX) and not os.path.isdir(path)


class Pack:
    """The images of a packed file, as a `datasets.Source`.

    Args:
        path: of the file.
        key: what names it in messages.

    Raises:
        DataError: a file that is none, is cut, or whose index was changed.
    """

    def __init__(self, path: str, key: str = "FILE") -> None:
        self.path = path
        try:
            tail = self._tail(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{key}: {path}: {error}") from None
        self.header = tail.header
        self.classes: list[str] = tail.header["classes"]
        self.labels = tail.labels
        self._records = tail.records
        self._names: bytes | list[str] = tail.names
        self._bytes = _mapped(path)

    @staticmethod
    def _tail(path: str) -> _Tail:
        with open(path, "rb") as file:
            head = file.read(_HEAD.size)
            if not head.startswith(_MAGIC):
                raise ValueError("is no packed file, as `vitkd pack` makes them")
            size = os.fstat(file.fileno()).st_size
            if len(head) < _HEAD.size:
                raise ValueError(f"is cut: it ends after {size} bytes")
            _, begin, length, digest = _HEAD.unpack(head)
            if begin + length != size:
                raise ValueError(f"is cut or longer: expected {begin + length} bytes, got {size}")
            file.seek(begin)
            tail = file.read(length)
        if _digest(head[:24], tail) != digest:
            raise ValueError("is damaged: its index does not have its checksum")
        return _Tail.parse(tail)

    def __getstate__(self) -> dict[str, Any]:
        # a worker that is spawned maps the file itself
        return {name: value for name, value in self.__dict__.items() if name != "_bytes"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._bytes = _mapped(self.path)

    def __len__(self) -> int:
        return len(self._records)

    def read(self, index: int) -> tuple[Array, Any]:
        """Pixels, uint8 [H, W, 3], and the label, or a multi-hot one.

        Raises:
            UNREADABLE: bytes that were changed.
        """
        begin, count, height, width, total, plain = self._records[index].item()
        words = self._bytes[begin : begin + -(-count // _ALIGNED) * _ALIGNED].view(np.uint64)
        if int(np.add.reduce(words)) != total:
            raise ValueError("its bytes do not have their checksum: the packed file is damaged")
        image = self._bytes[begin : begin + count]
        if self.header["encoded"]:
            pixels = decode(image, plain=bool(plain))
        else:
            pixels = image.reshape(height, width, 3)
        return pixels, self._label(index)

    def _label(self, index: int) -> Any:
        label = self.labels[index]
        if isinstance(label, int):
            return label
        target = np.zeros(len(self.classes), np.float32)
        target[label] = 1
        return target

    def name(self, index: int) -> str:
        return f"{self.path}/{self.names[index]}"

    @property
    def names(self) -> list[str]:
        """Of each image: its path below the folder that was packed."""
        if isinstance(self._names, bytes):  # a million take a while, and few are asked for
            self._names = os.fsdecode(self._names).split("\0")
        return self._names

    def labelled(self, labels: Labels, classes: list[str]) -> Pack:
        """The same images with other labels."""
        other = copy.copy(self)
        other.labels, other.classes = labels, classes
        return other


def open_pack(path: str, key: str, kind: str, known: dict[str, int] | None) -> Pack:
    """A packed file whose labels are of this kind: "classes", or the name of a file of labels.

    Args:
        known: indices of classes, of which the file may have some; its own, unless given.

    Raises:
        DataError: as `Pack`; labels of another kind; a class that is not known.
    """
    source = Pack(path, key)
    if (packed := source.header["kind"]) != kind:
        words = {"classes": "a class of each image", "none": "no labels"}
        has, wanted = (words.get(x, f"the labels of {x}") for x in (packed, kind))
        raise DataError(f"{key}: {path} was packed with {has}; expected {wanted}")
    if known is None:
        return source
    if unknown := [name for name in source.classes if name not in known]:
        raise unknown_class(path, key, unknown[0])
    index = [known[name] for name in source.classes]
    moved: Any = [
        [index[x] for x in label] if isinstance(label, list) else index[label]
        for label in source.labels
    ]
    return source.labelled(moved, list(known))


def unknown_class(path: str, key: str, name: str) -> DataError:
    """Of a class in a data set that the training images, or the model, do not have."""
    who = "data.train" if key == "data.val" else "the model"
    return DataError(f"{key}: {path} has a class {name!r} that {who} does not know")


def _mapped(path: str) -> Array:
    return np.asarray(np.memmap(path, np.uint8, "r"))


class _Tail(NamedTuple):
    header: dict[str, Any]
    records: Any
    labels: Labels
    names: bytes

    def dump(self) -> bytes:
        counts: list[int] = []
        flat: list[int] = []
        for label in self.labels:
            several = label if isinstance(label, list) else [label]
            counts += [len(several)] if isinstance(label, list) else []
            flat += several
        header = json.dumps(self.header | {"counts": len(counts), "labels": len(flat)}).encode()
        numbers = np.array(counts + flat, "<i4").tobytes()
        length = struct.pack("<Q", len(header))
        return length + header + self.records.tobytes() + numbers + self.names

    @classmethod
    def parse(cls, tail: bytes) -> _Tail:
        (length,) = struct.unpack_from("<Q", tail)
        header = json.loads(tail[8 : 8 + length])
        if header["version"] != 1:
            raise ValueError(f"has version {header['version']}; this vitkd_fast reads version 1")
        place = 8 + length
        records = np.frombuffer(tail, _RECORD, header["images"], place)
        place += records.nbytes
        counts, flat = header["counts"], header["labels"]
        numbers = np.frombuffer(tail, "<i4", counts + flat, place)
        labels: Labels = numbers[counts:].tolist()
        if counts:
            ends = np.cumsum(numbers[:counts])[:-1]
            labels = [part.tolist() for part in np.split(numbers[counts:], ends)]
        names = tail[place + numbers.nbytes :]
        if names.count(b"\0") + 1 != header["images"]:
            raise ValueError("has another number of names than of images")
        return cls(header, records, labels, names)


def _digest(*parts: bytes) -> bytes:
    state = hashlib.blake2b(digest_size=32)
    for part in parts:
        state.update(part)
    return state.digest()


class Chosen(NamedTuple):
    """Image files to pack; labels are of each a class, -1 for none, or a list of classes."""

    folder: str  # names are paths below it
    files: list[str]
    labels: Labels
    classes: list[str]
    kind: str  # of labels: "classes", "none", or the name of the file that they are from
    bad: list[str]  # what is left out, a sentence each
    notes: list[str]


def choose(
    folder: str, labels: str = "", unlabelled: bool = False, skip_bad: bool = False
) -> Chosen:
    """The images of a folder, as training opens it.

    Args:
        labels: the file in it with several labels of each image; "" where each has a class.
        unlabelled: images wherever they lie, without labels.
        skip_bad: what belongs to no class is left out.

    Raises:
        DataError: as `sources.open_data`.
    """
    from . import sources

    if unlabelled:
        files = [str(file) for file in list_images(folder)]
        return Chosen(folder, files, [-1] * len(files), [], "none", [], [])
    if is_packed(folder):
        raise DataError(f"DIR: {folder} is no folder")
    bad: list[str]
    notes: list[str] = []
    source: Any
    if labels:
        source, bad = sources.open_labelled(folder, labels, "DIR", skip_bad)
    else:
        source, bad, notes, _ = sources.open_folder(folder, None, skip_bad)
    kind = labels or "classes"
    return Chosen(folder, source.files, source.labels, source.classes, kind, bad, notes)


class Packed(NamedTuple):
    """What was packed."""

    images: int
    bytes: int
    skipped: list[str]  # files that cannot be read


def write(
    path: Path,
    chosen: Chosen,
    *,
    size: int | None = None,
    encoded: bool = False,
    skip_bad: bool = False,
    threads: int = 1,
    tell: Callable[[str], None] = lambda _: None,
) -> Packed:
    """Packs image files; `path` appears when it is whole, and is left as it was on any error.

    Args:
        size: the short side is resized to it, bicubic as by Pillow 12.3, where it is longer.
        encoded: the bytes of the files are kept, instead of their pixels.
        skip_bad: files that cannot be read are left out.
        threads: that decode and resize.
        tell: is told how far it is, now and then.

    Raises:
        DataError: naming a file that cannot be read; not one that can.
    """
    files, labels = chosen.files, chosen.labels
    records: list[tuple[int, ...]] = []
    kept: list[int] = []
    skipped: list[str] = []
    with replacing(path) as beside, open(beside, "wb") as out:
        out.write(bytes(_HEAD.size))
        place = _HEAD.size
        for i, image in enumerate(_prepared(files, size, encoded, threads)):
            if (i + 1) % _TOLD == 0:
                tell(f"{i + 1:,} of {len(files):,} images")
            if isinstance(image, DataError):
                if not skip_bad:
                    raise image
                skipped.append(files[i])
                continue
            data, height, width, plain = image
            padded = data + bytes(-len(data) % _ALIGNED)
            total = int(np.add.reduce(np.frombuffer(padded, np.uint64)))
            records.append((place, len(data), height, width, total, plain))
            kept.append(i)
            place += out.write(padded)
        if not records:
            raise DataError(f"{chosen.folder}: not one of {len(files)} images can be read")
        names = [os.path.relpath(files[i], chosen.folder) for i in kept]
        header = {
            "version": 1,
            "images": len(records),
            "encoded": encoded,
            "size": size,
            "kind": chosen.kind,
            "classes": chosen.classes,
        }
        some: Any = [labels[i] for i in kept]
        every = np.array(records, _RECORD)
        tail = _Tail(header, every, some, os.fsencode("\0".join(names))).dump()
        out.write(tail)
        out.seek(0)
        head = _HEAD.pack(_MAGIC, place, len(tail), bytes(32))
        out.write(_HEAD.pack(_MAGIC, place, len(tail), _digest(head[:24], tail)))
    return Packed(len(records), place + len(tail), skipped)


_Image = tuple[bytes, int, int, bool]  # its bytes, height, width, and whether they are plain


def _prepared(
    files: Sequence[str], size: int | None, encoded: bool, threads: int
) -> Iterator[_Image | DataError]:
    """Each file's, in order; a few more than are asked for are at work."""
    waiting: deque[Future[_Image | DataError]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for file in files:
                waiting.append(pool.submit(_prepare, file, size, encoded))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _prepare(file: str, size: int | None, encoded: bool) -> _Image | DataError:
    try:
        data = Path(file).read_bytes() if encoded else b""
        # what is kept as it is must be readable too
        pixels = open_pixels(io.BytesIO(data) if encoded else file)
    except UNREADABLE as error:
        return unreadable(file, error)
    if not encoded:
        pixels = shrunk(pixels, size)
        data = pixels.tobytes()
    return data, *pixels.shape[:2], encoded and is_plain(data)


def verify(path: str) -> int:
    """How many images a packed file holds, each of which is read.

    Raises:
        DataError: as `Pack`; naming the first image that is damaged, and how many more are.
    """
    source, damaged = Pack(path), []
    for i in range(len(source)):
        try:
            source.read(i)
        except UNREADABLE as error:
            damaged.append(unreadable(source.name(i), error))
    if damaged:
        more = f" (and {len(damaged) - 1} more)" if len(damaged) > 1 else ""
        raise DataError(f"{damaged[0]}{more}")
    return len(source)


def shrunk(pixels: Array, size: int | None) -> Array:
    """An image whose short side is `size` at most."""
    height, width = pixels.shape[:2]
    short = min(height, width)
    if size is None or short <= size:
        return pixels
    out = np.empty((1, height * size // short, width * size // short, 3), np.uint8)
    whole = np.array([[0, 0, height, width, 0]])
    _int8.crop([pixels], whole, interpolation="bicubic", out=out)
    return out[0]
