"""kd_loss on every instruction set and backend, each in a process of its own."""

from pathlib import Path

import pytest

from support.process_tools import python, run_every_isa, run_every_isa_on_a_gpu
from vitkd_fast import _ops, int8

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_every_instruction_set(isa: str, tmp_path: Path) -> None:
    if isa not in int8.isa():
        pytest.skip(f"{isa} is not among what this CPU has: {', '.join(int8.isa())}")
    if isa == int8.isa()[0] or (isa == "avx512" and int8.isa()[0] in ("avx512vnni", "amx")):
        pytest.skip(f"the other files ran on the kernels of {isa}")
    run_every_isa(tmp_path, "kd", "not gpu", VITKD_FAST_ISA=isa)


def test_reference_backend(tmp_path: Path) -> None:
    code = "from vitkd_fast import _ops as o; print({*map(str, o.backends().values())})"
    result = python(code, tmp_path, VITKD_FAST_BACKEND="reference")
    everywhere = {"CPU": "reference", "CUDA": "reference"}
    assert result.stdout == f"{ ({str(everywhere)})!r}\n", result.stderr
    run_every_isa(tmp_path, "kd", "not gpu", VITKD_FAST_BACKEND="reference")


@pytest.mark.parametrize(
    "backend", ["reference", pytest.param("triton", marks=pytest.mark.triton), "cuda"]
)
@pytest.mark.gpu
def test_backends_on_a_gpu(backend: str, tmp_path: Path) -> None:
    """Each that this build has, also those that another one usually stands in for."""
    run_every_isa_on_a_gpu(tmp_path, "kd", backend)


def test_backend_is_checked(tmp_path: Path) -> None:
    result = python("import vitkd_fast.functional", tmp_path, VITKD_FAST_BACKEND="nonsense")
    assert result.returncode == 1
    assert result.stderr.endswith(
        "ValueError: VITKD_FAST_BACKEND: expected reference, triton or cuda, got 'nonsense'\n"
    )


def test_backend_that_was_not_built_says_so(tmp_path: Path) -> None:
    if _ops.backends()["kd_fwd"]["CUDA"] == "CUDA C++":
        pytest.skip("the extension was built with CUDA")
    result = python("import vitkd_fast.functional", tmp_path, VITKD_FAST_BACKEND="cuda")
    assert result.returncode == 1
    assert "ImportError: VITKD_FAST_BACKEND=cuda: kd_fwd has no CUDA C++ kernel" in result.stderr
    assert "VITKD_FAST_CUDA=1" in result.stderr
