"""deit_hard_loss beside DeiT's formula: one head and two, mixup, smoothing, ties, passes."""

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
from support.kd_tools import BFLOAT, DOUBLE, FLOAT, HALF, draw, every_device, loss_and_grad, pair
from vitkd_fast import reference
from vitkd_fast.functional import deit_hard_loss
from vitkd_fast.nn import DistillationHead

pytestmark = pytest.mark.usefixtures("one_thread")


class Calls(TorchDispatchMode):
    """The package's own operations that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "vitkd_fast":
            self.names.append(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


def both(
    heads: list[Tensor], teacher: Tensor, labels: Any, **options: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Ours and, in float64, the reference's: the loss, and the gradient of each head."""
    results = []
    for wide in (False, True):
        leaves = [(x.double() if wide else x.detach()).requires_grad_() for x in heads]
        if wide:
            rows = reference.deit_hard_loss(
                leaves[0], leaves[-1], teacher.double(), labels, **options
            )
            loss = rows.mean()
        else:
            loss = deit_hard_loss(
                tuple(leaves) if len(leaves) == 2 else leaves[0], teacher, labels, **options
            )
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    return results[0], results[1]


@every_device
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("dtype", [FLOAT, HALF, BFLOAT, DOUBLE], ids=str)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_matches_the_reference(
    smoothing: float, alpha: float, dtype: torch.dtype, heads: int, device: str
) -> None:
    logits = [draw(9, 13, dtype=dtype, device=device) for _ in range(heads)]
    teacher = draw(9, 13, dtype=dtype, device=device)
    labels = torch.randint(13, (9,), device=device)
    given_, want = both(logits, teacher, labels, alpha=alpha, label_smoothing=smoothing)
    for x, y in zip(given_, want, strict=True):
        assert_near(x, y, 32)


@every_device
def test_one_head_is_one_pass(device: str) -> None:
    student, teacher = pair(6, 10, device=device)
    for heads, passes in ((student, 1), ((student, student.clone()), 2)):
        leaves = [x.requires_grad_() for x in (heads if isinstance(heads, tuple) else (heads,))]
        with Calls() as calls:
            deit_hard_loss(
                tuple(leaves) if len(leaves) == 2 else leaves[0], teacher, torch.arange(6),
                label_smoothing=0.1,
            ).backward()  # fmt: skip
        assert [x for x in calls.names if x != "kd_scale_"] == ["kd_fwd_grad"] * passes


@every_device
@pytest.mark.parametrize("heads", [1, 2])
def test_mixed_labels(heads: int, device: str) -> None:
    """lam CE(a) + (1 - lam) CE(b) of the first head; the teacher's choice of the other."""
    a, b = torch.randint(10, (2, 6), device=device)
    logits = [draw(6, 10, device=device) for _ in range(heads)]
    teacher = draw(6, 10, device=device)
    student = tuple(logits) if heads == 2 else logits[0]
    loss = deit_hard_loss(student, teacher, (a, b, 0.3), label_smoothing=0.1)
    want = [
        reference.deit_hard_loss(logits[0], logits[-1], teacher, ids, label_smoothing=0.1).mean()
        for ids in (a, b)
    ]
    assert_close(loss, 0.3 * want[0] + 0.7 * want[1])


@every_device
def test_of_equal_logits_the_first_class_is_chosen(device: str) -> None:
    teacher = torch.tensor([[1.0, 3, 3, 3], [2.0, 2, 2, 2], [-torch.inf, 0, 0, -5]], device=device)
    student, labels = draw(3, 4, device=device), torch.tensor([3, 3, 3], device=device)
    given_ = deit_hard_loss(student, teacher, labels, alpha=1.0)
    assert_close(given_, F.cross_entropy(student, torch.tensor([1, 0, 1], device=device)))


@every_device
@pytest.mark.parametrize("two", [False, True])
def test_ignored_rows_count_in_neither_term(two: bool, device: str) -> None:
    student, teacher = pair(6, 10, device=device)
    other, labels = draw(6, 10, device=device), torch.arange(6, device=device)
    labels[1::2] = -1

    def loss(keep: Any, **options: Any) -> Tensor:
        heads = (student[keep], other[keep]) if two else student[keep]
        return deit_hard_loss(heads, teacher[keep], labels[keep], **options)

    everything = slice(None)
    assert_close(loss(everything, ignore_index=-1), loss(slice(0, None, 2)))
    rows = loss(everything, ignore_index=-1, reduction="none")
    assert ((rows == 0) == (labels == -1)).all()
    assert_close(rows.sum(), loss(everything, ignore_index=-1, reduction="sum"))


