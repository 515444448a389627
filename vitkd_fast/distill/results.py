"""Results of a run as in report.json: comparison, verdict, curves, disagreements."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .. import int8
from . import datasets, evaluate, logger
from .runtime import Runtime, cpu_capabilities

_THUMBNAILS = 24
_SIGNIFICANT = 0.05


def compare(
    evaluations: dict[str, list[evaluate.Evaluation]], first: str, second: str
) -> dict[str, Any] | None:
    """The paired test of two roles; None where there are not two seeds of each."""
    if not {first, second} <= evaluations.keys() or len(evaluations[second]) < 2:
        return None
    key = evaluate.headline(evaluations[second][0].metrics)
    scores = [[result.metrics[key] for result in evaluations[role]] for role in (first, second)]
    return {"metric": key, **evaluate.paired_test(*scores)}


def sentence(first: str, second: str, comparison: dict[str, Any] | None) -> str:
    """What the paired test of two roles found."""
    if comparison is None:
        return f"{first} and {second}: it takes two seeds of both to compare them."
    return f"{first} less {second}: {_difference(comparison)}."


def _difference(comparison: dict[str, Any]) -> str:
    text = f"{100 * comparison['difference']:+.1f} points"
    if (errors := comparison["standard_errors"]) is not None:
        text += f", {errors:+.1f} standard errors"
    return f"{text}, p = {comparison['p']:.2g}, over {comparison['seeds']} seeds"


def verdict(comparison: dict[str, Any] | None, compared: bool) -> str:
    """One sentence: p < 0.05, of a paired t-test over at least three seeds, counts."""
    if comparison is None:
        if not compared:
            return "One way of training only: run.baseline=true and a teacher compare two."
        return "One seed says nothing about chance: run.seeds=[0,1,2] compares three."
    points, seeds = comparison["difference"], comparison["seeds"]
    size = _difference(comparison)
    # equal differences in every seed have no standard error, and p is 0 or 1
    clear = seeds >= 3 and comparison["p"] < _SIGNIFICANT
    size += f"; it takes p below {_SIGNIFICANT} over 3 seeds or more"
    if clear and points > 0:
        return f"Distilled beats the baseline: {size}."
    if clear:
        return (
            f"Distilled is worse than the baseline: {size}. Try a lower losses.kd.weight, or "
            "losses.kd.temperature=1."
        )
    return (
        f"Distilled is not shown to beat the baseline: {size}. More run.seeds would measure it "
        "better; more run.epochs, stronger augmentation or a better teacher could make it larger."
    )


def verdict_of_int8(rows: list[dict[str, Any]]) -> str:
    """One sentence on a given student in int8, trained for it and not, of the report's rows."""
    aware, after = (
        next(row for row in rows if row["role"] == role)["mean"] for role in ("int8-aware", "int8")
    )
    return (
        f"Trained for int8, the student agrees with itself in float32 on {aware['unchanged']:.1%} "
        f"of the validation images; quantized as it was, on {after['unchanged']:.1%}. Without "
        "labels there is no accuracy: vitkd eval finds it on labelled images."
    )


def verdict_without_labels(rows: list[dict[str, Any]]) -> str:
    """One sentence on a student's features beside its teacher's, of the rows of the report."""
    student = next(row for row in rows if row["role"] == "distilled")["mean"]
    text = "Without losses.features there is no cosine with the teacher's features"
    if "similarity" in student:
        text = f"Cosine similarity with the teacher's features: {student['similarity']:.3f}"
    if "top1" not in student:
        return f"{text}. A labelled data.probe would measure what they are worth."
    teacher = rows[0]["mean"]
    return (
        f"Linear probe: {student['top1']:.1%} (teacher {teacher['top1']:.1%}); k-NN: "
        f"{student['knn']:.1%} (teacher {teacher['knn']:.1%}). {text}."
    )


def similarity(folder: Path) -> dict[str, float]:
    """{"similarity": that of the last evaluation of a run without labels}, or {}."""
    rows = [row for row in logger.read(folder) if "similarity" in row]
    return {"similarity": rows[-1]["similarity"]} if rows else {}


def curves(folders: dict[str, Path]) -> dict[str, Any]:
    """The rows of each metrics.jsonl, by kind."""
    found: dict[str, Any] = {}
    for name, folder in folders.items():
        rows = logger.read(folder)
        found[name] = {
            kind: [row for row in rows if row["kind"] == kind] for kind in ("train", "val", "int8")
        }
    return found


def unquantised(curves: dict[str, Any]) -> list[str]:
    """A sentence for each run whose student could not be quantised when `int8.watch` looked."""
    found = []
    for title, curve in curves.items():
        failed = [row for row in curve["int8"] if "error" in row]
        if failed:
            found.append(
                f"int8.watch: {title}: not quantised at {len(failed)} of {len(curve['int8'])} "
                f"looks, first after epoch {failed[0]['epoch']:g}: {failed[0]['error']}"
            )
    return found


def disagreements(
    result: evaluate.Evaluation, source: datasets.Source, indices: Tensor
) -> dict[str, Any] | None:
    """Images on which student and teacher disagree, the most confident student first.

    `indices` are the evaluated images' in the source. None without a teacher.
    """
    if result.teacher is None or result.teacher_confidence is None:
        return None
    differ = (result.student != result.teacher).nonzero().flatten()
    surest = differ[result.confidence[differ].argsort(descending=True)][:_THUMBNAILS]
    names = source.classes
    shown = [
        {
            "image": _thumbnail(source.read(int(indices[i]))[0]),
            "name": source.name(int(indices[i])),
            "label": names[int(result.labels[i])],
            "student": {
                "class": names[int(result.student[i])],
                "probability": float(result.confidence[i]),
            },
            "teacher": {
                "class": names[int(result.teacher[i])],
                "probability": float(result.teacher_confidence[i]),
            },
        }
        for i in surest.tolist()
    ]
    return {"count": len(differ), "of": len(result.labels), "shown": shown}


def device_name(runtime: Runtime) -> str:
    """The device, threads and processes, as a line."""
    if runtime.device.type == "cuda":
        return f"{torch.cuda.get_device_name(runtime.device)}, {runtime.ranks} processes"
    name = cpu_capabilities().get("cpu_name", "CPU")
    return f"{name}, {torch.get_num_threads()} threads, {runtime.ranks} processes"


def conditions(runtime: Runtime, engine: int8.Session | None) -> dict[str, Any]:
    """Where a model was timed."""
    if engine:
        return {"device": "CPU", "threads": engine.threads, "runs": f"int8, {engine.isa}"}
    if runtime.device.type == "cuda":
        return {"device": torch.cuda.get_device_name(runtime.device), "runs": "PyTorch, float32"}
    return {"device": "CPU", "threads": torch.get_num_threads(), "runs": "PyTorch, float32"}


def _thumbnail(pixels: Any) -> str:
    image = Image.fromarray(pixels)
    image.thumbnail((96, 96))
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
