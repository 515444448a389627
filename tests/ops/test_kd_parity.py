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


# compat: each library's own loss, written out, or that library where it is installed


def _kl(student: Tensor, teacher: Tensor, temperature: float, reduction: str) -> Tensor:
    log_q, log_p = (F.log_softmax(x / temperature, 1) for x in (student, teacher))
    return F.kl_div(log_q, log_p, reduction=reduction, log_target=True)


def _deit(s: Tensor, t: Tensor, y: Tensor, temperature: float, alpha: float = 0.5) -> Tensor:
    """DistillationLoss, "soft": a sum over the number of logits."""
    kd = _kl(s, t, temperature, "sum") * temperature**2 / s.numel()
    return F.cross_entropy(s, y) * (1 - alpha) + kd * alpha


def _torchdistill(
    s: Tensor, t: Tensor, y: Tensor | None, temperature: float, alpha: float = 0.5,
    beta: float | None = None,
) -> Tensor:  # fmt: skip
    """KDLoss: the divergence alone without alpha or without targets."""
    soft = _kl(s, t, temperature, "batchmean")
    if alpha == 0 or y is None:
        return soft
    beta = 1 - alpha if beta is None else beta
    return alpha * F.cross_entropy(s, y) + beta * temperature**2 * soft


def _mdistiller(s: Tensor, t: Tensor, y: Tensor, temperature: float) -> Tensor:
    """KD with its default CE_WEIGHT and KD_WEIGHT."""
    kd = _kl(s, t, temperature, "none").sum(1).mean() * temperature**2
    return 0.1 * F.cross_entropy(s, y) + 0.9 * kd


def _hf(s: Tensor, t: Tensor, y: Tensor, temperature: float, lambda_param: float = 0.3) -> Tensor:
    """The Trainer of the guide on knowledge distillation for image classification."""
    soft = _kl(s, t, temperature, "batchmean") * temperature**2
    return (1.0 - lambda_param) * F.cross_entropy(s, y) + lambda_param * soft


def _timm(s: Tensor, t: Tensor, y: Tensor, temperature: float, **weights: float) -> Tensor:
    """The weights that LogitDistillationTask makes of its arguments, and its loss."""
    task = weights.get("task_loss_weight")
    kd = weights.get("distill_loss_weight", 1.0 if task is None else 1 - task)
    soft = _kl(s, t, temperature, "batchmean") * temperature**2
    return (1.0 if task is None else task) * F.cross_entropy(s, y) + kd * soft


COMPAT = {
    "deit": ("deit", _deit, {"kd_weight": 0.5}),
    "deit without labels' term": ("deit", partial(_deit, alpha=1.0), {}),
    "torchdistill": ("torchdistill", _torchdistill, {"kd_weight": 0.5}),
    "torchdistill, beta": (
        "torchdistill", partial(_torchdistill, alpha=0.3, beta=2.0),
        {"ce_weight": 0.3, "kd_weight": 2.0},
    ),
    "torchdistill, alpha 0": ("torchdistill", partial(_torchdistill, alpha=0.0), {}),
    "torchdistill, alpha 0 and beta": (
        "torchdistill", partial(_torchdistill, alpha=0.0, beta=0.7),
        {"ce_weight": 0.0, "kd_weight": 0.7},
    ),
    "mdistiller": ("mdistiller", _mdistiller, {"kd_weight": 0.9, "ce_weight": 0.1}),
    "hf": ("hf", _hf, {"kd_weight": 0.3}),
    "timm": ("timm", _timm, {}),
    "timm, distill": ("timm", partial(_timm, distill_loss_weight=0.3), {"kd_weight": 0.3}),
    "timm, task": (
        "timm", partial(_timm, task_loss_weight=0.3), {"kd_weight": 0.7, "ce_weight": 0.3},
    ),
}  # fmt: skip


@every_device
@wide_dtypes
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize(("compat", "theirs", "weights"), COMPAT.values(), ids=COMPAT)
def test_compat(
    compat: str, theirs: Callable[..., Tensor], weights: dict[str, float], temperature: float,
    dtype: torch.dtype, device: str,
) -> None:  # fmt: skip
    student, teacher = pair(12, 40, dtype=dtype, device=device)
    labels = torch.randint(40, (12,), device=device)
    ours = partial(
        kd_loss, teacher=teacher, temperature=temperature, labels=labels, compat=compat, **weights
    )
    assert_parity(student, ours, lambda s: theirs(s, teacher, labels, temperature))


