"""From an image file to the uint8 pixels that a model reads; nothing here imports torch.

The short side is resized to image_size / crop_pct and the centre is kept: the pixels of timm's
validation transform, byte by byte. What is smaller than image_size gets a black border.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import numpy as np
from PIL import ExifTags, Image

# torchvision's, and what phones and browsers save besides; a file of another ending is no image
EXTENSIONS = tuple(".avif .bmp .gif .jfif .jpeg .jpg .pgm .png .ppm .tif .tiff .webp".split())

# what Pillow's decoders raise for a damaged file: AVIF's a RuntimeError, TIFF's a TypeError
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    RuntimeError,
    Image.DecompressionBombError,
)

# what archives and file systems add to folders, some with thumbnails in it
_NOT_OURS = ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information")

# what undoes each EXIF orientation
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# of the sides, above which a resize of the full image could take gigabytes
_STRIP = 16


class DataError(ValueError):
    """Images that cannot be used; the message names the file or folder."""


class Preprocessing(Protocol):
    """How images are prepared: `models.Pixels` and `int8.Session` say so."""

    @property
    def image_size(self) -> int: ...
    @property
    def crop_pct(self) -> float: ...
    @property
    def interpolation(self) -> str: ...


def read(file: str | Path, preprocessing: Preprocessing) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The pixels of a file, uint8 [image_size, image_size, 3], not normalised.

    Args:
        file: of any format that Pillow reads; see `open_rgb`.
        preprocessing: such as a session of `int8.load` or `models.Pixels`: its image_size,
            crop_pct and interpolation are read.

    Raises:
        DataError: naming a file that cannot be read.
    """
    try:
        return prepare(open_rgb(file), preprocessing)
    except UNREADABLE as error:
        raise unreadable(str(file), error) from error


def unreadable(name: str, error: Exception) -> DataError:
    """What `read` raises of a file for one of `UNREADABLE`."""
    return DataError(f"{name} cannot be read: {' '.join(str(error).split())}")


