"""The deployment card: one HTML page that opens offline, and the JSON that it was made of.

Numbers are `compare`'s; words and layout are in card.html.jinja.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import _page
from .._files import finite
from .compare import SHOWN, verdict


def render(results: dict[str, Any]) -> str:
    """The card as one self-contained page."""
    results = finite(results)
    title = Path(results["model"]["file"]).name
    return _page.render(
        "export/card.html.jinja", **results, title=title, verdict=verdict(results), shown=SHOWN
    )


def write(results: dict[str, Any], path: Path) -> Path:
    """Writes the page, and beside it the results under the same name in .json.

    Returns:
        The path of the JSON.
    """
    return _page.write(render(results), results, path).with_suffix(".json")


def table(results: dict[str, Any]) -> str:
    """The figures as aligned text for a terminal, a column for each model."""
    _, *others = models = results["models"]
    rows: list[list[str]] = [["", *(model["name"] for model in models)]]

    def add(name: str, form: str, of: Any, shown: list[dict[str, Any]]) -> None:
        cells = ["" if model not in shown else form.format(of(model)) for model in models]
        rows.append([name, *cells])

    add("agreement %", "{:.1f}", lambda m: 100 * m["agreement"], others)
    add("largest difference, steps", "{:.3g}", lambda m: m["largest_steps"], others)
    add("mean difference, steps", "{:.3g}", lambda m: m["mean_steps"], others)
    for key, name in (("latency_ms", "latency"), ("cpu_ms", "CPU time")):
        for p in ("p50", "p90", "p99"):
            add(f"{name} {p}, ms", "{:.3g}", lambda m, key=key, p=p: m[key][p], models)
    add("file, MB", "{:.2f}", lambda m: m["bytes"] / 1e6, models)
    add("peak memory, MB", "{:.0f}", lambda m: m["peak_bytes"] / 1e6, models)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    form = "  ".join(f"{{:{'<' if i == 0 else '>'}{w}}}" for i, w in enumerate(widths))
    lines = [form.format(*row).rstrip() for row in rows]
    for model in others:
        if model["operators"] is not None:
            found = ", ".join(f"{n} {name}" for name, n in model["operators"]["float"].items())
            lines.append(f"{model['name']} in float: {found or 'nothing'}")
    return "\n".join(lines)
