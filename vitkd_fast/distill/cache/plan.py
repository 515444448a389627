"""What a cache of a teacher's outputs holds, decided before its first byte: an immutable plan.

Epoch e of a data set of N images is the rows 0 .. N - 1, in the order of the data set; shard k of
it is the rows from k R on. The augmentation of a row is a function of (seed, e, row), which the
plan names, so nothing of it is stored. A row has, in columns of a fixed stride:

    values          float16  [K]  logits minus the row's largest; of images with several labels as
                                  they are, since a sigmoid is not invariant to a shift
    indices         uint16   [K]  their classes (int32 above 65,536 classes); not there if K = V
    log_sum_exp     float32  [T]  of all V logits over each temperature, shifted likewise; NaN: the
                                  image could not be read
    pixels          uint32        CRC-32 of the augmented uint8 image that the teacher saw
    pooled, patch.B float16 or int8 with a float32 scale for each vector: features
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from .store import CacheError, Where, at

VERSION = 1
FILE = "plan.json"
_SHARD_BYTES = 2**25  # about, at most
_SHARD_ROWS = 2**14


class Column(NamedTuple):
    """One of a row's."""

    dtype: str  # NumPy's
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return int(np.dtype(self.dtype).itemsize * np.prod(self.shape, dtype=np.int64))


class Place(NamedTuple):
    """A shard of an epoch."""

    epoch: int
    shard: int

    @property
    def file(self) -> str:
        return f"epoch-{self.epoch:05}/shard-{self.shard:05}.safetensors"


@dataclass(frozen=True)
class Plan:
    """See the file's head; what a run must share with its cache is `data` to `versions`.

    Attributes:
        teacher: its name, the SHA-256 of its weights, mean and std of its pixels.
        data: what tells the images from others, and how they are resized.
        augmentation: of the images.
        versions: of the libraries that make the pixels.
        record: topk, classes, shift ("largest" or "none"), temperatures, and the shape of each
            feature, its dtype, patch grid and number of blocks.
        computed: what decides the last bits of a logit: device, precision, torch.
        rows, batch_size: of a shard, and of a forward pass, which never reaches over two shards.
    """

    teacher: dict[str, Any]
    data: dict[str, Any]
    augmentation: dict[str, Any]
    versions: dict[str, str]
    record: dict[str, Any]
    computed: dict[str, Any]
    images: int
    epochs: int
    seed: int
    batch_size: int
    rows: int = 0  # 0: by the size of a row
    version: int = VERSION

    def __post_init__(self) -> None:
        if not self.rows:
            most = min(_SHARD_ROWS, _SHARD_BYTES // self.stride)
            rows = self.batch_size * max(1, most // self.batch_size)
            object.__setattr__(self, "rows", rows)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all but the teacher's name: caches of one fingerprint hold the same."""
        return hashlib.sha256(json.dumps(self._tree(), sort_keys=True).encode()).hexdigest()

    def _tree(self) -> dict[str, Any]:
        # one machine's path to the weights is not another's
        teacher = {key: value for key, value in self.teacher.items() if key != "name"}
        return asdict(self) | {"teacher": teacher}

    @cached_property
    def columns(self) -> dict[str, Column]:
        """By name, the widest numbers first: what safetensors asks of alignment."""
        record = self.record
        topk, classes = record["topk"], record["classes"]
        found = {
            "log_sum_exp": Column("<f4", (len(record["temperatures"]),)),
            "pixels": Column("<u4", ()),
            "values": Column("<f2", (topk,)),
        }
        if topk < classes:
            found["indices"] = Column("<u2" if classes <= 2**16 else "<i4", (topk,))
        for name, shape in record["features"].items():
            if record["feature_dtype"] == "int8":
                found[f"{name}.scale"] = Column("<f4", tuple(shape[:-1]))
                found[name] = Column("|i1", tuple(shape))
            else:
                found[name] = Column("<f2", tuple(shape))
        order = sorted(found, key=lambda name: (-np.dtype(found[name].dtype).itemsize, name))
        return {name: found[name] for name in order}

    @property
    def stride(self) -> int:
        """Bytes of a row."""
        return sum(column.bytes for column in self.columns.values())

    @property
    def shards(self) -> int:
        """Of an epoch."""
        return -(-self.images // self.rows)

    def places(self) -> Iterator[Place]:
        """Every shard's, in their order."""
        return (Place(e, k) for e in range(self.epochs) for k in range(self.shards))

    def rows_of(self, place: Place) -> range:
        """The images of a shard."""
        start = place.shard * self.rows
        return range(start, min(start + self.rows, self.images))

    @property
    def bytes(self) -> int:
        """Of the whole, without headers."""
        return self.stride * self.images * self.epochs

    @classmethod
    def read(cls, folder: Where) -> Plan:
        """The plan of a cache.

        Raises:
            CacheError: there is none, or it is damaged, or of another version.
        """
        store = at(folder)
        path = store.name(FILE)
        try:
            tree = json.loads(store.read(FILE))
        except FileNotFoundError:
            raise CacheError(f"{store}: holds no cache; `vitkd cache ... -o` makes one") from None
        except (OSError, ValueError) as error:
            raise CacheError(f"{path}: cannot be read: {error}") from error
        if not isinstance(tree, dict) or tree.get("version") != VERSION:
            raise CacheError(f"{path}: expected the plan of a cache, version {VERSION}")
        digest = tree.pop("sha256", None)
        try:
            plan = cls(**tree)
        except (TypeError, KeyError, ValueError) as error:
            raise CacheError(f"{path}: is damaged: {error}") from error
        if digest != plan.fingerprint:
            raise CacheError(f"{path}: is damaged: its SHA-256 is another")
        return plan

    def write(self, folder: Where) -> None:
        """Where there is none; what is there stays."""
        tree = asdict(self) | {"sha256": self.fingerprint}
        at(folder).create(FILE, (json.dumps(tree, indent=1) + "\n").encode())

    def differences(self, other: Plan) -> list[str]:
        """Each key in which another plan differs, with both values."""
        return _differences("", self._tree(), other._tree())

    def unlike(self, expected: dict[str, Any]) -> list[str]:
        """Likewise, of sections such as {"data": {...}}: the keys that are expected."""
        return _differences("", {key: asdict(self)[key] for key in expected}, expected)


def _differences(prefix: str, ours: Any, theirs: Any) -> list[str]:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        keys = dict.fromkeys([*ours, *theirs])
        found = (
            _differences(f"{prefix}.{key}".lstrip("."), ours.get(key), theirs.get(key))
            for key in keys
        )
        return [line for lines in found for line in lines]
    return [] if ours == theirs else [f"{prefix}: {_short(ours)} there, {_short(theirs)} here"]


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}..." if len(text) == 64 and text.isalnum() else text
