"""Triton without a GPU: kernels in the interpreter, and compiled for a GPU that is not there.

Run as a script, this file is pytest in an interpreter whose CPU operations are Triton's.
"""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def interpret(arguments: list[str]) -> int:
    """pytest with the launchers registered for CPU tensors."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    from vitkd_fast import _ops

    convert, patch = interpreter._convert_float, interpreter._patch_lang_tensor
    product = interpreter.InterpreterBuilder.create_dot

    def rounded(data: Any, source: Any, target: Any, mode: Any) -> Any:
        # the interpreter cuts bfloat16 off where a GPU rounds to nearest
        if (source, target) == (tl.float32, tl.bfloat16):
            wide = torch.from_numpy(np.ascontiguousarray(data))
            return wide.to(torch.bfloat16).view(torch.uint16).numpy()
        return convert(data, source, target, mode)

    def indexed(tensor: Any, scope: Any) -> None:
        # NumPy no longer makes an int of an array of one element, which Triton 3.6 asks for
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def widened(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        wide = convert(x.data, tl.bfloat16, tl.float32, None)
        return interpreter.TensorHandle(wide.view("float32"), tl.float32)

    def create_dot(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
        # the interpreter multiplies bfloat16 numbers by their bits, as if these were integers
        return product(builder, widened(a), widened(b), *rest)

    interpreter._convert_float, interpreter._patch_lang_tensor = rounded, indexed
    interpreter.InterpreterBuilder.create_dot = create_dot
    np.seterr(all="ignore")
    for op in filter(lambda op: op.has_cuda, _ops.OPERATIONS):
        kernels = importlib.import_module(f"vitkd_fast.kernels.{op.stem}")
        _ops._library.impl(op.name, getattr(kernels, op.name), "CPU")
    return int(pytest.main(arguments))


class Driver:
    """As much of a GPU as the compiler asks for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiled:
    """In a kernel's place: compiles what would be launched."""

    def __init__(self, kernel: Any, results: list[Any]) -> None:
        self.kernel, self.results = kernel, results

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **kwargs: self.results.append(
            self.kernel.warmup(*args, grid=grid, **kwargs)
        )


def compile_only(monkeypatch: pytest.MonkeyPatch, capability: int, stem: str) -> list[Any]:
    """The launchers of kernels/<stem>.py compile, and the results are collected in the list."""
    from triton.runtime import driver

    results: list[Any] = []
    monkeypatch.setattr(driver, "_active", Driver(capability))
    kernels = importlib.import_module(f"vitkd_fast.kernels.{stem}")
    for name in vars(kernels).copy():
        if name.endswith("_kernel"):
            monkeypatch.setattr(kernels, name, Compiled(getattr(kernels, name), results))
    return results


def resources(kernel: Any, folder: Path) -> dict[str, int]:
    """Registers, and bytes of stack, shared and local memory."""
    import triton

    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run(
        [tool, "-res-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    return {k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}


def assert_nothing_is_spilled(
    kernels: list[Any], folder: Path, stack: dict[str, int] | None = None
) -> None:
    """Nor is a product rounded together with the sum that it goes into.

    `stack`: bytes that the compiler of a Triton version may use all the same, {"3.6": 8}.
    """
    import triton

    assert kernels
    allowed = (stack or {}).get(triton.__version__.rpartition(".")[0], 0)
    for kernel in kernels:
        used = resources(kernel, folder)
        print(kernel.name, used)
        assert used["STACK"] <= allowed, f"{kernel.name}: {used}"
        assert used["LOCAL"] == 0, f"{kernel.name}: {used}"
        assert "fma.rn.f32" not in kernel.asm["ptx"], kernel.name


if __name__ == "__main__":
    sys.exit(interpret(sys.argv[1:]))
