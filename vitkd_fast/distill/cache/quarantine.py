"""Images that kill the process that reads them: the list of a cache, beside its plan.

A plan never changes, and what cannot be read is known only when it is read: so these are not of the
plan. A row of such an image is one of an image that could not be read, and nobody reads it again.
"""

from __future__ import annotations

import json

from .store import CacheError, Where, at

FILE = "quarantine.json"


def read(folder: Where) -> dict[int, str]:
    """The names of the images of a cache that are left out, by index.

    Raises:
        CacheError: the list is damaged.
    """
    store = at(folder)
    try:
        tree = json.loads(store.read(FILE))
        return {int(index): str(name) for index, name in tree.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as error:
        raise CacheError(f"{store.name(FILE)}: cannot be read: {error}") from error


def add(folder: Where, index: int, name: str) -> dict[int, str]:
    """Puts an image on the list, which outlives a crash; returns the list."""
    found = dict(sorted({**read(folder), index: name}.items()))
    at(folder).replace(FILE, (json.dumps(found, indent=1) + "\n").encode())
    return found
