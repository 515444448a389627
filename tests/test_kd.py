"""kd_loss and the operations under it: values, gradients, autograd, compilers, parity and errors.

Values are compared with the reference in float64 on the same rounded inputs. What is allowed there
comes from torch's own functions in float32 (see `check`); it is never tuned.
Tests whose names hold "match" or "extreme" also run once per instruction set of the host, and on
the reference backend.
"""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from vitkd_fast import _ops, int8, reference
from vitkd_fast.functional import kd_loss
from vitkd_fast.nn import KDLoss

from .cuda_tools import GPU, captured, needs_gpu_or_emulator

ROOT = Path(__file__).parents[1]
OPS = torch.ops.vitkd_fast
REDUCTIONS = {"mean": reference.MEAN, "sum": reference.SUM, "none": reference.NONE}
INF, NAN = torch.inf, torch.nan
HALF, BFLOAT, FLOAT, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64

every_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
)
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two would wait for each other on a busy machine; test_bitwise_the_same has more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draw(
    *shape: int, dtype: torch.dtype = FLOAT, device: str = "cpu", scale: float = 2.0
) -> Tensor:
    return (scale * torch.randn(shape, dtype=DOUBLE)).to(device, dtype)


def pair(
    *shape: int, dtype: torch.dtype = FLOAT, teacher: torch.dtype | None = None, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Student and teacher logits."""
    return (
        draw(*shape, dtype=dtype, device=device),
        draw(*shape, dtype=teacher or dtype, device=device, scale=3.0),
    )


def is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


def per_row(x: Tensor, class_dim: int) -> Tensor:
    """[*rows] beside the logits; a 0-dim tensor stays as it is."""
    return x.unsqueeze(class_dim) if x.dim() else x


# options of a call, each drawn for the rows of a shape


class Rows(NamedTuple):
    shape: list[int]
    classes: int
    device: str

    def labels(self, ignore: int | None = None) -> Tensor:
        """Class ids; every third row is ignored where an index for that is given."""
        ids = torch.randint(self.classes, self.shape)
        if ignore is not None:
            ids.view(-1)[::3] = ignore
        return ids.to(self.device)

    def numbers(self, low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(self.shape)).to(self.device)

    def weights(self) -> Tensor:
        """Row weights, every fourth 0."""
        x = self.numbers(0.1, 2.0)
        x.view(-1)[1::4] = 0
        return x

    def number(self, value: float) -> Tensor:
        return torch.tensor(value, device=self.device)


OPTIONS: dict[str, Callable[[Rows], dict[str, Any]]] = {
    "plain": lambda r: {},
    "T_0.1": lambda r: {"temperature": 0.1},
    "T_4": lambda r: {"temperature": 4.0},
    "T_20": lambda r: {"temperature": 20.0},
    "T_tensor": lambda r: {"temperature": r.number(4.0)},
    "T_per_row": lambda r: {"temperature": r.numbers(0.5, 20.0)},
    "kd_weight": lambda r: {"kd_weight": 0.3, "temperature": 2.0},
    "labels": lambda r: {"labels": r.labels(), "ce_weight": 0.5, "temperature": 4.0},
    "labels_at_T_1": lambda r: {"labels": r.labels(), "ce_weight": 0.5},
    "labels_only": lambda r: {"labels": r.labels(), "ce_weight": 1.0, "kd_weight": 0.0},
    "smoothing": lambda r: {
        "labels": r.labels(), "ce_weight": 0.5, "label_smoothing": 0.1, "temperature": 3.0,
    },
    "all_smoothing": lambda r: {"labels": r.labels(), "ce_weight": 0.5, "label_smoothing": 1.0},
    "ignored": lambda r: {"labels": r.labels(-100), "ce_weight": 0.5, "temperature": 4.0},
    "ignored_class": lambda r: {"labels": r.labels(0), "ce_weight": 0.5, "ignore_index": 0},
    "ignored_without_ce": lambda r: {"labels": r.labels(-1), "ignore_index": -1},
    "mixup": lambda r: {"labels": (r.labels(), r.labels(), 0.3), "ce_weight": 0.5},
    "mixup_all_a": lambda r: {"labels": (r.labels(), r.labels(), 1.0), "ce_weight": 0.5},
    "mixup_all_b": lambda r: {"labels": (r.labels(), r.labels(), 0.0), "ce_weight": 0.5},
    "mixup_tensor": lambda r: {
        "labels": (r.labels(), r.labels(), r.number(0.7)), "ce_weight": 0.5, "temperature": 4.0,
    },
    "mixup_per_row": lambda r: {
        "labels": (r.labels(), r.labels(), r.numbers(0.0, 1.0)), "ce_weight": 0.5,
        "label_smoothing": 0.1,
    },
    "row_weights": lambda r: {"row_weights": r.weights(), "temperature": 4.0},
    "everything": lambda r: {
        "temperature": r.numbers(0.5, 20.0), "kd_weight": 0.7, "ce_weight": 0.3,
        "labels": (r.labels(), r.labels(-7), r.numbers(0.0, 1.0)), "label_smoothing": 0.2,
        "ignore_index": -7, "row_weights": r.weights(),
    },
}  # fmt: skip
MAIN_OPTIONS = ["plain", "labels", "everything"]


def options_for(name: str, logits: Tensor, class_dim: int = -1) -> dict[str, Any]:
    shape = list(logits.shape)
    classes = shape.pop(class_dim)
    return OPTIONS[name](Rows(shape, classes, str(logits.device))) | {"class_dim": class_dim}


# what a result is compared with


def operation_options(
    logits: Tensor, *, temperature: float | Tensor = 1.0, labels: Any = None,
    kd_weight: float = 1.0, ce_weight: float = 0.0, label_smoothing: float = 0.0,
    ignore_index: int = -100, row_weights: Tensor | None = None, class_dim: int = -1,
    reduction: str = "mean",
) -> tuple[Any, ...]:  # fmt: skip
    """kd_loss's options as the operations take them, written apart from functional/."""
    wide = DOUBLE if logits.dtype == DOUBLE else FLOAT
    labels, labels_b, lam = labels if isinstance(labels, tuple) else (labels, None, 1.0)
    return (
        1.0 if is_tensor(temperature) else temperature,
        kd_weight,
        class_dim % logits.dim(),
        REDUCTIONS[reduction],
        labels,
        labels_b,
        lam.to(wide) if is_tensor(lam) else None,
        temperature.to(wide) if is_tensor(temperature) else None,
        None if row_weights is None else row_weights.to(wide),
        1.0 if is_tensor(lam) else lam,
        ce_weight,
        label_smoothing,
        ignore_index,
    )


def torch_rows(
    student: Tensor, teacher: Tensor, *, temperature: float | Tensor = 1.0, labels: Any = None,
    kd_weight: float = 1.0, ce_weight: float = 0.0, label_smoothing: float = 0.0,
    ignore_index: int = -100, class_dim: int = -1, **_: Any,
) -> Tensor:  # fmt: skip
    """Each row's loss by torch's own functions, in the logits' dtype."""
    divisor = per_row(temperature, class_dim) if is_tensor(temperature) else temperature
    log_q, log_p = (F.log_softmax(x / divisor, class_dim) for x in (student, teacher))
    rows = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(class_dim)
    rows = kd_weight * temperature**2 * rows
    if ce_weight != 0:
        a, b, lam = labels if isinstance(labels, tuple) else (labels, labels, 1.0)
        entropy = partial(
            F.cross_entropy,
            student.movedim(class_dim, 1) if student.dim() > 1 else student,
            reduction="none",
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        )
        rows = rows + ce_weight * (lam * entropy(a) + (1 - lam) * entropy(b))
    return rows


class Error(NamedTuple):
    loss: float  # of a row's loss, on max(1, |loss|)
    grad: float  # of a row's gradient, absolute


def torch_error(student: Tensor, teacher: Tensor, options: dict[str, Any]) -> Error:
    """torch's own error in float32, the largest of many draws: one alone may be rounded luckily.

    The draws are the logits at hand, scaled by 1 to 1.1. Of a row's probabilities, which are
    1/classes in the mean, at least one rounding counts.
    """
    class_dim = options["class_dim"] % student.dim() - student.dim()
    rows = list(student.shape)
    classes = rows.pop(class_dim)
    few = min(96 * classes, 2_000_000)  # numbers that 96 rows have
    draws = min(1024, max(1, few // student.numel(), 50_000 // student.numel()))
    scales = torch.linspace(1, 1.1, draws, device=student.device)
    scales = scales.view(-1, *[1] * student.dim())
    logits = [scales * x.detach().float() for x in (student, teacher)]
    labels, temperature = options.get("labels"), options.get("temperature")

    def repeated(x: Any) -> Any:
        return x.expand(draws, *rows) if is_tensor(x) else x

    options = options | {"class_dim": class_dim}
    if labels is not None:
        options["labels"] = (
            tuple(map(repeated, labels)) if isinstance(labels, tuple) else repeated(labels)
        )
    if temperature is not None:
        options["temperature"] = repeated(temperature)
    results = []
    for dtype in (FLOAT, DOUBLE):
        s, t = (x.to(dtype) for x in logits)
        s.requires_grad_()
        loss = torch_rows(s, t, **options)
        results.append((loss.detach().double(), torch.autograd.grad(loss.sum(), s)[0].double()))
    (loss, grad), (want_loss, want_grad) = results
    error = (loss - want_loss).abs() / want_loss.abs().clamp(min=1)
    rounding = torch.finfo(FLOAT).eps / 2 / classes
    return Error(error.max().item(), max(rounding, (grad - want_grad).abs().max().item()))


def assert_within(allowed: Tensor, given: Tensor, want: Tensor, what: str) -> None:
    error = (given.double() - want).abs()
    off = ~((error <= allowed) | (given == want))  # equal: infinities too
    assert not off.any(), (
        f"{what}: {off.sum()} of {off.numel()} are off, by up to {(error / allowed)[off].max():.3g}"
        f" times what is allowed: {given[off][:3].tolist()}, not {want[off][:3].tolist()}"
    )


def check(
    student: Tensor, teacher: Tensor, *, function: Callable[..., Tensor] = kd_loss,
    reductions: Iterable[str] = REDUCTIONS, grad_loss: float | None = None, roundings: int = 1,
    like: tuple[Tensor, Tensor] | None = None, **options: Any,
) -> None:  # fmt: skip
    """The error against float64 is at most twice torch's in float32, and one rounding.

    Float32 also for float16 and bfloat16, in which torch's own errors are far larger: all
    arithmetic is float32. For float64, torch's error is scaled by the ratio of the precisions.
    Losses are measured on max(1, |loss|) of each row; a row's gradient on the row's factor in it.

    Args:
        grad_loss: the incoming gradient; 1, and random numbers for "none".
        roundings: of the gradient to the student's dtype.
        like: logits on which torch's error is taken, where the ones at hand give it NaN.
    """
    options.setdefault("class_dim", -1)
    wide = DOUBLE if DOUBLE in (student.dtype, teacher.dtype) else FLOAT
    precision = torch.finfo(wide).eps
    # of float64, what is compared with has an error of its own
    scale = (3 if wide == DOUBLE else 2) * precision / torch.finfo(FLOAT).eps
    of_torch = Error(*(scale * x for x in torch_error(*(like or (student, teacher)), options)))
    s, t = student.detach().double(), teacher.detach().double()
    for reduction in reductions:
        leaf = student.detach().requires_grad_()
        loss = function(leaf, teacher, reduction=reduction, **options)
        incoming = torch.full_like(loss, 1.0 if grad_loss is None else grad_loss)
        if reduction == "none" and grad_loss is None:
            incoming = draw(*loss.shape, dtype=loss.dtype, device=str(loss.device))
        (grad,) = torch.autograd.grad(loss, leaf, incoming)

        arguments = operation_options(s, reduction=reduction, **options)
        want, stats = reference.kd_fwd(s, t, *arguments)
        share = stats[5].view(s.movedim(options["class_dim"], -1).shape[:-1])
        assert (loss.dtype, loss.shape, loss.device) == (wide, want.shape, student.device)
        size = torch.where(want.isinf(), 1.0, want.abs())
        size = size.maximum(share if reduction == "none" else share.sum())
        # a row's share of a mean is rounded, and so is the row times it; in the end, their sum
        rounding = precision / 2 * (3 if reduction == "mean" else 1)
        assert_within((of_torch.loss + rounding) * size, loss.detach(), want, "loss")

        want = reference.kd_bwd(incoming.double(), s, t, stats, *arguments)
        assert (grad.dtype, grad.shape) == (student.dtype, student.shape)
        limits = torch.finfo(grad.dtype)
        rounding = roundings * limits.eps / 2 * want.abs().clamp(min=limits.smallest_normal)
        factor = per_row((share * incoming).abs(), options["class_dim"])
        assert_within(of_torch.grad * factor + rounding, grad, want, "gradient")


def loss_and_grad(
    student: Tensor, teacher: Tensor, function: Callable[..., Tensor] = kd_loss, **options: Any
) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient of its sum."""
    leaf = student.detach().requires_grad_()
    loss = function(leaf, teacher, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


def test_new_memory_is_poisoned() -> None:
    """Else an output that nothing writes could pass by chance."""
    assert torch.empty(100).isnan().all()
    assert torch.empty_like(draw(3, 4, dtype=BFLOAT)).isnan().all()


# against the reference


@pytest.mark.parametrize("name", OPTIONS)
def test_reference_matches_torch(name: str) -> None:
    """The specification: rows by torch's functions, shares by hand, gradients by autograd."""
    student, teacher = pair(12, 10, dtype=DOUBLE)
    options = options_for(name, student)
    labels, weights = options.get("labels"), options.get("row_weights", torch.ones(12)).double()
    for ids in labels[:2] if isinstance(labels, tuple) else [labels]:
        if ids is not None:
            weights = weights.masked_fill(ids == options.get("ignore_index", -100), 0)
    shares = {"mean": weights / weights.sum(), "sum": weights, "none": weights}
    for reduction, share in shares.items():
        arguments = operation_options(student, reduction=reduction, **options)
        loss, stats = reference.kd_fwd(student, teacher, *arguments)
        grad = reference.kd_bwd(torch.ones_like(loss), student, teacher, stats, *arguments)
        leaf = student.clone().requires_grad_()
        rows = share * torch_rows(leaf, teacher, **options)
        assert_close(loss, (rows if reduction == "none" else rows.sum()).detach())
        assert_close(grad, torch.autograd.grad(rows.sum(), leaf)[0])
        assert_close(stats[5], share)


SHAPES = [
    ((1, 2), -1), ((4, 2), -1), ((1, 10), -1), ((64, 10), -1), ((64, 128), -1), ((1000, 3), -1),
    ((5, 32), -1), ((3, 33), -1), ((7, 1000), -1), ((5, 1001), -1), ((3, 1024), -1),
    ((3, 2049), -1), ((1, 65536), -1), ((2, 70000), -1),
    ((2,), 0), ((1000,), 0), ((2, 3, 17), -1), ((2, 3, 50), 2), ((11, 4, 6), 0),
    ((2, 13, 5, 7), 1), ((2, 150, 9, 16), 1), ((2, 13, 1, 1), 1), ((2, 5000, 3), 1), ((1, 2, 9), 1),
]  # fmt: skip


@every_device
@pytest.mark.parametrize(("shape", "class_dim"), SHAPES, ids=str)
def test_shapes_match(shape: tuple[int, ...], class_dim: int, device: str) -> None:
    student, teacher = pair(*shape, device=device)
    for name in MAIN_OPTIONS:
        check(student, teacher, **options_for(name, student, class_dim))


@every_device
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(
    ("shape", "class_dim"), [((21, 10), -1), ((8, 1001), -1), ((2, 13, 5, 7), 1)], ids=str
)
def test_options_match(shape: tuple[int, ...], class_dim: int, name: str, device: str) -> None:
    student, teacher = pair(*shape, device=device)
    check(student, teacher, **options_for(name, student, class_dim))


@every_device
@pytest.mark.parametrize("student_dtype", [FLOAT, HALF, BFLOAT, DOUBLE], ids=str)
@pytest.mark.parametrize("teacher_dtype", [FLOAT, HALF, BFLOAT, DOUBLE], ids=str)
@pytest.mark.parametrize(
    ("shape", "class_dim"),
    [((21, 10), -1), ((3, 1001), -1), ((2, 1100), -1), ((2, 40, 3, 7), 1)],
    ids=str,
)
def test_dtypes_match(
    shape: tuple[int, ...], class_dim: int, student_dtype: torch.dtype,
    teacher_dtype: torch.dtype, device: str,
) -> None:  # fmt: skip
    student, teacher = pair(*shape, dtype=student_dtype, teacher=teacher_dtype, device=device)
    for name in ("T_4", "everything"):
        check(student, teacher, **options_for(name, student, class_dim))


LAYOUTS: dict[str, Callable[[Callable[..., Tensor]], Tensor]] = {  # [6, 40]
    "contiguous": lambda new: new(6, 40),
    "offset": lambda new: new(241)[1:].view(6, 40),
    "rows_apart": lambda new: new(6, 50)[:, 3:43],
    "every_other_row": lambda new: new(12, 40)[::2],
    "every_other_class": lambda new: new(6, 80)[:, ::2],
    "transposed": lambda new: new(40, 6).t(),
    "expanded_rows": lambda new: new(1, 40).expand(6, 40),
    "expanded_classes": lambda new: new(6, 1).expand(6, 40),
    "overlapping": lambda new: new(45).unfold(0, 40, 1),
}
DENSE_LAYOUTS: dict[str, Callable[[Callable[..., Tensor]], Tensor]] = {  # [2, 11, 4, 6]
    "contiguous": lambda new: new(2, 11, 4, 6),
    "channels_last": lambda new: new(2, 11, 4, 6).to(memory_format=torch.channels_last),
    "cropped": lambda new: new(2, 11, 7, 9)[:, :, 1:5, 2:8],
    "classes_of_more": lambda new: new(2, 15, 4, 6)[:, 2:13],
    "every_other_class": lambda new: new(2, 22, 4, 6)[:, ::2],
    "every_other_pixel": lambda new: new(2, 11, 4, 12)[..., ::2],
    "pixels_transposed": lambda new: new(2, 11, 6, 4).transpose(2, 3),
    "batch_last": lambda new: new(11, 4, 6, 2).permute(3, 0, 1, 2),
    "channels_last_of_more": lambda new: new(2, 15, 4, 6).to(memory_format=torch.channels_last)[
        :, 2:13
    ],
    "expanded_batch": lambda new: new(1, 11, 4, 6).expand(2, 11, 4, 6),
    "expanded_pixels": lambda new: new(2, 11, 1, 1).expand(2, 11, 4, 6),
}


@every_device
@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
@pytest.mark.parametrize(
    ("layouts", "layout", "class_dim"),
    [
        pytest.param(layouts, layout, class_dim, id=f"{kind}-{layout}")
        for kind, layouts, class_dim in (("rows", LAYOUTS, -1), ("dense", DENSE_LAYOUTS, 1))
        for layout in layouts
    ],
)
def test_layouts_match(
    layouts: dict[str, Any], layout: str, class_dim: int, dtype: torch.dtype, device: str
) -> None:
    """A student of one layout beside teachers of each, and the strides of its gradient."""
    new = partial(draw, dtype=dtype, device=device)
    student = layouts[layout](new)
    for name, teacher_layout in zip(itertools.cycle(MAIN_OPTIONS), layouts.values(), strict=False):
        options = options_for(name, student, class_dim)
        teacher = teacher_layout(new)
        check(student, teacher, reductions=["mean", "none"], **options)
        for reduction in ("mean", "none"):
            _, grad = loss_and_grad(student, teacher, reduction=reduction, **options)
            assert grad.stride() == torch.empty_like(student).stride()


@every_device
@every_reduction
@pytest.mark.parametrize("name", OPTIONS)
def test_operations_match(name: str, reduction: str, device: str) -> None:
    """Either way to the gradient, each with every reduction, also those kd_loss does not take."""
    student, teacher = pair(21, 40, device=device)
    options = options_for(name, student)
    arguments = operation_options(student, reduction=reduction, **options)

    class InForward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, student: Tensor) -> Tensor:
            loss, ctx.grad = OPS.kd_fwd_grad(student, teacher, *arguments)
            return loss

        @staticmethod
        def backward(ctx: Any, grad_loss: Tensor) -> Tensor:
            assert (grad_loss == 1).all()
            return ctx.grad

    class InBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, student: Tensor) -> Tensor:
            loss, stats = OPS.kd_fwd(student, teacher, *arguments)
            assert (stats.shape, stats.dtype) == ((6, 21), FLOAT)
            ctx.save_for_backward(student, stats)
            return loss

        @staticmethod
        def backward(ctx: Any, grad_loss: Tensor) -> Tensor:
            student, stats = ctx.saved_tensors
            return OPS.kd_bwd(grad_loss, student, teacher, stats, *arguments)

    for way, grad_loss in ((InForward, 1.0), (InBackward, 1.0), (InBackward, -2.5)):
        function = lambda student, teacher, **_: way.apply(student)  # noqa: B023, E731
        check(
            student, teacher, function=function, reductions=[reduction], grad_loss=grad_loss,
            **options,
        )  # fmt: skip


@every_device
@pytest.mark.parametrize(("shape", "class_dim"), [((1, 1), -1), ((4, 1), -1), ((1, 1, 9), 1)])
def test_operations_match_of_one_class(shape: tuple[int, ...], class_dim: int, device: str) -> None:
    """Of which kd_loss takes none: nothing is to learn."""
    student, teacher = pair(*shape, device=device)
    arguments = operation_options(student, temperature=4.0, class_dim=class_dim)
    for result in OPS.kd_fwd_grad(student, teacher, *arguments):
        assert (result == 0).all()


@every_device
def test_the_numbers_of_a_forward_may_be_strided_and_match(device: str) -> None:
    student, teacher = pair(21, 40, device=device)
    arguments = operation_options(student)
    loss, stats = OPS.kd_fwd(student, teacher, *arguments)
    strided = stats.repeat_interleave(2, 1)[:, ::2]
    want = OPS.kd_bwd(torch.ones_like(loss), student, teacher, stats, *arguments)
    assert torch.equal(
        OPS.kd_bwd(torch.ones_like(loss), student, teacher, strided, *arguments), want
    )


@every_device
@pytest.mark.parametrize("dtype", [FLOAT, HALF, BFLOAT, DOUBLE], ids=str)
@pytest.mark.parametrize("factor", [1.0, 0.0, 3.0, -1e-3])
def test_scale_matches(factor: float, dtype: torch.dtype, device: str) -> None:
    """In place and rounded once, whatever the strides; the memory between is left alone."""
    wide = DOUBLE if dtype == DOUBLE else FLOAT
    by = torch.tensor(factor, dtype=wide, device=device)
    new = partial(draw, dtype=dtype, device=device)
    for whole, part in (
        (new(7, 33), lambda x: x),
        (new(0, 10), lambda x: x),
        (new(2, 5, 3, 4).to(memory_format=torch.channels_last), lambda x: x),
        (new(40, 6), lambda x: x.t()),
        (new(300, 301), lambda x: x),
        (new(8, 33), lambda x: x[:, 3:20]),
        (new(8, 33), lambda x: x[::2, ::3].t()),
        (new(2, 6, 5, 5), lambda x: x[:, 1:3, 1:4]),
        (new(9), lambda x: x[4]),
    ):
        want = whole.clone()
        part(want).copy_((part(want).to(wide) * by).to(dtype))
        assert OPS.kd_scale_(part(whole), by) is None
        assert torch.equal(whole, want)


@every_device
def test_mixed_labels_as_a_list_and_lam_in_any_form_match(device: str) -> None:
    student, teacher = pair(6, 10, device=device)
    a, b = (torch.randint(10, (6,), device=device) for _ in range(2))
    forms = [0.25, torch.tensor(0.25, device=device), torch.full((6,), 0.25, device=device)]
    forms += [forms[-1].double(), forms[-1].half(), forms[-1][:1].expand(6)]
    results = [
        loss_and_grad(student, teacher, labels=labels, ce_weight=1.0)
        for lam in forms
        for labels in ((a, b, lam), [a, b, lam])
    ]
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(grad, results[0][1])


@every_device
def test_temperature_in_any_form_matches(device: str) -> None:
    """T^2 is per row: each row is as if it were alone with its own temperature."""
    student, teacher = pair(6, 50, device=device)
    temperatures = torch.tensor([0.1, 0.5, 1, 2, 4, 20], device=device)
    rows, grads = loss_and_grad(student, teacher, temperature=temperatures, reduction="none")
    wide = temperatures.double()
    assert torch.equal(rows, loss_and_grad(student, teacher, temperature=wide, reduction="none")[0])
    for i, temperature in enumerate(temperatures):
        for form in (temperature, temperature.item()):
            alone, alike = loss_and_grad(student, teacher, temperature=form, reduction="none")
            assert torch.equal(alone[i], rows[i])
            assert torch.equal(alike[i], grads[i])


@every_device
@every_reduction
@pytest.mark.parametrize(
    ("shape", "class_dim"), [((0, 10), -1), ((0, 10, 3, 4), 1), ((2, 10, 0, 3), 1)], ids=str
)
def test_empty_matches(shape: tuple[int, ...], class_dim: int, reduction: str, device: str) -> None:
    student, teacher = pair(*shape, device=device)
    for name in MAIN_OPTIONS:
        options = options_for(name, student, class_dim)
        loss, grad = loss_and_grad(student, teacher, reduction=reduction, **options)
        rows = [n for i, n in enumerate(shape) if i != class_dim % len(shape)]
        assert loss.shape == torch.Size(rows if reduction == "none" else [])
        assert loss.sum() == 0
        assert grad.shape == student.shape


# extremes

FORMS = {"few": ((12, 10), -1), "row": ((3, 1001), -1), "long": ((2, 5000), -1),
         "dense": ((2, 13, 5, 7), 1)}  # fmt: skip
every_form = pytest.mark.parametrize(("shape", "class_dim"), FORMS.values(), ids=FORMS)
temperatures = pytest.mark.parametrize("temperature", [0.1, 1.0, 4.0, 20.0])


@every_device
@every_form
@temperatures
@pytest.mark.parametrize("name", ["spread", "shifted", "apart"])
def test_extreme_logits(
    name: str, temperature: float, shape: tuple[int, ...], class_dim: int, device: str
) -> None:
    """Logits of +-1e4: all over that range, close together far from 0, and of opposite signs."""
    student, teacher = pair(*shape, device=device)
    if name == "spread":
        student, teacher = ((2e4 * torch.rand(shape) - 1e4).to(device) for _ in range(2))
    else:
        student, teacher = student + 1e4, teacher + (1e4 if name == "shifted" else -1e4)
    options = options_for("smoothing", student, class_dim) | {"temperature": temperature}
    check(student, teacher, **options)
    check(student.half(), teacher.bfloat16(), **options)


@every_device
@every_form
@temperatures
def test_extreme_masked_teacher(
    temperature: float, shape: tuple[int, ...], class_dim: int, device: str
) -> None:
    """-inf in the teacher, a whole block of it too, adds nothing to the loss: 0 * log 0 = 0."""
    student, teacher = pair(*shape, device=device)
    mask = torch.rand(shape) < 0.4
    mask.narrow(class_dim, shape[class_dim] // 2, shape[class_dim] // 2).fill_(True)
    mask.select(class_dim, 3).fill_(False)
    mask = mask.to(device)
    options = options_for("labels", student, class_dim) | {"temperature": temperature}
    of = [teacher.masked_fill(mask, masked) for masked in (-INF, -1e4)]
    check(student, of[0], like=(student, of[1]), **options)
    both = [student.masked_fill(mask, masked) for masked in (-INF, -1e4)]
    options = {"temperature": temperature, "class_dim": class_dim}
    check(both[0], of[0], like=(both[1], of[1]), **options)


@every_device
@every_form
@temperatures
def test_extreme_masked_student(
    temperature: float, shape: tuple[int, ...], class_dim: int, device: str
) -> None:
    """-inf in the student alone is an infinite loss, though the teacher be all but certain."""
    student, teacher = pair(*shape, device=device)
    s, t = student.movedim(class_dim, -1), teacher.movedim(class_dim, -1)
    s[0, ..., 1] = -INF
    s[1, ..., -1] = -INF
    t[1, ..., -1] = -1e4  # a probability of 0 in float32
    s[-1, ..., : shape[class_dim] // 2] = -INF
    like = student.clamp(min=-1e4), teacher
    options = {"temperature": temperature, "class_dim": class_dim}
    check(student, teacher, like=like, **options)
    assert kd_loss(student, teacher, **options) == INF


@every_device
@every_form
def test_extreme_student_of_minus_inf_only(
    shape: tuple[int, ...], class_dim: int, device: str
) -> None:
    """Any class has a finite teacher over it: torch says NaN, the specification +inf."""
    student, teacher = pair(*shape, device=device)
    student.select(0, 0).fill_(-INF)
    rows = kd_loss(student, teacher, class_dim=class_dim, reduction="none")
    assert (rows[0] == INF).all()
    assert rows[1:].isfinite().all()


@every_device
@every_form
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_extreme_cross_entropy_of_minus_inf(
    smoothing: float, shape: tuple[int, ...], class_dim: int, device: str
) -> None:
    """Infinite where the target has mass there, else as if the class did not exist."""
    student, teacher = pair(*shape, device=device)
    student.select(class_dim, 2).fill_(-INF)
    like = student.clamp(min=-1e4), teacher
    labels = Rows([n for i, n in enumerate(shape) if i != class_dim % len(shape)], 2, device)
    options = {"ce_weight": 0.5, "label_smoothing": smoothing, "kd_weight": 0.0}
    options |= {"labels": labels.labels(), "class_dim": class_dim}
    check(student, teacher, like=like, **options)
    options["labels"] = torch.full_like(options["labels"], 2)
    check(student, teacher, like=like, **options)
    assert kd_loss(student, teacher, **options) == INF


@every_device
@every_form
@pytest.mark.parametrize("dtype", [FLOAT, HALF, BFLOAT, DOUBLE], ids=str)
def test_extreme_equality_gives_zero(
    dtype: torch.dtype, shape: tuple[int, ...], class_dim: int, device: str
) -> None:
    """student == teacher: a loss of 0 and a gradient of 0, exactly, also of +-1e4 and of -inf."""
    logits = draw(*shape, dtype=dtype, device=device)
    masked = logits.clone()
    masked.select(class_dim, 4).fill_(-INF)
    for x in (logits, masked, 4000 * logits, logits + 1000):
        for temperature, reduction in itertools.product((0.1, 1.0, 3.0, 20.0), REDUCTIONS):
            loss, grad = loss_and_grad(
                x, x.clone(), temperature=temperature, class_dim=class_dim, reduction=reduction
            )
            assert (loss == 0).all()
            assert (grad == 0).all()


@every_device
@every_form
@every_reduction
@pytest.mark.parametrize("bad", [NAN, INF])
def test_extreme_ignored_rows_are_not_looked_at(
    bad: float, reduction: str, shape: tuple[int, ...], class_dim: int, device: str
) -> None:
    """NaN in ignored rows and in rows of weight 0 changes nothing; all rows ignored gives 0."""
    student, teacher = pair(*shape, device=device)
    for name in ("ignored", "row_weights"):
        options = options_for(name, student, class_dim) | {"reduction": reduction}
        if name == "ignored":
            ignored = options["labels"] == -100
        else:
            ignored = options["row_weights"] == 0
        assert ignored.any()
        assert not ignored.all()
        where = ignored.unsqueeze(class_dim).expand_as(student)
        spoilt = [x.masked_fill(where, bad) for x in (student, teacher)]
        want, given = (loss_and_grad(*x, **options) for x in ((student, teacher), spoilt))
        assert torch.equal(given[0], want[0])
        assert torch.equal(given[1], want[1])
        assert (given[1][where] == 0).all()

        if name == "ignored":
            options["labels"].fill_(-100)
        else:
            options["row_weights"].fill_(0)
        loss, grad = loss_and_grad(*(torch.full_like(x, bad) for x in spoilt), **options)
        assert (loss == 0).all()
        assert (grad == 0).all()


@every_device
@every_form
@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize("name", ["T_4", "labels", "labels_only"])
def test_extreme_nan_stays(
    name: str, who: str, bad: float, shape: tuple[int, ...], class_dim: int, device: str
) -> None:
    """As in torch, NaN and +inf make their row NaN, and no other; unless nothing looks at them."""
    student, teacher = pair(*shape, device=device)
    spoilt = student if who == "student" else teacher
    spoilt.movedim(class_dim, -1)[0, ..., 5] = bad
    options = options_for(name, student, class_dim)
    if "labels" in options:
        options["labels"].fill_(3)
    for reduction in ("sum", "none"):
        loss, grad = loss_and_grad(student, teacher, reduction=reduction, **options)
        want, want_grad = loss_and_grad(student, teacher, torch_rows, **options)
        if name == "labels_only" and who == "teacher":
            # torch multiplies the weight of 0 with NaN; here it switches the term off
            assert loss.isfinite().all()
            assert grad.isfinite().all()
            continue
        want = want if reduction == "none" else want.sum()
        assert torch.equal(loss.isnan(), want.isnan())
        assert torch.equal(grad.isnan(), want_grad.isnan())


@every_device
def test_extreme_weights_of_zero_switch_terms_off(device: str) -> None:
    """Also terms that are infinite or NaN."""
    student, teacher = pair(4, 40, device=device)
    labels = torch.tensor([1, 2, 3, 4], device=device)
    student[:, 7] = -INF
    loss, grad = loss_and_grad(student, teacher, kd_weight=0.0, labels=labels, ce_weight=1.0)
    assert_close(loss, F.cross_entropy(student, labels))
    assert grad.isfinite().all()
    teacher[:, 7] = -INF
    want = loss_and_grad(student, teacher)
    given = loss_and_grad(student, teacher, labels=torch.full_like(labels, 7), ce_weight=0.0)
    assert torch.equal(given[0], want[0])
    assert torch.equal(given[1], want[1])


# autograd


PATHS = [(FLOAT, "mean"), (FLOAT, "none"), (HALF, "mean"), (BFLOAT, "sum"), (DOUBLE, "mean")]
every_path = pytest.mark.parametrize(("dtype", "reduction"), PATHS, ids=str)


@every_device
@every_reduction
@pytest.mark.parametrize("name", OPTIONS)
def test_gradcheck(name: str, reduction: str, device: str) -> None:
    """The gradient is formed in the forward for "mean" and "sum", in the backward for "none"."""
    student, teacher = pair(4, 5, 2, dtype=DOUBLE, device=device)
    options = options_for(name, student, 1)
    function = partial(kd_loss, teacher=teacher, reduction=reduction, **options)
    assert torch.autograd.gradcheck(function, student.requires_grad_())


@every_device
@every_path
def test_loss_times_a_factor(dtype: torch.dtype, reduction: str, device: str) -> None:
    """The incoming gradient is any number, and 0 for what has no share in the result.

    In bfloat16 a gradient that was formed in the forward is rounded again by a factor that is no
    power of 2.
    """
    student, teacher = pair(9, 33, dtype=dtype, device=device)
    for factor in (3.0, -0.7, 0.0, 65536.0, 2.0**-10):
        for name in MAIN_OPTIONS:
            check(
                student, teacher, reductions=[reduction], grad_loss=factor,
                roundings=2 if dtype == BFLOAT and factor in (3.0, -0.7) else 1,
                **options_for(name, student),
            )  # fmt: skip


@every_device
def test_gradient_scale_reaches_float16_before_it_is_rounded(device: str) -> None:
    """Scaled by 65536, gradients that float16 would have lost: most of them are lost without."""
    student, teacher = pair(512, 1000, dtype=HALF, device=device)
    teacher = student + 0.01 * teacher
    (lost,) = torch.autograd.grad(kd_loss(student.requires_grad_(), teacher), student)
    assert (lost == 0).float().mean() > 0.5
    for reduction in ("mean", "sum", "none"):
        check(student, teacher, reductions=[reduction], grad_loss=65536.0)


@every_device
@pytest.mark.parametrize("dtype", [FLOAT, HALF, DOUBLE], ids=str)
def test_incoming_gradient_of_any_strides(dtype: torch.dtype, device: str) -> None:
    student, teacher = pair(2, 13, 5, 7, dtype=dtype, device=device)
    leaf = student.requires_grad_()
    loss = kd_loss(leaf, teacher, class_dim=1, reduction="none")
    new = partial(draw, dtype=loss.dtype, device=device)
    for strided in (
        new(1, 1, 1).expand(2, 5, 7),
        new(2, 1, 7).expand(2, 5, 7),
        new(2, 7, 5).transpose(1, 2),
        new(2, 5, 14)[..., ::2],
        new(7, 5, 2).permute(2, 1, 0),
    ):
        given, want = (
            torch.autograd.grad(loss, leaf, x, retain_graph=True)[0]
            for x in (strided, strided.contiguous())
        )
        assert torch.equal(given, want)
    (given,) = torch.autograd.grad(loss.sum(), leaf, retain_graph=True)  # expanded by autograd
    assert torch.equal(given, torch.autograd.grad(loss, leaf, torch.ones_like(loss))[0])


@every_device
@every_path
def test_loss_used_twice(dtype: torch.dtype, reduction: str, device: str) -> None:
    student, teacher = pair(6, 40, dtype=dtype, device=device)
    leaf = student.clone().requires_grad_()
    loss = kd_loss(leaf, teacher, reduction=reduction)
    (3 * loss + loss).sum().backward()
    want = loss_and_grad(student, teacher, lambda *x: 4 * kd_loss(*x, reduction=reduction))
    assert torch.equal(leaf.grad, want[1])


@every_device
@every_path
def test_backward_twice(dtype: torch.dtype, reduction: str, device: str) -> None:
    """Each gives the same gradient, its own to keep; and none a third time."""
    student, teacher = pair(6, 40, dtype=dtype, device=device)
    leaf = student.requires_grad_()
    options = options_for("labels", student)
    loss = kd_loss(leaf, teacher, reduction=reduction, **options).sum()
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(2 * loss, leaf, retain_graph=True)
    assert torch.equal(first, kept)
    assert torch.equal(second, 2 * kept)
    assert first.data_ptr() != second.data_ptr()

    loss.backward(retain_graph=True)
    loss.backward()
    assert torch.equal(leaf.grad, 2 * kept)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
    assert torch.equal(leaf.grad, 2 * kept)


@every_device
@every_path
def test_gradients_accumulate(dtype: torch.dtype, reduction: str, device: str) -> None:
    """Into the tensor that is there, over losses and steps."""
    student, teacher = pair(6, 40, dtype=dtype, device=device)
    leaf = student.clone().requires_grad_()
    leaf.grad = there = torch.ones_like(student)
    wanted = torch.ones_like(student)
    for temperature in (1.0, 4.0):
        options = {"temperature": temperature, "reduction": reduction}
        kd_loss(leaf, teacher, **options).sum().backward()
        wanted += loss_and_grad(student, teacher, **options)[1]
    assert leaf.grad is there
    assert torch.equal(there, wanted)

    leaf.grad = None  # the first gradient may become .grad itself: the next must not spoil it
    kd_loss(leaf, teacher, reduction=reduction).sum().backward()
    first = leaf.grad.clone()
    kd_loss(leaf, 2 * teacher, reduction=reduction).sum().backward()
    second = loss_and_grad(student, 2 * teacher, reduction=reduction)[1]
    assert torch.equal(leaf.grad, first + second)


@every_device
@every_path
def test_loss_is_differentiable_once(dtype: torch.dtype, reduction: str, device: str) -> None:
    """A penalty on the gradient is an error, and never left out silently."""
    student, teacher = pair(6, 40, dtype=dtype, device=device)
    leaf = student.requires_grad_()
    # the incoming gradient does not require grad, and does
    for function in (lambda loss: loss.sum(), lambda loss: loss.square().sum()):
        loss = function(kd_loss(leaf, teacher, reduction=reduction))
        (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            (loss + grad.float().square().sum()).backward()


@every_device
@every_path
def test_gradient_flows_through_the_student(
    dtype: torch.dtype, reduction: str, device: str
) -> None:
    student, teacher = pair(6, 40, dtype=dtype, device=device)
    weight = torch.ones(40, dtype=dtype, device=device, requires_grad=True)
    kd_loss(student * weight, teacher, reduction=reduction).sum().backward()
    _, grad = loss_and_grad(student, teacher, reduction=reduction)
    assert_close(weight.grad, (grad * student).sum(0))


@every_device
@every_path
def test_constants_made_in_inference_mode(dtype: torch.dtype, reduction: str, device: str) -> None:
    """Teacher, labels and the rest as a teacher run under torch.inference_mode leaves them."""
    student = draw(6, 40, dtype=dtype, device=device)
    with torch.inference_mode():
        teacher = draw(6, 40, dtype=dtype, device=device)
        options = options_for("everything", teacher) | {"reduction": reduction}
    ordinary = {k: v.clone() if is_tensor(v) else v for k, v in options.items()}
    ordinary["labels"] = tuple(x.clone() for x in options["labels"])
    given = loss_and_grad(student, teacher, **options)
    want = loss_and_grad(student, teacher.clone(), **ordinary)
    assert torch.equal(given[0], want[0])
    assert torch.equal(given[1], want[1])


@every_device
@every_path
def test_without_gradient(dtype: torch.dtype, reduction: str, device: str) -> None:
    """The same loss, as good as the one with a gradient, and no graph."""
    student, teacher = pair(6, 40, dtype=dtype, device=device)
    options = options_for("everything", student) | {"reduction": reduction}
    want, _ = loss_and_grad(student, teacher, **options)
    leaf = student.clone().requires_grad_()
    with torch.no_grad():
        losses = [kd_loss(leaf, teacher, **options)]
    with torch.inference_mode():
        losses.append(kd_loss(leaf, teacher, **options))
    losses.append(kd_loss(student, teacher, **options))
    for loss in losses:
        assert not loss.requires_grad
        assert_close(loss, want)


@every_device
@every_path
def test_student_changed_in_place_gives_no_wrong_gradient(
    dtype: torch.dtype, reduction: str, device: str
) -> None:
    """Either the gradient at the logits of the forward, or an error."""
    student, teacher = pair(6, 40, dtype=dtype, device=device)
    _, want = loss_and_grad(student, teacher, reduction=reduction)
    leaf = student.clone().requires_grad_()
    logits = leaf * 1
    loss = kd_loss(logits, teacher, reduction=reduction).sum()
    with torch.no_grad():
        logits.add_(1)
    formed_in_forward = reduction != "none" and dtype != HALF
    if formed_in_forward:
        assert torch.equal(torch.autograd.grad(loss, leaf, retain_graph=True)[0], want)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_device
def test_operations_change_no_input(device: str) -> None:
    student, teacher = pair(9, 40, device=device)
    options = options_for("everything", student)
    before = [student.clone(), teacher.clone(), *(x.clone() for x in options["labels"])]
    before += [options["temperature"].clone(), options["row_weights"].clone()]
    for reduction in REDUCTIONS:
        loss_and_grad(student, teacher, reduction=reduction, **options)
    after = [student, teacher, *options["labels"], options["temperature"], options["row_weights"]]
    assert all(map(torch.equal, after, before))


# the same bits


@every_device
@pytest.mark.parametrize("name", MAIN_OPTIONS)
@pytest.mark.parametrize(
    ("shape", "class_dim"),
    [((2000, 10), -1), ((257, 1000), -1), ((3, 70000), -1), ((2, 13, 90, 91), 1)],
    ids=str,
)
def test_bitwise_the_same(shape: tuple[int, ...], class_dim: int, name: str, device: str) -> None:
    """Twice, and for any number of threads."""
    student, teacher = pair(*shape, device=device)
    options = options_for(name, student, class_dim)
    for reduction in REDUCTIONS:
        results = []
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            results.append(loss_and_grad(student, teacher, reduction=reduction, **options))
        for loss, grad in results[1:]:
            assert torch.equal(loss, results[0][0])
            assert torch.equal(grad, results[0][1])


# torch.library and torch.compile


@every_device
@pytest.mark.parametrize(
    ("name", "reduction", "dtype", "logits"),
    [
        ("plain", "mean", FLOAT, lambda new: (new(4, 10), 2 * new(4, 10))),
        ("labels", "sum", BFLOAT, lambda new: (new(4, 40), new(4, 40).float())),
        ("everything", "none", DOUBLE, lambda new: (new(3, 7), new(3, 7))),
        ("everything", "mean", HALF, lambda new: (new(2, 5, 3, 4), new(2, 5, 3, 4))),
        (
            "mixup",
            "none",
            FLOAT,
            lambda new: (
                new(2, 5, 3, 4).to(memory_format=torch.channels_last),
                new(4, 5, 3, 4)[::2],
            ),
        ),
        ("smoothing", "sum", FLOAT, lambda new: (new(10, 4).t(), new(4, 20)[:, ::2])),
        ("T_4", "none", FLOAT, lambda new: (new(5), new(5))),
    ],
    ids=["plain", "bfloat16", "float64", "dense", "strided", "transposed", "one_row"],
)
@pytest.mark.parametrize("operation", ["kd_fwd", "kd_fwd_grad", "kd_bwd", "kd_scale_"])
def test_opcheck(
    operation: str, name: str, reduction: str, dtype: torch.dtype, logits: Callable, device: str
) -> None:
    """Schema, fake, autograd registration and AOT dispatch, by torch's own checks."""
    student, teacher = logits(partial(draw, dtype=dtype, device=device))
    options = options_for(name, student, 1 if student.dim() == 4 else -1)
    arguments = operation_options(student, reduction=reduction, **options)
    loss, stats = OPS.kd_fwd(student, teacher, *arguments)
    inputs = {
        "kd_fwd": (student, teacher, *arguments),
        "kd_fwd_grad": (student, teacher, *arguments),
        "kd_bwd": (torch.ones_like(loss), student, teacher, stats, *arguments),
        "kd_scale_": (torch.empty_like(student).copy_(student), stats.new_tensor(3.0)),
    }[operation]
    results = torch.library.opcheck(getattr(OPS, operation).default, inputs)
    assert set(results.values()) == {"SUCCESS"}
    assert len(results) == 4


@pytest.fixture
def compiled() -> Iterator[Callable[..., Callable[..., Tensor]]]:
    torch._dynamo.reset()
    yield partial(torch.compile, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()


@every_device
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("name", "dtype", "shape", "class_dim"),
    [
        ("plain", FLOAT, (6, 40), -1),
        ("everything", FLOAT, (6, 40), -1),
        ("mixup_tensor", BFLOAT, (2, 5, 3, 4), 1),
        ("T_tensor", HALF, (6, 40), -1),
        ("ignored", DOUBLE, (4, 3, 7), -2),
    ],
)
def test_compile(
    name: str, dtype: torch.dtype, shape: tuple[int, ...], class_dim: int, dynamic: bool,
    device: str, compiled: Callable,
) -> None:  # fmt: skip
    """One graph, as good as eager in value and gradient."""
    student, teacher = pair(*shape, dtype=dtype, device=device)
    options = options_for(name, student, class_dim)
    check(student, teacher, function=compiled(kd_loss, dynamic=dynamic), **options)


@every_device
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["plain", "everything"])
def test_compile_once_for_all_shapes(
    name: str, reduction: str, device: str, compiled: Callable
) -> None:
    function = compiled(kd_loss)
    for rows, classes in ((6, 40), (9, 33), (31, 1001)):
        student, teacher = pair(rows, classes, device=device)
        options = options_for(name, student)
        beside = [x for x in options.values() if is_tensor(x)] + [*options.get("labels", ())]
        leaf = student.clone().requires_grad_()
        for x in (leaf, teacher, *beside):
            torch._dynamo.mark_dynamic(x, 0)
        for x in (leaf, teacher):
            torch._dynamo.mark_dynamic(x, 1)
        stance = "default" if rows == 6 else "fail_on_recompile"
        with torch.compiler.set_stance(stance):
            loss = function(leaf, teacher, reduction=reduction, **options)
        (grad,) = torch.autograd.grad(loss.sum(), leaf)
        want, want_grad = loss_and_grad(student, teacher, reduction=reduction, **options)
        assert_close(loss, want)
        assert_close(grad, want_grad)


@every_device
@pytest.mark.parametrize("kind", ["floats", "tensors"])
def test_compile_with_changing_options(kind: str, device: str, compiled: Callable) -> None:
    """Temperature and lam from call to call: tensors compile once. The teacher requires grad."""
    student, teacher = pair(6, 40, device=device)
    labels = torch.randint(40, (2, 6), device=device)
    function = compiled(kd_loss)
    for call, numbers in enumerate([(1.5, 0.3), (2.0, 0.5), (4.0, 0.7), (1.0, 1.0)]):
        temperature, lam = torch.tensor(numbers, device=device) if kind == "tensors" else numbers
        options = {"temperature": temperature, "ce_weight": 0.5, "labels": (*labels, lam)}
        once = kind == "tensors" and call > 0
        with torch.compiler.set_stance("fail_on_recompile" if once else "default"):
            check(student, teacher, function=function, reductions=["mean"], **options)


@every_device
def test_compile_without_gradient(device: str, compiled: Callable) -> None:
    student, teacher = pair(6, 40, device=device)
    function = compiled(kd_loss)
    assert_close(function(student, teacher), kd_loss(student, teacher))
    with torch.no_grad():
        loss = function(student.requires_grad_(), teacher)
    assert not loss.requires_grad
    assert_close(loss, kd_loss(student.detach(), teacher))


@every_device
def test_compile_with_inductor(device: str) -> None:
    """Among other operations, which inductor fuses and ours does not disturb."""
    torch._dynamo.reset()
    student, teacher = pair(6, 40, device=device)
    labels = torch.randint(40, (6,), device=device)

    def step(student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
        loss = kd_loss(2 * student + 1, teacher.sigmoid(), **options)
        return loss * 3

    function = torch.compile(step, fullgraph=True)
    options = {"temperature": 4.0, "labels": labels, "ce_weight": 0.5}
    given = loss_and_grad(student, teacher, function, **options)
    want = loss_and_grad(student, teacher, step, **options)
    assert_close(given[0], want[0])
    assert_close(given[1], want[1])


# parity


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


# the module


@every_device
@pytest.mark.parametrize("name", OPTIONS)
def test_module_is_the_function(name: str, device: str) -> None:
    student, teacher = pair(2, 13, 5, dtype=BFLOAT, device=device)
    options = options_for(name, student, 1)
    for reduction in REDUCTIONS:
        options["reduction"] = reduction
        beside = {k: options[k] for k in ("labels", "row_weights") if k in options}
        module = KDLoss(**{k: v for k, v in options.items() if k not in beside})
        given = loss_and_grad(student, teacher, module, **beside)
        want = loss_and_grad(student, teacher, **options)
        assert torch.equal(given[0], want[0])
        assert torch.equal(given[1], want[1])


def test_module_says_what_it_is() -> None:
    text = repr(KDLoss(temperature=4.0, kd_weight=0.7, ce_weight=0.3, reduction="sum"))
    for said in ("temperature=4.0", "kd_weight=0.7", "ce_weight=0.3", "reduction='sum'"):
        assert said in text
    assert not KDLoss().state_dict()


# bad input

STUDENT = torch.zeros(4, 10)
IDS = torch.tensor([0, 1, 2, 3])
DTYPES = "accepted are float32, float16, bfloat16 and float64"
LABELS = "an int64 tensor of class ids, or mixup's (labels_a, labels_b, lam)"
NUMBERS = "accepted are a number, a 0-dim tensor or one number per row, [4]"
POSITIVE = "accepted are numbers > 0"


def on_meta(*shape: int) -> Tensor:
    return torch.ones(shape, device="meta")


BAD: dict[str, tuple[dict[str, Any], type[Exception], str, str]] = {
    # name: options, error, what is said of what was given, and of what is accepted
    "classes differ": ({"teacher": torch.zeros(4, 9)}, ValueError,
                       "student [4, 10] and teacher [4, 9]", "differ in classes"),
    "rows differ": ({"teacher": torch.zeros(5, 10)}, ValueError,
                    "student [4, 10] and teacher [5, 10]", "differ in shape"),
    "ranks differ": ({"teacher": torch.zeros(10)}, ValueError,
                     "student [4, 10] and teacher [10]", "differ in shape"),
    "no dimension": ({"student": torch.zeros(()), "teacher": torch.zeros(())}, ValueError,
                     "class_dim is -1", "student []"),
    "no classes": ({"student": torch.zeros(4, 0), "teacher": torch.zeros(4, 0)}, ValueError,
                   "student [4, 0]", "no classes"),
    "class_dim high": ({"class_dim": 2}, ValueError, "class_dim is 2", "student [4, 10]"),
    "class_dim low": ({"class_dim": -3}, ValueError, "class_dim is -3", "student [4, 10]"),
    "student int": ({"student": STUDENT.long()}, TypeError, "student is torch.int64", DTYPES),
    "teacher int": ({"teacher": STUDENT.int()}, TypeError, "teacher is torch.int32", DTYPES),
    "student complex": ({"student": STUDENT.cfloat()}, TypeError,
                        "student is torch.complex64", DTYPES),
    "teacher float8": ({"teacher": STUDENT.to(torch.float8_e4m3fn)}, TypeError,
                       "teacher is torch.float8_e4m3fn", DTYPES),
    "teacher device": ({"teacher": on_meta(4, 10)}, ValueError,
                       "teacher on meta", "student is on cpu"),
    "labels device": ({"labels": IDS.to("meta")}, ValueError,
                      "labels is on meta", "student on cpu"),
    "temperature device": ({"temperature": on_meta(4)}, ValueError,
                           "temperature is on meta", "student on cpu"),
    "lam device": ({"labels": (IDS, IDS, on_meta())}, ValueError,
                   "lam is on meta", "student on cpu"),
    "weights device": ({"row_weights": on_meta(4)}, ValueError,
                       "row_weights is on meta", "student on cpu"),
    "reduction": ({"reduction": "avg"}, ValueError,
                  "reduction is 'avg'", "accepted are mean, sum and none"),
    "T 0": ({"temperature": 0}, ValueError, "temperature is 0", POSITIVE),
    "T negative": ({"temperature": -1.5, "labels": IDS}, ValueError,
                   "temperature is -1.5", POSITIVE),
    "T nan": ({"temperature": NAN}, ValueError, "temperature is nan", POSITIVE),
    "T shape": ({"temperature": torch.ones(10)}, ValueError,
                "temperature has shape [10]", NUMBERS),
    "T grad": ({"temperature": torch.ones(4, requires_grad=True)}, ValueError,
               "temperature requires grad", "accepted are constants"),
    "T tensor 0": ({"temperature": torch.tensor([1.0, 2.0, 0.0, 1.0])}, RuntimeError,
                   "temperature holds 0 for row 2", POSITIVE),
    "T tensor nan": ({"temperature": torch.tensor(NAN), "reduction": "none"}, RuntimeError,
                     "temperature holds nan for row 0", POSITIVE),
    "no labels": ({"ce_weight": 0.5}, ValueError, "ce_weight is 0.5", LABELS),
    "smoothing < 0": ({"labels": IDS, "label_smoothing": -0.1}, ValueError,
                      "label_smoothing is -0.1", "accepted are 0 to 1"),
    "smoothing > 1": ({"labels": IDS, "label_smoothing": 1.5}, ValueError,
                      "label_smoothing is 1.5", "accepted are 0 to 1"),
    "labels int32": ({"labels": IDS.int()}, ValueError, "labels is torch.int32 [4]", LABELS),
    "labels shape": ({"labels": IDS[:3]}, ValueError,
                     "labels is torch.int64 [3]", "the rows' shape [4]"),
    "labels dense": ({"labels": STUDENT.softmax(-1), "ce_weight": 1.0}, ValueError,
                     "labels is torch.float32 [4, 10] (dense soft labels are not", LABELS),
    "labels one-hot": ({"labels": F.one_hot(IDS, 10)}, ValueError,
                       "labels is torch.int64 [4, 10]", "the rows' shape [4]"),
    "labels number": ({"labels": 3}, TypeError, "labels is a int", LABELS),
    "labels list": ({"labels": [0, 1, 2, 3]}, ValueError, "labels is a list of 4", LABELS),
    "mixup of 2": ({"labels": (IDS, IDS)}, ValueError, "labels is a tuple of 2", LABELS),
    "mixup a": ({"labels": (IDS[:2], IDS, 0.5)}, ValueError, "labels is torch.int64 [2]", "[4]"),
    "mixup b": ({"labels": (IDS, IDS.float(), 0.5)}, ValueError,
                "labels_b is torch.float32 [4]", LABELS),
    "mixup None": ({"labels": (IDS, None, 0.5)}, TypeError, "labels_b is a NoneType", LABELS),
    "lam > 1": ({"labels": (IDS, IDS, 1.5)}, ValueError, "lam is 1.5", "accepted are 0 to 1"),
    "lam < 0": ({"labels": (IDS, IDS, -0.5)}, ValueError, "lam is -0.5", "accepted are 0 to 1"),
    "lam shape": ({"labels": (IDS, IDS, torch.ones(4, 1))}, ValueError,
                  "lam has shape [4, 1]", NUMBERS),
    "weights shape": ({"row_weights": torch.ones(4, 10)}, ValueError,
                      "row_weights has shape [4, 10]", "one number per row, [4]"),
    "label high": ({"labels": torch.tensor([0, 10, 2, 3])}, RuntimeError,
                   "labels hold 10 for row 1", "accepted are 0 to 9 and ignore_index -100"),
    "label low": ({"labels": torch.tensor([0, 1, 2, -1]), "ignore_index": 255}, RuntimeError,
                  "labels hold -1 for row 3", "accepted are 0 to 9 and ignore_index 255"),
    "label b high": ({"labels": (IDS, torch.tensor([9, 8, 99, 0]), 0.5), "ce_weight": 1.0},
                     RuntimeError, "labels hold 99 for row 2", "accepted are 0 to 9"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    """The error names the argument, what was given and what is accepted, whatever is asked for."""
    options, error, given, accepted = BAD[name]
    for student in (STUDENT, STUDENT.clone().requires_grad_()):
        with pytest.raises(error) as caught:
            kd_loss(**{"student": student, "teacher": STUDENT} | options)
        assert "kd_loss: " in str(caught.value)
        assert given in str(caught.value)
        assert accepted in str(caught.value)


def test_label_out_of_range_is_no_error_where_its_row_is_ignored() -> None:
    """-1 and 255 are common for "no label"."""
    labels = torch.tensor([255, 1, 2, 255])
    student = draw(4, 10)
    loss = kd_loss(student, STUDENT, labels=labels, ce_weight=1.0, ignore_index=255)
    assert_close(loss, kd_loss(student[1:3], STUDENT[1:3], labels=labels[1:3], ce_weight=1.0))


@pytest.mark.gpu
def test_tensors_on_different_devices() -> None:
    student = STUDENT.cuda()
    for name, options in {
        "teacher": {"teacher": STUDENT},
        "labels": {"labels": IDS},
        "temperature": {"temperature": torch.ones(())},
        "row_weights": {"row_weights": torch.ones(4)},
    }.items():
        with pytest.raises(ValueError, match=rf"{name} (is )?on cpu"):
            kd_loss(**{"student": student, "teacher": student} | options)


# instruction sets and backends, each in a process of its own


def python(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code outside the checkout."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("VITKD_FAST_")}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=kept | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def assert_matches_again(cwd: Path, marked: str, **environment: str) -> None:
    arguments = [__file__, "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    arguments += [
        "-q",
        "--tb=line",
        "-p",
        "no:cacheprovider",
        "-k",
        "match or extreme",
        "-m",
        marked,
    ]
    code = f"import sys, pytest; sys.exit(pytest.main({arguments!r}))"
    result = python(code, cwd, **environment)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert " passed" in result.stdout


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_every_instruction_set(isa: str, tmp_path: Path) -> None:
    if isa not in int8.isa():
        pytest.skip(f"{isa} is not among what this CPU has: {', '.join(int8.isa())}")
    if isa == int8.isa()[0] or (isa == "avx512" and int8.isa()[0] in ("avx512vnni", "amx")):
        pytest.skip(f"the tests above ran on the kernels of {isa}")
    assert_matches_again(tmp_path, "not gpu", VITKD_FAST_ISA=isa)


def test_reference_backend(tmp_path: Path) -> None:
    code = "from vitkd_fast import _ops as o; print({*map(str, o.backends().values())})"
    result = python(code, tmp_path, VITKD_FAST_BACKEND="reference")
    everywhere = {"CPU": "reference", "CUDA": "reference"}
    assert result.stdout == f"{ ({str(everywhere)})!r}\n", result.stderr
    assert_matches_again(tmp_path, "not gpu", VITKD_FAST_BACKEND="reference")


@pytest.mark.parametrize(
    "backend", ["reference", pytest.param("triton", marks=pytest.mark.triton), "cuda"]
)
@pytest.mark.gpu
def test_backends_on_a_gpu(backend: str, tmp_path: Path) -> None:
    """Each that this build has, also those that another one usually stands in for."""
    name = {"reference": "reference", "triton": "Triton", "cuda": "CUDA C++"}[backend]
    if name == _ops.backends()["kd_fwd"]["CUDA"]:
        pytest.skip(f"the tests above ran on {name}")
    code = "from vitkd_fast import _ops; print({on['CUDA'] for on in _ops.backends().values()})"
    served = python(code, tmp_path, VITKD_FAST_BACKEND=backend)
    if backend == "cuda" and "has no CUDA C++ kernel in this build" in served.stderr:
        pytest.skip("the extension was built without CUDA")
    if backend == "triton":
        pytest.importorskip("triton")
    assert served.stdout == f"{{{name!r}}}\n", served.stderr
    assert_matches_again(tmp_path, "gpu", VITKD_FAST_BACKEND=backend)


def test_backend_is_checked(tmp_path: Path) -> None:
    result = python("import vitkd_fast.functional", tmp_path, VITKD_FAST_BACKEND="nonsense")
    assert result.returncode == 1
    assert result.stderr.endswith(
        "ValueError: VITKD_FAST_BACKEND='nonsense'; accepted are reference, triton and cuda\n"
    )


def test_backend_that_was_not_built_says_so(tmp_path: Path) -> None:
    if _ops.backends()["kd_fwd"]["CUDA"] == "CUDA C++":
        pytest.skip("the extension was built with CUDA")
    result = python("import vitkd_fast.functional", tmp_path, VITKD_FAST_BACKEND="cuda")
    assert result.returncode == 1
    assert "ImportError: VITKD_FAST_BACKEND=cuda: kd_fwd has no CUDA C++ kernel" in result.stderr
    assert "VITKD_FAST_CUDA=1" in result.stderr


# what only a GPU has


def on_gpu(*shape: int, **options: Any) -> tuple[Tensor, Tensor]:
    student, teacher = pair(*shape, device="cuda", **options)
    return student.requires_grad_(), teacher


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "reduction"), PATHS, ids=str)
@pytest.mark.parametrize(("shape", "class_dim"), FORMS.values(), ids=FORMS)
def test_cuda_graph(
    shape: tuple[int, ...], class_dim: int, dtype: torch.dtype, reduction: str
) -> None:
    """Forward and backward replayed, while logits, labels, lam and temperature change."""
    student, teacher = on_gpu(*shape, dtype=dtype)
    a, b = (x.requires_grad_(False) for x in on_gpu(*shape))
    rows = Rows([n for i, n in enumerate(shape) if i != class_dim % len(shape)], 10, "cuda")
    temperature, lam = rows.number(4.0), rows.number(0.3)
    labels = rows.labels(), rows.labels(-100)
    options = {"temperature": temperature, "labels": (*labels, lam), "ce_weight": 0.5}

    def step() -> tuple[Tensor, Tensor]:
        loss = kd_loss(student, teacher, class_dim=class_dim, reduction=reduction, **options)
        return loss.detach(), torch.autograd.grad(loss.sum(), student)[0]

    graph, (loss, grad) = captured(step)

    for i, (new_temperature, new_lam) in enumerate([(4.0, 0.3), (0.5, 0.9), (20.0, 0.0)]):
        with torch.no_grad():
            temperature.fill_(new_temperature)
            lam.fill_(new_lam)
            student.copy_(a.roll(i, 0))
            teacher.copy_(b.roll(i, class_dim))
            labels[0].copy_(rows.labels())
        graph.replay()
        given = loss.clone(), grad.clone()
        want = step()
        assert given[0].isfinite().all()
        assert torch.equal(given[0], want[0])
        assert torch.equal(given[1], want[1])


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "reduction"), PATHS, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_no_host_synchronisation(name: str, dtype: torch.dtype, reduction: str) -> None:
    student, teacher = on_gpu(21, 40, dtype=dtype)
    options = options_for(name, student) | {"reduction": reduction}
    factor = torch.tensor(3.0, device="cuda")

    def step() -> None:
        torch.autograd.grad((kd_loss(student, teacher, **options) * factor).sum(), student)

    step()  # compiles, loads and allocates what may synchronise the first time
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.gpu
def test_on_a_stream_of_its_own() -> None:
    """The current stream is used, after what is queued there."""
    student, teacher = on_gpu(512, 1000)
    want = loss_and_grad(student, teacher)
    late = torch.full_like(student, NAN)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(student.detach())
        given = loss_and_grad(late, teacher)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(given[0], want[0])
    assert torch.equal(given[1], want[1])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "class_dim"), [((4096, 1000), -1), ((16, 200_000), -1), ((4, 150, 64, 64), 1)]
)
def test_memory_is_linear_in_the_rows(shape: tuple[int, ...], class_dim: int) -> None:
    """Nothing of the logits' size beside the gradient: 64 bytes per row, and 64 KB."""
    if _ops.backends()["kd_fwd"]["CUDA"] == "reference":
        pytest.skip("the reference materialises what it likes")
    student, teacher = on_gpu(*shape)
    options = {"class_dim": class_dim, "temperature": 4.0}
    torch.cuda.synchronize()

    def peak(function: Callable[[], Any]) -> int:
        function()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before

    beside = 2**16 + 64 * (student.numel() // shape[class_dim])
    grad = student.numel() * student.element_size()
    assert beside < grad / 2
    assert peak(lambda: kd_loss(student.detach(), teacher, **options)) <= beside
    for reduction in ("mean", "none"):
        function = partial(loss_and_grad, student, teacher, reduction=reduction, **options)
        assert peak(function) <= grad + beside


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 3])
def test_a_million_classes(rows: int) -> None:
    student, teacher = on_gpu(rows, 1_000_000)
    check(student, teacher, **options_for("everything", student))


@pytest.mark.gpu
def test_offsets_beyond_int32() -> None:
    """2^31 elements and a bit: the last rows are where they belong."""
    rows, classes = 2**31 // 21841 + 2, 21841
    if torch.cuda.mem_get_info()[0] < 5 * 2 * rows * classes:
        pytest.skip("needs 20 GiB of GPU memory")
    student = torch.zeros(rows, classes, dtype=BFLOAT, device="cuda")
    teacher = torch.zeros_like(student)
    ends = pair(4, classes, dtype=BFLOAT, device="cuda")
    for x, end in zip((student, teacher), ends, strict=True):
        x[:2], x[-2:] = end[:2], end[2:]
    loss, grad = loss_and_grad(student, teacher, temperature=4.0, reduction="none")
    want, want_grad = loss_and_grad(*ends, temperature=4.0, reduction="none")
    assert_close(torch.cat([loss[:2], loss[-2:]]), want)
    assert_close(torch.cat([grad[:2], grad[-2:]]), want_grad)
    assert (loss[2:-2] == 0).all()


LABEL_99 = """
import torch
from vitkd_fast.functional import kd_loss
x = torch.zeros(4, 10, device="cuda", requires_grad=True)
labels = torch.tensor([0, 99, 2, 3], device="cuda")
kd_loss(x, x.detach(), labels=labels, ce_weight=1.0).backward()
torch.cuda.synchronize()
"""


@pytest.mark.gpu
def test_label_out_of_range_asserts_on_the_device(tmp_path: Path) -> None:
    """CUDA C++ names the operation; in a process of its own, whose context does not survive."""
    if _ops.backends()["kd_fwd_grad"]["CUDA"] != "CUDA C++":
        pytest.skip("CUDA tensors are not served by CUDA C++")
    result = python(LABEL_99, tmp_path)
    assert result.returncode != 0
    assert "kd_loss" in "".join(line for line in result.stderr.splitlines() if "ssert" in line)


@pytest.mark.gpu
@pytest.mark.triton
def test_label_out_of_range_gives_nan_in_triton(tmp_path: Path) -> None:
    if _ops.backends()["kd_fwd"]["CUDA"] != "Triton":
        pytest.skip("CUDA tensors are not served by Triton")
    student, teacher = on_gpu(4, 10)
    labels = torch.tensor([0, 99, -1, 3], device="cuda")
    for options in ({"ce_weight": 1.0}, {"ce_weight": 0.0}, {"ce_weight": 1.0, "kd_weight": 0.0}):
        loss = kd_loss(student, teacher, labels=labels, reduction="none", **options)
        assert loss.isnan().tolist() == [False, True, True, False]
        assert kd_loss(student, teacher, labels=labels, **options).isnan()
    mixed = torch.tensor([0, 1, 2, 3], device="cuda")
    for pair_of in ((mixed, labels, 0.5), (labels, mixed, 0.5)):
        loss = kd_loss(student, teacher, labels=pair_of, ce_weight=1.0, reduction="none")
        assert loss.isnan().tolist() == [False, True, True, False]


@pytest.mark.gpu
def test_temperature_that_is_not_positive_gives_nan_on_a_gpu() -> None:
    """No error: that would wait for the device."""
    student, teacher = on_gpu(4, 40)
    temperature = torch.tensor([4.0, 0.0, -1.0, NAN], device="cuda")
    loss = kd_loss(student, teacher, temperature=temperature, reduction="none")
    assert loss.isnan().tolist() == [False, True, True, True]


@needs_gpu_or_emulator
class TestSanitize:
    """Every way through the kernels once, small enough for compute-sanitizer."""

    @pytest.mark.parametrize("name", MAIN_OPTIONS)
    @pytest.mark.parametrize(
        ("shape", "class_dim"),
        [((3, 10), -1), ((2, 33), -1), ((2, 1001), -1), ((1, 5000), -1), ((1, 70001), -1),
         ((1, 300_001), -1), ((2, 5, 3, 3), 1), ((1, 40, 1, 37), 1), ((1, 1), -1)],
        ids=str,
    )  # fmt: skip
    @pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
    def test_values(
        self, dtype: torch.dtype, shape: tuple[int, ...], class_dim: int, name: str
    ) -> None:
        student, teacher = pair(*shape, dtype=dtype, device=GPU)
        options = options_for(name, student, class_dim)
        for reduction in REDUCTIONS:
            loss, grad = loss_and_grad(student, teacher, reduction=reduction, **options)
            assert loss.isfinite().all()
            assert grad.isfinite().all()

    @pytest.mark.parametrize("layout", DENSE_LAYOUTS)
    def test_layouts(self, layout: str) -> None:
        """Strided and unaligned tensors, whose ends no load may pass."""
        new = partial(draw, dtype=HALF, device=GPU)
        student, teacher = DENSE_LAYOUTS[layout](new), DENSE_LAYOUTS["contiguous"](new)
        for reduction in ("mean", "none"):
            loss, grad = loss_and_grad(student, teacher, class_dim=1, reduction=reduction)
            assert loss.isfinite().all()
            assert grad.isfinite().all()

    @pytest.mark.parametrize("offset", [1, 3, 7])
    def test_unaligned_rows(self, offset: int) -> None:
        student, teacher = (draw(4 * 1001 + offset, dtype=HALF, device=GPU) for _ in range(2))
        student, teacher = (x[offset:].view(4, 1001) for x in (student, teacher))
        loss, grad = loss_and_grad(student, teacher)
        assert loss.isfinite()
        assert grad.isfinite().all()

    def test_empty(self) -> None:
        loss, grad = loss_and_grad(*pair(0, 10, device=GPU))
        assert loss == 0
        assert grad.shape == (0, 10)
