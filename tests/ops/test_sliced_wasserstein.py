"""sliced_wasserstein_loss: sets of any sizes, what transport says, arguments that are refused."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import wasserstein_distance

from support.feature_tools import Bad, assert_near, assert_refused, draw, loss_and_grad
from support.relation_tools import orthogonal, seeded
from vitkd_fast import reference
from vitkd_fast.functional import sliced_wasserstein, sliced_wasserstein_loss


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, 1.5])
@pytest.mark.parametrize("points", [(6, 6), (6, 9), (9, 6), (1, 7), (7, 1), (4, 12)], ids=str)
def test_sets_of_any_sizes_match(points: tuple[int, int], p: float) -> None:
    n, m = points
    x, t = draw(3, n, 5), draw(3, m, 5)
    across = sliced_wasserstein._directions(5, 7, 3)
    assert torch.allclose(across.norm(dim=0), torch.ones(7, dtype=across.dtype))
    loss = partial(sliced_wasserstein_loss, projections=7, p=p, seed=3)
    value, grad = loss_and_grad(loss, x, t)
    want, want_grad = loss_and_grad(
        lambda a, b: reference.sliced_wasserstein_loss(a, b, across, p).mean(),
        x.double(),
        t.double(),
    )
    assert_near(value, want, 32)
    assert_near(grad, want_grad, 64)


def test_is_transport_in_one_dimension() -> None:
    """By SciPy, along each direction."""
    x, t = draw(1, 11, 3).double(), draw(1, 8, 3).double()
    across = sliced_wasserstein._directions(3, 5, 0)
    want = [wasserstein_distance((x[0] @ a).numpy(), (t[0] @ a).numpy()) for a in across.mT]
    given = sliced_wasserstein_loss(x, t, projections=5, p=1)
    assert abs(given.item() - sum(want) / 5) < 1e-12


@given(seed=st.integers(0, 2**31), n=st.integers(1, 9), m=st.integers(1, 9))
def test_orders_and_copies_of_points_change_nothing(seed: int, n: int, m: int) -> None:
    new = seeded(seed)
    x, t = new(2, n, 4), new(2, m, 4)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    want = sliced_wasserstein_loss(x, t)
    assert torch.allclose(sliced_wasserstein_loss(x[:, order], t), want, rtol=1e-12)
    assert torch.allclose(sliced_wasserstein_loss(x, torch.cat([t, t], 1)), want, rtol=1e-9)
    assert sliced_wasserstein_loss(x, x[:, order]) == 0
    # a shift costs its square, over dim in the mean of directions
    by = new(4)
    some = sliced_wasserstein_loss(x + by, x, projections=4096)
    assert torch.allclose(some, by.square().sum() / 4, rtol=0.2)


def test_many_directions_know_no_axes() -> None:
    new = seeded(0)
    x, t, turn = new(1, 40, 6), new(1, 30, 6) + 1, orthogonal(new(6, 6))
    loss = partial(sliced_wasserstein_loss, projections=4096)
    assert torch.allclose(loss(x @ turn, t @ turn), loss(x, t), rtol=0.05)
    assert loss(x, t, seed=1) != loss(x, t)


def test_extreme_points() -> None:
    """Ties, and one that is far away."""
    x, t = draw(2, 6, 3), draw(2, 6, 3)
    x[:, 3] = x[:, 1]
    t[:, 0] = 1e4
    value, grad = loss_and_grad(sliced_wasserstein_loss, x, t)
    across = sliced_wasserstein._directions(3, 64, 0)
    want = reference.sliced_wasserstein_loss(x.double(), t.double(), across).mean()
    assert_near(value, want, 32)
    assert grad.isfinite().all()


X = draw(2, 5, 4)
BAD: dict[str, Bad] = {
    "sliced_form": (
        lambda: sliced_wasserstein_loss(X[0], X[0]), ValueError, "x_s: expected [batch, points, d",
    ),
    "sliced_batch": (
        lambda: sliced_wasserstein_loss(X, X[:1]), ValueError, "x_t: expected the batch of x_s",
    ),
    "sliced_dim": (
        lambda: sliced_wasserstein_loss(X, X[..., :3]), ValueError,
        "x_t: expected the 4 dimensions of x_s, got 3",
    ),
    "sliced_projections": (
        lambda: sliced_wasserstein_loss(X, X, projections=0), ValueError,
        "projections: expected an integer >= 1",
    ),
    "sliced_p": (
        lambda: sliced_wasserstein_loss(X, X, p=0.5), ValueError, "p: expected a number >= 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    assert_refused(name, *BAD[name])
