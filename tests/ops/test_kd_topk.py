"""kd_loss_topk and the operations under it.

What is allowed against the reference in float64 is twice the error of torch's own functions on the
dense teacher (kd_tools.check). Tests marked every_isa also run once per instruction set of the
host, and on the reference backend.
"""

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from support.cuda_tools import GPU, needs_gpu_or_emulator
from support.feature_tools import Bad, assert_refused
from support.kd_tools import (
    BFLOAT,
    DOUBLE,
    FLOAT,
    HALF,
    INF,
    OPTIONS,
    REDUCTIONS,
    assert_within,
    draw,
    every_device,
    loss_and_grad,
    options_for,
    pair,
    per_row,
    torch_error,
)
from support.kd_topk_tools import TAILS, operation_options, top_of, topk_loss
from support.process_tools import files_of, run_every_isa, run_in_interpreter
from support.triton_tools import INTERPRETED, assert_nothing_is_spilled, compile_only
from vitkd_fast import int8, nn, reference
from vitkd_fast.functional import kd_loss, kd_loss_topk

pytestmark = pytest.mark.usefixtures("one_thread")
every_tail = pytest.mark.parametrize("tail", TAILS)


def check(
    student: Tensor, teacher: Tensor, k: int, tail: str, reductions: list[str], **options: Any
) -> None:
    """Loss and gradient beside the reference's in float64, on the same rounded inputs."""
    top = top_of(teacher, k, options.get("temperature", 1.0))
    wide = DOUBLE if student.dtype == DOUBLE else FLOAT
    dense = {name: x for name, x in options.items() if name != "row_weights"}
    of_torch = torch_error(student, teacher, dense | {"class_dim": -1})
    precision = torch.finfo(wide).eps
    scale = (3 if wide == DOUBLE else 2) * precision / torch.finfo(FLOAT).eps
    # of the teacher's mass, which 1 - sum rounds once more than a softmax
    mass = precision * (1 + student.shape[-1] ** 0.5 / 16)
    for reduction in reductions:
        leaf = student.detach().requires_grad_()
        loss = kd_loss_topk(
            leaf, top.indices, top.values, log_sum_exp=top.log_sum_exp, tail=tail,
            reduction=reduction, **options,
        )  # fmt: skip
        incoming = torch.ones_like(loss)  # what is formed in the forward is rounded there
        if reduction == "none":
            incoming = draw(*loss.shape, dtype=loss.dtype, device=str(loss.device))
        (grad,) = torch.autograd.grad(loss, leaf, incoming)
        s = student.detach().double()
        o = operation_options(s, top.log_sum_exp, tail=tail, reduction=reduction, **options)
        want, stats = reference.kd_topk_fwd(s, top.indices, top.values, *o)
        share = stats[5].view(s.shape[:-1])
        assert (loss.dtype, loss.shape, grad.dtype) == (wide, want.shape, student.dtype)
        temperature = options.get("temperature", 1.0)
        square = torch.as_tensor(temperature).double().max().item() ** 2
        size = torch.where(want.isinf(), 1.0, want.abs())
        size = size.maximum(share if reduction == "none" else share.sum())
        logs = 40 * square * mass  # of log p - log q, for the mass that is rounded
        allowed = (scale * of_torch.loss + 3 * precision + logs) * size
        assert_within(allowed, loss.detach(), want, "loss")
        want = reference.kd_topk_bwd(incoming.double(), s, top.indices, top.values, stats, *o)
        limits = torch.finfo(grad.dtype)
        rounding = limits.eps / 2 * want.abs().clamp(min=limits.smallest_normal)
        factor = per_row((share * incoming).abs(), -1)
        mean = square**0.5 * mass
        assert_within((scale * of_torch.grad + mean) * factor + rounding, grad, want, "gradient")


SHAPES = [((1, 2), 1), ((5, 7), 3), ((3, 2, 33), 8), ((7, 1000), 10), ((5, 1001), 17),
          ((2, 5000), 40), ((1, 70000), 5), ((3,), 2), ((64, 16), 15), ((6, 24), 24)]  # fmt: skip


