"""Tests of scores on overlapping splits, and when to stop.

Every candidate is trained on the same splits, so differences are paired: d of split i, of J splits.
Splits overlap: two tests are made of them, for two questions.

compare: is one better, on other images of this kind, too? The corrected resampled t-test of Nadeau
and Bengio, "Inference for the generalization error" (2003):
    t = mean(d) / sqrt((1 / J + n_test / n_train) var(d)),  J - 1 degrees of freedom.
stability: would more splits of these images choose another? The mean over J splits is by the
central limit theorem within mean(d) +- width of that over all, at every J at once, so that one may
stop at any (Waudby-Smith et al., "Time-uniform central limit theory and asymptotic confidence
sequences", 2024):
    width^2 = var(d) 2 (J r + 1) / (J^2 r) log(sqrt(J r + 1) / alpha).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import scipy.stats
from statsmodels.stats.multitest import multipletests

from .._preprocessing import Array

_TIGHTEST = 20  # splits at which a confidence sequence is as tight as it can be
_MOST_NEEDED = 10**6


def compare(
    scores: Array, names: Sequence[str], ratio: float, alpha: float
) -> list[dict[str, Any]]:
    """Every pair of candidates, by the corrected resampled t-test with Holm's correction.

    Args:
        scores: float64 [splits, candidates], of at least two splits.
        names: of the candidates.
        ratio: images that a split tests on over those it trains on.
        alpha: 1 - the level of intervals, and that of the family of tests.

    Returns:
        For each pair first, second, difference (the first's less the second's), interval, t, p,
        p_holm, and better: a name where p_holm is below alpha, else "". t is None where all
        differences are equal; p is then 1 for no difference, else 0.
    """
    splits = len(scores)
    quantile = float(scipy.stats.t.isf(alpha / 2, splits - 1))
    rows: list[dict[str, Any]] = []
    for a, b in combinations(range(len(names)), 2):
        d = scores[:, a] - scores[:, b]
        mean, error = float(d.mean()), math.sqrt((1 / splits + ratio) * d.var(ddof=1))
        constant = bool(np.ptp(d) < 1e-12)
        t = None if constant else mean / error
        p = float(abs(mean) < 1e-12) if t is None else 2 * scipy.stats.t.sf(abs(t), splits - 1)
        width = 0.0 if constant else quantile * error
        rows.append(
            {
                "first": names[a],
                "second": names[b],
                "difference": mean,
                "interval": [mean - width, mean + width],
                "t": t,
                "p": float(p),
            }
        )
    corrected = multipletests([row["p"] for row in rows], alpha, "holm")[1]
    for row, p in zip(rows, corrected, strict=True):
        ahead = row["first" if row["difference"] > 0 else "second"]
        row |= {"p_holm": float(p), "better": ahead if p < alpha else ""}
    return rows


def width(deviation: float, splits: int, alpha: float) -> float:
    """Half the width of the interval of a mean over splits, whenever one stops.

    Student's t stands for the normal distribution, as the deviation is an estimate of few splits.
    """
    log = -2 * math.log(alpha)
    x = splits * (log + math.log(log) + 1) / _TIGHTEST
    normal = math.sqrt(2 * (x + 1) / x * math.log(math.sqrt(x + 1) / alpha))
    student = scipy.stats.t.isf(scipy.stats.norm.sf(normal), splits - 1)
    return deviation * float(student) / math.sqrt(splits)


def stability(scores: Array, names: Sequence[str], alpha: float, margin: float) -> dict[str, Any]:
    """The choice after some splits, and whether more of them would choose another.

    The leader has the largest mean. A rival is "behind" where the interval of the difference is
    above 0, "tied" where it is within the margin, and else "open". Chosen is the first named of
    the leader and what is tied with it. alpha is of all pairs together (Bonferroni).

    Args:
        scores: float64 [splits, candidates], of at least two splits.
        names: of the candidates, in the order of preference.
        alpha: the chance that the intervals miss, whenever one stops.
        margin: a difference that does not matter.

    Returns:
        leader, choice, stable (no rival is open), and rivals: name, difference (the leader's less
        its own), width, state, and needed, about how many splits would decide on it (None: more
        than a million).
    """
    means = scores.mean(0)
    leader = int(means.argmax())
    each = alpha / math.comb(len(names), 2)
    rivals: list[dict[str, Any]] = []
    for i, name in enumerate(names):
        if i == leader:
            continue
        d = scores[:, leader] - scores[:, i]
        mean, deviation = float(d.mean()), float(d.std(ddof=1))
        half = width(deviation, len(d), each)
        decided = max(mean, margin - mean)  # how narrow an interval has to be
        state = "open"
        if half < mean:
            state = "behind"
        elif mean + half <= margin:
            state = "tied"
        needed = len(d) if state != "open" else _needed(deviation, decided, len(d), each)
        rivals.append(
            {"name": name, "difference": mean, "width": half, "state": state, "needed": needed}
        )
    level = {names[leader], *(x["name"] for x in rivals if x["state"] == "tied")}
    return {
        "leader": names[leader],
        "choice": next(name for name in names if name in level),
        "stable": all(x["state"] != "open" for x in rivals),
        "rivals": rivals,
    }


def _needed(deviation: float, wanted: float, splits: int, alpha: float) -> int | None:
    """The first number of splits whose interval is narrower, at this deviation."""
    low, high = splits, 2 * splits
    while width(deviation, high, alpha) >= wanted:
        low, high = high, 2 * high
        if high > _MOST_NEEDED:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if width(deviation, middle, alpha) >= wanted else (low, middle)
    return high


def winners(scores: Array) -> list[float]:
    """On how many splits each candidate is best; where several are, each has a share."""
    best = scores >= scores.max(1, keepdims=True) - 1e-12
    return [float(x) for x in (best / best.sum(1, keepdims=True)).sum(0)]


def entropy(counts: Sequence[float]) -> float:
    """Of how the choices are spread, in bits: 0 where all are the same."""
    return float(scipy.stats.entropy(counts, base=2))
