"""The report of a selection: report.json and one HTML page that opens offline, of the same results.

Numbers and pictures are made here, words of the page in select.html.jinja.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .. import _page
from .._files import finite
from ..audit.report import aligned, interval, p_value, percent, points
from ..distill.looks import INK, STYLE, svg
from .statistics import width

_COLOURS = ("#1a73c0", "#d98200", "#00937a", "#7b4fc9", "#c2410c", "#7a828c", "#b0307a", "#5b7f00")
_METRICS = {"top1": "top-1, %", "map": "mean average precision, %"}


def colour(place: int) -> str:
    """Of a candidate."""
    return _COLOURS[place % len(_COLOURS)]


def verdict(results: dict[str, Any]) -> list[str]:
    """What was found, a sentence each; the choice comes first."""
    results = finite(results)
    return [
        _choice(results),
        _found(results),
        _spread(results),
        *(_sensitivity(x, results["stability"]["choice"]) for x in results["sensitivity"]),
    ]


def _choice(results: dict[str, Any]) -> str:
    found, splits = results["stability"], results["splits"]
    tied = [x["name"] for x in found["rivals"] if x["state"] == "tied"]
    tied = [x for x in [found["leader"], *tied] if x != found["choice"]]
    margin = f"{100 * results['margin']:.2g} points"
    if found["stable"]:
        text = (
            f"Choose {found['choice']}: stable after {splits} splits, at level {results['alpha']}."
        )
        if tied:
            verb = "is" if len(tied) == 1 else "are"
            text += f" {', '.join(tied)} {verb} within {margin} of it, and named later."
        return text
    rivals = [x for x in found["rivals"] if x["state"] == "open"]
    text = f"Not settled by {splits} splits: {found['choice']} so far, and it may be "
    text += " or ".join(x["name"] for x in rivals)
    needed = [x["needed"] for x in rivals]
    if None in needed:
        return f"{text}. More splits would hardly tell; a larger --margin would."
    return f"{text}. About {max(needed)} splits would tell."


def _found(results: dict[str, Any]) -> str:
    better = [x for x in results["comparisons"] if x["better"]]
    if not better:
        return (
            "No candidate is shown to be better on other images of this kind: no p is below "
            f"{results['alpha']} after Holm's correction."
        )
    named = "; ".join(map(_named, better[:3]))
    more = f"; and {len(better) - 3} more pairs" if len(better) > 3 else ""
    return f"Better on other images of this kind, too, after Holm's correction: {named}{more}."


def _named(row: dict[str, Any]) -> str:
    ahead = row["better"]
    behind = row["second"] if ahead == row["first"] else row["first"]
    p = p_value(row["p_holm"])
    return f"{ahead} than {behind} by {100 * abs(row['difference']):.1f} points (p {_equals(p)})"


def _equals(p: str) -> str:
    return p if p.startswith("<") else f"= {p}"


def _spread(results: dict[str, Any]) -> str:
    shares = ", ".join(
        f"{x['name']} on {x['best_on']:.3g}" for x in results["candidates"] if x["best_on"]
    )
    return (
        f"Best of a split: {shares} of {results['splits']}; entropy "
        f"{abs(results['entropy']):.2f} of {results['entropy_most']:.2f} bits."
    )


def _sensitivity(varied: dict[str, Any], choice: str) -> str:
    others = [x for x in varied["rows"] if x["choice"] != choice]
    if not others:
        return f"With every {varied['key']} that was tried the choice is {choice}."
    named = ", ".join(f"{x['choice']} with {_value(x['value'])}" for x in others)
    return f"The choice depends on {varied['key']}: {named}."


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _names(results: dict[str, Any]) -> list[str]:
    return [x["name"] for x in results["candidates"]]


def _short(name: str) -> str:
    return name if len(name) < 20 else name[:18] + "…"


def _strip(results: dict[str, Any]) -> Markup:
    """The scores of each candidate, a dot for each split, and the interval of the mean."""
    scores, names = 100 * np.array(results["scores"]), _names(results)
    figure = Figure(figsize=(4.8, 1 + 0.42 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    spread = np.linspace(-0.22, 0.22, len(scores))
    for i in range(len(names)):
        x = scores[:, i]
        axes.scatter(x, i + spread, s=12, color=colour(i), alpha=0.4, lw=0)
        half = width(float(x.std(ddof=1)), len(x), results["alpha"])
        axes.plot([x.mean() - half, x.mean() + half], [i, i], color=colour(i), lw=2)
        axes.plot(x.mean(), i, "o", color=colour(i), ms=6)
    axes.set_yticks(range(len(names)), list(map(_short, names)))
    axes.set(xlabel=_METRICS.get(results["metric"], results["metric"]))
    axes.set_ylim(len(names) - 0.5, -0.5)
    return svg(figure)


def _lead(results: dict[str, Any]) -> Markup:
    """How far the leader is ahead of each rival, and how well that is known, after each split."""
    scores, names = np.array(results["scores"]), _names(results)
    leader = names.index(results["stability"]["leader"])
    each = results["alpha"] / math.comb(len(names), 2)
    figure = Figure(figsize=(4.8, 3.4), layout="constrained")
    axes = figure.add_subplot()
    margin, at = 100 * results["margin"], np.arange(2, len(scores) + 1)
    axes.axhspan(-margin, margin, color=INK, alpha=0.08, lw=0)
    axes.axhline(0, color=INK, lw=0.8, alpha=0.5)
    for i, name in enumerate(names):
        if i == leader:
            continue
        d = 100 * (scores[:, leader] - scores[:, i])
        mean = np.array([d[:n].mean() for n in at])
        half = np.array([width(float(d[:n].std(ddof=1)), int(n), each) for n in at])
        axes.plot(at, mean, color=colour(i), lw=1.6, label=f"over {_short(name)}")
        axes.fill_between(at, mean - half, mean + half, color=colour(i), alpha=0.14, lw=0)
    # two splits say so little that their interval would hide all others
    last = 100 * (scores[:, [leader]] - scores)
    scale = 3 * float(last.std(0).max()) + float(np.abs(last.mean(0)).max()) + margin
    axes.set_ylim(-scale, scale)
    axes.set(xlabel="splits", ylabel=f"lead of {_short(names[leader])}, points")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside lower center", ncols=2, columnspacing=3)
    return svg(figure)


def _values(varied: dict[str, Any], results: dict[str, Any]) -> Markup:
    """Each candidate's mean with each value, and a ring around the choice."""
    names, rows = _names(results), varied["rows"]
    figure = Figure(figsize=(4.8, 3), layout="constrained")
    axes, at = figure.add_subplot(), np.arange(len(rows))
    for i, name in enumerate(names):
        mean = [100 * x["means"][i] for x in rows]
        error = [100 * x["errors"][i] for x in rows]
        axes.errorbar(at, mean, error, color=colour(i), lw=1.4, marker="o", ms=4, capsize=2,
                      label=_short(name))  # fmt: skip
    for j, row in enumerate(rows):
        best = 100 * row["means"][names.index(row["choice"])]
        axes.plot(j, best, "o", ms=11, mfc="none", mec=INK, mew=1.2)
    axes.set_xticks(at, [_short(_value(x["value"])) for x in rows])
    axes.set(xlabel=varied["key"], ylabel=_METRICS.get(results["metric"], results["metric"]))
    axes.set_xlim(-0.4, len(rows) - 0.6)
    figure.legend(loc="outside lower center", ncols=2, columnspacing=3)
    return svg(figure)


