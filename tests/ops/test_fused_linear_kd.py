"""fused_linear_kd_loss: beside kd_loss of whole logits, chunks, memory, precision, errors."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from support.feature_tools import assert_near
from support.kd_tools import (
    BFLOAT,
    DOUBLE,
    FLOAT,
    HALF,
    OPTIONS,
    Rows,
    draw,
    every_device,
    operation_options,
)
from vitkd_fast import reference
from vitkd_fast.functional import fused_linear_kd_loss, kd_loss

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, DIM, CLASSES = 13, 6, 9


def classifier(
    rows: int = ROWS, dim: int = DIM, classes: int = CLASSES, dtype: torch.dtype = FLOAT,
    device: str = "cpu",
) -> list[Tensor]:  # fmt: skip
    """Features, weight and bias."""
    shapes = (rows, dim), (classes, dim), (classes,)
    return [draw(*shape, dtype=dtype, device=device, scale=1.0) for shape in shapes]


def results(loss: Callable[..., Tensor], inputs: list[Tensor], *teacher: Any) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    value = loss(*leaves, *teacher)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


@every_device
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [FLOAT, HALF, BFLOAT, DOUBLE], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_matches_the_reference(name: str, dtype: torch.dtype, reduction: str, device: str) -> None:
    """Loss and all three gradients, with each of kd_loss's options, in chunks of 5, 5 and 3."""
    inputs = classifier(dtype=dtype, device=device)
    teacher = draw(ROWS, CLASSES, dtype=dtype, device=device)
    options = OPTIONS[name](Rows([ROWS], CLASSES, device)) | {"reduction": reduction}
    found = results(partial(fused_linear_kd_loss, chunk=5, **options), inputs, teacher)
    wide = [x.double() for x in inputs]
    of_reference = operation_options(draw(ROWS, CLASSES, dtype=DOUBLE, device=device), **options)
    want = results(
        lambda *x: reference.fused_linear_kd_loss(*x, *of_reference), wide, teacher.double()
    )
    assert found[0].dtype == (DOUBLE if dtype == DOUBLE else FLOAT)
    for x, y in zip(found, want, strict=True):
        assert_near(x, y, 64)


@every_device
@pytest.mark.parametrize("bias", [True, False])
def test_a_teacher_s_classifier_is_its_logits(bias: bool, device: str) -> None:
    inputs = classifier(device=device)
    other = classifier(dim=11, device=device)
    if not bias:
        inputs, other = inputs[:2], other[:2]
    x_t, w_t, b_t = (*other, None)[:3]
    loss = partial(fused_linear_kd_loss, temperature=2.0, chunk=4)

    def ours(*x: Tensor, teacher: Any) -> Tensor:
        return loss(*(*x, None)[:3], teacher)

    found = results(partial(ours, teacher=(x_t, w_t, b_t)), inputs)
    want = results(partial(ours, teacher=F.linear(x_t, w_t, b_t)), inputs)
    for x, y in zip(found, want, strict=True):
        assert_close(x, y)
    whole = kd_loss(F.linear(*inputs), F.linear(x_t, w_t, b_t), temperature=2.0)
    assert_close(found[0], whole)


def test_of_a_teacher_s_tensors_one_may_be_float64() -> None:
    inputs, (x_t, w_t, b_t) = classifier(), classifier(dtype=DOUBLE)
    found = results(fused_linear_kd_loss, inputs, (x_t.float(), w_t, b_t.bfloat16()))
    assert found[0].dtype == DOUBLE
    assert [x.dtype for x in found[1:]] == [FLOAT] * 3


@given(chunk=st.integers(1, 40), rows=st.integers(0, 33), smoothing=st.sampled_from([0.0, 0.1]))
@settings(max_examples=40, deadline=None)
def test_chunks_do_not_show(chunk: int, rows: int, smoothing: float) -> None:
    inputs, teacher = classifier(rows, dtype=DOUBLE), draw(rows, CLASSES, dtype=DOUBLE)
    labels = torch.randint(CLASSES, (rows,))
    labels[::3] = -100
    options = {"labels": labels, "ce_weight": 0.5, "label_smoothing": smoothing}
    found = results(partial(fused_linear_kd_loss, chunk=chunk, **options), inputs, teacher)
    want = results(lambda x, w, b: kd_loss(F.linear(x, w, b), teacher, **options), inputs)
    for x, y in zip(found, want, strict=True):
        assert_close(x, y, rtol=1e-9, atol=1e-12)


