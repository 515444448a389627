"""The audit: both models over the images, once, and all that follows from their answers."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import int8
from .._opened import load
from .._preprocessing import Array
from ..distill.runtime import cpu_capabilities
from ..distill.sources import spread
from . import answers as answers_
from . import attention, calibration, harm
from . import fidelity as fidelity_
from . import robustness as robustness_
from .answers import Answers, Images, Pair
from .cost import cost
from .statistics import bootstrap

VERSION = 1
_SHOWN = 12  # images on which the two differ most
_THUMBNAIL = 112


def audit(
    teacher: str,
    student: str,
    folder: str,
    *,
    groups: str = "",
    store: bool = False,
    robustness_images: int = 500,
    severities: Sequence[int] = (1, 3, 5),
    attention_images: int = 64,
    alpha: float = 0.05,
    seed: int = 0,
    batch_size: int = 64,
    threads: int | None = None,
    skip_bad: bool = False,
    measure_cost: bool = True,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """What compression did to a model, as the results that `report.write` writes.

    Args:
        teacher: a file of `models.save`, or the name of a timm model.
        student: likewise, or an int8 file.
        folder: images in a folder for each class, or the packed file of one.
        groups: as of `answers.groups_of`; "": none.
        store: writes the student's temperature into its int8 file.
        robustness_images: that are corrupted and augmented; 0: none.
        severities: of the corruptions, of 1 to 5.
        attention_images: on which it is compared where both look; 0: none.
        alpha: 1 - the level of intervals; what the tests of a family are corrected to.
        seed: of noise and resamples.
        batch_size: images of a call.
        threads: of the CPU; the default of an int8 file is 1.
        skip_bad: images that cannot be read, or lie in no class, are left out.
        measure_cost: time, memory and energy, for half a minute.
        tell: is told what is being done.

    Raises:
        ValueError: a number out of range, a file that cannot be loaded, models of other classes.
        DataError: images that cannot be used.
    """
    if not 0 < alpha < 0.5:
        raise ValueError(f"audit: alpha: expected 0 to 0.5, got {alpha}")
    if bad := [x for x in severities if x not in range(1, 6)]:
        raise ValueError(f"audit: severities: expected 1 to 5, got {bad[0]}")
    pair = answers_.open_pair(teacher, student, threads)
    if store and not pair.student.int8:
        raise ValueError(f"audit: store: expected an int8 file, got {student}")
    images = answers_.open_images(folder, pair, skip_bad)
    every = [images.name(i) for i in range(len(images.source))]
    of = answers_.groups_of(every, groups, skip_bad) if groups else None
    tell(f"asking both models for {len(every):,} images")
    said = answers_.ask(images, pair, batch_size=batch_size, skip_bad=skip_bad)

    tell("calibration")
    calibrated = {
        who: calibration.calibrate(logits, said.labels, alpha, seed)
        for who, logits in (("teacher", said.teacher), ("student", said.student))
    }
    # a temperature at its bound would make every answer certain
    both = {who: 1.0 if x.bounded else x.temperature for who, x in calibrated.items()}
    temperatures = both["student"], both["teacher"]
    metrics = fidelity_.metrics(said, len(pair.classes))
    fidelity, alike = fidelity_.fidelity(
        said, pair.classes, temperatures, metrics.pop("fidelity"), alpha, seed
    )
    robustness = None
    if robustness_images:
        tell("corruptions and augmentations")
        robustness = robustness_.robustness(
            images,
            pair,
            said,
            count=robustness_images,
            severities=sorted(set(severities)),
            alpha=alpha,
            seed=seed,
            batch_size=batch_size,
        )
    tell("the images on which they differ most")
    differ, where = _pictures(images, pair, said, alike, temperatures, attention_images, alpha)
    found: dict[str, Any] = {
        "version": VERSION,
        "teacher": {"file": teacher, "int8": pair.teacher.int8},
        "student": {"file": student, "int8": pair.student.int8},
        "data": {
            "folder": folder,
            "images": len(said.indices),
            "skipped": len(images.skipped),
            "classes": list(pair.classes),
        },
        "alpha": alpha,
        "seed": seed,
        "metrics": metrics,
        "fidelity": fidelity,
        "calibration": {who: asdict(x) for who, x in calibrated.items()},
        "harm": {
            "overall": harm.overall(said, alpha),
            "classes": harm.by_class(said, pair.classes, alpha),
            "groups": harm.by_group(said, [of[i] for i in said.indices], alpha) if of else None,
        },
        "robustness": robustness,
        "differ": differ,
        "attention": where,
        "cost": None,
        "notes": images.notes,
        "environment": {
            "vitkd_fast": version("vitkd-fast"),
            "torch": str(torch.__version__),
            "timm": version("timm"),
            "captum": version("captum"),
            "cpu": cpu_capabilities().get("cpu_name", "CPU"),
        },
    }
    if measure_cost:
        tell("time, memory and energy")
        found["cost"] = {
            who: cost(model.file, threads or 1)
            for who, model in (("teacher", pair.teacher), ("student", pair.student))
        } | {"threads": threads or 1}
    if store:
        found["notes"] = [*images.notes, _store(student, calibrated["student"])]
    return found


def _store(file: str, found: calibration.Calibration) -> str:
    """Writes a temperature into an int8 file, whose logits stay what they were."""
    if found.bounded:
        raise ValueError(
            f"audit: store: the temperature {found.temperature:.3g} is a bound of the search: "
            "the student is right, or wrong, on too many of the images to fit one"
        )
    graph = int8.file.read(file)
    int8.file.save(replace(graph, temperature=float(found.temperature)), file)
    return f"{file}: the temperature {found.temperature:.4g} is stored in it"


def _pictures(
    images: Images,
    pair: Pair,
    said: Answers,
    alike: np.ndarray,
    temperatures: tuple[float, float],
    count: int,
    alpha: float,
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """The images on which both differ most, and where both look."""
    most = [int(i) for i in np.argsort(alike, kind="stable")[:_SHOWN]]
    shown = [said.indices[i] for i in most]
    pixels = _read(images, pair, shown)
    rows = []
    for place, i in zip(shown, most, strict=True):
        row: dict[str, Any] = {
            "name": said.names[i],
            "label": pair.classes[int(said.labels[i])],
            "similarity": float(alike[i]),
            "image": _thumbnail(images.source.read(place)[0]),
        }
        for who, logits, t in (
            ("student", said.student[i], temperatures[0]),
            ("teacher", said.teacher[i], temperatures[1]),
        ):
            odds = (logits.double() / t).softmax(0)
            best = int(odds.argmax())
            row[who] = {"class": pair.classes[best], "probability": float(odds[best])}
        rows.append(row)
    if not count:
        return rows, None
    if pair.teacher.int8 or pair.student.int8:
        who = "teacher" if pair.teacher.int8 else "student"
        return rows, {"why": f"the {who} is an int8 file, which has no gradients"}
    loaded = [load(model.file) for model in pair]
    try:
        methods = [attention.method(x.model) for x in loaded]
    except attention.NoMap as error:
        return rows, {"why": str(error)}
    spread_ = [said.indices[i] for i in spread(len(said.indices), count)]
    maps = [
        attention.look(x, array)
        for x, array in zip(loaded, _read(images, pair, spread_), strict=True)
    ]
    found = attention.overlap(*maps)
    for who, x, array in zip(("teacher", "student"), loaded, pixels, strict=True):
        for row, picture, seen in zip(rows, array, attention.look(x, array), strict=True):
            row[who]["look"] = _overlay(picture, seen)
    enough = len(found.top) > 0
    return rows, {
        "images": len(spread_),
        "blind": found.blind,
        "methods": {"teacher": methods[0], "student": methods[1]},
        "top": float(found.top.mean()) if enough else None,
        "top_interval": bootstrap(np.mean, (found.top,), alpha) if enough else None,
        "top_by_chance": found.top_by_chance,
        "rank": float(found.rank.mean()) if enough else None,
        "rank_interval": bootstrap(np.mean, (found.rank,), alpha) if enough else None,
        "rank_by_chance": found.rank_by_chance,
    }


def _read(images: Images, pair: Pair, indices: Sequence[int]) -> tuple[Array, Array]:
    """The images as teacher and student read them."""
    [batch] = answers_.read(images, pair, indices, batch_size=max(len(indices), 1))
    return batch.teacher, batch.student


def _thumbnail(pixels: Array) -> str:
    image = Image.fromarray(pixels)
    if (largest := max(image.size)) < _THUMBNAIL:  # sharp: a scan of 8 x 8 pixels is one, too
        by = math.ceil(_THUMBNAIL / largest)
        image = image.resize((image.width * by, image.height * by), Image.Resampling.NEAREST)
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return _png(image)


def _overlay(pixels: Array, seen: Tensor) -> str:
    """The image in grey, with where a model looks on top of it."""
    from matplotlib import colormaps

    side = (_THUMBNAIL, _THUMBNAIL)
    grey = Image.fromarray(pixels).convert("L").resize(side, Image.Resampling.BICUBIC)
    strength = (seen / seen.max().clamp_min(1e-12)).numpy()
    heat = Image.fromarray((255 * strength).astype(np.uint8)).resize(side, Image.Resampling.BICUBIC)
    share = np.asarray(heat)[..., None] / 255
    colour = colormaps["inferno"](np.asarray(heat))[..., :3] * 255
    mixed = np.asarray(grey)[..., None] * (1 - 0.7 * share) + colour * 0.7 * share
    return _png(Image.fromarray(mixed.astype(np.uint8)))


def _png(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
