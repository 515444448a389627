"""What a search found: report.json, one HTML page that opens offline, and a recipe of each point.

Numbers and pictures are made here, words of the page in search.html.jinja.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib
import torch
import yaml
from markupsafe import Markup
from matplotlib.figure import Figure
from optuna.trial import FrozenTrial, TrialState

from .. import _page
from .._files import finite, replacing
from ..audit.report import aligned, interval, percent
from ..distill import config as configuration
from ..distill.looks import ACCENT, COLOURS, INK, STYLE, svg
from ..distill.runtime import cpu_capabilities
from . import flash
from .device import Target
from .study import Search, front

VERSION = 1
_FULL, _FRONT = COLOURS["distilled"], COLOURS["baseline"]
_MOST_ROWS = 60
_KEPT = ("latency_ms", "memory_mb", "accuracy", "predicted", "early", "early_score", "trusted",
         "cpu_seconds", "early_seconds", "steps", "within", "error")  # fmt: skip
_STATES = {TrialState.COMPLETE: "trained", TrialState.FAIL: "failed", TrialState.RUNNING: "running"}


def results(search: Search) -> dict[str, Any]:
    """What report.json holds: settings, every trial, the front, and how good predictions were."""
    study, device = search.study, search.device
    done = search.finished()
    points = front(done)
    shares = [
        x.user_attrs["early_seconds"] / x.user_attrs["cpu_seconds"]
        for x in done
        if "early_seconds" in x.user_attrs
    ]
    found = {
        "version": VERSION,
        "settings": asdict(search.settings),
        "recipe": {
            "teacher": [x.model for x in search.recipe.all_teachers().values()],
            "epochs": search.recipe.run.epochs,
            "metric": "mAP" if search.recipe.data.labels else "top-1",
        },
        "trials": [_row(x) for x in study.get_trials(deepcopy=False)],
        "front": [
            {"trial": x.number, "file": f"recipes/{_file(i, x)}"} for i, x in enumerate(points)
        ],
        "flash": {
            "predicted": search.correlation(),
            "early_score": search.correlation("early_score"),
            "share_of_cost": sum(shares) / len(shares) if shares else None,
            "trusted": flash.trusted(search.correlation(intervals=False), search.settings.trust),
            "least": flash.LEAST,
        }
        if search.settings.flash
        else None,
        "cpu_seconds": search.seconds(),
        "target_error": device.error if isinstance(device, Target) else None,
        "notes": search.lesson.notes,
        "environment": {
            "vitkd_fast": version("vitkd-fast"),
            "optuna": version("optuna"),
            "torch": str(torch.__version__),
            "timm": version("timm"),
            "cpu": cpu_capabilities().get("cpu_name", "CPU"),
        },
    }
    return dict(json.loads(json.dumps(finite(found))))


def _row(trial: FrozenTrial) -> dict[str, Any]:
    known = trial.user_attrs
    config = known.get("config", {})
    student = config.get("student", {})
    depth = student.get("options", {}).get("depth_multiplier")
    name = student.get("model", "") + (f", depth x {depth:g}" if depth else "")
    state = _STATES.get(trial.state, "")
    if trial.state is TrialState.PRUNED:
        state = "stopped" if known.get("within") else "over the bound"
    return {
        "trial": trial.number,
        "state": state,
        "student": name,
        "image_size": config.get("data", {}).get("image_size"),
        "params": trial.params,
        **{key: known.get(key) for key in _KEPT},
    }


def _file(place: int, trial: FrozenTrial) -> str:
    return f"{place}-{trial.user_attrs['config']['student']['model']}.yaml"


def write_recipes(search: Search) -> None:
    """A recipe of each point of the front, which `vitkd distill` takes."""
    folder = search.folder / "recipes"
    folder.mkdir(exist_ok=True)
    points = front(search.finished())
    for file in folder.glob("*.yaml"):
        file.unlink()
    for i, trial in enumerate(points):
        known, name = trial.user_attrs, _file(i, trial)
        tree = configuration.validate(known["config"]).model_dump(exclude_defaults=True)
        run = {"folder": f"runs/{Path(name).stem}", "baseline": False}
        tree["run"] = tree.get("run", {}) | run
        head = (
            f"# trial {trial.number}: {known['accuracy']:.1%} on the validation images, "
            f"{known['latency_ms']:.3g} ms on {search.device.name}\n"
        )
        with replacing(folder / name) as part:
            part.write_text(head + yaml.safe_dump(tree, sort_keys=False))


def verdict(found: dict[str, Any]) -> list[str]:
    """What was found, a sentence each; the best student comes first."""
    settings, rows = found["settings"], {x["trial"]: x for x in found["trials"]}
    counts = {state: 0 for state in ("trained", "stopped", "over the bound", "failed")}
    for row in rows.values():
        counts[row["state"]] = counts.get(row["state"], 0) + 1
    sentences = []
    if found["front"]:
        best = rows[found["front"][-1]["trial"]]
        sentences.append(
            f"Best within {settings['latency_ms']:g} ms: {best['student']} at "
            f"{best['image_size']} pixels, {percent(best['accuracy'])}% {found['recipe']['metric']}"
            f" in {best['latency_ms']:.3g} ms."
        )
    else:
        sentences.append(f"No student within {settings['latency_ms']:g} ms was trained.")
    sentences.append(
        f"{len(rows)} candidates: {counts['over the bound']} over the bound and not trained, "
        f"{counts['stopped']} stopped early, {counts['trained']} trained in full"
        + (f", {counts['failed']} failed" if counts["failed"] else "")
        + f"; {found['cpu_seconds']:,.0f} s of CPU time for training."
    )
    if found["flash"]:
        sentences.append(_of_flash(found))
    return sentences


def _of_flash(found: dict[str, Any]) -> str:
    early, settings = found["flash"], found["settings"]
    rank, share = early["predicted"], settings["flash"]
    if rank["spearman"] is None:
        return (
            f"Predictions from the first {share:.0%} of the steps: {rank['trials']} trials were "
            "trained in full, too few to say what they are worth."
        )
    text = (
        f"Predictions from the first {share:.0%} of the steps rank {rank['trials']} trials as full "
        f"training did with a Spearman correlation of {rank['spearman']:.2f} "
        f"({interval(rank['spearman_interval'], _two)}; Kendall {rank['kendall']:.2f}, "
        f"{interval(rank['kendall_interval'], _two)})"
    )
    if early["trusted"]:
        return f"{text}: trusted, as it is not below {settings['trust']:g}."
    why = f"below {settings['trust']:g}"
    if rank["trials"] < early["least"]:
        why = f"of fewer than {early['least']} trials"
    return f"{text}: {why}, so candidates are trained in full."


def _two(x: float) -> str:
    return f"{x:.2f}".replace("-", "\N{MINUS SIGN}")


def _pareto(found: dict[str, Any]) -> Markup:
    """Accuracy over latency: the front, what else was trained, what was stopped, the bound."""
    figure = Figure(figsize=(5.2, 4.2), layout="constrained")
    axes = figure.add_subplot()
    rows = {x["trial"]: x for x in found["trials"]}
    points = [rows[x["trial"]] for x in found["front"]]
    full = [x for x in rows.values() if x["state"] == "trained"]
    early = [x for x in rows.values() if x["state"] == "stopped" and x["predicted"] is not None]
    over = [x["latency_ms"] for x in rows.values() if x["state"] == "over the bound"]
    bound = found["settings"]["latency_ms"]
    axes.axvline(bound, color=INK, lw=0.9, ls="--", alpha=0.6, label="bound")
    if early:
        x, y = [r["latency_ms"] for r in early], [100 * r["predicted"] for r in early]
        axes.scatter(x, y, s=22, facecolors="none", edgecolors=INK, alpha=0.5, lw=0.9,
                     label="stopped, as predicted")  # fmt: skip
    if full:
        x, y = [r["latency_ms"] for r in full], [100 * r["accuracy"] for r in full]
        axes.scatter(x, y, s=26, color=_FULL, alpha=0.75, label="trained in full")
    if points:
        x, y = [r["latency_ms"] for r in points], [100 * r["accuracy"] for r in points]
        axes.step([*x, bound], [*y, y[-1]], where="post", color=_FRONT, lw=1.4, label="front")
        axes.scatter(x, y, s=52, facecolors="none", edgecolors=_FRONT, lw=1.6)
    if over:
        axes.plot(over, [0.015] * len(over), "|", color=INK, alpha=0.5, ms=8,
                  transform=axes.get_xaxis_transform(), label="over the bound")  # fmt: skip
    axes.set(xlabel="latency, ms", ylabel=f"{found['recipe']['metric']}, %")
    axes.set_xlim(left=0)
    figure.legend(loc="outside lower center", ncols=2, columnspacing=2)
    return svg(figure)


def _flash_picture(found: dict[str, Any]) -> Markup:
    """What full training reached over what was predicted."""
    figure = Figure(figsize=(4.8, 4.2), layout="constrained")
    axes = figure.add_subplot()
    full = [x for x in found["trials"] if x["state"] == "trained" and x["predicted"] is not None]
    for key, colour, marker, label in (
        ("predicted", _FULL, "o", "predicted"),
        ("early_score", COLOURS["teacher"], "x", "last early score"),
    ):
        x, y = [100 * r[key] for r in full], [100 * r["accuracy"] for r in full]
        axes.plot(x, y, marker, color=colour, ms=5, alpha=0.8, label=label)
    ends = [100 * min(r["early_score"] for r in full), 100 * max(r["accuracy"] for r in full)]
    axes.plot(ends, ends, color=INK, lw=0.8, alpha=0.5)
    axes.set(xlabel="from the first steps, %", ylabel="reached, %")
    figure.legend(loc="outside lower center", ncols=2, columnspacing=3)
    return svg(figure)


def render(found: dict[str, Any]) -> str:
    """The report as one self-contained HTML page."""
    rows = {x["trial"]: x for x in found["trials"]}
    full = [x for x in rows.values() if x["state"] == "trained" and x["predicted"] is not None]
    with matplotlib.rc_context(STYLE):
        pictures = {
            "pareto": _pareto(found),
            "flash": _flash_picture(found) if len(full) > 1 else None,
        }
    shown = [x for x in rows.values() if x["state"] != "over the bound"]
    return _page.render(
        "search/search.html.jinja",
        **{key: value for key, value in found.items() if key not in ("version", "trials")},
        verdict=verdict(found),
        pictures=pictures,
        points=[(x["file"], rows[x["trial"]]) for x in found["front"]],
        trials=sorted(shown, key=lambda x: -(x["accuracy"] or 0))[:_MOST_ROWS],
        count=len(shown),
        percent=percent,
        interval=interval,
        two=_two,
        accent=ACCENT,
    )


def table(found: dict[str, Any]) -> str:
    """The front as aligned text for a terminal."""
    rows = {x["trial"]: x for x in found["trials"]}
    metric = f"{found['recipe']['metric']} %"
    cells: list[tuple[str, ...]] = [("recipe", "trial", "pixels", metric, "ms", "MB")]
    for point in found["front"]:
        row = rows[point["trial"]]
        cells.append(
            (
                point["file"],
                str(row["trial"]),
                str(row["image_size"]),
                percent(row["accuracy"]),
                f"{row['latency_ms']:.3g}",
                f"{row['memory_mb']:.2f}",
            )
        )
    return aligned(cells)


def write(search: Search) -> Path:
    """Writes report.html, report.json and recipes/ in the search's folder, each file atomically.

    Returns:
        The path of report.html.
    """
    write_recipes(search)
    found = results(search)
    return _page.write(render(found), found, search.folder / "report.html")
