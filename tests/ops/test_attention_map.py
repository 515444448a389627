"""attention_map_loss and the operations under it: values and gradients.

They are compared with the reference in float64 on the same rounded inputs. What is allowed there
comes from the naive form by torch's own functions in float32 (see `attention_map_tools.check`); it
is never tuned. The tests also run once per instruction set of the host, and on the reference
backend (test_attention_map_backends.py).
"""

import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from support.attention_map_tools import (
    BFLOAT,
    DOUBLE,
    FLOAT,
    HALF,
    INF,
    LAYOUTS,
    MAIN_OPTIONS,
    NAN,
    OPS,
    OPTIONS,
    REDUCTIONS,
    Maps,
    Results,
    assert_all_close,
    assert_same,
    check,
    draw,
    every_device,
    every_kind,
    every_reduction,
    key_mask,
    loss_and_grads,
    maps,
    on_gpu,
    on_tensor_cores,
    operation_options,
    torch_rows,
)
from support.cuda_tools import EMULATED
from vitkd_fast import _ops, reference
from vitkd_fast.functional import attention_map_loss

pytestmark = [pytest.mark.every_isa, pytest.mark.usefixtures("one_thread")]


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
        options = (1.0, 1.0, 1.0, reference.JS, reference.NONE)
        rows, _ = reference.attention_map_fwd(*x, *options)
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


@pytest.mark.emulated(shape=[(1, 2, 49, 49, 64, 64), (2, 1, 13, 49, 128, 96)])
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


# dims of student and teacher of which 99 or (slow) 227 KB of shared memory do not hold the rows
LONG_ROWS = [(FLOAT, 264, 272), (HALF, 386, 391), (BFLOAT, 64, 768)]
LONGER_ROWS = [(FLOAT, 640, 648), (HALF, 960, 1021), (BFLOAT, 1024, 768)]


@pytest.mark.emulated
@every_device
@pytest.mark.parametrize("kind", ["reverse_kl", "js"])
@pytest.mark.parametrize(
    ("dtype", "dim", "dim_t"),
    [*LONG_ROWS, *(pytest.param(*x, marks=pytest.mark.slow) for x in LONGER_ROWS)],
    ids=str,
)
def test_long_rows_match(dtype: torch.dtype, dim: int, dim_t: int, kind: str, device: str) -> None:
    """Rows that pass through shared memory in slices: a second tile of keys, and of queries."""
    x = maps(1, 1, 18, 33, dim, dim_t, dtype, dtype, device)
    name = "negative_scales" if kind == "js" else "mask"
    reductions = ["none"] if kind == "js" else ["mean"]
    check(x, kind=kind, reductions=reductions, **OPTIONS[name](x))


@pytest.mark.emulated(kind=["kl", "js"], dtype=[BFLOAT])
@every_device
@every_kind
@pytest.mark.parametrize("dtype", [FLOAT, HALF, BFLOAT], ids=str)
def test_scores_far_above_those_of_the_first_keys_match(
    dtype: torch.dtype, kind: str, device: str
) -> None:
    """By more than exponents have room for."""
    x = maps(1, 1, 9, 70, 16, 16, dtype, dtype, device)
    for keys in (x.k_s, x.k_t):
        keys[..., 40:, :] *= 70
    check(x, kind=kind, reductions=["mean"])


@pytest.mark.emulated(kind=["kl", "js"], dtype=[BFLOAT])
@every_device
@every_kind
@pytest.mark.parametrize("dtype", [FLOAT, HALF, BFLOAT], ids=str)
def test_ends_of_tiles_match(dtype: torch.dtype, kind: str, device: str) -> None:
    """A GPU's tiles are 32 queries by 32 keys, of which the last are cut to 16 and to 8."""
    for queries, keys in ((37, 71), (50, 139)):
        check(
            maps(1, 1, queries, keys, 64, 64, dtype, dtype, device), kind=kind, reductions=["mean"]
        )


@every_device
@every_kind
@pytest.mark.parametrize("name", OPTIONS)
def test_options_match(name: str, kind: str, device: str) -> None:
    for shape in ((2, 2, 9, 21, 16), (2, 1, 20, 50, 24)):
        x = maps(*shape, device=device)
        check(x, kind=kind, **OPTIONS[name](x))


@pytest.mark.emulated(kind=["js"])
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


@pytest.mark.emulated(dim=[20], dtype=[BFLOAT])
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
    if EMULATED or _ops.backends()["attention_map_fwd"]["CPU"] == "reference":
        pytest.skip("the reference and CUDA's kernels give 0 there")
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


@pytest.mark.emulated(shape=[FORMS["few"]], kind=["mse", "reverse_kl"])
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


@pytest.mark.emulated(scale=[1e-30, 0.0], shape=[FORMS["few"]], kind=["mse", "reverse_kl"])
@every_device
@every_kind
@every_form
@pytest.mark.parametrize("scale", [1e4, -1e4, 1e-30, 0.0])
def test_extreme_scales(scale: float, shape: tuple[int, ...], kind: str, device: str) -> None:
    x = maps(*shape, device=device)
    for scales in ({"scale_s": scale}, {"scale_t": scale}, {"scale_s": scale, "scale_t": -scale}):
        check(x, kind=kind, reductions=["mean"], **scales)


@pytest.mark.emulated(shape=[FORMS["few"]], kind=["mse", "reverse_kl"])
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


@pytest.mark.emulated(shape=[FORMS["few"]], kind=["mse", "reverse_kl"])
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


@pytest.mark.emulated(shape=[FORMS["few"]], kind=["mse", "reverse_kl"])
@every_device
@every_kind
@every_form
def test_extreme_closeness(shape: tuple[int, ...], kind: str, device: str) -> None:
    """The loss is far below its own terms."""
    x = maps(*shape, device=device)
    check(Maps(x.q_s * (1 + 1e-4), x.k_s, x.q_s, x.k_s), kind=kind, reductions=["mean", "none"])


@pytest.mark.emulated(shape=[FORMS["few"]], kind=["mse", "reverse_kl"])
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