@given(shift=st.floats(-50, 50), seed=st.integers(0, 99), alpha=st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_shifts_and_orders_of_classes_do_not_show(shift: float, seed: int, alpha: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 5, 7, generator=generator, dtype=DOUBLE).unbind(0)
    labels, order = torch.arange(5), torch.randperm(7, generator=generator)
    want = deit_hard_loss(student, teacher, labels, alpha=alpha)
    assert_close(deit_hard_loss(student + shift, teacher - shift, labels, alpha=alpha), want)
    moved = order.argsort()[labels]
    given_ = deit_hard_loss(student[:, order], teacher[:, order], moved, alpha=alpha)
    assert_close(given_, want)


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"alpha": 1.5}, ValueError, "alpha: expected 0 to 1, got 1.5"),
        ({"alpha": torch.tensor(0.5)}, TypeError, "alpha: expected a number"),
        ({"labels": None}, ValueError, "labels: expected an int64"),
        ({"labels": torch.zeros(5).long()}, ValueError, "labels: expected an int64"),
        ({"teacher": torch.zeros(4, 9)}, ValueError, "teacher: expected the classes of student"),
        ({"student": (torch.zeros(4, 10), torch.zeros(4, 9))}, ValueError, "teacher: expected"),
        ({"student": (torch.zeros(4, 10),) * 3}, TypeError, "student: expected one tensor"),
        ({"teacher": torch.zeros(4, 10).requires_grad_()}, ValueError, "expected a constant"),
        ({"reduction": "batch"}, ValueError, "reduction: expected mean, sum or none"),
        ({"label_smoothing": -1.0}, ValueError, "label_smoothing: expected 0 to 1"),
    ],
    ids=str,
)
def test_bad_input(changed: dict[str, Any], error: type[Exception], words: str) -> None:
    x = torch.zeros(4, 10)
    with pytest.raises(error) as caught:
        deit_hard_loss(**{"student": x, "teacher": x, "labels": torch.arange(4)} | changed)
    assert str(caught.value).startswith("deit_hard_loss: ")
    assert words in str(caught.value)


# the head


def test_two_heads_have_the_classifier_as_their_mean() -> None:
    """And learn as two linear layers of their own do, at twice their learning rate."""
    torch.manual_seed(0)
    classifier, head = torch.nn.Linear(5, 10).double(), DistillationHead(5, 10).double()
    pooled, teacher, labels = draw(8, 5, dtype=DOUBLE), draw(8, 10, dtype=DOUBLE), torch.arange(8)
    pair_ = [torch.nn.Linear(5, 10).double() for _ in range(2)]
    for layer in pair_:
        layer.load_state_dict(classifier.state_dict())
    ours = torch.optim.SGD([*classifier.parameters(), *head.parameters()], 0.1)
    theirs = torch.optim.SGD([p for layer in pair_ for p in layer.parameters()], 0.2)
    for _ in range(5):
        heads = head(pooled, classifier(pooled))
        want = tuple(layer(pooled) for layer in pair_)
        for x, y in zip(heads, want, strict=True):
            assert_close(x, y)
        assert_close(classifier(pooled), (want[0] + want[1]) / 2)
        for optimizer, logits in ((ours, heads), (theirs, want)):
            optimizer.zero_grad()
            deit_hard_loss(logits, teacher, labels).backward()
            optimizer.step()
    assert (heads[0] - heads[1]).abs().max() > 0.1


def test_head_of_other_classes_is_an_error() -> None:
    head = DistillationHead(5, 10)
    with pytest.raises(ValueError, match=r"DistillationHead: logits: expected \[2, 10\], got"):
        head(torch.zeros(2, 5), torch.zeros(2, 9))
    with pytest.raises(TypeError, match="DistillationHead: logits: expected one tensor"):
        head(torch.zeros(2, 5), [torch.zeros(2, 10)])


def test_autocast_changes_nothing() -> None:
    student, teacher = pair(6, 10, dtype=BFLOAT)

    def loss(x: Tensor, t: Tensor) -> Tensor:
        return deit_hard_loss(x, t, torch.arange(6))

    want = loss_and_grad(student, teacher, loss)
    with torch.autocast("cpu", BFLOAT):
        found = loss_and_grad(student, teacher, loss)
    assert torch.equal(found[0], want[0])
    assert torch.equal(found[1], want[1])