@pytest.mark.every_isa
@pytest.mark.emulated(shape_k=[((5, 7), 3), ((5, 1001), 17), ((6, 24), 24)])
@pytest.mark.interpreted(shape_k=[((5, 7), 3)])
@every_device
@every_tail
@pytest.mark.parametrize("shape_k", SHAPES, ids=str)
def test_matches(shape_k: tuple[tuple[int, ...], int], tail: str, device: str) -> None:
    shape, k = shape_k
    student, teacher = pair(*shape, device=device)
    for temperature in (1.0, 4.0):
        check(student, teacher, k, tail, [*REDUCTIONS], temperature=temperature)


@pytest.mark.every_isa
@pytest.mark.emulated(name=["everything", "labels"])
@pytest.mark.interpreted(name=["everything"], tail=["smooth", "bin"])
@every_device
@every_tail
@pytest.mark.parametrize("name", OPTIONS)
def test_options_match(name: str, tail: str, device: str) -> None:
    student, teacher = pair(9, 40, device=device)
    options = options_for(name, student)
    del options["class_dim"]
    check(student, teacher, 6, tail, ["mean", "none"], **options)


@pytest.mark.every_isa
@pytest.mark.emulated
@pytest.mark.interpreted(tail=["bin"], dtype=[HALF, DOUBLE])
@every_device
@every_tail
@pytest.mark.parametrize("dtype", [HALF, BFLOAT, FLOAT, DOUBLE], ids=str)
def test_dtypes_match(dtype: torch.dtype, tail: str, device: str) -> None:
    student, teacher = pair(6, 45, dtype=dtype, device=device)
    labels = torch.arange(6, device=device)
    check(student, teacher, 5, tail, ["mean", "none"], temperature=2.0)
    check(student, teacher, 5, tail, ["sum"], labels=labels, ce_weight=0.5)


@pytest.mark.every_isa
@pytest.mark.emulated
@every_device
def test_reference_is_the_gradient_of_its_rows(device: str) -> None:
    student, teacher = pair(5, 12, dtype=DOUBLE, device=device)
    for tail in TAILS:
        for temperature in (1.0, 3.0):
            top = top_of(teacher, 4, temperature)
            o = operation_options(
                student, top.log_sum_exp, tail=tail, temperature=temperature, reduction="sum"
            )
            loss, stats = reference.kd_topk_fwd(student, *top[:2], *o)
            leaf = student.clone().requires_grad_()
            rows = reference.kd_topk._rows(leaf, *top[:2], o)
            assert_close(loss, rows.sum().detach())
            (want,) = torch.autograd.grad(rows.sum(), leaf)
            one = torch.ones_like(loss)
            assert_close(reference.kd_topk_bwd(one, student, *top[:2], stats, *o), want)


# what ties it to kd_loss