class Largest(TorchDispatchMode):
    """The most numbers in a tensor that any operation gave back as its own memory."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor) and not func.is_view:
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("of_classifier", [False, True])
@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
def test_logits_are_never_whole(dtype: torch.dtype, of_classifier: bool) -> None:
    """The largest tensor is a gradient, or a chunk's logits."""
    inputs = classifier(900, 12, 300, dtype=dtype)
    other = tuple(classifier(900, 12, 300, dtype=dtype))
    teacher = other if of_classifier else draw(900, 300, dtype=dtype)
    with Largest() as largest:
        results(partial(fused_linear_kd_loss, chunk=30), inputs, teacher)
    assert 0 < largest.numel <= max(30 * 300, 900 * 12) < 900 * 300 // 20


@every_device
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_in_bfloat16_are_off_by_one_rounding(reduction: str, device: str) -> None:
    """Features as a pooled layer gives them, with channels of 30 times the others' size."""
    x = draw(320, 192, scale=1.0, device=device).relu()
    x[:, ::48] *= 30
    w = draw(1000, 192, scale=0.05, device=device)
    inputs = [y.bfloat16() for y in (x, w, draw(1000, scale=0.1, device=device))]
    near = F.linear(*(y.float() for y in inputs)) + draw(320, 1000, scale=0.5, device=device)
    teacher, labels = near.bfloat16(), torch.randint(1000, (320,), device=device)
    options = {"temperature": 2.0, "labels": labels, "ce_weight": 0.3, "reduction": reduction}
    found = results(partial(fused_linear_kd_loss, **options), inputs, teacher)

    def exact(*y: Tensor) -> Tensor:
        return kd_loss(F.linear(*y), teacher.double(), **options)

    want = results(exact, [y.double() for y in inputs])
    assert_near(found[0], want[0])
    for given_, wanted in zip(found[1:], want[1:], strict=True):
        # half a step of bfloat16, and sums in float32 of terms as large as the largest
        allowed = 2**-8 * wanted.abs() + 2**-18 * wanted.abs().max()
        error = (given_.double() - wanted).abs()
        assert (error <= allowed).all()

    # what the logits' own rounding to bfloat16 does to the usual form
    def usual(*y: Tensor) -> Tensor:
        return kd_loss(F.linear(*y), teacher, **options)

    of_usual = results(usual, inputs)
    for ours, theirs, wanted in zip(found[1:], of_usual[1:], want[1:], strict=True):
        error = [(y.double() - wanted).norm() / wanted.norm() for y in (ours, theirs)]
        assert error[0] < 0.003 < error[1]


@every_device
@pytest.mark.parametrize("dtype", [FLOAT, HALF, BFLOAT, DOUBLE], ids=str)
def test_extreme_logits(dtype: torch.dtype, device: str) -> None:
    """Up to +-1e4, with classes that the teacher rules out."""
    inputs = [x.to(device, dtype) for x in (100 * torch.eye(4, 6), 100 * torch.eye(5, 6))]
    inputs.append(torch.zeros(5, dtype=dtype, device=device))
    teacher = draw(4, 5, dtype=dtype, device=device)
    teacher[:, 1] = -torch.inf
    found = results(partial(fused_linear_kd_loss, chunk=3), inputs, teacher)
    wide = [x.double() for x in inputs]
    want = results(lambda *x: kd_loss(F.linear(*x), teacher.double()), wide)
    for x, y in zip(found, want, strict=True):
        assert x.isfinite().all()
        assert_near(x, y, 64)


