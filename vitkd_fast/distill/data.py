"""Pictures: timm's datasets and transforms, as uint8 batches that depend on nothing but a seed.

What is drawn for a picture (crop, flip, colours) is a function of (seed, epoch, its index), and an
epoch's order of (seed, epoch): neither depends on workers, on ranks, or on where a run was resumed.
A batch is [B, 3, H, W] uint8 in channels_last memory, a quarter of its size as float32.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import signal
import struct
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from timm.data.dataset_factory import create_dataset
from timm.data.mixup import Mixup
from timm.data.readers.img_extensions import get_img_extensions
from timm.data.transforms_factory import create_transform
from timm.utils.misc import natural_key
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from ..functional import Labels
from .config import Augmentation, Config, ConfigError, Data


class DataError(ValueError):
    """Pictures that cannot be used; the message names the file or folder."""


def seed_all(*key: int) -> None:
    """Seeds Python, NumPy and torch, every device included, from these numbers."""
    seed = _draw(*key)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.manual_seed(seed)


def _draw(*key: int) -> int:
    digest = hashlib.blake2b(struct.pack(f"{len(key)}q", *key), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _seed_host(*key: int) -> None:
    seed = _draw(*key)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)


@contextmanager
def _unmoved() -> Iterator[None]:
    """What is seeded and drawn inside moves no generator of the host's outside."""
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.set_rng_state(state[2])


class Batch(NamedTuple):
    """`indices` are the pictures' places in its dataset; `skipped` names what was left out."""

    images: Tensor  # [B, 3, H, W] uint8, channels_last
    labels: Tensor  # [B] int64
    indices: Tensor  # [B] int64
    skipped: list[str]


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
        pictures = [file for file in files if Path(file).suffix.lower() in extensions]
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
    if isinstance(source, Timm):
        labels = [label for _, label in source.dataset.reader.samples]
    else:
        labels = [source.read(i)[1] for i in range(len(source))]
    groups: dict[int, list[int]] = defaultdict(list)
    for i, label in enumerate(labels):
        groups[label].append(i)
    shuffled = random.Random(0)
    kept = set()
    for group in groups.values():
        shuffled.shuffle(group)
        kept.update(group[: round(config.holdout * len(group))])
    if not 0 < len(kept) < len(labels):
        raise DataError(
            f"data.holdout: {config.holdout} of {len(labels)} pictures leaves none on one side"
        )
    train = Part(source, [i for i in range(len(labels)) if i not in kept])
    return Splits(train, Part(source, sorted(kept)), source.classes, skipped)


def train_transform(data: Data, augmentation: Augmentation) -> Any:
    """timm's training transform, up to a uint8 array [3, H, W].

    Raises:
        ConfigError: for an `auto_augment` that timm does not know.
    """
    try:
        return create_transform(
            data.image_size,
            is_training=True,
            use_prefetcher=True,
            scale=(augmentation.scale[0], augmentation.scale[1]),
            ratio=(augmentation.ratio[0], augmentation.ratio[1]),
            hflip=augmentation.hflip,
            # 0 would still cost a transform that does nothing
            color_jitter=augmentation.color_jitter or None,  # type: ignore[arg-type]
            auto_augment=augmentation.auto_augment or None,
            interpolation=data.interpolation,
        )
    except (AssertionError, ValueError, KeyError) as error:
        raise ConfigError(
            f"augmentation.auto_augment: {augmentation.auto_augment!r} is none of timm's, such as "
            "rand-m9-mstd0.5, augmix-m3 or v0"
        ) from error


def eval_transform(image_size: int, crop_pct: float, interpolation: str) -> Any:
    """timm's validation transform (resize, then crop the centre), up to a uint8 array [3, H, W]."""
    return create_transform(
        image_size, use_prefetcher=True, crop_pct=crop_pct, interpolation=interpolation
    )


def _failure(name: str, error: Exception) -> DataError:
    return DataError(f"{name} cannot be read: {' '.join(str(error).split())}")


UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class _Indexed(Dataset):
    """(epoch, index) keys -> (picture, label, index, names of what was skipped) each."""

    def __init__(self, source: Source, transform: Any, seed: int | None, skip_bad: bool) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed  # None: validation, where nothing is drawn
        self.skip_bad = skip_bad

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[Any]:
        with _unmoved():
            return [self._read(epoch, index) for epoch, index in keys]

    def _read(self, epoch: int, index: int) -> Any:
        skipped: list[str] = []
        while True:
            try:
                image, label = self.source.read(index)
                break
            except UNREADABLE as error:
                if not self.skip_bad:
                    # as a value: a worker's exception arrives as another one, traceback and all
                    return _failure(self.source.name(index), error)
            skipped.append(self.source.name(index))
            if self.seed is None:
                return None, None, index, skipped
            # the batch keeps its size: the next picture takes the place
            index = (index + 1) % len(self.source)
            if len(skipped) == len(self.source):
                return DataError(f"not one of {len(skipped)} pictures can be read")
        if self.seed is not None:
            _seed_host(self.seed, epoch, index)
        return self.transform(image), label, index, skipped


