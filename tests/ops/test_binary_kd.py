"""binary_kd_loss: several labels per row, beside torch's functions and two-class distillation."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from support.feature_tools import BFLOAT, DOUBLE, FLOAT, HALF, draw, every_dtype
from support.operations import gradients
from vitkd_fast import _ops, reference
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


def options_for(name: str, logits: Tensor, reduction: int) -> reference.BinaryKDOptions:
    """Labels, mask and weights in the accumulation type, with what no mask leaves NaN."""
    wide = DOUBLE if logits.dtype == DOUBLE else FLOAT
    y, mask = torch.rand(logits.shape) < 0.4, torch.rand(logits.shape) < 0.7
    weights = torch.rand(logits.shape[1]).to(wide)
    weights[::3] = 0
    numbers = torch.where(mask, torch.rand(logits.shape).to(wide), torch.nan)
    options: dict[str, Any] = {
        "plain": {"temperature": 4.0},
        "labels": {"labels": y, "bce_weight": 0.7},
        "both": {"labels": y.byte(), "bce_weight": 0.7, "temperature": 0.5},
        "bce": {"labels": y.to(wide), "bce_weight": 1.5, "kd_weight": 0.0},
        "nothing": {"kd_weight": 0.0},
        "mask": {"mask": mask, "temperature": 4.0},
        "weights": {"class_weights": weights, "labels": y, "bce_weight": 0.7},
        "everything": {
            "temperature": 2.0, "kd_weight": 0.8, "bce_weight": 0.7,
            "labels": numbers, "mask": mask, "class_weights": weights,
        },
    }[name]  # fmt: skip
    given: dict[str, Any] = {"temperature": 1.0, "kd_weight": 1.0} | options
    return reference.BinaryKDOptions(reduction=reduction, **given)


NAMES = ["plain", "labels", "both", "bce", "nothing", "mask", "weights", "everything"]
OPS = torch.ops.vitkd_fast


def in_dtype(o: reference.BinaryKDOptions, dtype: torch.dtype) -> reference.BinaryKDOptions:
    wide = {
        key: x.to(dtype)
        for key, x in o._asdict().items()
        if isinstance(x, Tensor) and x.is_floating_point()
    }
    return o._replace(**wide)


@every_dtype
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reduction", [reference.MEAN, reference.SUM, reference.NONE])
def test_operations_match_the_reference(name: str, dtype: torch.dtype, reduction: int) -> None:
    """All three, for rows and blocks that end within a register and do not, in float64 and here.

    The error is at most twice that of the reference in float32, and two roundings; four in
    float64, where what is compared with has as many.
    """
    for rows, classes in ((1, 1), (40, 3), (9, 16), (3, 513), (4, 1000), (2, 1001), (1, 5000)):
        s, t = pair(rows, classes, dtype=dtype)
        if dtype == HALF and classes > 1:
            t = t.to(BFLOAT)  # of another dtype
        o = options_for(name, s, reduction)
        wide = o.class_weights.dtype if o.class_weights is not None else None
        assert wide in (None, DOUBLE if dtype == DOUBLE else FLOAT)
        come_in = torch.rand(rows if reduction == reference.NONE else []) + 0.5
        come_in = come_in.to(DOUBLE if dtype == DOUBLE else FLOAT)
        given = OPS.binary_kd_fwd_grad(s, t, *o)
        later = OPS.binary_kd_bwd(come_in, s, t, *o)
        assert torch.equal(OPS.binary_kd_fwd(s, t, *o), given[0])
        assert given[1].dtype == later.dtype == dtype
        exact = in_dtype(o, DOUBLE)
        by = [s.double(), t.double(), *exact]
        want = [*reference.binary_kd_fwd_grad(*by), reference.binary_kd_bwd(come_in.double(), *by)]
        narrow = [s.float(), t.float(), *in_dtype(o, FLOAT)]
        torchs = [
            *reference.binary_kd_fwd_grad(*narrow),
            reference.binary_kd_bwd(come_in.float(), *narrow),
        ]
        shrink = torch.finfo(DOUBLE).eps / torch.finfo(FLOAT).eps if dtype == DOUBLE else 1.0
        for x, y, peer in zip((*given, later), want, torchs, strict=True):
            assert not y.isnan().any()
            peers = (peer.double() - y).abs().max() * shrink
            one = torch.finfo(x.dtype).eps * y.abs().clamp(min=shrink * 0.25)
            if x is given[0]:
                one = torch.finfo(x.dtype).eps * y.abs().clamp(min=1)
            tiny = torch.finfo(x.dtype).smallest_normal
            roundings = 4 if dtype == DOUBLE else 2
            assert ((x.double() - y).abs() <= 2 * peers + roundings * one + tiny).all()


def test_number_of_threads_changes_nothing() -> None:
    s, t = pair(300, 1000)
    for name in NAMES:
        o = options_for(name, s, reference.MEAN)
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(OPS.binary_kd_fwd_grad(s, t, *o))
        torch.set_num_threads(1)
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("temperature", [0.1, 1.0, 20.0])
def test_extreme_logits(temperature: float) -> None:
    """Each beside each: what is finite is as in float64, and nothing is NaN."""
    edge = torch.tensor([0.0, 1e-30, 1e-3, 1.0, 20.0, 88.0, 90.0, 104.0, 1e4, 1e30, torch.inf])
    edge = torch.cat([edge, -edge])
    s, t = (x.flatten().unsqueeze(1) for x in torch.meshgrid(edge, edge, indexing="ij"))
    y = (torch.arange(len(s)) % 2).unsqueeze(1).float()
    for labels, weight in ((None, 0.0), (y, 1.0)):
        o = reference.BinaryKDOptions(temperature, 1.0, reference.NONE, labels, bce_weight=weight)
        loss, grad = OPS.binary_kd_fwd_grad(s, t, *o)
        exact, grad_exact = reference.binary_kd_fwd_grad(
            s.double(), t.double(), *in_dtype(o, DOUBLE)
        )
        assert not loss.isnan().any()
        numbers = (s.isfinite() & t.isfinite()).squeeze(1)
        torch.testing.assert_close(
            loss[numbers].double(), exact[numbers], rtol=3e-6, atol=1e-6 * temperature**2
        )
        assert (loss[~numbers] > -1e-6).all()
        torch.testing.assert_close(grad.double(), grad_exact, rtol=3e-6, atol=1e-6 * temperature)


def test_what_is_nearly_certain_keeps_its_digits() -> None:
    """A KL of 1e-10 is no rounding of log(1 + e^-20)."""
    t = torch.arange(-60.0, 61.0).unsqueeze(1)
    for step in (-1.0, 1.0):
        s = t + step
        o = reference.BinaryKDOptions(1.0, 1.0, reference.NONE)
        found = OPS.binary_kd_fwd(s, t, *o).double()
        want = reference.binary_kd_fwd(s.double(), t.double(), *o)
        assert (want[:20] < 1e-15).all()
        torch.testing.assert_close(found, want, rtol=1e-5, atol=0)


def test_nan_stays_where_it_is() -> None:
    for side in (0, 1):
        logits = list(pair(3, 37))
        logits[side][1, 5] = torch.nan
        o = reference.BinaryKDOptions(2.0, 1.0, reference.NONE)
        loss, grad = OPS.binary_kd_fwd_grad(*logits, *o)
        assert loss.isnan().tolist() == [False, True, False]
        assert grad.isnan().nonzero().tolist() == [[1, 5]]
        assert OPS.binary_kd_fwd(*logits, *o._replace(reduction=reference.MEAN)).isnan()
        mask, weights = torch.ones(3, 37, dtype=torch.bool), torch.ones(37)
        mask[1, 5], weights[5] = False, 0
        for left_out in ({"mask": mask}, {"class_weights": weights}):
            loss, grad = OPS.binary_kd_fwd_grad(*logits, *o._replace(**left_out))
            assert not loss.isnan().any()
            assert not grad.isnan().any()


def test_a_teacher_without_weight_is_not_looked_at() -> None:
    s, t = pair(3, 20)
    y = (torch.rand(3, 20) < 0.5).float()
    bad = torch.full_like(t, torch.nan)
    found = gradients(lambda s, t: binary_kd_loss(s, t, y, kd_weight=0.0, bce_weight=1.0), [s], bad)
    want = gradients(lambda s, t: F.binary_cross_entropy_with_logits(s, y), [s], t)
    torch.testing.assert_close(found, want)


def test_loss_scale_comes_before_the_rounding() -> None:
    """The mean's gradients are below what float16 has, unless they are scaled first."""
    s, t = pair(300, 1000, dtype=HALF)
    scaled = gradients(lambda s, t: binary_kd_loss(s, t) * 2.0**16, [s], t)[1]
    want = gradients(lambda s, t: binary_kd_loss(s, t) * 2.0**16, [s.float()], t.float())[1]
    torch.testing.assert_close(scaled, want.half(), rtol=1e-3, atol=0)


