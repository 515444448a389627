"""feature_loss: its projection, kinds of error and normalised teachers."""

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from support.feature_tools import (
    BFLOAT,
    DOUBLE,
    HALF,
    KINDS,
    Bad,
    as_tokens,
    assert_near,
    assert_refused,
    draw,
    every_device,
    loss_and_grad,
)
from vitkd_fast import reference
from vitkd_fast.functional import feature_loss

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.every_isa
@every_device
@pytest.mark.parametrize("dtype", [HALF, BFLOAT], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_in_low_precision_match(kind: str, dtype: torch.dtype, device: str) -> None:
    x, t = draw(3, 5, 4, 4, dtype=dtype, device=device), draw(3, 7, 4, 4, device=device)
    given = [x, draw(7, 5, dtype=dtype, device=device), draw(7, dtype=dtype, device=device)]
    leaves = [a.requires_grad_() for a in given]
    loss = feature_loss(leaves[0], t, *leaves[1:], kind=kind)
    exact = [a.detach().double().requires_grad_() for a in given]
    want = reference.feature_loss(as_tokens(exact[0]), as_tokens(t.double()), *exact[1:], kind=kind)
    assert_near(loss.detach(), want.detach(), 16)
    for got, wanted in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(want, exact), strict=True
    ):
        assert_near(got, wanted, 16)


@pytest.mark.every_isa
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalize", ["layer_norm", "l2"])
def test_normalized_teachers_match(kind: str, normalize: str) -> None:
    x, t = draw(3, 5, 4, 4), 3 * draw(3, 5, 4, 4)
    rows = F.layer_norm(as_tokens(t), (5,)) if normalize == "layer_norm" else None
    rows = F.normalize(as_tokens(t), dim=2) if rows is None else rows
    options = {"kind": kind, "beta": 0.3}
    value, grad = loss_and_grad(partial(feature_loss, normalize_teacher=normalize, **options), x, t)
    want, want_grad = loss_and_grad(
        lambda a, b: reference.feature_loss(as_tokens(a), b, **options), x.double(), rows.double()
    )
    assert_near(value, want, 16)
    assert_near(grad, want_grad, 16)


@pytest.mark.every_isa
@pytest.mark.parametrize("beta", [0.0, 0.1, 1.0, 5.0])
def test_beta_matches(beta: float) -> None:
    x, t = draw(3, 5, 4, 4), draw(3, 5, 4, 4)
    given = loss_and_grad(partial(feature_loss, kind="smooth_l1", beta=beta), x, t)
    want = loss_and_grad(partial(F.smooth_l1_loss, beta=beta), x.double(), t.double())
    for a, b in zip(given, want, strict=True):
        assert_near(a, b, 16)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradcheck_of_the_projection(kind: str, reduction: str) -> None:
    given = [draw(*shape, dtype=DOUBLE) for shape in ((2, 3, 2, 3), (4, 3, 1, 1), (4,))]
    t = draw(2, 7, 4, dtype=DOUBLE)[:, 1:]
    assert torch.autograd.gradcheck(
        lambda x, w, b: feature_loss(x, t, w, b, kind=kind, reduction=reduction),
        [x.requires_grad_() for x in given],
    )
    for needed in itertools.product([False, True], repeat=3):  # of some inputs alone
        leaves = [x.detach().requires_grad_(n) for x, n in zip(given, needed, strict=True)]
        loss = feature_loss(leaves[0], t, *leaves[1:], kind=kind, reduction=reduction)
        assert loss.requires_grad == any(needed)
        if any(needed):
            loss.backward()
        assert [x.grad is not None for x in leaves] == list(needed)


# errors

X, T = draw(2, 5, 4, 4), draw(2, 7, 4, 4)
BAD: dict[str, Bad] = {
    "feature_channels": (
        lambda: feature_loss(X, T), ValueError, "f_t: expected the channels of f_s",
    ),
    "feature_weight": (
        lambda: feature_loss(X, T, draw(5, 7)), ValueError, "weight: expected [7, 5] or",
    ),
    "feature_bias": (
        lambda: feature_loss(X, T, draw(7, 5), draw(5)), ValueError,
        "bias: expected [7], got [5]",
    ),
    "feature_bias_alone": (
        lambda: feature_loss(X, X, None, draw(5)), ValueError, "bias: expected a weight beside it",
    ),
    "feature_kind": (
        lambda: feature_loss(X, X, kind="l3"), ValueError,
        "kind: expected mse, cosine or smooth_l1, got 'l3'",
    ),
    "feature_beta": (lambda: feature_loss(X, X, beta=-1), ValueError, "beta: expected a"),
    "feature_normalize": (
        lambda: feature_loss(X, X, normalize_teacher="batch"), ValueError,
        "normalize_teacher: expected None, layer_norm or l2, got 'batch'",
    ),
    "feature_reduction": (
        lambda: feature_loss(X, X, reduction="none"), ValueError,
        "reduction: expected mean or sum, got 'none'",
    ),
    "feature_students_tokens": (
        lambda: feature_loss(draw(2, 15, 5), draw(2, 9, 5)), ValueError,
        "f_s: expected the 9 positions of f_t or a square grid, got 15",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    assert_refused(name, *BAD[name])
