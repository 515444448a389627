"""cc_loss: what the paper says of it, extreme embeddings, arguments that are not accepted."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from support.feature_tools import (
    DOUBLE,
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
from vitkd_fast.functional import cc_loss


def test_is_the_paper_form() -> None:
    """With gamma 0.4 and order 2, written out; the Gaussian kernel for large orders."""
    s, t = F.normalize(draw(6, 5, dtype=DOUBLE)), F.normalize(draw(6, 7, dtype=DOUBLE))

    def kernel(x: Tensor) -> Tensor:
        cosine = x @ x.mT
        return math.exp(-0.8) * (1 + 0.8 * cosine + 0.32 * cosine**2)

    assert_near(cc_loss(3 * s, t), (kernel(s) - kernel(t)).square().mean(), 16)
    gaussian = [torch.exp(-0.7 * torch.cdist(x, x) ** 2) for x in (s, t)]
    given = cc_loss(s, t, gamma=0.7, order=25)
    assert (given - (gaussian[0] - gaussian[1]).square().mean()).abs() < 1e-12


@given(seed=st.integers(0, 2**31), scale=st.floats(1e-3, 1e3))
def test_rotations_and_scales_change_nothing(seed: int, scale: float) -> None:
    new = seeded(seed)
    x, t = new(7, 5), new(7, 9)
    want = cc_loss(x, t)
    assert_near(cc_loss(scale * x @ orthogonal(new(5, 5)), t), want.double(), 2**10)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    assert_near(cc_loss(x[order], t[order]), want.double(), 2**10)
    assert cc_loss(x, x @ orthogonal(new(5, 5))) < 1e-20
    assert 0 <= want < 1


@every_dtype
def test_extreme_embeddings(dtype: torch.dtype) -> None:
    """Of zeros, of numbers of 1e4, and a channel that outweighs all."""
    x, t = draw(5, 6, dtype=dtype), draw(5, 8, dtype=dtype)
    x[2], t[3] = 0, 0
    x[:, 1] *= 1e4
    x[4] = 1e4
    value, grad = loss_and_grad(cc_loss, x, t)
    want, _ = loss_and_grad(reference.cc_loss, x.double(), t.double())
    assert_near(value, want, 64)
    assert grad.isfinite().all()


def test_nan_stays() -> None:
    for side in (0, 1):
        pair = [draw(4, 3), draw(4, 3)]
        pair[side][1, 1] = torch.nan
        assert cc_loss(*pair).isnan()


E = draw(4, 5, dtype=FLOAT)
BAD: dict[str, Bad] = {
    "cc_form": (
        lambda: cc_loss(draw(2, 5, 4, 4), E), ValueError, "x_s: expected [batch, dim], got [2, 5",
    ),
    "cc_batch": (
        lambda: cc_loss(E, E[:3]), ValueError, "x_t: expected the batch of x_s [4, 5], got [3, 5]",
    ),
    "cc_teacher": (
        lambda: cc_loss(E, E.clone().requires_grad_()), ValueError, "x_t: expected a constant",
    ),
    "cc_gamma": (lambda: cc_loss(E, E, gamma=0), ValueError, "gamma: expected a number > 0"),
    "cc_order": (lambda: cc_loss(E, E, order=0), ValueError, "order: expected an integer >= 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    assert_refused(name, *BAD[name])
