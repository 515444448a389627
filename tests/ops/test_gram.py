"""What holds for pkt_loss, sp_loss and cc_loss alike: losses of what embeddings are to each other.

Their own files have the papers' forms, test_feature_losses.py what holds for all feature losses.
"""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from support.feature_tools import (
    FLOAT,
    Bad,
    assert_near,
    assert_refused,
    draw,
    every_dtype,
    loss_and_grad,
)
from support.relation_tools import orthogonal, seeded
from vitkd_fast import reference
from vitkd_fast.functional import cc_loss, pkt_loss, sp_loss

LOSSES: dict[str, Callable[..., Tensor]] = {"pkt": pkt_loss, "sp": sp_loss, "cc": cc_loss}
USUAL: dict[str, Callable[..., Tensor]] = {
    "pkt": reference.pkt_loss, "sp": reference.sp_loss, "cc": reference.cc_loss,
}  # fmt: skip
MOST = {"pkt": torch.inf, "sp": 4 / 7, "cc": 1.0}  # of 7 embeddings
every_loss = pytest.mark.parametrize("name", LOSSES)


@every_loss
@given(seed=st.integers(0, 2**31), scale=st.floats(1e-3, 1e3))
def test_rotations_and_scales_change_nothing(name: str, seed: int, scale: float) -> None:
    new, loss = seeded(seed), LOSSES[name]
    x, t = new(7, 5), new(7, 9)
    want = loss(x, t)
    assert_near(loss(scale * x @ orthogonal(new(5, 5)), t), want.double(), 2**10)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    assert_near(loss(x[order], t[order]), want.double(), 2**10)
    assert loss(x, x @ orthogonal(new(5, 5))) < 1e-20
    assert 0 <= want <= MOST[name]


@every_loss
@every_dtype
def test_extreme_embeddings(name: str, dtype: torch.dtype) -> None:
    """Of zeros, of numbers of 1e4, and a channel that outweighs all."""
    x, t = draw(5, 6, dtype=dtype), draw(5, 8, dtype=dtype)
    x[2], t[3] = 0, 0
    x[:, 1] *= 1e4
    x[4] = 1e4
    value, grad = loss_and_grad(LOSSES[name], x, t)
    want, _ = loss_and_grad(USUAL[name], x.double(), t.double())
    assert_near(value, want, 64)
    assert grad.isfinite().all()


@every_loss
@pytest.mark.parametrize("side", [0, 1], ids=["student", "teacher"])
def test_nan_stays(name: str, side: int) -> None:
    pair = [draw(4, 3), draw(4, 3)]
    pair[side][1, 1] = torch.nan
    assert LOSSES[name](*pair).isnan()


E = draw(4, 5, dtype=FLOAT)
BAD: dict[str, Bad] = {
    "pkt_epsilon": (lambda: pkt_loss(E, E, epsilon=0), ValueError, "epsilon: expected a number"),
    "cc_gamma": (lambda: cc_loss(E, E, gamma=0), ValueError, "gamma: expected a number > 0"),
    "cc_order": (lambda: cc_loss(E, E, order=0), ValueError, "order: expected an integer >= 1"),
}
for name, loss in LOSSES.items():
    BAD |= {
        f"{name}_form": (
            lambda loss=loss: loss(draw(2, 5, 4, 4), E),
            ValueError,
            "x_s: expected [batch, dim], got [2, 5",
        ),
        f"{name}_batch": (
            lambda loss=loss: loss(E, E[:3]),
            ValueError,
            "x_t: expected the batch of x_s [4, 5], got [3, 5]",
        ),
        f"{name}_teacher": (
            lambda loss=loss: loss(E, E.clone().requires_grad_()),
            ValueError,
            "x_t: expected a constant",
        ),
    }


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    assert_refused(name, *BAD[name])