def render(results: dict[str, Any]) -> str:
    """The report as one self-contained HTML page."""
    results = finite(results)
    with matplotlib.rc_context(STYLE):
        pictures = {
            "scores": _strip(results),
            "lead": _lead(results),
            "values": [_values(x, results) for x in results["sensitivity"]],
        }
    rivals = {x["name"]: x for x in results["stability"]["rivals"]}
    return _page.render(
        "select/select.html.jinja",
        **{key: value for key, value in results.items() if key not in ("version", "path")},
        verdict=verdict(results),
        pictures=pictures,
        rivals=rivals,
        tints=[colour(i) for i in range(len(results["candidates"]))],
        label=_METRICS.get(results["metric"], results["metric"]),
        percent=percent,
        points=points,
        interval=interval,
        p_value=p_value,
        value=_value,
    )


def table(results: dict[str, Any]) -> str:
    """The selection as aligned text for a terminal."""
    results = finite(results)
    rivals = {x["name"]: x for x in results["stability"]["rivals"]}
    head = ("candidate", f"{results['metric']} %", "std", "best on", "lead over it", "state", "s")
    rows: list[tuple[str, ...]] = [head]
    for x in results["candidates"]:
        rival = rivals.get(x["name"])
        rows.append(
            (
                x["name"],
                percent(x["mean"]),
                percent(x["std"]),
                f"{x['best_on']:.3g}",
                points(rival["difference"]) if rival else "",
                rival["state"] if rival else "leader",
                f"{x['seconds']:.3g}",
            )
        )
    tests: list[tuple[str, ...]] = [("pair", "difference", "interval", "p", "p (Holm)", "better")]
    tests += [
        (
            f"{x['first']} - {x['second']}",
            points(x["difference"]),
            interval(x["interval"], points),
            p_value(x["p"]),
            p_value(x["p_holm"]),
            x["better"],
        )
        for x in results["comparisons"]
    ]
    parts = [aligned(rows), aligned(tests)]
    for varied in results["sensitivity"]:
        values = [(varied["key"], *_names(results), "choice")]
        values += [
            (_value(x["value"]), *map(percent, x["means"]), x["choice"]) for x in varied["rows"]
        ]
        parts.append(aligned(values))
    return "\n\n".join(parts)


def write(results: dict[str, Any], folder: Path) -> Path:
    """Writes folder/report.json and folder/report.html, each atomically.

    Returns:
        The path of report.html.
    """
    return _page.write(render(results), results, folder / "report.html")
