"""A teacher that was asked before: its outputs for a batch, from the memory-mapped shards.

A batch costs one gather of its rows from each shard that it meets. The first use of a shard
compares its checksum, and one image of each batch is compared with the one that the teacher saw.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...taps import TapOutputs, TopLogits
from ..data import Batch, Drawn
from . import shards
from .plan import Place, Plan
from .store import CacheError, Where, at

_ALWAYS = ("log_sum_exp", "pixels", "values", "indices")


class CachedTeacher:
    """The outputs of a cache, which must be complete.

    Attributes:
        plan: the cache's.
        drawn: how the images of a run must be augmented.

    Raises:
        CacheError: naming a shard that is missing or cut.
    """

    def __init__(self, folder: Where) -> None:
        self.folder = at(folder)
        self.plan = plan = Plan.read(self.folder)
        self.drawn = Drawn(plan.seed, plan.epochs)
        if bad := shards.lengths(self.folder, plan):
            (place, why), count = next(iter(bad.items())), plan.shards * plan.epochs
            raise CacheError(
                f"teacher.cache: {self.folder.name(place.file)} {why}: {len(bad)} of {count} "
                f"shards are not there; `vitkd cache verify --rebuild {self.folder}` makes them"
            )
        self.columns = list(plan.columns)
        self._checked: set[Place] = set()
        self._opened: dict[Place, shards.Columns] = {}

    @property
    def dense(self) -> bool:
        """Whether every class has its logit."""
        return bool(self.plan.record["topk"] == self.plan.record["classes"])

    def lacks(self, wanted: Mapping[str, Any]) -> str:
        """What of the arguments of `Taps` a cache does not hold, or ""."""
        features, blocks = self.plan.record["features"], self.plan.record["blocks"]
        if wanted.get("pooled") and "pooled" not in features:
            return "pooled features (--features pooled)"
        for block in wanted.get("tokens", ()):
            if f"patch.{block % blocks if blocks else block}" not in features:
                return f"patches of block {block} (--features patch:{block})"
        if wanted.get("maps"):
            return "maps, which no cache holds"
        return "queries and keys, which no cache holds" if wanted.get("attention") else ""

    def select(self, wanted: Iterable[Any]) -> None:
        """Reads only the features that are among these arguments of `Taps`."""
        names = set(_ALWAYS)
        for spec in wanted:
            if spec.get("pooled"):
                names |= {"pooled", "pooled.scale"}
            for block in spec.get("tokens", ()):
                name = f"patch.{block % self.plan.record['blocks']}"
                names |= {name, f"{name}.scale"}
        self.columns = [name for name in self.plan.columns if name in names]

    def outputs(self, batch: Batch, epoch: int, device: torch.device | str = "cpu") -> TapOutputs:
        """What the teacher said of a batch's images in this epoch of a run.

        Raises:
            CacheError: a shard is damaged, or an image is not the one that the teacher saw.
        """
        indices = batch.indices.numpy()
        epoch %= self.plan.epochs
        rows = self.rows(epoch, indices)
        unread = np.isnan(rows["log_sum_exp"][:, 0])
        # libraries of one version may decode differently: one image of each batch is enough
        if unread.any() or checksum(batch.images[0]) != rows["pixels"][0]:
            i = int(unread.argmax())
            why = "could not be read when the cache was made"
            if not unread.any():
                why = "has other pixels than the teacher saw: another file, or another library"
            raise CacheError(f"teacher.cache: {self.folder}: image {indices[i]} {why}")
        return self.of_rows(rows, device)

    def rows(self, epoch: int, indices: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
        """The rows of these images, in columns."""
        plan = self.plan
        found = {
            name: np.empty((len(indices), *plan.columns[name].shape), plan.columns[name].dtype)
            for name in self.columns
        }
        of_shard = indices // plan.rows
        for shard in np.unique(of_shard).tolist():
            (where,) = np.nonzero(of_shard == shard)
            local = indices[where] - shard * plan.rows
            columns = self._open(Place(epoch, shard))
            for name, x in found.items():
                x[where] = columns[name][local]
        return found

    def of_rows(
        self, rows: dict[str, np.ndarray[Any, Any]], device: torch.device | str = "cpu"
    ) -> TapOutputs:
        """Tensors of rows, as `Taps` returns them; without all classes, `logits` is [B, 0]."""
        record = self.plan.record
        given = {
            # what torch has no arithmetic for
            name: torch.from_numpy(x.astype(np.int32) if x.dtype.kind == "u" else x).to(
                device, non_blocking=True
            )
            for name, x in rows.items()
            if name != "pixels"
        }
        values = given["values"].float()
        found = TapOutputs(values)
        if not self.dense:
            sums = {t: given["log_sum_exp"][:, i] for i, t in enumerate(record["temperatures"])}
            found = TapOutputs(values[:, :0], top=TopLogits(given["indices"], values, sums))
        found.grid = tuple(record["grid"]) if record["grid"] else None
        for name in record["features"]:
            if name not in given:
                continue
            x = given[name].float()
            if f"{name}.scale" in given:
                x = x * given[f"{name}.scale"].unsqueeze(-1)
            if name == "pooled":
                found.pooled = x
            else:
                block = int(name.removeprefix("patch."))
                found.tokens |= {block: x, block - record["blocks"]: x}
        return found

    def example(self, device: torch.device | str = "cpu") -> TapOutputs:
        """What the teacher said of the first image, to see its shapes."""
        return self.of_rows(self.rows(0, np.arange(1)), device)

    def choices(self, indices: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The class with the largest logit, of images in the first epoch."""
        rows = self.rows(0, indices)
        best = rows["values"].argmax(1)
        if not self.dense:
            best = rows["indices"][np.arange(len(indices)), best]
        return best.astype(np.int64)

    def _open(self, place: Place) -> shards.Columns:
        if place not in self._opened:
            # an epoch's shards are not asked for again before all others
            self._opened = {k: x for k, x in self._opened.items() if k.epoch == place.epoch}
            checked = place in self._checked
            try:
                self._opened[place] = shards.opened(self.folder, self.plan, place, checked)
            except CacheError as error:
                raise CacheError(
                    f"teacher.cache: {error}; `vitkd cache verify --rebuild {self.folder}` makes "
                    "it again"
                ) from error
            self._checked.add(place)
        return self._opened[place]


def checksum(image: Tensor) -> int:
    """CRC-32 of a uint8 image [3, H, W], as if it were [H, W, 3]."""
    return zlib.crc32(image.permute(1, 2, 0).contiguous().numpy().data)
