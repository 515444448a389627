"""wkd_feature_loss: what the paper says of it, cells, arguments that are not accepted."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from support.feature_tools import (
    DOUBLE,
    Bad,
    as_tokens,
    assert_near,
    assert_refused,
    draw,
    every_dtype,
    loss_and_grad,
)
from support.relation_tools import seeded
from vitkd_fast import reference
from vitkd_fast.functional import wkd_feature_loss


def test_is_the_public_form() -> None:
    """The authors', with their ratio of 2 to 1."""
    f_s, f_t = draw(4, 6, 5, 5, dtype=DOUBLE), draw(4, 6, 7, 7, dtype=DOUBLE)

    def moments(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.mean(dim=(-1, -2)), torch.sqrt(x.var(dim=(-1, -2)) + 1e-5)

    (mean_s, std_s), (mean_t, std_t) = moments(f_s), moments(f_t)
    want = 2 * F.mse_loss(mean_s, mean_t, reduction="sum") / 4
    want += F.mse_loss(std_s, std_t, reduction="sum") / 4
    assert_near(wkd_feature_loss(f_s, f_t), want, 16)


@pytest.mark.parametrize("cells", [2, 3, 4, 7, 9])
@pytest.mark.parametrize("shape", [(8, 12), (7, 7), (5, 4)], ids=str)
def test_cells_match(cells: int, shape: tuple[int, int]) -> None:
    """Those that overlap, too, as where a side is no multiple, and those of one position."""
    x, t = draw(3, 4, *shape), draw(3, 4, 7, 6)
    for student, teacher in (
        (x, t),
        (x.to(memory_format=torch.channels_last), as_tokens(t).contiguous()),
    ):
        loss = partial(wkd_feature_loss, cells=cells, mean_weight=0.5, teacher_grid=(7, 6))
        value, grad = loss_and_grad(loss, student, teacher)
        want, want_grad = loss_and_grad(
            lambda a, b: reference.wkd_feature_loss(a, b, cells, 0.5).mean(), x.double(), t.double()
        )
        assert_near(value, want, 32)
        assert_near(grad, want_grad, 64)


@given(seed=st.integers(0, 2**31))
def test_orders_of_positions_change_nothing(seed: int) -> None:
    new = seeded(seed)
    x, t = new(2, 12, 3), new(2, 12, 3)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    want = wkd_feature_loss(x, t)
    assert torch.allclose(wkd_feature_loss(x[:, order], t), want, rtol=1e-12)
    assert wkd_feature_loss(x, x[:, order]) < 1e-25
    # a shift moves the means alone, by its square
    by = new(3)
    assert torch.allclose(
        wkd_feature_loss(x + by, x, mean_weight=3.0), 3 * by.square().sum(), rtol=1e-9
    )


@every_dtype
def test_extreme_channels(dtype: torch.dtype) -> None:
    """Constant ones, and numbers of 1e4 around a mean that outweighs their deviation."""
    x, t = draw(3, 4, 5, 5, dtype=dtype), draw(3, 4, 5, 5, dtype=dtype)
    x[:, 1], t[:, 2] = 3, -2
    x[0] *= 1e3
    x[:, 3] += 1e4
    value, grad = loss_and_grad(wkd_feature_loss, x, t)
    want, want_grad = loss_and_grad(
        lambda a, b: reference.wkd_feature_loss(a, b).mean(), x.double(), t.double()
    )
    assert_near(value, want, 64)
    assert_near(grad, want_grad, 64)


X, T = draw(2, 5, 4, 4), draw(2, 5, 4, 4)
TOKENS = draw(2, 15, 5)
BAD: dict[str, Bad] = {
    "wkd_batch": (
        lambda: wkd_feature_loss(X, T[:1]), ValueError, "f_t: expected the batch of f_s",
    ),
    "wkd_channels": (
        lambda: wkd_feature_loss(X, T[:, :4]), ValueError, "f_t: expected the 5 channels of f_s",
    ),
    "wkd_cells": (
        lambda: wkd_feature_loss(X, T, cells=0), ValueError, "cells: expected an integer >= 1",
    ),
    "wkd_grid": (
        lambda: wkd_feature_loss(X, TOKENS, teacher_grid=(4, 4)), ValueError,
        "teacher_grid: expected one of the 15 positions of f_t, got (4, 4)",
    ),
    "wkd_square": (
        lambda: wkd_feature_loss(X, TOKENS, cells=2), ValueError, "f_t: expected a map or a square",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    assert_refused(name, *BAD[name])
