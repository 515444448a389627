"""What holds for mlkd_loss, wkd_logit_loss and spearman_loss alike, beside their usual forms."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.feature_tools import (
    BFLOAT,
    DOUBLE,
    FLOAT,
    draw,
    every_device,
    every_dtype,
    loss_and_grad,
)
from support.relation_tools import LOGITS, check, every_logit_loss, seeded
from vitkd_fast.functional import _features

pytestmark = pytest.mark.usefixtures("one_thread")


@every_device
@every_logit_loss
@pytest.mark.parametrize("shape", [(1, 2), (5, 2), (4, 7), (9, 5), (3, 130), (70, 6)], ids=str)
def test_shapes_match(name: str, shape: tuple[int, int], device: str) -> None:
    if name == "spearman" and shape[1] == 2:
        pytest.skip("of two classes the correlation is +-1, and its gradient 0")
    check(name, draw(*shape, device=device), draw(*shape, device=device))


@every_device
@every_logit_loss
@every_dtype
def test_dtypes_match(name: str, dtype: torch.dtype, device: str) -> None:
    check(name, draw(6, 9, dtype=dtype, device=device), draw(6, 9, device=device))
    check(name, draw(9, 6, dtype=dtype, device=device), draw(9, 6, dtype=dtype, device=device))


@every_logit_loss
def test_any_strides_match(name: str) -> None:
    check(name, draw(9, 6).T, draw(6, 18)[:, ::2])


@every_logit_loss
@pytest.mark.parametrize("size", [1.0, 100.0, 1e4])
def test_extreme_logits(name: str, size: float) -> None:
    """Softmaxes that are saturated, on either side or both."""
    for x, t in (
        (size * draw(5, 8), draw(5, 8)),
        (draw(5, 8), size * draw(5, 8)),
        (size * draw(5, 8), size * draw(5, 8)),
    ):
        value, grad = loss_and_grad(LOGITS[name], x, t)
        assert value.isfinite()
        assert grad.isfinite().all()
        # the usual form of wkd_logit divides by what is 0 there; 1 - a sigmoid of 1 is rounding
        if name != "wkd_logit" and (name, size) != ("spearman", 1e4):
            check(name, x, t, 256)


@every_logit_loss
def test_extreme_classes_masked_in_the_teacher(name: str) -> None:
    x, t = draw(5, 8), draw(5, 8)
    t[:, 6:] = -torch.inf
    check(name, x, t)


@every_logit_loss
def test_nan_stays(name: str) -> None:
    for side in (0, 1):
        pair = [draw(4, 6), draw(4, 6)]
        pair[side][1, 1] = torch.nan
        assert LOGITS[name](*pair).isnan()


@every_logit_loss
@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
def test_autocast_changes_nothing(name: str, dtype: torch.dtype) -> None:
    """Arithmetic is not bfloat16's inside such a region."""
    x, t = draw(6, 9, dtype=dtype), draw(6, 9, dtype=dtype)
    want = loss_and_grad(LOGITS[name], x, t)
    with torch.autocast("cpu", dtype=BFLOAT):
        given = loss_and_grad(LOGITS[name], x, t)
    for a, b in zip(given, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("tile", [1, 30, 200])
def test_tiles_match(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_features, "TILE", tile)
    check("spearman", draw(7, 12), draw(7, 12))


@given(seed=st.integers(0, 2**31), shift=st.floats(-50, 50))
@pytest.mark.parametrize("name", LOGITS)
def test_shifts_and_orders_change_nothing(name: str, seed: int, shift: float) -> None:
    """Of a row's logits; and of rows and classes alike, but where labels tell classes apart."""
    new = seeded(seed)
    x, t = new(5, 7), new(5, 7)
    want = LOGITS[name](x, t)
    assert torch.allclose(LOGITS[name](x + shift, t - shift), want, rtol=1e-9, atol=1e-12)
    if name != "wkd_logit":
        generator = torch.Generator().manual_seed(seed)
        rows, classes = (torch.randperm(n, generator=generator) for n in (5, 7))
        moved = [a[rows][:, classes] for a in (x, t)]
        assert torch.allclose(LOGITS[name](*moved), want, rtol=1e-9, atol=1e-12)


def test_float64_teachers_decide_the_arithmetic() -> None:
    for name in LOGITS:
        check(name, draw(4, 6), draw(4, 6, dtype=DOUBLE))
