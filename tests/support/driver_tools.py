"""CUDA's driver without a GPU: libcuda.so.1 of cuda_emulator/driver.cpp, with our kernels.

The engine finds it where LD_LIBRARY_PATH says, as it finds the real one. Device arrays for tests
are made through whichever there is.
"""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.cuda_tools import CSRC, EMULATOR, INCLUDE, rewritten

EMULATED = "VITKD_EMULATED_DRIVER" in os.environ
# for tests that a GPU and the emulated driver can run
needs_driver: Callable[[Any], Any] = (lambda x: x) if EMULATED else pytest.mark.gpu


def build_driver(folder: Path, change: Callable[[str], str] = str) -> Path:
    """Compiles the emulated driver; returns the folder that LD_LIBRARY_PATH has to name.

    Args:
        change: what is done to the text of the kernels.
    """
    kernels = [CSRC / "int8/cuda/kernels.cu", *CSRC.glob("*/*.cuh"), *CSRC.glob("int8/cuda/*.cuh")]
    for file in (*CSRC.glob("math/*.h"), *CSRC.glob("int8/cuda/*.h"), *kernels):
        to = folder / file.relative_to(CSRC)
        to = to.with_suffix(".cpp") if file.suffix == ".cu" else to
        to.parent.mkdir(parents=True, exist_ok=True)
        text = file.read_text()
        to.write_text(rewritten(change(text) if file in kernels else text))
    shutil.copy(EMULATOR / "ptx.h", folder / "cuda")
    # as nvcc does, multiply and add are fused where that is not forbidden
    options = ["-std=c++20", "-O1", "-fPIC", "-w", "-mfma", "-ffp-contract=fast"]
    options += ["-DVITKD_EMULATED=900", f"-I{folder}", f"-I{EMULATOR}", *INCLUDE]
    library = folder / "libcuda.so.1"
    sources = [folder / "int8/cuda/kernels.cpp", EMULATOR / "driver.cpp"]
    command = ["g++", "-shared", *options, "-include", "emulator.h", *sources, "-o", library]
    subprocess.run([*command, "-Wl,-soname,libcuda.so.1"], check=True)
    return folder


class DeviceArray:
    """A NumPy array's copy in the first GPU's memory, which __cuda_array_interface__ describes."""

    def __init__(self, values: np.ndarray) -> None:
        self._driver = ctypes.CDLL("libcuda.so.1")
        context = ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
        self._call("cuCtxPushCurrent_v2", context)
        self._size, self._like = values.nbytes, values
        pointer = ctypes.c_ulonglong()
        self._call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(max(self._size, 1)))
        self.pointer = pointer.value
        self._copy("cuMemcpyHtoD_v2", self.pointer, values.ctypes.data)
        self.describe()

    def describe(self) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": self._like.shape,
            "typestr": self._like.dtype.str,
            "data": (self.pointer, False),
            "strides": None,
            "stream": 1,  # the legacy default stream
            "version": 3,
        }

    def numpy(self) -> np.ndarray:
        values = np.empty_like(self._like)
        self._copy("cuMemcpyDtoH_v2", values.ctypes.data, self.pointer)
        return values

    def _copy(self, name: str, to: int, start: int) -> None:
        addresses = ctypes.c_ulonglong(to), ctypes.c_ulonglong(start)
        self._call(name, *addresses, ctypes.c_size_t(self._size))

    def _call(self, name: str, *arguments: Any) -> None:
        if error := getattr(self._driver, name)(*arguments):
            raise RuntimeError(f"{name}: error {error}")


class Capsule(DeviceArray):
    """The same, but that DLPack describes it; its stream has no work left."""

    def __init__(self, values: np.ndarray, strides: tuple[int, ...] | None = None) -> None:
        self._strides = strides  # in elements
        super().__init__(values)

    def describe(self) -> None:
        """Nothing else may do so."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, *, stream: int) -> Any:
        assert stream > 2, "the session's own"
        like, int64s = self._like, ctypes.c_int64 * self._like.ndim
        code = {"u": 1, "f": 2}[like.dtype.kind]
        self._tensor = _Tensor(
            self.pointer, 2, 0, like.ndim, code, 8 * like.itemsize, 1, int64s(*like.shape),
            int64s(*self._strides) if self._strides else None, 0,
        )  # fmt: skip
        new = ctypes.pythonapi.PyCapsule_New
        new.restype = ctypes.py_object
        new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return new(ctypes.addressof(self._tensor), b"dltensor", None)


class _Tensor(ctypes.Structure):
    """DLTensor of dlpack.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device", ctypes.c_int32),
        ("dimensions", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("offset", ctypes.c_uint64),
    )
