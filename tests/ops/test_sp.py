"""sp_loss: what the paper says of it, extreme embeddings, arguments that are not accepted."""

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
from vitkd_fast.functional import sp_loss


def test_is_the_public_form() -> None:
    """RepDistiller's, of maps."""
    f_s, f_t = draw(6, 5, 4, 4, dtype=DOUBLE), draw(6, 7, 2, 2, dtype=DOUBLE)

    def public(f_s: Tensor, f_t: Tensor) -> Tensor:
        s, t = f_s.view(6, -1), f_t.view(6, -1)
        g_s, g_t = F.normalize(torch.mm(s, s.t())), F.normalize(torch.mm(t, t.t()))
        diff = g_t - g_s
        return (diff * diff).view(-1, 1).sum(0) / (6 * 6)

    assert_near(sp_loss(f_s.flatten(1), f_t.flatten(1)), public(f_s, f_t).squeeze(), 16)


@given(seed=st.integers(0, 2**31), scale=st.floats(1e-3, 1e3))
def test_rotations_and_scales_change_nothing(seed: int, scale: float) -> None:
    new = seeded(seed)
    x, t = new(7, 5), new(7, 9)
    want = sp_loss(x, t)
    assert_near(sp_loss(scale * x @ orthogonal(new(5, 5)), t), want.double(), 2**10)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    assert_near(sp_loss(x[order], t[order]), want.double(), 2**10)
    assert sp_loss(x, x @ orthogonal(new(5, 5))) < 1e-20
    assert 0 <= want <= 4 / 7  # rows of length 1, of which batch are compared


@every_dtype
def test_extreme_embeddings(dtype: torch.dtype) -> None:
    """Of zeros, of numbers of 1e4, and a channel that outweighs all."""
    x, t = draw(5, 6, dtype=dtype), draw(5, 8, dtype=dtype)
    x[2], t[3] = 0, 0
    x[:, 1] *= 1e4
    x[4] = 1e4
    value, grad = loss_and_grad(sp_loss, x, t)
    want, _ = loss_and_grad(reference.sp_loss, x.double(), t.double())
    assert_near(value, want, 64)
    assert grad.isfinite().all()


def test_an_embedding_of_zeros_has_a_gradient_through_the_others_alone() -> None:
    x, t = draw(4, 3, dtype=DOUBLE), draw(4, 5, dtype=DOUBLE)
    x[1] = 0
    _, grad = loss_and_grad(sp_loss, x, t)
    h = 1e-7

    def others(a: Tensor) -> Tensor:
        rows = [F.normalize(y @ y.mT) for y in (a, t)]
        return (rows[0] - rows[1])[[0, 2, 3]].square().sum() / 16

    for j in range(3):
        up, down = x.clone(), x.clone()
        up[1, j], down[1, j] = h, -h
        assert abs((others(up) - others(down)) / (2 * h) - grad[1, j]) < 1e-6


def test_nan_stays() -> None:
    for side in (0, 1):
        pair = [draw(4, 3), draw(4, 3)]
        pair[side][1, 1] = torch.nan
        assert sp_loss(*pair).isnan()


E = draw(4, 5, dtype=FLOAT)
BAD: dict[str, Bad] = {
    "sp_form": (
        lambda: sp_loss(draw(2, 5, 4, 4), E), ValueError, "x_s: expected [batch, dim], got [2, 5",
    ),
    "sp_batch": (
        lambda: sp_loss(E, E[:3]), ValueError, "x_t: expected the batch of x_s [4, 5], got [3, 5]",
    ),
    "sp_teacher": (
        lambda: sp_loss(E, E.clone().requires_grad_()), ValueError, "x_t: expected a constant",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    assert_refused(name, *BAD[name])
