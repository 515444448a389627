"""The report of a run: report.json and one HTML page that opens offline, from the same dictionary.

The page loads nothing: its style, its images (SVG drawn by matplotlib) and the thumbnails stand
inside it. Numbers and images are made here, words in report.html.jinja.
"""

from __future__ import annotations

import base64
import io
import json
import math
import shlex
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.ticker import LogLocator, NullLocator

from .. import _page
from .._files import finite
from .looks import ACCENT as _ACCENT
from .looks import COLOURS as _COLOURS
from .looks import INK as _INK
from .looks import STYLE as _STYLE
from .looks import svg as _svg

VERSION = 1
_PERCENT = frozenset(
    {"top1", "top5", "map", "knn", "precision", "recall", "f1", "micro_f1", "exact"}
    | {"agreement", "unchanged"}
)
_LATENCIES = ("latency_ms", "latency_p90_ms", "latency_p99_ms", "latency_cpu_ms")
_COSTS = frozenset({"parameters", "macs", "bytes", "images_per_s", *_LATENCIES})
_BUSY = 1.5  # a clock so far above the CPU time shows a machine that did other work
_WEAKEST = 20  # classes that are shown where there are more
_NAMES = {"baseline": "baseline (no teacher)"}


def _show(key: str, value: float | None) -> str:
    """A metric or cost as printed; a cost has at least three significant digits: 1.23, 1,234."""
    if value is None:
        return "n/a"
    if key not in _COSTS:
        return f"{100 * value:.1f}" if key in _PERCENT else f"{value:.3f}"
    if key in ("parameters", "bytes") and value < 1e6:
        return f"{value:,.0f}" if key == "parameters" else f"{value / 1e3:,.0f} kB"
    value = value / 1e6 if key in ("parameters", "macs", "bytes") else value
    digits = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:,.{max(digits, 0)}f}" + {"parameters": " M", "bytes": " MB"}.get(key, "")


def _cell(model: dict, key: str) -> str:
    """A model's mean over its seeds, with the standard deviation where it has several."""
    mean, std = model["mean"].get(key), model["std"].get(key)
    several = len(model["runs"]) > 1 and mean is not None
    return f"{_show(key, mean)} ± {_show(key, std)}" if several else _show(key, mean)


def _headline(models: list[dict]) -> tuple[str, str]:
    """The metric that stands for accuracy, and its name."""
    several = any("map" in model["mean"] for model in models)
    return ("map", "mAP") if several else ("top1", "top-1")


def _scatter(models: list[dict]) -> Markup | None:
    """Top-1 (of several labels mAP) over latency; a circle's area is the model's bytes.

    Names stand in a legend below: beside the circles, which may be anywhere, they would overlap.
    """
    key, called = _headline(models)
    points: list[Any]  # (model, latency, bytes, score) of the models that have them all
    points = [(m, m.get("latency_ms"), m.get("bytes"), m["mean"].get(key)) for m in models]
    points = [point for point in points if None not in point]
    if not points:
        return None
    figure = Figure(figsize=(4.8, 3.9), layout="constrained")
    axes = figure.add_subplot()
    _, times, sizes, heights = zip(*points, strict=True)
    for model, latency, size, top1 in points:
        role, at = model["role"], (latency, 100 * top1)
        colour, area = _COLOURS.get(role, _INK), 1500 * size / max(sizes)
        axes.scatter(*at, s=area, color=colour, alpha=0.35)
        error = 100 * (model["std"].get(key) or 0)
        label = f"{role}, {_show('bytes', size)}"
        axes.errorbar(*at, error, color=colour, marker="o", ms=3, ls="", label=label)
    margin = 45 * max(max(heights) - min(heights), 0.02)
    axes.set(
        xscale="log",
        xlabel="latency, ms (log scale)",
        ylabel="top-1 accuracy, %" if key == "top1" else f"{called}, %",
    )
    axes.set(xlim=(min(times) / 2, max(times) * 2))
    axes.set(ylim=(100 * min(heights) - margin, 100 * max(heights) + margin))
    axes.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}" if 0 <= y <= 100 else "")
    figure.legend(loc="outside lower center", ncols=2, columnspacing=3)
    return _svg(figure)