@pytest.mark.parametrize("weights", [{}, {"alpha": 0.5}, {"alpha": 0.3, "beta": 2.0}], ids=str)
@pytest.mark.parametrize("labelled", [True, False])
def test_compat_with_torchdistill_itself(labelled: bool, weights: dict[str, float]) -> None:
    losses = pytest.importorskip("torchdistill.losses.mid_level")
    student, teacher = pair(12, 40)
    labels = torch.randint(40, (12,)) if labelled else None
    module = losses.KDLoss("fc", "output", "fc", "output", 4.0, **{"alpha": 0} | weights)

    def theirs(s: Tensor) -> Tensor:
        return module({"fc": {"output": s}}, {"fc": {"output": teacher}}, labels)

    alpha = weights.get("alpha", 0)
    written = partial(_torchdistill, temperature=4.0, **{"alpha": 0} | weights)
    ours = partial(
        kd_loss, teacher=teacher, temperature=4.0, labels=labels, compat="torchdistill",
        ce_weight=alpha, kd_weight=weights.get("beta", 1 - alpha),
    )  # fmt: skip
    assert_parity(student, ours, theirs)
    assert_parity(student, lambda s: written(s, teacher, labels), theirs)


@pytest.mark.parametrize(
    "weights",
    [{}, {"task_loss_weight": 0.3}, {"distill_loss_weight": 0.3},
     {"task_loss_weight": 0.2, "distill_loss_weight": 0.7}],
    ids=str,
)  # fmt: skip
def test_compat_with_timm_itself(weights: dict[str, float]) -> None:
    """In what it makes of its weights, and in its loss: without BatchNorm both see one output."""
    timm = pytest.importorskip("timm")
    task = pytest.importorskip("timm.task")
    student = timm.create_model("test_vit", num_classes=10, img_size=32)
    teacher = timm.create_model("test_vit", num_classes=10, img_size=32)
    task = task.LogitDistillationTask(
        student, teacher, nn.CrossEntropyLoss(), temperature=4.0, verbose=False, **weights
    )
    images, labels = draw(4, 3, 32, 32), torch.randint(10, (4,))
    logits = draw(4, 10)
    task.teacher.forward = lambda *_, **__: logits.clone()
    theirs = task(images, labels)
    (grad,) = torch.autograd.grad(theirs["loss"], theirs["output"])
    loss, our_grad = loss_and_grad(
        theirs["output"], logits, temperature=4.0, labels=labels, compat="timm",
        **{"kd_weight": task.distill_loss_weight} | (
            {"ce_weight": task.task_loss_weight} if "task_loss_weight" in weights else {}
        ),
    )  # fmt: skip
    assert_close(loss, theirs["loss"].detach())
    assert_close(our_grad, grad)
    assert_close(_timm(theirs["output"], logits, labels, 4.0, **weights), theirs["loss"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"compat": "keras"}, "compat: expected None, timm, deit, torchdistill, mdistiller or hf"),
        ({"compat": "deit", "temperature": torch.tensor(2.0)}, "temperature: expected a number"),
        ({"compat": "timm", "reduction": "sum"}, "reduction: expected 'mean'"),
        ({"compat": "hf", "row_weights": torch.ones(4)}, "row_weights: expected None"),
        ({"compat": "timm", "class_dim": 0}, "student: expected [batch, classes]"),
        ({"compat": "torchdistill", "temperature": 0.0}, "temperature: expected a number > 0"),
        ({"compat": "hf", "kd_weight": 0.5, "labels": None}, "labels: expected"),
    ],
    ids=str,
)
def test_compat_without_meaning(options: dict[str, object], words: str) -> None:
    student, teacher = pair(4, 4)
    with pytest.raises(ValueError, match="kd_loss: ") as caught:
        kd_loss(student, teacher, **{"labels": torch.zeros(4).long()} | options)
    assert words in str(caught.value)


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
