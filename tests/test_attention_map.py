"""attention_map_loss, relation_loss and the operations under them.

Values are compared with the reference in float64 on the same rounded inputs. What is allowed there
comes from the naive form by torch's own functions in float32 (see `check`); it is never tuned.
Tests whose names hold "match" or "extreme" also run once per instruction set of the host, and on
the reference backend.
"""

import itertools
import math
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
from torch import Tensor
from torch.testing import assert_close

from vitkd_fast import _ops, int8, reference
from vitkd_fast.functional import attention_map_loss, relation_loss

from . import amx_tools
from .cuda_tools import EMULATED, GPU, captured, needs_gpu_or_emulator
from .triton_tools import run_tests

ROOT = Path(__file__).parents[1]
OPS = torch.ops.vitkd_fast
OPERATIONS = ["attention_map_fwd", "attention_map_fwd_grad", "attention_map_bwd"]
REDUCTIONS = {"mean": reference.MEAN, "sum": reference.SUM, "none": reference.NONE}
KINDS = {
    "kl": reference.KL,
    "reverse_kl": reference.REVERSE_KL,
    "js": reference.JS,
    "mse": reference.MSE,
}
INF, NAN = torch.inf, torch.nan
HALF, BFLOAT, FLOAT, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64

every_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
)
every_kind = pytest.mark.parametrize("kind", KINDS)
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two would wait for each other on a busy machine; test_bitwise_the_same has more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draw(
    *shape: int, dtype: torch.dtype = FLOAT, device: str = "cpu", scale: float = 1.5
) -> Tensor:
    return (scale * torch.randn(shape, dtype=DOUBLE)).to(device, dtype)


class Maps(NamedTuple):
    """What a call takes: queries and keys of student and teacher."""

    q_s: Tensor
    k_s: Tensor
    q_t: Tensor
    k_t: Tensor

    @property
    def student(self) -> tuple[Tensor, Tensor]:
        return self.q_s, self.k_s

    @property
    def teacher(self) -> tuple[Tensor, Tensor]:
        return self.q_t, self.k_t

    def times(self, student: float, teacher: float = 1.0) -> "Maps":
        """Scores of each times a number."""
        return Maps(self.q_s * student, self.k_s, self.q_t * teacher, self.k_t)


def maps(
    batch: int = 2, heads: int = 3, queries: int = 9, keys: int | None = None, dim: int = 16,
    dim_t: int | None = None, dtype: torch.dtype = FLOAT, teacher: torch.dtype | None = None,
    device: str = "cpu",
) -> Maps:  # fmt: skip
    """As many keys as queries and the teacher like the student, unless given."""
    new = partial(draw, batch, heads, device=device)
    of_teacher = {"dtype": teacher or dtype, "scale": 1.7}
    keys, dim_t = keys or queries, dim_t or dim
    return Maps(
        new(queries, dim, dtype=dtype),
        new(keys, dim, dtype=dtype),
        new(queries, dim_t, **of_teacher),
        new(keys, dim_t, **of_teacher),
    )


