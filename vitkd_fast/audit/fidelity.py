"""How close the student's answers are to the teacher's, in all and for each class.

Similarity is 1 less the Jensen-Shannon divergence of the two rows of probabilities, in bits: 1
where they are equal, 0 where they share nothing. Each model's are scaled by its own temperature
first, so that a student that is only more or less sure than its teacher is not taken for a
different one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from scipy.spatial.distance import jensenshannon
from torch import Tensor

from ..distill import evaluate
from ..functional import kd_loss
from .answers import Answers
from .statistics import bootstrap, share

_ROWS = 4096  # that are in float64 at once


def similarity(
    student: Tensor, teacher: Tensor, temperatures: tuple[float, float] = (1.0, 1.0)
) -> np.ndarray:
    """1 - JS(softmax(student / T) || softmax(teacher / T')) in bits, of each row: [N].

    Args:
        student: logits [N, classes].
        teacher: likewise.
        temperatures: the student's, and the teacher's.
    """
    found = []
    for s, t in zip(student.split(_ROWS), teacher.split(_ROWS), strict=True):
        p, q = (
            (x.double() / y).softmax(1).numpy() for x, y in zip((s, t), temperatures, strict=True)
        )
        # SciPy's is the distance, the square root; rounding may leave the root of less than 0
        found.append(1 - np.nan_to_num(jensenshannon(p, q, base=2, axis=1)) ** 2)
    return np.concatenate(found)


def metrics(answers: Answers, classes: int) -> dict[str, dict[str, float]]:
    """What `vitkd eval` says of each, and of the student beside its teacher, by name."""

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        # `evaluate` passes what stands for images on to the predictors: here, their places
        for places in torch.arange(len(answers.labels)).split(_ROWS):
            yield places, answers.labels[places]

    student, teacher = (lambda x: answers.student[x]), (lambda x: answers.teacher[x])
    found = evaluate.evaluate(student, batches(), classes=classes, teacher=teacher)
    other = evaluate.evaluate(teacher, batches(), classes=classes)
    return {"teacher": other.metrics, "student": found.metrics, "fidelity": found.fidelity}


def fidelity(
    answers: Answers,
    classes: Sequence[str],
    temperatures: tuple[float, float],
    overall: dict[str, float],
    alpha: float = 0.05,
    seed: int = 0,
) -> tuple[dict[str, Any], np.ndarray]:
    """Agreement, KL and similarity, with intervals, of all images and of those of each class.

    Args:
        answers: of both.
        classes: their names.
        temperatures: the student's, and the teacher's.
        overall: agreement, kl and correlation of all, as of `metrics`.
        alpha: 1 - the level of the intervals.
        seed: of the resamples.

    Returns:
        The numbers, and the similarity of each image, [N].
    """
    same = (answers.student.argmax(1) == answers.teacher.argmax(1)).numpy()
    kl = kd_loss(answers.student, answers.teacher, reduction="none").numpy()
    alike = similarity(answers.student, answers.teacher, temperatures)
    labels = answers.labels.numpy()
    rows = [
        {
            "class": name,
            "images": int(of.sum()),
            "agreement": float(same[of].mean()),
            "kl": float(kl[of].mean()),
            "similarity": float(alike[of].mean()),
        }
        for i, name in enumerate(classes)
        if (of := labels == i).any()
    ]
    found = {
        **overall,
        "agreement_interval": share(int(same.sum()), len(same), alpha),
        "similarity": float(alike.mean()),
        "similarity_interval": bootstrap(np.mean, (alike,), alpha, seed),
        "classes": rows,
    }
    return found, alike