def test_dense_predictions_are_not_copied() -> None:
    """[batch, classes, height, width] goes to the operation in its own memory."""
    s, t = pair(2, 5, 3, 4)
    with Calls() as calls:
        binary_kd_loss(s, t, class_dim=1)
    ((_, arguments),) = calls.of
    assert [x.data_ptr() for x in arguments[:2]] == [s.data_ptr(), t.data_ptr()]


class Calls(TorchDispatchMode):
    """The package's own operations that are called, and with what."""

    def __init__(self) -> None:
        super().__init__()
        self.of: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "vitkd_fast":
            self.of.append((func, args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"teacher": torch.ones(3, 5)}, "student, teacher: expected [rows, classes] for both"),
        ({"teacher": torch.ones(3, 4).double()}, "teacher: expected float64 where the student"),
        ({"temperature": 0.0}, "temperature: expected a number > 0, got 0"),
        ({"labels": None}, "labels: expected numbers in [0, 1], as bce_weight is 1, got none"),
        ({"labels": torch.ones(4)}, "labels: expected the shape of student [3, 4], got [4]"),
        ({"labels": torch.ones(3, 4).long()}, "labels: expected bool, uint8 or the accumulation"),
        ({"mask": torch.ones(3, 4)}, "mask: expected bool, got Float"),
        ({"class_weights": torch.ones(3)}, "class_weights: expected 4 numbers in the accumulation"),
    ],
)
def test_operations_check_their_arguments(change: dict[str, Any], words: str) -> None:
    if _ops.backends()["binary_kd_fwd"]["CPU"] != "C++":
        pytest.skip("the reference takes what torch takes")
    given: dict[str, Any] = {
        "student": torch.ones(3, 4), "teacher": torch.ones(3, 4), "temperature": 1.0,
        "kd_weight": 1.0, "reduction": reference.MEAN, "labels": torch.ones(3, 4),
        "bce_weight": 1.0,
    }  # fmt: skip
    for operation in (OPS.binary_kd_fwd, OPS.binary_kd_fwd_grad):
        with pytest.raises(RuntimeError, match=re.escape(f"binary_kd_loss: {words}")):
            operation(**given | change)
    if "teacher" in change or "labels" in change:
        return
    with pytest.raises(RuntimeError, match="binary_kd_bwd: grad_loss: expected 1 numbers"):
        OPS.binary_kd_bwd(torch.ones(3), **given)


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
