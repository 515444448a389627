"""From the values of a float map to the range that its 256 levels should cover.

A histogram's bins double in width when a value falls outside of them, so one pass over the
images is enough; widths are powers of two, so that the order of the images changes no count.
The range is the one of least expected squared error, rounding and clipping counted, or between
percentiles, or the observed range.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from .graph import Array

Calibration = Literal["mse", "percentile", "minmax"]
CALIBRATIONS: tuple[str, ...] = get_args(Calibration)

_HALF = 4096  # bins on either side of 0
_PIXELS = 28  # counted per row and column of a large map: 1 in 16 pixels of 112x112
_OUTSIDE = 1e-4  # of the values, left outside at either end by "percentile"


@dataclass(frozen=True)
class Scale:
    """x is about (q - zero_point) * scale, q in 0..255."""

    scale: float
    zero_point: int

    @property
    def ends(self) -> tuple[float, float]:
        """What bytes 0 and 255 stand for."""
        return -self.zero_point * self.scale, (255 - self.zero_point) * self.scale

    def rounded(self, x: Tensor) -> Tensor:
        """The values that the bytes of x stand for."""
        q = (x / self.scale).round_().add_(self.zero_point).clamp_(0, 255)
        return q.sub_(self.zero_point).mul_(self.scale)

    @classmethod
    def of(cls, lo: float, hi: float) -> Scale:
        """Of a range with 0 in it; an empty one gets scale 1."""
        scale = (hi - lo) / 255 or 1.0
        return cls(scale, int(np.clip(np.rint(-lo / scale), 0, 255)))


class Histogram:
    """Counts of the values of a map: bin i of 2 * 4096 is from (i - 4096) * width on."""

    def __init__(self) -> None:
        self.width = 0.0
        self.counts = np.zeros(2 * _HALF)
        self.least = self.most = 0.0

    def add(self, x: Tensor) -> None:
        """Counts x, [N, C, H, W]; of large maps some rows and columns.

        Raises:
            ValueError: x holds NaN or Inf.
        """
        least, most = float(x.amin()), float(x.amax())
        largest = max(-least, most)
        if not largest < float("inf"):
            raise ValueError("its float values hold NaN or Inf")
        self.least, self.most = min(self.least, least), max(self.most, most)
        if self.width == 0 and largest > 0:
            self.width = 2.0 ** math.frexp(largest)[1] / _HALF
        while largest > 0 and largest >= self.width * _HALF:
            self.width *= 2
            merged = self.counts.reshape(-1, 2).sum(1)
            self.counts = np.pad(merged, _HALF // 2)
        rows, columns = (max(size // _PIXELS, 1) for size in x.shape[2:])
        bins = (x[:, :, ::rows, ::columns].double() / (self.width or 1.0)).floor_().int() + _HALF
        self.counts += torch.bincount(bins.flatten(), minlength=2 * _HALF).cpu().numpy()

    def range(self, calibration: Calibration) -> Scale:
        """The scale and zero point of the values counted; 0 has its own level."""
        if self.width == 0 or calibration == "minmax":
            return Scale.of(self.least, self.most)
        kept = np.flatnonzero(self.counts)
        values, weights = (kept + 0.5 - _HALF) * self.width, self.counts[kept]
        if self.least >= 0:
            values = np.maximum(values, 0)
        if calibration == "percentile":
            ends = np.searchsorted(np.cumsum(weights) / weights.sum(), [_OUTSIDE, 1 - _OUTSIDE])
            lo, hi = values[np.minimum(ends, len(values) - 1)]
            return Scale.of(min(float(lo), 0.0), max(float(hi), 0.0))
        return self._least_error(values, weights)

    def _least_error(self, values: Array, weights: Array) -> Scale:
        """Shrinks one end after the other, as long as the expected squared error falls."""
        shares = np.linspace(0.02, 1, 99)
        lo, hi = self.least, self.most
        for _ in range(3):
            before = lo, hi
            if hi > 0:
                ends = self.most * shares
                hi = float(ends[np.argmin([_error(values, weights, lo, end) for end in ends])])
            if lo < 0:
                ends = self.least * shares
                lo = float(ends[np.argmin([_error(values, weights, end, hi) for end in ends])])
            if (lo, hi) == before:
                break
        return Scale.of(lo, hi)


def _error(values: Array, weights: Array, lo: float, hi: float) -> float:
    """The squared error of values quantised to a range, times their counts."""
    scale = Scale.of(lo, hi)
    q = np.clip(np.rint(values / scale.scale) + scale.zero_point, 0, 255)
    return float(weights @ (values - (q - scale.zero_point) * scale.scale) ** 2)
