"""Whether probabilities are what they say, and the temperature that makes them so.

ECE = sum over bins |sum(right - confidence)| / N, in 15 bins of the confidence, the largest
probability. Temperature scaling (Guo et al., "On calibration of modern neural networks", 2017)
divides logits by the T that minimises -mean log softmax(logits / T)[label]: no answer changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, log

import numpy as np
import scipy.optimize
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error

from ..distill.evaluate import BELOW_1
from .statistics import Interval, bootstrap

BINS = 15
BOUNDS = 0.01, 100.0  # of a temperature
_ROWS = 4096  # that are in float64 at once


@dataclass(frozen=True)
class Bin:
    """The images whose confidence lies in a bin."""

    images: int
    confidence: float  # their mean
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """Of one model; nll in nats. What is `scaled` was measured on images that T was not fitted on.

    Each half of the images is scaled by the temperature of the other; `temperature` is of all.
    """

    ece: float
    ece_interval: Interval
    nll: float
    temperature: float
    bounded: bool  # the temperature is at a bound, and so means nothing: nothing is wrong, or all
    ece_scaled: float
    ece_scaled_interval: Interval
    nll_scaled: float
    bins: list[Bin]
    bins_scaled: list[Bin]


def nll(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> float:
    """-mean log softmax(logits / temperature)[label], in nats, in float64."""
    parts = zip(logits.split(_ROWS), labels.split(_ROWS), strict=True)
    losses = [F.cross_entropy(x.double() / temperature, y, reduction="sum") for x, y in parts]
    return float(torch.stack(losses).sum()) / len(labels)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The T from 0.01 to 100 that minimises `nll`, which is convex in 1 / T.

    Args:
        logits: [N, classes].
        labels: int64 [N].
    """
    low, high = map(log, BOUNDS)
    found = scipy.optimize.minimize_scalar(
        lambda x: nll(logits, labels, exp(x)),
        bounds=(low, high),
        method="bounded",
        options={"xatol": 1e-6},
    )
    # where every answer is right by far the loss is 0 at many temperatures: then it has no minimum
    return min((*BOUNDS, exp(found.x)), key=lambda t: nll(logits, labels, t))


def at_bound(temperature: float) -> bool:
    """Whether a fitted temperature is one of the bounds, to a thousandth."""
    return any(abs(log(temperature / bound)) < 1e-3 for bound in BOUNDS)


def confidence(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """The largest probability of each row, [N]."""
    return torch.cat([(x.double() / temperature).softmax(1).amax(1) for x in logits.split(_ROWS)])


def ece(confidences: Tensor, right: Tensor) -> float:
    """By torchmetrics, as in `vitkd eval`: of confidences [N] and whether each is right, [N]."""
    sure = confidences.float().clamp(max=BELOW_1)
    return float(binary_calibration_error(sure, right.long(), n_bins=BINS))


def ece_interval(confidences: Tensor, right: Tensor, alpha: float, seed: int = 0) -> Interval:
    """The basic bootstrap interval, not below 0.

    The ECE of a sample is larger than the one it estimates, and a resample's is larger again; the
    basic interval takes that off (Davison & Hinkley, "Bootstrap methods", 1997, section 5.2).
    """
    off = (right.double() - confidences.double()).numpy()

    def statistic(bins: np.ndarray, off: np.ndarray) -> float:
        return float(np.abs(np.bincount(bins.astype(np.int64), off, BINS)).sum()) / len(off)

    low, high = bootstrap(statistic, (_bins(confidences), off), alpha, seed, "basic")
    return max(low, 0.0), max(high, 0.0)


def _bins(confidences: Tensor) -> np.ndarray:
    """The bin of each: open on the right, but for the last."""
    edges = torch.linspace(0, 1, BINS + 1)
    return (torch.bucketize(confidences.float().clamp(max=BELOW_1), edges, right=True) - 1).numpy()


def reliability(confidences: Tensor, right: Tensor) -> list[Bin]:
    """The bins that hold an image, the least confidence first."""
    bins, hits, said = _bins(confidences), right.double().numpy(), confidences.double().numpy()
    count = np.bincount(bins, minlength=BINS)
    sums = [np.bincount(bins, x, BINS) for x in (said, hits)]
    return [
        Bin(int(count[i]), float(sums[0][i] / count[i]), float(sums[1][i] / count[i]))
        for i in range(BINS)
        if count[i]
    ]


def calibrate(logits: Tensor, labels: Tensor, alpha: float = 0.05, seed: int = 0) -> Calibration:
    """All of it for one model.

    Args:
        logits: [N, classes].
        labels: int64 [N].
        alpha: 1 - the level of the intervals.
        seed: of the resamples.
    """
    right = logits.argmax(1) == labels
    plain = confidence(logits)
    temperature = fit_temperature(logits, labels)
    scaled, losses = torch.empty_like(plain), 0.0
    # every second image, since a folder is sorted by class
    halves = torch.arange(len(labels)) % 2
    for half in (0, 1) if len(labels) > 1 else ():
        here, there = halves == half, halves != half
        other = fit_temperature(logits[there], labels[there])
        scaled[here] = confidence(logits[here], other)
        losses += nll(logits[here], labels[here], other) * int(here.sum())
    if len(labels) == 1:
        scaled, losses = plain, nll(logits, labels)
    return Calibration(
        ece=ece(plain, right),
        ece_interval=ece_interval(plain, right, alpha, seed),
        nll=nll(logits, labels),
        temperature=temperature,
        bounded=at_bound(temperature),
        ece_scaled=ece(scaled, right),
        ece_scaled_interval=ece_interval(scaled, right, alpha, seed),
        nll_scaled=losses / len(labels),
        bins=reliability(plain, right),
        bins_scaled=reliability(scaled, right),
    )
