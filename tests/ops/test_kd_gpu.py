"""kd_loss on a GPU: graphs, streams, sizes, and small forms for compute-sanitizer."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from support.cuda_tools import GPU, needs_gpu_or_emulator
from support.kd_tools import (
    BFLOAT,
    DENSE_LAYOUTS,
    FLOAT,
    HALF,
    MAIN_OPTIONS,
    NAN,
    OPS,
    REDUCTIONS,
    check,
    draw,
    loss_and_grad,
    operation_options,
    options_for,
    pair,
)
from support.process_tools import python
from vitkd_fast import _ops
from vitkd_fast.functional import kd_loss

pytestmark = pytest.mark.usefixtures("one_thread")


def on_gpu(*shape: int, **options: Any) -> tuple[Tensor, Tensor]:
    student, teacher = pair(*shape, device="cuda", **options)
    return student.requires_grad_(), teacher


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "class_dim"), [((4096, 1000), -1), ((16, 200_000), -1), ((4, 150, 64, 64), 1)]
)
def test_memory_is_linear_in_the_rows(shape: tuple[int, ...], class_dim: int) -> None:
    """Nothing of the logits' size beside the gradient: 64 bytes per row, and 64 KB."""
    if _ops.backends()["kd_fwd"]["CUDA"] == "reference":
        pytest.skip("the reference materialises what it likes")
    student, teacher = on_gpu(*shape)
    options = {"class_dim": class_dim, "temperature": 4.0}
    torch.cuda.synchronize()

    def peak(function: Callable[[], Any]) -> int:
        function()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before

    beside = 2**16 + 64 * (student.numel() // shape[class_dim])
    grad = student.numel() * student.element_size()
    assert beside < grad / 2
    assert peak(lambda: kd_loss(student.detach(), teacher, **options)) <= beside
    for reduction in ("mean", "none"):
        function = partial(loss_and_grad, student, teacher, reduction=reduction, **options)
        assert peak(function) <= grad + beside


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 3])
def test_a_million_classes(rows: int) -> None:
    student, teacher = on_gpu(rows, 1_000_000)
    check(student, teacher, **options_for("everything", student))


@pytest.mark.gpu
def test_offsets_beyond_int32() -> None:
    """2^31 elements and a bit: the last rows are where they belong."""
    rows, classes = 2**31 // 21841 + 2, 21841
    if torch.cuda.mem_get_info()[0] < 5 * 2 * rows * classes:
        pytest.skip("needs 20 GiB of GPU memory")
    student = torch.zeros(rows, classes, dtype=BFLOAT, device="cuda")
    teacher = torch.zeros_like(student)
    ends = pair(4, classes, dtype=BFLOAT, device="cuda")
    for x, end in zip((student, teacher), ends, strict=True):
        x[:2], x[-2:] = end[:2], end[2:]
    loss, grad = loss_and_grad(student, teacher, temperature=4.0, reduction="none")
    want, want_grad = loss_and_grad(*ends, temperature=4.0, reduction="none")
    assert_close(torch.cat([loss[:2], loss[-2:]]), want)
    assert_close(torch.cat([grad[:2], grad[-2:]]), want_grad)
    assert (loss[2:-2] == 0).all()


LABEL_99 = """
import torch
from vitkd_fast.functional import kd_loss
x = torch.zeros(4, 10, device="cuda", requires_grad=True)
labels = torch.tensor([0, 99, 2, 3], device="cuda")
kd_loss(x, x.detach(), labels=labels, ce_weight=1.0).backward()
torch.cuda.synchronize()
"""


@pytest.mark.gpu
def test_label_out_of_range_asserts_on_the_device(tmp_path: Path) -> None:
    """CUDA C++ names the operation; in a process of its own, whose context does not survive."""
    if _ops.backends()["kd_fwd_grad"]["CUDA"] != "CUDA C++":
        pytest.skip("CUDA tensors are not served by CUDA C++")
    result = python(LABEL_99, tmp_path)
    assert result.returncode != 0
    assert "kd_loss" in "".join(line for line in result.stderr.splitlines() if "ssert" in line)