def key_mask(batch: int, keys: int, device: str = "cpu") -> Tensor:
    """Half of the keys, at least one for each element of the batch, and for one just the last."""
    mask = torch.rand(batch, keys) < 0.5
    mask[:, keys // 2] = True
    if batch > 1:
        mask[-1] = False
        mask[-1, -1] = True
    return mask.to(device)


OPTIONS: dict[str, Callable[[Maps], dict[str, Any]]] = {
    "plain": lambda x: {},
    "T_0.5": lambda x: {"temperature": 0.5},
    "T_4": lambda x: {"temperature": 4},
    "scales": lambda x: {"scale_s": 0.3, "scale_t": 0.07},
    "negative_scales": lambda x: {"scale_s": -0.2, "scale_t": -0.4, "temperature": 2.0},
    "one_scale_of_0": lambda x: {"scale_t": 0.0},
    "mask": lambda x: {"key_mask": key_mask(len(x.k_s), x.k_s.shape[2], str(x.k_s.device))},
    "everything": lambda x: {
        "scale_s": 0.4, "scale_t": 0.2, "temperature": 1.7,
        "key_mask": key_mask(len(x.k_s), x.k_s.shape[2], str(x.k_s.device)),
    },
}  # fmt: skip
MAIN_OPTIONS = ["plain", "everything"]


# what a result is compared with


def operation_options(
    x: Maps, *, scale_s: float | None = None, scale_t: float | None = None,
    temperature: float = 1.0, kind: str = "kl", key_mask: Tensor | None = None,
    reduction: str = "mean",
) -> tuple[Any, ...]:  # fmt: skip
    """attention_map_loss's options as the operations take them, written apart from functional/."""
    scale_s = 1 / math.sqrt(x.q_s.shape[3]) if scale_s is None else scale_s
    scale_t = 1 / math.sqrt(x.q_t.shape[3]) if scale_t is None else scale_t
    return scale_s, scale_t, temperature, KINDS[kind], REDUCTIONS[reduction], key_mask


def torch_rows(
    q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, *, scale_s: float | None = None,
    scale_t: float | None = None, temperature: float = 1.0, kind: str = "kl",
    key_mask: Tensor | None = None, **_: Any,
) -> Tensor:  # fmt: skip
    """Each row's loss by torch's own functions, in the tensors' dtype."""

    def scores(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
        scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
        x = q @ k.mT * (scale / temperature)
        # finite, as torch has no 0 * log 0 = 0 for logarithms
        return x if key_mask is None else x.masked_fill(~key_mask[:, None, None], -1e30)

    s, t = scores(q_s, k_s, scale_s), scores(q_t, k_t, scale_t)
    log_q, log_p = F.log_softmax(s, -1), F.log_softmax(t, -1)
    kl = partial(F.kl_div, reduction="none", log_target=True)
    if kind == "kl":
        terms = kl(log_q, log_p)
    elif kind == "reverse_kl":
        terms = kl(log_p, log_q)
    elif kind == "js":
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        terms = 0.5 * kl(log_m, log_p) + 0.5 * kl(log_m, log_q)
    else:
        terms = F.mse_loss(F.softmax(s, -1), F.softmax(t, -1), reduction="none")
    return temperature**2 * terms.sum(-1)


class Results(NamedTuple):
    loss: Tensor
    d_q: Tensor
    d_k: Tensor


def loss_and_grads(
    x: Maps, function: Callable[..., Tensor] = attention_map_loss,
    incoming: Tensor | None = None, **options: Any,
) -> Results:  # fmt: skip
    """The loss, and the gradients of its sum, or of its product with what comes in."""
    leaves = [y.detach().requires_grad_() for y in x.student]
    loss = function(*leaves, *x.teacher, **options)
    incoming = torch.ones_like(loss) if incoming is None else incoming
    return Results(loss.detach(), *torch.autograd.grad(loss, leaves, incoming))


def assert_same(given: Iterable[Tensor], want: Iterable[Tensor]) -> None:
    """Bit by bit."""
    for x, y in zip(given, want, strict=True):
        assert torch.equal(x, y)


def assert_all_close(given: Iterable[Tensor], want: Iterable[Tensor], **tolerance: float) -> None:
    for x, y in zip(given, want, strict=True):
        assert_close(x, y, **tolerance)


def torch_errors(
    x: Maps, options: dict[str, Any], weights: dict[str, Tensor]
) -> dict[str, tuple[float, float, float]]:
    """The naive form's own errors in float32, the largest of many draws: one may be lucky.

    The draws are the tensors at hand, scaled by a little more than 1, so that all of them are
    rounded otherwise and no score moves to where errors are larger. The loss's error is on
    max(1, |loss|) of a row; those of both gradients are for the rows' weights in what is derived.
    """
    scores = x.q_s.shape[:3].numel() * x.k_s.shape[2]
    # many of small calls, and as many numbers of small gradients, for the largest error to be there
    enough = 20_000 // max(1, min(y.numel() for y in x.student))
    least = 3 if scores < 300_000 else 16  # the more numbers, the rarer is their largest error
    draws = min(128, max(least, 40_000 // scores, min(enough, 400_000 // scores)))
    scales = torch.linspace(1, 1 + 2**-12, draws, device=x.q_s.device).view(-1, 1, 1, 1, 1)
    drawn = [(scales * y.detach().float()).flatten(0, 1) for y in x]
    if options.get("key_mask") is not None:
        options = options | {"key_mask": options["key_mask"].repeat(draws, 1)}
    results: dict[torch.dtype, list[tuple[Tensor, ...]]] = {}
    for dtype in (FLOAT, DOUBLE):
        q_s, k_s, q_t, k_t = (y.to(dtype) for y in drawn)
        leaves = [q_s.requires_grad_(), k_s.requires_grad_()]
        rows = torch_rows(*leaves, q_t, k_t, **options)
        results[dtype] = [(rows.detach(),)]
        for weight in weights.values():
            weight = weight.repeat(draws, 1, 1).to(dtype)
            results[dtype].append(torch.autograd.grad(rows, leaves, weight, retain_graph=True))
    largest = [
        [(y - z).abs().nan_to_num().max().item() for y, z in zip(*of, strict=True)]
        for of in zip(results[FLOAT], results[DOUBLE], strict=True)
    ]
    own, exact = (results[dtype][0][0].view(draws, -1) for dtype in (FLOAT, DOUBLE))
    errors = {}
    for reduction, grads in zip(weights, largest[1:], strict=True):
        # of a reduced loss, torch's sum counts, too
        loss = [((own - exact) / exact.abs().clamp(min=1)).abs().nan_to_num().max().item()]
        if reduction != "none":
            size = exact.sum(1).abs().clamp(min=exact.shape[1])
            loss.append(((own.sum(1) - exact.sum(1)).abs() / size).nan_to_num().max().item())
        errors[reduction] = (max(loss), *grads)
    return errors


def on_gpu(x: Tensor) -> bool:
    return x.is_cuda or EMULATED


def on_tensor_cores(x: Maps) -> bool:
    return on_gpu(x.q_s) and x.q_s.dtype in (HALF, BFLOAT)


def on_tiles(x: Maps) -> bool:
    """Of AMX, which are for 16 bits alone."""
    amx = amx_tools.EMULATED or (int8.isa()[0] == "amx" and not on_gpu(x.q_s))
    return amx and {x.q_s.dtype, x.q_t.dtype} <= {HALF, BFLOAT}


POWER = 4  # roundings that the one instruction for a power of two is off by, beside tensor cores


class Unavoidable(NamedTuple):
    """How far d_q and d_k may move, whoever computes in float32: see `unavoidable_errors`."""

    least: tuple[Tensor, Tensor]
    saved: tuple[Tensor, Tensor]


def unavoidable_errors(
    x: Maps, stats: Tensor, weight: Tensor, scale_s: float, scale_t: float, temperature: float,
    kind: int, _: int, key_mask: Tensor | None,
) -> Unavoidable:  # fmt: skip
    """What is left of an exact computation whose numbers are rounded once. All in float64.

    least: a score's gradient is a difference (math/attention_map.h), and both of its terms are
    rounded; a probability below the smallest normal number is 0, in its own term and in the sum of
    all, which the other terms have as a factor. Tensor cores multiply numbers of 16 bits: beside
    them, the difference is rounded once more, and probabilities come from a faster instruction.
    AMX's tiles know no subnormal numbers.
    saved: the three numbers of a row from which a backward works are rounded, and with a
    log-sum-exp all probabilities of its row move. Beside tensor cores it is held times log2(e):
    there it is rounded when it is divided by that, and when it is multiplied again.
    """
    q_s, k_s, q_t, k_t = (y.detach().double() for y in x)
    keep = 1.0 if key_mask is None else key_mask[:, None, None].double()
    log_q, log_p = (
        F.log_softmax(q @ k.mT * (scale / temperature) + 1e30 * (keep - 1), -1)
        for q, k, scale in ((q_s, k_s, scale_s), (q_t, k_t, scale_t))
    )
    wide = DOUBLE if DOUBLE in (x.q_s.dtype, x.q_t.dtype) else FLOAT
    limits = torch.finfo(wide)
    unit = limits.eps / 2
    lse_s, lse_t, centre = stats.unsqueeze(-1)

    def terms(of_student: Tensor | float = 0.0, of_teacher: Tensor | float = 0.0) -> list[Tensor]:
        log_qs, log_ps = log_q - of_student, log_p - of_teacher
        q, p = log_qs.exp() * keep, log_ps.exp() * keep
        log_m = torch.logaddexp(log_qs, log_ps) - math.log(2)
        if kind == reference.KL:
            return [q, p]
        w = {
            reference.REVERSE_KL: q * (log_qs - log_ps),
            reference.JS: 0.5 * q * (log_qs - log_m),
            reference.MSE: 2 * q * (q - p),
        }[kind]
        return [w, q * centre]

    a, b = terms()
    tiny = limits.smallest_normal * (1 + (log_q - log_p).abs()) * keep
    if kind != reference.KL:
        tiny = tiny + log_q.exp() * keep * tiny.sum(-1, keepdim=True)
    least = unit * (a.abs() + b.abs()) + tiny
    if wide == DOUBLE:
        # autograd takes a probability from itself, times the sum of all: of the exponential, the
        # sum and the product each is rounded
        least = least + 3 * unit * (log_q.exp() + log_p.exp()) * keep
    if on_tensor_cores(x):
        least = least + POWER * unit * 2 * (log_q.exp() + log_p.exp()) * keep
        least = least + torch.finfo(x.q_s.dtype).eps / 2 * (a - b).abs()
    saved = unit * b.abs() * (kind != reference.KL)
    of_lse = unit * (3 if on_tensor_cores(x) else 1)
    for moved in (terms(of_lse * lse_s), terms(0.0, of_lse * lse_t)):
        saved = saved + ((moved[0] - moved[1]) - (a - b)).abs()
    factor = (weight * temperature * scale_s).abs().unsqueeze(-1)
    least, saved = least * factor, saved * factor
    # tiles take a subnormal number for 0: any of a slope's three parts, and of their products
    parts = 3 * limits.smallest_normal * keep * torch.ones_like(least) * on_tiles(x)
    return Unavoidable(
        (
            least @ k_s.abs() + parts @ (1 + k_s.abs()),
            least.mT @ q_s.abs() + parts.mT @ (1 + q_s.abs()),
        ),
        (saved @ k_s.abs(), saved.mT @ q_s.abs()),
    )


def assert_within(allowed: Tensor, given: Tensor, want: Tensor, what: str) -> None:
    error = (given.double() - want).abs()
    off = ~((error <= allowed) | (given == want))
    assert not off.any(), (
        f"{what}: {off.sum()} of {off.numel()} are off, by up to {(error / allowed)[off].max():.3g}"
        f" times what is allowed: {given[off][:3].tolist()}, not {want[off][:3].tolist()}"
    )


def check(
    x: Maps, *, function: Callable[..., Tensor] = attention_map_loss,
    reductions: Iterable[str] = REDUCTIONS, grad_loss: float | None = None, roundings: int = 1,
    **options: Any,
) -> None:  # fmt: skip
    """The error against float64 is at most twice torch's in float32, and one rounding.

    Float32 also for float16 and bfloat16, in which torch's own errors are far larger: all
    arithmetic is float32. For float64, torch's error is scaled by the ratio of the precisions.
    Losses are measured on max(1, |loss|) of each row; a gradient on the largest error in it, and
    at least on `unavoidable_errors`: torch can be exact by chance, as where all keys are alike.
    Where gradients are formed in the backward, so that numbers are saved for it, they count, too.

    Args:
        grad_loss: the incoming gradient; 1, and random numbers for "none".
        roundings: of the gradients to the student's dtype.
    """
    wide = DOUBLE if DOUBLE in (x.q_s.dtype, x.q_t.dtype) else FLOAT
    device = str(x.q_s.device)
    precision = torch.finfo(wide).eps
    # of float64, what is compared with has an error of its own
    scale = (3 if wide == DOUBLE else 2) * precision / torch.finfo(FLOAT).eps
    if os.environ.get("VITKD_FAST_ISA") == "scalar":
        scale *= math.sqrt(2)  # it rounds products and sums, torch's FMAs only sums
    if on_gpu(x.q_s):
        scale *= 2  # tensor cores cut sums off, by up to one in the last place, and do not round
    double = Maps(*(y.detach().double() for y in x))
    arguments = operation_options(double, reduction="none", **options)
    rows, stats = reference.attention_map_fwd(*double, *arguments)
    share = {"mean": 1 / max(rows.numel(), 1), "sum": 1.0, "none": 1.0}

    incoming, weights = {}, {}
    for reduction in reductions:
        shape = rows.shape if reduction == "none" else ()
        factor = 1.0 if grad_loss is None else grad_loss
        incoming[reduction] = torch.full(shape, factor, dtype=wide, device=device)
        if reduction == "none" and grad_loss is None:
            incoming[reduction] = draw(*shape, dtype=wide, device=device)
        weights[reduction] = (incoming[reduction].double() * share[reduction]).expand_as(rows)
    errors = torch_errors(x, options, weights)

    for reduction, weight in weights.items():
        given = loss_and_grads(x, function, incoming[reduction], reduction=reduction, **options)
        of_loss, *of_grads = (scale * error for error in errors[reduction])
        want = rows if reduction == "none" else rows.sum() * share[reduction]
        assert (given.loss.dtype, given.loss.shape) == (wide, want.shape)
        assert given.loss.device == x.q_s.device
        at_least = 1.0 if reduction == "none" else share[reduction] * rows.numel()
        size = want.abs().clamp(min=at_least)
        rounding = precision / 2
        if on_tensor_cores(x):
            rounding *= 2 * POWER  # of squares
        assert_within((of_loss + rounding) * size, given.loss, want, f"{reduction}: loss")

        grads = reference.attention_map_bwd(weight, *double, stats, *arguments)
        limits = torch.finfo(x.q_s.dtype)
        unavoidable = unavoidable_errors(x, stats, weight, *arguments)
        in_forward = function is attention_map_loss and reduction != "none"
        in_forward = in_forward and x.q_s.dtype != HALF and not on_gpu(x.q_s)
        in_forward = in_forward or wide == DOUBLE
        for name, grad, want, like, of_torch, least, saved in zip(
            ("d_q", "d_k"), given[1:], grads, x.student, of_grads, *unavoidable, strict=True
        ):
            assert (grad.dtype, grad.shape) == (like.dtype, like.shape)
            rounding = limits.eps / 2 * want.abs().clamp(min=limits.smallest_normal)
            allowed = least.clamp(min=of_torch) + roundings * rounding
            if not in_forward:
                allowed += saved
            assert_within(allowed, grad, want, f"{reduction}: {name}")


def test_new_memory_is_poisoned() -> None:
    """Else an output that nothing writes could pass by chance."""
    assert torch.empty(100).isnan().all()
    assert torch.empty_like(draw(3, 4, dtype=BFLOAT)).isnan().all()


# against the reference


@every_device
@every_kind
@pytest.mark.parametrize("name", OPTIONS)
def test_reference_matches_torch(name: str, kind: str, device: str) -> None:
    """The specification: rows by torch's functions, and their gradients by autograd."""
    x = maps(2, 3, 5, 7, 4, 6, dtype=DOUBLE, device=device)
    options = OPTIONS[name](x) | {"kind": kind}
    want = loss_and_grads(x, torch_rows, **options)
    assert want.loss.max() > 0
    arguments = operation_options(x, **options)
    assert_close(reference.attention_map_rows(*x, *arguments[:4], arguments[5]), want.loss)
    for reduction, share in {"mean": 1 / 30, "sum": 1.0, "none": 1.0}.items():
        arguments = operation_options(x, reduction=reduction, **options)
        loss, stats = reference.attention_map_fwd(*x, *arguments)
        grads = reference.attention_map_bwd(torch.ones_like(loss), *x, stats, *arguments)
        assert_close(loss, want.loss if reduction == "none" else want.loss.sum() * share)
        assert_all_close(grads, [share * y for y in want[1:]])
        if reduction != "none":
            assert_same(reference.attention_map_fwd_grad(*x, *arguments), (loss, *grads))


def test_reference_keeps_the_digits_of_js() -> None:
    """Where student and teacher look at different keys it is ln 2, however large scores are."""
    keys = torch.eye(8).view(1, 1, 8, 8)
    for score in (50.0, 100.0, 1000.0):
        x = (score * keys, keys, score * keys.roll(1, -1), keys)
        rows = reference.attention_map_rows(*x, 1.0, 1.0, 1.0, reference.JS)
        torch.testing.assert_close(rows, torch.full_like(rows, math.log(2)), rtol=2e-7, atol=0)


@every_kind
def test_reference_matches_probabilities(kind: str) -> None:
    """The divergences once more, as they are written on paper."""
    x = maps(2, 3, 5, 7, 4, 6, dtype=DOUBLE)
    q, p = ((a @ b.mT / c).softmax(-1) for a, b, c in ((x.q_s, x.k_s, 4), (x.q_t, x.k_t, 5)))
    m = (p + q) / 2
    want = {
        "kl": (p * (p / q).log()).sum(-1),
        "reverse_kl": (q * (q / p).log()).sum(-1),
        "js": ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2,
        "mse": (p - q).square().sum(-1),
    }[kind]
    options = {"kind": kind, "scale_s": 2 / 4, "scale_t": 2 / 5, "temperature": 2.0}
    assert_close(attention_map_loss(*x, reduction="none", **options), 4 * want)


SHAPES = [  # batch, heads, queries, keys, dim, dim of the teacher
    (1, 1, 1, 1, 1, 1), (2, 1, 1, 1, 16, 64), (1, 3, 1, 5, 16, 16), (2, 2, 5, 1, 24, 16),
    (1, 2, 2, 2, 3, 1), (2, 3, 5, 17, 16, 24), (3, 1, 17, 5, 64, 3), (1, 2, 17, 17, 80, 80),
    (1, 2, 49, 49, 64, 64), (1, 1, 64, 64, 96, 24), (1, 2, 65, 65, 32, 128),
    (2, 1, 13, 49, 128, 96),
    (1, 1, 25, 24, 16, 1), (1, 1, 7, 257, 24, 16), (1, 1, 100, 9, 20, 16),
]  # fmt: skip
LONG_SHAPES = [(1, 1, 196, 196, 64, 64), (1, 1, 197, 197, 24, 16), (1, 1, 5, 1025, 16, 16)]
LONGER_SHAPES = [
    (1, 2, 196, 196, 80, 128), (2, 1, 197, 197, 64, 64), (1, 1, 256, 256, 32, 64),
    (1, 1, 577, 577, 64, 80), (1, 1, 1025, 1025, 64, 64), (1, 2, 577, 9, 96, 16),
    (1, 1, 3, 4096, 64, 64), (1, 1, 4096, 3, 24, 64), (1, 1, 577, 577, 3, 16),
    (1, 1, 33, 65, 300, 192),
]  # fmt: skip


@every_device
@every_kind
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_match(shape: tuple[int, ...], kind: str, device: str) -> None:
    x = maps(*shape, device=device)
    for name in MAIN_OPTIONS:
        check(x, kind=kind, **OPTIONS[name](x))


@every_device
@every_kind
@pytest.mark.parametrize("shape", LONG_SHAPES, ids=str)
def test_long_shapes_match(shape: tuple[int, ...], kind: str, device: str) -> None:
    check(maps(*shape, device=device), kind=kind, reductions=["mean"])


@every_device
@every_kind
@pytest.mark.parametrize("shape", LONGER_SHAPES, ids=str)
@pytest.mark.slow
def test_longer_shapes_match(shape: tuple[int, ...], kind: str, device: str) -> None:
    for dtype in (FLOAT, HALF, BFLOAT):
        x = maps(*shape, dtype=dtype, device=device)
        for name in MAIN_OPTIONS:
            check(x, kind=kind, reductions=["mean", "none"], **OPTIONS[name](x))


@every_device
@every_kind
@pytest.mark.parametrize("name", OPTIONS)
def test_options_match(name: str, kind: str, device: str) -> None:
    for shape in ((2, 2, 9, 21, 16), (2, 1, 20, 50, 24)):
        x = maps(*shape, device=device)
        check(x, kind=kind, **OPTIONS[name](x))


@every_device
@every_kind
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        *itertools.product([FLOAT, HALF, BFLOAT], repeat=2),
        (DOUBLE, DOUBLE), (DOUBLE, HALF), (FLOAT, DOUBLE),
    ],
    ids=str,
)  # fmt: skip
def test_dtypes_match(student: torch.dtype, teacher: torch.dtype, kind: str, device: str) -> None:
    """Rows of whole vectors and others."""
    for dim, dim_t in ((16, 24), (24, 16)):
        x = maps(2, 1, 9, 21, dim, dim_t, student, teacher, device)
        check(x, kind=kind, **OPTIONS["everything"](x))


LAYOUTS: dict[str, Callable[[Callable[..., Tensor], int], Tensor]] = {  # [2, 3, 17, dim]
    "contiguous": lambda new, dim: new(2, 3, 17, dim),
    "of_qkv": lambda new, dim: new(2, 17, 3, 3, dim).permute(2, 0, 3, 1, 4)[1],
    "of_qkv_without_cls": lambda new, dim: new(2, 18, 3, 3, dim).permute(2, 0, 3, 1, 4)[
        0, :, :, 1:
    ],
    "heads_after_tokens": lambda new, dim: new(2, 17, 3, dim).transpose(1, 2),
    "of_a_feature_map": lambda new, dim: new(2, 3, dim, 17).mT,
    "batch_last": lambda new, dim: new(3, 17, dim, 2).permute(3, 0, 1, 2),
    "offset": lambda new, dim: new(1 + 102 * dim)[1:].view(2, 3, 17, dim),
    "dims_of_more": lambda new, dim: new(2, 3, 17, dim + 5)[..., 2 : dim + 2],
    "every_other_dim": lambda new, dim: new(2, 3, 17, 2 * dim)[..., ::2],
    "every_other_token": lambda new, dim: new(2, 3, 34, dim)[:, :, ::2],
    "every_other_head": lambda new, dim: new(2, 6, 17, dim)[:, ::2],
    "expanded_batch": lambda new, dim: new(1, 3, 17, dim).expand(2, -1, -1, -1),
    "expanded_heads": lambda new, dim: new(2, 1, 17, dim).expand(-1, 3, -1, -1),
    "expanded_tokens": lambda new, dim: new(2, 3, 1, dim).expand(-1, -1, 17, -1),
    "expanded_dim": lambda new, dim: new(2, 3, 17, 1).expand(-1, -1, -1, dim),
    "overlapping": lambda new, dim: new(2, 3, 16 + dim).unfold(2, dim, 1),
}


@every_device
@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
@pytest.mark.parametrize("dim", [16, 20])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_match(layout: str, dim: int, dtype: torch.dtype, device: str) -> None:
    """Queries of one layout beside keys and teachers of the next, and the gradients' strides."""
    new = partial(draw, dtype=dtype, device=device)
    following = itertools.islice(itertools.cycle(LAYOUTS), [*LAYOUTS].index(layout), None)
    for kind, name in (("kl", "plain"), ("js", "everything")):
        x = Maps(*(LAYOUTS[next(following)](new, dim) for _ in range(4)))
        options = OPTIONS[name](x) | {"kind": kind}
        check(x, reductions=["mean", "none"], **options)
        for reduction in ("mean", "none"):
            grads = loss_and_grads(x, reduction=reduction, **options)[1:]
            for grad, like in zip(grads, x.student, strict=True):
                assert grad.stride() == torch.empty_like(like).stride()


@every_device
@every_kind
@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=str)
def test_one_qkv_of_each_matches(dtype: torch.dtype, kind: str, device: str) -> None:
    """Both gradients arrive in the tensor that queries and keys are cut out of."""
    qkv, qkv_t = (draw(2, 17, 3, 3, dim, dtype=dtype, device=device) for dim in (16, 24))

    def loss(qkv: Tensor, q_t: Tensor, k_t: Tensor) -> Tensor:
        q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return attention_map_loss(q, k, q_t, k_t, kind=kind)

    q_t, k_t, _ = qkv_t.permute(2, 0, 3, 1, 4).unbind(0)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    (grad,) = torch.autograd.grad(loss(qkv.requires_grad_(), q_t, k_t), qkv)
    want = loss_and_grads(Maps(q, k, q_t, k_t), kind=kind)
    assert_same(grad.permute(2, 0, 3, 1, 4), (want.d_q, want.d_k, torch.zeros_like(q)))


@every_device
@every_kind
@every_reduction
@pytest.mark.parametrize("name", MAIN_OPTIONS)
def test_operations_match(name: str, reduction: str, kind: str, device: str) -> None:
    """Either way to the gradients, each with every reduction, also those the function spares it."""
    x = maps(2, 2, 9, 21, device=device)
    options = OPTIONS[name](x) | {"kind": kind}
    arguments = operation_options(x, reduction=reduction, **options)

    class InForward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *x: Tensor) -> Tensor:
            loss, *ctx.grads = OPS.attention_map_fwd_grad(*x, *arguments)
            return loss

        @staticmethod
        def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
            assert grad_loss == 1
            return *ctx.grads, None, None

    class InBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *x: Tensor) -> Tensor:
            loss, ctx.stats = OPS.attention_map_fwd(*x, *arguments)
            ctx.save_for_backward(*x)
            return loss

        @staticmethod
        def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
            maps = ctx.saved_tensors
            return *OPS.attention_map_bwd(grad_loss, *maps, ctx.stats, *arguments), None, None

    ways: list[tuple[Any, float | None]] = [(InBackward, None), (InBackward, -2.5)]
    if reduction != "none":
        ways.append((InForward, None))
    for way, grad_loss in ways:
        function = lambda *x, **_: way.apply(*x)  # noqa: B023, E731
        check(x, function=function, reductions=[reduction], grad_loss=grad_loss, **options)

    _, stats = OPS.attention_map_fwd(*x, *arguments)
    assert (stats.shape, stats.dtype) == ((3, *x.q_s.shape[:3]), FLOAT)
    double = (y.double() for y in x)
    assert_close(stats.double(), reference.attention_map_fwd(*double, *arguments)[1], **CLOSE)
    if kind == "kl":
        assert (stats[2] == 0).all()


