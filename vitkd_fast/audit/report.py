"""The report of an audit: audit.json and one HTML page that opens offline, of the same results.

Numbers and pictures are made here, words of the page in audit.html.jinja; what both reports share
in looks comes from distill/report.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from .. import _page
from .._files import finite
from ..distill.looks import ACCENT, COLOURS, INK, STYLE, svg

_WHO = ("teacher", "student")
_TINTS = {"teacher": COLOURS["teacher"], "student": COLOURS["distilled"]}
_HARMED, _IMPROVED = "#c2410c", "#00937a"
_MOST_ROWS = 40  # classes or groups that are shown
_NAMES = {
    "noise": "Gaussian noise",
    "blur": "Gaussian blur",
    "jpeg": "JPEG",
    "brightness": "Brightness",
    "mirror": "Mirrored",
    "shift": "Shifted",
    "rotate": "Rotated",
    "zoom": "Zoomed in",
}


def percent(x: float | None, digits: int = 1) -> str:
    """100 x, or n/a."""
    return "n/a" if x is None else f"{100 * x:.{digits}f}"


def points(x: float | None) -> str:
    """A difference of shares in percentage points, signed."""
    return "n/a" if x is None else f"{100 * x:+.1f}".replace("-", "\N{MINUS SIGN}")


def interval(pair: Any, form: Any = percent) -> str:
    """Of two ends."""
    return "n/a" if pair is None or None in pair else f"{form(pair[0])} to {form(pair[1])}"


def p_value(p: float | None) -> str:
    """Of a test."""
    return "n/a" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _number(x: float | None) -> str:
    return "n/a" if x is None else f"{x:.3f}"


def verdict(results: dict[str, Any]) -> list[str]:
    """What was found, a sentence each; the harm comes first."""
    results = finite(results)
    harm, level = results["harm"], results["alpha"]
    sentences = []
    for many in ("classes", "groups"):
        if (rows := harm[many]) is None:
            continue
        harmed = [row for row in rows if row["finding"] == "harmed"]
        named = ", ".join(map(_named, harmed[:3]))
        more = f" and {len(harmed) - 3} more" if len(harmed) > 3 else ""
        if harmed:
            sentences.append(
                f"Harmed: {len(harmed)} of {len(rows)} {many} lost accuracy, p below {level} after "
                f"Holm's correction: {named}{more}."
            )
        else:
            sentences.append(
                f"No harm shown: none of {len(rows)} {many} lost accuracy with p below {level} "
                "after Holm's correction."
            )
    whole = harm["overall"]
    sentences.append(
        f"Accuracy: {percent(whole['student'])}%, the teacher's {percent(whole['teacher'])}%: "
        f"{points(whole['difference'])} points ({interval(whole['interval'], points)})."
    )
    own = results["calibration"]["student"]
    text = f"Calibration: the student's ECE is {_number(own['ece'])}"
    if own["bounded"]:
        text += "; no temperature can be fitted to these images."
    else:
        text += f", {_number(own['ece_scaled'])} at a temperature of {own['temperature']:.3g}."
    sentences.append(text)
    if found := results["robustness"]:
        weak = [row for row in found["rows"] if row["finding"] == "harmed"]
        sentences.append(
            f"Robustness: under {len(weak)} of {len(found['rows'])} conditions the student's "
            "answer flips more often than the teacher's."
        )
    return sentences


def _named(row: dict[str, Any]) -> str:
    """A class or group that is harmed, and by how much."""
    change = f"{points(row['difference'])} points, {interval(row['interval'], points)}"
    return f"{row['name']} ({change}, p {_equals(row['p_holm'])})"


def _equals(p: float) -> str:
    text = p_value(p)
    return text if text.startswith("<") else f"= {text}"


def _reliability(calibration: dict[str, Any]) -> Markup:
    """Accuracy over confidence of both, before and after scaling."""
    figure = Figure(figsize=(4.8, 3.9), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color=INK, lw=0.8, alpha=0.5)
    for who in _WHO:
        for key, style, label in (("bins", "-", who), ("bins_scaled", ":", f"{who}, scaled")):
            bins = calibration[who][key]
            x, y = [b["confidence"] for b in bins], [b["accuracy"] for b in bins]
            axes.plot(x, y, style, color=_TINTS[who], lw=1.4, label=label)
            if key == "bins":
                most = max(b["images"] for b in bins)
                sizes = [10 + 120 * b["images"] / most for b in bins]
                axes.scatter(x, y, s=sizes, color=_TINTS[who], alpha=0.35)
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1.02), ylim=(-0.02, 1.04))
    figure.legend(loc="outside lower center", ncols=2, columnspacing=3)
    return svg(figure)


def _forest(rows: list[dict[str, Any]]) -> Markup:
    """The change of each class or group, with its interval; the worst is on top."""
    figure = Figure(figsize=(4.8, 0.9 + 0.24 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for i, row in enumerate(rows):
        colour = {"harmed": _HARMED, "improved": _IMPROVED}.get(row["finding"], INK)
        axes.plot([100 * x for x in row["interval"]], [i, i], color=colour, lw=1.2)
        axes.plot(100 * row["difference"], i, "o", color=colour, ms=4)
    axes.axvline(0, color=INK, lw=0.8, alpha=0.5)
    short = [row["name"] if len(row["name"]) < 22 else row["name"][:20] + "…" for row in rows]
    axes.set_yticks(range(len(rows)), short)
    axes.set(xlabel="change of accuracy, points", ylim=(len(rows) - 0.5, -0.5))
    return svg(figure)


def _flips(rows: list[dict[str, Any]]) -> Markup:
    """The share of answers that flip, a bar for each model and condition."""
    figure = Figure(figsize=(4.8, 1 + 0.3 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    at = np.arange(len(rows))
    for who, shift in (("teacher", -0.19), ("student", 0.19)):
        shares = [100 * row[f"{who}_flips"] for row in rows]
        axes.barh(at + shift, shares, 0.36, color=_TINTS[who], label=who)
    axes.set_yticks(at, [_condition(row) for row in rows])
    axes.set(xlabel="answers that flip, %", ylim=(len(rows) - 0.5, -0.5))
    figure.legend(loc="outside lower center", ncols=2, columnspacing=3)
    return svg(figure)


def _condition(row: dict[str, Any]) -> str:
    severity = f" {row['severity']}" if row["severity"] else ""
    return _NAMES[row["name"]] + severity


def _costs(cost: dict[str, Any] | None) -> list[tuple[str, list[str]]]:
    """Rows of a name, and both models' numbers."""
    if cost is None:
        return []
    both = [cost[who] for who in _WHO]

    def row(name: str, key: str, form: Any, missing: str = "n/a") -> tuple[str, list[str]]:
        return name, [missing if x[key] is None else form(x[key]) for x in both]

    return [
        row("Latency p50, ms", "latency_ms", _three),
        row("p90, ms", "latency_p90_ms", _three),
        row("p99, ms", "latency_p99_ms", _three),
        row("CPU time, ms", "latency_cpu_ms", _three),
        row("Peak memory", "memory_bytes", _megabytes),
        row("of it before the model", "memory_before_bytes", _megabytes),
        row("File", "file_bytes", _megabytes),
        row("Energy, J an image", "energy_j", _three, "not available"),
    ]


