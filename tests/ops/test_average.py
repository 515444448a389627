"""Several teachers: average_logits, and PHIStandardize, which gives their features one scale."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from support.feature_tools import DOUBLE, FLOAT, draw, every_dtype
from vitkd_fast.functional import _features, average_logits, kd_loss
from vitkd_fast.nn import PHIStandardize
from vitkd_fast.nn.standardize import _hadamard

SHARES = [0.5, 0.125, 0.375]


def teachers(*shape: int, dtype: torch.dtype = FLOAT, scale: float = 3.0) -> list[Tensor]:
    return [draw(*shape, dtype=DOUBLE).mul(scale).to(dtype) for _ in SHARES]


def exact(logits: list[Tensor], space: str, temperature: float, independent: bool) -> Tensor:
    """Logits of the mean of probabilities, in float64, but for a constant of each row."""
    x = torch.stack(logits).double() / temperature
    w = torch.tensor(SHARES, dtype=DOUBLE).view(-1, *[1] * (x.dim() - 1))
    if space == "log":
        return temperature * (w * (x if independent else x.log_softmax(-1))).sum(0)
    if not independent:
        return temperature * (w * x.softmax(-1)).sum(0).log()
    p = (w * x.sigmoid()).sum(0)
    return temperature * (p / (1 - p)).log()


@every_dtype
@pytest.mark.parametrize("space", ["probability", "log"])
@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_mean(dtype: torch.dtype, space: str, independent: bool, temperature: float) -> None:
    logits = teachers(5, 3, 40, dtype=dtype)
    options: dict[str, Any] = {"temperature": temperature, "independent": independent}
    found = average_logits(logits, [4, 1, 3], space, **options)
    assert found.dtype == (DOUBLE if dtype == DOUBLE else FLOAT)
    wide = 1e-12 if dtype == DOUBLE else 2e-5
    torch.testing.assert_close(
        found.double(), exact(logits, space, temperature, independent), rtol=wide, atol=wide
    )


def test_in_tiles_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = [x[::2, ::2] for x in teachers(26, 90)]
    whole = average_logits(logits)
    monkeypatch.setattr(_features, "TILE", 100)
    torch.testing.assert_close(average_logits(logits), whole, rtol=1e-6, atol=1e-6)
    assert average_logits([x[:0] for x in logits]).shape == (0, 45)


@pytest.mark.parametrize("space", ["probability", "log"])
def test_what_underflows_is_kept(space: str) -> None:
    """Probabilities of 1e-4343 have logarithms; so has the mean with one that is larger."""
    a, b = torch.tensor([[1e4, 0.0, -1e4]]), torch.tensor([[0.0, -1e4, -1e4]])
    found = average_logits([a, b], space=space)
    half = math.log(0.5)
    if space == "probability":
        # each first class has probability 1; the second, at best, exp(-1e4) / 2
        want = torch.tensor([[0.0, -1e4 + math.log(2) + half, -1e4 + half]])
    else:
        want = torch.tensor([[0.0, -1e4, -1.5e4]])
    torch.testing.assert_close(found, want)
    masked = torch.tensor([[0.0, 1.0, -math.inf]])
    found = average_logits([masked, masked + 1], space=space)
    torch.testing.assert_close(found, masked.log_softmax(-1))


def test_one_teacher_and_equal_ones() -> None:
    x, *_ = teachers(4, 9)
    for space in ("probability", "log"):
        torch.testing.assert_close(average_logits([x], space=space), x.log_softmax(-1))
        found = average_logits([x, x + 5, x - 3], SHARES, space, temperature=3.0)
        student = torch.randn(4, 9)
        same = [kd_loss(student, t, temperature=3.0) for t in (found, x)]
        torch.testing.assert_close(*same)
    a, b, c = teachers(4, 9)
    torch.testing.assert_close(average_logits([a, b, c]), average_logits([c, a, b]))


def test_no_teacher_has_a_gradient_and_any_may_be_of_inference_mode() -> None:
    logits = teachers(4, 9)
    with torch.inference_mode():
        made = [x.clone() for x in logits]
    assert torch.equal(average_logits(made), average_logits(logits))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(average_logits(logits), average_logits(logits))
    meta = [x.to("meta") for x in logits]
    assert average_logits(meta).shape == (4, 9)
    with pytest.raises(ValueError, match=r"^average_logits: logits\[1\]: expected a constant"):
        average_logits([logits[0], logits[1].requires_grad_()])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([],), "logits: expected a list of one tensor or more, got none"),
        ((torch.ones(2, 3),), "logits: expected a list .*, got one tensor"),
        (([torch.ones(2, 3), torch.ones(3, 3)],), r"logits\[1\]: expected the shape of"),
        (([torch.ones(2, 3)], [1, 2]), "weights: expected 1 finite numbers > 0"),
        (([torch.ones(2, 3)], [0.0]), "weights: expected 1 finite numbers > 0"),
        (([torch.ones(2, 3)], None, "mean"), "space: expected probability or log, got 'mean'"),
    ],
)
def test_errors(arguments: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"^average_logits: {words}"):
        average_logits(*arguments)
    with pytest.raises(ValueError, match=r"^average_logits: temperature: expected a num"):
        average_logits([torch.ones(2, 3)], temperature=0.0)


# features


def features(channels: int, scale: float = 40.0) -> Tensor:
    """[B, N, C] of channels whose variances differ by a factor of about 1e6."""
    x = torch.randn(64, 7, channels) * torch.logspace(-3, 0, channels)
    return scale * x @ torch.linalg.qr(torch.randn(channels, channels))[0] + 3


@pytest.mark.parametrize("channels", [1, 2, 4, 12, 20, 28, 36, 384, 768])
def test_hadamard(channels: int) -> None:
    found = _hadamard(channels)
    assert found is not None
    assert torch.equal(found @ found.mT, channels * torch.eye(channels))
    assert torch.equal(found.abs(), torch.ones(channels, channels))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_every_channel_has_variance_1(scale: float) -> None:
    x = features(28, scale)
    made = PHIStandardize(28)
    for part in x.split(20):
        made.observe(part)
    made.fit()
    y = made(x)
    rows = y.flatten(0, 1)
    torch.testing.assert_close(rows.mean(0), torch.zeros(28), rtol=0, atol=1e-3)
    torch.testing.assert_close(rows.var(0, correction=0), torch.ones(28), rtol=1e-3, atol=0)
    # a rotation and one scale: distances keep their proportions, unlike in whitening
    distances = torch.cdist(y[0], y[0]) / torch.cdist(x[0], x[0]).clamp(min=1e-9)
    off = ~torch.eye(7, dtype=torch.bool)
    torch.testing.assert_close(distances[off], distances[0, 1].expand(42), rtol=1e-3, atol=0)
    as_map = x.mT.unflatten(2, (7, 1))
    torch.testing.assert_close(made(as_map), y.mT.unflatten(2, (7, 1)))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made(x), y)


def test_maps_are_observed_as_tokens() -> None:
    x = features(12)
    one, two = PHIStandardize(12), PHIStandardize(12)
    one.observe(x)
    two.observe(x.mT.unflatten(2, (7, 1)))
    for made in (one, two):
        made.fit()
    torch.testing.assert_close(one.mean, two.mean)
    torch.testing.assert_close(one.matrix.abs(), two.matrix.abs(), rtol=1e-3, atol=1e-5)


def test_what_cannot_be_standardised() -> None:
    with pytest.raises(ValueError, match=r"channels: expected 1, 2 or a multiple of 4 .*, got 6"):
        PHIStandardize(6)
    made = PHIStandardize(4)
    with pytest.raises(ValueError, match="expected features to be observed first, got none"):
        made.fit()
    with pytest.raises(ValueError, match=r"x: expected \[batch, 4, height, width\] or \[.., 4\]"):
        made.observe(torch.ones(2, 3))
    made.observe(torch.ones(5, 4))
    with pytest.raises(ValueError, match="expected features with a finite variance, got one of 0"):
        made.fit()