def _curves(curves: dict, part: str, key: str, scale: float, label: str) -> Markup | None:
    """One line per run; more than 200 points are averaged in blocks, which also smooths them."""
    figure = Figure(figsize=(4.8, 3), layout="constrained")
    axes = figure.add_subplot()
    for name, curve in curves.items():
        points = [(point["epoch"], point[key]) for point in curve.get(part, []) if key in point]
        if points:
            blocks = np.array_split(np.array(points, dtype=float), min(len(points), 200))
            x, y = np.transpose([block.mean(axis=0) for block in blocks])
            role = name.split(",")[0]
            style = "." * (len(x) < 50) + ("--" if role == "baseline" else "-")
            axes.plot(x, scale * y, style, color=_COLOURS.get(role, _INK), lw=1, label=role)
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return None
    axes.set(xlabel="epoch", ylabel=label)
    roles = dict(zip(labels, handles, strict=True))
    axes.legend(roles.values(), roles.keys())
    return _svg(figure)


def _confusion(matrix: list[list[int]], classes: list[str]) -> dict:
    """The matrix [label, answer] as rows of (count, shade) or as an image, and the worst pairs."""
    counts = np.array(matrix, dtype=np.int64)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    shades = np.sqrt(shares)  # a linear shade hides a share of 2%
    errors = counts * (1 - np.eye(len(counts), dtype=np.int64))
    worst = np.argsort(-errors, axis=None, kind="stable")[:10]
    at = zip(*np.unravel_index(worst, counts.shape), strict=True)
    pairs = [(classes[i], classes[j], counts[i, j], shares[i, j]) for i, j in at if errors[i, j]]
    if len(counts) <= 20:  # few enough to show the numbers
        return {"pairs": pairs, "rows": np.stack([counts, shades], axis=-1).tolist()}
    rgb = np.broadcast_to(np.array(_ACCENT) / 255, (*counts.shape, 3))
    buffer = io.BytesIO()
    imsave(buffer, np.dstack([rgb, shades]), format="png")
    image = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"pairs": pairs, "image": image}


def _classes(per_class: dict[str, list[dict]], role: str) -> dict:
    """Rows of a name, each model's recall, and what `role` takes it for; the weakest first."""
    answers = per_class.get(role) or next(iter(per_class.values()))
    found = [i for i, row in enumerate(answers) if row["recall"] is not None]
    found.sort(key=lambda i: answers[i]["recall"])
    rows = [
        (
            answers[i]["class"],
            [classes[i]["recall"] for classes in per_class.values()],
            answers[i]["confused_with"],
        )
        for i in found[:_WEAKEST]
    ]
    return {"roles": list(per_class), "rows": rows, "of": len(answers), "role": role}


def _conditions(model: dict) -> str:
    """How the latency of a model was found, in words."""
    found = model.get("conditions") or {}
    threads = found.get("threads")
    parts = [found.get("runs"), found.get("device")]
    parts.append(f"{threads} thread{'s' * (threads > 1)}" if threads else None)
    parts.append(f"{model['latency_calls']:,} calls" if model.get("latency_calls") else None)
    text = ", ".join(part for part in parts if part)
    wall, cpu = model.get("latency_ms"), model.get("latency_cpu_ms")
    if wall and cpu and found.get("device") == "CPU" and wall > _BUSY * cpu:
        text += "; the machine was busy: trust the CPU time, not the latency"
    return text


