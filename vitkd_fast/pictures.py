"""From a picture's file to the uint8 pixels that a model reads; nothing here imports torch.

The short side is resized to image_size / crop_pct and the centre is kept: the pixels of
`distill.data.eval_transform`, byte by byte. What is smaller than image_size gets a black border.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

# what Pillow raises for a file that is no whole picture
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class DataError(ValueError):
    """Pictures that cannot be used; the message names the file or folder."""


class Wanted(Protocol):
    """How pictures are prepared: `models.Pixels` and `int8.Session` say so."""

    @property
    def image_size(self) -> int: ...
    @property
    def crop_pct(self) -> float: ...
    @property
    def interpolation(self) -> str: ...


def read(file: str | Path, wanted: Wanted) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The pixels of a file, uint8 [image_size, image_size, 3], not normalised.

    Args:
        file: of any format that Pillow reads.
        wanted: such as a session of `int8.load`: its image_size, crop_pct and interpolation count.

    Raises:
        DataError: naming a file that cannot be read.
    """
    try:
        with Image.open(file) as image:
            return prepare(image.convert("RGB"), wanted)
    except UNREADABLE as error:
        why = " ".join(str(error).split())
        raise DataError(f"{file} cannot be read: {why}") from error


def prepare(image: Image.Image, wanted: Wanted) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """An RGB picture as uint8 [image_size, image_size, 3]."""
    size = wanted.image_size
    short = math.floor(size / wanted.crop_pct)
    width, height = image.size
    if width <= height:
        width, height = short, int(short * height / width)
    else:
        width, height = int(short * width / height), short
    image = image.resize((width, height), Image.Resampling[wanted.interpolation.upper()])
    # a negative edge is outside: Pillow fills it with black
    left, top = _begin(width, size), _begin(height, size)
    return np.array(image.crop((left, top, left + size, top + size)))


def _begin(length: int, size: int) -> int:
    return round((length - size) / 2) if length >= size else -((size - length) // 2)
