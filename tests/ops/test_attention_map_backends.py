"""attention_map_loss: its memory, and every instruction set and backend, in their processes."""

import itertools
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from support import amx_tools
from support.attention_map_tools import loss_and_grads, maps, torch_rows
from support.process_tools import (
    files_of,
    python,
    run_every_isa,
    run_every_isa_on_a_gpu,
    run_tests,
)
from vitkd_fast import _ops, int8
from vitkd_fast.functional import attention_map_loss

pytestmark = pytest.mark.usefixtures("one_thread")


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
        pytest.skip(f"the other files ran on the kernels of {isa}")
    if isa == "amx":
        library = request.getfixturevalue("emulated_amx")
        start = [amx_tools.__file__]
        run_tests(
            tmp_path, start, *files_of("attention_map"), "-m", f"every_isa and {marked}",
            VITKD_EMULATED_AMX=str(library),
        )  # fmt: skip
    elif isa in int8.isa():
        run_every_isa(tmp_path, "attention_map", marked, VITKD_FAST_ISA=isa)
    else:
        pytest.skip(f"{isa} is not among what this CPU has: {', '.join(int8.isa())}")


@pytest.mark.slow  # every day, test_reference_matches_torch looks at its maths
def test_reference_backend(tmp_path: Path) -> None:
    run_every_isa(tmp_path, "attention_map", "not gpu", VITKD_FAST_BACKEND="reference")


@pytest.mark.parametrize(
    "backend", ["reference", pytest.param("triton", marks=pytest.mark.triton), "cuda"]
)
@pytest.mark.gpu
def test_backends_on_a_gpu(backend: str, tmp_path: Path) -> None:
    """Each that this build has, also those that another one usually stands in for."""
    run_every_isa_on_a_gpu(tmp_path, "attention_map", backend)


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
