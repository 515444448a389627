"""ofa_loss beside OFA-KD's formula: branches, powers, mixup, ignored rows; and OFABranches."""

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from support.feature_tools import assert_near
from support.kd_tools import BFLOAT, DOUBLE, FLOAT, HALF, draw, every_device
from vitkd_fast import reference
from vitkd_fast.functional import kd_loss, ofa_loss
from vitkd_fast.nn import OFABranches

pytestmark = pytest.mark.usefixtures("one_thread")


def results(students: list[Tensor], *rest: Any, **options: Any) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in students]
    loss = ofa_loss(leaves, *rest, **options)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]


def wanted(
    students: list[Tensor], teacher: Tensor, labels: Tensor, temperature: float, eps: float
) -> list[Tensor]:
    """The reference's in float64."""
    leaves = [x.detach().double().requires_grad_() for x in students]
    rows = [reference.ofa_loss(x, teacher.double(), labels, temperature, eps) for x in leaves]
    loss = torch.stack(rows).sum(0).mean()
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@every_device
@pytest.mark.parametrize("branches", [1, 5])
@pytest.mark.parametrize("dtype", [FLOAT, HALF, BFLOAT, DOUBLE], ids=str)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("eps", [0.5, 1.0, 1.5, 3.0])
def test_matches_the_reference(
    eps: float, temperature: float, dtype: torch.dtype, branches: int, device: str
) -> None:
    students = [draw(9, 13, dtype=dtype, device=device) for _ in range(branches)]
    teacher, labels = draw(9, 13, dtype=dtype, device=device), torch.arange(9, device=device)
    found = results(students, teacher, labels, temperature=temperature, eps=eps)
    for x, y in zip(found, wanted(students, teacher, labels, temperature, eps), strict=True):
        assert_near(x, y, 64)


@every_device
def test_one_student_needs_no_list(device: str) -> None:
    student, teacher = draw(6, 10, device=device), draw(6, 10, device=device)
    labels = torch.arange(6, device=device)
    alone = ofa_loss(student, teacher, labels, eps=1.5)
    assert torch.equal(alone, ofa_loss([student], teacher, labels, eps=1.5))
    assert_close(ofa_loss((student, student), teacher, labels, eps=1.5), 2 * alone)


@every_device
@pytest.mark.parametrize("eps", [1.0, 1.5])
@pytest.mark.parametrize("per_row", [False, True])
def test_mixed_labels(per_row: bool, eps: float, device: str) -> None:
    """lam of the loss of one label and 1 - lam of the other's; some rows have the same twice."""
    students = [draw(6, 10, device=device) for _ in range(2)]
    teacher, a = draw(6, 10, device=device), torch.arange(6, device=device)
    b = a.flip(0)
    b[0] = a[0]
    lam: Any = torch.rand(6, device=device) if per_row else 0.3
    found = results(students, teacher, (a, b, lam), eps=eps, reduction="none")
    rows = [ofa_loss(students, teacher, ids, eps=eps, reduction="none") for ids in (a, b)]
    assert_close(found[0], lam * rows[0] + (1 - lam) * rows[1])
    grads = [results(students, teacher, ids, eps=eps, reduction="none")[1:] for ids in (a, b)]
    of_row = lam.unsqueeze(1) if per_row else lam
    for x, y, z in zip(found[1:], *grads, strict=True):
        assert_close(x, of_row * y + (1 - of_row) * z)


@every_device
def test_ignored_rows(device: str) -> None:
    """Are not looked at, whatever they hold."""
    students, teacher = [draw(6, 10, device=device)] * 2, draw(6, 10, device=device)
    labels = torch.arange(6, device=device)
    labels[::2] = -7
    teacher[::2] = torch.nan
    options = {"ignore_index": -7, "eps": 1.5}
    found = results(students, teacher, labels, **options)
    want = results([x[1::2] for x in students], teacher[1::2], labels[1::2], **options)
    assert_close(found[0], want[0])
    for x, y in zip(found[1:], want[1:], strict=True):
        assert (x[::2] == 0).all()
        assert_close(x[1::2], y)
    rows = ofa_loss(students, teacher, labels, reduction="none", **options)
    assert (rows[::2] == 0).all()
    assert_close(rows.sum(), ofa_loss(students, teacher, labels, reduction="sum", **options))
    assert ofa_loss(students, teacher, torch.full_like(labels, -7), **options) == 0


