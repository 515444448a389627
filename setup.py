"""Builds the extensions; everything static is in pyproject.toml.

_int8  the int8 engine, on pybind11: links no torch
_C     the operations, on libtorch's stable ABI, for every torch >= 2.11; where the build sees torch

VITKD_FAST_CUDA=auto|0|1: auto compiles csrc/cuda where torch has CUDA and a toolkit of the same
major version is found, or any without torch, and with it the kernels of the engine in
csrc/int8/cuda; 1 fails where that is not so. TORCH_CUDA_ARCH_LIST: the architectures.
"""

import os
import re
import shutil
import sysconfig
from glob import glob
from importlib import import_module, util
from pathlib import Path
from runpy import run_path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SHARED = sorted(glob("csrc/simd/*.cpp") + glob("csrc/int8/kernels/*.cpp"))  # in both extensions
ENGINE = sorted({*glob("csrc/int8/**/*.cpp", recursive=True)} - {"csrc/int8/capi.cpp", *SHARED})
OPERATIONS = [*sorted(glob("csrc/cpu/*.cpp")), *SHARED, "csrc/binding/module.cpp"]
FATBIN = run_path(os.path.join(os.path.dirname(__file__), "csrc/int8/cuda/fatbin.py"))
INCLUDE = os.path.abspath("csrc")
CXX = "-std=c++20 -O3 -g0 -ffp-contract=off -fvisibility=hidden -Wall -Wextra".split()
CXX += ["-Wno-maybe-uninitialized"]  # false alarms of gcc 12 and 13 in their AVX-512 headers
# torch drops its -gencode flags as soon as a flag of ours holds "arch"
NVCC = "-std=c++20 -O3 -lineinfo -Xcompiler=-fvisibility=hidden -DUSE_CUDA".split()
NVCC += ["-Werror=all-warnings"] if os.environ.get("CI") == "true" else []
TORCH_2_11 = "-DTORCH_TARGET_VERSION=0x020b000000000000"
TEMP = f"build/{sysconfig.get_config_var('SOABI')}"  # kept between builds


def cuda_homes():
    """Folders that may hold a CUDA toolkit, the most wanted first."""
    yield from (Path(os.environ[k]) for k in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(k))
    if nvcc := shutil.which("nvcc"):
        nvcc = Path(nvcc).resolve()
        # it may be a script that runs the real one: exec /usr/local/cuda-13.0/bin/nvcc "$@"
        real = re.match(rb"(?s)#!.*?(/[^\s\"']+)/bin/nvcc\b", nvcc.read_bytes()[:4096])
        yield Path(real[1].decode()) if real else nvcc.parent.parent
    yield from map(Path, ["/usr/local/cuda", *sorted(glob("/usr/local/cuda-*"), reverse=True)])


def choose_cuda(choice, torch_cuda, homes):
    """Returns (home, version, "") of the toolkit to build with, or (None, "", why not)."""
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"vitkd_fast: VITKD_FAST_CUDA={choice}: accepted are auto, 0 and 1")
    reason = "VITKD_FAST_CUDA=0" if choice == "0" else "no torch that is built with CUDA"
    if choice != "0" and torch_cuda:
        major = torch_cuda.split(".")[0]
        found = {home: version for home in homes if (version := FATBIN["toolkit_version"](home))}
        if same := [x for x in found.items() if x[1].split(".")[0] == major or major == "any"]:
            return *same[0], ""
        others = ", ".join(f"{version} in {home}" for home, version in found.items())
        reason = f"no CUDA {major} toolkit (bin/nvcc, include/); found: {others or 'none'}"
    if choice == "1":
        raise SystemExit(f"vitkd_fast: VITKD_FAST_CUDA=1 cannot be met: {reason}")
    return None, "", reason


def architectures(version, editable, gpus):
    """A wheel is for all, an editable install for the GPUs seen here; for sm_90 where none is."""
    if editable:
        return ";".join(f"{a}.{b}" for a, b in sorted(set(gpus)) if a >= 8) or "9.0+PTX"
    blackwell = tuple(map(int, version.split("."))) >= (12, 8)
    return "8.0;8.6;8.9;9.0+PTX" + ";10.0;12.0" * blackwell


def configure(editable):
    """Returns the extensions with every flag, the command that builds them, and a line on them."""
    from pybind11 import get_include, setup_helpers

    torch = import_module("torch") if util.find_spec("torch") else None
    choice = os.environ.get("VITKD_FAST_CUDA", "auto")
    home, version, why = choose_cuda(choice, torch.version.cuda if torch else "any", cuda_homes())
    engine = Extension("vitkd_fast._int8", ENGINE, [INCLUDE, get_include()], extra_compile_args=CXX)
    if home:
        os.environ["CUDA_HOME"] = str(home)  # before cpp_extension looks for one, less well
        count = torch.cuda.device_count() if torch else 0
        gpus = [torch.cuda.get_device_capability(i) for i in range(count)]
        archs = architectures(version, editable, gpus)
        archs = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", archs)
        engine.sources += FATBIN["compiled"](home, version, archs, TEMP)
        version += f" ({archs})"
    if not torch:
        setup_helpers.ParallelCompile("MAX_JOBS").install()
        engine.sources += SHARED
        return [engine], build_ext, "_int8 alone, without the losses: no torch to build them with"
    cpp_extension = import_module("torch.utils.cpp_extension")
    sources = OPERATIONS + (sorted(glob("csrc/cuda/*.cu")) if home else [])
    flags = {"cxx": [*CXX, TORCH_2_11, f'-DVITKD_CUDA="{version}"'], "nvcc": [*NVCC, TORCH_2_11]}
    options = {"include_dirs": [INCLUDE], "extra_compile_args": flags, "py_limited_api": True}
    create = cpp_extension.CUDAExtension if home else cpp_extension.CppExtension
    operations = create("vitkd_fast._C", sources, **options)
    # what both hold includes nothing of torch's; it is compiled once, with _C
    engine.extra_objects = [f"{TEMP}/{f[:-4]}.o" for f in SHARED]
    what = f"with CUDA {version}" if home else f"for the CPU only ({why})"
    return [operations, engine], cpp_extension.BuildExtension, f"_C {what}, _int8"


class Build(build_ext):
    def run(self):
        os.environ["PATH"] += f":{sysconfig.get_path('scripts')}"  # where torch looks for ninja
        self.distribution.ext_modules, build, line = configure(self.inplace)
        command = build(self.distribution, build_temp=TEMP, inplace=self.inplace)
        command.ensure_finalized()
        command.run()
        print("vitkd_fast:", line)


if __name__ == "__main__":
    setup(ext_modules=[Extension("vitkd_fast._int8", ENGINE)], cmdclass={"build_ext": Build})
