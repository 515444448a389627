"""Images: sources and their augmentation, as uint8 batches that depend only on the seed.

What is drawn for an image (crop, flip, colours) is a function of (seed, epoch, its index), and an
epoch's order of (seed, epoch): neither depends on workers, on ranks, or on where a run was resumed.
A batch is [B, 3, H, W] uint8 in channels_last memory, a quarter of its size as float32.
"""

from __future__ import annotations

import itertools
import random
import signal
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data.mixup import Mixup
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from .._preprocessing import Array
from ..functional import Labels
from ..images import UNREADABLE, DataError, prepare, to_rgb, unreadable
from .augment import Augment, draw
from .config import Augmentation, Config, Data
from .datasets import Part, Share, Source
from .sources import Splits, count, spread


def seed_all(*key: int) -> None:
    """Seeds Python, NumPy and torch, every device included, from these numbers."""
    seed = draw(*key)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.manual_seed(seed)


_NONE = np.empty((0, 1, 1, 3), np.uint8)
_HELD = 2 << 20  # bytes of whole images that a batch holds at once, and one image more


class Batch(NamedTuple):
    """`indices` are the images' places in its dataset; `skipped` names what was left out."""

    images: Tensor  # [B, 3, H, W] uint8, channels_last
    labels: Tensor  # [B] int64, or multi-hot [B, classes] float32
    indices: Tensor  # [B] int64
    skipped: list[str]


def eval_transform(image_size: int, crop_pct: float, interpolation: str) -> Any:
    """`images.prepare`, with the geometry of timm's validation transform: uint8 [H, W, 3]."""
    return _Prepare(image_size, crop_pct, interpolation)


class _Prepare(NamedTuple):
    image_size: int
    crop_pct: float
    interpolation: str

    def __call__(self, image: Array) -> Array:
        return prepare(image, self)


class Drawn(NamedTuple):
    """What an image's augmentation is a function of: (seed, epoch % epochs, its index)."""

    seed: int
    epochs: int = 2**62  # after which augmentations come again, as those of a cached teacher do


class _Indexed(Dataset):
    """A list of (epoch, index) keys -> a batch, or a DataError that names a file."""

    def __init__(
        self,
        source: Source,
        transform: Any,
        drawn: Drawn | None,
        skip_bad: bool,
        replaces: bool = True,
    ) -> None:
        self.source = source
        self.transform = transform
        self.drawn = drawn  # None: validation, where nothing is drawn
        self.skip_bad = skip_bad
        self.replaces = replaces and drawn is not None  # a bad image, by the next

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, keys: list[tuple[int, int]]) -> Batch | DataError:
        images: list[Array] = []
        labels: list[Any] = []
        indices: list[int] = []
        skipped: list[str] = []
        frames: list[Array] = []
        held = 0
        for number, (epoch, index) in enumerate(keys, 1):
            try:
                read = self._read(index, skipped)
            except DataError as error:
                # as a value: a worker's exception arrives as another one, traceback and all
                return error
            if read is not None:
                frames.append(read[0])
                labels.append(read[1])
                indices.append(read[2])
                held += read[0].nbytes
            if frames and (held > _HELD or number == len(keys)):
                images.append(self._transformed(frames, epoch, indices[-len(frames) :]))
                frames, held = [], 0
        return _batch(images, labels, indices, skipped)

    def _read(self, index: int, skipped: list[str]) -> tuple[Array, Any, int] | None:
        """An image, its label and its index; what was skipped on the way there is added."""
        for _ in range(len(self.source)):
            try:
                return *self.source.read(index), self._place(index)
            except UNREADABLE as error:
                if not self.skip_bad:
                    raise unreadable(self.source.name(index), error) from None
            skipped.append(self.source.name(index))
            if not self.replaces:
                return None
            # the batch keeps its size: the next image replaces it
            index = (index + 1) % len(self.source)
        raise DataError(f"not one of {len(self.source)} images can be read")

    def _place(self, index: int) -> int:
        return self.source.index[index] if isinstance(self.source, Share) else index

    def _transformed(self, frames: list[Array], epoch: int, indices: list[int]) -> Array:
        if self.drawn is not None:
            key = draw(self.drawn.seed, epoch % self.drawn.epochs)
            return self.transform(frames, key, indices)
        return np.stack([self.transform(frame) for frame in frames])