def nearly_equal(given: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for x, y in zip(given, want, strict=True):
        assert_close(x, y, rtol=1e-10, atol=1e-12)


@pytest.mark.every_isa
@pytest.mark.emulated
@every_device
@every_tail
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_all_classes_are_kd_loss(tail: str, temperature: float, device: str) -> None:
    """K = V, in any order."""
    student, teacher = pair(6, 21, dtype=DOUBLE, device=device)
    options: dict[str, Any] = {"temperature": temperature, "ce_weight": 0.3}
    options["labels"] = torch.arange(6, device=device)
    want = loss_and_grad(student, teacher, **options)
    nearly_equal(loss_and_grad(student, teacher, topk_loss, k=21, tail=tail, **options), want)


@pytest.mark.every_isa
@pytest.mark.emulated
@every_device
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_tails_are_dense_teachers(temperature: float, device: str) -> None:
    """Each written out, and given to kd_loss."""
    student, teacher = pair(6, 21, dtype=DOUBLE, device=device)
    top = top_of(teacher, 5, temperature)
    p = (top.values / temperature - top.log_sum_exp.unsqueeze(-1)).exp()
    mass = p.sum(-1, keepdim=True)
    ours = partial(loss_and_grad, student, teacher, topk_loss, k=5, temperature=temperature)
    dense = partial(loss_and_grad, student, temperature=temperature)

    smoothed = ((1 - mass) / 16).expand(-1, 21).scatter(-1, top.indices, p)
    nearly_equal(ours(tail="smooth"), dense(temperature * smoothed.log()))

    only = torch.full_like(teacher, -INF).scatter(-1, top.indices, top.values)
    nearly_equal(ours(tail="renorm"), dense(only))

    # a row's mass weighs its renormalised loss
    rows = dense(only, reduction="none", row_weights=mass.squeeze(-1))
    shift = temperature**2 * (mass * mass.log()).squeeze(-1)
    nearly_equal(ours(tail="zero", reduction="none"), (rows[0] + shift, rows[1]))

    # K + 1 classes
    leaf = student.clone().requires_grad_()
    others = torch.ones_like(student, dtype=torch.bool).scatter(-1, top.indices, False)
    one = (leaf / temperature).masked_fill(~others, -INF).logsumexp(-1, keepdim=True) * temperature
    merged = torch.cat([leaf.gather(-1, top.indices), one], -1)
    loss = kd_loss(
        merged, temperature * torch.cat([p, 1 - mass], -1).log(), temperature=temperature
    )
    nearly_equal(ours(tail="bin"), (loss.detach(), *torch.autograd.grad(loss, leaf)))


@every_tail
def test_probabilities_are_logits_with_their_sum(tail: str) -> None:
    student, teacher = pair(6, 21, dtype=DOUBLE)
    top = top_of(teacher, 5)
    p = (top.values - top.log_sum_exp.unsqueeze(-1)).exp()
    given = loss_and_grad(student, top.indices, partial(kd_loss_topk, values=p, tail=tail))
    nearly_equal(given, loss_and_grad(student, teacher, topk_loss, k=5, tail=tail))


def test_public_form_of_smooth() -> None:
    """TinyViT's: a dense soft label, and torch's cross-entropy with it."""
    student, teacher = pair(6, 21, dtype=DOUBLE)
    top = top_of(teacher, 5)
    p = (top.values - top.log_sum_exp.unsqueeze(-1)).exp()
    rest = (1 - p.sum(-1, keepdim=True)) / (21 - 5)
    label = rest.repeat_interleave(21, -1).scatter(-1, top.indices, p)
    leaf = student.clone().requires_grad_()
    public = F.cross_entropy(leaf, label)
    loss, grad = loss_and_grad(student, teacher, topk_loss, k=5)
    entropy = -(label * label.log()).sum(-1).mean()
    assert_close(loss + entropy, public.detach())
    assert_close(grad, torch.autograd.grad(public, leaf)[0])


@given(st.integers(2, 60), st.data())
@settings(max_examples=60, deadline=None)
def test_shifts_and_order_change_nothing(classes: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, classes))
    tail = data.draw(st.sampled_from(TAILS))
    shift = data.draw(st.floats(-50, 50))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    student, teacher = torch.randn(2, 3, classes, generator=generator, dtype=DOUBLE)
    want = loss_and_grad(student, teacher, topk_loss, k=k, tail=tail, temperature=2.0)
    for x, y in ((student + shift, teacher), (student, teacher + shift)):
        given = loss_and_grad(x, y, topk_loss, k=k, tail=tail, temperature=2.0)
        assert_close(given, want, rtol=1e-8, atol=1e-10)
    order = torch.randperm(classes, generator=generator)
    loss, grad = loss_and_grad(
        student[:, order], teacher[:, order], topk_loss, k=k, tail=tail, temperature=2.0
    )
    assert_close((loss, grad), (want[0], want[1][:, order]), rtol=1e-10, atol=1e-12)
    assert_close(want[1].sum(-1), torch.zeros(3, dtype=DOUBLE), rtol=0, atol=1e-12)


# extremes


@pytest.mark.every_isa
@pytest.mark.emulated
@every_device
@every_tail
@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE], ids=str)
def test_extreme_logits(dtype: torch.dtype, tail: str, device: str) -> None:
    """The others far below the K, where 1 - sum is 0, and far above."""
    student, teacher = pair(4, 30, dtype=dtype, device=device)
    indices = teacher.topk(4).indices
    for up in (1e4, 300.0, -300.0, -1e4):
        moved = student.scatter_add(-1, indices, torch.full_like(indices, up).to(student))
        loss, grad = loss_and_grad(moved, teacher, topk_loss, k=4, tail=tail)
        want, want_grad = loss_and_grad(moved.double(), teacher.double(), topk_loss, k=4, tail=tail)
        assert loss.isfinite()
        assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)
        assert_close(grad.double(), want_grad, rtol=1e-4, atol=1e-6)
    loss, grad = loss_and_grad(student + 1e4, teacher - 1e4, topk_loss, k=4, tail=tail)
    want, want_grad = loss_and_grad(
        (student + 1e4).double(), (teacher - 1e4).double(), topk_loss, k=4, tail=tail
    )
    # the teacher's log-sum-exp itself is rounded
    assert_close(loss.double(), want, rtol=1e-2, atol=1e-2)