CLOSE = {"rtol": 1.3e-6, "atol": 1e-5}  # torch's own tolerance for float32


@every_device
@every_reduction
@every_kind
@pytest.mark.parametrize(
    "shape", [(0, 2, 5, 5, 16), (2, 0, 5, 5, 16), (2, 2, 0, 5, 16), (0, 0, 0, 5, 3)], ids=str
)
def test_empty_matches(shape: tuple[int, ...], kind: str, reduction: str, device: str) -> None:
    """No rows: a loss of 0, the mean too, and keys without a query have a gradient of 0."""
    for dtype in (FLOAT, HALF, DOUBLE):
        x = Maps(
            *(draw(*shape[:2], n, shape[4], dtype=dtype, device=device) for n in shape[2:4] * 2)
        )
        mask = torch.ones(shape[0], shape[3], dtype=torch.bool, device=device)
        for options in ({}, {"key_mask": mask}):
            loss, *grads = loss_and_grads(x, kind=kind, reduction=reduction, **options)
            assert loss.shape == (x.q_s.shape[:3] if reduction == "none" else ())
            assert loss.sum() == 0
            for grad, like in zip(grads, x.student, strict=True):
                assert grad.shape == like.shape
                assert (grad == 0).all()


# the mask


@every_device
@every_kind
@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT, DOUBLE], ids=str)
def test_mask_matches_fewer_keys(dtype: torch.dtype, kind: str, device: str) -> None:
    """Keys that are masked everywhere are as if they were not there; their gradient is 0."""
    x = maps(2, 3, 9, 40, 16, 24, dtype=dtype, device=device)
    only = torch.rand(40) < 0.5
    only[35:] = False
    ends = torch.arange(40)
    masks = {"some": only, "first": ends < 1, "last": ends > 38, "none": ends < 0, "all": ends < 40}
    for name, keep in masks.items():
        if name == "none":
            continue
        keep = keep.to(device)
        mask = keep.expand(2, -1)
        left = Maps(x.q_s, x.k_s[:, :, keep], x.q_t, x.k_t[:, :, keep])
        for reduction in ("mean", "none"):
            options = {"kind": kind, "reduction": reduction}
            loss, d_q, d_k = loss_and_grads(x, key_mask=mask, **options)
            want = loss_and_grads(left, **options)
            assert_close(loss, want.loss)
            assert_close(d_q, want.d_q)
            assert_close(d_k[:, :, keep], want.d_k)
            assert (d_k[:, :, ~keep] == 0).all()


@every_device
def test_mask_of_any_strides_matches(device: str) -> None:
    x = maps(3, 2, 5, 12, device=device)
    keep = key_mask(3, 12, device)
    want = loss_and_grads(x, key_mask=keep)
    wider = torch.zeros(3, 24, dtype=torch.bool, device=device)
    wider[:, ::2] = keep
    for mask in (keep.t().contiguous().t(), wider[:, ::2]):
        assert not mask.is_contiguous()
        assert_same(loss_and_grads(x, key_mask=mask), want)


@every_device
@every_kind
@pytest.mark.parametrize("garbage", [0.0, 1e4, -1e12, 3e31])
def test_extreme_numbers_in_masked_keys_are_not_looked_at(
    garbage: float, kind: str, device: str
) -> None:
    """Whatever finite number a masked key holds, no other's loss or gradient changes."""
    x = maps(2, 2, 9, 21, device=device)
    mask = key_mask(2, 21, device)
    options = {"key_mask": mask, "kind": kind, "reduction": "none"}
    want = loss_and_grads(x, **options)
    where = ~mask[:, None, :, None].expand_as(x.k_s)
    for spoilt in ((True, True), (True, False), (False, True)):
        k_s, k_t = (
            k.masked_fill(where, garbage) if spoil else k
            for k, spoil in zip((x.k_s, x.k_t), spoilt, strict=True)
        )
        given = loss_and_grads(Maps(x.q_s, k_s, x.q_t, k_t), **options)
        assert_all_close(given, want)
        assert (given.d_k[where] == 0).all()


