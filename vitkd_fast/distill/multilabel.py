"""Images with several labels each, or none: their metrics.

Of sigmoids, with a threshold of 0.5; what is a mean over images is read once, at the end.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torchmetrics.classification as tm
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torchmetrics import MetricCollection

from ..functional import binary_kd_loss
from .evaluate import Evaluation, Predictor, _logits

_SUMS = ("nll", "exact", "agreement", "kl", "student not finite", "teacher not finite", "images")


@torch.inference_mode()
def evaluate(
    student: Predictor,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    classes: int,
    device: torch.device | str = "cpu",
    teacher: Predictor | None = None,
) -> Evaluation:
    """mean average precision and more of sigmoid(s), s = student(images), beside multi-hot labels.

    map is the mean over the classes that occur; f1, precision and recall are macro means at a
    threshold of 0.5, micro_f1 is of all decisions together, exact the share of images whose
    decisions are all right, nll the mean binary cross-entropy in nats. agreement is the share of
    decisions that are the teacher's, kl the mean divergence of a class. Where torch.distributed is
    initialised every rank passes its share of the images and gets the numbers of all.

    Args:
        student: uint8 images [B, 3, H, W] on the device to logits [B, classes]; normalises.
        batches: such images and their labels, multi-hot [B, classes], on the CPU.
        classes: 1 or more.
        device: where the images go and the metrics are.
        teacher: as student.

    Returns:
        `labels` and `student` are decisions, bool [N, classes], `confidence` probabilities, and
        `confusion` is [classes, 2, 2], rows are labels.

    Raises:
        ValueError: labels or logits of another shape; logits are not finite; there is no image.
    """
    options: dict[str, Any] = {"num_labels": classes, "validate_args": False}
    metrics = MetricCollection(
        {
            "map": tm.MultilabelAveragePrecision(average="none", **options),
            "precision": tm.MultilabelPrecision(average="macro", **options),
            "recall": tm.MultilabelRecall(average="macro", **options),
            "f1": tm.MultilabelF1Score(average="macro", **options),
            "micro_f1": tm.MultilabelF1Score(average="micro", **options),
            "confusion": tm.MultilabelConfusionMatrix(**options),
        },
        compute_groups=False,
    ).to(device)
    sums = torch.zeros(len(_SUMS), dtype=torch.float64, device=device)
    kept: dict[str, list[Tensor]] = {"labels": [], "student": [], "teacher": []}
    for images, labels in batches:
        if labels.shape != (len(images), classes):
            raise ValueError(
                f"evaluate: labels: expected multi-hot [{len(images)}, {classes}], got "
                f"{list(labels.shape)}"
            )
        images = images.to(device, non_blocking=True)
        target = labels.to(device, non_blocking=True).clone()
        x = _logits("student", student, images, classes)
        answers, truth = x > 0, target > 0.5
        metrics.update(x.sigmoid(), truth.int())
        found = [
            binary_cross_entropy_with_logits(x, target, reduction="none").mean(1).sum(),
            (answers == truth).all(1).sum(),
        ]
        other = x
        if teacher is not None:
            other = _logits("teacher", teacher, images, classes)
            kept["teacher"].append(other.sigmoid().cpu())
        found.append(((other > 0) == answers).double().mean(1).sum())
        found.append(binary_kd_loss(x, other, reduction="none").sum() / classes)
        found += [(~y.isfinite().all(1)).sum() for y in (x, other)]
        sums += torch.stack([*(y.double() for y in found), sums.new_tensor(len(images))])
        kept["labels"].append(truth.cpu())
        kept["student"].append(x.sigmoid().cpu())
    empty = sums[-1] == 0
    if dist.is_available() and dist.is_initialized():
        counts = torch.stack([empty.double(), *sums])
        dist.all_reduce(counts)
        empty, sums = counts[0] > 0, counts[1:]
    if empty:
        raise ValueError("evaluate: batches: expected at least one on every rank, got none")
    images_seen = float(sums[-1])
    mean = dict(zip(_SUMS, (sums / images_seen).tolist(), strict=True))
    for name in ("student", "teacher"):
        if share := mean[f"{name} not finite"]:
            raise ValueError(
                f"evaluate: {name}: expected finite logits, got NaN or Inf for "
                f"{share * images_seen:.0f} of {images_seen:.0f} images"
            )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No positive samples")
        values = metrics.compute()
    confusion = values.pop("confusion").cpu()
    occurs = confusion[:, 1].sum(1) > 0
    values["map"] = values["map"].cpu()[occurs].mean()
    student_odds = torch.cat(kept["student"])
    teacher_odds = torch.cat(kept["teacher"]) if teacher is not None else None
    return Evaluation(
        metrics={k: float(x) for k, x in values.items()} | {k: mean[k] for k in ("exact", "nll")},
        fidelity={k: mean[k] for k in ("agreement", "kl") if teacher is not None},
        labels=torch.cat(kept["labels"]),
        student=student_odds > 0.5,
        confidence=student_odds,
        teacher=None if teacher_odds is None else teacher_odds > 0.5,
        teacher_confidence=teacher_odds,
        confusion=confusion,
    )


def chance(confusion: Tensor) -> float:
    """The mean average precision of guessing: the share of images of a class, over those seen."""
    share = confusion[:, 1].sum(1) / confusion.sum((1, 2))
    return float(share[share > 0].mean())


def per_class(confusion: Tensor, classes: Sequence[str]) -> list[dict[str, Any]]:
    """As `_metrics.per_class`, of decisions: images, recall, precision and f1 of each class."""
    found = []
    for name, ((_, wrong), (missed, right)) in zip(classes, confusion.tolist(), strict=True):
        images, said = missed + right, wrong + right
        found.append(
            {
                "class": name,
                "images": images,
                "recall": right / images if images else None,
                "precision": right / said if said else None,
                "f1": 2 * right / (images + said) if images + said else None,
                "confused_with": None,
            }
        )
    return found
