"""binary_kd_loss on every instruction set and backend, each in a process of its own."""

from pathlib import Path

import pytest

from support.process_tools import run_every_isa
from vitkd_fast import _ops, int8

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_every_instruction_set(isa: str, tmp_path: Path) -> None:
    if isa not in int8.isa():
        pytest.skip(f"{isa} is not among what this CPU has: {', '.join(int8.isa())}")
    if isa == int8.isa()[0] or (isa == "avx512" and int8.isa()[0] in ("avx512vnni", "amx")):
        pytest.skip(f"the other files ran on the kernels of {isa}")
    run_every_isa(tmp_path, "binary_kd", "not gpu", VITKD_FAST_ISA=isa)


def test_reference_backend(tmp_path: Path) -> None:
    run_every_isa(tmp_path, "binary_kd", "not gpu", VITKD_FAST_BACKEND="reference")


def test_backends() -> None:
    """C++ on the CPU; no kernel of CUDA's, which no choice of a backend asks for."""
    of = [op for op in _ops.OPERATIONS if op.stem == "binary_kd"]
    assert len(of) == 3
    for op in of:
        assert not op.has_cuda
        assert _ops.backends()[op.name] == {"CPU": "C++", "CUDA": "reference"}
    assert all(op.has_cuda for op in _ops.OPERATIONS if op not in of)
