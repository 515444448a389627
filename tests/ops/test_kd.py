"""kd_loss and the operations under it: values and gradients.

They are compared with the reference in float64 on the same rounded inputs. What is allowed there
comes from torch's own functions in float32 (see `kd_tools.check`); it is never tuned.
The tests also run once per instruction set of the host, and on the reference backend
(test_kd_backends.py).
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from support.kd_tools import (
    BFLOAT,
    DENSE_LAYOUTS,
    DOUBLE,
    FLOAT,
    FORMS,
    HALF,
    INF,
    MAIN_OPTIONS,
    NAN,
    OPS,
    OPTIONS,
    REDUCTIONS,
    Rows,
    check,
    draw,
    every_device,
    every_reduction,
    loss_and_grad,
    operation_options,
    options_for,
    pair,
    temperatures,
    torch_rows,
)
from vitkd_fast import reference
from vitkd_fast.functional import kd_loss

pytestmark = [pytest.mark.every_isa, pytest.mark.usefixtures("one_thread")]


# against the reference


@pytest.mark.emulated(name=["plain", "everything"])
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
    ((2, 40, 9, 5), 1), ((37, 150), -1), ((130, 21), -1),
]  # fmt: skip


@pytest.mark.emulated(
    shape=[
        (5, 1001), (2, 70000), (64, 128), (37, 150), (130, 21), (2, 40, 9, 5), (2, 150, 9, 16),
        (11, 4, 6),
    ]
)  # fmt: skip
@pytest.mark.interpreted(shape=[(5, 1001), (1, 65536)])
@every_device
@pytest.mark.parametrize(("shape", "class_dim"), SHAPES, ids=str)
def test_shapes_match(shape: tuple[int, ...], class_dim: int, device: str) -> None:
    student, teacher = pair(*shape, device=device)
    for name in MAIN_OPTIONS:
        check(student, teacher, **options_for(name, student, class_dim))


@pytest.mark.emulated
@every_device
@pytest.mark.parametrize(
    ("dtype", "shape", "class_dim"),
    [
        (DOUBLE, (2, 8193, 4), 1), (FLOAT, (2, 16387, 3), 1), (BFLOAT, (1, 32771, 2), 1),
        (DOUBLE, (2, 8195), -1), (FLOAT, (2, 16387), -1),
    ],
    ids=str,
)  # fmt: skip
def test_long_rows_match(
    dtype: torch.dtype, shape: tuple[int, ...], class_dim: int, device: str
) -> None:
    """Of more than 64 KB: on a GPU a block takes all the shared memory that it may have."""
    student, teacher = pair(*shape, dtype=dtype, device=device)
    check(student, teacher, **options_for("everything", student, class_dim))


@pytest.mark.emulated(temperature=[0.5])
@every_device
@pytest.mark.parametrize("dtype", [FLOAT, HALF, BFLOAT], ids=str)
@pytest.mark.parametrize("temperature", [0.5, 4.0])
@pytest.mark.parametrize("shape", [(2, 1001), (1, 2500)], ids=str)
def test_rising_logits_match(
    shape: tuple[int, ...], temperature: float, dtype: torch.dtype, device: str
) -> None:
    """Sorted ones: each of a row is a new maximum, by little or by much."""
    for reach in (3.0, 60.0):
        student, teacher = (
            (reach * x).sort(-1).values.to(dtype) for x in pair(*shape, device=device)
        )
        options = options_for("labels", student) | {"temperature": temperature}
        check(student, teacher, **options)
        check(student, teacher.flip(-1), **options)


@pytest.mark.emulated(shape=[(8, 1001), (2, 13, 5, 7)])
@pytest.mark.interpreted(shape=[(2, 13, 5, 7)])
@every_device
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(
    ("shape", "class_dim"), [((21, 10), -1), ((8, 1001), -1), ((2, 13, 5, 7), 1)], ids=str
)
def test_options_match(shape: tuple[int, ...], class_dim: int, name: str, device: str) -> None:
    student, teacher = pair(*shape, device=device)
    check(student, teacher, **options_for(name, student, class_dim))


@pytest.mark.emulated(shape=[(3, 1001)])
@pytest.mark.interpreted(shape=[(21, 10), (2, 40, 3, 7)])
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


@pytest.mark.emulated
@pytest.mark.interpreted(layout=["rows_apart", "expanded_rows", "channels_last"], dtype=[FLOAT])
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


@pytest.mark.emulated(name=["plain", "everything"])
@pytest.mark.interpreted(name=["plain", "everything"])
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


@pytest.mark.emulated
@pytest.mark.interpreted
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
        (new(40), lambda x: x[3:38]),
        (new(9), lambda x: x[5:7]),
    ):
        want = whole.clone()
        part(want).copy_((part(want).to(wide) * by).to(dtype))
        assert OPS.kd_scale_(part(whole), by) is None
        assert torch.equal(whole, want)


@pytest.mark.emulated
@pytest.mark.interpreted
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


@pytest.mark.emulated
@pytest.mark.interpreted
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


@pytest.mark.interpreted
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

every_form = pytest.mark.parametrize(("shape", "class_dim"), FORMS.values(), ids=FORMS)


@pytest.mark.emulated(shape=[FORMS["few"][0]])
@pytest.mark.interpreted(shape=[FORMS["few"][0], FORMS["long"][0]], temperature=[4.0])
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


@pytest.mark.emulated(shape=[FORMS["few"][0]])
@pytest.mark.interpreted(shape=[FORMS["row"][0], FORMS["long"][0]], temperature=[0.1])
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


@pytest.mark.emulated(shape=[FORMS["few"][0]])
@pytest.mark.interpreted(shape=[FORMS["row"][0], FORMS["long"][0]], temperature=[0.1])
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


@pytest.mark.emulated(shape=[FORMS["few"][0]])
@pytest.mark.interpreted(shape=[FORMS["row"][0]])
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


@pytest.mark.emulated(shape=[FORMS["few"][0]])
@pytest.mark.interpreted(shape=[FORMS["row"][0]])
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


@pytest.mark.emulated(shape=[FORMS["few"][0]])
@pytest.mark.interpreted(shape=[FORMS["few"][0]], dtype=[FLOAT, BFLOAT])
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


@pytest.mark.emulated(shape=[FORMS["few"][0]])
@pytest.mark.interpreted(shape=[FORMS["few"][0]], bad=[NAN])
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


@pytest.mark.emulated(shape=[FORMS["few"][0]])
@pytest.mark.interpreted(shape=[FORMS["few"][0]])
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


@pytest.mark.interpreted
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


# the same bits


@pytest.mark.emulated(name=["labels"])
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
