"""rkd_loss and the operation under it.

Tests marked every_isa also run once per instruction set of the host, and on the reference backend.
"""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from support.cuda_tools import GPU, needs_gpu_or_emulator
from support.feature_tools import (
    DOUBLE,
    FLOAT,
    OPS,
    Bad,
    assert_near,
    assert_refused,
    draw,
    every_device,
    loss_and_grad,
)
from support.process_tools import files_of, run_every_isa, run_in_interpreter
from support.triton_tools import (
    INTERPRETED,
    assert_nothing_is_spilled,
    compile_only,
)
from vitkd_fast import int8, reference
from vitkd_fast.functional import rkd_loss

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.every_isa
@pytest.mark.emulated
@pytest.mark.interpreted(batch=[17], weights=[(25.0, 50.0)])
@every_device
@pytest.mark.parametrize("weights", [(25.0, 50.0), (1.0, 0.0), (0.0, 2.0), (0.0, 0.0)], ids=str)
@pytest.mark.parametrize("batch", [0, 1, 2, 3, 15, 16, 17, 33, 64, 71])
def test_rkd_matches(batch: int, weights: tuple[float, float], device: str) -> None:
    x, t = draw(batch, 12, device=device), draw(batch, 20, device=device)
    options = dict(zip(("distance_weight", "angle_weight"), weights, strict=True))
    for scale, shift in ((1.0, 0.0), (1e-3, 0.0), (1e3, 0.0), (1.0, 3.0)):
        given = scale * x + shift
        value, grad = loss_and_grad(partial(rkd_loss, **options), given, t)
        want, want_grad = loss_and_grad(
            partial(reference.rkd_loss, **options), given.double(), t.double()
        )
        if batch == 2:  # the one distance is its own mean: all is rounding
            assert value <= 1e-12 + want
        else:
            # h(x) = x^2 / 2 of differences x of numbers around 1: x times their rounding
            size = (2 * sum(weights) * want.item()) ** 0.5
            assert_near(value, want, 32 if shift == 0 else 128, size)
            assert_near(grad, want_grad, 64 if shift == 0 else 512)


@pytest.mark.every_isa
@pytest.mark.emulated
@pytest.mark.interpreted(batch=[1, 5])
@every_device
@pytest.mark.parametrize("batch", [1, 5, 40])
def test_rkd_operation_matches_its_reference(batch: int, device: str) -> None:
    """Float64 too has a kernel."""
    x, t = (draw(batch, dim, dtype=DOUBLE, device=device) for dim in (9, 30))
    grams = [(a - a.mean(0)) @ (a - a.mean(0)).T for a in (x, t)]
    want = reference.rkd_fwd_grad(*grams, 25.0, 50.0)
    for dtype in (DOUBLE, FLOAT):
        given = OPS.rkd_fwd_grad(*(a.to(dtype) for a in grams), 25.0, 50.0)
        assert [a.dtype for a in given] == [dtype] * 2
        for a, b in zip(given, want, strict=True):
            assert_near(a, b, 64)
        strided = [F.pad(a, (1, 2, 3, 4))[3:-4, 1:-2] for a in grams]
    for a, b in zip(OPS.rkd_fwd_grad(*strided, 25.0, 50.0), want, strict=True):
        assert_near(a, b, 64)


@pytest.mark.every_isa
@pytest.mark.emulated
@pytest.mark.interpreted(dtype=[FLOAT])
@every_device
@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE], ids=str)
def test_extreme_rkd_of_identical_embeddings(dtype: torch.dtype, device: str) -> None:
    """Pairs of distance 0, in one model or in both: as the usual form, and the gradient finite."""
    new = partial(draw, dtype=dtype, device=device)
    x, t = new(12, 8), new(12, 8)
    x[3], x[4], x[7] = x[1], x[1], x[0]
    t[3], t[10] = t[1], t[11]
    value, grad = loss_and_grad(rkd_loss, x, t)
    want, want_grad = loss_and_grad(reference.rkd_loss, x.double(), t.double())
    assert_near(value, want, 64)
    assert_near(grad, want_grad, 256)
    same = torch.ones_like(x) * new(8)
    for a, b in ((same, t), (x, same), (same, same), (torch.zeros_like(x), t)):
        value, grad = loss_and_grad(rkd_loss, a, b)
        assert_near(value, reference.rkd_loss(a.double(), b.double()), 64)
        assert grad.isfinite().all()


