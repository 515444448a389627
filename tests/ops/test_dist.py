"""dist_loss and the operations under it.

Tests marked every_isa also run once per instruction set of the host, and on the reference backend.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from support.cuda_tools import GPU, needs_gpu_or_emulator
from support.feature_tools import (
    BFLOAT,
    DOUBLE,
    FLOAT,
    HALF,
    OPS,
    Bad,
    assert_near,
    assert_refused,
    draw,
    every_device,
    loss_and_grad,
)
from support.process_tools import files_of, python, run_every_isa, run_in_interpreter
from support.triton_tools import INTERPRETED, assert_nothing_is_spilled, compile_only
from vitkd_fast import int8, nn, reference
from vitkd_fast.functional import dist_loss

pytestmark = pytest.mark.usefixtures("one_thread")


def public(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """As the authors wrote it, with beta and gamma of 1."""

    def cosine(a: Tensor, b: Tensor, eps: float = 1e-8) -> Tensor:
        return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + eps)

    def pearson(a: Tensor, b: Tensor) -> Tensor:
        return cosine(a - a.mean(1).unsqueeze(1), b - b.mean(1).unsqueeze(1))

    q, p = (x.div(temperature).softmax(1) for x in (student, teacher))
    inter = temperature**2 * (1 - pearson(q, p).mean())
    return inter + temperature**2 * (1 - pearson(q.T, p.T).mean())


@pytest.mark.every_isa
@pytest.mark.emulated(shape=[(3, 7), (70, 33), (300, 40)])
@pytest.mark.interpreted(shape=[(3, 7)])
@every_device
@pytest.mark.parametrize(
    "shape",
    [(1, 5), (2, 2), (3, 7), (70, 33), (300, 40), (64, 1001), (600, 17), (2, 70000)],
    ids=str,
)
def test_matches(shape: tuple[int, int], device: str) -> None:
    student, teacher = 2 * draw(*shape, device=device), 3 * draw(*shape, device=device)
    for temperature, beta, gamma in ((1.0, 1.0, 1.0), (4.0, 0.5, 2.0), (1.0, 0.0, 1.0)):
        options = {"temperature": temperature, "beta": beta, "gamma": gamma}
        value, grad = loss_and_grad(partial(dist_loss, **options), student, teacher)
        want, want_grad = loss_and_grad(
            partial(reference.dist_loss, **options), student.double(), teacher.double()
        )
        assert_near(value, want, 16, temperature**2)
        if shape[0] > 2:  # of two rows, columns are correlated by 1 or -1: all is rounding
            assert_near(grad, want_grad, 64)


@pytest.mark.every_isa
@pytest.mark.emulated
@pytest.mark.interpreted(dtype=[HALF, DOUBLE])
@every_device
@pytest.mark.parametrize("dtype", [HALF, BFLOAT, FLOAT, DOUBLE], ids=str)
def test_dtypes_match(dtype: torch.dtype, device: str) -> None:
    new = partial(draw, 40, 21, device=device)
    student, teacher = new(dtype=dtype), new(dtype=FLOAT if dtype == HALF else dtype)
    given = loss_and_grad(dist_loss, student, teacher)
    want = loss_and_grad(public, student.double(), teacher.double())
    assert [x.dtype for x in given] == [DOUBLE if dtype == DOUBLE else FLOAT, dtype]
    assert_near(given[0], want[0], 32)
    assert_near(given[1], want[1], 64)


@pytest.mark.every_isa
@pytest.mark.emulated
@pytest.mark.interpreted(rows=[3])
@every_device
@pytest.mark.parametrize("rows", [1, 3, 40, 700])
def test_operations_match_their_references(rows: int, device: str) -> None:
    student, teacher = (draw(rows, 19, dtype=DOUBLE, device=device) for _ in range(2))
    want = reference.dist_moments(student, teacher, 2.0)
    factors = draw(2, rows, dtype=DOUBLE, device=device), draw(4, 19, dtype=DOUBLE, device=device)
    one = torch.ones((), dtype=DOUBLE, device=device)
    want_grad = reference.dist_bwd(3 * one, student, teacher, want[0], *factors, 2.0)
    for dtype in (DOUBLE, FLOAT):
        s, t = student.to(dtype), teacher.to(dtype)
        given = OPS.dist_moments(s, t, 2.0)
        assert [x.dtype for x in given] == [dtype, DOUBLE]
        for x, y in zip(given, want, strict=True):
            assert_near(x.to(dtype), y, 64)
        stats, *rest = (x.to(dtype) for x in (want[0], *factors))
        assert_near(OPS.dist_bwd(3 * one.to(dtype), s, t, stats, *rest, 2.0), want_grad, 64)


@pytest.mark.every_isa
@pytest.mark.emulated
@every_device
def test_constant_columns_and_rows(device: str) -> None:
    """Correlation 0, and no gradient of it: a student whose head begins with zeros."""
    teacher = draw(50, 9, device=device)
    for student in (torch.zeros_like(teacher), torch.ones_like(teacher) * draw(9, device=device)):
        value, grad = loss_and_grad(partial(dist_loss, beta=0.0), student, teacher)
        assert_close(value, torch.ones_like(value), rtol=0, atol=1e-5)
        assert (grad == 0).all()
    value, grad = loss_and_grad(dist_loss, torch.zeros_like(teacher), teacher)
    assert_close(value, 2 * torch.ones_like(value), rtol=0, atol=1e-5)
    assert (grad == 0).all()
    value, grad = loss_and_grad(dist_loss, draw(1, 9, device=device), teacher[:1])
    assert 1 <= value <= 3
    assert grad.isfinite().all()


@pytest.mark.every_isa
@pytest.mark.emulated
@pytest.mark.interpreted
@every_device
def test_extreme_logits(device: str) -> None:
    """Of +-1e4, masked, and saturated: finite; NaN stays."""
    student, teacher = draw(20, 9, device=device), draw(20, 9, device=device)
    masked = student.clone()
    masked[:, 3] = -torch.inf
    for s, t in (
        (student + 1e4, teacher - 1e4), (1e4 * student, teacher), (student, 1e4 * teacher),
        (100 * student, -100 * teacher), (masked, teacher), (student, masked), (masked, masked),
    ):  # fmt: skip
        value, grad = loss_and_grad(dist_loss, s, t)
        assert value.isfinite()
        assert grad.isfinite().all()
    moved, _ = loss_and_grad(dist_loss, student + 64, teacher - 64)
    assert_close(moved, dist_loss(student, teacher), rtol=1e-4, atol=1e-5)
    student[2, 4] = torch.nan
    value, _ = loss_and_grad(dist_loss, student, teacher)
    assert value.isnan()


@pytest.mark.every_isa
@every_device
def test_student_equal_to_teacher(device: str) -> None:
    x = draw(30, 12, dtype=DOUBLE, device=device)
    value, grad = loss_and_grad(dist_loss, x, x)
    assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-6)  # eps beside the norms
    assert grad.abs().max() < 1e-6


@given(st.integers(2, 30), st.integers(2, 12), st.data())
@settings(max_examples=50, deadline=None)
def test_shifts_and_order_change_nothing(rows: int, classes: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    shift = data.draw(st.floats(-30, 30))
    student, teacher = torch.randn(2, rows, classes, generator=generator, dtype=DOUBLE)
    want = dist_loss(student, teacher)
    assert_close(dist_loss(student + shift, teacher), want, rtol=1e-6, atol=1e-8)
    assert_close(dist_loss(student, teacher - shift), want, rtol=1e-6, atol=1e-8)
    by_row = torch.randperm(rows, generator=generator)
    by_class = torch.randperm(classes, generator=generator)
    moved = (x[by_row][:, by_class] for x in (student, teacher))
    assert_close(dist_loss(*moved), want, rtol=1e-6, atol=1e-8)
    # in the teacher and the student alike, rho is symmetric
    assert_close(dist_loss(teacher, student), want, rtol=1e-8, atol=1e-10)


def test_rows_of_any_shape() -> None:
    student, teacher = draw(4, 5, 6, 7), draw(4, 5, 6, 7)
    want = dist_loss(student.movedim(1, -1).reshape(-1, 5), teacher.movedim(1, -1).reshape(-1, 5))
    assert torch.equal(dist_loss(student.movedim(1, -1), teacher.movedim(1, -1)), want)


def test_threads_change_nothing() -> None:
    student, teacher = draw(700, 65), draw(700, 65)
    want = loss_and_grad(dist_loss, student, teacher)
    torch.set_num_threads(3)
    for x, y in zip(loss_and_grad(dist_loss, student, teacher), want, strict=True):
        assert torch.equal(x, y)


def test_module() -> None:
    student, teacher = draw(8, 5), draw(8, 5)
    loss = nn.DISTLoss(temperature=2.0, beta=0.5, gamma=2.0)
    want = dist_loss(student, teacher, temperature=2.0, beta=0.5, gamma=2.0)
    assert torch.equal(loss(student, teacher), want)


# over processes


PROCESS = """
import torch
import torch.distributed as dist
from vitkd_fast.functional import dist_loss
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + {store!r}, rank={rank}, world_size=2)
student, teacher = (x[{begin}:{end}] for x in torch.load({logits!r}))
for sync in (True, False):
    leaf = student.clone().requires_grad_()
    loss = dist_loss(leaf, teacher, sync=sync, temperature=2.0)
    torch.save((loss.detach(), *torch.autograd.grad(loss, leaf)), "{rank}-" + str(sync) + ".pt")
