"""Augmentation: random resized crops and flips of a batch, then timm's other transforms.

A crop has timm's distribution: of ten attempts at a share of the area and a ratio of the sides the
first that fits, else the middle. What is drawn for an image is a function of (seed, epoch, index)
alone, whatever is drawn for others, from the counters of SplitMix64 (Steele, Lea and Flood, 2014):
all images of a batch at once. The engine crops and resizes in one pass over the box alone, with the
bytes of Pillow 12.3: docs/numerics.md.
"""

from __future__ import annotations

import hashlib
import math
import random
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform

from .. import _int8
from .._preprocessing import Array
from .config import Augmentation, ConfigError, Data

_ATTEMPTS = 10
_DRAWS = 64  # of an image; more than are used
_GOLDEN = 0x9E3779B97F4A7C15
Numbers = np.ndarray[Any, Any]


def draw(*key: int) -> int:
    """64 bits that these integers determine."""
    digest = hashlib.blake2b(struct.pack(f"{len(key)}q", *key), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def bits(key: int, indices: Sequence[int], count: int) -> Numbers:
    """uint64 [indices, count], of at most 64 that each index has."""
    places = np.array(indices, np.uint64)[:, None] * np.uint64(_DRAWS)
    x = (places + np.arange(1, count + 1, dtype=np.uint64)) * np.uint64(_GOLDEN) + np.uint64(key)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def uniform(key: int, indices: Sequence[int], count: int) -> Numbers:
    """float64 [indices, count] in [0, 1), multiples of 2^-53."""
    return (bits(key, indices, count) >> np.uint64(11)) * 2.0**-53


def boxes(
    sizes: Numbers, drawn: Numbers, scale: Sequence[float], ratio: Sequence[float]
) -> Numbers:
    """Crops of images by timm's `RandomResizedCropAndInterpolation`: int64 [N, 4].

    Args:
        sizes: [N, 2], height and width of each image.
        drawn: [N, 22] in [0, 1): a share of the area for each of ten attempts, a ratio for each,
            then the place from top and from left.
        scale: the least and the largest share of the area.
        ratio: of width to height, likewise.

    Returns:
        top, left, height and width.
    """
    height, width = sizes[:, :1].astype(np.float64), sizes[:, 1:].astype(np.float64)
    area = (scale[0] + (scale[1] - scale[0]) * drawn[:, :_ATTEMPTS]) * (height * width)
    low, high = map(math.log, ratio)
    shape = _exp(low + (high - low) * drawn[:, _ATTEMPTS : 2 * _ATTEMPTS])
    widths = np.maximum(np.rint(np.sqrt(area * shape)), 1)
    heights = np.maximum(np.rint(np.sqrt(area / shape)), 1)
    fits = (widths <= width) & (heights <= height)
    row, first = np.arange(len(sizes)), np.argmax(fits, axis=1)
    crop = np.stack([heights[row, first], widths[row, first]], axis=1)
    # the middle, of a ratio that is allowed
    least, most = min(ratio), max(ratio)
    whole = np.concatenate(
        [np.minimum(height, np.rint(width / least)), np.minimum(width, np.rint(height * most))], 1
    )
    fit = fits.any(axis=1, keepdims=True)
    crop = np.where(fit, crop, np.maximum(whole, 1))
    room = sizes - crop
    place = np.where(fit, np.floor(drawn[:, 2 * _ATTEMPTS :] * (room + 1)), room // 2)
    return np.concatenate([place, crop], axis=1).astype(np.int64)


def _exp(x: Numbers) -> Numbers:
    """e^x by sums and products, which, unlike NumPy's, are the same bits on every CPU."""
    x = x / 1024
    series = 1 + x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5))))
    for _ in range(10):
        series = series * series
    return series


class Augment:
    """Images as a batch of crops, flipped and coloured.

    Raises:
        ConfigError: for an `auto_augment` that timm does not know.
    """

    def __init__(self, data: Data, augmentation: Augmentation) -> None:
        self.image_size = data.image_size
        self.interpolation = data.interpolation
        self.augmentation = augmentation
        self.others = _others(data, augmentation)

    def __call__(self, frames: Sequence[Array], key: int, indices: Sequence[int]) -> Array:
        """uint8 [N, image_size, image_size, 3] of frames, uint8 [H, W, 3] each.

        Args:
            key: of all that is drawn, such as `draw(seed, epoch)`.
            indices: an image's place in its data set, which what is drawn for it depends on.
        """
        size = self.image_size
        out = np.empty((len(frames), size, size, 3), np.uint8)
        if not frames:
            return out
        _int8.crop(
            list(frames),
            self.boxes([frame.shape[:2] for frame in frames], key, indices),
            interpolation=self.interpolation,
            out=out,
        )
        if self.others:
            with _unmoved():
                for image, index in zip(out, indices, strict=True):
                    _seed_host(int(bits(key, [index], _DRAWS)[0, -1]))
                    image[:] = self.others(Image.fromarray(image))
        return out

    def boxes(self, sizes: Any, key: int, indices: Sequence[int]) -> Numbers:
        """What is drawn for images of these heights and widths: int64 [N, 5].

        Returns:
            top, left, height and width of a crop, and whether it is flipped.
        """
        drawn = uniform(key, indices, 2 * _ATTEMPTS + 3)
        crops = boxes(
            np.array(sizes, np.int64),
            drawn[:, :-1],
            self.augmentation.scale,
            self.augmentation.ratio,
        )
        flips = drawn[:, -1:] < self.augmentation.hflip
        return np.concatenate([crops, flips], axis=1)


def _others(data: Data, augmentation: Augmentation) -> Any:
    """timm's transforms of a crop, a function of an image; None where there are none."""
    try:
        _, others, _ = create_transform(
            data.image_size,
            is_training=True,
            use_prefetcher=True,
            separate=True,
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
    return others if others.transforms else None


def _seed_host(seed: int) -> None:
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
