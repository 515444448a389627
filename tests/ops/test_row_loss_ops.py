"""The operations behind the row losses, on every backend, against the float64 reference.

Torch's own error is that of the reference in float32. The losses' own tests call the same
operations through their functions.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from support.kd_tools import (
    BFLOAT,
    DENSE_LAYOUTS,
    DOUBLE,
    FLOAT,
    HALF,
    INF,
    NAN,
    OPS,
    Rows,
    assert_within,
    draw,
    every_device,
    pair,
)
from vitkd_fast import _ops, reference
from vitkd_fast.reference import row_loss as spec

pytestmark = pytest.mark.usefixtures("one_thread")

DIVERGENCES = reference.DIVERGENCES
LABELLED = ["dkd", "ofa"]
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)

OPTIONS: dict[str, Callable[[Rows], dict[str, Any]]] = {
    "plain": lambda r: {"temperature": 4.0},
    "standardized": lambda r: {"standardize": True, "temperature": 2.0},
    "temperature": lambda r: {
        "temperature_rows": r.numbers(0.5, 20.0), "wants_temperature": True, "kd_weight": 0.7,
    },
    "everything": lambda r: {
        "temperature_rows": r.numbers(0.5, 20.0), "wants_temperature": True, "standardize": True,
        "kd_weight": 0.7, "ce_weight": 0.3, "labels": r.labels(-7), "labels_b": r.labels(),
        "lam_rows": r.numbers(0.0, 1.0), "label_smoothing": 0.2, "ignore_index": -7,
        "row_weights": r.weights(),
    },
    "cross_entropy": lambda r: {"labels": r.labels(), "kd_weight": 0.0, "ce_weight": 1.0},
}  # fmt: skip


def options_for(
    name: str, divergence: str, logits: Tensor, class_dim: int = 1, reduction: int = reference.MEAN
) -> spec.RowLossOptions:
    shape = list(logits.shape)
    classes = shape.pop(class_dim)
    rows = Rows(shape, classes, str(logits.device))
    options = {"temperature": 1.0, "kd_weight": 1.0, "alpha": 0.8} | OPTIONS[name](rows)
    options["beta"] = {"js": 0.3, "dkd": 2.0, "ofa": 1.5}.get(divergence, 1.0)
    if divergence in LABELLED:
        options.setdefault("labels", rows.labels())
        options["labels_b"] = options["lam_rows"] = None
    return spec.RowLossOptions(
        DIVERGENCES[divergence], class_dim=class_dim, reduction=reduction, **options
    )


def in_dtype(o: spec.RowLossOptions, dtype: torch.dtype) -> spec.RowLossOptions:
    """The options with their numbers of rows in an accumulation type."""
    floating = {
        name: x.to(dtype)
        for name, x in o._asdict().items()
        if isinstance(x, Tensor) and x.is_floating_point()
    }
    return o._replace(**floating)


def torch_errors(student: Tensor, teacher: Tensor, o: spec.RowLossOptions) -> list[float]:
    """Of rows' losses on max(1, |loss|), and of their gradients; the largest of several draws."""
    errors = [[], [], []]
    for scale in torch.linspace(1, 1.1, 8).tolist():
        s, t = (scale * x.detach().float() for x in (student, teacher))
        given = spec._rows(s, t, o)
        want = spec._rows(s.double(), t.double(), in_dtype(o, DOUBLE))
        sizes = [want[0].abs().clamp(min=1), 1.0, want[2].abs().clamp(min=1)]
        for errors_of, x, y, size in zip(errors, given, want, sizes, strict=False):
            errors_of.append(((x.double() - y).abs() / size).nan_to_num(0, 0).max().item())
    return [max(of) for of in errors]