dist.destroy_process_group()
"""


@pytest.mark.parametrize("sizes", [[20, 20], [33, 7]], ids=str)
def test_processes_change_nothing(sizes: list[int], tmp_path: Path) -> None:
    """Loss, and the mean of the gradients in a shared parameter: as of the batch in one process."""
    student, teacher = draw(40, 9, dtype=DOUBLE), draw(40, 9, dtype=DOUBLE)
    torch.save((student, teacher), tmp_path / "logits.pt")

    def run(rank: int) -> None:
        begin = sum(sizes[:rank])
        code = PROCESS.format(
            rank=rank, begin=begin, end=begin + sizes[rank], store=str(tmp_path / "store"),
            logits=str(tmp_path / "logits.pt"),
        )  # fmt: skip
        result = python(code, tmp_path)
        assert result.returncode == 0, result.stderr

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, range(2)))
    want, want_grad = loss_and_grad(partial(dist_loss, temperature=2.0), student, teacher)
    together = [torch.load(tmp_path / f"{rank}-True.pt") for rank in range(2)]
    assert_close([loss for loss, _ in together], [want, want], rtol=1e-12, atol=0)
    grad = torch.cat([grad for _, grad in together]) / 2
    assert_close(grad, want_grad, rtol=1e-9, atol=1e-14)
    apart = [torch.load(tmp_path / f"{rank}-False.pt")[0] for rank in range(2)]
    assert not torch.isclose(sum(apart) / 2, want, rtol=1e-6)


def test_sync_without_processes_changes_nothing() -> None:
    student, teacher = draw(8, 5), draw(8, 5)
    assert torch.equal(dist_loss(student, teacher, sync=True), dist_loss(student, teacher))


# errors

X = draw(4, 5)
BAD: dict[str, Bad] = {
    "dist_loss_form": (lambda: dist_loss(X[0], X[0]), ValueError, "student: expected [*rows, cl"),
    "dist_loss_classes": (lambda: dist_loss(X[:, :1], X[:, :1]), ValueError, "2 classes or more"),
    "dist_loss_shape": (
        lambda: dist_loss(X, X[:3]), ValueError,
        "teacher: expected the shape of student [4, 5], got [3, 5]",
    ),
    "dist_loss_temperature": (
        lambda: dist_loss(X, X, temperature=0.0), ValueError,
        "temperature: expected a number > 0, got 0.0",
    ),
    "dist_loss_dtype": (lambda: dist_loss(X, X.int()), TypeError, "teacher: expected float32, "),
    "dist_loss_grad": (
        lambda: dist_loss(X, X.clone().requires_grad_()), ValueError, "teacher: expected a con",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    assert_refused("dist_loss", *BAD[name])


# instruction sets and backends, each in a process of its own


@pytest.mark.parametrize("isa", ["scalar", "avx2"])
def test_every_instruction_set(isa: str, tmp_path: Path) -> None:
    if isa not in int8.isa() or isa == int8.isa()[0]:
        pytest.skip(f"{isa} is not below what this CPU has: {', '.join(int8.isa())}")
    run_every_isa(tmp_path, "dist", "not gpu", VITKD_FAST_ISA=isa)


def test_reference_backend(tmp_path: Path) -> None:
    run_every_isa(tmp_path, "dist", "not gpu", VITKD_FAST_BACKEND="reference")


# what only a GPU or the emulator has


@pytest.mark.sanitized
@needs_gpu_or_emulator
class TestSanitize:
    """Every way through the kernels once, small enough for compute-sanitizer."""

    @pytest.mark.parametrize("shape", [(1, 2), (9, 33), (300, 31)], ids=str)
    @pytest.mark.parametrize("dtype", [FLOAT, BFLOAT, DOUBLE], ids=str)
    def test_values(self, dtype: torch.dtype, shape: tuple[int, int]) -> None:
        new: Any = partial(draw, *shape, dtype=dtype, device=GPU)
        for result in loss_and_grad(dist_loss, new(), new()):
            assert result.isfinite().all()


# Triton, interpreted and compiled without a GPU


@pytest.mark.triton
def test_triton_in_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    run_in_interpreter(tmp_path, *files_of("dist"), "-m", "interpreted and not gpu")


@pytest.mark.triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", [80, 90], ids="sm_{}".format)
@pytest.mark.parametrize("classes", [10, 1000, 21841])
@pytest.mark.parametrize("dtype", [BFLOAT, FLOAT], ids=str)
def test_triton_compiles_without_spills(
    dtype: torch.dtype, classes: int, capability: int, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    pytest.importorskip("triton")
    compiled = compile_only(monkeypatch, capability, "dist")
    from vitkd_fast.kernels import dist as kernels

    logits = torch.empty(4096, classes, dtype=dtype, device="meta")
    stats, columns = kernels.dist_moments(logits, logits, 4.0)
    factors = logits.new_empty(2, 4096).float(), columns[:4].float()
    kernels.dist_bwd(logits.new_empty(()).float(), logits, logits, stats, *factors, 4.0)
    assert_nothing_is_spilled(compiled, tmp_path)
