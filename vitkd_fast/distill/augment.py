"""Augmentation: crops, flips, colours and erasing of a batch, and timm's automatic augmentation.

A crop has timm's distribution: of ten attempts at a share of the area and a ratio of the sides the
first that fits, else the middle. What is drawn for an image is a function of (seed, epoch, index)
alone, whatever is drawn for others, from the counters of SplitMix64 (Steele, Lea and Flood, 2014):
all images of a batch at once. The engine crops and resizes in one pass over the box alone, with the
bytes of Pillow 12.3: docs/numerics.md.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN
from timm.data.transforms_factory import create_transform

from .. import _int8
from .._preprocessing import Array
from .config import Augmentation, ConfigError, Data

_ATTEMPTS = 10
_DRAWS = 64  # of an image
_CROP, _FLIP, _COLOUR, _ERASE, _SEED = slice(22), 22, slice(23, 27), slice(27, 50), 63  # of these
_ORDERS = np.array(list(itertools.permutations(range(3))), np.uint8)
_ERASED = 0.02, 1 / 3  # of an image's area, and the ratio of sides: timm's
_ERASED_RATIO = 0.3, 1 / 0.3
_FILL = np.round(255 * np.array(IMAGENET_DEFAULT_MEAN)).astype(np.uint8)
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
    crop, fits = _first_that_fits(sizes, sizes, drawn, scale, ratio)
    # else the middle, of a ratio that is allowed
    height, width = sizes[:, :1], sizes[:, 1:]
    least, most = min(ratio), max(ratio)
    middle = np.concatenate(
        [np.minimum(height, np.rint(width / least)), np.minimum(width, np.rint(height * most))], 1
    )
    crop = np.where(fits, crop, np.maximum(middle, 1))
    room = sizes - crop
    place = np.where(fits, np.floor(drawn[:, 2 * _ATTEMPTS :] * (room + 1)), room // 2)
    return np.concatenate([place, crop], axis=1).astype(np.int64)


def erasures(size: int, drawn: Numbers, probability: float) -> Numbers:
    """What timm's `RandomErasing` erases of images: int64 [N, 4], nothing where all are 0.

    Args:
        size: of the square images.
        drawn: [N, 23] in [0, 1): whether at all, then as `boxes`.
        probability: of erasing.

    Returns:
        top, left, height and width.
    """
    sizes = np.full((len(drawn), 2), size)
    part, fits = _first_that_fits(sizes, sizes - 1, drawn[:, 1:], _ERASED, _ERASED_RATIO)
    place = np.floor(drawn[:, -2:] * (sizes - part + 1))
    erased = fits & (drawn[:, :1] < probability)
    return np.where(erased, np.concatenate([place, part], axis=1), 0).astype(np.int64)


def _first_that_fits(
    sizes: Numbers, limits: Numbers, drawn: Numbers, scale: Sequence[float], ratio: Sequence[float]
) -> tuple[Numbers, Numbers]:
    """Height and width [N, 2] of the first attempt within the limits, and [N, 1] whether one is."""
    area = (scale[0] + (scale[1] - scale[0]) * drawn[:, :_ATTEMPTS]) * sizes.prod(1, keepdims=True)
    low, high = map(math.log, ratio)
    shape = _exp(low + (high - low) * drawn[:, _ATTEMPTS : 2 * _ATTEMPTS])
    widths = np.maximum(np.rint(np.sqrt(area * shape)), 1)
    heights = np.maximum(np.rint(np.sqrt(area / shape)), 1)
    fits = (heights <= limits[:, :1]) & (widths <= limits[:, 1:])
    row, first = np.arange(len(sizes)), np.argmax(fits, axis=1)
    found = np.stack([heights[row, first], widths[row, first]], axis=1)
    return found, fits.any(axis=1, keepdims=True)


def _exp(x: Numbers) -> Numbers:
    """e^x by sums and products, which, unlike NumPy's, are the same bits on every CPU."""
    x = x / 1024
    series = 1 + x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5))))
    for _ in range(10):
        series = series * series
    return series


