"""The engine's CUDA kernels, by nvcc, as one file for several architectures; setup.py runs this."""

import re
import subprocess
from pathlib import Path

HOLDER = """// by fatbin.py
asm(R"asm(
  .section .nv_fatbin, "a"
  .globl vitkd_int8_kernels, vitkd_int8_kernels_built
  .hidden vitkd_int8_kernels, vitkd_int8_kernels_built
  .balign 64
vitkd_int8_kernels:
  .incbin "{fatbin}"
vitkd_int8_kernels_built:
  .asciz "{built}"
  .previous
)asm");
"""


def toolkit_version(home):
    """The version of the toolkit in home, such as 13.0; None without its compiler and headers."""
    header = home / "include" / "cuda_runtime_api.h"
    if not all(f.exists() for f in (header, home / "include/cuda_runtime.h", home / "bin/nvcc")):
        return None
    version = re.search(r"#define\s+CUDART_VERSION\s+(\d+)", header.read_text(errors="replace"))
    return version and f"{int(version[1]) // 1000}.{int(version[1]) % 1000 // 10}"


def gencode(architectures):
    """nvcc's options for a list such as 8.0;9.0+PTX, as torch's TORCH_CUDA_ARCH_LIST has them."""
    options = []
    for arch in re.split(r"[;\s]+", architectures.strip()):
        number, _, ptx = arch.partition("+")
        if not re.fullmatch(r"\d+\.\d+[af]?", number) or ptx not in ("", "PTX"):
            raise SystemExit(f"vitkd_fast: TORCH_CUDA_ARCH_LIST: not an architecture: {arch}")
        digits = number.replace(".", "")
        codes = f"sm_{digits}" + f",compute_{digits}" * bool(ptx)
        options += ["-gencode", f"arch=compute_{digits},code=[{codes}]"]
    return options


def compiled(home, version, architectures, temp):
    """Compiles where something has changed; returns C++ files that hold the result."""
    here, root = Path(__file__).parent, Path(__file__).parents[2]
    sources = [*here.glob("*.cu*"), *here.glob("*.h"), *root.glob("cuda/*"), *root.glob("math/*")]
    folder, built = Path(temp), f"{version} ({architectures})"
    fatbin, holder = folder / "int8.fatbin", folder / "int8_kernels.cpp"
    text = HOLDER.format(fatbin=fatbin.absolute(), built=built)
    newest = max(file.stat().st_mtime for file in sources)
    if holder.exists() and holder.read_text() == text and holder.stat().st_mtime > newest:
        return [str(holder)]
    folder.mkdir(parents=True, exist_ok=True)
    nvcc = [home / "bin/nvcc", "-fatbin", "-std=c++20", "-O3", f"-I{root}"]
    subprocess.run([*nvcc, *gencode(architectures), here / "kernels.cu", "-o", fatbin], check=True)
    holder.write_text(text)
    return [str(holder)]
