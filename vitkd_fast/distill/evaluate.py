"""What a distilled student is worth: metrics, fidelity to its teacher, cost, and a paired t-test.

What is a mean over images is kept as one number per image, [N], on the device and read once,
at the end. Class ids are counted there too: torchmetrics' bincount synchronises with the device.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import scipy.stats  # type: ignore[import-untyped]
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchmetrics.classification as tm
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchmetrics import MetricCollection

from .._metrics import per_class as per_class
from .._timing import measure
from ..functional import kd_loss
from ..int8 import Session
from ..models import Origin

# uint8 images [B, 3, H, W] on the device -> logits [B, classes], a Tensor or an ndarray
Predictor: TypeAlias = Callable[[Tensor], Any]

_EXACT_AUROC = 50_000_000  # an exact AUROC keeps every probability: up to so many, of all ranks
# the float32 before 1: torchmetrics has a bin more for confidences of exactly 1
BELOW_1 = 1 - 2**-24
_METRICS, _FIDELITY = ("top1", "top5", "nll"), ("agreement", "kl", "correlation")
_ROWS = (*_METRICS, *_FIDELITY, "student not finite", "teacher not finite")


@dataclass
class Scores:
    """Numbers of all images."""

    # top1 top5 precision recall f1 kappa quadratic_kappa mcc auroc ece nll
    metrics: dict[str, float]
    fidelity: dict[str, float]  # agreement kl correlation; {} without a teacher


@dataclass
class Evaluation(Scores):
    """With class ids and fp32 probabilities [N] of this rank's images, on the CPU."""

    labels: Tensor
    student: Tensor
    confidence: Tensor
    teacher: Tensor | None
    teacher_confidence: Tensor | None
    confusion: Tensor  # [classes, classes] int64, rows are labels


def headline(metrics: Mapping[str, float]) -> str:
    """The metric by which models are chosen and compared: top1, or map of several labels."""
    return "map" if "map" in metrics else "top1"


class Remembered:
    """A predictor that is asked once about every batch, while epochs are of the same batches.

    Args:
        predictor: whose logits are kept on the CPU.
        most: so many of them; about batches beyond it is asked every time.
    """

    def __init__(self, predictor: Predictor, most: int = 1 << 28) -> None:
        self.predictor, self.room, self._said = predictor, most, list[Tensor]()

    def epoch(self) -> Predictor:
        """For the batches of one epoch, from the first on."""
        places = itertools.count()

        def predict(images: Tensor) -> Tensor:
            if (place := next(places)) < len(self._said):
                return self._said[place]
            logits: Tensor = self.predictor(images)
            if place == len(self._said) and logits.numel() <= self.room:
                self.room -= logits.numel()
                self._said.append(logits.cpu())
            return logits

        return predict


def _logits(name: str, predictor: Predictor, images: Tensor, classes: int) -> Tensor:
    logits = torch.as_tensor(predictor(images), device=images.device).float()
    if logits.shape != (len(images), classes):
        raise ValueError(
            f"evaluate: {name}: expected logits {[len(images), classes]} for images "
            f"{list(images.shape)}, got {list(logits.shape)}"
        )
    return logits


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's r of each row, [B]; in fp64, where a constant row is exactly 0 once centred."""
    a, b = a.double(), b.double()
    return F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True))


def engine(session: Session) -> Predictor:
    """The int8 engine as a predictor: it runs on the CPU, wherever the images are."""
    return lambda images: session(images.permute(0, 2, 3, 1).cpu())


@contextmanager
def _counting() -> Iterator[None]:
    """Lifts deterministic mode, in which torchmetrics makes [images, classes^2] comparisons."""
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode(0)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)


