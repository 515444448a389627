"""binary_kd_loss: several labels per row, beside torch's functions and two-class distillation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from support.feature_tools import BFLOAT, DOUBLE, FLOAT, HALF, draw, every_dtype
from support.operations import gradients
from vitkd_fast import reference
from vitkd_fast.functional import binary_kd_loss, kd_loss

pytestmark = [pytest.mark.every_isa, pytest.mark.usefixtures("one_thread")]


def pair(*shape: int, dtype: torch.dtype = FLOAT, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    s, t = (draw(*shape, dtype=DOUBLE).mul(scale).to(dtype) for _ in range(2))
    return s, t


def of_torch(s: Tensor, t: Tensor, y: Tensor | None = None, *, T: float = 1.0, w: float = 0.0):
    """As it is written with torch: cross-entropies, less the entropy of the teacher."""
    p = (t / T).sigmoid()
    cross = F.binary_cross_entropy_with_logits(s / T, p)
    loss = T * T * (cross - F.binary_cross_entropy_with_logits(t / T, p))
    return loss if y is None else loss + w * F.binary_cross_entropy_with_logits(s, y)


@every_dtype
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0, 3000.0])
def test_matches_the_reference(dtype: torch.dtype, scale: float) -> None:
    s, t = pair(7, 40, dtype=dtype, scale=scale)
    y = (torch.rand(7, 40) < 0.3).float()
    options: dict[str, Any] = {"temperature": 2.0, "bce_weight": 0.5}

    def exact(s: Tensor, t: Tensor) -> Tensor:
        return reference.binary_kd_loss(s, t, y.double(), **options).mean()

    found = gradients(lambda s, t: binary_kd_loss(s, t, y, **options), [s], t)
    want = gradients(exact, [s.double()], t.double())
    torch_s = gradients(lambda s, t: of_torch(s, t, y.to(dtype), T=2.0, w=0.5), [s], t)
    for a, b, peer in zip(found, want, torch_s, strict=True):
        one = torch.finfo(a.dtype).eps * b.abs().clamp(min=1)
        if a is not found[0]:  # of a gradient, on its own size
            one = torch.finfo(a.dtype).eps * b.abs() + torch.finfo(a.dtype).tiny
        peers = (peer.double() - b).abs().max()
        assert ((a.double() - b).abs() <= 2 * peers + one).all()


def test_a_class_is_two_that_exclude_each_other() -> None:
    """sigmoid(s) is the softmax of (s, 0)."""
    s, t = pair(5, 6)
    two = [torch.stack([x, torch.zeros_like(x)], -1) for x in (s, t)]
    for temperature in (0.5, 1.0, 4.0):
        a = binary_kd_loss(s, t, temperature=temperature)
        torch.testing.assert_close(a, kd_loss(*two, temperature=temperature))


def test_small_differences_of_large_logits_are_not_lost() -> None:
    """softplus(u) - softplus(v) - p (u - v) is off by 1e-3 at 1e4, where the loss is 0."""
    t = torch.tensor([[1e4, -1e4, 1e4, 50.0, -50.0, 200.0]])
    s = torch.tensor([[9.9e3, -9.9e3 + 0.1, 1e4, 49.0, -48.0, -200.0]])
    loss = binary_kd_loss(s, t, reduction="sum")
    want = reference.binary_kd_loss(s.double(), t.double()).sum()
    assert abs(loss.double() - want) <= 2e-7 * want
    loss, grad = gradients(binary_kd_loss, [t], t)
    assert loss == 0 and not grad.any()


def test_certain_teachers_and_students() -> None:
    inf = torch.inf
    t = torch.tensor([[-inf, inf, -inf, inf, 0.0]])
    s = torch.tensor([[1.0, -2.0, -inf, inf, 0.0]])
    loss, grad = gradients(lambda s, t: binary_kd_loss(s, t, reduction="none"), [s], t)
    torch.testing.assert_close(
        loss, F.softplus(torch.tensor([1.0])) + F.softplus(torch.tensor(2.0))
    )
    want = torch.tensor([[1.0, -2.0]]).sigmoid() - torch.tensor([[0.0, 1.0]])
    torch.testing.assert_close(grad, torch.cat([want, torch.zeros(1, 3)], 1))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_what_is_masked_is_not_looked_at(reduction: str) -> None:
    s, t = pair(6, 9)
    y, mask = (torch.rand(6, 9) < 0.4).float(), torch.rand(6, 9) < 0.7
    mask[0] = False
    bad = [torch.where(mask, x, torch.nan) for x in (s, t, y)]

    def loss(s: Tensor, t: Tensor) -> Tensor:
        options: dict[str, Any] = {"mask": mask, "bce_weight": 0.5, "reduction": reduction}
        return binary_kd_loss(s, t, bad[2], **options)

    def exact(s: Tensor, t: Tensor) -> Tensor:
        each = reference.binary_kd_loss(s, t, y, bce_weight=0.5) * mask
        return {"mean": each.sum() / mask.sum(), "sum": each.sum(), "none": each.sum(1)}[reduction]

    for a, b in zip(gradients(loss, [bad[0]], bad[1]), gradients(exact, [s], t), strict=True):
        torch.testing.assert_close(a, b)
    nothing = gradients(lambda s, t: binary_kd_loss(s, t, mask=mask & False), [s], t)
    assert not any(x.any() for x in nothing)


def test_class_weights_are_a_weighted_mean() -> None:
    s, t = pair(6, 4)
    w = torch.tensor([0.0, 1.0, 3.0, 0.5])
    each = reference.binary_kd_loss(s, t)
    found = binary_kd_loss(s, t, class_weights=w)
    torch.testing.assert_close(found, (each * w).sum() / (6 * w.sum()))
    mask = torch.rand(6, 4) < 0.5
    found = binary_kd_loss(s, t, class_weights=w, mask=mask)
    torch.testing.assert_close(found, (each * w * mask).sum() / (mask * w).sum())
    assert binary_kd_loss(s, t, class_weights=w * 0) == 0


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, HALF], ids=str)
def test_labels_of_any_dtype(dtype: torch.dtype) -> None:
    s, t = pair(6, 4)
    y = torch.rand(6, 4) < 0.5
    want = binary_kd_loss(s, t, y.float(), bce_weight=1.0)
    assert torch.equal(binary_kd_loss(s, t, y.to(dtype), bce_weight=1.0), want)
    both = binary_kd_loss(s, t, y, kd_weight=0.0, bce_weight=1.0)
    torch.testing.assert_close(both, F.binary_cross_entropy_with_logits(s, y.float()))


def test_classes_in_any_dimension() -> None:
    s, t = pair(2, 5, 3, 4)
    options: dict[str, Any] = {"class_weights": torch.rand(5), "bce_weight": 1.0}
    y = torch.rand(2, 5, 3, 4).round()
    last = [x.movedim(1, -1) for x in (s, t, y)]
    for reduction in ("mean", "sum", "none"):
        want = binary_kd_loss(*last, **options, reduction=reduction)
        found = binary_kd_loss(s, t, y, **options, class_dim=1, reduction=reduction)
        assert found.shape == ((2, 3, 4) if reduction == "none" else ())
        torch.testing.assert_close(found, want)


def test_inside_autocast() -> None:
    """float32 logits stay float32, where torch's form near the teacher is lost in bfloat16."""
    t = draw(64, 40) * 4
    s = t + 1e-2 * draw(64, 40)
    want = gradients(binary_kd_loss, [s], t)
    with torch.autocast("cpu", BFLOAT):
        found = gradients(binary_kd_loss, [s], t)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


