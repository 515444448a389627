"""The pages that are written: jinja2's templates of this package, and what they share, page.css."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ._files import finite, replacing


def render(template: str, **values: Any) -> str:
    """One self-contained page; `template` is its path within the package."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent, encoding="utf-8"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def write(page: str, results: dict[str, Any], path: Path) -> Path:
    """Writes a page, and beside it its results with the suffix .json, each atomically.

    The JSON holds the results as they are, except that NaN and the infinities become null.

    Returns:
        The page's path.
    """
    data = json.dumps(finite(results), allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path.with_suffix(".json")) as json_part, replacing(path) as html_part:
        json_part.write_text(data + "\n", encoding="utf-8")
        # a file's name may hold what UTF-8 cannot
        html_part.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")
    return path