class _Streamed(IterableDataset):
    """A dataset without indices: what is drawn depends on the place in a worker's stream."""

    def __init__(self, dataset: Any, transform: Any, seed: int | None) -> None:
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers see it change
        self.rank = _rank()

    def __iter__(self) -> Iterator[Any]:
        info = torch.utils.data.get_worker_info()
        worker = info.id if info else 0
        # the reader begins anew, not where its shuffling stopped
        self.dataset.reader.ds = None
        self.dataset.reader.worker_seed = _draw(self.seed or 0, int(self.epoch), self.rank)
        for i, (image, label) in enumerate(self.dataset):
            if self.seed is None:
                picture = self.transform(image)
            else:
                with _unmoved():
                    _seed_host(self.seed, int(self.epoch), self.rank, worker, i)
                    picture = self.transform(image)
            yield picture, label, i, []


def _collate(items: list[Any]) -> Batch | DataError:
    for item in items:
        if isinstance(item, DataError):
            return item
    read = [item for item in items if item[0] is not None]
    # they are views of [H, W, 3]: stacked as such, and seen as channels_last without a copy
    pictures = [torch.as_tensor(item[0]).permute(1, 2, 0) for item in read]
    images = torch.stack(pictures) if read else torch.empty(0, 1, 1, 3, dtype=torch.uint8)
    return Batch(
        images.permute(0, 3, 1, 2),
        torch.tensor([int(item[1]) for item in read], dtype=torch.int64),
        torch.tensor([item[2] for item in read], dtype=torch.int64),
        list(itertools.chain.from_iterable(item[3] for item in items)),
    )


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _ranks() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def count(source: Any) -> int:
    """The pictures of all ranks together."""
    streams: bool = isinstance(source, IterableDataset)
    return source.reader.num_samples if streams else len(source)


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
            generator = torch.Generator().manual_seed(_draw(self.seed, self.epoch))
            order = torch.randperm(self.size, generator=generator).tolist()
        order = order[_rank() :: _ranks()]
        for i in range(self.start, self.batches):
            part = order[i * self.batch_size : (i + 1) * self.batch_size]
            yield [(self.epoch, index) for index in part]


class Loader:
    """The batches of this rank, of any epoch, from any batch on.

    Args:
        source: a `Source`, or one of timm's datasets that stream.
        transform: what makes a picture a uint8 array [3, H, W].
        data: batch size, workers, and whether bad files are skipped.
        seed: of order and augmentation; None for validation: every picture once, in order.
        multiple: an epoch's batches are cut to a multiple of this.

    Raises:
        DataError: for fewer training pictures than `multiple` batches.
    """

    def __init__(
        self, source: Any, transform: Any, data: Data, *, seed: int | None, multiple: int = 1
    ) -> None:
        self.batch_size = data.batch_size
        self.skipped: set[str] = set()
        streams = isinstance(source, IterableDataset)
        # the length of a stream is that of this rank's share, rounded up
        size = count(source)
        together = data.batch_size * _ranks()
        self._size = size
        if seed is None:
            self.batches = -(-size // together)
        else:
            self.batches = size // (together * multiple) * multiple
        if not self.batches and not (streams and seed is None):
            raise DataError(
                f"{size} training pictures are fewer than an update takes: {together * multiple} "
                "(data.batch_size, times processes, times optimizer.accumulate)"
            )
        arguments: dict[str, Any] = {}
        self._order: _Order | None = None
        if streams:
            if hasattr(source, "set_loader_cfg"):
                source.set_loader_cfg(num_workers=data.workers)
            self._dataset: Any = _Streamed(source, transform, seed)
            arguments = {"batch_size": data.batch_size, "drop_last": seed is not None}
        else:
            self._dataset = _Indexed(source, transform, seed, data.skip_bad)
            self._order = _Order(size, data.batch_size, seed, self.batches)
            arguments = {"batch_sampler": self._order}
        self._loader: DataLoader = DataLoader(
            self._dataset,
            num_workers=data.workers,
            persistent_workers=data.workers > 0 and not streams,
            collate_fn=_collate,
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
            self._loader.generator.manual_seed(_draw(self._dataset.seed or 0, epoch, _rank()))
            # a stream has no index to begin at, and in validation no end but its own
            last = None if self._dataset.seed is None else self.batches
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
            raise DataError(f"not one of {self._size} pictures can be read")
        if came < self.batches and self._dataset.seed is not None:
            raise DataError(
                f"data.workers: more than shards; {came} of {self.batches} batches came"
            )


def _quiet_worker(_: int) -> None:
    """A worker leaves Ctrl-C to the process that asks it for pictures."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


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
        """Mixes float pictures [B, 3, H, W] in place, each with its mirror image in the batch."""
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
    config: Config, splits: Splits, seed: int, accumulate: int = 1
) -> tuple[Loader, Loader]:
    """Training and validation batches of a run whose updates take `accumulate` batches each."""
    transform = train_transform(config.data, config.augmentation)
    train = Loader(splits.train, transform, config.data, seed=seed, multiple=accumulate)
    return train, val_loader(config, splits)


def val_loader(config: Config, splits: Splits) -> Loader:
    """Every validation picture once."""
    section = config.data
    transform = eval_transform(section.image_size, section.crop_pct, section.interpolation)
    return Loader(splits.val, transform, section, seed=None)
