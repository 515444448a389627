"""Images that kill the process that reads them: the list of a cache, beside its plan.

A plan never changes, and what cannot be read is known only when it is read: so these are not of the
plan. A row of such an image is one of an image that could not be read, and nobody reads it again.
"""

from __future__ import annotations

import json
from pathlib import Path

from ..._files import replacing
from .plan import CacheError, sync

FILE = "quarantine.json"


def read(folder: Path) -> dict[int, str]:
    """The names of the images of a cache that are left out, by index.

    Raises:
        CacheError: the list is damaged.
    """
    path = folder / FILE
    try:
        tree = json.loads(path.read_text())
        return {int(index): str(name) for index, name in tree.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as error:
        raise CacheError(f"{path}: cannot be read: {error}") from error


def add(folder: Path, index: int, name: str) -> dict[int, str]:
    """Puts an image on the list, which outlives a crash; returns the list."""
    found = dict(sorted({**read(folder), index: name}.items()))
    with replacing(folder / FILE) as part:
        part.write_text(json.dumps(found, indent=1) + "\n")
    sync(folder)
    return found
