"""The Triton kernels of the int8 convolutions: interpreted, and compiled without a GPU.

The interpreter runs test_int8_ops.py; a GPU does so from there.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from support.process_tools import files_of, run_in_interpreter
from support.triton_tools import (
    INTERPRETED,
    assert_nothing_is_spilled,
    compile_only,
)

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing"),
]

SHARED = files_of("int8_ops")


def test_in_the_interpreter(tmp_path: Path) -> None:
    run_in_interpreter(tmp_path, *SHARED, "-m", "interpreted and not gpu")


@pytest.mark.slow
def test_all_in_the_interpreter(tmp_path: Path) -> None:
    run_in_interpreter(tmp_path, *SHARED, "-m", "every_isa and not gpu")


capability = pytest.mark.parametrize(
    "capability", [pytest.param(80, marks=pytest.mark.slow), 90], ids="sm_{}".format
)
every_finish = pytest.mark.parametrize("scale", [None, 0.5], ids=["plain", "hardswish"])


def new(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def constants(weight: torch.Tensor, channels: int) -> tuple[Any, ...]:
    return weight, new(channels, dtype=torch.int32), new(channels, dtype=torch.float32)


@capability
@every_finish
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("channels", [16, 24, 96, 17])
def test_dwconv_compiled_without_spills(
    channels: int, kernel: int, scale: float | None, capability: int,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    from vitkd_fast.kernels import int8_dwconv as kernels

    compiled = compile_only(monkeypatch, capability, "int8_dwconv")
    weight = new(kernel, kernel, channels, dtype=torch.int8)
    finish = (7, 0, 255, scale)
    for side, stride in ((56, 1), (7, 2)):
        kernels.int8_dwconv(
            new(8, side, side, channels), *constants(weight, channels),
            (stride, stride), (kernel // 2,) * 4, 3, *finish,
        )  # fmt: skip
    assert_nothing_is_spilled(compiled, tmp_path)


@capability
@every_finish
@pytest.mark.parametrize("out", [16, 96, 160])
@pytest.mark.parametrize("channels", [16, 24, 96, 17])
def test_pwconv_compiled_without_spills(
    channels: int, out: int, scale: float | None, capability: int,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    """On tensor cores, too."""
    from vitkd_fast.kernels import int8_pwconv as kernels

    compiled = compile_only(monkeypatch, capability, "int8_pwconv")
    weight = new(out, channels, dtype=torch.int8)
    for pixels in (49, 4096, 100_000):
        kernels.int8_pwconv(new(pixels, channels), *constants(weight, out), 7, 0, 255, scale)
    assert_nothing_is_spilled(compiled, tmp_path)
    for kernel in compiled:
        assert "mma" in kernel.asm["ptx"]
