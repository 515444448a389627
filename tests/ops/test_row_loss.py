"""reverse_kl, js, tv, dkd and standardised losses: exactness, limits, temperatures, masks."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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
    OPTIONS,
    draw,
    every_device,
    every_reduction,
    options_for,
    pair,
    temperatures,
)
from support.row_loss_tools import LOSSES, NEW, check, labels_of, usual, with_gradients
from vitkd_fast import reference
from vitkd_fast.functional import dkd_loss, js_loss, kd_loss, reverse_kl_loss, tv_loss

pytestmark = pytest.mark.usefixtures("one_thread")

every_loss = pytest.mark.parametrize("name", NEW)
with_kl = pytest.mark.parametrize("name", LOSSES)
DTYPES = [FLOAT, HALF, BFLOAT, DOUBLE]


# against torch's own functions


@pytest.mark.every_isa
@every_device
@pytest.mark.parametrize("options", OPTIONS)
@every_loss
def test_every_option(name: str, options: str, device: str) -> None:
    student, teacher = pair(7, 40, device=device)
    check(name, student, teacher, **options_for(options, student))


@pytest.mark.every_isa
@every_device
@every_reduction
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@every_loss
def test_forms_and_dtypes(
    name: str, form: str, dtype: torch.dtype, reduction: str, device: str
) -> None:
    shape, class_dim = FORMS[form]
    student, teacher = pair(*shape, dtype=dtype, device=device)
    for options in MAIN_OPTIONS[1:]:
        given = options_for(options, student, class_dim)
        check(name, student, teacher, **given, reduction=reduction)


@pytest.mark.every_isa
@every_device
@pytest.mark.parametrize("classes", [2, 7, 32, 33, 64, 1000, 70_000])
@every_loss
def test_numbers_of_classes(name: str, classes: int, device: str) -> None:
    if classes == 2 and name == "kl_standardized":
        pytest.skip("two standardised classes are always the same two numbers")
    student, teacher = pair(3, classes, device=device)
    check(name, student, teacher, temperature=2.0)


@pytest.mark.every_isa
@every_device
@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
@every_loss
def test_layouts(name: str, layout: str, device: str) -> None:
    """Any strides give what their contiguous copy gives, but for the order of sums."""
    student, teacher = (DENSE_LAYOUTS[layout](partial(draw, device=device)) for _ in range(2))
    options = options_for("everything", student, 1)
    got = with_gradients(LOSSES[name], student, teacher, options)
    want = with_gradients(LOSSES[name], student.contiguous(), teacher.contiguous(), options)
    assert_close(got, want)
    assert got[1].stride() == torch.empty_like(student).stride()


@pytest.mark.every_isa
@every_device
@pytest.mark.parametrize("apart", [1e-3, 1e-2, 1.0, 100.0])
@pytest.mark.parametrize("beta", [0.25, 0.5, 0.75])
def test_js_at_any_distance(beta: float, apart: float, device: str) -> None:
    """A loss of second order near the teacher keeps its digits, also with masked classes."""
    _, teacher = pair(16, 1000, device=device)
    student = teacher + apart * draw(16, 1000, device=device)
    student[::2, 5] = teacher[::4, 7] = -math.inf
    student[:, 9] = teacher[:, 9] = -math.inf
    loss = js_loss(student, teacher, beta=beta, reduction="none")
    want = js_loss(student.double(), teacher.double(), beta=beta, reduction="none")
    assert_close(loss.double(), want, rtol=max(1e-5, 1e-6 / apart), atol=0)


@pytest.mark.every_isa
@every_device
@pytest.mark.parametrize("teacher_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_loss
def test_teacher_of_another_dtype(
    name: str, dtype: torch.dtype, teacher_dtype: torch.dtype, device: str
) -> None:
    student, teacher = pair(5, 40, dtype=dtype, teacher=teacher_dtype, device=device)
    wide = DOUBLE if DOUBLE in (dtype, teacher_dtype) else FLOAT
    (loss, grad), want = (
        with_gradients(LOSSES[name], s, teacher.to(wide), {"temperature": 3.0})
        for s in (student, student.to(wide))
    )
    assert_close(loss, want[0])
    assert_close(grad, want[1].to(dtype))


# temperatures with a gradient


@pytest.mark.every_isa
@every_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("of", ["all", "row"])
@with_kl
def test_learned_temperature(name: str, of: str, dtype: torch.dtype, device: str) -> None:
    student, teacher = pair(6, 40, dtype=dtype, device=device)
    for options in MAIN_OPTIONS:
        given = options_for(options, student)
        temperature = torch.tensor(3.0) if of == "all" else 0.7 + 4 * torch.rand(6)
        wide = DOUBLE if dtype == DOUBLE else FLOAT
        given["temperature"] = temperature.to(device, wide).requires_grad_()
        for reduction in ("mean", "none"):
            check(name, student, teacher, **given, reduction=reduction)


@every_device
@pytest.mark.parametrize("options", ["plain", "everything"])
@pytest.mark.parametrize("of", ["all", "row"])
@with_kl
def test_gradcheck_with_temperature(name: str, of: str, options: str, device: str) -> None:
    student, teacher = (3 * torch.randn(3, 6, dtype=DOUBLE, device=device) for _ in range(2))
    given = options_for(options, student)
    temperature = torch.tensor(2.0, dtype=DOUBLE) if of == "all" else 1 + torch.rand(3).double()
    leaves = (student.requires_grad_(), temperature.to(device).requires_grad_())
    for reduction in ("sum", "none"):

        def loss(s: Tensor, t: Tensor, reduction: str = reduction) -> Tensor:
            return LOSSES[name](s, teacher, **given | {"temperature": t, "reduction": reduction})

        assert torch.autograd.gradcheck(loss, leaves)


@every_device
def test_temperature_alone_is_learned(device: str) -> None:
    student, teacher = pair(4, 9, device=device)
    temperature = torch.tensor(2.0, device=device, requires_grad=True)
    loss = reverse_kl_loss(student, teacher, temperature=temperature)
    (given,) = torch.autograd.grad(loss, temperature)
    want = with_gradients(partial(usual, "reverse_kl"), student.double(), teacher.double(),
                          {"temperature": temperature.double()})[2]  # fmt: skip
    assert_close(given, want.float())


# what must hold exactly


@pytest.mark.every_isa
@every_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@temperatures
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [name for name in NEW if not name.startswith("ofa")])
def test_equal_student_and_teacher(
    name: str, form: str, temperature: float, dtype: torch.dtype, device: str
) -> None:
    shape, class_dim = FORMS[form]
    student = draw(*shape, dtype=dtype, device=device, scale=5.0)
    leaf = torch.tensor(temperature, device=device, requires_grad=True)
    options = {"temperature": leaf, "class_dim": class_dim}
    for x in with_gradients(LOSSES[name], student, student.clone(), options):
        assert (x == 0).all()


@pytest.mark.every_isa
@every_device
@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE], ids=str)
@pytest.mark.parametrize("form", FORMS)
@every_loss
def test_ignored_rows_are_not_looked_at(
    name: str, form: str, dtype: torch.dtype, device: str
) -> None:
    shape, class_dim = FORMS[form]
    student, teacher = pair(*shape, dtype=dtype, device=device)
    options = options_for("everything", student, class_dim)
    out = options["row_weights"] == 0
    out |= labels_of(student, options) == options["ignore_index"]
    bad = out.unsqueeze(class_dim).expand_as(student)
    options["temperature"].requires_grad_()
    want = with_gradients(LOSSES[name], student, teacher, options)
    student, teacher = (x.masked_fill(bad, NAN) for x in (student, teacher))
    got = with_gradients(LOSSES[name], student, teacher, options)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert (got[1][bad] == 0).all()
    assert (got[2][out] == 0).all()


@pytest.mark.every_isa
@every_device
@pytest.mark.parametrize("form", FORMS)
@every_loss
def test_teacher_without_weight_is_not_looked_at(name: str, form: str, device: str) -> None:
    shape, class_dim = FORMS[form]
    student, teacher = pair(*shape, device=device)
    options = options_for("labels_only", student, class_dim)
    options["temperature"] = torch.tensor(2.0, device=device, requires_grad=True)
    loss, grad, of_temperature = with_gradients(LOSSES[name], student, teacher * NAN, options)
    options["temperature"] = 2.0
    want = with_gradients(kd_loss, student, teacher, options)
    assert_close([loss, grad], want)
    assert of_temperature == 0


@pytest.mark.every_isa
@every_device
@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE], ids=str)
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("form", FORMS)
@every_loss
def test_nan_stays(name: str, form: str, side: str, dtype: torch.dtype, device: str) -> None:
    """In its row, and only there."""
    shape, class_dim = FORMS[form]
    logits = dict(
        zip(("student", "teacher"), pair(*shape, dtype=dtype, device=device), strict=True)
    )
    of_rows = logits[side].movedim(class_dim, -1)
    of_rows[(0,) * (of_rows.dim() - 2) + (1, 2)] = NAN
    options = {"class_dim": class_dim, "reduction": "none", "temperature": 2.0}
    loss, grad = with_gradients(LOSSES[name], *logits.values(), options)
    nan = torch.zeros(loss.numel(), dtype=torch.bool, device=device)
    nan[1] = True
    assert torch.equal(loss.flatten().isnan(), nan)
    grad = grad.movedim(class_dim, -1).reshape(-1, shape[class_dim])
    assert grad[1].isnan().any()
    assert grad[~nan].isfinite().all()


@pytest.mark.every_isa
@with_kl
def test_threads_change_nothing(name: str) -> None:
    student, teacher = pair(60, 1001)
    options = options_for("everything", student)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(with_gradients(LOSSES[name], student, teacher, options))
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


# masks and extremes


def exactly(name: str, student: Tensor, teacher: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Loss and gradient of the rows by the reference in float64."""
    kinds = {"reverse_kl": "reverse_kl", "js": "js", "js_0.1": "js", "tv": "tv"}
    number = {"js_0.1": 0.1, "js": 0.5, "ofa_1.5": 1.5, "ofa": 1.0}
    kind = kinds.get(name, name.split("_")[0])
    options = {"labels": labels_of(student, options)} | options
    o = reference.RowLossOptions(
        divergence=reference.DIVERGENCES[kind], kd_weight=1.0, class_dim=1,
        reduction=reference.NONE, beta=number.get(name, 8.0),
        standardize=name.endswith("standardized"), **options,
    )  # fmt: skip
    s, t = student.double(), teacher.double()
    loss, grad, _ = reference.row_loss_fwd_grad(s, t, *o)
    return loss, grad


