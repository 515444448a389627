"""The CUDA kernels without a GPU: they compile for sm_80 and sm_90, and no register spills."""

from __future__ import annotations

import re
import runpy
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


@pytest.fixture(scope="module")
def nvcc() -> Path:
    setup = runpy.run_path(str(ROOT / "setup.py"), run_name="looked_at")
    home, _, reason = setup["choose_cuda"]("auto", torch.version.cuda, setup["cuda_homes"]())
    if home is None:
        pytest.skip(f"no CUDA compiler: {reason}")
    return home / "bin" / "nvcc"


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_nothing_spills(nvcc: Path, file: Path, arch: int, tmp_path: Path) -> None:
    torch_include = Path(torch.__file__).parent / "include"
    result = subprocess.run(
        [
            nvcc, "-c", file, "-o", tmp_path / "out.o", "-std=c++20", "-O3", "-Xptxas", "-v",
            "--expt-relaxed-constexpr", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000",
            f"-I{ROOT / 'csrc'}", f"-I{torch_include}",
            f"-I{torch_include / 'torch/csrc/api/include'}",
            f"-gencode=arch=compute_{arch},code=sm_{arch}",
        ],
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", result.stderr)
    assert frames, "ptxas said nothing"
    assert set(frames) == {("0", "0")}, result.stderr