@pytest.mark.every_isa
@pytest.mark.emulated
@every_device
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_extreme_rkd_nan_stays(bad: float, device: str) -> None:
    x, t = draw(20, 8, device=device), draw(20, 8, device=device)
    for a, b in ((x, t.clone()), (x.clone(), t)):
        (b if a is x else a)[3, 2] = bad
        value, grad = loss_and_grad(rkd_loss, a, b)
        assert value.isnan()
        assert grad.isnan().any()


@pytest.mark.every_isa
@pytest.mark.emulated
@every_device
def test_rkd_of_large_batches_matches_its_reference(device: str) -> None:
    """More columns than a tile has."""
    x, t = draw(301, 6, device=device), draw(301, 6, device=device)
    grams = [(a - a.mean(0)) @ (a - a.mean(0)).T for a in (x, t)]
    given = OPS.rkd_fwd_grad(*grams, 25.0, 50.0)
    want = reference.rkd_fwd_grad(*(a.double() for a in grams), 25.0, 50.0)
    for a, b in zip(given, want, strict=True):
        assert_near(a, b, 128)


def test_rkd_is_the_same_on_any_number_of_threads() -> None:
    x, t = draw(150, 30), draw(150, 30)
    want = loss_and_grad(rkd_loss, x, t)
    gram = x @ x.T, t @ t.T
    one = OPS.rkd_fwd_grad(*gram, 25.0, 50.0)
    torch.set_num_threads(3)
    for a, b in zip(OPS.rkd_fwd_grad(*gram, 25.0, 50.0), one, strict=True):
        assert torch.equal(a, b)
    torch.set_num_threads(1)
    for a, b in zip(loss_and_grad(rkd_loss, x, t), want, strict=True):
        assert torch.equal(a, b)


# errors

X, E = draw(2, 5, 4, 4), draw(4, 5)
BAD: dict[str, Bad] = {
    "rkd_form": (lambda: rkd_loss(X, E), ValueError, "x_s: expected [batch, dim], got [2, 5"),
    "rkd_batch": (
        lambda: rkd_loss(E, E[:3]), ValueError, "x_t: expected the batch of x_s [4, 5], got [3, 5]",
    ),
    "rkd_dtype": (lambda: rkd_loss(E, E.int()), TypeError, "x_t: expected float32, "),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    assert_refused(name, *BAD[name])


# instruction sets and backends, each in a process of its own


@pytest.mark.parametrize("isa", ["scalar", "avx2"])
def test_every_instruction_set(isa: str, tmp_path: Path) -> None:
    if isa not in int8.isa() or isa == int8.isa()[0]:
        pytest.skip(f"{isa} is not below what this CPU has: {', '.join(int8.isa())}")
    run_every_isa(tmp_path, "rkd", "not gpu", VITKD_FAST_ISA=isa)


def test_reference_backend(tmp_path: Path) -> None:
    run_every_isa(tmp_path, "rkd", "not gpu", VITKD_FAST_BACKEND="reference")


# what only a GPU or the emulator has


@pytest.mark.sanitized
@needs_gpu_or_emulator
class TestSanitize:
    """Every way through rkd's kernels once, small enough for compute-sanitizer."""

    @pytest.mark.parametrize("weights", [(25.0, 50.0), (1.0, 0.0), (0.0, 2.0)], ids=str)
    @pytest.mark.parametrize("batch", [1, 16, 17, 40])
    @pytest.mark.parametrize("dtype", [FLOAT, DOUBLE], ids=str)
    def test_rkd(self, dtype: torch.dtype, batch: int, weights: tuple[float, float]) -> None:
        grams = [a @ a.T for a in (draw(batch, dim, dtype=dtype, device=GPU) for dim in (5, 6))]
        for result in OPS.rkd_fwd_grad(*grams, *weights):
            assert result.isfinite().all()


# Triton, interpreted and compiled without a GPU


@pytest.mark.triton
def test_triton_in_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    run_in_interpreter(tmp_path, *files_of("rkd"), "-m", "interpreted and not gpu")


@pytest.mark.triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", [80, 90], ids="sm_{}".format)
@pytest.mark.parametrize("n", [256, 1024])
@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE], ids=str)
@pytest.mark.parametrize("weights", [(25.0, 50.0), (1.0, 0.0), (0.0, 2.0)], ids=str)
def test_triton_compiles_without_spills(
    weights: tuple[float, float], dtype: torch.dtype, n: int, capability: int,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    pytest.importorskip("triton")
    compiled = compile_only(monkeypatch, capability, "rkd")
    from vitkd_fast.kernels import rkd

    gram = torch.empty(n, n, dtype=dtype, device="meta")
    rkd.rkd_fwd_grad(gram, gram, *weights)
    assert_nothing_is_spilled(compiled, tmp_path)
