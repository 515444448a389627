"""kd_loss in tests: options and logits to call it with, and what its results may be off by."""

import math
import os
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from support.triton_tools import INTERPRETED
from vitkd_fast import reference
from vitkd_fast.functional import kd_loss

OPS = torch.ops.vitkd_fast
REDUCTIONS = {"mean": reference.MEAN, "sum": reference.SUM, "none": reference.NONE}
INF, NAN = torch.inf, torch.nan
HALF, BFLOAT, FLOAT, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64

every_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
)
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


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
    if os.environ.get("VITKD_FAST_ISA") == "scalar":
        scale *= math.sqrt(2)  # it rounds products and sums, torch's FMAs only sums
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
        # a row is rounded, and so are its share of a mean and the row times it; in the end, the sum
        roundings_of = {"none": 1, "sum": 2, "mean": 3}
        # Triton's powers are of 2, so that logits are multiplied by log2(e), and a loss by log(2)
        rounding = precision / 2 * (roundings_of[reduction] + 2 * INTERPRETED)
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


# what more than one file takes

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
FORMS = {"few": ((12, 10), -1), "row": ((3, 1001), -1), "long": ((2, 5000), -1),
         "dense": ((2, 13, 5, 7), 1)}  # fmt: skip
temperatures = pytest.mark.parametrize("temperature", [0.1, 1.0, 4.0, 20.0])
PATHS = [(FLOAT, "mean"), (FLOAT, "none"), (HALF, "mean"), (BFLOAT, "sum"), (DOUBLE, "mean")]