def check(
    student: Tensor, teacher: Tensor, o: spec.RowLossOptions,
    like: tuple[Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    """All three operations: the error is at most twice torch's in float32, and some roundings.

    Args:
        like: logits on which torch's error is taken, where these give it NaN.
    """
    wide = DOUBLE if student.dtype == DOUBLE else FLOAT
    o = in_dtype(o, wide)
    precision = torch.finfo(wide).eps
    scale = (3 if wide == DOUBLE else 2) * precision / torch.finfo(FLOAT).eps
    classes = student.shape[o.class_dim]
    loss_error, grad_error, d_error = torch_errors(
        *(like or (student, teacher)), in_dtype(o, FLOAT)
    )
    loss_error = scale * loss_error + 2 * precision
    grad_error = scale * max(grad_error, torch.finfo(FLOAT).eps / 2 / classes)
    d_error = scale * d_error + 4 * precision

    s, t, exact = student.detach().double(), teacher.detach().double(), in_dtype(o, DOUBLE)
    share = spec._shares(exact, s.movedim(o.class_dim, -1))
    rounding = torch.finfo(student.dtype).eps
    _, _, d_rows, _ = spec._rows(s, t, exact)

    def compare(given: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], by: Tensor) -> None:
        (grad, d_given), (grad_want, d_want) = given, want
        assert (grad.dtype, grad.shape) == (student.dtype, student.shape)
        assert grad.stride() == torch.empty_like(student).stride()
        smallest = torch.finfo(student.dtype).smallest_normal
        factor = by.abs().unsqueeze(o.class_dim)
        allowed = grad_error * factor + rounding * grad_want.abs().clamp(min=smallest)
        assert_within(allowed, grad, grad_want, "gradient")
        assert (d_given.dtype, d_given.shape) == (wide, d_want.shape)
        if o.wants_temperature:
            allowed = d_error * by.abs() * d_rows.abs().clamp(min=1)
            assert_within(allowed, d_given, d_want, "temperature")

    for reduction in (reference.MEAN, reference.NONE):
        o, exact = o._replace(reduction=reduction), exact._replace(reduction=reduction)
        share = spec._shares(exact, s.movedim(o.class_dim, -1))
        want = spec.row_loss_fwd(s, t, *exact)
        size = torch.where(want.isinf(), 1.0, want.abs())
        size = size.maximum(share if reduction == reference.NONE else share.sum())
        given = OPS.row_loss_fwd(student, teacher, *o)
        assert (given.dtype, given.shape) == (wide, want.shape)
        assert_within(loss_error * size, given, want, "loss")
        if reduction == reference.MEAN:
            loss, *grads = OPS.row_loss_fwd_grad(student, teacher, *o)
            assert torch.equal(loss.nan_to_num(7), given.nan_to_num(7))
            compare(grads, spec.row_loss_bwd(torch.ones_like(want), s, t, *exact), share)
        else:
            incoming = draw(*want.shape, dtype=wide, device=str(student.device))
            grads = OPS.row_loss_bwd(incoming, student, teacher, *o)
            want = spec.row_loss_bwd(incoming.double(), s, t, *exact)
            compare(grads, want, share * incoming)


@pytest.mark.emulated
@pytest.mark.interpreted(name=["plain", "temperature", "everything"])
@every_device
@pytest.mark.parametrize("name", OPTIONS)
@every_divergence
def test_options_match(divergence: str, name: str, device: str) -> None:
    student, teacher = pair(5, 19, device=device)
    check(student, teacher, options_for(name, divergence, student))


# rows of one tile, and of more; those whose classes are not next to one another
SHAPES = [((2, 1001), 1), ((2, 5000), 1), ((1, 70000), 1), ((3, 2), 1), ((2, 13, 5, 7), 1),
          ((2, 300, 3), 1), ((7,), 0), ((2, 3, 17), 2)]  # fmt: skip


@pytest.mark.emulated(shape=[(2, 1001), (2, 300, 3)])
@pytest.mark.interpreted(
    shape=[(2, 5000), (2, 13, 5, 7)], divergence=["js", "dkd"], name=["everything"]
)
@every_device
@pytest.mark.parametrize("name", ["plain", "everything"])
@pytest.mark.parametrize(("shape", "class_dim"), SHAPES, ids=str)
@every_divergence
def test_shapes_match(
    divergence: str, shape: tuple[int, ...], class_dim: int, name: str, device: str
) -> None:
    student, teacher = pair(*shape, device=device)
    check(student, teacher, options_for(name, divergence, student, class_dim))


DTYPES = [(HALF, HALF), (BFLOAT, BFLOAT), (BFLOAT, FLOAT), (FLOAT, HALF), (DOUBLE, DOUBLE)]


@pytest.mark.emulated(shape=[(32, 300)], divergence=["js", "dkd"])
@pytest.mark.interpreted(
    shape=[(16, 40, 3)], divergence=["js"], dtypes=[(BFLOAT, FLOAT), (HALF, HALF), (DOUBLE, DOUBLE)]
)
@every_device
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(32, 300), (16, 40, 3)], ids=str)
@every_divergence
def test_dtypes_match(
    divergence: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype], device: str
) -> None:
    dtype, of_teacher = dtypes
    student, teacher = pair(*shape, dtype=dtype, teacher=of_teacher, device=device)
    check(student, teacher, options_for("everything", divergence, student))