@pytest.mark.every_isa
@pytest.mark.emulated
@pytest.mark.interpreted(tail=["smooth", "bin"])
@every_device
@every_tail
def test_extreme_masks(tail: str, device: str) -> None:
    """-inf in the student where the teacher has something: +inf; in both: nothing."""
    student, teacher = pair(3, 20, device=device)
    indices = teacher.topk(4).indices
    top_masked = student.scatter(-1, indices[:, :1], -INF)
    others = torch.ones_like(student, dtype=torch.bool).scatter(-1, indices, False)
    one_masked = student.clone()
    for i in range(3):
        one_masked[i, others[i].nonzero()[0]] = -INF
    all_masked = student.masked_fill(others, -INF)
    run = partial(loss_and_grad, teacher=teacher, function=topk_loss, k=4, tail=tail)
    loss, grad = run(top_masked)
    assert loss == INF
    assert grad.isfinite().all()
    loss, grad = run(one_masked)
    assert (loss == INF) == (tail == "smooth")
    assert grad.isfinite().all()
    loss, grad = run(all_masked)
    assert (loss == INF) == (tail in ("smooth", "bin"))
    assert grad.isfinite().all()
    both = teacher.scatter(-1, indices[:, :1], -INF)
    top = top_of(both, 4)
    values = torch.cat([torch.full_like(top.values[:, :1], -INF), top.values], -1)
    index = torch.cat([indices[:, :1], top.indices], -1)
    loss, grad = loss_and_grad(
        top_masked, index, partial(kd_loss_topk, values=values, log_sum_exp=top.log_sum_exp,
                                   tail=tail),
    )  # fmt: skip
    assert loss.isfinite()
    assert grad.isfinite().all()


@pytest.mark.every_isa
@pytest.mark.emulated
@every_device
@every_tail
def test_nan_stays_in_its_row(tail: str, device: str) -> None:
    student, teacher = pair(4, 20, device=device)
    student[1, 3] = torch.nan
    loss, grad = loss_and_grad(student, teacher, topk_loss, k=4, tail=tail, reduction="none")
    assert loss.isnan().tolist() == [False, True, False, False]
    assert grad.isfinite().all(-1).tolist() == [True, False, True, True]
    weights = torch.tensor([1.0, 0.0, 1.0, 1.0], device=device)
    loss, grad = loss_and_grad(student, teacher, topk_loss, k=4, tail=tail, row_weights=weights)
    assert loss.isfinite()
    assert grad.isfinite().all()


@pytest.mark.every_isa
@pytest.mark.emulated
@every_device
@every_tail
def test_rounded_probabilities_above_1(tail: str, device: str) -> None:
    """They are divided by their sum: the gradient still sums to 0."""
    student = draw(2, 9, dtype=DOUBLE, device=device)
    indices = torch.tensor([[1, 4], [0, 8]], device=device)
    values = torch.tensor([[0.75, 0.26], [0.5, 0.75]], dtype=HALF, device=device)
    loss, grad = loss_and_grad(student, indices, partial(kd_loss_topk, values=values, tail=tail))
    exact = values.double() / values.double().sum(-1, keepdim=True)
    want = loss_and_grad(student, indices, partial(kd_loss_topk, values=exact, tail="renorm"))
    nearly_equal((loss, grad), want)


