"""Pillow's resize with its passes in the order that every version up to 12 has."""

from typing import Any

import PIL
from PIL import Image


class _RowsFirst(Image.Image):
    def resize(self, size: Any, resample: Any = None, *_: Any) -> Image.Image:
        rows = super().resize((size[0], self.height), resample)
        return rows.resize(size, resample)


def rows_first(image: Image.Image) -> Image.Image:
    """An image that is resized along its rows, then along its columns.

    Up to Pillow 12 that is what `resize` does; 13 chooses the order by the shape, and is asked for
    each pass on its own.
    """
    image = image.copy()
    if int(PIL.__version__.split(".")[0]) > 12:
        image.__class__ = _RowsFirst
    return image