def _binned(exact: tm.MulticlassAUROC) -> tm.MulticlassAUROC:
    """The same images at 200 thresholds, evenly spaced in the logit of a probability.

    With many classes nearly all probabilities lie below the first of evenly spaced ones.
    """
    thresholds = torch.linspace(-30, 17, 200).sigmoid()
    thresholds[0], thresholds[-1] = 0, 1
    binned = tm.MulticlassAUROC(exact.num_classes, "none", thresholds, validate_args=False)
    binned.to(exact.device).update(torch.cat(exact.preds), torch.cat(exact.target))
    return binned


@torch.inference_mode()
def evaluate(
    student: Predictor,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    classes: int,
    device: torch.device | str = "cpu",
    teacher: Predictor | None = None,
) -> Evaluation:
    """mean[argmax s = y] and more of s = student(images), and KL(softmax(t) || softmax(s)).

    precision, recall and f1 are means over the classes that occur as label or prediction; auroc,
    one against the rest, over those that occur as label, exact up to 5e7 probabilities and at 200
    thresholds (off by about 0.001) beyond; ece has 15 bins; nll and kl are in nats; correlation
    is the mean over images of Pearson's r of the two rows of logits, 0 for a constant row. auroc
    and kappa of a single class are NaN. Where torch.distributed is initialised every rank passes
    its share of the images and gets the metrics, fidelity and confusion of all.

    Args:
        student: uint8 images [B, 3, H, W] on the device to logits [B, classes]; normalises.
        batches: such images and their labels, int64 [B], on the CPU: they are checked where they
            are, and nothing synchronises with the device.
        classes: at least 2; top5 is of min(5, classes).
        device: where the images go and the metrics are.
        teacher: as student.

    Raises:
        ValueError: classes, a label, or the shape of labels or logits is out of range; logits are
            not finite; batches is empty, on any rank.
    """
    if classes < 2:
        raise ValueError(f"evaluate: classes: expected 2 or more, got {classes}")
    predictors = {"student": student} | ({} if teacher is None else {"teacher": teacher})
    distributed = dist.is_available() and dist.is_initialized()
    exact = _EXACT_AUROC // (dist.get_world_size() if distributed else 1)
    options: dict[str, Any] = {"num_classes": classes, "validate_args": False}
    auroc = tm.MulticlassAUROC(average="none", **options).to(device)
    rows: dict[str, list[Tensor]] = defaultdict(list)
    seen = 0
    for images, labels in batches:
        if labels.shape != images.shape[:1] or ((labels < 0) | (labels >= classes)).any():
            raise ValueError(
                f"evaluate: labels: expected [{len(images)}] ids from 0 to {classes - 1}, got "
                f"{list(labels.shape)}, ids {labels.unique().tolist()}"
            )
        seen += len(labels)
        images = images.to(device, non_blocking=True)
        target = labels.to(device, non_blocking=True)
        logits = {k: _logits(k, predict, images, classes) for k, predict in predictors.items()}
        probabilities = {name: x.softmax(1) for name, x in logits.items()}
        # a copy: the memory of a loader's tensors is lent by its workers
        rows["labels"].append(target.clone())
        for name, x in logits.items():
            rows[name].append(x.argmax(1))
            rows[f"{name} confidence"].append(probabilities[name].amax(1))
            rows[f"{name} not finite"].append(~x.isfinite().all(1))
        top5 = logits["student"].topk(min(5, classes)).indices
        rows["top1"].append(rows["student"][-1] == target)
        rows["top5"].append((top5 == target[:, None]).any(1))
        rows["nll"].append(F.cross_entropy(logits["student"], target, reduction="none"))
        if teacher is not None:
            pair = logits["student"], logits["teacher"]
            rows["agreement"].append(rows["student"][-1] == rows["teacher"][-1])
            rows["kl"].append(kd_loss(*pair, reduction="none"))
            rows["correlation"].append(_correlation(*pair))
        with _counting():
            auroc.update(probabilities["student"], target)
            if seen * classes > exact and auroc.thresholds is None:
                auroc = _binned(auroc)

    zero = torch.zeros(1, dtype=torch.float64, device=device)
    counts = [zero[0] + x for x in (seen, seen == 0, auroc.thresholds is not None)]
    total = torch.stack([torch.cat([zero, *rows[name]]).sum() for name in _ROWS] + counts)
    if distributed:
        dist.all_reduce(total)
    # every rank has the same numbers and so raises the same error: none is left waiting
    *sums, size, empty, binned = total.tolist()
    if empty:
        raise ValueError("evaluate: batches: expected at least one on every rank, got none")
    mean = {name: value / size for name, value in zip(_ROWS, sums, strict=True)}
    for name in predictors:
        if share := mean[f"{name} not finite"]:
            raise ValueError(
                f"evaluate: {name}: expected finite logits, got NaN or Inf for "
                f"{share * size:.0f} of {size:.0f} images"
            )

    kept = {name: torch.cat(parts) for name, parts in rows.items() if parts}
    from_ids = MetricCollection(
        {
            "precision": tm.MulticlassPrecision(**options),
            "recall": tm.MulticlassRecall(**options),
            "f1": tm.MulticlassF1Score(**options),
            "kappa": tm.MulticlassCohenKappa(**options),
            "quadratic_kappa": tm.MulticlassCohenKappa(weights="quadratic", **options),
            "mcc": tm.MulticlassMatthewsCorrCoef(**options),
            "confusion": tm.MulticlassConfusionMatrix(**options),
        }
    ).to(device)
    ece = tm.BinaryCalibrationError(n_bins=15, validate_args=False).to(device)
    with _counting(), warnings.catch_warnings():
        # a class that never occurs has no curve; it is left out of the mean
        warnings.filterwarnings("ignore", "No (positive|negative) samples in targets")
        if binned and auroc.thresholds is None:
            auroc = _binned(auroc)
        from_ids.update(kept["student"], kept["labels"])
        ece.update(kept["student confidence"].clamp(max=BELOW_1), kept["top1"])
        values, curves = from_ids.compute() | {"ece": ece.compute()}, auroc.compute()
    confusion = values.pop("confusion")
    occurs = confusion.sum(1)
    values["auroc"] = curves[(occurs > 0) & (occurs < size)].mean()
    cpu = {name: x.cpu() for name, x in kept.items()}
    return Evaluation(
        metrics={k: mean[k] for k in _METRICS} | {k: float(x) for k, x in values.items()},
        fidelity={k: mean[k] for k in _FIDELITY if teacher is not None},
        labels=cpu["labels"],
        student=cpu["student"],
        confidence=cpu["student confidence"],
        teacher=cpu.get("teacher"),
        teacher_confidence=cpu.get("teacher confidence"),
        confusion=confusion.cpu(),
    )


