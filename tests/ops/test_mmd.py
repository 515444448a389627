"""mmd_loss: its bandwidths, what the paper says of it, arguments that are not accepted."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.feature_tools import (
    DOUBLE,
    Bad,
    assert_near,
    assert_refused,
    draw,
    every_dtype,
    loss_and_grad,
)
from support.relation_tools import seeded
from vitkd_fast import reference
from vitkd_fast.functional import mmd_loss, nst_loss


@every_dtype
@pytest.mark.parametrize("bandwidth", ["mean", "median", 0.5, 3])
def test_bandwidths_match(bandwidth: float | str, dtype: torch.dtype) -> None:
    """A heuristic is a constant for the gradient."""
    x, t = draw(4, 6, 3, 3, dtype=dtype), draw(4, 9, 3, 3, dtype=dtype)
    value, grad = loss_and_grad(partial(mmd_loss, bandwidth=bandwidth), x, t)
    want, want_grad = loss_and_grad(
        lambda a, b: reference.mmd_loss(a, b, bandwidth).mean(), x.double(), t.double()
    )
    assert_near(value, want, 64)
    assert_near(grad, want_grad, 128)


@given(seed=st.integers(0, 2**31), bandwidth=st.floats(0.3, 10))
def test_orders_and_scales_of_channels_change_nothing(seed: int, bandwidth: float) -> None:
    new = seeded(seed)
    x, t = new(2, 5, 3, 2), new(2, 4, 3, 2)
    loss = partial(mmd_loss, bandwidth=bandwidth)
    want = loss(x, t)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    scaled = x[:, order] * new(1, 5, 1, 1).exp()
    assert torch.allclose(loss(scaled, t), want, rtol=1e-9, atol=1e-14)
    assert want > -1e-15  # a squared distance
    assert loss(x, x[:, order]).abs() < 1e-14
    twice = torch.cat([t, t], 1)  # the same distribution
    assert torch.allclose(loss(x, twice), want, rtol=1e-9, atol=1e-14)


def test_wide_kernels_tell_means_alone() -> None:
    """exp(-d / 2 s^2) is 1 - d / 2 s^2 there: the squared distance of means, over s^2."""
    x, t = draw(3, 5, 4, 4, dtype=DOUBLE), draw(3, 6, 4, 4, dtype=DOUBLE)
    means = [torch.nn.functional.normalize(a.flatten(2), dim=2).mean(1) for a in (x, t)]
    want = (means[0] - means[1]).square().sum(1)
    given = 1e8 * mmd_loss(x, t, bandwidth=1e4, reduction="none")
    torch.testing.assert_close(given, want, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(given, nst_loss(x, t, reduction="none"))


@every_dtype
@pytest.mark.parametrize("bandwidth", ["mean", "median", 1.0])
def test_extreme_channels(dtype: torch.dtype, bandwidth: float | str) -> None:
    """Of zeros, and one that outweighs all; all the same; and a narrow kernel."""
    x, t = draw(3, 5, 3, 3, dtype=dtype), draw(3, 4, 3, 3, dtype=dtype)
    x[1, 2], t[2, 1] = 0, 0
    x[0, 1] *= 1e4
    same = torch.ones_like(x)
    for a, b in ((x, t), (same, t), (x, torch.ones_like(t)), (same, torch.ones_like(t))):
        value, grad = loss_and_grad(partial(mmd_loss, bandwidth=bandwidth), a, b)
        want = reference.mmd_loss(a.double(), b.double(), bandwidth).mean()
        assert grad.isfinite().all()
        if (a is same) and b is not t:
            assert value.abs() < 1e-6
        else:
            assert_near(value, want, 64, 1.0)
    assert (loss_and_grad(mmd_loss, x, t)[1][1, 2] == 0).all()
    assert mmd_loss(x, t, bandwidth=1e-3).isfinite()


X, T = draw(2, 5, 4, 4), draw(2, 7, 4, 4)
BAD: dict[str, Bad] = {
    "mmd_batch": (lambda: mmd_loss(X, T[:1]), ValueError, "f_t: expected the batch of f_s"),
    "mmd_form": (lambda: mmd_loss(X, T[:, 0, 0]), ValueError, "f_t: expected [batch, "),
    "mmd_bandwidth": (
        lambda: mmd_loss(X, T, bandwidth=0), ValueError, "bandwidth: expected a number > 0, got 0",
    ),
    "mmd_heuristic": (
        lambda: mmd_loss(X, T, bandwidth="mode"), ValueError, "expected a number > 0, mean or med",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    assert_refused(name, *BAD[name])
