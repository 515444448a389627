"""Atomic writes of files, paths in the home folder, and values that JSON can hold."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to, which is renamed to `path` if nothing is raised."""
    beside = path.with_name(f".{path.name}.part")
    try:
        yield beside
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def home(path: str) -> str:
    """`~` as the home folder, which a shell leaves alone behind `key=`; timm's local-dir:~ too."""
    return re.sub(r"^(local-dir:)?(~.*)", lambda x: (x[1] or "") + os.path.expanduser(x[2]), path)


def finite(value: Any) -> Any:
    """The value with None for every number that JSON lacks: NaN and the infinities."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
