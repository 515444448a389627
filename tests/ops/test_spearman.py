"""spearman_loss: SciPy's correlation, ties, arguments that are not accepted."""

from functools import partial

import pytest
import torch
from scipy.stats import spearmanr

from support.feature_tools import DOUBLE, Bad, Largest, assert_refused, draw, loss_and_grad
from vitkd_fast.functional import _features, spearman_loss


def test_of_little_softness_is_the_correlation_of_ranks() -> None:
    """With ties in the teacher, too."""
    x, t = draw(6, 12, dtype=DOUBLE), (2 * draw(6, 12, dtype=DOUBLE)).round()
    given = spearman_loss(x, t, softness=1e-7, reduction="none")
    want = [1 - spearmanr(*pair).statistic for pair in zip(x, t, strict=True)]
    torch.testing.assert_close(given, torch.tensor(want, dtype=DOUBLE))


def test_of_much_softness_is_the_correlation_with_the_logits() -> None:
    """A sigmoid is a line there."""
    x, t = draw(4, 9, dtype=DOUBLE), draw(4, 9, dtype=DOUBLE)
    ranks = t.argsort(1).argsort(1).double()
    want = [1 - torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(x, ranks, strict=True)]
    given = spearman_loss(x, t, softness=1e4, reduction="none")
    torch.testing.assert_close(given, torch.stack(want))


def test_of_the_teachers_order_alone() -> None:
    x, t = draw(5, 20, dtype=DOUBLE), draw(5, 20, dtype=DOUBLE)
    assert torch.equal(spearman_loss(x, t), spearman_loss(x, t.exp()))
    assert spearman_loss(t, t, softness=1e-7) < 1e-12
    assert abs(spearman_loss(-t, t, softness=1e-7) - 2) < 1e-12


@pytest.mark.parametrize("side", [0, 1])
def test_extreme_rows_that_are_constant(side: int) -> None:
    pair = [draw(3, 6), draw(3, 6)]
    pair[side][1] = 2.5
    value, grad = loss_and_grad(partial(spearman_loss, reduction="sum"), *pair)
    rows = spearman_loss(*pair, reduction="none")
    assert rows[1] == 1
    assert value.isfinite() and grad.isfinite().all()
    assert (grad[1] == 0).all()


def test_pairs_are_never_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    x, t = draw(12, 300), draw(12, 300)
    with Largest() as largest:
        loss_and_grad(spearman_loss, x, t)
    assert largest.numel <= _features.TILE < 12 * 300 * 300


X = draw(2, 5)
BAD: dict[str, Bad] = {
    "spearman_form": (
        lambda: spearman_loss(X[0], X[0]), ValueError, "student: expected [batch, classes] of 1",
    ),
    "spearman_shape": (
        lambda: spearman_loss(X, X[:1]), ValueError, "teacher: expected the shape of student",
    ),
    "spearman_softness": (
        lambda: spearman_loss(X, X, softness=0), ValueError, "softness: expected a number > 0",
    ),
    "spearman_reduction": (
        lambda: spearman_loss(X, X, reduction="max"), ValueError, "reduction: expected mean, sum",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    assert_refused(name, *BAD[name])