MASKS = {
    "none": ([], []),
    "teacher": ([], [1, 4]),
    "both": ([2, 5], [2, 5]),
    "student": ([3], []),
    "student_of_more": ([2, 3], [2]),
    "apart": ([1], [6]),
}


@pytest.mark.every_isa
@every_device
@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT, DOUBLE], ids=str)
@pytest.mark.parametrize("classes", [10, 40])
@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("name", [name for name in NEW if not name.endswith("standardized")])
def test_masked_classes(
    name: str, masks: str, scale: float, classes: int, dtype: torch.dtype, device: str
) -> None:
    """Infinite where the reference is, and nowhere else; also where probabilities underflow."""
    student, teacher = (draw(9, classes, dtype=dtype, device=device, scale=scale) for _ in range(2))
    if name.startswith("ofa") and scale == 100 and MASKS[masks][0] and dtype != DOUBLE:
        pytest.skip("a teacher's probability that is 0 in float32 counts 0, and not in float64")
    for x, places in zip((student, teacher), MASKS[masks], strict=True):
        x[:, places] = -INF
    # of DKD, a label that is masked has no logit to decouple
    options = {"temperature": 2.0}
    labels = torch.full((9,), 7, device=device)
    want, want_grad = exactly(name, student, teacher, **options, labels=labels)
    loss, grad = with_gradients(
        LOSSES[name], student, teacher, options | {"labels": labels, "reduction": "none"}
    )
    finite = want.isfinite()
    assert torch.equal(loss.isfinite(), finite)
    assert torch.equal(loss[~finite].double(), want[~finite])
    assert_close(loss[finite].double(), want[finite], rtol=1e-5, atol=4e-5)
    rounding = torch.finfo(dtype).eps
    size = want[finite].max().item() if finite.any() else 1  # of the terms that a gradient adds up
    atol = 1e-6 * max(4, size)
    assert_close(grad[finite].double(), want_grad[finite], rtol=2 * rounding, atol=atol)


