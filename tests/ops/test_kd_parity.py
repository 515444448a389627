"""kd_loss beside the functions that it stands in for, torch's and timm's."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from support.kd_tools import (
    DOUBLE,
    FLOAT,
    Rows,
    draw,
    every_device,
    every_reduction,
    loss_and_grad,
    pair,
    temperatures,
)
from vitkd_fast.functional import kd_loss

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_parity(
    student: Tensor, ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor]
) -> None:
    """By torch's own tolerances for the dtype."""
    results = []
    for function in (ours, theirs):
        leaf = student.detach().requires_grad_()
        loss = function(leaf)
        results.append((loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]))
    assert_close(results[0][0], results[1][0])
    assert_close(results[0][1], results[1][1])


wide_dtypes = pytest.mark.parametrize("dtype", [FLOAT, DOUBLE], ids=str)


@every_device
@wide_dtypes
@temperatures
def test_parity_with_kl_div(temperature: float, dtype: torch.dtype, device: str) -> None:
    student, teacher = pair(12, 40, dtype=dtype, device=device)

    def theirs(student: Tensor) -> Tensor:
        log_q, log_p = (F.log_softmax(x / temperature, -1) for x in (student, teacher))
        loss = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        return loss * temperature**2

    assert_parity(student, lambda s: kd_loss(s, teacher, temperature=temperature), theirs)


@every_device
@wide_dtypes
@every_reduction
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("ignore_index", [-100, 255, 3])
@pytest.mark.parametrize("shape", [(12, 10), (10,), (2, 10, 3, 4), (2, 10, 5)], ids=str)
def test_parity_with_cross_entropy(
    shape: tuple[int, ...], ignore_index: int, smoothing: float, reduction: str,
    dtype: torch.dtype, device: str,
) -> None:  # fmt: skip
    """Its mean is over the rows that are not ignored. Dense logits have their classes in dim 1."""
    student, teacher = pair(*shape, dtype=dtype, device=device)
    class_dim = 1 if len(shape) > 1 else 0
    rows = Rows([n for i, n in enumerate(shape) if i != class_dim], 10, device)
    labels = rows.labels(ignore_index if len(shape) > 1 else None)
    same = {"ignore_index": ignore_index, "label_smoothing": smoothing, "reduction": reduction}
    assert_parity(
        student,
        lambda s: kd_loss(
            s, teacher, kd_weight=0.0, ce_weight=1.0, labels=labels, class_dim=class_dim, **same
        ),
        lambda s: F.cross_entropy(s, labels, **same),
    )


@every_device
@wide_dtypes
@every_reduction
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_parity_with_mixup(
    smoothing: float, reduction: str, dtype: torch.dtype, device: str
) -> None:
    """lam CE(a) + (1 - lam) CE(b), and cross-entropy on the dense target that is never made."""
    student, teacher = pair(12, 10, dtype=dtype, device=device)
    a, b = torch.randint(10, (2, 12), device=device)
    lam = 0.3
    dense = lam * F.one_hot(a, 10) + (1 - lam) * F.one_hot(b, 10)
    same = {"label_smoothing": smoothing, "reduction": reduction}
    ours = partial(
        kd_loss, teacher=teacher, kd_weight=0.0, ce_weight=1.0, labels=(a, b, lam), **same
    )
    entropy = partial(F.cross_entropy, **same)
    assert_parity(student, ours, lambda s: lam * entropy(s, a) + (1 - lam) * entropy(s, b))
    assert_parity(student, ours, lambda s: entropy(s, dense.to(dtype)))


@every_device
@wide_dtypes
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_parity_with_timm(temperature: float, dtype: torch.dtype, device: str) -> None:
    """LogitDistillationTask, from a vision transformer to a convolutional student."""
    timm = pytest.importorskip("timm")
    task = pytest.importorskip("timm.task")
    like = {"device": device, "dtype": dtype}
    student = timm.create_model("test_efficientnet", num_classes=10)
    teacher = timm.create_model("test_vit", num_classes=10, img_size=32)
    task = task.LogitDistillationTask(
        student.to(**like), teacher.to(**like), nn.CrossEntropyLoss(label_smoothing=0.1),
        distill_loss_weight=0.7, task_loss_weight=0.3, temperature=temperature, verbose=False,
        device=torch.device(device), dtype=dtype,
    )  # fmt: skip
    task.train()
    images = draw(4, 3, 32, 32, scale=1.0, **like)
    labels = torch.randint(10, (4,), device=device)
    with torch.inference_mode():
        seen = task.teacher.normalize_input(images, task.student_mean, task.student_std)
        logits = 20 * task.teacher(seen)
    task.teacher.forward = lambda *_, **__: logits.clone()  # untrained, it knows no extremes
    theirs = task(images, labels)
    (grad,) = torch.autograd.grad(theirs["loss"], theirs["output"])
    loss, our_grad = loss_and_grad(
        theirs["output"], logits, temperature=temperature, kd_weight=0.7, ce_weight=0.3,
        labels=labels, label_smoothing=0.1,
    )  # fmt: skip
    assert theirs["kd_loss"] > 0.01
    assert_close(loss, theirs["loss"].detach())
    assert_close(our_grad, grad)


@every_device
def test_row_weights_are_shares_of_the_mean(device: str) -> None:
    student, teacher = pair(6, 40, device=device)
    rows = kd_loss(student, teacher, reduction="none")
    mask = torch.tensor([1.0, 0, 1, 1, 0, 0], device=device)
    masked = partial(kd_loss, student, teacher, row_weights=mask)
    assert_close(masked(), rows[mask > 0].mean())
    assert_close(masked(reduction="sum"), rows[mask > 0].sum())
    assert_close(masked(reduction="none"), rows * mask)
    assert_close(kd_loss(student, teacher, row_weights=7 * torch.ones_like(mask)), rows.mean())


@every_device
def test_a_row_is_ignored_for_any_of_its_labels(device: str) -> None:
    """In both terms and in the mean, also where no cross-entropy is asked for."""
    student, teacher = pair(4, 40, device=device)
    a = torch.tensor([-100, 1, 2, 3], device=device)
    b = torch.tensor([4, -100, 5, 6], device=device)
    for ce_weight in (0.0, 0.5):
        options = {"ce_weight": ce_weight, "temperature": 4.0}
        given = kd_loss(student, teacher, labels=(a, b, 0.3), **options)
        left = kd_loss(student[2:], teacher[2:], labels=(a[2:], b[2:], 0.3), **options)
        assert_close(given, left)
        rows = kd_loss(student, teacher, labels=(a, b, 0.3), reduction="none", **options)
        assert (rows == 0).tolist() == [True, True, False, False]