@dataclass
class Cost:
    """Of the model: parameters, MACs an image and bytes; of the predictor: its times.

    latency_* are of calls with one image; p99 is None where 100 calls would have taken too long.
    """

    parameters: int
    macs: int
    bytes: int
    latency_ms: float  # the median
    latency_p90_ms: float
    latency_p99_ms: float | None
    latency_cpu_ms: float  # CPU time of all threads, the median
    latency_calls: int
    images_per_s: float
    batch: int  # of images_per_s


def count_macs(model: nn.Module, image_size: int) -> int:
    """MACs (flops / 2) of one image: convolutions, matrix products, attention."""
    image_size = Origin.of(model).resized or image_size
    # a copy without storage: nothing is computed, and the model's mode and statistics stay
    meta = copy.deepcopy(model).to("meta", torch.float32).eval()
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        meta(torch.empty(1, 3, image_size, image_size, device="meta"))
    return counter.get_total_flops() // 2


@torch.inference_mode()
def cost(
    predictor: Predictor,
    model: nn.Module,
    *,
    image_size: int,
    device: torch.device | str,
    batch: int = 64,
    file: Path | None = None,
) -> Cost:
    """Parameters, MACs (flops / 2 of one image), bytes, ms of one image, images/s of a batch.

    `_timing.measure` says over how many calls.

    Args:
        predictor: what is timed, on uint8 images [1 or batch, 3, image_size, image_size].
        model: what is counted, on normalised images: convolutions, matrix products, attention.
        image_size: pixels of a side.
        device: where the images are.
        batch: images of a call for images_per_s.
        file: whose bytes; without one, those of parameters and buffers.

    Raises:
        ValueError: image_size or batch is below 1.
    """
    if image_size < 1 or batch < 1:
        raise ValueError(f"cost: image_size, batch: expected 1 or more, got {image_size}, {batch}")
    size = (batch, 3, image_size, image_size)
    images = torch.randint(256, size, dtype=torch.uint8, device=device)
    # as a loader gives them
    images = images.contiguous(memory_format=torch.channels_last)
    stored = [*model.parameters(), *model.buffers()]
    synchronize = torch.get_device_module(images.device).synchronize
    one = measure(lambda: predictor(images[:1]), synchronize)
    many = measure(lambda: predictor(images), synchronize, calls=10)
    return Cost(
        parameters=sum(x.numel() for x in model.parameters()),
        macs=count_macs(model, image_size),
        bytes=file.stat().st_size if file else sum(x.nbytes for x in stored),
        latency_ms=1e3 * one.p50,
        latency_p90_ms=1e3 * one.p90,
        latency_p99_ms=None if one.p99 is None else 1e3 * one.p99,
        latency_cpu_ms=1e3 * one.cpu,
        latency_calls=one.calls,
        images_per_s=batch / many.p50,
        batch=batch,
    )


