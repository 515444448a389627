"""Who lost what: accuracy of each class and group under teacher and student, tested in pairs.

The mean hides it: a compressed model that keeps its accuracy may lose it on a few classes (Hooker
et al., "What do compressed deep neural networks forget?", 2019). McNemar's exact test asks, of the
images that only one of the two gets right, whether that many could be the student's losses by
chance; Holm's correction holds the chance of a single false accusation, among all, below alpha.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .answers import Answers
from .statistics import holm, paired


def overall(answers: Answers, alpha: float = 0.05) -> dict[str, Any]:
    """The row of all images."""
    return paired(answers.right("teacher"), answers.right("student"), alpha)


def by_class(answers: Answers, classes: Sequence[str], alpha: float = 0.05) -> list[dict[str, Any]]:
    """A row for each class with images, as `statistics.paired` and `holm` say; the worst first.

    taken_for is the class that most of the images which only the teacher gets right are now taken
    for, or None.
    """
    labels, answered = answers.labels.numpy(), answers.student.argmax(1).numpy()
    rows = _rows(answers, [classes[i] for i in labels], alpha)
    lost = answers.right("teacher") & ~answers.right("student")
    index = {name: i for i, name in enumerate(classes)}
    for row in rows:
        others = answered[lost & (labels == index[row["name"]])]
        row["taken_for"] = classes[int(np.bincount(others).argmax())] if len(others) else None
    return rows


def by_group(
    answers: Answers, groups: Sequence[str | None], alpha: float = 0.05
) -> list[dict[str, Any]]:
    """Likewise for each group; images without one are in no row."""
    return _rows(answers, groups, alpha)


def _rows(answers: Answers, names: Sequence[str | None], alpha: float) -> list[dict[str, Any]]:
    teacher, student = answers.right("teacher"), answers.right("student")
    of = np.array([name or "" for name in names])
    rows = [
        {"name": name, **paired(teacher[of == name], student[of == name], alpha)}
        for name in dict.fromkeys(name for name in names if name)
    ]
    holm(rows, alpha)
    return sorted(rows, key=lambda row: (row["p_holm"] if row["difference"] < 0 else 2, row["p"]))
