"""The Triton kernels of attention_map_loss: interpreted, compiled without a GPU, and on one.

Values are compared with the reference in float64 on the same rounded inputs. What is allowed comes
from the naive form in torch's float32, and from the roundings that tensor cores ask for; it is
never tuned.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from support.process_tools import run_in_interpreter, run_tests
from support.triton_tools import (
    INTERPRETED,
    assert_nothing_is_spilled,
    compile_only,
    resources,
)
from vitkd_fast import reference
from vitkd_fast.reference.attention_map import _softmaxed, _terms

pytest.importorskip("triton")
pytestmark = pytest.mark.triton

KINDS = {
    "kl": reference.KL,
    "reverse_kl": reference.REVERSE_KL,
    "js": reference.JS,
    "mse": reference.MSE,
}
NONE, MEAN, SUM = reference.NONE, reference.MEAN, reference.SUM
HALF, BFLOAT, FLOAT, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64

every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
every_device = pytest.mark.parametrize(
    "device",
    [
        pytest.param(
            "cpu",
            marks=pytest.mark.skipif(not INTERPRETED, reason="run by test_in_the_interpreter"),
        ),
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(
                    os.environ.get("VITKD_FAST_BACKEND") != "triton", reason="run by test_on_a_gpu"
                ),
            ],
        ),
    ],
)


# the processes that run what follows


def test_in_the_interpreter(tmp_path: Path) -> None:
    run_in_interpreter(tmp_path, __file__, "-m", "interpreted and not gpu and not slow")


@pytest.mark.slow
def test_all_in_the_interpreter(tmp_path: Path) -> None:
    run_in_interpreter(tmp_path, __file__, "-m", "every_isa and not gpu")


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    run_tests(
        tmp_path, ["-m", "pytest"], __file__, "-m", "every_isa and gpu",
        VITKD_FAST_BACKEND="triton",
    )  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# what a result is compared with


def draw(
    batch: int, heads: int, queries: int, keys: int, dim: int, dim_t: int,
    dtype: torch.dtype = FLOAT, teacher: torch.dtype | None = None, device: str = "cpu",
) -> list[Tensor]:  # fmt: skip
    """q_s, k_s, q_t, k_t: the teacher is close enough to the student for its loss to matter."""
    shapes = [(n, d) for d in (dim, dim_t) for n in (queries, keys)]
    return [
        (1.5 * torch.randn(batch, heads, n, d)).to(device, dtype if i < 2 else teacher or dtype)
        for i, (n, d) in enumerate(shapes)
    ]


class Results(NamedTuple):
    loss: Tensor
    d_q: Tensor
    d_k: Tensor


def options_for(
    tensors: list[Tensor], kind: int, reduction: int, mask: Tensor | None, temperature: float
) -> tuple[Any, ...]:
    scale_s, scale_t = (tensors[i].shape[3] ** -0.5 for i in (0, 2))
    return scale_s, scale_t, temperature, kind, reduction, mask


def by_reference(tensors: list[Tensor], grad: Tensor, dtype: torch.dtype, *options: Any) -> Results:
    wide = [x.to(dtype) for x in tensors]
    loss, stats = reference.attention_map_fwd(*wide, *options)
    return Results(loss, *reference.attention_map_bwd(grad.to(dtype), *wide, stats, *options))


def rounded_slopes_error(
    tensors: list[Tensor], grad: Tensor, scale_s: float, scale_t: float, temperature: float,
    kind: int, reduction: int, mask: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """How far d_q and d_k can move when the slopes of scores are rounded once to their dtype.

    Tensor cores multiply numbers of 16 bits. Each slope moves by at most half a unit in the last
    place, each term of a gradient with it.
    """
    q_s, k_s, q_t, k_t = (x.double() for x in tensors)
    leaf = ((q_s @ k_s.mT) * scale_s).requires_grad_()
    eye = torch.eye(k_s.shape[2], dtype=DOUBLE, device=leaf.device).expand(*leaf.shape[:2], -1, -1)
    rows, _ = reference.attention_map_fwd(
        leaf, eye, q_t, k_t, 1.0, scale_t, temperature, kind, NONE, mask
    )  # fmt: skip
    share = grad.double() / (rows.numel() if reduction == MEAN else 1)
    (slopes,) = torch.autograd.grad(rows, leaf, share.expand_as(rows))
    unit = torch.finfo(tensors[0].dtype).eps / 2
    moved = unit * scale_s * slopes.abs()
    return moved @ k_s.abs(), moved.mT @ q_s.abs()


def saved_numbers_error(
    tensors: list[Tensor], grad: Tensor, scale_s: float, scale_t: float, temperature: float,
    kind: int, reduction: int, mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """How far results can move when a row's three saved numbers are rounded to float32.

    A log-sum-exp that moves by x moves its softmax by x times itself, and its logarithm by x. So
    does a score: the one that is formed again, by a product of another shape, is rounded by itself.
    """
    q_s, k_s, q_t, k_t = (x.double() for x in tensors)
    log_q, lse_s = _softmaxed(q_s, k_s, scale_s / temperature, mask, DOUBLE)
    log_p, lse_t = _softmaxed(q_t, k_t, scale_t / temperature, mask, DOUBLE)
    keep = 1.0 if mask is None else mask[:, None, None, :].double()
    terms, w = _terms(log_p, log_q, keep, kind)
    p, q = log_p.exp() * keep, log_q.exp() * keep
    centre = q * (0 if kind == reference.KL else w.sum(-1, keepdim=True).abs())
    unit = torch.finfo(FLOAT).eps / 2
    apart = (lse_s.abs() + lse_t.abs()).unsqueeze(-1)
    apart = apart + (q_s @ k_s.mT * (scale_s / temperature)).abs()
    apart = apart + (q_t @ k_t.mT * (scale_t / temperature)).abs()
    loss = unit * temperature**2 * (apart * (terms.abs() + p + q)).sum(-1)
    moved = apart * (w.abs() + centre + p + q) + centre
    share = (grad.double().abs() * temperature * abs(scale_s)).expand(lse_s.shape)
    moved = unit * moved * (share / (lse_s.numel() if reduction == MEAN else 1)).unsqueeze(-1)
    if reduction != NONE:
        loss = loss.sum() / (loss.numel() if reduction == MEAN else 1)
    return loss, moved @ k_s.abs(), moved.mT @ q_s.abs()


def own_error(tensors: list[Tensor], grad: Tensor, *options: Any) -> list[float]:
    """The naive form's error in float32, the largest of some draws: one may be rounded luckily.

    The draws are the tensors at hand, scaled by 1 to 1.1. The loss's is on max(1, |loss|).
    """
    worst = [0.0] * 3
    for scale in torch.linspace(1, 1.1, 8).tolist():
        draws = [(x.float() * scale).to(x.dtype) for x in tensors]
        given = by_reference(draws, grad, FLOAT, *options)
        want = by_reference(draws, grad, DOUBLE, *options)
        for i, (x, y) in enumerate(zip(given, want, strict=True)):
            size = y.abs().clamp(min=1) if i == 0 else 1
            worst[i] = max(worst[i], ((x.double() - y).abs() / size).max().item())
    return worst


def check(
    tensors: list[Tensor], kind: int, reduction: int = NONE, mask: Tensor | None = None,
    temperature: float = 1.0,
) -> None:  # fmt: skip
    """The error against float64 is at most twice float32's, and one rounding of the output.

    They are formed from numbers that are saved, whose rounding counts, too. Losses are
    measured on max(1, |loss|). Gradients in 16 bits are allowed the rounding of the
    slopes on top.
    """
    from vitkd_fast.kernels import attention_map as kernels

    options = options_for(tensors, kind, reduction, mask, temperature)
    loss, stats = kernels.attention_map_fwd(*tensors, *options)
    grad = torch.randn(loss.shape).to(loss.device)
    calls = [(grad, Results(loss, *kernels.attention_map_bwd(grad, *tensors, stats, *options)))]
    if reduction != NONE:
        ours = Results(*kernels.attention_map_fwd_grad(*tensors, *options))
        calls.append((torch.ones_like(grad), ours))
    for incoming, ours in calls:
        want = by_reference(tensors, incoming, DOUBLE, *options)
        slopes = [*saved_numbers_error(tensors, incoming, *options)]
        if tensors[0].dtype != FLOAT:
            rounded = rounded_slopes_error(tensors, incoming, *options)
            slopes[1:] = (x + y for x, y in zip(slopes[1:], rounded, strict=True))
        own = own_error(tensors, incoming, *options)
        for name, x, y, torchs, on_top in zip(
            Results._fields, ours, want, own, slopes, strict=True
        ):
            assert x.shape == y.shape
            assert x.dtype == (FLOAT if name == "loss" else tensors[0].dtype)
            limits = torch.finfo(x.dtype)
            # of exact results, at least one rounding counts
            size = y.abs().clamp(min=1 if name == "loss" else y.abs().max().item())
            allowed = (
                (2 * torchs + torch.finfo(FLOAT).eps / 2) * size
                if name == "loss"
                else (2 * torchs + torch.finfo(FLOAT).eps / 2 * size)
            )
            allowed = allowed + y.abs().clamp(min=limits.smallest_normal) * limits.eps / 2 + on_top
            error = (x.double() - y).abs()
            assert not (error > allowed).any() and not error.isnan().any(), (
                f"{name}: off by up to {(error / allowed).max():.3g} times what is allowed"
            )
    for x, like in zip(ours[1:], tensors[:2], strict=True):
        assert x.stride() == torch.empty_like(like).stride()


SHAPES = [  # batch, heads, queries, keys, dim, dim of the teacher
    (1, 1, 1, 1, 16, 16), (2, 1, 17, 17, 16, 64), (1, 2, 65, 65, 24, 24), (1, 3, 5, 70, 64, 16),
    (1, 1, 70, 5, 80, 64), (1, 1, 33, 100, 64, 128), (1, 1, 20, 130, 128, 40), (2, 2, 3, 4, 1, 3),
]  # fmt: skip
LONG_SHAPES = [(1, 1, 197, 197, 64, 64), (1, 1, 577, 577, 64, 32), (1, 2, 20, 1025, 40, 64)]
WIDE_SHAPES = [(1, 1, 17, 33, 192, 256), (1, 1, 33, 17, 300, 64), (1, 2, 9, 20, 64, 384)]


@pytest.mark.every_isa
@every_device
@every_kind
class TestValues:
    @pytest.mark.interpreted(kind=[reference.JS, reference.REVERSE_KL])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_shapes_match(self, shape: tuple[int, ...], kind: int, device: str) -> None:
        check(draw(*shape, device=device), kind)

    @pytest.mark.slow
    @pytest.mark.parametrize("shape", LONG_SHAPES, ids=str)
    def test_long_shapes_match(self, shape: tuple[int, ...], kind: int, device: str) -> None:
        for dtype in (FLOAT, HALF, BFLOAT):
            check(draw(*shape, dtype=dtype, device=device), kind)

    @pytest.mark.interpreted(shape=[WIDE_SHAPES[1]], kind=[reference.JS])
    @pytest.mark.parametrize("shape", WIDE_SHAPES, ids=str)
    def test_wide_shapes_match(self, shape: tuple[int, ...], kind: int, device: str) -> None:
        """A dim that is read block by block."""
        check(draw(*shape, dtype=HALF, device=device), kind)

    @pytest.mark.interpreted(
        reduction=[NONE, MEAN], dtype=[HALF, BFLOAT], kind=[reference.MSE, reference.REVERSE_KL]
    )
    @pytest.mark.parametrize("dtype", [HALF, BFLOAT], ids=str)
    @pytest.mark.parametrize("reduction", [NONE, MEAN, SUM])
    def test_dtypes_match(
        self, reduction: int, dtype: torch.dtype, kind: int, device: str
    ) -> None:  # fmt: skip
        """One tile, a few, and the whole row of js and mse at once."""
        for queries, keys in ((17, 50), (40, 100), (40, 197), (40, 300)):
            check(draw(1, 2, queries, keys, 24, 32, dtype, device=device), kind, reduction)

    @pytest.mark.interpreted(dtype=[BFLOAT], kind=[reference.JS])
    @pytest.mark.parametrize(
        ("dtype", "teacher"), [(FLOAT, BFLOAT), (BFLOAT, FLOAT), (HALF, BFLOAT)]
    )
    def test_mixed_dtypes_match(
        self, dtype: torch.dtype, teacher: torch.dtype, kind: int, device: str
    ) -> None:
        check(draw(1, 2, 17, 33, 32, 16, dtype, teacher, device), kind)

    @pytest.mark.interpreted(
        temperature=[4.0], reduction=[MEAN], kind=[reference.MSE, reference.REVERSE_KL]
    )
    @pytest.mark.parametrize("reduction", [NONE, MEAN, SUM])
    @pytest.mark.parametrize("temperature", [0.5, 4.0])
    def test_reductions_match(
        self, temperature: float, reduction: int, kind: int, device: str
    ) -> None:
        check(draw(2, 2, 17, 33, 16, 16, device=device), kind, reduction, None, temperature)

    @pytest.mark.interpreted(keys=[33, 300], kind=[reference.JS, reference.MSE])
    @pytest.mark.parametrize("keys", [33, 100, 300])
    @pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=str)
    def test_masks_match(self, dtype: torch.dtype, keys: int, kind: int, device: str) -> None:
        """Whole tiles are masked, first and last ones, too; one row of keys is masked entirely."""
        mask = torch.rand(4, keys) > 0.5
        mask[0] = False
        mask[1, :-1], mask[1, -1] = False, True
        mask[2, 0], mask[2, 1:] = True, False
        tensors = draw(4, 1, 9, keys, 16, 24, dtype, device=device)
        for reduction in (NONE, MEAN):
            check(tensors, kind, reduction, mask.to(device))

    @pytest.mark.interpreted(kind=[reference.MSE])
    def test_without_keys_gives_0(self, kind: int, device: str) -> None:
        from vitkd_fast.kernels import attention_map as kernels

        for keys in (20, 100):
            tensors = draw(2, 2, 17, keys, 16, 16, device=device)
            mask = torch.zeros(2, keys, dtype=torch.bool, device=device)
            options = options_for(tensors, kind, NONE, mask, 1.0)
            loss, stats = kernels.attention_map_fwd(*tensors, *options)
            grads = kernels.attention_map_bwd(loss + 1, *tensors, stats, *options)
            for x in (loss, stats, *grads):
                assert not x.any()

    @pytest.mark.interpreted(kind=[reference.REVERSE_KL])
    def test_layouts_match(self, kind: int, device: str) -> None:
        """q and k cut out of qkv, dims apart in memory, expanded, and starting at any address."""

        def new(*shape: int) -> Tensor:
            return torch.randn(shape).to(device, HALF)

        q, k, _ = new(2, 33, 3, 3, 24).permute(2, 0, 3, 1, 4).unbind(0)
        q_t, k_t, _ = new(2, 33, 3, 3, 16).permute(2, 0, 3, 1, 4).unbind(0)
        check([q, k, q_t, k_t], kind)
        check([q, k, new(2, 3, 16, 33).mT, new(2, 1, 33, 16).expand(2, 3, 33, 16)], kind)
        odd = new(2 * 3 * 33 * 17 + 1)[1:].view(2, 3, 33, 17)
        check([odd, new(2, 3, 17, 33).mT, q_t, k_t], kind)
        check([new(1, 3, 33, 24).expand(2, 3, 33, 24), new(2, 3, 24, 33).mT, q_t, k_t], kind)

    @pytest.mark.interpreted(kind=[reference.JS])
    def test_the_same_twice(self, kind: int, device: str) -> None:
        from vitkd_fast.kernels import attention_map as kernels

        tensors = draw(2, 2, 70, 100, 16, 16, device=device)
        options = options_for(tensors, kind, SUM, None, 1.0)
        first, second = (kernels.attention_map_fwd_grad(*tensors, *options) for _ in range(2))
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))

    @pytest.mark.interpreted(keys=[100], dtype=[FLOAT])
    @pytest.mark.parametrize("keys", [20, 100, 300])
    @pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
    def test_equality_gives_0(
        self, dtype: torch.dtype, keys: int, kind: int, device: str
    ) -> None:  # fmt: skip
        from vitkd_fast.kernels import attention_map as kernels

        q, k, _, _ = draw(1, 2, 17, keys, 24, 24, dtype, device=device)
        options = options_for([q, k, q], kind, SUM, None, 2.0)
        for x in kernels.attention_map_fwd_grad(q, k, q, k, *options):
            assert not x.any()

    @pytest.mark.interpreted(kind=[reference.REVERSE_KL])
    def test_extreme_scores_match(self, kind: int, device: str) -> None:
        """Most exponentials underflow, and nothing overflows."""
        from vitkd_fast.kernels import attention_map as kernels

        for keys in (20, 100, 300):
            tensors = draw(1, 1, 64, keys, 16, 16, device=device)
            check([x * 8 for x in tensors], kind)
            tensors = [x * 80 for x in tensors]
            options = options_for(tensors, kind, SUM, None, 1.0)
            for x in kernels.attention_map_fwd_grad(*tensors, *options):
                assert x.isfinite().all()

    @pytest.mark.interpreted(kind=[reference.JS])
    def test_a_close_student_in_float16(self, kind: int, device: str) -> None:
        """Slopes of 1e-5 are no subnormal numbers on their way through tensor cores."""
        if kind == reference.REVERSE_KL:
            pytest.skip("its slopes have no bound, so they are not lifted")
        q, k, _, _ = draw(1, 1, 17, 200, 16, 16, HALF, device=device)
        near = (q.float() * (1 + 2e-3)).half()
        from vitkd_fast.kernels import attention_map as kernels

        options = options_for([q, k, q], kind, SUM, None, 1.0)
        _, stats = kernels.attention_map_fwd(q, k, near, k, *options)
        grad = torch.tensor(65536.0, device=device)
        for x, want in zip(
            kernels.attention_map_bwd(grad, q, k, near, k, stats, *options),
            by_reference([q, k, near, k], grad, DOUBLE, *options)[1:],
            strict=True,
        ):
            assert (x.double() - want).norm() <= 2e-3 * want.norm()

    @pytest.mark.interpreted(kind=[reference.MSE])
    def test_empty(self, kind: int, device: str) -> None:
        from vitkd_fast.kernels import attention_map as kernels

        for shape in ((0, 2, 5, 5, 16, 16), (2, 2, 0, 5, 16, 16)):
            tensors = draw(*shape, device=device)
            for reduction in (NONE, MEAN, SUM):
                options = options_for(tensors, kind, reduction, None, 1.0)
                loss, stats = kernels.attention_map_fwd(*tensors, *options)
                assert loss.shape == (tensors[0].shape[:3] if reduction == NONE else ())
                assert not loss.any()
                grads = kernels.attention_map_bwd(loss, *tensors, stats, *options)
                if reduction != NONE:
                    loss, *more = kernels.attention_map_fwd_grad(*tensors, *options)
                    grads = *grads, *more
                    assert not loss.any()
                for x, like in zip(grads, (*tensors[:2], *tensors[:2]), strict=False):
                    assert x.shape == like.shape
                    assert not x.any()

    @pytest.mark.interpreted(kind=[reference.JS])
    def test_nan_stays_in_its_row(self, kind: int, device: str) -> None:
        from vitkd_fast.kernels import attention_map as kernels

        for keys in (20, 100, 300):
            tensors = draw(1, 1, 17, keys, 16, 16, device=device)
            tensors[0][0, 0, 3] = torch.nan
            options = options_for(tensors, kind, NONE, None, 1.0)
            loss, stats = kernels.attention_map_fwd(*tensors, *options)
            assert loss.isnan().nonzero().tolist() == [[0, 0, 3]]
            d_q, d_k = kernels.attention_map_bwd(torch.ones_like(loss), *tensors, stats, *options)
            assert d_q.isnan().any(-1).nonzero().tolist() == [[0, 0, 3]]
            assert d_k.isnan().all()


# compiled without a GPU


@pytest.fixture(params=[80, 90], ids="sm_{}".format)
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    return compile_only(monkeypatch, request.param, "attention_map")


def compile_all(
    queries: int, keys: int, dim: int, dtype: torch.dtype, kind: int, tf32: bool, everything: bool
) -> None:
    from vitkd_fast.kernels import attention_map as kernels

    def new(*shape: int, dtype: torch.dtype = FLOAT) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k = (new(8, 6, n, dim, dtype=dtype) for n in (queries, keys))
    mask = new(8, keys, dtype=torch.bool) if everything else None
    options = (0.125, 0.125, 2.0, kind, NONE if everything else MEAN, mask, tf32)
    loss, stats = kernels.attention_map_fwd(q, k, q, k, *options)
    kernels.attention_map_bwd(loss, q, k, q, k, stats, *options)


TILES = {"one": (49, 49), "row": (100, 197), "stream": (577, 577)}


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
class TestCompiled:
    @pytest.mark.parametrize(
        ("tokens", "kind"),
        [("one", reference.MSE), ("row", reference.JS), ("stream", reference.KL)],
        ids=["one-mse", "row-js", "stream-kl"],
    )
    def test_without_spills(
        self, tokens: str, kind: int, compiled: list[Any], tmp_path: Path
    ) -> None:  # fmt: skip
        """On tensor cores, too."""
        compile_all(*TILES[tokens], 64, BFLOAT, kind, False, everything=False)
        assert_nothing_is_spilled(compiled, tmp_path)
        for kernel in compiled:
            assert "mma" in kernel.asm["ptx"]

    @pytest.mark.slow
    @every_kind
    @pytest.mark.parametrize("everything", [False, True], ids=["plain", "everything"])
    @pytest.mark.parametrize("tokens", TILES)
    @pytest.mark.parametrize("dim", [32, 64, 80, 128, 256])
    @pytest.mark.parametrize(
        ("dtype", "tf32"),
        [(BFLOAT, False), (HALF, False), (FLOAT, True)],
        ids=["bfloat16", "float16", "tf32"],
    )
    def test_every_form_without_spills(
        self, dtype: torch.dtype, tf32: bool, dim: int, tokens: str, everything: bool, kind: int,
        compiled: list[Any], tmp_path: Path,
    ) -> None:  # fmt: skip
        compile_all(*TILES[tokens], dim, dtype, kind, tf32, everything)
        # masks and a gradient per row, on sm_80: 3.7 and later need none
        stack = {"3.6": 56} if everything and tokens == "stream" else None
        assert_nothing_is_spilled(compiled, tmp_path, stack)
        for kernel in compiled:
            assert "mma" in kernel.asm["ptx"]

    @pytest.mark.parametrize(
        "dim", [64, *(pytest.param(dim, marks=pytest.mark.slow) for dim in (32, 80, 128, 256))]
    )
    @pytest.mark.parametrize(
        "kind",
        [reference.JS, *(pytest.param(i, marks=pytest.mark.slow) for i in (0, 1, 3))],
    )
    def test_float32_without_spills(
        self, kind: int, dim: int, compiled: list[Any], tmp_path: Path
    ) -> None:
        """Without tensor cores, whose float32 has 10 bits of mantissa."""
        compile_all(197, 197, dim, FLOAT, kind, False, everything=True)
        assert compiled
        for kernel in compiled:
            used = resources(kernel, tmp_path)
            assert (used["STACK"], used["LOCAL"]) == (0, 0), f"{kernel.name}: {used}"
            assert "mma" not in kernel.asm["ptx"]
