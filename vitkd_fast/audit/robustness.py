"""Whose answers change where an image is changed a little: the student's, where the teacher's stay.

A flip is an answer that is another than the same model's for the unchanged image, right or wrong.
The corruption error is the student's errors over the teacher's, summed over the severities:
ImageNet-C's CE, with the teacher in AlexNet's place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .._preprocessing import Array
from ..distill.sources import spread
from .answers import Answers, Images, Model, Pair, read
from .conditions import Condition, every
from .statistics import holm, paired


def robustness(
    images: Images,
    pair: Pair,
    answers: Answers,
    *,
    count: int = 500,
    severities: Sequence[int] = (1, 3, 5),
    alpha: float = 0.05,
    seed: int = 0,
    batch_size: int = 64,
) -> dict[str, Any]:
    """Flips of both under each condition, and McNemar's test of them with Holm's correction.

    Args:
        images: the folder.
        pair: both models.
        answers: for the unchanged images.
        count: images, evenly spread over the folder.
        severities: of the corruptions, of 1 to 5.
        alpha: 1 - the level of intervals and tests.
        seed: of the noise, which is the same for both models where they read the same pixels.
        batch_size: images of a call.

    Returns:
        images, rows of conditions (name, severity, the accuracy of both, the share of both that
        flips, and how many only one of them flips), and the corruption error by name.
    """
    places = spread(len(answers.indices), count)
    conditions = every(severities)
    flips: dict[Condition, list[np.ndarray]] = {condition: [] for condition in conditions}
    right: dict[Condition, list[np.ndarray]] = {condition: [] for condition in conditions}
    clean = np.stack([x[places].argmax(1).numpy() for x in (answers.teacher, answers.student)])
    done = 0
    chosen = [answers.indices[i] for i in places]
    for batch in read(images, pair, chosen, batch_size=batch_size):
        here, done = slice(done, done + len(batch.indices)), done + len(batch.indices)
        for condition in conditions:
            said = _answers(condition, pair, batch.indices, (batch.teacher, batch.student), seed)
            flips[condition].append(said != clean[:, here])
            right[condition].append(said == np.array(batch.labels))
    rows = [
        _row(condition, np.hstack(flips[condition]), np.hstack(right[condition]), alpha)
        for condition in conditions
    ]
    holm(rows, alpha)
    return {
        "images": len(places),
        "severities": list(severities),
        "rows": rows,
        "corruption_error": {
            name: _corruption_error([row for row in rows if row["name"] == name])
            for name in dict.fromkeys(x.name for x in conditions if x.severity)
        },
    }


def _answers(
    condition: Condition, pair: Pair, indices: Sequence[int], pixels: tuple[Array, Array], seed: int
) -> np.ndarray:
    """Classes [2, N], the teacher's and the student's."""

    def changed(array: Array) -> Array:
        return np.stack([condition(x, (seed, i)) for x, i in zip(array, indices, strict=True)])

    own = changed(pixels[0])
    both = own, own if pixels[1] is pixels[0] else changed(pixels[1])

    def answer(model: Model, array: Array) -> np.ndarray:
        return model(array).argmax(1).numpy()

    return np.stack([answer(model, array) for model, array in zip(pair, both, strict=True)])


def _row(
    condition: Condition, flips: np.ndarray, right: np.ndarray, alpha: float
) -> dict[str, Any]:
    """Of bools [2, N], the teacher's and the student's."""
    stays = paired(~flips[0], ~flips[1], alpha)  # "lost" are flips of the student alone
    return {
        "name": condition.name,
        "severity": condition.severity,
        "images": stays["images"],
        "teacher": float(right[0].mean()),
        "student": float(right[1].mean()),
        "teacher_flips": float(flips[0].mean()),
        "student_flips": float(flips[1].mean()),
        "student_alone": stays["lost"],
        "teacher_alone": stays["gained"],
        "difference": stays["difference"],
        "interval": stays["interval"],
        "p": stays["p"],
    }


def _corruption_error(rows: Sequence[dict[str, Any]]) -> float | None:
    """None where the teacher makes no error."""
    errors = [sum(1 - row[name] for row in rows) for name in ("student", "teacher")]
    return errors[0] / errors[1] if errors[1] else None