class Augment:
    """Images as a batch of crops, flipped, coloured and erased.

    Raises:
        ConfigError: for an `auto_augment` that timm does not know.
    """

    def __init__(self, data: Data, augmentation: Augmentation) -> None:
        self.image_size = data.image_size
        self.interpolation = data.interpolation
        self.augmentation = augmentation
        self.automatic = _automatic(data, augmentation)

    def __call__(self, frames: Sequence[Array], key: int, indices: Sequence[int]) -> Array:
        """uint8 [N, image_size, image_size, 3] of frames, uint8 [H, W, 3] each.

        Args:
            key: of all that is drawn, such as `draw(seed, epoch)`.
            indices: an image's place in its data set, which what is drawn for it depends on.
        """
        size, augmentation = self.image_size, self.augmentation
        out = np.empty((len(frames), size, size, 3), np.uint8)
        if not frames:
            return out
        drawn = uniform(key, indices, _DRAWS)
        crops = self.boxes([frame.shape[:2] for frame in frames], drawn)
        _int8.crop(list(frames), crops, interpolation=self.interpolation, out=out)
        if self.automatic:
            with _unmoved():
                seeds = bits(key, indices, _DRAWS)[:, _SEED]
                for image, seed in zip(out, seeds.tolist(), strict=True):
                    _seed_host(seed)
                    image[:] = self.automatic(Image.fromarray(image))
        elif augmentation.color_jitter:
            _int8.jitter(out, *colours(drawn[:, _COLOUR], augmentation.color_jitter))
        if augmentation.erasing:
            parts = erasures(size, drawn[:, _ERASE], augmentation.erasing).tolist()
            for image, (top, left, height, width) in zip(out, parts, strict=True):
                image[top : top + height, left : left + width] = _FILL
        return out

    def boxes(self, sizes: Any, drawn: Numbers) -> Numbers:
        """int64 [N, 5]: top, left, height and width of a crop, and whether it is flipped.

        Args:
            sizes: height and width of each image.
            drawn: [N, 64], of `uniform`.
        """
        augmentation = self.augmentation
        crops = boxes(
            np.array(sizes, np.int64), drawn[:, _CROP], augmentation.scale, augmentation.ratio
        )
        flips = drawn[:, _FLIP, None] < augmentation.hflip
        return np.concatenate([crops, flips], axis=1)


def colours(drawn: Numbers, strength: float) -> tuple[Numbers, Numbers]:
    """Factors of brightness, contrast and saturation, float32 [N, 3], and their order, uint8.

    As torchvision's `ColorJitter(strength, strength, strength)` draws them.

    Args:
        drawn: [N, 4] in [0, 1).
    """
    low, high = max(0.0, 1 - strength), 1 + strength
    factors = (low + (high - low) * drawn[:, :3]).astype(np.float32)
    return factors, _ORDERS[(drawn[:, 3] * len(_ORDERS)).astype(np.int64)]


def _automatic(data: Data, augmentation: Augmentation) -> Any:
    """timm's `auto_augment`, a function of an image; None where there is none."""
    if not augmentation.auto_augment:
        return None
    try:
        _, automatic, _ = create_transform(
            data.image_size,
            is_training=True,
            use_prefetcher=True,
            separate=True,
            # which timm leaves out beside most
            color_jitter=augmentation.color_jitter or None,  # type: ignore[arg-type]
            auto_augment=augmentation.auto_augment,
            interpolation=data.interpolation,
        )
    except (AssertionError, ValueError, KeyError) as error:
        raise ConfigError(
            f"augmentation.auto_augment: {augmentation.auto_augment!r} is none of timm's, such as "
            "rand-m9-mstd0.5, augmix-m3 or v0"
        ) from error
    return automatic


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
