"""AMX kernels without AMX: csrc/cpu/attention_map.cpp on amx_emulator.h, on any AVX-512.

Run as a script, this file is pytest in a process whose CPU operation has these kernels:
VITKD_EMULATED_AMX names the library with them.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CSRC = Path(__file__).parents[2] / "csrc"
TORCH = Path(torch.__file__).parent
EMULATED = "VITKD_EMULATED_AMX" in os.environ


def build(folder: Path) -> Path:
    """Compiles the kernels for the emulator, and returns the library."""
    shutil.copytree(CSRC, folder, dirs_exist_ok=True)  # by its path the copy is known in there
    library = folder / "emulated_amx.so"
    flags = ["-std=c++20", "-O1", "-fPIC", "-w", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    flags += ["-include", str(Path(__file__).with_name("amx_emulator.h")), f"-I{folder}"]
    flags += [f"-I{TORCH / 'include'}", f"-I{TORCH / 'include/torch/csrc/api/include'}"]
    libraries = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
    kernels = folder / "cpu/attention_map.cpp"
    subprocess.run(["g++", "-shared", kernels, "-o", library, *flags, *libraries], check=True)
    return library


if __name__ == "__main__":
    import vitkd_fast.functional  # noqa: F401  registers the operations

    emulated = Path(os.environ["VITKD_EMULATED_AMX"])
    torch.ops.load_library(emulated)
    for operation in ("attention_map_fwd", "attention_map_fwd_grad", "attention_map_bwd"):
        served = torch._C._dispatch_dump(f"vitkd_fast::{operation}")
        if f"CPU: registered at {emulated.parent}" not in served:
            sys.exit(f"{emulated} does not implement {operation}")
    sys.exit(pytest.main(sys.argv[1:]))
