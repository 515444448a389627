"""Early prediction: power laws, rank correlation, and when it is believed."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from vitkd_fast.search import flash


@pytest.mark.parametrize("c", [0.1, 0.3, 0.8, 1.5])
@pytest.mark.parametrize("a", [0.0, 0.05, 0.3])
def test_a_power_law_is_continued(a: float, c: float) -> None:
    """Of exact points, to within a tenth of what is left to learn."""
    steps, total = [50, 100, 200], 2000
    errors = [a + 0.3 * (n / 200) ** -c for n in steps]
    reached = 1 - (a + 0.3 * (total / 200) ** -c)
    found = flash.extrapolate(steps, [1 - e for e in errors], total)
    assert found == pytest.approx(reached, abs=0.1 * errors[-1])


@pytest.mark.parametrize(
    "scores", [[0.1, 0.1, 0.1], [0.5, 0.3, 0.4], [0.0, 0.0, 0.0], [0.9, 1.0, 1.0], [0.3]]
)
def test_noise_is_no_reason_to_leave_the_range(scores: list[float]) -> None:
    found = flash.extrapolate([10, 20, 40][: len(scores)], scores, 500)
    assert max(scores) <= found <= 1


@pytest.mark.parametrize(("total", "share"), [(10_000, 0.08), (44, 0.25), (20, 0.1), (5, 0.5)])
def test_branches_lie_in_the_first_steps(total: int, share: float) -> None:
    parts = flash.branches(total, share)
    assert all(0 < part.begin < part.end < total for part in parts)
    assert [part.end for part in parts] == sorted({part.end for part in parts})
    assert all(part.end <= max(round(share * total), 5) for part in parts)
    assert parts or total <= 5


def test_rank_correlation_is_scipys_with_an_interval() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=40)
    y = x + rng.normal(size=40)
    found = flash.correlation(x, y)
    assert found["trials"] == 40
    assert found["spearman"] == pytest.approx(scipy.stats.spearmanr(x, y).statistic)
    assert found["kendall"] == pytest.approx(scipy.stats.kendalltau(x, y).statistic)
    for name in ("spearman", "kendall"):
        low, high = found[f"{name}_interval"]
        assert low < found[name] < high and high - low < 0.8


@pytest.mark.parametrize(
    ("x", "y"), [([], []), ([1, 2], [1, 2]), ([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [5, 5, 5])]
)
def test_what_has_no_ranks_has_no_correlation(x: list, y: list) -> None:
    found = flash.correlation(x, y)
    assert found["spearman"] is None and found["kendall"] is None
    assert not flash.trusted(found, -1)


@pytest.mark.parametrize(
    ("trials", "order", "threshold", "expected"),
    [(6, 1, 0.5, True), (5, 1, 0.5, False), (8, -1, 0.5, False), (8, -1, -1.0, True)],
)
def test_trust_takes_enough_trials_in_the_same_order(
    trials: int, order: int, threshold: float, expected: bool
) -> None:
    x = list(range(trials))
    found = flash.correlation(x, [order * i for i in x], intervals=False)
    assert flash.trusted(found, threshold) is expected