@pytest.mark.emulated
@pytest.mark.interpreted(layout=["channels_last", "every_other_class", "batch_last"])
@every_device
@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
def test_layouts_match(layout: str, device: str) -> None:
    """Of the student, and of the teacher beside another."""

    def new(*shape: int) -> Tensor:
        return draw(*shape, device=device)

    student, teacher = DENSE_LAYOUTS[layout](new), draw(2, 11, 4, 6, device=device)
    o = in_dtype(options_for("everything", "js", student), FLOAT)
    exact = in_dtype(o, DOUBLE)
    for s, t in ((student, teacher), (teacher, student)):
        given = OPS.row_loss_fwd_grad(s, t, *o)
        want = reference.row_loss_fwd_grad(s.double(), t.double(), *exact)
        for x, y in zip(given, want, strict=True):
            assert_close(x.double(), y, rtol=1e-4, atol=1e-6)
        assert given[1].stride() == torch.empty_like(s).stride()


@pytest.mark.emulated
@pytest.mark.interpreted(shape=[(3, 10)])
@every_device
@pytest.mark.parametrize("shape", [(3, 10), (2, 5000)], ids=str)
@every_divergence
def test_equal_logits_give_0(divergence: str, shape: tuple[int, int], device: str) -> None:
    """Exactly, but for ofa, which is not a distance."""
    if _ops.backends()["row_loss_fwd"][device.upper()] == "reference":
        pytest.skip("the reference rounds its sums")
    logits = draw(*shape, device=device)
    for name in ("plain", "standardized", "temperature"):
        o = options_for(name, divergence, logits)
        loss, grad, d_temperature = OPS.row_loss_fwd_grad(logits, logits, *o)
        if divergence == "ofa":
            assert loss > 0
        else:
            assert loss == 0
            assert not grad.any()
            assert not d_temperature.any()


@pytest.mark.emulated
@pytest.mark.interpreted
@every_device
@every_divergence
def test_extreme_logits_match(divergence: str, device: str) -> None:
    """Saturated softmaxes, logits far from 0, and one class far above the others."""
    student, teacher = pair(6, 21, device=device)
    student[0, 3], teacher[0, 3] = 1e4, 1e4
    student[1, 4], teacher[1, 5] = 1e4, 1e4
    student[2] += 1e4
    teacher[2] -= 1e4
    student[3] *= 50
    teacher[3] *= 50
    student[4], teacher[4] = 3.0, -2.0
    o = options_for("plain", divergence, student)
    if o.labels is not None:
        o.labels[:2] = torch.tensor([3, 4])
    check(student, teacher, o)