@pytest.mark.every_isa
@every_device
@pytest.mark.parametrize("scale", [100.0, 1e4])
@temperatures
@every_loss
def test_extreme_logits(name: str, temperature: float, scale: float, device: str) -> None:
    student, teacher = (draw(9, 100, device=device, scale=scale) for _ in range(2))
    student[0], teacher[1] = 1e4, -1e4
    student[2, 3] = teacher[2, 3] = 1e4  # they agree, and all else has underflowed
    if name.endswith("standardized"):
        student[0, 1] = teacher[1, 1] = 0  # what is constant has no deviation
    options = {"temperature": temperature}
    want, want_grad = exactly(name, student, teacher, **options)
    loss, grad = with_gradients(LOSSES[name], student, teacher, options | {"reduction": "none"})
    assert_close(loss.double(), want, rtol=1e-5, atol=1e-5 * temperature**2)
    size = max(1, want.max().item() / temperature**2)  # of the terms that a gradient adds up
    assert_close(grad.double(), want_grad, rtol=1e-5, atol=1e-5 * temperature * size)


# identities

logits = st.integers(0, 2**32 - 1).map(
    lambda seed: [
        (torch.randn(4, 12, generator=torch.Generator().manual_seed(seed + i), dtype=DOUBLE)
         * (1 + seed % 7)).float()
        for i in range(2)
    ]
)  # fmt: skip
scaled = st.floats(0.5, 8.0)
hypothesis = settings(max_examples=25, deadline=None)
IDS = torch.tensor([0, 3, 11, 5])