@every_device
@every_kind
@pytest.mark.parametrize("bad", [NAN, INF])
def test_extreme_nan_in_masked_keys_gives_nothing_wrong(bad: float, kind: str, device: str) -> None:
    """NaN times 0 is NaN: a result is that, or as if the key were not there."""
    x = maps(2, 2, 9, 21, device=device)
    mask = key_mask(2, 21, device)
    options = {"key_mask": mask, "kind": kind, "reduction": "none"}
    want = loss_and_grads(x, **options)
    where = ~mask[:, None, :, None].expand_as(x.k_s)
    spoilt = Maps(x.q_s, x.k_s.masked_fill(where, bad), x.q_t, x.k_t.masked_fill(where, bad))
    for given, right in zip(loss_and_grads(spoilt, **options), want, strict=True):
        assert_close(torch.where(given.isnan(), right, given), right)


@every_kind
@pytest.mark.parametrize("dtype", [FLOAT, HALF, BFLOAT, DOUBLE], ids=str)
def test_a_row_without_keys_is_an_error_on_the_cpu(dtype: torch.dtype, kind: str) -> None:
    if _ops.backends()["attention_map_fwd"]["CPU"] == "reference":
        pytest.skip("the reference gives 0 on any device")
    x = maps(3, 2, 5, 12, dtype=dtype)
    mask = key_mask(3, 12)
    mask[1] = False
    for reduction in REDUCTIONS:
        for function in (attention_map_loss, loss_and_grads_of_function):
            with pytest.raises(RuntimeError, match="key_mask keeps no key of batch element 1"):
                function(*x, kind=kind, key_mask=mask, reduction=reduction)


def loss_and_grads_of_function(*x: Tensor, **options: Any) -> Results:
    return loss_and_grads(Maps(*x), **options)


@pytest.mark.parametrize(
    "device",
    [
        pytest.param(
            "cpu",
            marks=pytest.mark.skipif(
                _ops.backends()["attention_map_fwd"]["CPU"] == "C++", reason="there, an error"
            ),
        ),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)
@every_kind
@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT, DOUBLE], ids=str)
def test_a_row_without_keys_matches_0_on_a_gpu(dtype: torch.dtype, kind: str, device: str) -> None:
    """It counts as a row in the mean, and the others are what they are without it."""
    if device == "cpu" and dtype == DOUBLE:
        pytest.skip("in float64 it is an error on any CPU")
    x = maps(3, 2, 5, 12, dtype=dtype, device=device)
    mask = key_mask(3, 12, device)
    mask[1] = False
    others = torch.tensor([0, 2], device=device)
    want = loss_and_grads(
        Maps(*(y[others] for y in x)), key_mask=mask[others], kind=kind, reduction="none"
    )
    given = loss_and_grads(x, key_mask=mask, kind=kind, reduction="none")
    for y, z in zip(given, want, strict=True):
        assert_close(y[others], z)
        assert (y[1] == 0).all()
    mean = loss_and_grads(x, key_mask=mask, kind=kind)
    assert_close(mean.loss, want.loss.mean() * 2 / 3)
    assert (mean.d_q[1] == 0).all()
    assert (mean.d_k[1] == 0).all()


# extremes

FORMS = {"few": (2, 2, 5, 7, 3), "vectors": (1, 2, 33, 64, 16), "rest": (1, 1, 30, 50, 24)}
every_form = pytest.mark.parametrize("shape", FORMS.values(), ids=FORMS)


@every_device
@every_kind
@every_form
@pytest.mark.parametrize("temperature", [0.1, 1.0, 20.0])
def test_extreme_scores(temperature: float, shape: tuple[int, ...], kind: str, device: str) -> None:
    """Scores of +-1e3 of both, of either alone, and far from 0 but close together."""
    x = maps(*shape, device=device)
    options = {"temperature": temperature, "kind": kind, "reductions": ["mean", "none"]}
    for student, teacher in ((400, 400), (400, 1), (1, 400)):
        check(x.times(student, teacher), **options)
    # a common direction of queries and keys, which moves all scores alike
    far = [torch.cat([y, torch.full_like(y[..., :1], 30.0)], -1) for y in x]
    check(Maps(*far), **options)


@every_device
@every_kind
@every_form
@pytest.mark.parametrize("scale", [1e4, -1e4, 1e-30, 0.0])
def test_extreme_scales(scale: float, shape: tuple[int, ...], kind: str, device: str) -> None:
    x = maps(*shape, device=device)
    for scales in ({"scale_s": scale}, {"scale_t": scale}, {"scale_s": scale, "scale_t": -scale}):
        check(x, kind=kind, reductions=["mean"], **scales)


@every_device
@every_kind
@every_form
@pytest.mark.parametrize("dtype", [FLOAT, HALF, BFLOAT], ids=str)
def test_extreme_attention_to_one_key(
    dtype: torch.dtype, shape: tuple[int, ...], kind: str, device: str
) -> None:
    """All but one of the teacher's probabilities underflow; the student's, and at another key."""
    x = maps(*shape, dtype=dtype, device=device)
    chosen = torch.zeros_like(x.k_s)
    chosen[:, :, 1] = 20.0
    other = torch.zeros_like(x.k_s)
    other[:, :, 3] = 20.0
    ones = torch.full_like(x.q_s, 20.0)
    options = {"kind": kind, "reductions": ["mean", "none"]}
    check(Maps(*x.student, ones, chosen), **options)
    check(Maps(ones, chosen, *x.teacher), **options)
    apart = Maps(ones, other, ones, chosen)
    check(apart, **options)
    loss, *grads = loss_and_grads(apart, kind=kind, reduction="none")
    if kind in ("js", "mse"):
        assert_close(loss, torch.full_like(loss, math.log(2) if kind == "js" else 2.0))
        # a probability of 1 comes from a rounded log-sum-exp where scores are held times log2(e)
        assert on_tensor_cores(x) or all((grad == 0).all() for grad in grads)


@every_device
@every_kind
@every_form
@pytest.mark.parametrize("dtype", [FLOAT, HALF, BFLOAT, DOUBLE], ids=str)
def test_extreme_equality_gives_zero(
    dtype: torch.dtype, shape: tuple[int, ...], kind: str, device: str
) -> None:
    """student == teacher: a loss of 0 and gradients of 0, exactly, also of scores of +-1e3."""
    x = maps(*shape, dtype=dtype, device=device)
    mask = key_mask(len(x.k_s), x.k_s.shape[2], device)
    for q, keep, temperature, reduction in itertools.product(
        (x.q_s, 20 * x.q_s), (None, mask), (0.5, 1.0, 3.0), REDUCTIONS
    ):
        results = loss_and_grads(
            Maps(q, x.k_s, q.clone(), x.k_s.clone()), kind=kind, key_mask=keep,
            temperature=temperature, reduction=reduction,
        )  # fmt: skip
        # float64 is served by autograd, which adds up to 0 but for rounding
        most = 1e-12 if dtype == DOUBLE else 0
        for name, result in zip(Results._fields, results, strict=True):
            assert result.abs().max() <= most, f"{name}, {reduction}: {result.abs().max():.3g}"


@every_device
@every_kind
@pytest.mark.parametrize("dtype", [FLOAT, HALF, DOUBLE], ids=str)
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_extreme_zeros(zero: float, dtype: torch.dtype, kind: str, device: str) -> None:
    """Nothing is preferred by either: the same uniform attention."""
    x = Maps(*(torch.full_like(y, zero) for y in maps(dtype=dtype, device=device)))
    for result in loss_and_grads(x, kind=kind):
        assert_close(result, torch.zeros_like(result), rtol=0, atol=1e-7)


@every_device
@every_kind
@every_form
def test_extreme_closeness(shape: tuple[int, ...], kind: str, device: str) -> None:
    """The loss is far below its own terms."""
    x = maps(*shape, device=device)
    check(Maps(x.q_s * (1 + 1e-4), x.k_s, x.q_s, x.k_s), kind=kind, reductions=["mean", "none"])


@every_device
@every_kind
@every_form
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("who", Maps._fields)
def test_extreme_nan_stays(
    who: str, bad: float, shape: tuple[int, ...], kind: str, device: str
) -> None:
    """As in torch, NaN and inf in a query make its row NaN, in a key all rows; of no other head."""
    x = maps(*shape, device=device)
    getattr(x, who)[0, 0, 3] = bad
    for options in ({}, {"temperature": 2.0, "reduction": "none"}, {"reduction": "none"}):
        given, want = (
            loss_and_grads(x, function, kind=kind, **options)
            for function in (attention_map_loss, torch_rows)
        )
        if "reduction" not in options:
            assert given.loss.isnan()
            given, want = given[1:], want[1:]
        for y, z in zip(given, want, strict=True):
            off = y.isnan() != z.isnan()
            if on_gpu(x.q_s) and math.isinf(bad):
                # a product of two parts of float32 may be inf with the other sign
                off[0, 0] &= z[0, 0].isnan()
            assert not off.any()


# autograd


PATHS = [(FLOAT, "mean"), (FLOAT, "none"), (HALF, "mean"), (BFLOAT, "sum"), (DOUBLE, "mean")]
every_path = pytest.mark.parametrize(("dtype", "reduction"), PATHS, ids=str)
SMALL = (2, 2, 5, 7, 16, 8)


@every_device
@every_kind
@every_reduction
@pytest.mark.parametrize("name", ["plain", "everything"])
def test_gradcheck(name: str, reduction: str, kind: str, device: str) -> None:
    x = maps(2, 1, 3, 4, 3, 2, dtype=DOUBLE, device=device)
    options = OPTIONS[name](x) | {"kind": kind, "reduction": reduction}
    function = lambda q, k: attention_map_loss(q, k, *x.teacher, **options)  # noqa: E731
    assert torch.autograd.gradcheck(function, [y.requires_grad_() for y in x.student])


@every_device
@every_path
def test_loss_times_a_factor(dtype: torch.dtype, reduction: str, device: str) -> None:
    """The incoming gradient is any number, and 0 for what has no share in the result.

    In bfloat16 a gradient that was formed in the forward is rounded again by a factor that is no
    power of 2.
    """
    x = maps(*SMALL, dtype=dtype, device=device)
    for factor in (3.0, -0.7, 0.0, 65536.0, 2.0**-10):
        for kind, name in zip(KINDS, itertools.cycle(MAIN_OPTIONS), strict=False):
            check(
                x, kind=kind, reductions=[reduction], grad_loss=factor,
                roundings=2 if dtype == BFLOAT and factor in (3.0, -0.7) else 1,
                **OPTIONS[name](x),
            )  # fmt: skip


@every_device
def test_gradient_scale_reaches_float16_before_it_is_rounded(device: str) -> None:
    """Scaled by 65536, gradients that float16 would have lost: many of them are lost without."""
    x = maps(16, 8, 49, dtype=HALF, device=device)
    near = (x.q_s.float() * (1 + 2e-3)).half()
    x = Maps(*x.student, near, x.k_s)
    for kind in KINDS:
        lost = loss_and_grads(x, kind=kind)
        assert min((y == 0).float().mean() for y in lost[1:]) > 0.3
        incoming = torch.tensor(65536.0, device=device)
        kept = loss_and_grads(x, incoming=incoming, kind=kind)
        assert max((y == 0).float().mean() for y in kept[1:]) < 0.001
        check(x, kind=kind, reductions=["mean"], grad_loss=65536.0)


