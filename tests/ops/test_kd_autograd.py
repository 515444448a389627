"""kd_loss as a part of torch, where it has more than test_contract.py says of every loss."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from support.kd_tools import (
    BFLOAT,
    HALF,
    MAIN_OPTIONS,
    PATHS,
    check,
    every_device,
    loss_and_grad,
    options_for,
    pair,
)
from support.process_tools import python
from vitkd_fast.functional import kd_loss

pytestmark = pytest.mark.usefixtures("one_thread")


# autograd

every_path = pytest.mark.parametrize(("dtype", "reduction"), PATHS, ids=str)


@pytest.mark.every_isa
@every_device
@every_path
def test_loss_times_a_factor(dtype: torch.dtype, reduction: str, device: str) -> None:
    """The incoming gradient is any number, and 0 for what has no share in the result.

    In bfloat16 a gradient that was formed in the forward is rounded again by a factor that is no
    power of 2.
    """
    student, teacher = pair(9, 33, dtype=dtype, device=device)
    for factor in (3.0, -0.7, 0.0, 65536.0, 2.0**-10):
        for name in MAIN_OPTIONS:
            check(
                student, teacher, reductions=[reduction], grad_loss=factor,
                roundings=2 if dtype == BFLOAT and factor in (3.0, -0.7) else 1,
                **options_for(name, student),
            )  # fmt: skip


@every_device
def test_gradient_scale_reaches_float16_before_it_is_rounded(device: str) -> None:
    """Scaled by 65536, gradients that float16 would have lost: most of them are lost without."""
    student, teacher = pair(512, 1000, dtype=HALF, device=device)
    teacher = student + 0.01 * teacher
    (lost,) = torch.autograd.grad(kd_loss(student.requires_grad_(), teacher), student)
    assert (lost == 0).float().mean() > 0.5
    for reduction in ("mean", "sum", "none"):
        check(student, teacher, reductions=[reduction], grad_loss=65536.0)


@every_device
@every_path
def test_gradient_flows_through_the_student(
    dtype: torch.dtype, reduction: str, device: str
) -> None:
    student, teacher = pair(6, 40, dtype=dtype, device=device)
    weight = torch.ones(40, dtype=dtype, device=device, requires_grad=True)
    kd_loss(student * weight, teacher, reduction=reduction).sum().backward()
    _, grad = loss_and_grad(student, teacher, reduction=reduction)
    assert_close(weight.grad, (grad * student).sum(0))


@every_device
@pytest.mark.parametrize("kind", ["floats", "tensors"])
def test_compile_with_changing_options(kind: str, device: str, compiled: Callable) -> None:
    """Temperature and lam from call to call: tensors compile once. The teacher requires grad."""
    student, teacher = pair(6, 40, device=device)
    labels = torch.randint(40, (2, 6), device=device)
    function = compiled(kd_loss)
    for call, numbers in enumerate([(1.5, 0.3), (2.0, 0.5), (4.0, 0.7), (1.0, 1.0)]):
        temperature, lam = torch.tensor(numbers, device=device) if kind == "tensors" else numbers
        options = {"temperature": temperature, "ce_weight": 0.5, "labels": (*labels, lam)}
        once = kind == "tensors" and call > 0
        with torch.compiler.set_stance("fail_on_recompile" if once else "default"):
            check(student, teacher, function=function, reductions=["mean"], **options)


# the memory of large gradients


def _large_gradient(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(kd_loss(student, teacher), student)[0]


def test_memory_of_a_gradient_that_is_held() -> None:
    student, teacher = pair(300, 1000)
    student.requires_grad_()
    want = kd_loss(student.double(), teacher.double())
    (want,) = torch.autograd.grad(want, student)
    first = _large_gradient(student, teacher)
    held, place = first.numpy()[5:6], first.data_ptr()  # not even a tensor
    del first
    for _ in range(4):
        assert _large_gradient(student + 1, teacher * 2).data_ptr() != place
    assert_close(torch.from_numpy(held), want[5:6])


def test_memory_of_a_gradient_is_used_again(tmp_path: Path) -> None:
    """Also where the C library maps every large block anew, page by page."""
    code = """
import resource, torch
from vitkd_fast.functional import kd_loss

student, teacher = torch.randn(1000, 1000).requires_grad_(), torch.randn(1000, 1000)
for i in range(12):
    if i == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kd_loss(student, teacher).backward()
    student.grad = None
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    result = python(code, tmp_path, MALLOC_MMAP_THRESHOLD_=str(1 << 17), OMP_NUM_THREADS="1")
    assert int(result.stdout) < 500, result  # of 976 pages, ten times


def test_memory_of_large_gradients_in_threads() -> None:
    student, teacher = pair(300, 1000)
    student.requires_grad_()
    want = _large_gradient(student, teacher)

    def work(scale: int) -> bool:
        grads = [_large_gradient(student * scale, teacher * scale) for _ in range(10)]
        return all(torch.equal(grad, grads[0]) for grad in grads)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(1, 9)))
    assert torch.equal(_large_gradient(student, teacher), want)
