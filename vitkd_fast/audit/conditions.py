"""Corruptions and augmentations of uint8 images [H, W, 3], each a function of (image, seed).

Gaussian noise, Gaussian blur, JPEG and brightness at the five severities of Hendrycks & Dietterich,
"Benchmarking neural network robustness to common corruptions and perturbations" (2019): the numbers
of CIFAR-10-C for images of fewer than 48 pixels a side, of Tiny ImageNet-C below 120, and else of
ImageNet-C.
As there, an image is corrupted at the size at which a model reads it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.ndimage
from PIL import Image

from .._preprocessing import Array

SEVERITIES = (1, 2, 3, 4, 5)

# of CIFAR-10-C, Tiny ImageNet-C and ImageNet-C, by severity
_STRENGTHS: dict[str, tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]] = {
    # standard deviation, of pixels in [0, 1]
    "noise": (
        (0.04, 0.06, 0.08, 0.09, 0.10),
        (0.04, 0.08, 0.12, 0.15, 0.18),
        (0.08, 0.12, 0.18, 0.26, 0.38),
    ),
    # standard deviation, in pixels
    "blur": ((0.4, 0.6, 0.7, 0.8, 1), (0.5, 0.75, 1, 1.25, 1.5), (1, 2, 3, 4, 6)),
    # quality
    "jpeg": ((80, 65, 58, 50, 40), (65, 58, 50, 40, 25), (25, 18, 15, 10, 7)),
    # what is added to V of HSV
    "brightness": (
        (0.05, 0.1, 0.15, 0.2, 0.3),
        (0.1, 0.2, 0.3, 0.4, 0.5),
        (0.1, 0.2, 0.3, 0.4, 0.5),
    ),
}


def strength(name: str, severity: int, side: int) -> float:
    """The number of a corruption for images of this side."""
    return _STRENGTHS[name][0 if side < 48 else 1 if side < 120 else 2][severity - 1]


def _bytes(x: np.ndarray) -> Array:
    """Of pixels in [0, 1]."""
    return np.rint(x.clip(0, 1) * 255).astype(np.uint8)


def _noise(image: Array, sigma: float, seed: Sequence[int]) -> Array:
    drawn = np.random.default_rng(list(seed)).normal(scale=sigma, size=image.shape)
    return _bytes(image / 255 + drawn)


def _blur(image: Array, sigma: float, _: Sequence[int]) -> Array:
    return _bytes(scipy.ndimage.gaussian_filter(image / 255, (sigma, sigma, 0), mode="nearest"))


def _jpeg(image: Array, quality: float, _: Sequence[int]) -> Array:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=int(quality))
    return np.asarray(Image.open(file).convert("RGB"))


def _brightness(image: Array, added: float, _: Sequence[int]) -> Array:
    """V of HSV is the largest channel; with hue and saturation kept, all scale with it."""
    x = image / 255
    value = x.max(axis=2, keepdims=True)
    brighter = np.minimum(value + added, 1)
    return _bytes(np.where(value > 0, x * brighter / np.maximum(value, 1e-9), brighter))


def _mirror(image: Array) -> Array:
    return image[:, ::-1]


def _shift(image: Array) -> Array:
    """An eighth of the side to the right; the edge is repeated."""
    step = max(image.shape[1] // 8, 1)
    return np.pad(image, ((0, 0), (step, 0), (0, 0)), mode="edge")[:, : image.shape[1]]


def _rotate(image: Array) -> Array:
    """15 degrees; the corners are black."""
    return np.asarray(Image.fromarray(image).rotate(15, Image.Resampling.BILINEAR))


def _zoom(image: Array) -> Array:
    """The middle 80% of each side, at the whole size."""
    height, width = image.shape[:2]
    box = (width / 10, height / 10, width * 9 / 10, height * 9 / 10)
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC, box)
    return np.asarray(resized)


_CORRUPTIONS: dict[str, Callable[[Array, float, Sequence[int]], Array]] = {
    "noise": _noise,
    "blur": _blur,
    "jpeg": _jpeg,
    "brightness": _brightness,
}
_AUGMENTATIONS: dict[str, Callable[[Array], Array]] = {
    "mirror": _mirror,
    "shift": _shift,
    "rotate": _rotate,
    "zoom": _zoom,
}


@dataclass(frozen=True)
class Condition:
    """A corruption of a severity, or an augmentation, which has none."""

    name: str
    severity: int | None = None

    def __post_init__(self) -> None:
        corruption = self.name in _CORRUPTIONS and self.severity in SEVERITIES
        if not (corruption or (self.name in _AUGMENTATIONS and self.severity is None)):
            raise ValueError(
                f"Condition: expected {', '.join(_CORRUPTIONS)} of severity 1 to 5, or "
                f"{', '.join(_AUGMENTATIONS)}, got {self.name} of severity {self.severity}"
            )

    def __call__(self, image: Array, seed: Sequence[int]) -> Array:
        """The image, uint8 [H, W, 3], changed; the same seed draws the same noise."""
        if self.severity is None:
            return np.ascontiguousarray(_AUGMENTATIONS[self.name](image))
        number = strength(self.name, self.severity, min(image.shape[:2]))
        return _CORRUPTIONS[self.name](image, number, seed)


def every(severities: Sequence[int]) -> list[Condition]:
    """All augmentations, and all corruptions at these severities."""
    return [
        *(Condition(name) for name in _AUGMENTATIONS),
        *(Condition(name, severity) for name in _CORRUPTIONS for severity in severities),
    ]