@every_device
@every_kind
@pytest.mark.parametrize("dtype", [FLOAT, HALF, DOUBLE], ids=str)
def test_incoming_gradient_of_any_strides(dtype: torch.dtype, kind: str, device: str) -> None:
    x = maps(2, 3, 5, dtype=dtype, device=device)
    new = partial(draw, dtype=DOUBLE if dtype == DOUBLE else FLOAT, device=device)
    given = partial(loss_and_grads, x, kind=kind, reduction="none")
    for strided in (
        new(1, 1, 1).expand(2, 3, 5),
        new(2, 1, 5).expand(2, 3, 5),
        new(2, 5, 3).transpose(1, 2),
        new(2, 3, 10)[..., ::2],
        new(5, 3, 2).permute(2, 1, 0),
    ):
        assert_same(given(incoming=strided), given(incoming=strided.contiguous()))
    leaves = [y.detach().requires_grad_() for y in x.student]
    loss = attention_map_loss(*leaves, *x.teacher, kind=kind, reduction="none")
    assert_same(torch.autograd.grad(loss.sum(), leaves), given()[1:])  # expanded by autograd


@every_device
@every_path
@pytest.mark.parametrize("of", [(True, False), (False, True)], ids=["q_s", "k_s"])
def test_gradient_of_one_alone(
    of: tuple[bool, bool], dtype: torch.dtype, reduction: str, device: str
) -> None:
    x = maps(*SMALL, dtype=dtype, device=device)
    want = loss_and_grads(x, reduction=reduction)
    leaves = [
        y.detach().requires_grad_(required) for y, required in zip(x.student, of, strict=True)
    ]
    attention_map_loss(*leaves, *x.teacher, reduction=reduction).sum().backward()
    for leaf, required, grad in zip(leaves, of, want[1:], strict=True):
        if required:
            assert torch.equal(leaf.grad, grad)
        else:
            assert leaf.grad is None


@every_device
@every_path
def test_loss_used_twice(dtype: torch.dtype, reduction: str, device: str) -> None:
    x = maps(*SMALL, dtype=dtype, device=device)
    leaves = [y.clone().requires_grad_() for y in x.student]
    loss = attention_map_loss(*leaves, *x.teacher, reduction=reduction)
    (3 * loss + loss).sum().backward()
    four = lambda *y: 4 * attention_map_loss(*y, reduction=reduction)  # noqa: E731
    want = loss_and_grads(x, four)[1:]
    compare = assert_all_close if dtype == DOUBLE else assert_same  # 3 + 1 in another order
    compare([leaf.grad for leaf in leaves], want)


@every_device
@every_path
def test_backward_twice(dtype: torch.dtype, reduction: str, device: str) -> None:
    """Each gives the same gradients, its own to keep; and none a third time."""
    x = maps(*SMALL, dtype=dtype, device=device)
    leaves = [y.requires_grad_() for y in x.student]
    options = OPTIONS["everything"](x)
    loss = attention_map_loss(*leaves, *x.teacher, reduction=reduction, **options).sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [grad.clone() for grad in first]
    second = torch.autograd.grad(2 * loss, leaves, retain_graph=True)
    assert_same(first, kept)
    doubled = lambda *y: 2 * attention_map_loss(*y, reduction=reduction, **options)  # noqa: E731
    assert_same(second, loss_and_grads(x, doubled)[1:])
    assert len({grad.data_ptr() for grad in (*first, *second)}) == 4

    loss.backward(retain_graph=True)
    loss.backward()
    assert_same([leaf.grad for leaf in leaves], [2 * grad for grad in kept])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
    assert_same([leaf.grad for leaf in leaves], [2 * grad for grad in kept])


@every_device
@every_path
def test_gradients_accumulate(dtype: torch.dtype, reduction: str, device: str) -> None:
    """Into the tensors that are there, over losses and steps."""
    x = maps(*SMALL, dtype=dtype, device=device)
    leaves = [y.clone().requires_grad_() for y in x.student]
    there, wanted = [], []
    for leaf in leaves:
        leaf.grad = torch.ones_like(leaf)
        there.append(leaf.grad)
        wanted.append(torch.ones_like(leaf))
    for kind in KINDS:
        options = {"kind": kind, "reduction": reduction}
        attention_map_loss(*leaves, *x.teacher, **options).sum().backward()
        for want, grad in zip(wanted, loss_and_grads(x, **options)[1:], strict=True):
            want += grad
    assert all(leaf.grad is y for leaf, y in zip(leaves, there, strict=True))
    assert_same(there, wanted)

    for leaf in leaves:  # the first gradient may become .grad itself: the next must not spoil it
        leaf.grad = None
    attention_map_loss(*leaves, *x.teacher, reduction=reduction).sum().backward()
    first = [leaf.grad.clone() for leaf in leaves]
    other = Maps(*x.student, 2 * x.q_t, x.k_t)
    attention_map_loss(*leaves, *other.teacher, reduction=reduction).sum().backward()
    second = loss_and_grads(other, reduction=reduction)[1:]
    assert_same([leaf.grad for leaf in leaves], [a + b for a, b in zip(first, second, strict=True)])


@every_device
@every_path
def test_loss_is_differentiable_once(dtype: torch.dtype, reduction: str, device: str) -> None:
    """A penalty on the gradient is an error, and never left out silently.

    In float64, which autograd serves, it is there.
    """
    x = maps(*SMALL, dtype=dtype, device=device)
    leaves = [y.requires_grad_() for y in x.student]
    if dtype == DOUBLE:
        x = maps(1, 1, 2, 3, 2, dtype=dtype, device=device)
        function = lambda q, k: attention_map_loss(q, k, *x.teacher, reduction=reduction)  # noqa: E731
        assert torch.autograd.gradgradcheck(function, [y.requires_grad_() for y in x.student])
        return
    # the incoming gradient does not require grad, and does
    for function in (lambda loss: loss.sum(), lambda loss: loss.square().sum()):
        loss = function(attention_map_loss(*leaves, *x.teacher, reduction=reduction))
        for grad in torch.autograd.grad(loss, leaves, create_graph=True):
            with pytest.raises(RuntimeError, match="differentiable once"):
                (loss + grad.float().square().sum()).backward(retain_graph=True)


@every_device
@every_path
def test_constants_made_in_inference_mode(dtype: torch.dtype, reduction: str, device: str) -> None:
    """Teacher and mask as a teacher run under torch.inference_mode leaves them."""
    x = maps(*SMALL, dtype=dtype, device=device)
    options = OPTIONS["everything"](x) | {"reduction": reduction}
    with torch.inference_mode():
        teacher = [y.clone() for y in x.teacher]
        mask = options["key_mask"].clone()
    given = loss_and_grads(Maps(*x.student, *teacher), **options | {"key_mask": mask})
    assert_same(given, loss_and_grads(x, **options))


@every_device
@every_path
def test_without_gradient(dtype: torch.dtype, reduction: str, device: str) -> None:
    """The same loss, as good as the one with a gradient, and no graph."""
    x = maps(*SMALL, dtype=dtype, device=device)
    options = OPTIONS["everything"](x) | {"reduction": reduction}
    want, *_ = loss_and_grads(x, **options)
    leaves = [y.clone().requires_grad_() for y in x.student]
    with torch.no_grad():
        losses = [attention_map_loss(*leaves, *x.teacher, **options)]
    with torch.inference_mode():
        losses.append(attention_map_loss(*leaves, *x.teacher, **options))
    losses.append(attention_map_loss(*x, **options))
    for loss in losses:
        assert not loss.requires_grad
        assert_close(loss, want)


@every_device
@every_path
@pytest.mark.parametrize("which", [0, 1], ids=["q_s", "k_s"])
def test_student_changed_in_place_gives_no_wrong_gradient(
    which: int, dtype: torch.dtype, reduction: str, device: str
) -> None:
    """Either the gradients at the tensors of the forward, or an error."""
    x = maps(*SMALL, dtype=dtype, device=device)
    want = loss_and_grads(x, reduction=reduction)[1:]
    leaves = [y.clone().requires_grad_() for y in x.student]
    student = [leaf * 1 for leaf in leaves]
    loss = attention_map_loss(*student, *x.teacher, reduction=reduction).sum()
    with torch.no_grad():
        student[which].add_(1)
    formed_in_forward = reduction != "none" and dtype in (FLOAT, BFLOAT)
    if formed_in_forward:
        assert_same(torch.autograd.grad(loss, leaves, retain_graph=True), want)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_device
@every_kind
def test_operations_change_no_input(kind: str, device: str) -> None:
    for dtype in (FLOAT, HALF):
        x = maps(*SMALL, dtype=dtype, device=device)
        options = OPTIONS["everything"](x)
        held = [*x, options["key_mask"]]
        before = [y.clone() for y in held]
        for reduction in REDUCTIONS:
            loss_and_grads(x, kind=kind, reduction=reduction, **options)
        assert_same(held, before)


# the same bits


@every_device
@every_kind
@pytest.mark.parametrize(
    "shape", [(3, 2, 49, 49, 24), (1, 5, 100, 197, 16), (1, 1, 20, 150, 16)], ids=str
)
def test_bitwise_the_same(shape: tuple[int, ...], kind: str, device: str) -> None:
    """Twice, and for any number of threads."""
    x = maps(*shape, device=device)
    options = OPTIONS["mask"](x) | {"kind": kind}
    for reduction in REDUCTIONS:
        results = []
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            results.append(loss_and_grads(x, reduction=reduction, **options))
        for result in results[1:]:
            assert_same(result, results[0])


@every_kind
def test_head_is_the_same_alone(kind: str) -> None:
    """Wherever it stands in a batch, and whoever stands beside it: threads share the heads out."""
    if _ops.backends()["attention_map_fwd"]["CPU"] == "reference":
        pytest.skip("torch's products may depend on the batch")
    x = maps(3, 2, 20, 33, 24)
    for reduction in ("sum", "none"):
        _, *grads = loss_and_grads(x, kind=kind, reduction=reduction)
        for i, j in itertools.product(range(3), range(2)):
            alone = Maps(*(y[i : i + 1, j : j + 1] for y in x))
            given = loss_and_grads(alone, kind=kind, reduction=reduction)[1:]
            assert_same(given, [grad[i : i + 1, j : j + 1] for grad in grads])


# torch.library and torch.compile


def opcheck_inputs(case: str, device: str) -> tuple[Maps, dict[str, Any]]:
    new = partial(draw, device=device)
    dtype = {"bfloat16": BFLOAT, "float16": HALF}.get(case, FLOAT)
    if case == "strided":
        q_s, k_s, _ = new(2, 5, 3, 3, 8).permute(2, 0, 3, 1, 4).unbind(0)
        return Maps(q_s, k_s, new(2, 3, 4, 5).mT, new(2, 1, 5, 4).expand(-1, 3, -1, -1)), {}
    if case == "transposed":
        return Maps(new(2, 3, 4, 5).mT, new(2, 3, 4, 10).mT[:, :, ::2], new(2, 3, 5, 4),
                    new(2, 3, 5, 8)[..., ::2]), {}  # fmt: skip
    x = maps(2, 3, 5, 7, 4, 6, dtype, FLOAT, device)
    return x, {} if case == "plain" else OPTIONS["everything"](x)