def open_rgb(file: str | Path | IO[bytes]) -> Image.Image:
    """An image file as 8-bit RGB; training, calibration, eval and predict all read by it.

    - Of an animation the first frame, of a TIFF the first page.
    - Upright: the EXIF orientation is applied. Broken EXIF data counts as none.
    - Grey of 16 bits becomes round(value / 257), so 65535 becomes 255, and a TIFF's 12 bits alike;
      of colours of 16 bits Pillow keeps the upper byte.
    - Alpha is dropped, not blended, as by torchvision: what was transparent shows the colour that
      the file has there.
    - CMYK and palettes as Pillow converts them; colour profiles are not applied.

    Raises:
        UNREADABLE: a damaged image, or 32-bit integers or floats, whose range is unknown.
    """
    with Image.open(file) as image:
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """`open_rgb` of an image that a data set has opened."""
    image.load()
    if image.mode == "P" and "transparency" in image.info:
        rgb = image.convert("RGBA").convert("RGB")  # Pillow warns of what is dropped in one step
    elif image.mode.startswith(("I", "F")):
        rgb = _eight_bits(image).convert("RGB")
    else:
        rgb = image.convert("RGB")
    try:
        turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # whatever broken metadata makes Pillow raise: the pixels are whole
        turn = None
    upright = rgb if turn is None else rgb.transpose(turn)
    upright.info = {}  # or a second call would turn it again
    return upright


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 12 and 16 bits as 8, where Pillow would cut everything above 255 to white."""
    # PNG and PGM hold 16 bits at most, and old Pillows give them as mode I
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        kind = "float" if image.mode == "F" else "signed or 32-bit integer"
        raise ValueError(
            f"its pixels are {kind} numbers of an unknown range; save it with 8 or 16 bits"
        )
    tags = getattr(image, "tag_v2", {})
    most = 4095 if tags.get(ExifTags.Base.BitsPerSample) == (12,) else 65535
    # in integers, and half is rounded up; odd divisors leave no ties
    levels = (np.asarray(image).astype(np.uint32) * 510 + most) // (2 * most)
    if tags.get(ExifTags.Base.PhotometricInterpretation) == 0:  # white is 0
        levels = 255 - levels
    return Image.fromarray(levels.astype(np.uint8))


def prepare(
    image: Image.Image, preprocessing: Preprocessing
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """An RGB image as uint8 [image_size, image_size, 3]."""
    size = preprocessing.image_size
    short = math.floor(size / preprocessing.crop_pct)
    width, height = image.size
    if width <= height:
        width, height = short, int(short * height / width)
    else:
        width, height = int(short * width / height), short
    filter = Image.Resampling[preprocessing.interpolation.upper()]
    left, top = _begin(width, size), _begin(height, size)
    if max(image.size) <= _STRIP * min(image.size):
        image = image.resize((width, height), filter)
    else:
        # the same geometry, of nothing but what the crop keeps
        kept = (max(left, 0), max(top, 0), min(left + size, width), min(top + size, height))
        across, down = image.width / width, image.height / height
        box = (kept[0] * across, kept[1] * down, kept[2] * across, kept[3] * down)
        image = image.resize((kept[2] - kept[0], kept[3] - kept[1]), filter, box)
        left, top = left - kept[0], top - kept[1]
    # a negative edge is outside: Pillow fills it with black
    return np.array(image.crop((left, top, left + size, top + size)))


def _begin(length: int, size: int) -> int:
    return round((length - size) / 2) if length >= size else -((size - length) // 2)


def natural_key(name: str) -> tuple[Any, ...]:
    """A total order in which 9 comes before 10 and case counts only between equals."""
    # every second part is digits: parts of one kind are compared
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


class Found(NamedTuple):
    """The image files in a folder, and how many other files were ignored."""

    files: dict[str, str]  # real path -> path, in natural order
    ignored: Counter[str]  # by their ending


def is_image(name: str) -> bool:
    """Whether a file of this name should be an image: by its ending, and not hidden."""
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def is_ours(name: str) -> bool:
    """Whether a folder of this name is looked into."""
    return not name.startswith(".") and name not in _NOT_OURS


def ending(name: str) -> str:
    """What an ignored file is counted as."""
    return "hidden" if name.startswith(".") else os.path.splitext(name)[1].lower() or name


def is_above(folder: str, other: str) -> bool:
    """Whether the first of two real paths is the second, or a folder that the second lies in."""
    return os.path.join(other, "").startswith(os.path.join(folder, ""))


def find(folder: str) -> Found:
    """The image files anywhere under a folder; hidden files and folders are left out.

    Symbolic links are followed. What is one file or folder by its real path counts once, and a link
    to a folder above is not entered.

    Raises:
        DataError: naming a folder that cannot be read.
    """
    files: dict[str, str] = {}
    ignored: Counter[str] = Counter()
    top = os.path.realpath(folder)
    entered, todo = {top}, [(folder, top)]
    for path, real in todo:  # which grows
        try:
            entries = sorted(os.scandir(path), key=lambda entry: natural_key(entry.name))
        except OSError as error:
            raise unreadable(path, error) from error
        for entry in entries:
            target, is_folder = os.path.join(real, entry.name), entry.is_dir(follow_symlinks=False)
            if entry.is_symlink():
                target, is_folder = os.path.realpath(entry.path), os.path.isdir(entry.path)
            if is_folder:
                above = is_above(target, top) or is_above(target, real)
                if is_ours(entry.name) and not above and target not in entered:
                    entered.add(target)
                    todo.append((entry.path, target))
            elif is_image(entry.name):
                files.setdefault(target, entry.path)
            else:
                ignored[ending(entry.name)] += 1
    return Found(dict(sorted(files.items(), key=lambda file: natural_key(file[1]))), ignored)


def list_images(path: str | Path) -> list[Path]:
    """The image files anywhere under a folder, in natural order, as `find` finds them.

    Raises:
        DataError: no folder, or no image in it.
    """
    if not Path(path).is_dir():
        raise DataError(f"{path} is no folder")
    if not (files := find(str(path)).files):
        raise DataError(f"{path} holds no images ({', '.join(EXTENSIONS)})")
    return [Path(file) for file in files.values()]