def _three(x: float) -> str:
    """With three significant digits."""
    return f"{x:#.3g}".rstrip(".") if x < 1000 else f"{x:,.0f}"


def _megabytes(x: int) -> str:
    return f"{x / 1e6:,.1f} MB"


def ratio(results: dict[str, Any]) -> dict[str, float] | None:
    """What share of the teacher's accuracy the student keeps, for what share of its time."""
    cost, whole = results["cost"], results["harm"]["overall"]
    if not cost or not whole["teacher"]:
        return None
    kept = whole["student"] / whole["teacher"]
    time = cost["student"]["latency_ms"] / cost["teacher"]["latency_ms"]
    return {"kept": kept, "time": time, "ratio": kept / time}


def render(results: dict[str, Any]) -> str:
    """The report as one self-contained HTML page."""
    results = finite(results)
    harm, robustness = results["harm"], results["robustness"]
    with matplotlib.rc_context(STYLE):
        pictures = {
            "reliability": _reliability(results["calibration"]),
            "classes": _forest(harm["classes"][:_MOST_ROWS]),
            "groups": _forest(harm["groups"][:_MOST_ROWS]) if harm["groups"] else None,
            "flips": _flips(robustness["rows"]) if robustness else None,
        }
    forms = {"percent": percent, "points": points, "interval": interval, "p_value": p_value}
    forms |= {"number": _number, "condition": _condition}
    weakest = sorted(results["fidelity"]["classes"], key=lambda row: row["similarity"])
    return _page.render(
        "audit/audit.html.jinja",
        **{key: value for key, value in results.items() if key != "version"},
        verdict=verdict(results),
        pictures=pictures,
        costs=_costs(results["cost"]),
        ratio=ratio(results),
        names=_NAMES,
        weakest=weakest[:_MOST_ROWS],
        most=_MOST_ROWS,
        tints=_TINTS,
        accent=ACCENT,
        harmed=_HARMED,
        improved=_IMPROVED,
        **forms,
    )


