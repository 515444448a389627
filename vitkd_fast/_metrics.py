"""Metrics on NumPy alone, for where there is no torch; distill/evaluate.py has all of them.

top1 = mean[argmax s = y]    nll = mean[log sum exp s - s_y]    confusion[y, argmax s]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np


class Scores(NamedTuple):
    """Of a model on labelled images."""

    metrics: dict[str, float]  # top1 top5 nll
    confusion: np.ndarray  # [classes, classes] int64, rows are labels


def evaluate(
    logits: Callable[[np.ndarray], np.ndarray],
    images: Iterable[tuple[np.ndarray, int]],
    *,
    classes: int,
    batch_size: int,
) -> Scores:
    """top1, top5 (of min(5, classes)) and nll, in nats, of s = logits(images).

    Args:
        logits: uint8 [B, H, W, 3] to float32 [B, classes].
        images: uint8 [H, W, 3], each with its label.
        classes: how many there are.
        batch_size: images of a call.

    Raises:
        ValueError: there is no image.
    """
    confusion = np.zeros((classes, classes), np.int64)
    sums = np.zeros(3)
    rest = iter(images)
    while batch := list(islice(rest, batch_size)):
        labels = np.array([label for _, label in batch])
        x = logits(np.stack([image for image, _ in batch])).astype(np.float64)
        best = np.argsort(-x, axis=1, kind="stable")[:, :5]
        nll = np.logaddexp.reduce(x, axis=1) - x[np.arange(len(x)), labels]
        right = best == labels[:, None]
        sums += right[:, 0].sum(), right.sum(), nll.sum()
        np.add.at(confusion, (labels, best[:, 0]), 1)
    if not (size := confusion.sum()):
        raise ValueError("evaluate: images: expected at least one, got none")
    means = (float(x) for x in sums / size)
    return Scores(dict(zip(("top1", "top5", "nll"), means, strict=True)), confusion)


def per_class(confusion: Any, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Each class's images, recall (its accuracy), precision, 2 p r / (p + r), and worst confusion.

    recall is None for a class without images, precision for one never predicted, f1 for both.

    Args:
        confusion: int64 [classes, classes], rows are labels: an array or a CPU tensor.
        classes: the names.

    Returns:
        class, images, recall, precision, f1, and confused_with: the class that most of its other
        images were taken for, or None.
    """
    confusion = np.asarray(confusion)
    if confusion.shape != (len(classes), len(classes)):
        raise ValueError(
            f"per_class: confusion: expected [classes, classes] = {[len(classes)] * 2}, got "
            f"{list(confusion.shape)}"
        )
    right, images, answers = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    others = confusion - np.diag(right)
    columns = (right, images, answers, others.max(1), others.argmax(1))
    parts = (x.tolist() for x in columns)
    return [
        {
            "class": name,
            "images": n,
            "recall": hits / n if n else None,
            "precision": hits / said if said else None,
            "f1": 2 * hits / (n + said) if n + said else None,
            "confused_with": classes[other] if missed else None,
        }
        for name, hits, n, said, missed, other in zip(classes, *parts, strict=True)
    ]