numbers = st.floats(-40, 40, width=32)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=12), st.floats(0.25, 8))
def test_properties(logits: list[tuple[float, float]], temperature: float) -> None:
    """Never negative, 0 at the teacher, unchanged by order and by a change of sign of both."""
    s, t = torch.tensor(logits, dtype=DOUBLE).mT.unsqueeze(1)
    loss = binary_kd_loss(s, t, temperature=temperature, reduction="sum")
    assert loss >= -1e-12
    assert binary_kd_loss(t, t, temperature=temperature) == 0
    order = torch.randperm(s.shape[1])
    for a, b in ((s[:, order], t[:, order]), (-s, -t)):
        other = binary_kd_loss(a, b, temperature=temperature, reduction="sum")
        torch.testing.assert_close(other, loss, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"teacher": torch.ones(3, 5)},
            ValueError,
            "teacher: expected the shape of student",
        ),
        ({"bce_weight": 1.0}, ValueError, "labels: expected numbers in [0, 1] of the shape"),
        (
            {"labels": torch.ones(3)},
            ValueError,
            "labels: expected the shape of student",
        ),
        ({"mask": torch.ones(3, 4)}, TypeError, "mask: expected bool, got torch.float32"),
        ({"mask": [True]}, TypeError, "mask: expected one tensor"),
        ({"class_weights": torch.ones(3)}, ValueError, "class_weights: expected [4], got [3]"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a number > 0, got 0.0"),
        ({"temperature": torch.ones(())}, TypeError, "temperature: expected a number, as"),
        ({"class_dim": 2}, ValueError, "class_dim: expected -2 to 1 for student [3, 4], got 2"),
        ({"reduction": "batchmean"}, ValueError, "reduction: expected mean, sum or none, got"),
        ({"student": torch.ones(3, 0)}, ValueError, "student: expected one class or more"),
        ({"student": torch.ones(3, 4).int()}, TypeError, "student: expected float32, float16"),
        (
            {"teacher": torch.ones(3, 4, requires_grad=True)},
            ValueError,
            "teacher: expected a constant, as the loss has no derivative there",
        ),
        (
            {"class_weights": torch.ones(4, requires_grad=True)},
            ValueError,
            "class_weights: expected a constant, as the loss has no derivative there",
        ),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], words: str) -> None:
    arguments = {"student": torch.ones(3, 4), "teacher": torch.ones(3, 4)} | change
    with pytest.raises(error) as caught:
        binary_kd_loss(**arguments)
    assert str(caught.value).startswith(f"binary_kd_loss: {words}")