class _Streamed(IterableDataset):
    """A dataset without indices: what is drawn depends on the position in a worker's stream."""

    def __init__(self, dataset: Any, transform: Any, seed: int | None) -> None:
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers see it change
        self.rank = _rank()

    def __iter__(self) -> Iterator[Any]:
        info = torch.utils.data.get_worker_info()
        worker = info.id if info else 0
        # restarts the reader, not where its shuffling stopped
        self.dataset.reader.ds = None
        self.dataset.reader.worker_seed = draw(self.seed or 0, int(self.epoch), self.rank)
        for i, (image, label) in enumerate(self.dataset):
            try:
                pixels = np.asarray(to_rgb(image))
            except UNREADABLE as error:
                yield unreadable(f"image {i} of worker {worker}", error)
                return
            if self.seed is None:
                yield self.transform(pixels)[None], label, i
            else:
                key = draw(self.seed, int(self.epoch), self.rank, worker)
                yield self.transform([pixels], key, [i]), label, i


def _collate(items: list[Any]) -> Batch | DataError:
    for item in items:
        if isinstance(item, DataError):
            return item
    parts, labels, indices = zip(*items, strict=True)
    return _batch(list(parts), list(labels), list(indices), [])


def _batch(parts: list[Array], labels: list[Any], indices: list[int], skipped: list[str]) -> Batch:
    images = np.concatenate(parts) if len(parts) > 1 else parts[0] if parts else _NONE
    return Batch(
        # [B, H, W, 3] seen as channels_last, without a copy
        torch.from_numpy(images).permute(0, 3, 1, 2),
        _labels(labels),
        torch.tensor(indices, dtype=torch.int64),
        skipped,
    )


def _same(batch: Any) -> Any:
    """What makes a batch of one: a worker sends it as it is."""
    return batch


def _labels(given: list[Any]) -> Tensor:
    if given and isinstance(given[0], np.ndarray):
        return torch.as_tensor(np.stack(given))
    return torch.tensor([int(label) for label in given], dtype=torch.int64)


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _ranks() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


class _Order(Sampler):
    """This rank's (epoch, index) keys, batch by batch, from batch `start` of `epoch` on."""

    def __init__(self, size: int, batch_size: int, seed: int | None, batches: int) -> None:
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self.batches = batches
        self.epoch = self.start = 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        if self.seed is None:
            order = list(range(self.size))
        else:
            generator = torch.Generator().manual_seed(draw(self.seed, self.epoch))
            order = torch.randperm(self.size, generator=generator).tolist()
        order = order[_rank() :: _ranks()]
        for i in range(self.start, self.batches):
            part = order[i * self.batch_size : (i + 1) * self.batch_size]
            yield [(self.epoch, index) for index in part]