def summarize(runs: list[dict[str, float]]) -> tuple[dict[str, float], dict[str, float]]:
    """The mean and the sample standard deviation (0.0 of one run) of every key.

    Raises:
        ValueError: no runs, or runs of different keys.
    """
    if not runs or any(run.keys() != runs[0].keys() for run in runs):
        keys = [sorted(run) for run in runs]
        raise ValueError(f"summarize: runs: expected 1 or more with the same keys, got {keys}")
    values = {key: [run[key] for run in runs] for key in runs[0]}
    mean = {key: float(np.mean(x)) for key, x in values.items()}
    return mean, {k: float(np.std(x, ddof=1)) if len(x) > 1 else 0.0 for k, x in values.items()}


def paired_test(distilled: list[float], baseline: list[float]) -> dict[str, float | None]:
    """t = mean(d) / standard_error, standard_error = std(d) / sqrt(seeds); d: distilled - baseline.

    Both hold the same seeds in the same order. p is two-sided; standard_errors is t. Where all
    differences are equal (to 1e-12 of the largest number) standard_error is 0, p is 1 for no
    difference and else 0, and t and standard_errors are None, which JSON can hold.

    Returns:
        seeds, difference (the mean of d), standard_error, t, p, standard_errors.

    Raises:
        ValueError: different lengths, fewer than 2 seeds, or a number that is not finite.
    """
    if (
        len(distilled) != len(baseline)
        or len(baseline) < 2
        or not np.isfinite([distilled, baseline]).all()
    ):
        raise ValueError(
            "paired_test: distilled, baseline: expected finite numbers of the same 2 or more "
            f"seeds, got {distilled} and {baseline}"
        )
    d, rounding = np.subtract(distilled, baseline), 1e-12 * np.abs([distilled, baseline]).max()
    error, t, p = 0.0, None, float(abs(d.mean()) <= rounding)
    if np.ptp(d) > rounding:
        error = float(scipy.stats.sem(d))
        t, p = (float(x) for x in scipy.stats.ttest_rel(distilled, baseline))
    names = ("seeds", "difference", "standard_error", "t", "p", "standard_errors")
    return dict(zip(names, (len(d), float(d.mean()), error, t, p, t), strict=True))