def table(results: dict[str, Any]) -> str:
    """The audit as aligned text for a terminal."""
    results = finite(results)
    both = [results["metrics"][who] for who in _WHO]
    calibration = [results["calibration"][who] for who in _WHO]
    fidelity = results["fidelity"]
    rows: list[tuple[str, ...]] = [("", *_WHO)]
    rows += [(f"{key} %", *(percent(x[key]) for x in both)) for key in ("top1", "top5", "f1")]
    rows += [("nll", *(_number(x["nll"]) for x in calibration))]
    rows += [("ece", *(_number(x["ece"]) for x in calibration))]
    rows += [("  interval", *(interval(x["ece_interval"], _number) for x in calibration))]
    rows += [("ece, scaled", *(_number(x["ece_scaled"]) for x in calibration))]
    rows += [("temperature", *(f"{x['temperature']:.3g}" for x in calibration))]
    rows += [("agreement %", "", percent(fidelity["agreement"]))]
    rows += [("  interval", "", interval(fidelity["agreement_interval"]))]
    rows += [("kl", "", _number(fidelity["kl"]))]
    rows += [("similarity", "", _number(fidelity["similarity"]))]
    rows += [(name.lower(), *values) for name, values in _costs(results["cost"])]
    parts = [aligned(rows)]
    for key, title in (("classes", "class"), ("groups", "group")):
        if (found := results["harm"][key]) is not None:
            parts.append(_harm(found, title))
    if results["robustness"]:
        parts.append(_conditions(results["robustness"]["rows"]))
    return "\n\n".join(parts)


def _harm(rows: list[dict[str, Any]], title: str, most: int = 10) -> str:
    head = (title, "images", "teacher %", "student %", "change", "interval", "p (Holm)", "")
    cells = [
        (
            row["name"],
            str(row["images"]),
            percent(row["teacher"]),
            percent(row["student"]),
            points(row["difference"]),
            interval(row["interval"], points),
            p_value(row["p_holm"]),
            row["finding"],
        )
        for row in rows[:most]
    ]
    more = f"\n... and {len(rows) - most} more" if len(rows) > most else ""
    return aligned([head, *cells]) + more


def _conditions(rows: list[dict[str, Any]]) -> str:
    head = ("condition", "teacher %", "student %", "flips: teacher %", "student %", "p (Holm)")
    cells = [
        (
            _condition(row),
            *(
                percent(row[key])
                for key in ("teacher", "student", "teacher_flips", "student_flips")
            ),
            p_value(row["p_holm"]),
        )
        for row in rows
    ]
    return aligned([head, *cells])


def aligned(rows: list[tuple[str, ...]]) -> str:
    """A table for a terminal: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    form = "  ".join(f"{{:{'>' if i else '<'}{width}}}" for i, width in enumerate(widths))
    return "\n".join(form.format(*row).rstrip() for row in rows)


def write(results: dict[str, Any], folder: Path) -> Path:
    """Writes folder/audit.json and folder/audit.html, each atomically.

    In the JSON NaN and the infinities become null.

    Returns:
        The path of audit.html.
    """
    return _page.write(render(results), results, folder / "audit.html")