@pytest.mark.emulated
@pytest.mark.interpreted
@every_device
@every_divergence
def test_masked_classes_match(divergence: str, device: str) -> None:
    """-inf in the teacher, in both, and in the student: infinite for those that are."""
    student, teacher = pair(4, 9, device=device)
    teacher[:2, 2] = -INF
    student[1, 2] = -INF
    o = options_for("plain", divergence, student)
    o = o._replace(labels=None if o.labels is None else torch.full_like(o.labels, 1))
    want = spec.row_loss_fwd(student.double(), teacher.double(), *o._replace(reduction=0))
    given = OPS.row_loss_fwd(student, teacher, *o._replace(reduction=reference.NONE))
    assert torch.equal(want.isinf(), given.isinf())
    assert want.isinf().tolist() == [divergence == "reverse_kl", False, False, False]
    finite = slice(1, None) if divergence == "reverse_kl" else slice(None)
    o = o._replace(labels=None if o.labels is None else o.labels[finite])
    masked = [x[finite] for x in (student, teacher)]
    check(*masked, o, like=tuple(x.clamp(min=-9) for x in masked))
    student[:, 3] = -INF
    want = spec.row_loss_fwd(student.double()[finite], teacher.double()[finite], *o)
    given = OPS.row_loss_fwd(student[finite], teacher[finite], *o)
    assert want.isinf() == given.isinf() == (divergence in ("kl", "dkd", "ofa"))


@pytest.mark.emulated
@pytest.mark.interpreted
@every_device
@pytest.mark.parametrize("divergence", ["js", "dkd"])
def test_ignored_rows_are_not_looked_at(divergence: str, device: str) -> None:
    student, teacher = pair(6, 12, device=device)
    o = options_for("everything", divergence, student)
    assert o.labels is not None
    assert o.row_weights is not None
    of_none = (o.labels == -7) | (o.row_weights == 0)
    assert of_none.any()
    assert not of_none.all()
    want = OPS.row_loss_fwd_grad(student, teacher, *o)
    student[of_none], teacher[of_none] = NAN, NAN
    for x, y in zip(OPS.row_loss_fwd_grad(student, teacher, *o), want, strict=True):
        assert torch.equal(x, y)
    assert not want[1][of_none].any()
    assert not want[2][of_none].any()
    o = o._replace(labels=torch.full_like(o.labels, -7))
    loss, grad, d_temperature = OPS.row_loss_fwd_grad(student, teacher, *o)
    assert loss == 0
    assert not grad.any()
    assert not d_temperature.any()


@pytest.mark.emulated
@pytest.mark.interpreted
@every_device
def test_mean_over_many_rows_matches(device: str) -> None:
    """More than a program adds up by itself."""
    student, teacher = pair(600, 2, device=device)
    o = options_for("cross_entropy", "tv", student)
    o = o._replace(labels=o.labels.where(torch.arange(600, device=device) % 3 > 0, -100))
    want = spec.row_loss_fwd(student.double(), teacher.double(), *o)
    assert abs(OPS.row_loss_fwd(student, teacher, *o) - want) < 4e-7 * want


@pytest.mark.emulated
@pytest.mark.interpreted
@every_device
def test_empty(device: str) -> None:
    shape = (0, 5)
    student, teacher = pair(*shape, device=device)
    o = options_for("temperature", "js", student)._replace(reduction=reference.SUM)
    loss, grad, d_temperature = OPS.row_loss_fwd_grad(student, teacher, *o)
    assert loss == 0
    assert grad.shape == shape
    assert d_temperature.shape == shape[:1]


@pytest.mark.emulated
@every_device
def test_twice_gives_the_same_bits(device: str) -> None:
    student, teacher = pair(3, 5000, device=device)
    o = options_for("everything", "dkd", student)
    for x, y in zip(*(OPS.row_loss_fwd_grad(student, teacher, *o) for _ in range(2)), strict=True):
        assert torch.equal(x, y)
