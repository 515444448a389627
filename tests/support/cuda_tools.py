"""CUDA C++ without a GPU: the kernels of csrc/cuda on tests/cuda_emulator.

Run as a script, this file is pytest in a process whose CPU operations are CUDA's: VITKD_EMULATED
names the library with them. What is emulated, and what is not: cuda_emulator/emulator.h.
"""

import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

CSRC = Path(__file__).parents[2] / "csrc"
EMULATOR = Path(__file__).parents[1] / "cuda_emulator"
TORCH = Path(torch.__file__).parent
FLAGS = ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
INCLUDE = [f"-I{TORCH / 'include'}", f"-I{TORCH / 'include/torch/csrc/api/include'}"]

EMULATED = "VITKD_EMULATED" in os.environ
# for tests of what a GPU does that the emulator does, too
GPU = "cpu" if EMULATED else "cuda"
needs_gpu_or_emulator: Callable[[Any], Any] = (lambda x: x) if EMULATED else pytest.mark.gpu


def rewritten(text: str) -> str:
    """CUDA C++ in words that a C++ compiler knows, with the emulator's functions behind them."""
    number = itertools.count()

    def variables(match: re.Match[str]) -> str:
        # __shared__ T a[n], b;
        kind, declarators = match.groups()
        return " ".join(
            f"auto& {name} = emulator::shared_variable<{kind}{size}>(__FILE__, {next(number)});"
            for name, size in re.findall(r"(\w+)((?:\[.*\])?)(?:, |$)", declarators)
        )

    for pattern, by in (
        (r"__CUDACC__|__CUDA_ARCH__", "VITKD_EMULATED"),
        (r"#include <cuda_runtime.h>", ""),  # emulator.h comes first
        (r"(LIBRARY_IMPL\(vitkd_fast, )CUDA\b", r"\1CPU"),
        (r".*::DeviceGuard guard\(.*\n", ""),
        (r"extern __shared__ (?:__align__\(16\) )?(\w+) (\w+)\[\];",
         r"\1* const \2 = emulator::dynamic_shared<\1>();"),
        (r"__shared__ (?:alignas\(16\) )?([\w<>]+) ([^;]+);", variables),
        (r"(?s)(\w+(?:<[^<>;(){}]*>)?)<<<(.*?)>>>\(", r"emulator::launch(\1, \2)("),
    ):  # fmt: skip
        text = re.sub(pattern, by, text)
    return text


def build_emulated(
    folder: Path, *flags: str, only: str = "", change: Callable[[str], str] = str
) -> Path:
    """Compiles the kernels for the emulator, and returns the library.

    Args:
        only: the stem of one operation, instead of all of them.
        change: what is done to the text of the kernels and of what they share.
    """
    headers = [*CSRC.rglob("*.h"), *CSRC.glob("math/*.inl")]
    for file in (*headers, *CSRC.glob("cuda/*.cuh"), *CSRC.glob(f"cuda/{only}*.cu")):
        kernels = file.suffix in (".cu", ".cuh")
        to = folder / file.relative_to(CSRC)
        to = to.with_suffix(".cpp") if file.suffix == ".cu" else to
        to.parent.mkdir(parents=True, exist_ok=True)
        text = file.read_text()
        to.write_text(rewritten(change(text) if kernels else text))
    shutil.copy(EMULATOR / "ptx.h", folder / "cuda")

    def compile_one(file: Path) -> Path:
        # as nvcc does, multiply and add are fused where that is not forbidden
        flags_of = ["-std=c++20", "-O1", "-fPIC", "-w", "-mfma", "-ffp-contract=fast", *FLAGS]
        flags_of += ["-DVITKD_EMULATED=900", f"-I{folder}", f"-I{EMULATOR}", *INCLUDE, *flags]
        flags_of += ["-include", "emulator.h"]
        result = file.with_suffix(".o")
        subprocess.run(["g++", "-c", file, "-o", result, *flags_of], check=True)
        return result

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sorted((folder / "cuda").glob("*.cpp"))))
    library = folder / "emulated.so"
    libraries = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
    subprocess.run(["g++", "-shared", *objects, "-o", library, *libraries, *flags], check=True)
    return library


def captured(step: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A step as a CUDA graph, and its results, which each replay fills again."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """An error where the host waits for the device."""
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def on_another_stream(step: Callable[[], Any], late: list[Tensor], values: list[Tensor]) -> Any:
    """A step's results on a stream of its own, where its tensors get their values late."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for x, value in zip(late, values, strict=True):
            x.copy_(value)
        results = step()
    torch.cuda.current_stream().wait_stream(stream)
    return results


if __name__ == "__main__":
    import vitkd_fast.functional  # noqa: F401  registers the operations

    emulated = Path(os.environ["VITKD_EMULATED"])
    torch.ops.load_library(emulated)
    here = f"CPU: registered at {emulated.parent}"
    for file in emulated.parent.glob("cuda/*.cpp"):
        for name in re.findall(r'm\.impl\("(\w+)"', file.read_text()):
            if here not in torch._C._dispatch_dump(f"vitkd_fast::{name}"):
                sys.exit(f"{emulated} does not implement {name}")
    sys.exit(pytest.main(sys.argv[1:]))
