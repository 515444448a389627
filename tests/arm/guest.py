"""Run by the emulated Python: the engine gives the bytes that another machine wrote.

    python guest.py FOLDER

FOLDER holds, for each graph, an int8 file, images, their logits, and of the first image every
node's output. Prints how many comparisons each instruction set passed.
"""

import ctypes
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from vitkd_fast import _int8, int8
from vitkd_fast.int8 import file

OPTIONS = ({}, {"fuse": False, "poison": True}, {"threads": 2, "poison": True})
# of FPCR: rounding up, down and to zero; flush to zero
MODES = (1 << 22, 2 << 22, 3 << 22, 1 << 24)


class FloatEnvironment(ctypes.Structure):
    """fenv_t of glibc on aarch64."""

    _fields_ = [("fpcr", ctypes.c_uint), ("fpsr", ctypes.c_uint)]


LIBM = ctypes.CDLL("libm.so.6")


def float_mode(new: int | None = None) -> int:
    """Of the calling thread, as it was before."""
    now = FloatEnvironment()
    LIBM.fegetenv(ctypes.byref(now))
    if new is not None:
        LIBM.fesetenv(ctypes.byref(FloatEnvironment(new, now.fpsr)))
    return now.fpcr


def compare(path: Path) -> Counter[str]:
    want, data = np.load(path.with_suffix(".npz")), path.read_bytes()
    graph, images, logits = file.read(data), want["images"], want["logits"]
    passed: Counter[str] = Counter()

    def check(same: bool, isa: str, what: object) -> None:
        assert same, f"{path.stem}, {isa}, {what}: other bytes than on x86"
        passed[isa] += 1

    def call(isa: str, mode: int | None = None, **options: object) -> None:
        got = np.full_like(logits, np.nan)
        before = float_mode(mode)
        session = _int8.Session(graph, image_size=graph.image_size, isa=isa, **options)
        session.run(images, got)
        after = float_mode(before)
        check(got.tobytes() == logits.tobytes(), isa, options | {"mode": mode})
        if mode is not None:
            assert after == mode, f"{isa}: a call left FPCR {after:#x}, it was {mode:#x}"

    for isa in _int8.isa():
        for options in OPTIONS:
            call(isa, **options)
        for mode in MODES if want["modes"] else ():
            call(isa, mode)
            call(isa, mode, threads=2, poison=True)
        session = _int8.Session(graph, image_size=graph.image_size, isa=isa, fuse=False)
        for index, output in enumerate(session.activations(images[:1])):
            if output is not None:
                check(output.tobytes() == want[f"node{index}"].tobytes(), isa, f"node {index}")
    check(int8.load(data)(images).tobytes() == logits.tobytes(), int8.isa()[0], "int8.load")
    return passed


if __name__ == "__main__":
    files = sorted(Path(sys.argv[1]).glob("*.safetensors"))
    for isa, passed in sum(map(compare, files), Counter()).items():
        print(isa, passed)