@pytest.mark.gpu
@pytest.mark.triton
def test_label_out_of_range_gives_nan_in_triton(tmp_path: Path) -> None:
    if _ops.backends()["kd_fwd"]["CUDA"] != "Triton":
        pytest.skip("CUDA tensors are not served by Triton")
    student, teacher = on_gpu(4, 10)
    labels = torch.tensor([0, 99, -1, 3], device="cuda")
    for options in ({"ce_weight": 1.0}, {"ce_weight": 0.0}, {"ce_weight": 1.0, "kd_weight": 0.0}):
        loss = kd_loss(student, teacher, labels=labels, reduction="none", **options)
        assert loss.isnan().tolist() == [False, True, True, False]
        assert kd_loss(student, teacher, labels=labels, **options).isnan()
    mixed = torch.tensor([0, 1, 2, 3], device="cuda")
    for pair_of in ((mixed, labels, 0.5), (labels, mixed, 0.5)):
        loss = kd_loss(student, teacher, labels=pair_of, ce_weight=1.0, reduction="none")
        assert loss.isnan().tolist() == [False, True, True, False]


@pytest.mark.gpu
def test_temperature_that_is_not_positive_gives_nan_on_a_gpu() -> None:
    """No error: that would wait for the device."""
    student, teacher = on_gpu(4, 40)
    temperature = torch.tensor([4.0, 0.0, -1.0, NAN], device="cuda")
    loss = kd_loss(student, teacher, temperature=temperature, reduction="none")
    assert loss.isnan().tolist() == [False, True, True, True]


@pytest.mark.sanitized
@needs_gpu_or_emulator
class TestSanitize:
    """Every way through the kernels once, small enough for compute-sanitizer."""

    @pytest.mark.parametrize("name", MAIN_OPTIONS)
    @pytest.mark.parametrize(
        ("shape", "class_dim"),
        [((3, 10), -1), ((2, 33), -1), ((2, 1001), -1), ((1, 5000), -1), ((1, 70001), -1),
         ((1, 300_001), -1), ((2, 5, 3, 3), 1), ((1, 40, 1, 37), 1), ((1, 2), -1)],
        ids=str,
    )  # fmt: skip
    @pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
    def test_values(
        self, dtype: torch.dtype, shape: tuple[int, ...], class_dim: int, name: str
    ) -> None:
        student, teacher = pair(*shape, dtype=dtype, device=GPU)
        options = options_for(name, student, class_dim)
        for reduction in REDUCTIONS:
            loss, grad = loss_and_grad(student, teacher, reduction=reduction, **options)
            assert loss.isfinite().all()
            assert grad.isfinite().all()

    @pytest.mark.parametrize("layout", DENSE_LAYOUTS)
    def test_layouts(self, layout: str) -> None:
        """Strided and unaligned tensors, whose ends no load may pass."""
        new = partial(draw, dtype=HALF, device=GPU)
        student, teacher = DENSE_LAYOUTS[layout](new), DENSE_LAYOUTS["contiguous"](new)
        for reduction in ("mean", "none"):
            loss, grad = loss_and_grad(student, teacher, class_dim=1, reduction=reduction)
            assert loss.isfinite().all()
            assert grad.isfinite().all()

    @pytest.mark.parametrize("offset", [1, 3, 7])
    def test_unaligned_rows(self, offset: int) -> None:
        student, teacher = (draw(4 * 1001 + offset, dtype=HALF, device=GPU) for _ in range(2))
        student, teacher = (x[offset:].view(4, 1001) for x in (student, teacher))
        loss, grad = loss_and_grad(student, teacher)
        assert loss.isfinite()
        assert grad.isfinite().all()

    @pytest.mark.parametrize("name", MAIN_OPTIONS)
    def test_one_class(self, name: str) -> None:
        """Which the operations take, and kd_loss does not."""
        student, teacher = pair(2, 1, device=GPU)
        options = options_for(name, student)
        for reduction in REDUCTIONS:
            arguments = operation_options(student, reduction=reduction, **options)
            loss, stats = OPS.kd_fwd(student, teacher, *arguments)
            grad = OPS.kd_bwd(torch.ones_like(loss), student, teacher, stats, *arguments)
            assert (loss == 0).all()
            assert (grad == 0).all()

    def test_empty(self) -> None:
        loss, grad = loss_and_grad(*pair(0, 10, device=GPU))
        assert loss == 0
        assert grad.shape == (0, 10)
