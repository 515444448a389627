"""The losses behind row_loss on every instruction set and backend, each in a process of its own."""

from pathlib import Path

import pytest

from support.process_tools import run_every_isa, run_every_isa_on_a_gpu
from vitkd_fast import int8

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_every_instruction_set(isa: str, tmp_path: Path) -> None:
    if isa not in int8.isa():
        pytest.skip(f"{isa} is not among what this CPU has: {', '.join(int8.isa())}")
    if isa == int8.isa()[0] or (isa == "avx512" and int8.isa()[0] in ("avx512vnni", "amx")):
        pytest.skip(f"the other files ran on the kernels of {isa}")
    run_every_isa(tmp_path, "row_loss", "not gpu", VITKD_FAST_ISA=isa)


@pytest.mark.slow
def test_reference_backend(tmp_path: Path) -> None:
    run_every_isa(tmp_path, "row_loss", "not gpu", VITKD_FAST_BACKEND="reference")


@pytest.mark.parametrize(
    "backend", ["reference", pytest.param("triton", marks=pytest.mark.triton), "cuda"]
)
@pytest.mark.gpu
def test_backends_on_a_gpu(backend: str, tmp_path: Path) -> None:
    run_every_isa_on_a_gpu(tmp_path, "row_loss", backend)