def rows(loss: Any, student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
    return loss(student.double(), teacher.double(), reduction="none", **options)


@with_kl
@hypothesis
@given(logits, scaled, st.floats(-50, 50))
def test_shift_of_a_row(name: str, x: list[Tensor], temperature: float, shift: float) -> None:
    student, teacher = (y.double() for y in x)
    options = {"temperature": temperature, "labels": IDS}
    want = rows(LOSSES[name], student, teacher, **options)
    assert_close(rows(LOSSES[name], student + shift, teacher - 2 * shift, **options), want)


@with_kl
@hypothesis
@given(logits, scaled, st.permutations(range(12)))
def test_order_of_classes(name: str, x: list[Tensor], temperature: float, order: list[int]) -> None:
    student, teacher = x
    at = torch.tensor([order.index(label) for label in IDS.tolist()])
    want = rows(LOSSES[name], student, teacher, temperature=temperature, labels=IDS)
    moved = [y[:, order] for y in x]
    assert_close(rows(LOSSES[name], *moved, temperature=temperature, labels=at), want)


@pytest.mark.parametrize("name", [name for name in LOSSES if not name.startswith("ofa")])
@hypothesis
@given(logits, scaled)
def test_not_negative(name: str, x: list[Tensor], temperature: float) -> None:
    loss = rows(LOSSES[name], *x, temperature=temperature, labels=IDS)
    assert (loss > -1e-12).all()
    assert (loss > 0).any()


@hypothesis
@given(logits, scaled)
def test_js_between_kl_and_reverse_kl(x: list[Tensor], temperature: float) -> None:
    small = 1e-10
    x = [y / 4 for y in x]  # what is left out grows with p^2 / q
    given = partial(rows, js_loss, *x, temperature=temperature)
    of_kl = rows(kd_loss, *x, temperature=temperature)
    assert_close(given(beta=small) / small, of_kl, rtol=1e-3, atol=1e-4)
    reverse = rows(reverse_kl_loss, *x, temperature=temperature)
    assert_close(given(beta=1 - small) / small, reverse, rtol=1e-3, atol=1e-4)


@hypothesis
@given(logits, scaled)
def test_js_of_one_half(x: list[Tensor], temperature: float) -> None:
    """Symmetric, and at most T^2 log 2."""
    student, teacher = x
    loss = rows(js_loss, student, teacher, temperature=temperature)
    assert_close(rows(js_loss, teacher, student, temperature=temperature), loss)
    assert (loss <= temperature**2 * math.log(2) * (1 + 1e-12)).all()


@hypothesis
@given(logits, scaled)
def test_reverse_kl_is_kl_the_other_way(x: list[Tensor], temperature: float) -> None:
    student, teacher = x
    given = rows(reverse_kl_loss, student, teacher, temperature=temperature)
    assert_close(given, rows(kd_loss, teacher, student, temperature=temperature))


@hypothesis
@given(logits, scaled)
def test_tv_is_a_distance(x: list[Tensor], temperature: float) -> None:
    student, teacher = x
    loss = rows(tv_loss, student, teacher, temperature=temperature)
    assert ((loss >= 0) & (loss <= temperature**2)).all()
    assert_close(rows(tv_loss, teacher, student, temperature=temperature), loss)


def test_tv_of_disjoint_rows() -> None:
    logits = torch.tensor([[1e4, 0.0, 0.0], [0.0, 1e4, 0.0]])
    assert torch.equal(tv_loss(logits, logits.flip(0), temperature=3.0), torch.tensor(9.0))


@hypothesis
@given(logits, scaled)
def test_dkd_is_kl_in_two_parts(x: list[Tensor], temperature: float) -> None:
    """KL(p || q) = KL(b_t || b_s) + (1 - p_y) KL(p' || q')."""
    student, teacher = x
    part = partial(rows, dkd_loss, student, teacher, labels=IDS, temperature=temperature)
    p_y = (teacher.double() / temperature).softmax(1)[range(4), IDS]
    given = part(alpha=1.0, beta=0.0) + (1 - p_y) * part(alpha=0.0, beta=1.0)
    assert_close(given, rows(kd_loss, student, teacher, temperature=temperature))


@hypothesis
@given(logits, scaled)
def test_dkd_of_two_classes_has_one_term(x: list[Tensor], temperature: float) -> None:
    student, teacher = (y[:, :2] for y in x)
    options = {"temperature": temperature}
    given = rows(dkd_loss, student, teacher, labels=IDS % 2, beta=5.0, **options)
    assert_close(given, rows(kd_loss, student, teacher, **options))


@pytest.mark.parametrize("name", ["kl_standardized", "dkd_standardized"])
@hypothesis
@given(logits, scaled, st.floats(0.5, 50))
def test_standardised_logits_have_no_scale(
    name: str, x: list[Tensor], temperature: float, scale: float
) -> None:
    student, teacher = x
    options = {"temperature": temperature, "labels": IDS}
    want = rows(LOSSES[name], student, teacher, **options)
    given = rows(LOSSES[name], scale * student.double(), teacher.double() / scale, **options)
    assert_close(given, want, rtol=1e-4, atol=1e-5)  # 1e-7 is added to the deviation


@every_device
@pytest.mark.parametrize("name", ["kl_standardized", "dkd_standardized"])
def test_constant_logits(name: str, device: str) -> None:
    """Their deviation is 0: a uniform distribution, no gradient, no NaN."""
    student = torch.full((3, 8), 2.0, device=device)
    teacher = draw(3, 8, device=device)
    loss, grad = with_gradients(LOSSES[name], student, student.clone() + 1, {"temperature": 2.0})
    assert loss == 0
    assert (grad == 0).all()
    loss, _ = with_gradients(LOSSES[name], student, teacher, {"temperature": 2.0})
    assert loss.isfinite()
    assert loss > 0


# autocast


@pytest.mark.parametrize("near", [0.1, 0.01])
def test_inside_bfloat16_autocast(near: float) -> None:
    """Right, where torch's own log_softmax and kl_div are not: they run in bfloat16 on the CPU."""
    weight, x = draw(64, 100, scale=0.3), draw(256, 64)
    teacher = (x @ weight).bfloat16()
    noise = near * draw(256, 100)
    exact = kd_loss((teacher + noise).bfloat16().double(), teacher.double(), temperature=4.0)
    with torch.autocast("cpu", torch.bfloat16):
        student = (teacher + noise).bfloat16()
        ours = {name: LOSSES[name](student, teacher, temperature=4.0).double() for name in LOSSES}
        log_q, log_p = ((x / 4).log_softmax(1) for x in (student, teacher))
        theirs = 16 * torch.nn.functional.kl_div(
            log_q, log_p, reduction="batchmean", log_target=True
        )
    assert_close(ours["kl"], exact, rtol=1e-3, atol=0)
    for name, loss in ours.items():
        want = usual(name, student.double(), teacher.double(), temperature=4.0)
        assert_close(loss, want, rtol=1e-4, atol=1e-6)
    assert abs(theirs.double() / exact - 1) > (1 if near == 0.01 else 0.05)