@pytest.mark.every_isa
@pytest.mark.emulated
@every_device
@pytest.mark.parametrize("index", [torch.int16, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("value", [HALF, BFLOAT, FLOAT, DOUBLE], ids=str)
def test_what_a_cache_holds(value: torch.dtype, index: torch.dtype, device: str) -> None:
    """Every dtype, also with gaps."""
    student, teacher = pair(5, 19, device=device)
    top = top_of(teacher.to(value), 4)
    want = loss_and_grad(
        student, top.indices,
        partial(kd_loss_topk, values=top.values.double(), log_sum_exp=top.log_sum_exp.float()),
    )  # fmt: skip
    indices, values = (F.pad(x, (1, 2))[:, 1:-2] for x in (top.indices.to(index), top.values))
    given = loss_and_grad(
        student, indices, partial(kd_loss_topk, values=values, log_sum_exp=top.log_sum_exp)
    )
    for x, y in zip(given, want, strict=True):
        assert torch.equal(x, y)


@every_tail
def test_threads_change_nothing(tail: str) -> None:
    student, teacher = pair(300, 257)
    want = loss_and_grad(student, teacher, topk_loss, k=9, tail=tail)
    torch.set_num_threads(3)
    for x, y in zip(loss_and_grad(student, teacher, topk_loss, k=9, tail=tail), want, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    student, teacher = pair(8, 30, dtype=dtype)
    for tail in TAILS:
        want = loss_and_grad(student, teacher, topk_loss, k=4, tail=tail, temperature=2.0)
        with torch.autocast("cpu", BFLOAT):
            given = loss_and_grad(student, teacher, topk_loss, k=4, tail=tail, temperature=2.0)
        for x, y in zip(given, want, strict=True):
            assert x.dtype == y.dtype
            assert torch.equal(x, y)


def test_module() -> None:
    student, teacher = pair(6, 21)
    top = top_of(teacher, 5, 4.0)
    loss = nn.KDLossTopK(temperature=4.0, tail="bin", ce_weight=0.5, label_smoothing=0.1)
    labels = torch.arange(6)
    want = kd_loss_topk(
        student, top.indices, top.values, log_sum_exp=top.log_sum_exp, temperature=4.0, tail="bin",
        labels=labels, ce_weight=0.5, label_smoothing=0.1,
    )  # fmt: skip
    assert torch.equal(loss(student, top.indices, top.values, top.log_sum_exp, labels), want)


# errors

S, IDS, P = torch.randn(3, 9), torch.tensor([[0, 1], [2, 3], [8, 4]]), torch.full((3, 2), 0.25)
LSE = torch.zeros(3)


def bad(*of: Tensor, error: type[Exception] = ValueError, words: str = "", **options: Any) -> Bad:
    return lambda: kd_loss_topk(*of, **options), error, words


BAD: dict[str, Bad] = {
    "kd_index_dtype": bad(
        S,
        IDS.float(),
        P,
        error=TypeError,
        words="indices: expected int16, int32 or int64, got torch.f",
    ),
    "kd_rows": bad(S, IDS[:2], P, words="indices: expected the student's rows and K"),
    "kd_values": bad(S, IDS, P[:, :1], words="values: expected the shape of indices [3, 2]"),
    "kd_none": bad(
        S, IDS[:, :0], P[:, :0], words="indices: expected 1 to 9 classes per row, got [3, 0]"
    ),
    "kd_lse": bad(
        S,
        IDS,
        P,
        log_sum_exp=LSE[:2],
        words="log_sum_exp: expected one number per row, [3], got [2]",
    ),
    "kd_temperature": bad(
        S, IDS, P, temperature=4.0, words="temperature: expected 1, as values are probabilities"
    ),
    "kd_zero": bad(
        S,
        IDS,
        P,
        log_sum_exp=LSE,
        temperature=0.0,
        words="temperature: expected a number > 0, got 0",
    ),
    "kd_tail": bad(S, IDS, P, tail="no", words="tail: expected smooth, zero, renorm or bin"),
    "kd_labels": bad(S, IDS, P, ce_weight=1.0, words="labels: expected an int64 tensor"),
    "kd_classes": bad(S[:, :1], IDS, P, words="student: expected [*rows, classes] with 2"),
    "kd_grad": bad(
        S, IDS, P.clone().requires_grad_(), words="values: expected a constant, as the loss has no"
    ),
    "kd_lse_grad": bad(
        S,
        IDS,
        P,
        log_sum_exp=LSE.clone().requires_grad_(),
        words="log_sum_exp: expected a constant",
    ),
}
ON_CPU: dict[str, Bad] = {
    "kd_range": bad(
        S, IDS + 5, P, error=RuntimeError, words="indices: expected 0 to 8, got 13 for row 2"
    ),
    "kd_negative": bad(
        S, -IDS, P, error=RuntimeError, words="indices: expected 0 to 8, got -1 for row 0"
    ),
    "kd_twice": bad(
        S, torch.zeros_like(IDS), P, error=RuntimeError,
        words="indices: expected each class once in a row, got 0 twice for row 0",
    ),
    "kd_logits": bad(
        S, IDS, -P, error=RuntimeError, words="values: expected probabilities, as there is no"
    ),
    "kd_label": bad(
        S, IDS, P, labels=torch.tensor([0, 1, 9]), error=RuntimeError, words="labels: expected 0 to"
    ),
    "kd_rows_temperature": bad(
        S, IDS, P, log_sum_exp=LSE, temperature=LSE, error=RuntimeError,
        words="temperature: expected a number > 0, got 0 for row 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    assert_refused("kd", *BAD[name])


@pytest.mark.parametrize("name", ON_CPU)
def test_bad_numbers_on_a_cpu(name: str) -> None:
    call, error, words = ON_CPU[name]
    with pytest.raises(error, match=re.escape(f"kd_loss_topk: {words}")):
        call()


def test_bad_numbers_in_ignored_rows_are_not_looked_at() -> None:
    labels = torch.tensor([-100, 1, 2])
    indices = IDS.clone()
    indices[0] = 99
    assert kd_loss_topk(S, indices, P, labels=labels).isfinite()


# instruction sets and backends, each in a process of its own


@pytest.mark.parametrize("isa", ["scalar", "avx2"])
def test_every_instruction_set(isa: str, tmp_path: Path) -> None:
    if isa not in int8.isa() or isa == int8.isa()[0]:
        pytest.skip(f"{isa} is not below what this CPU has: {', '.join(int8.isa())}")
    run_every_isa(tmp_path, "kd_topk", "not gpu", VITKD_FAST_ISA=isa)


def test_reference_backend(tmp_path: Path) -> None:
    run_every_isa(tmp_path, "kd_topk", "not gpu", VITKD_FAST_BACKEND="reference")


# what only a GPU or the emulator has


@pytest.mark.sanitized
@needs_gpu_or_emulator
class TestSanitize:
    """Every way through the kernels once, small enough for compute-sanitizer."""

    @pytest.mark.parametrize("shape_k", [((3, 10), 3), ((2, 33), 33), ((2, 1001), 9)], ids=str)
    @pytest.mark.parametrize("dtype", [FLOAT, BFLOAT, DOUBLE], ids=str)
    @every_tail
    def test_values(
        self, tail: str, dtype: torch.dtype, shape_k: tuple[tuple[int, ...], int]
    ) -> None:
        shape, k = shape_k
        student, teacher = pair(*shape, dtype=dtype, device=GPU)
        labels = torch.arange(shape[0], device=GPU)
        for reduction in REDUCTIONS:
            for options in ({}, {"labels": labels, "ce_weight": 0.5, "temperature": 2.0}):
                loss, grad = loss_and_grad(
                    student, teacher, topk_loss, k=k, tail=tail, reduction=reduction, **options
                )
                assert loss.isfinite().all()
                assert grad.isfinite().all()


# Triton, interpreted and compiled without a GPU


SLOW = pytest.mark.slow


@pytest.mark.triton
def test_triton_in_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    run_in_interpreter(tmp_path, *files_of("kd_topk"), "-m", "interpreted and not gpu")


@pytest.mark.triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", [pytest.param(80, marks=SLOW), 90], ids="sm_{}".format)
@pytest.mark.parametrize(
    "classes", [pytest.param(10, marks=SLOW), 1000, pytest.param(21841, marks=SLOW)]
)
@pytest.mark.parametrize("dtype", [BFLOAT, FLOAT], ids=str)
@every_tail
def test_triton_compiles_without_spills(
    tail: str, dtype: torch.dtype, classes: int, capability: int,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    pytest.importorskip("triton")
    compiled = compile_only(monkeypatch, capability, "kd_topk")
    from vitkd_fast.kernels import kd_topk

    def new(*shape: int, dtype: torch.dtype = FLOAT) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    student, k = new(4096, classes, dtype=dtype), min(10, classes)
    teacher = new(4096, k, dtype=torch.int16), new(4096, k, dtype=HALF)
    for ce_weight in (0.0, 0.5):
        o = reference.KDTopKOptions(
            4.0, 1.0, TAILS.index(tail), reference.MEAN, log_sum_exp=new(4096),
            labels=new(4096, dtype=torch.int64), ce_weight=ce_weight, label_smoothing=0.1,
        )  # fmt: skip
        loss, stats = kd_topk.kd_topk_fwd(student, *teacher, *o)
        kd_topk.kd_topk_fwd_grad(student, *teacher, *o)
        kd_topk.kd_topk_bwd(loss, student, *teacher, stats, *o)
    assert_nothing_is_spilled(compiled, tmp_path)
