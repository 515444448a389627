"""pkt_loss: what the paper says of it, extreme embeddings, arguments that are not accepted."""

import pytest
import torch
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
from vitkd_fast.functional import pkt_loss


def test_is_the_public_form() -> None:
    """The authors': the mean over all pairs, with an epsilon that no number feels."""
    x, t = draw(6, 5, dtype=DOUBLE), draw(6, 7, dtype=DOUBLE)

    def public(output_net: Tensor, target_net: Tensor, eps: float = 1e-7) -> Tensor:
        output_net = output_net / (output_net.pow(2).sum(1, keepdim=True).sqrt() + eps)
        target_net = target_net / (target_net.pow(2).sum(1, keepdim=True).sqrt() + eps)
        model = (output_net.mm(output_net.t()) + 1.0) / 2.0
        target = (target_net.mm(target_net.t()) + 1.0) / 2.0
        model = model / model.sum(1, keepdim=True)
        target = target / target.sum(1, keepdim=True)
        return torch.mean(target * torch.log((target + eps) / (model + eps)))

    assert (pkt_loss(x, t) - 6 * public(x, t)).abs() < 1e-6


@given(seed=st.integers(0, 2**31), scale=st.floats(1e-3, 1e3))
def test_rotations_and_scales_change_nothing(seed: int, scale: float) -> None:
    new = seeded(seed)
    x, t = new(7, 5), new(7, 9)
    want = pkt_loss(x, t)
    assert_near(pkt_loss(scale * x @ orthogonal(new(5, 5)), t), want.double(), 2**10)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    assert_near(pkt_loss(x[order], t[order]), want.double(), 2**10)
    assert pkt_loss(x, x @ orthogonal(new(5, 5))) < 1e-20
    assert want >= 0


def test_opposite_embeddings_are_finite() -> None:
    """Where the student's probability is 0, and where the teacher's is."""
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    t = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]])
    for a, b in ((x, t), (t, x)):
        value, grad = loss_and_grad(pkt_loss, a, b)
        want, want_grad = loss_and_grad(reference.pkt_loss, a.double(), b.double())
        assert_near(value, want, 64)
        # of (1 + cosine) / 2 at cosine -1, an epsilon is all that is left: 1 / it times a rounding
        assert (grad - want_grad).abs().max() < 0.5 * want_grad.abs().max()


@every_dtype
def test_extreme_embeddings(dtype: torch.dtype) -> None:
    """Of zeros, of numbers of 1e4, and a channel that outweighs all."""
    x, t = draw(5, 6, dtype=dtype), draw(5, 8, dtype=dtype)
    x[2], t[3] = 0, 0
    x[:, 1] *= 1e4
    x[4] = 1e4
    value, grad = loss_and_grad(pkt_loss, x, t)
    want, _ = loss_and_grad(reference.pkt_loss, x.double(), t.double())
    assert_near(value, want, 64)
    assert grad.isfinite().all()


def test_nan_stays() -> None:
    for side in (0, 1):
        pair = [draw(4, 3), draw(4, 3)]
        pair[side][1, 1] = torch.nan
        assert pkt_loss(*pair).isnan()


E = draw(4, 5, dtype=FLOAT)
BAD: dict[str, Bad] = {
    "pkt_form": (
        lambda: pkt_loss(draw(2, 5, 4, 4), E), ValueError, "x_s: expected [batch, dim], got [2, 5",
    ),
    "pkt_batch": (
        lambda: pkt_loss(E, E[:3]), ValueError, "x_t: expected the batch of x_s [4, 5], got [3, 5]",
    ),
    "pkt_teacher": (
        lambda: pkt_loss(E, E.clone().requires_grad_()), ValueError, "x_t: expected a constant",
    ),
    "pkt_epsilon": (lambda: pkt_loss(E, E, epsilon=0), ValueError, "epsilon: expected a number"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    assert_refused(name, *BAD[name])
