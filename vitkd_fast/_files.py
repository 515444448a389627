"""Atomic writes of files, paths in the home folder, and values that JSON can hold."""

from __future__ import annotations

import errno
import fcntl
import math
import os
import re
import uuid
from collections.abc import Iterable, Iterator
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


def create(path: Path, *data: bytes) -> bool:
    """Writes a file that outlives a crash, atomically; False, and nothing, where one is there."""
    with _beside(path, data) as part:
        try:
            os.link(part, path)
        except OSError as error:
            if error.errno != errno.EEXIST:
                raise
            return False
    sync(path.parent)
    return True


def replace(path: Path, *data: bytes) -> None:
    """Likewise, whatever is there."""
    with _beside(path, data) as part:
        os.replace(part, path)
    sync(path.parent)


@contextmanager
def _beside(path: Path, data: Iterable[bytes]) -> Iterator[Path]:
    # of this call alone: another process may make the same file
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        with open(part, "wb") as file:
            file.writelines(data)
            file.flush()
            os.fsync(file.fileno())
        yield part
    finally:
        part.unlink(missing_ok=True)


def sync(folder: Path) -> None:
    """Makes the names in a folder outlive a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Creates a folder, and keeps out whoever else would lock it.

    Raises:
        BlockingIOError: another process has.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


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