@every_device
@pytest.mark.parametrize("eps", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("scale", [100.0, 1e4])
def test_extreme_logits(scale: float, eps: float, device: str) -> None:
    """Where all of the teacher's probabilities but one are 0, and some are masked."""
    students = [draw(9, 13, device=device, scale=scale)]
    teacher, labels = draw(9, 13, device=device, scale=scale), torch.arange(9, device=device)
    teacher[:, 3] = -torch.inf
    found = results(students, teacher, labels, eps=eps)
    for x, y in zip(found, wanted(students, teacher, labels, 1.0, eps), strict=True):
        assert x.isfinite().all()
        assert_near(x, y, 64)


@given(seed=st.integers(0, 99), shift=st.floats(-20, 20), eps=st.floats(0.3, 3))
@settings(max_examples=30, deadline=None)
def test_what_does_not_show(seed: int, shift: float, eps: float) -> None:
    """A shift of logits, an order of classes; at eps 1 it is KL and the teacher's entropy."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 5, 7, generator=generator, dtype=DOUBLE).unbind(0)
    labels, order = torch.arange(5), torch.randperm(7, generator=generator)
    want = ofa_loss(student, teacher, labels, eps=eps)
    assert_close(ofa_loss(student + shift, teacher - shift, labels, eps=eps), want)
    moved = order.argsort()[labels]
    assert_close(ofa_loss(student[:, order], teacher[:, order], moved, eps=eps), want)
    of_teacher = torch.special.entr(teacher.softmax(1)).sum(1).mean()
    plain = ofa_loss(student, teacher, labels)
    assert_close(plain, kd_loss(student, teacher) + of_teacher)
    assert_close(ofa_loss(student, teacher, (labels + 1) % 7), plain)  # the labels have no part


X = torch.zeros(4, 10)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"eps": 0.0}, ValueError, "eps: expected a number > 0, got 0.0"),
    ({"eps": torch.ones(())}, TypeError, "eps: expected a number"),
    ({"temperature": -1.0}, ValueError, "temperature: expected a number > 0"),
    ({"temperature": torch.ones(())}, TypeError, "temperature: expected a number"),
    ({"labels": None}, ValueError, "labels: expected an int64"),
    ({"labels": torch.zeros(4, 10)}, ValueError, "labels: expected an int64"),
    ({"student": []}, TypeError, "student: expected one tensor, so that"),
    ({"student": [X, X[:3]]}, ValueError, "teacher: expected the shape of student [3, 10]"),
    ({"student": X[None], "teacher": X[None], "labels": torch.zeros(1, 4).long()}, ValueError,
     "student: expected [batch, classes], got [1, 4, 10]"),
    ({"teacher": X.clone().requires_grad_()}, ValueError, "teacher: expected a constant"),
    ({"reduction": "batch"}, ValueError, "reduction: expected mean, sum or none"),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "error", "words"), BAD, ids=str)
def test_bad_input(changed: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        ofa_loss(**{"student": X, "teacher": X, "labels": torch.arange(4)} | changed)
    assert str(caught.value).startswith("ofa_loss: ")
    assert words in str(caught.value)


# the branches


@pytest.mark.parametrize(
    "name",
    ["mobilenetv1_100", "mobilenetv2_035", "mobilenetv3_small_050", "mobilenetv4_conv_small"],
)
def test_branches_of_mobilenets(name: str) -> None:
    """Of timm's features: each gives logits, and what it learns reaches the network."""
    body = timm.create_model(name, features_only=True, out_indices=(1, 2, 3, 4)).eval()
    assert body.feature_info.reduction() == [4, 8, 16, 32]
    branches = OFABranches(body.feature_info.channels(), 7, 48)
    images = torch.randn(2, 3, 64, 64)
    logits = branches(body(images))
    assert [list(x.shape) for x in logits] == [[2, 7]] * 4
    ofa_loss(logits, torch.randn(2, 7), torch.tensor([0, 5]), eps=1.5).backward()
    grads = [x.grad for x in (*body.parameters(), *branches.parameters())]
    assert all(x is not None and x.isfinite().all() for x in grads)
    assert all(x.grad.abs().sum() > 0 for x in branches.parameters() if x.dim() == 2)


def test_a_branch_is_its_formula() -> None:
    """Of the last stage but one: two separable convolutions, a mean, a linear layer."""
    branches = OFABranches([4, 6], 5, 8).eval()
    first, last = branches.branches
    maps = torch.randn(3, 4, 10, 10), torch.randn(3, 6, 5, 5)
    x = maps[0]
    for i, stride in ((0, 2), (4, 1)):
        depthwise, pointwise, norm = first[i : i + 3]
        assert depthwise.weight.shape == (4, 1, 3, 3)
        x = F.conv2d(x, depthwise.weight, stride=stride, padding=1, groups=4)
        x = F.conv2d(x, pointwise.weight) / (1 + norm.eps) ** 0.5
        x = x.relu()
    assert x.shape == (3, 8, 5, 5)
    want = [F.linear(x.mean((2, 3)), first[-1].weight, first[-1].bias)]
    y = F.conv2d(maps[1], last[0].weight, last[0].bias)
    want.append(F.linear(y.mean((2, 3)), last[-1].weight, last[-1].bias))
    for given_, wanted_ in zip(branches(maps), want, strict=True):
        assert_close(given_, wanted_)
    with pytest.raises(ValueError, match="OFABranches: maps: expected 2, got 1"):
        branches(maps[:1])