@every_device
@pytest.mark.parametrize(
    ("case", "kind", "reduction"),
    [
        ("plain", "kl", "mean"), ("bfloat16", "js", "sum"), ("float16", "mse", "none"),
        ("strided", "reverse_kl", "none"), ("transposed", "kl", "mean"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("operation", OPERATIONS)
def test_opcheck(operation: str, case: str, kind: str, reduction: str, device: str) -> None:
    """Schema, fake, autograd registration and AOT dispatch, by torch's own checks."""
    if operation == "attention_map_fwd_grad" and reduction == "none":
        reduction = "sum"  # it has one number to give
    x, options = opcheck_inputs(case, device)
    arguments = operation_options(x, kind=kind, reduction=reduction, **options)
    loss, stats = OPS.attention_map_fwd(*x, *arguments)
    inputs = (*x, *arguments)
    if operation == "attention_map_bwd":
        inputs = (torch.ones_like(loss), *x, stats, *arguments)
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
    ("name", "kind", "dtype"),
    [
        ("plain", "kl", FLOAT), ("everything", "js", FLOAT), ("mask", "reverse_kl", BFLOAT),
        ("T_4", "mse", HALF), ("everything", "kl", DOUBLE),
    ],
)  # fmt: skip
def test_compile(
    name: str, kind: str, dtype: torch.dtype, dynamic: bool, device: str, compiled: Callable
) -> None:
    """One graph, as good as eager in value and gradient."""
    x = maps(2, 3, 5, 7, 16, 24, dtype=dtype, device=device)
    function = compiled(attention_map_loss, dynamic=dynamic)
    options = OPTIONS[name](x) | {"kind": kind, "reductions": ["mean", "none"]}
    check(x, function=function, **options)


@every_device
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_once_for_all_shapes(reduction: str, device: str, compiled: Callable) -> None:
    function = compiled(attention_map_loss)
    for batch, queries, keys in ((2, 5, 7), (3, 9, 8), (4, 33, 40)):
        x = maps(batch, 3, queries, keys, 16, 24, device=device)
        mask = key_mask(batch, keys, device)
        leaves = [y.clone().requires_grad_() for y in x.student]
        for y in (*leaves, *x.teacher):
            torch._dynamo.mark_dynamic(y, 0)
            torch._dynamo.mark_dynamic(y, 2)
        torch._dynamo.mark_dynamic(mask, 0)
        torch._dynamo.mark_dynamic(mask, 1)
        stance = "default" if batch == 2 else "fail_on_recompile"
        with torch.compiler.set_stance(stance):
            loss = function(*leaves, *x.teacher, reduction=reduction, key_mask=mask)
        given = loss.detach(), *torch.autograd.grad(loss.sum(), leaves)
        assert_all_close(given, loss_and_grads(x, reduction=reduction, key_mask=mask))


@every_device
def test_compile_relations(device: str, compiled: Callable) -> None:
    """One tensor in two roles."""
    x, teacher = draw(2, 9, 16, device=device), draw(2, 9, 24, device=device)
    function = compiled(relation_loss)
    for reduction in ("mean", "none"):
        results = []
        for of in (function, relation_loss):
            leaf = x.clone().requires_grad_()
            loss = of(leaf, teacher, kind="js", reduction=reduction)
            results.append((loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]))
        assert_all_close(*results)


@every_device
def test_compile_without_gradient(device: str, compiled: Callable) -> None:
    x = maps(*SMALL, device=device)
    function = compiled(attention_map_loss)
    assert_close(function(*x), attention_map_loss(*x))
    with torch.no_grad():
        loss = function(*(y.clone().requires_grad_() for y in x.student), *x.teacher)
    assert not loss.requires_grad
    assert_close(loss, attention_map_loss(*x))


@every_device
def test_compile_with_inductor(device: str) -> None:
    """Among other operations, which inductor fuses and ours does not disturb."""
    torch._dynamo.reset()
    x = maps(*SMALL, device=device)

    def step(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor) -> Tensor:
        return 3 * attention_map_loss(2 * q_s + 1, k_s.sigmoid(), q_t.tanh(), k_t, temperature=2.0)

    given = loss_and_grads(x, torch.compile(step, fullgraph=True))
    assert_all_close(given, loss_and_grads(x, step))


# relations: queries and keys are one


@every_device
@every_kind
@every_reduction
@pytest.mark.parametrize("dtype", [FLOAT, HALF, DOUBLE], ids=str)
def test_relations_match(dtype: torch.dtype, reduction: str, kind: str, device: str) -> None:
    """attention_map_loss of a tensor with itself; its gradient is that of both roles."""
    x = maps(2, 3, 9, dtype=dtype, device=device, dim_t=24)
    x_s, x_t = x.q_s, x.q_t
    options = OPTIONS["everything"](x) | {"kind": kind, "reduction": reduction}
    leaf = x_s.clone().requires_grad_()
    loss = relation_loss(leaf, x_t, **options)
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    want = loss_and_grads(Maps(x_s, x_s, x_t, x_t), **options)
    assert torch.equal(loss, want.loss)
    assert torch.equal(grad, want.d_q + want.d_k)
    if dtype == DOUBLE:
        options = options | {"reduction": "none"}
        rows, autograd = torch_rows(x_s, x_s, x_t, x_t, **options), x_s.clone().requires_grad_()
        summed = torch_rows(autograd, autograd, x_t, x_t, **options)
        assert_close(want.loss.sum(), rows.mean() if reduction == "mean" else rows.sum())
        share = 1 / rows.numel() if reduction == "mean" else 1
        assert_close(grad, torch.autograd.grad(summed.sum() * share, autograd)[0])


@every_device
@every_reduction
def test_relations_of_three_dimensions_match(reduction: str, device: str) -> None:
    """One head, which the result does not show."""
    x_s, x_t = draw(2, 9, 16, device=device), draw(2, 9, 24, device=device)
    options = {"reduction": reduction, "key_mask": key_mask(2, 9, device), "temperature": 2.0}
    results = []
    for of in (lambda y: y, lambda y: y.unsqueeze(1)):
        leaf = x_s.clone().requires_grad_()
        loss = relation_loss(of(leaf), of(x_t), **options)
        results.append((loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]))
    (loss, grad), (want, want_grad) = results
    assert loss.shape == ((2, 9) if reduction == "none" else ())
    assert torch.equal(loss, want.squeeze(1) if reduction == "none" else want)
    assert torch.equal(grad, want_grad)


def test_relations_of_a_batch_of_one_keep_their_shape() -> None:
    """Only the head that was put in is taken out."""
    for shape in ((1, 1, 1, 8), (1, 1, 8), (2, 1, 3, 8), (1, 3, 8)):
        loss = relation_loss(draw(*shape), draw(*shape), reduction="none")
        assert loss.shape == shape[:-1]


@every_device
def test_relations_gradcheck(device: str) -> None:
    x_s, x_t = (draw(2, 3, 4, dtype=DOUBLE, device=device) for _ in range(2))
    for kind in KINDS:
        function = partial(relation_loss, x_t=x_t, kind=kind)
        assert torch.autograd.gradcheck(function, x_s.requires_grad_())


# bad input

GIVEN = dict(
    zip(Maps._fields, (torch.zeros(2, 3, n, d) for d in (4, 6) for n in (5, 7)), strict=True)
)
DTYPES = "accepted are float32, float16, bfloat16 and float64"


