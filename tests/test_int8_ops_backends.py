"""The int8 convolutions on every instruction set and backend, each in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from vitkd_fast import _ops, int8

from .process_tools import python, run_matches


@pytest.mark.parametrize("isa", int8.isa()[1:])
def test_every_instruction_set(isa: str, tmp_path: Path) -> None:
    """The best one runs the other files."""
    run_matches(tmp_path, "int8_ops", "not gpu", VITKD_FAST_ISA=isa)


@pytest.mark.parametrize(
    "backend", ["reference", pytest.param("triton", marks=pytest.mark.triton), "cuda"]
)
@pytest.mark.gpu
def test_backends_on_a_gpu(backend: str, tmp_path: Path) -> None:
    """Each that this build has, also those that another one usually stands in for."""
    name = {"reference": "reference", "triton": "Triton", "cuda": "CUDA C++"}[backend]
    if name == _ops.backends()["int8_dwconv"]["CUDA"]:
        pytest.skip(f"the other files ran on {name}")
    code = "from vitkd_fast import _ops; print({on['CUDA'] for on in _ops.backends().values()})"
    served = python(code, tmp_path, VITKD_FAST_BACKEND=backend)
    if backend == "cuda" and "has no CUDA C++ kernel in this build" in served.stderr:
        pytest.skip("the extension was built without CUDA")
    if backend == "triton":
        pytest.importorskip("triton")
    assert served.stdout == f"{{{name!r}}}\n", served.stderr
    run_matches(tmp_path, "int8_ops", "gpu", VITKD_FAST_BACKEND=backend)
