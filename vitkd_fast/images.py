"""From an image file to the uint8 pixels that a model reads; nothing here imports torch.

The short side is resized to image_size / crop_pct and the centre is kept, as by timm's validation
transform. What is smaller than image_size gets a black border. The resize is the engine's own: the
bytes of Pillow 12.3 whatever Pillow is installed (13.0 gives others for some shapes).
"""

from __future__ import annotations

import io
import os
import re
from collections import Counter
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageFile

from . import _preprocessing
from ._preprocessing import Array, Preprocessing

try:
    import simplejpeg
except ImportError:  # the extra `turbo`
    simplejpeg = None

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


class DataError(ValueError):
    """Images that cannot be used; the message names the file or folder."""


def read(file: str | Path, preprocessing: Preprocessing) -> Array:
    """The pixels of a file, uint8 [image_size, image_size, 3], not normalised.

    Args:
        file: of any format that Pillow reads; see `open_rgb`.
        preprocessing: such as a session of `int8.load` or `models.Pixels`: its image_size,
            crop_pct and interpolation are read.

    Raises:
        DataError: naming a file that cannot be read.
    """
    try:
        with Image.open(file) as image:
            pixels = _turbo(image)
            return prepare(to_rgb(image) if pixels is None else pixels, preprocessing)
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
    return Image.fromarray(open_pixels(file))


def open_pixels(file: str | Path | IO[bytes]) -> Array:
    """`open_rgb` as uint8 [H, W, 3]."""
    with Image.open(file) as image:
        pixels = _turbo(image)
        return np.asarray(to_rgb(image)) if pixels is None else pixels


def _turbo(image: ImageFile.ImageFile) -> Array | None:
    """The pixels of an upright JPEG, decoded by simplejpeg in less time; None: Pillow decodes it.

    Both are libjpeg-turbo with its exact transforms. CMYK, which they convert differently, and what
    is damaged stay Pillow's.
    """
    if simplejpeg is None or not _is_plain(image):
        return None
    assert image.fp is not None
    image.fp.seek(0)
    try:
        return simplejpeg.decode_jpeg(image.fp.read())
    except ValueError:
        return None


def _is_plain(image: ImageFile.ImageFile) -> bool:
    return image.format == "JPEG" and image.mode in ("RGB", "L") and _turn(image) is None


def is_plain(data: bytes) -> bool:
    """Whether the bytes of a file are those of an upright JPEG that simplejpeg may decode."""
    with Image.open(io.BytesIO(data)) as image:
        return _is_plain(image)


def decode(data: Array, plain: bool) -> Array:
    """`open_pixels` of a file's bytes, uint8 [N], of which `is_plain` is known."""
    if plain and simplejpeg is not None:
        try:
            return simplejpeg.decode_jpeg(data)
        except ValueError:
            pass  # Pillow decodes it, or says what is wrong
    return open_pixels(io.BytesIO(data.tobytes()))


def to_rgb(image: Image.Image) -> Image.Image:
    """`open_rgb` of an image that a data set has opened."""
    image.load()
    if image.mode == "P" and "transparency" in image.info:
        rgb = image.convert("RGBA").convert("RGB")  # Pillow warns of what is dropped in one step
    elif image.mode.startswith(("I", "F")):
        rgb = _eight_bits(image).convert("RGB")
    else:
        rgb = image.convert("RGB")
    turn = _turn(image)
    upright = rgb if turn is None else rgb.transpose(turn)
    upright.info = {}  # or a second call would turn it again
    return upright


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What makes an image upright."""
    try:
        return _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # whatever broken metadata makes Pillow raise: the pixels are whole
        return None


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


def prepare(image: Image.Image | Array, preprocessing: Preprocessing) -> Array:
    """An RGB image, or uint8 [H, W, 3], as uint8 [image_size, image_size, 3].

    Raises:
        ValueError: an array of another shape or dtype.
    """
    return _preprocessing.prepare("images.prepare", image, preprocessing)


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
