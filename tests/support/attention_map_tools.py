"""attention_map_loss in tests: what to call it with, and what its results may be off by."""

import math
import os
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from support import amx_tools
from support.cuda_tools import EMULATED
from support.triton_tools import INTERPRETED
from vitkd_fast import int8, reference
from vitkd_fast.functional import attention_map_loss
from vitkd_fast.reference.attention_map import _terms

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
    return x.is_cuda or EMULATED or INTERPRETED


def on_tensor_cores(x: Maps) -> bool:
    return on_gpu(x.q_s) and x.q_s.dtype in (HALF, BFLOAT)


def on_tiles(x: Maps) -> bool:
    """Of AMX, which are for 16 bits alone."""
    amx = amx_tools.EMULATED or (int8.isa()[0] == "amx" and not on_gpu(x.q_s))
    return amx and {x.q_s.dtype, x.q_t.dtype} <= {HALF, BFLOAT}


POWER = 4  # roundings that the one instruction for a power of two is off by, beside tensor cores


class Unavoidable(NamedTuple):
    """How far results may move, whoever computes in float32: see `unavoidable_errors`."""

    loss: Tensor  # of each row
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
    there it is rounded when it is divided by that, and when it is multiplied again. On a GPU the
    losses of js and mse, too, are of probabilities from log-sum-exps.
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
    loss = torch.zeros_like(lse_s[..., 0])
    plain = _terms(log_p, log_q, keep, kind)[0]
    for of_student, of_teacher in ((of_lse * lse_s, 0.0), (0.0, of_lse * lse_t)):
        moved = terms(of_student, of_teacher)
        saved = saved + ((moved[0] - moved[1]) - (a - b)).abs()
        if on_gpu(x.q_s) and kind in (reference.JS, reference.MSE):
            of_row = _terms(log_p - of_teacher, log_q - of_student, keep, kind)[0]
            loss = loss + temperature**2 * (of_row - plain).abs().sum(-1)
    factor = (weight * temperature * scale_s).abs().unsqueeze(-1)
    least, saved = least * factor, saved * factor
    # tiles take a subnormal number for 0: any of a slope's three parts, and of their products
    parts = 3 * limits.smallest_normal * keep * torch.ones_like(least) * on_tiles(x)
    return Unavoidable(
        loss,
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
        unavoidable = unavoidable_errors(x, stats, weight, *arguments)
        least = unavoidable.loss * share[reduction]
        least = least if reduction == "none" else least.sum()
        assert_within((of_loss + rounding) * size + least, given.loss, want, f"{reduction}: loss")

        grads = reference.attention_map_bwd(weight, *double, stats, *arguments)
        limits = torch.finfo(x.q_s.dtype)
        in_forward = function is attention_map_loss and reduction != "none"
        in_forward = in_forward and x.q_s.dtype != HALF and not on_gpu(x.q_s)
        in_forward = in_forward or wide == DOUBLE
        for name, grad, want, like, of_torch, least, saved in zip(
            ("d_q", "d_k"), given[1:], grads, x.student, of_grads, *unavoidable[1:], strict=True
        ):
            assert (grad.dtype, grad.shape) == (like.dtype, like.shape)
            rounding = limits.eps / 2 * want.abs().clamp(min=limits.smallest_normal)
            allowed = least.clamp(min=of_torch) + roundings * rounding
            if not in_forward:
                allowed += saved
            assert_within(allowed, grad, want, f"{reduction}: {name}")


# what more than one file takes

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
PATHS = [(FLOAT, "mean"), (FLOAT, "none"), (HALF, "mean"), (BFLOAT, "sum"), (DOUBLE, "mean")]
DTYPES = "expected float32, float16, bfloat16 or float64"


def sized(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(shape, **options)
