"""The int8 convolutions on every instruction set and backend, each in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.process_tools import run_every_isa, run_every_isa_on_a_gpu
from vitkd_fast import int8


@pytest.mark.parametrize("isa", int8.isa()[1:])
def test_every_instruction_set(isa: str, tmp_path: Path) -> None:
    """The best one runs the other files."""
    run_every_isa(tmp_path, "int8_ops", "not gpu", VITKD_FAST_ISA=isa)


@pytest.mark.parametrize(
    "backend", ["reference", pytest.param("triton", marks=pytest.mark.triton), "cuda"]
)
@pytest.mark.gpu
def test_backends_on_a_gpu(backend: str, tmp_path: Path) -> None:
    """Each that this build has, also those that another one usually stands in for."""
    run_every_isa_on_a_gpu(tmp_path, "int8_ops", backend)