def sized(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(shape, **options)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str, str]] = {
    # name: arguments, error, what is said of what was given, and of what is accepted
    "q_s int": ({"q_s": GIVEN["q_s"].int()}, TypeError, "q_s is torch.int32", DTYPES),
    "k_s complex": ({"k_s": GIVEN["k_s"].cfloat()}, TypeError, "k_s is torch.complex64", DTYPES),
    "q_t bool": ({"q_t": GIVEN["q_t"].bool()}, TypeError, "q_t is torch.bool", DTYPES),
    "k_t float8": ({"k_t": GIVEN["k_t"].to(torch.float8_e4m3fn)}, TypeError,
                   "k_t is torch.float8_e4m3fn", DTYPES),
    "q_s 3-D": ({"q_s": sized(3, 5, 4)}, ValueError, "q_s has shape [3, 5, 4]",
                "accepted is [batch, heads, tokens, dim]"),
    "k_s 5-D": ({"k_s": sized(1, 2, 3, 7, 4)}, ValueError, "k_s has shape [1, 2, 3, 7, 4]",
                "accepted is [batch, heads, tokens, dim]"),
    "k_t 0-D": ({"k_t": sized()}, ValueError, "k_t has shape []",
                "accepted is [batch, heads, tokens, dim]"),
    "k_s device": ({"k_s": GIVEN["k_s"].to("meta")}, ValueError, "q_s is on cpu",
                   "k_s on meta"),
    "q_t device": ({"q_t": GIVEN["q_t"].to("meta")}, ValueError, "q_s is on cpu",
                   "q_t on meta"),
    "batch": ({"k_s": sized(1, 3, 7, 4)}, ValueError,
              "q_s [2, 3, 5, 4] and k_s [1, 3, 7, 4]", "differ in batch"),
    "heads": ({"k_s": sized(2, 1, 7, 4)}, ValueError,
              "q_s [2, 3, 5, 4] and k_s [2, 1, 7, 4]", "differ in heads"),
    "dim": ({"k_s": sized(2, 3, 7, 6)}, ValueError,
            "q_s [2, 3, 5, 4] and k_s [2, 3, 7, 6]", "differ in dim"),
    "teacher's batch": ({"k_t": sized(1, 3, 7, 6)}, ValueError,
                        "q_t [2, 3, 5, 6] and k_t [1, 3, 7, 6]", "differ in batch"),
    "teacher's heads": ({"k_t": sized(2, 6, 7, 6)}, ValueError,
                        "q_t [2, 3, 5, 6] and k_t [2, 6, 7, 6]", "differ in heads"),
    "teacher's dim": ({"k_t": sized(2, 3, 7, 4)}, ValueError,
                      "q_t [2, 3, 5, 6] and k_t [2, 3, 7, 4]", "differ in dim"),
    "both batch": ({"q_t": sized(4, 3, 5, 6), "k_t": sized(4, 3, 7, 6)}, ValueError,
                   "q_s [2, 3, 5, 4] and q_t [4, 3, 5, 6]", "differ in batch"),
    "both heads": ({"q_t": sized(2, 12, 5, 6), "k_t": sized(2, 12, 7, 6)}, ValueError,
                   "q_s [2, 3, 5, 4] and q_t [2, 12, 5, 6]", "differ in heads"),
    "queries": ({"q_t": sized(2, 3, 6, 6)}, ValueError,
                "q_s [2, 3, 5, 4] and q_t [2, 3, 6, 6]", "differ in tokens"),
    "keys": ({"k_t": sized(2, 3, 8, 6)}, ValueError,
             "k_s [2, 3, 7, 4] and k_t [2, 3, 8, 6]", "differ in tokens"),
    "dtypes": ({"k_s": GIVEN["k_s"].half()}, TypeError,
               "q_s is torch.float32 and k_s torch.float16", "accepted is one dtype"),
    "teacher's dtypes": ({"q_t": GIVEN["q_t"].double()}, TypeError,
                         "q_t is torch.float64 and k_t torch.float32", "accepted is one dtype"),
    "no keys": ({"k_s": sized(2, 3, 0, 4), "k_t": sized(2, 3, 0, 6)}, ValueError,
                "k_s [2, 3, 0, 4]", "is empty"),
    "no dim": ({"q_s": sized(2, 3, 5, 0), "k_s": sized(2, 3, 7, 0)}, ValueError,
               "q_s [2, 3, 5, 0]", "is empty"),
    "teacher without dim": ({"q_t": sized(2, 3, 5, 0), "k_t": sized(2, 3, 7, 0)}, ValueError,
                            "q_t [2, 3, 5, 0]", "is empty"),
    "kind": ({"kind": "l2"}, ValueError, "kind is 'l2'",
             "accepted are kl, reverse_kl, js, mse"),
    "reduction": ({"reduction": "avg"}, ValueError, "reduction is 'avg'",
                  "accepted are mean, sum and none"),
    "T 0": ({"temperature": 0}, ValueError, "temperature is 0", "accepted are numbers > 0"),
    "T negative": ({"temperature": -1.5}, ValueError, "temperature is -1.5",
                   "accepted are numbers > 0"),
    "T nan": ({"temperature": NAN}, ValueError, "temperature is nan", "accepted are numbers > 0"),
    "mask dtype": ({"key_mask": sized(2, 7)}, ValueError, "key_mask is torch.float32 [2, 7]",
                   "accepted is torch.bool, one per key, [2, 7]"),
    "mask of queries": ({"key_mask": sized(2, 5).bool()}, ValueError,
                        "key_mask is torch.bool [2, 5]",
                        "accepted is torch.bool, one per key, [2, 7]"),
    "mask of a map": ({"key_mask": sized(2, 1, 5, 7).bool()}, ValueError,
                      "key_mask is torch.bool [2, 1, 5, 7]",
                      "accepted is torch.bool, one per key, [2, 7]"),
    "mask device": ({"key_mask": sized(2, 7, dtype=torch.bool, device="meta")}, ValueError,
                    "the student is on cpu", "key_mask on meta"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    """The error names the argument, what was given and what is accepted, whatever is asked for."""
    options, error, given, accepted = BAD[name]
    for required in (False, True):
        arguments = GIVEN | options
        if required and arguments["k_s"].is_floating_point():
            arguments["k_s"] = arguments["k_s"].clone().requires_grad_()
        with pytest.raises(error) as caught:
            attention_map_loss(**arguments)
        assert "attention_map_loss: " in str(caught.value)
        assert given in str(caught.value)
        assert accepted in str(caught.value)


RELATIONS = {"x_s": torch.zeros(2, 3, 5, 4), "x_t": torch.zeros(2, 3, 5, 6)}
RANKS = "[batch, heads, tokens, dim] or [batch, tokens, dim]"
BAD_RELATIONS: dict[str, tuple[dict[str, Any], type[Exception], str, str]] = {
    "ranks": ({"x_t": sized(2, 5, 6)}, ValueError, "x_t has shape [2, 5, 6]", RANKS),
    "x_s 2-D": ({"x_s": sized(5, 4), "x_t": sized(5, 4)}, ValueError,
                "x_s has shape [5, 4]", RANKS),
    "x_s 5-D": ({"x_s": sized(1, 2, 3, 5, 4)}, ValueError, "x_s has shape [1, 2, 3, 5, 4]", RANKS),
    "batch": ({"x_t": sized(1, 3, 5, 6)}, ValueError,
              "x_s [2, 3, 5, 4] and x_t [1, 3, 5, 6]", "differ in batch"),
    "heads": ({"x_t": sized(2, 1, 5, 6)}, ValueError,
              "x_s [2, 3, 5, 4] and x_t [2, 1, 5, 6]", "differ in heads"),
    "tokens": ({"x_t": sized(2, 3, 6, 6)}, ValueError,
               "x_s [2, 3, 5, 4] and x_t [2, 3, 6, 6]", "differ in tokens"),
    "tokens of one head": ({"x_s": sized(2, 5, 4), "x_t": sized(2, 6, 6)}, ValueError,
                           "x_s [2, 5, 4] and x_t [2, 6, 6]", "differ in tokens"),
    "x_s int": ({"x_s": sized(2, 3, 5, 4).int()}, TypeError, "x_s is torch.int32", DTYPES),
    "x_t int": ({"x_t": sized(2, 3, 5, 6).long()}, TypeError, "x_t is torch.int64", DTYPES),
    "device": ({"x_t": sized(2, 3, 5, 6, device="meta")}, ValueError, "x_s is on cpu",
               "x_t on meta"),
    "no tokens": ({"x_s": sized(2, 3, 0, 4), "x_t": sized(2, 3, 0, 6)}, ValueError,
                  "[2, 3, 0, 4]", "empty"),
    "no dim": ({"x_t": sized(2, 3, 5, 0)}, ValueError, "[2, 3, 5, 0]", "empty"),
    "kind": ({"kind": "l2"}, ValueError, "kind is 'l2'", "accepted are kl, reverse_kl, js, mse"),
    "mask": ({"key_mask": sized(2, 4).bool()}, ValueError, "key_mask is torch.bool [2, 4]",
             "one per key, [2, 5]"),
    "mask device": ({"key_mask": sized(2, 5, dtype=torch.bool, device="meta")}, ValueError,
                    "the student is on cpu", "key_mask on meta"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_RELATIONS)
def test_bad_relations(name: str) -> None:
    """Errors speak of the arguments that relation_loss has."""
    options, error, given, accepted = BAD_RELATIONS[name]
    with pytest.raises(error) as caught:
        relation_loss(**RELATIONS | options)
    said = str(caught.value)
    assert "relation_loss: " in said
    assert given in said
    assert accepted in said
    for other in (*Maps._fields, "attention_map_loss"):
        assert other not in said


def test_a_row_of_relations_without_keys() -> None:
    if _ops.backends()["attention_map_fwd"]["CPU"] == "reference":
        pytest.skip("the reference gives 0 on any device")
    mask = torch.tensor([[True] * 5, [False] * 5])
    with pytest.raises(RuntimeError, match="key_mask keeps no key of batch element 1"):
        relation_loss(draw(2, 5, 4), draw(2, 5, 4), key_mask=mask)


@pytest.mark.gpu
def test_tensors_on_different_devices() -> None:
    given = {name: x.cuda() for name, x in GIVEN.items()}
    for name in ("k_s", "q_t", "k_t"):
        with pytest.raises(ValueError, match=f"q_s is on cuda:0 and {name} on cpu"):
            attention_map_loss(**given | {name: GIVEN[name]})
    with pytest.raises(ValueError, match="q_s is on cuda:0 and key_mask on cpu"):
        attention_map_loss(**given, key_mask=torch.ones(2, 7, dtype=torch.bool))


BAD_FOR_OPERATIONS = {  # arguments, and what is said
    "q_s double": ({"q_s": GIVEN["q_s"].double()}, "q_s is Double; accepted are float32, float16"),
    "k_t int": ({"k_t": GIVEN["k_t"].int()}, "k_t is Int; accepted are float32, float16"),
    "k_s 3-D": ({"k_s": sized(3, 7, 4)}, "k_s has shape [3, 7, 4]; accepted is [batch, heads,"),
    "batch": ({"k_s": sized(1, 3, 7, 4)},
              "q_s [2, 3, 5, 4] and k_s [1, 3, 7, 4] differ in batch"),
    "heads": ({"k_t": sized(2, 4, 7, 6)},
              "q_t [2, 3, 5, 6] and k_t [2, 4, 7, 6] differ in heads"),
    "dim": ({"k_s": sized(2, 3, 7, 5)}, "q_s [2, 3, 5, 4] and k_s [2, 3, 7, 5] differ in dim"),
    "queries": ({"q_t": sized(2, 3, 6, 6)},
                "q_s [2, 3, 5, 4] and q_t [2, 3, 6, 6] differ in tokens"),
    "keys": ({"k_t": sized(2, 3, 8, 6)},
             "k_s [2, 3, 7, 4] and k_t [2, 3, 8, 6] differ in tokens"),
    "both batch": ({"q_t": sized(4, 3, 5, 6), "k_t": sized(4, 3, 7, 6)},
                   "q_s [2, 3, 5, 4] and q_t [4, 3, 5, 6] differ in batch"),
    "dtypes": ({"k_s": GIVEN["k_s"].half()}, "queries and keys differ in dtype"),
    "no keys": ({"k_s": sized(2, 3, 0, 4), "k_t": sized(2, 3, 0, 6)},
                "keys [2, 3, 0, 4] and [2, 3, 0, 6] must not be empty"),
    "no dim": ({"q_s": sized(2, 3, 5, 0), "k_s": sized(2, 3, 7, 0)},
               "keys [2, 3, 7, 0] and [2, 3, 7, 6] must not be empty"),
    "mask dtype": ({"key_mask": sized(2, 7)}, "key_mask is [2, 7]; accepted is bool [2, 7]"),
    "mask shape": ({"key_mask": sized(2, 5).bool()},
                   "key_mask is [2, 5]; accepted is bool [2, 7]"),
    "mask rank": ({"key_mask": sized(7).bool()}, "key_mask is [7]; accepted is bool [2, 7]"),
    "kind": ({"kind": 7}, "kind is 7; accepted are 0 to 3"),
    "row without keys": ({"key_mask": torch.tensor([[True] * 7, [False] * 7])},
                         "key_mask keeps no key of batch element 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FOR_OPERATIONS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_bad_input_to_operations(operation: str, name: str) -> None:
    """C++ looks at no memory that is not there, whoever calls."""
    if _ops.backends()[operation]["CPU"] != "C++":
        pytest.skip("CPU tensors are not served by C++")
    if operation == "attention_map_bwd" and name == "row without keys":
        pytest.skip("its forward has said so")
    options, said = BAD_FOR_OPERATIONS[name]
    given: dict[str, Any] = GIVEN | {"scale_s": 1.0, "scale_t": 1.0, "temperature": 1.0}
    given |= {"kind": reference.KL, "reduction": reference.MEAN}
    if operation == "attention_map_bwd":
        given |= {"grad_loss": torch.ones(()), "stats": torch.zeros(3, 2, 3, 5)}
    with pytest.raises(RuntimeError) as caught:
        getattr(OPS, operation)(**given | options)
    assert f"attention_map_loss: {said}" in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"stats": torch.zeros(3, 2, 3, 4)}, {"stats": torch.zeros(2, 2, 3, 5)},
        {"grad_loss": torch.ones(2, 3, 4)}, {"grad_loss": torch.ones(())},
        {"grad_loss": torch.ones(2, 3, 5, dtype=DOUBLE)},
        {"stats": torch.zeros(3, 2, 3, 5, dtype=HALF)},
    ],
    ids=["short stats", "2 stats", "short grad", "one grad", "double grad", "half stats"],
)  # fmt: skip
def test_bad_input_to_the_backward(options: dict[str, Tensor]) -> None:
    """Numbers per row that are fewer than the rows would be read beyond their end."""
    if _ops.backends()["attention_map_bwd"]["CPU"] != "C++":
        pytest.skip("CPU tensors are not served by C++")
    given: dict[str, Any] = {"grad_loss": torch.ones(2, 3, 5), "stats": torch.zeros(3, 2, 3, 5)}
    given |= options
    arguments = (1.0, 1.0, 1.0, reference.KL, reference.NONE)
    with pytest.raises(RuntimeError):
        OPS.attention_map_bwd(given["grad_loss"], *GIVEN.values(), given["stats"], *arguments)


# memory


def peak_of_tensors(function: Callable[[], Any]) -> int:
    """Bytes that CPU tensors made within held at once, by the profiler."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = list(
        itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    )
    assert held
    return max(held)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", ["kl", "js"])
def test_no_tensor_is_a_map(kind: str, reduction: str) -> None:
    """Beside both gradients: a few numbers per row and scratch, of 4 MB that a head's map has."""
    x = maps(1, 2, 1024, dim=16)
    run = partial(loss_and_grads, kind=kind, reduction=reduction)
    of_naive = peak_of_tensors(lambda: run(x, torch_rows))
    grads = sum(4 * y.numel() for y in x.student)
    assert of_naive > 10 * grads  # what is measured is what it is said to be
    if _ops.backends()["attention_map_fwd"]["CPU"] == "reference":
        pytest.skip("the reference materialises what it likes")
    scratch = 3 * 2**18  # keys transposed, and the scores of 60 queries
    assert peak_of_tensors(lambda: run(x)) <= grads + scratch + 6 * 4 * 2 * 1024
    assert peak_of_tensors(lambda: attention_map_loss(*x, kind=kind)) <= scratch + 3 * 4 * 2 * 1024


GROWTH = """
import torch
from vitkd_fast import _ops
from vitkd_fast.functional import attention_map_loss
torch.set_num_threads(1)
def peak():
    return next(int(x.split()[1]) for x in open("/proc/self/status") if x.startswith("VmHWM"))
def run(tokens):
    x = [torch.randn(1, 1, tokens, 16) for _ in range(4)]
    for reduction in ("mean", "none"):
        y = [x[0].requires_grad_(), x[1].requires_grad_(), *x[2:]]
        torch.autograd.grad(attention_map_loss(*y, reduction=reduction).sum(), y[:2])
run(64)
before = peak()
run(4096)
print(peak() - before)
"""


def test_no_workspace_is_a_map(tmp_path: Path) -> None:
    """Of 64 MB that a map has; in a process of its own, whose memory nothing else has raised."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux, which says how much memory a process had at most")
    if _ops.backends()["attention_map_fwd"]["CPU"] == "reference":
        pytest.skip("the reference materialises what it likes")
    result = python(GROWTH, tmp_path)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 16 * 1024, "KB"


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


MATCHES = [__file__, "-k", "match or extreme"]


def run_matches(cwd: Path, marked: str, **environment: str) -> None:
    run_tests(cwd, ["-m", "pytest"], *MATCHES, "-m", marked, **environment)


every_day = pytest.mark.parametrize(
    "marked",
    [
        pytest.param("not gpu and not slow", id="every_day"),
        pytest.param("not gpu and slow", id="slow", marks=pytest.mark.slow),
    ],
)


@every_day
@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "amx"])
def test_every_instruction_set(
    isa: str, marked: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """AMX, where the host has none, emulated."""
    if isa == int8.isa()[0] or (isa == "avx512" and int8.isa()[0] == "avx512vnni"):
        pytest.skip(f"the tests above ran on the kernels of {isa}")
    if isa == "amx":
        library = request.getfixturevalue("emulated_amx")
        start = [amx_tools.__file__]
        run_tests(tmp_path, start, *MATCHES, "-m", marked, VITKD_EMULATED_AMX=str(library))
    elif isa in int8.isa():
        run_matches(tmp_path, marked, VITKD_FAST_ISA=isa)
    else:
        pytest.skip(f"{isa} is not among what this CPU has: {', '.join(int8.isa())}")


@pytest.mark.slow  # every day, test_reference_matches_torch looks at its maths
def test_reference_backend(tmp_path: Path) -> None:
    run_matches(tmp_path, "not gpu", VITKD_FAST_BACKEND="reference")


@pytest.mark.parametrize(
    "backend", ["reference", pytest.param("triton", marks=pytest.mark.triton), "cuda"]
)
@pytest.mark.gpu
def test_backends_on_a_gpu(backend: str, tmp_path: Path) -> None:
    """Each that this build has, also those that another one usually stands in for."""
    name = {"reference": "reference", "triton": "Triton", "cuda": "CUDA C++"}[backend]
    if name == _ops.backends()["attention_map_fwd"]["CUDA"]:
        pytest.skip(f"the tests above ran on {name}")
    code = (
        "from vitkd_fast import _ops; "
        f"print({{_ops.backends()[name]['CUDA'] for name in {OPERATIONS!r}}})"
    )
    served = python(code, tmp_path, VITKD_FAST_BACKEND=backend)
    if backend == "cuda" and "has no CUDA C++ kernel in this build" in served.stderr:
        pytest.skip("the extension was built without CUDA")
    if backend == "triton":
        pytest.importorskip("triton")
    assert served.stdout == f"{{{name!r}}}\n", served.stderr
    run_matches(tmp_path, "gpu", VITKD_FAST_BACKEND=backend)


# what only a GPU has


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "reduction"), PATHS, ids=str)
@every_kind
def test_cuda_graph(kind: str, dtype: torch.dtype, reduction: str) -> None:
    """Forward and backward replayed, while queries, keys and the mask change."""
    x = maps(2, 3, 49, 65, 24, 16, dtype=dtype, device="cuda")
    leaves = [y.requires_grad_() for y in x.student]
    mask = key_mask(2, 65, "cuda")
    others = maps(2, 3, 49, 65, 24, 16, dtype=dtype, device="cuda")

    def step() -> tuple[Tensor, ...]:
        loss = attention_map_loss(*x, kind=kind, reduction=reduction, key_mask=mask)
        return loss.detach(), *torch.autograd.grad(loss.sum(), leaves)

    graph, results = captured(step)

    for i in range(3):
        with torch.no_grad():
            for y, other in zip(x, others, strict=True):
                y.copy_(other.roll(i, 2))
            mask.copy_(key_mask(2, 65))
        graph.replay()
        given = [y.clone() for y in results]
        assert all(y.isfinite().all() for y in given)
        compare = assert_all_close if dtype == DOUBLE else assert_same  # torch's own products
        compare(given, step())


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "reduction"), PATHS, ids=str)
@every_kind
@pytest.mark.parametrize("name", MAIN_OPTIONS)
def test_no_host_synchronisation(name: str, kind: str, dtype: torch.dtype, reduction: str) -> None:
    x = maps(2, 3, 49, 65, 24, 16, dtype=dtype, device="cuda")
    leaves = [y.requires_grad_() for y in x.student]
    options = OPTIONS[name](x) | {"kind": kind, "reduction": reduction}
    factor = torch.tensor(3.0, device="cuda")

    def step() -> None:
        torch.autograd.grad((attention_map_loss(*x, **options) * factor).sum(), leaves)

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
    x = maps(4, 6, 196, dim=64, device="cuda")
    want = loss_and_grads(x)
    late = Maps(*(torch.full_like(y, NAN) for y in x))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for y, z in zip(late, x, strict=True):
            y.copy_(z)
        given = loss_and_grads(late)
    torch.cuda.current_stream().wait_stream(stream)
    assert_same(given, want)


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
@every_kind
def test_memory_beside_the_naive_form(kind: str, dtype: torch.dtype, reduction: str) -> None:
    """Under 2% of what it takes, the gradients apart, which both have to give."""
    if _ops.backends()["attention_map_fwd"]["CUDA"] == "reference":
        pytest.skip("the reference materialises what it likes")
    x = maps(64, 12, 196, dim=64, dtype=dtype, device="cuda")
    grads = sum(y.numel() * y.element_size() for y in x.student)
    torch.cuda.synchronize()

    def peak(function: Callable[..., Tensor]) -> int:
        run = partial(loss_and_grads, x, function, kind=kind, reduction=reduction)
        run()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before - grads

    assert peak(attention_map_loss) < 0.02 * peak(torch_rows)


@pytest.mark.gpu
@every_kind
def test_tf32_where_torch_allows_it(kind: str) -> None:
    """Read when the loss is called: the error is then that of torch's own products in tf32."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has no tf32")
    x = maps(2, 2, 256, dim=64, device="cuda")
    results = []
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for allowed in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            results.append(loss_and_grads(x, kind=kind))
            check(x, kind=kind, reductions=["mean", "none"])
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert not any(torch.equal(y, z) for y, z in zip(*results, strict=True))


@pytest.mark.gpu
@every_kind
def test_offsets_beyond_int32(kind: str) -> None:
    """2^31 elements and a bit: the last heads are where they belong."""
    batch, heads, tokens, dim = 2**31 // (64 * 256 * 64) + 2, 64, 256, 64
    if torch.cuda.mem_get_info()[0] < 5 * 4 * batch * heads * tokens * dim:
        pytest.skip("needs 42 GiB of GPU memory")
    q, k = (torch.zeros(batch, heads, tokens, dim, dtype=BFLOAT, device="cuda") for _ in range(2))
    ends = maps(2, heads, tokens, dim=dim, dtype=BFLOAT, device="cuda")
    for x, end in ((q, ends.q_s), (k, ends.k_s)):
        x[:1], x[-1:] = end[:1], end[1:]
    given = loss_and_grads(Maps(q, k, k, q), kind=kind, reduction="none")
    want = loss_and_grads(Maps(*ends.student, ends.k_s, ends.q_s), kind=kind, reduction="none")
    for x, y in zip(given, want, strict=True):
        assert_close(torch.cat([x[:1], x[-1:]]), y)
        assert_close(x[1:-1].abs().max().float(), torch.zeros((), device="cuda"))


@needs_gpu_or_emulator
class TestSanitize:
    """Every way through the kernels once, small enough for compute-sanitizer."""

    @every_kind
    @pytest.mark.parametrize(
        "shape",
        [(1, 1, 1, 1, 1, 1), (1, 2, 5, 7, 16, 24), (1, 1, 49, 49, 64, 64), (1, 1, 65, 33, 80, 128),
         (1, 1, 100, 197, 32, 16), (1, 1, 20, 150, 96, 64), (1, 1, 70, 5, 300, 3)],
        ids=str,
    )  # fmt: skip
    @pytest.mark.parametrize(
        ("dtype", "teacher"), [(FLOAT, FLOAT), (BFLOAT, BFLOAT), (FLOAT, HALF), (HALF, FLOAT)]
    )
    def test_values(
        self, dtype: torch.dtype, teacher: torch.dtype, shape: tuple[int, ...], kind: str
    ) -> None:
        x = maps(*shape, dtype=dtype, teacher=teacher, device=GPU)
        for name, reduction in (("plain", "mean"), ("everything", "none"), ("mask", "sum")):
            options = OPTIONS[name](x) | {"kind": kind, "reduction": reduction}
            assert all(y.isfinite().all() for y in loss_and_grads(x, **options))

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dim", [16, 20])
    def test_layouts(self, dim: int, layout: str) -> None:
        """Strided and unaligned tensors, whose ends no load may pass."""
        new = partial(draw, dtype=HALF, device=GPU)
        of = [LAYOUTS[layout](new, dim), LAYOUTS["contiguous"](new, dim)]
        for x in (Maps(*of, *of), Maps(*of[::-1], *of[::-1])):
            for reduction in ("mean", "none"):
                results = loss_and_grads(x, reduction=reduction)
                assert all(y.isfinite().all() for y in results)

    @every_kind
    def test_empty(self, kind: str) -> None:
        for shape in ((0, 2, 5), (2, 2, 0)):
            x = Maps(*(draw(*shape[:2], n, 16, device=GPU) for n in (shape[2], 5) * 2))
            loss, *grads = loss_and_grads(x, kind=kind)
            assert loss == 0
            assert all((grad == 0).all() for grad in grads)

    @every_kind
    def test_without_keys(self, kind: str) -> None:
        x = maps(2, 2, 33, 65, device=GPU)
        mask = torch.zeros(2, 65, dtype=torch.bool, device=GPU)
        assert all((y == 0).all() for y in loss_and_grads(x, kind=kind, key_mask=mask))


@pytest.mark.parametrize("line", ["allow_tf32 = True", "fp32_precision = 'tf32'"])
def test_either_way_of_allowing_tf32(line: str, tmp_path: Path) -> None:
    """torch has two, and raises where one is asked for what the other was told."""
    code = (
        f"import torch; torch.backends.cuda.matmul.{line}; from vitkd_fast.functional import "
        "attention_map as a; q = torch.randn(1, 1, 4, 16); a.attention_map_loss(q, q, q, q); "
        "print(a._tf32())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.stdout == "True\n", result.stderr
