"""Preparing an image, and the bounds of what prepares it; nothing here imports torch or Pillow.

Mean and std are of pixels in [0, 1], where OpenVINO, ncnn and mmcv want them of pixels in 0..255;
crop_pct is a share, not a percentage.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from . import _int8

Array = np.ndarray[Any, np.dtype[np.uint8]]


class Preprocessing(Protocol):
    """How images are prepared: `models.Pixels` and `int8.Session` say so."""

    @property
    def image_size(self) -> int: ...
    @property
    def crop_pct(self) -> float: ...
    @property
    def interpolation(self) -> str: ...


def prepare(
    who: str, frame: Any, wanted: Preprocessing, out: Array | None = None, isa: str = ""
) -> Array:
    """A frame, uint8 [H, W, 3], resized and cropped to uint8 [image_size, image_size, 3].

    Args:
        who: the caller's name, for messages.
        frame: an array or a CPU tensor; its rows may be apart, or bottom up.
        out: contiguous, to write to.
        isa: one of `int8.isa()`; "": the best.

    Raises:
        ValueError: frame or out of another shape or dtype, or a preprocessing out of range.
    """
    frame, size = np.asarray(frame), wanted.image_size
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or frame.size == 0:
        raise ValueError(
            f"{who}: expected a frame, uint8 [H, W, 3], got {frame.dtype} {list(frame.shape)}"
        )
    if frame.strides[1:] != (3, 1) or abs(frame.strides[0]) < 3 * frame.shape[1]:
        frame = np.ascontiguousarray(frame)
    if out is None:
        out = np.empty((size, size, 3), np.uint8)
    check_out(who, out, np.uint8, (size, size, 3))
    try:
        _int8.prepare(
            frame, crop_pct=wanted.crop_pct, interpolation=wanted.interpolation, isa=isa, out=out
        )
    except ValueError as error:
        raise ValueError(f"{who}: {error}") from None
    return out


def check_out(who: str, out: Any, dtype: type, shape: tuple[int, ...]) -> None:
    """Raises ValueError for what results cannot be written to."""
    if (
        not isinstance(out, np.ndarray)
        or out.dtype != dtype
        or out.shape != shape
        or not (out.flags.c_contiguous and out.flags.writeable)
    ):
        given = f"{getattr(out, 'dtype', type(out).__name__)} {list(np.shape(out))}"
        raise ValueError(
            f"{who}: out: expected a contiguous, writeable {np.dtype(dtype)} ndarray "
            f"{list(shape)}, got {given}"
        )


def check(mean: Any, std: Any, crop_pct: float) -> None:
    """Checks three numbers each for mean and std.

    Raises:
        ValueError: names the argument, what was expected and what was given.
    """
    for name, value in (("mean", mean), ("std", std)):
        wanted = "[0, 1]" if name == "mean" else "(0, 1]"
        fit = len(value) == 3 and all(0 <= x <= 1 and (name == "mean" or x > 0) for x in value)
        if not fit:
            pixels = any(1 < abs(x) <= 255 for x in value)
            hint = "; divide by 255 what is for pixels in 0..255" if pixels else ""
            raise ValueError(
                f"{name}: expected three numbers in {wanted}, got {tuple(value)}{hint}"
            )
    if not 0.1 <= crop_pct <= 2:
        hint = "; divide a percentage by 100" if 2 < crop_pct <= 200 else ""
        raise ValueError(f"crop_pct: expected 0.1 to 2, got {crop_pct}{hint}")