class Loader:
    """The batches of this rank, of any epoch, from any batch on.

    Args:
        source: a `Source`, or one of timm's datasets that stream.
        transform: an `Augment`; with no seed, what makes pixels [H, W, 3] an image [S, S, 3].
        data: batch size, workers, and whether bad files are skipped.
        seed: of order and augmentation; None for validation: every image once, in order.
        multiple: an epoch's batches are cut to a multiple of this.
        drawn: of the augmentation, where it is not the seed's.

    Raises:
        DataError: for fewer training images than `multiple` batches.
    """

    def __init__(
        self,
        source: Any,
        transform: Any,
        data: Data,
        *,
        seed: int | None,
        multiple: int = 1,
        drawn: Drawn | None = None,
    ) -> None:
        self.batch_size = data.batch_size
        self.skipped: set[str] = set()
        streams = isinstance(source, IterableDataset)
        # the length of a stream is that of this rank's share, rounded up
        size = count(source)
        together = data.batch_size * _ranks()
        self._size, self._seed = size, seed
        if seed is None:
            self.batches = -(-size // together)
        else:
            self.batches = size // (together * multiple) * multiple
        if not self.batches and not (streams and seed is None):
            raise DataError(
                f"{size} training images are fewer than an update takes: {together * multiple} "
                "(data.batch_size, times processes, times optimizer.accumulate)"
            )
        arguments: dict[str, Any] = {}
        self._order: _Order | None = None
        if streams:
            if hasattr(source, "set_loader_cfg"):
                source.set_loader_cfg(num_workers=data.workers)
            self._dataset: Any = _Streamed(source, transform, seed)
            arguments = {"batch_size": data.batch_size, "drop_last": seed is not None}
            arguments["collate_fn"] = _collate
        else:
            drawn = drawn if drawn or seed is None else Drawn(seed)
            self._dataset = _Indexed(source, transform, drawn, data.skip_bad)
            self._order = _Order(size, data.batch_size, seed, self.batches)
            arguments = {"batch_sampler": self._order, "collate_fn": _same}
        self._loader: DataLoader = DataLoader(
            self._dataset,
            num_workers=data.workers,
            persistent_workers=data.workers > 0 and not streams,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_quiet_worker,
            generator=torch.Generator(),  # the global one would move with every epoch
            **arguments,
        )

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, without the first `start`.

        Raises:
            DataError: naming the first file that cannot be read.
        """
        if self._order is not None:
            self._order.epoch, self._order.start = epoch, start
            batches: Any = self._loader
        else:
            self._dataset.epoch.fill_(epoch)
            if hasattr(self._dataset.dataset, "set_epoch"):
                self._dataset.dataset.set_epoch(epoch)
            self._loader.generator.manual_seed(draw(self._dataset.seed or 0, epoch, _rank()))
            # a stream has no index to begin at, and in validation no end but its own
            last = None if self._seed is None else self.batches
            batches = itertools.islice(self._loader, start, last)
        came = start
        for batch in batches:
            if isinstance(batch, DataError):
                # not itself: a cycle through this frame would let workers linger for seconds
                raise DataError(str(batch))
            came += 1
            self.skipped.update(batch.skipped)
            if len(batch.labels):
                yield batch
        if 0 < self._size <= len(self.skipped):
            raise DataError(f"not one of {self._size} images can be read")
        if came < self.batches and self._seed is not None:
            raise DataError(
                f"data.workers: more than shards; {came} of {self.batches} batches came"
            )


def of_keys(
    source: Source, transform: Any, data: Data, drawn: Drawn, keys: Iterable[list[tuple[int, int]]]
) -> Iterator[Batch]:
    """A batch for each list of (epoch, index), without what `data.skip_bad` leaves out.

    Raises:
        DataError: naming the first file that cannot be read.
    """
    loader: DataLoader = DataLoader(
        _Indexed(source, transform, drawn, data.skip_bad, replaces=False),
        batch_sampler=keys,
        num_workers=data.workers,
        collate_fn=_same,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_quiet_worker,
        generator=torch.Generator(),
    )
    for batch in loader:
        if isinstance(batch, DataError):
            raise DataError(str(batch))
        yield batch


def _quiet_worker(_: int) -> None:
    """Makes a worker ignore SIGINT and the first SIGTERM, which the training process handles.

    A second SIGTERM ends it: that is how the training process terminates its workers.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


class Mixer(Mixup):
    """timm's mixup and cutmix, with labels as (labels, partner's labels, lam), not as a matrix.

    lam, the first one's share, is a float, or a number per row in the modes "pair" and "elem".
    """

    def __init__(self, augmentation: Augmentation) -> None:
        super().__init__(
            mixup_alpha=augmentation.mixup,
            cutmix_alpha=augmentation.cutmix,
            prob=augmentation.mix_prob,
            switch_prob=augmentation.switch_prob,
            mode=augmentation.mix_mode,
        )

    def __call__(self, x: Tensor, target: Tensor) -> tuple[Tensor, Labels]:
        """Mixes float images [B, 3, H, W] in place, each with its mirror image in the batch."""
        if self.mode == "elem":
            lam = self._mix_elem(x)
        elif self.mode == "pair":
            lam = self._mix_pair(x)
        else:
            lam = self._mix_batch(x)
        if isinstance(lam, Tensor):
            lam = lam.squeeze(1)
        return x, (target, target.flip(0), lam)


def loaders(
    config: Config, splits: Splits, seed: int, accumulate: int = 1, drawn: Drawn | None = None
) -> tuple[Loader, Loader]:
    """Training and validation batches of a run whose updates take `accumulate` batches each."""
    transform = Augment(config.data, config.augmentation)
    train = Loader(
        splits.train, transform, config.data, seed=seed, multiple=accumulate, drawn=drawn
    )
    return train, val_loader(config, splits)


def val_loader(config: Config, splits: Splits) -> Loader:
    """Every validation image once."""
    return whole_loader(config, splits.val)


def whole_loader(config: Config, source: Any) -> Loader:
    """Every image of a source once, prepared as in validation."""
    section = config.data
    transform = eval_transform(section.image_size, section.crop_pct, section.interpolation)
    return Loader(source, transform, section, seed=None)


def sample(config: Config, source: Any, images: int, ranks: int = 1) -> Iterator[Batch]:
    """Batches of at least `images` of a source on each of the ranks, evenly spread where they have
    indices, prepared as in validation; fewer where there are fewer."""
    section = config.data
    if not isinstance(source, IterableDataset):
        # a loader gives each of several processes its share
        source = Part(source, spread(len(source), images * ranks))
    transform = eval_transform(section.image_size, section.crop_pct, section.interpolation)
    seen = 0
    for batch in Loader(source, transform, section, seed=None).epoch():
        yield batch
        seen += len(batch.labels)
        if seen >= images:
            break
