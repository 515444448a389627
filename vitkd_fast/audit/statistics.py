"""Intervals and tests of paired answers; what scipy and statsmodels lack is short and here.

The two models answer the same images, so a difference is judged by the images on which one is right
and the other is not: b the teacher alone, c the student alone, of n.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.stats  # type: ignore[import-untyped]
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

Interval = tuple[float, float]
_RESAMPLES = 1000
_DRAWN = 2_000_000  # images of the resamples that are in memory at once


def share(count: int, of: int, alpha: float) -> Interval:
    """Wilson's interval of count / of."""
    low, high = proportion_confint(count, of, alpha, "wilson")
    return float(low), float(high)


def difference(b: int, c: int, n: int, alpha: float) -> Interval:
    """Of (c - b) / n: Agresti & Min, "Simple improved confidence intervals for comparing matched
    proportions" (2005). Half an image is added to each cell, and then d +- z se(d)."""
    b2, c2, n2 = b + 0.5, c + 0.5, n + 2
    d = (c2 - b2) / n2
    error = scipy.stats.norm.isf(alpha / 2) * np.sqrt(b2 + c2 - (c2 - b2) ** 2 / n2) / n2
    return max(float(d - error), -1.0), min(float(d + error), 1.0)


def paired(first: np.ndarray, second: np.ndarray, alpha: float) -> dict[str, Any]:
    """Two bool arrays [N]: counts, the difference of their shares, and McNemar's exact test.

    Returns:
        images, teacher and student (the shares), difference (the student's less the teacher's),
        interval, lost (the teacher's alone), gained (the student's alone), and p, two-sided.
    """
    n, b, c = len(first), int((first & ~second).sum()), int((second & ~first).sum())
    both = int((first & second).sum())
    return {
        "images": n,
        "teacher": float(first.mean()),
        "student": float(second.mean()),
        "difference": (c - b) / n,
        "interval": difference(b, c, n, alpha),
        "lost": b,
        "gained": c,
        "p": float(mcnemar([[both, b], [c, n - both - b - c]], exact=True).pvalue),
    }


def holm(rows: Sequence[dict[str, Any]], alpha: float) -> None:
    """Adds p_holm to rows with p, of one family of tests (Holm, 1979), and what it finds.

    finding: "harmed" or "improved" where p_holm is below alpha, else "".
    """
    if not rows:
        return
    corrected = multipletests([row["p"] for row in rows], alpha, "holm")[1]
    for row, p in zip(rows, corrected, strict=True):
        row["p_holm"] = float(p)
        row["finding"] = ""
        if p < alpha:
            row["finding"] = "harmed" if row["difference"] < 0 else "improved"


def bootstrap(
    statistic: Callable[..., Any],
    samples: Sequence[np.ndarray],
    alpha: float,
    seed: int = 0,
    method: str = "percentile",
) -> Interval:
    """The bootstrap interval of a statistic of samples [N] that are drawn together.

    NaN of a single image.
    """
    if len(samples[0]) < 2:
        return float("nan"), float("nan")
    found = scipy.stats.bootstrap(
        tuple(samples),
        statistic,
        paired=True,
        vectorized=False,
        n_resamples=_RESAMPLES,
        batch=max(_DRAWN // len(samples[0]), 1),
        confidence_level=1 - alpha,
        method=method,
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)
