"""Early prediction: a power law through a few short, annealed runs that share one trunk.

A candidate trains at a constant learning rate (the trunk). At a few steps of it a copy goes on for
a quarter as many steps, while its learning rate falls to 0 (a cooldown), and is scored: what a run
of that length would have reached. That is what the schedule warm-up, stable, decay allows (WSD: Hu
et al., 2024, arXiv:2404.06395; Hägele et al., 2024, arXiv:2405.18392). The errors follow e(n) = a +
b n^-c, whose value at the last step is the prediction. Whether it can be trusted is measured: the
rank correlation of prediction and truth over the study's own finished trials.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.optimize
import scipy.stats  # type: ignore[import-untyped]

COOLDOWN = 0.2  # the share of a run in which its learning rate falls
_SHARES = (0.25, 0.5, 1.0)  # of the flash's length, where cooldowns end
LEAST = 6  # finished trials before a correlation means anything
_SLOWEST, _FASTEST = 0.05, 2.0  # of the exponent
_RESAMPLES = 1000


class Branch(NamedTuple):
    """A cooldown: the steps of the trunk where it begins, and where it ends."""

    begin: int
    end: int


def branches(total: int, share: float) -> list[Branch]:
    """The cooldowns within the first `share` of `total` steps, each a fifth of what it ends."""
    ends = sorted({max(round(share * x * total), 5) for x in _SHARES})
    return [Branch(end - max(round(COOLDOWN * end), 1), end) for end in ends if end < total]


def extrapolate(steps: Sequence[int], scores: Sequence[float], total: int) -> float:
    """The score after `total` steps, by a power law of the errors 1 - score.

    a is in [0, the least error], b >= 0, and c in [0.05, 2]: the prediction is never below the
    best score that was seen, nor above 1. The later a point, the more it counts.

    Args:
        steps: of annealed runs, ascending.
        scores: theirs, in [0, 1].
    """
    n, errors = np.asarray(steps, float) / total, 1 - np.asarray(scores, float)
    least = float(errors.min())
    if len(n) < 2 or least <= 0:
        return 1 - least

    def off(x: np.ndarray) -> np.ndarray:
        return np.asarray((x[0] + x[1] * n ** -x[2] - errors) * np.sqrt(n))

    # a is held down by a weak pull to 0: of few points, many asymptotes fit
    found = scipy.optimize.least_squares(
        lambda x: np.append(off(x), 1e-2 * x[0]),
        [least / 2, least / 2, 0.3],
        bounds=([0, 0, _SLOWEST], [least + 1e-9, np.inf, _FASTEST]),
    ).x
    return float(1 - np.clip(found[0] + found[1], 0, least))


def correlation(
    predicted: Sequence[float], reached: Sequence[float], intervals: bool = True
) -> dict[str, Any]:
    """Spearman's and Kendall's rank correlation, with 95% intervals of the bootstrap.

    Returns:
        trials, spearman, spearman_interval, kendall and kendall_interval; None where they are not
        defined: of fewer than three trials, or of equal values only.
    """
    x, y = np.asarray(predicted, float), np.asarray(reached, float)
    found: dict[str, Any] = {"trials": len(x)}
    for name, statistic in (("spearman", _spearman), ("kendall", _kendall)):
        value = statistic(x, y) if len(x) > 2 else float("nan")
        defined = bool(np.isfinite(value))
        found[name] = value if defined else None
        found[f"{name}_interval"] = _interval(statistic, x, y) if defined and intervals else None
    return found


def trusted(found: dict[str, Any], threshold: float) -> bool:
    """Whether predictions decide who is trained: Spearman's, of enough trials, is high enough."""
    value = found["spearman"]
    return found["trials"] >= LEAST and value is not None and value >= threshold


def _spearman(x: np.ndarray, y: np.ndarray) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", scipy.stats.ConstantInputWarning)
        return float(scipy.stats.spearmanr(x, y).statistic)


def _kendall(x: np.ndarray, y: np.ndarray) -> float:
    return float(scipy.stats.kendalltau(x, y).statistic)


def _interval(statistic: Any, x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Of the resamples in which it is defined: of few trials, some hold one value only."""
    draws = np.random.default_rng(0).integers(len(x), size=(_RESAMPLES, len(x)))
    values = [statistic(x[i], y[i]) for i in draws]
    low, high = np.nanpercentile(values, (2.5, 97.5))
    return float(low), float(high)
