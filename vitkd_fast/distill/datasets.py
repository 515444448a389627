"""Data sets of images and labels, by index: folders, digits, timm's, and parts of others."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from PIL import Image

from .._preprocessing import Array
from ..images import open_pixels, to_rgb

NO_LABEL = -100  # of an image among labelled ones; the losses' ignore_index


class Source(Protocol):
    """A dataset before any transform."""

    classes: list[str]

    def __len__(self) -> int: ...
    def read(self, index: int) -> tuple[Array, Any]: ...  # uint8 [H, W, 3]; [classes] of several
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

    def read(self, index: int) -> tuple[Array, int]:
        return np.repeat(self.images[index][..., None], 3, axis=2), int(self.labels[index])

    def name(self, index: int) -> str:
        return f"digits/{index}"


class Folder:
    """Images in the folders of their classes: the first level below a root, as in torchvision."""

    def __init__(self, files: list[str], labels: list[int], classes: list[str]) -> None:
        self.files = files
        self.labels = labels
        self.classes = classes

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> tuple[Array, int]:
        return open_pixels(self.files[index]), self.labels[index]

    def name(self, index: int) -> str:
        return self.files[index]


class Labelled:
    """Images with several labels each, or none: multi-hot, float32 [classes]."""

    def __init__(self, files: list[str], labels: list[list[int]], classes: list[str]) -> None:
        self.files = files
        self.labels = labels  # indices of classes
        self.classes = classes

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> tuple[Array, Any]:
        return open_pixels(self.files[index]), self.target(index)

    def target(self, index: int) -> Any:
        target = np.zeros(len(self.classes), np.float32)
        target[self.labels[index]] = 1
        return target

    def name(self, index: int) -> str:
        return self.files[index]


class Timm:
    """One of timm's datasets whose images have an index: torch/... and hfds/..."""

    def __init__(self, dataset: Any, classes: list[str]) -> None:
        self.dataset = dataset
        self.classes = classes
        if hasattr(dataset, "loader"):  # torchvision's folders
            dataset.loader = open_pixels

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> tuple[Array, int]:
        # past timm's ImageDataset, which replaces what it cannot read without a word of which
        image, label = getattr(self.dataset, "reader", self.dataset)[index]
        if isinstance(image, Image.Image):
            return np.asarray(to_rgb(image)), int(label)
        if isinstance(image, np.ndarray):
            return image, int(label)
        with image:
            return open_pixels(image), int(label)

    def name(self, index: int) -> str:
        if hasattr(self.dataset, "samples"):  # torchvision's folders
            return str(self.dataset.samples[index][0])
        reader = getattr(self.dataset, "reader", None)
        return reader.filename(index, absolute=True) if reader else f"image {index}"


class Unlabelled:
    """A source whose labels are not read: there are no classes, and each has `NO_LABEL`."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.classes: list[str] = []

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> tuple[Array, int]:
        return self.source.read(index)[0], NO_LABEL

    def name(self, index: int) -> str:
        return self.source.name(index)


class Part:
    """Some of a source's images."""

    def __init__(self, source: Source, index: list[int]) -> None:
        self.source = source
        self.index = index
        self.classes = source.classes

    def __len__(self) -> int:
        return len(self.index)

    def read(self, index: int) -> tuple[Array, int]:
        return self.source.read(self.index[index])

    def name(self, index: int) -> str:
        return self.source.name(self.index[index])


class Share(Part):
    """A part for training whose images keep the places that they have in the source.

    What is drawn for an image, and what a cached teacher said of it, go by its place there.
    """


class Joined:
    """The images of a labelled source, and behind them others, which have `NO_LABEL`."""

    def __init__(self, labelled: Source, labels: list[int], others: Source) -> None:
        self.labelled, self.others = labelled, others
        self.classes = labelled.classes
        self.labels = labels + [NO_LABEL] * len(others)

    def __len__(self) -> int:
        return len(self.labelled) + len(self.others)

    def read(self, index: int) -> tuple[Array, int]:
        part, place = self._find(index)
        pixels, label = part.read(place)
        return pixels, label if part is self.labelled else NO_LABEL

    def name(self, index: int) -> str:
        part, place = self._find(index)
        return part.name(place)

    def _find(self, index: int) -> tuple[Source, int]:
        first = len(self.labelled)
        return (self.labelled, index) if index < first else (self.others, index - first)