@every_device
@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE], ids=str)
def test_student_that_is_its_teacher(dtype: torch.dtype, device: str) -> None:
    """Of the same product, and so of the same bits."""
    inputs = classifier(dtype=dtype, device=device)
    for x in results(partial(fused_linear_kd_loss, temperature=3.0), inputs, tuple(inputs)):
        assert (x == 0).all()


@every_device
def test_frozen_inputs_get_no_gradient(device: str) -> None:
    inputs, teacher = classifier(device=device), draw(ROWS, CLASSES, device=device)
    want = results(partial(fused_linear_kd_loss, chunk=4), inputs, teacher)
    for frozen in range(3):
        leaves = [x.detach().requires_grad_(i != frozen) for i, x in enumerate(inputs)]
        fused_linear_kd_loss(*leaves, teacher, chunk=4).backward()
        for i, (leaf, grad) in enumerate(zip(leaves, want[1:], strict=True)):
            assert leaf.grad is None if i == frozen else torch.equal(leaf.grad, grad)


X, W, B = torch.zeros(4, 6), torch.zeros(5, 6), torch.zeros(5)
T = torch.zeros(4, 5)
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "features": ({"features": X[0]}, ValueError, "features: expected [rows, dim], got [6]"),
    "weight": ({"weight": W[:, :5]}, ValueError, "weight: expected the dim of features [4, 6]"),
    "one class": ({"weight": W[:1], "bias": None}, ValueError, "weight: expected 2 classes"),
    "bias": ({"bias": B[:4]}, ValueError, "bias: expected [5], got [4]"),
    "bias 2d": ({"bias": W}, ValueError, "bias: expected [5], got [5, 6]"),
    "teacher": ({"teacher": T[:3]}, ValueError, "teacher: expected logits [4, 5]"),
    "pair": ({"teacher": (X, W)}, TypeError, "teacher: expected one tensor, so that"),
    "teacher's rows": ({"teacher": (X[:3], W, B)}, ValueError, "teacher: expected logits [4, 5]"),
    "teacher's dim": ({"teacher": (X, W[:, 1:], B)}, ValueError,
                      "teacher's weight: expected the dim of teacher's features"),
    "teacher's bias": ({"teacher": (X, W, X)}, ValueError, "teacher's bias: expected [5]"),
    "teacher learns": ({"teacher": T.clone().requires_grad_()}, ValueError,
                       "teacher: expected a constant"),
    "its weight learns": ({"teacher": (X, W.clone().requires_grad_(), None)}, ValueError,
                          "teacher's weight: expected a constant"),
    "integers": ({"weight": W.long()}, TypeError, "weight: expected float32"),
    "module": ({"weight": torch.nn.Linear(6, 5)}, TypeError, "weight: expected one tensor"),
    "none": ({"reduction": "none"}, ValueError, "reduction: expected mean or sum, got 'none'"),
    "chunk": ({"chunk": 0}, ValueError, "chunk: expected 1 row or more, got 0"),
    "temperature": ({"temperature": 0.0}, ValueError, "temperature: expected a number > 0"),
    "labels": ({"ce_weight": 1.0}, ValueError, "labels: expected class ids"),
    "labels' rows": ({"labels": torch.zeros(5).long()}, ValueError, "labels: expected an int64"),
    "weights": ({"row_weights": torch.zeros(5)}, ValueError, "row_weights: expected one number"),
    "smoothing": ({"label_smoothing": 2.0}, ValueError, "label_smoothing: expected 0 to 1"),
    "kd_weight": ({"kd_weight": torch.tensor(1.0)}, TypeError, "kd_weight: expected a number"),
}  # fmt: skip


@pytest.mark.parametrize(("changed", "error", "words"), BAD.values(), ids=BAD)
def test_bad_input(changed: dict[str, Any], error: type[Exception], words: str) -> None:
    arguments = {"features": X, "weight": W, "bias": B, "teacher": T} | changed
    with pytest.raises(error) as caught:
        fused_linear_kd_loss(**arguments)
    assert str(caught.value).startswith("fused_linear_kd_loss: ")
    assert words in str(caught.value)
