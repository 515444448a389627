"""csrc/cuda on the CPU: a library in which the kernels run on tests/cuda_emulator.

As a pytest plugin (`-p emulated_cuda`, VITKD_EMULATED names the library), it gives the operations
on CPU tensors to these kernels, for the tests of any device to look at them.
"""

from __future__ import annotations

import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
EMULATOR = ROOT / "tests" / "cuda_emulator"
NUMBERS = count()


def rewrite(text: str) -> str:
    """CUDA C++ as C++ that the emulator can run: launches, shared memory, where it is registered."""
    text = text.replace("__CUDACC__", "VITKD_EMULATED").replace("__CUDA_ARCH__", "VITKD_EMULATED")
    text = text.replace("#include <cuda_runtime.h>", '#include "emulator.h"')
    text = text.replace("STABLE_TORCH_LIBRARY_IMPL(vitkd_fast, CUDA", "STABLE_TORCH_LIBRARY_IMPL(vitkd_fast, CPU")
    text = re.sub(r".*accelerator::DeviceGuard guard\(.*\n", "", text)
    text = re.sub(
        r"extern __shared__ (?:__align__\(16\) )?(\w+) (\w+)\[\];",
        r"\1* const \2 = emulator::dynamic_shared<\1>();",
        text,
    )

    def variables(match: re.Match[str]) -> str:
        kind, names = match[1], match[2].split(", ")
        return " ".join(
            f"auto& {name} = emulator::shared_variable<{kind}{size}>({next(NUMBERS)});"
            for name, _, size in (re.split(r"(?=(\[|$))", n, maxsplit=1) for n in names)
        )

    text = re.sub(r"__shared__ (?:alignas\(16\) )?([\w<>]+) ([^;]+);", variables, text)
    return re.sub(
        r"([\w]+(?:<[^<>;(){}]*>)?)<<<(.*?)>>>\(", r"emulator::start(\1, \2)(", text, flags=re.S
    )


def build(folder: Path) -> Path:
    """Compiles every kernel, and returns the library."""
    for file in (f for f in CSRC.rglob("*") if f.suffix in (".h", ".cu")):
        to = folder / file.relative_to(CSRC)
        to.parent.mkdir(parents=True, exist_ok=True)
        to.with_suffix(".cpp" if file.suffix == ".cu" else ".h").write_text(rewrite(file.read_text()))
    (folder / "cuda" / "ptx.h").unlink()
    torch_home = Path(torch.__file__).parent
    include = [folder, EMULATOR, torch_home / "include", torch_home / "include/torch/csrc/api/include"]
    library = folder / "emulated.so"

    def compile_one(file: Path) -> Path:
        fused = "off" if file.stem.startswith("int8") else "fast"
        subprocess.run(
            ["g++", "-c", file, "-o", file.with_suffix(".o"), "-std=c++20", "-O1", "-fPIC", "-w",
             "-mfma", f"-ffp-contract={fused}", "-DTORCH_TARGET_VERSION=0x020b000000000000",
             "-DVITKD_EMULATED=900", *os.environ.get("VITKD_EMULATED_FLAGS", "").split(), *(f"-I{i}" for i in include)],
            check=True,
        )  # fmt: skip
        return file.with_suffix(".o")

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sorted((folder / "cuda").glob("*.cpp"))))
    subprocess.run(
        ["g++", "-shared", *objects, "-o", library, *os.environ.get("VITKD_EMULATED_FLAGS", "").split(), f"-L{torch_home / 'lib'}", "-ltorch_cpu", "-lc10"], check=True
    )
    return library


if library := os.environ.get("VITKD_EMULATED"):
    import vitkd_fast.functional  # noqa: F401

    torch.ops.load_library(library)