def _commands(results: dict) -> list[tuple[str, str]]:
    """What to do next, and the command for it, with this run's paths."""
    config = results.get("config") or {}
    run, data = config.get("run") or {}, config.get("data") or {}
    roles, seeds = {model["role"] for model in results["models"]}, run.get("seeds")
    role = "distilled" if "distilled" in roles else "baseline"
    # without labels, what classifies is the student with a classifier that was fitted
    fitted, classes = bool(data.get("unlabelled")), results["data"]["classes"]
    if role not in roles or not run.get("folder") or not seeds or not classes:
        return []
    keys = ("train", "probe_val" if fitted else "val")
    train, val = (data.get(key) or f"{key.upper()}_IMAGES" for key in keys)
    folder = Path(run["folder"]) / f"{role}-{seeds[0]}"
    model = str(folder / ("classifier.safetensors" if fitted else "last.safetensors"))
    if ((config.get("int8") or {}).get("aware") or {}).get("start") == 0:  # the float one is given
        model = config["student"]["checkpoint"] or config["student"]["model"]
    aware = Path(run["folder"]) / f"int8-aware-{seeds[0]}"
    small = str((aware if "int8-aware" in roles else folder) / "last.int8.safetensors")
    found = [
        ("Classify images", ["vitkd", "predict", model, "IMAGE.jpg"]),
        ("Each class's figures", ["vitkd", "eval", model, val, "--json"]),
    ]
    if {"int8", "int8-aware"} & roles:
        found.append(("The same in int8", ["vitkd", "eval", small, val, "--json"]))
        found.append(("Time each layer in int8", ["vitkd", "profile", small]))
    else:
        found.append(("Int8", ["vitkd", "quantize", model, "--images", train, "-o", small]))
    return [(what, shlex.join(command)) for what, command in found]


def render(results: dict) -> str:
    """The report as one self-contained HTML page."""
    results = finite(results)
    curves, classes = results.get("curves") or {}, results["data"]["classes"]
    key, called = _headline(results["models"])
    with matplotlib.rc_context(_STYLE):
        images = {
            "scatter": _scatter(results["models"]),
            "loss": _curves(curves, "train", "loss", 1, "training loss"),
            "top1": _curves(curves, "val", key, 100, f"validation {called}, %"),
            "sqnr": _curves(curves, "int8", "sqnr", 1, "SQNR of the logits, dB"),
            "agreement": _curves(curves, "int8", "agreement", 100, "agreement with float32, %"),
        }
    confusions = [
        {**found, **_confusion(found["matrix"], classes)}
        for found in (results.get("confusion"), results.get("int8_confusion"))
        if found
    ]
    role = (results.get("confusion") or {}).get("role", "")
    per_class = _classes(results["per_class"], role) if results.get("per_class") else None
    looks = {"colours": _COLOURS, "accent": _ACCENT, "percent": _PERCENT}
    shown = {"show": _show, "cell": _cell, "dumps": json.dumps, "conditions": _conditions}
    made = {"images": images, "confusions": confusions, "commands": _commands(results)}
    found = {**results, **made, "per_class": per_class, **looks, **shown}
    return _page.render("distill/report.html.jinja", **found)


def table(results: dict) -> str:
    """The metrics as aligned text for a terminal, one row per model."""
    metrics = {"f1": "f1 %", "nll": "nll", "ece": "ece", "agreement": "agreement %"}
    for key, name in {"knn": "k-NN %", "similarity": "similarity"}.items():
        if any(key in model["mean"] for model in results["models"]):
            metrics[key] = name
    costs = {"parameters": "parameters", "macs": "MMACs", "bytes": "size", "latency_ms": "ms"}
    key, called = _headline(results["models"])
    rows = [["", "model", f"{called} %", *metrics.values(), *costs.values()]]
    for model in finite(results["models"]):
        row = [_NAMES.get(model["role"], model["role"]), model["model"], _cell(model, key)]
        row += [_show(name, model["mean"].get(name)) for name in metrics]
        rows.append(row + [_show(name, model.get(name)) for name in costs])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    form = "  ".join(f"{{:{'<' if i < 2 else '>'}{w}}}" for i, w in enumerate(widths))
    return "\n".join(form.format(*row) for row in rows)


def write(results: dict, folder: Path) -> Path:
    """Writes folder/report.json and folder/report.html, each atomically.

    The JSON holds the results as they are, except that NaN and the infinities become null.

    Args:
        results: what the run found, of JSON's types, in the layout of `VERSION`.
        folder: made where it is missing.

    Returns:
        The path of report.html.
    """
    return _page.write(render(results), results, folder / "report.html")


def read(folder: Path) -> dict:
    """The results that `write` left in folder/report.json.

    Raises:
        ValueError: the file is missing, damaged, or of another version.
    """
    path = folder / "report.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable report: {error}") from error
    version = results.get("version") if isinstance(results, dict) else None
    if version != VERSION:
        raise ValueError(f"{path}: version: expected {VERSION}, got {version!r}")
    return results
