"""Builds the two extensions; everything static is in pyproject.toml.

_C     the operations, on libtorch's stable ABI: one build serves every torch >= 2.11
_int8  the int8 engine, on pybind11: links no torch

VITKD_FAST_CUDA=auto|0|1: auto compiles csrc/cuda where torch has CUDA and a toolkit of the same
major version is found; 1 fails where that is not so. TORCH_CUDA_ARCH_LIST: the architectures.
"""

import os
import re
import shutil
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ENGINE = sorted(glob("csrc/int8/*.cpp"))  # of which the operations share what knows no graph
SHARED = [f for f in ENGINE if re.search(r"/(isa|kernels\w*|plain)\.cpp$", f)]
OPERATIONS = [*sorted(glob("csrc/cpu/*.cpp")), *SHARED, "csrc/ops.cpp"]
INCLUDE = [os.path.abspath("csrc")]
CXX = ["-std=c++20", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra"]
CXX += ["-Wno-maybe-uninitialized"]  # false alarms of gcc 12 and 13 in their AVX-512 headers
# torch drops its -gencode flags as soon as a flag of ours holds "arch"
NVCC = ["-std=c++20", "-O3", "-lineinfo", "-Werror=all-warnings", "-Xcompiler=-fvisibility=hidden"]
TORCH_2_11 = "-DTORCH_TARGET_VERSION=0x020b000000000000"


def cuda_homes():
    """Folders that may hold a CUDA toolkit, the most wanted first."""
    yield from (Path(os.environ[k]) for k in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(k))
    if nvcc := shutil.which("nvcc"):
        nvcc = Path(nvcc).resolve()
        # it may be a script that runs the real one: exec /usr/local/cuda-13.0/bin/nvcc "$@"
        text = nvcc.read_bytes()[:4096]
        real = text.startswith(b"#!") and re.search(rb"(/[^\s\"']+)/bin/nvcc\b", text)
        yield Path(real[1].decode()) if real else nvcc.parent.parent
    yield from map(Path, ["/usr/local/cuda", *sorted(glob("/usr/local/cuda-*"), reverse=True)])


def toolkit_version(home):
    """The version of the toolkit in home, such as 13.0; None without its compiler and headers."""
    header = home / "include" / "cuda_runtime_api.h"
    if not all(f.exists() for f in (header, home / "include/cuda_runtime.h", home / "bin/nvcc")):
        return None
    version = re.search(r"#define\s+CUDART_VERSION\s+(\d+)", header.read_text(errors="replace"))
    return version and f"{int(version[1]) // 1000}.{int(version[1]) % 1000 // 10}"


def choose_cuda(choice, torch_cuda, homes):
    """Returns (home, version, "") of the toolkit to build with, or (None, None, why not)."""
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"vitkd_fast: VITKD_FAST_CUDA={choice}: accepted are auto, 0 and 1")
    reason = "VITKD_FAST_CUDA=0" if choice == "0" else "this torch is built without CUDA"
    if choice != "0" and torch_cuda:
        major = torch_cuda.split(".")[0]
        found = {home: version for home in homes if (version := toolkit_version(home))}
        for home, version in found.items():
            if version.split(".")[0] == major:
                return home, version, ""
        others = ", ".join(f"{version} in {home}" for home, version in found.items())
        reason = f"no CUDA {major} toolkit (bin/nvcc, include/); found: {others or 'none'}"
    if choice == "1":
        raise SystemExit(f"vitkd_fast: VITKD_FAST_CUDA=1 cannot be met: {reason}")
    return None, None, reason


def configure():
    """Returns the extensions with every flag, and one line about them."""
    import pybind11
    import torch

    choice = os.environ.get("VITKD_FAST_CUDA", "auto")
    home, version, reason = choose_cuda(choice, torch.version.cuda, cuda_homes())
    if home:
        os.environ["CUDA_HOME"] = str(home)  # before cpp_extension looks for one, less well
        architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;8.6;8.9;9.0+PTX")
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    cuda = f"{version} ({architectures})" if home else ""
    cxx, nvcc = [*CXX, TORCH_2_11, f'-DVITKD_CUDA="{cuda}"'], [*NVCC, TORCH_2_11, "-DUSE_CUDA"]
    operations = (CUDAExtension if home else CppExtension)(
        "vitkd_fast._C",
        OPERATIONS + (sorted(glob("csrc/cuda/*.cu")) if home else []),
        include_dirs=list(INCLUDE),
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        py_limited_api=True,
    )
    include = [*INCLUDE, pybind11.get_include()]
    engine = Extension("vitkd_fast._int8", ENGINE, include, extra_compile_args=CXX, language="c++")
    what = f"with CUDA {cuda}" if home else f"for the CPU only ({reason})"
    return [operations, engine], f"vitkd_fast: _C {what}, _int8"


class Build(build_ext):
    """torch's BuildExtension, imported only to compile: metadata and sdist need no torch."""

    def run(self):
        os.environ["PATH"] += f":{sysconfig.get_path('scripts')}"  # where torch looks for ninja
        extensions, built = configure()
        from torch.utils.cpp_extension import BuildExtension

        for extension in extensions:
            self.distribution.ext_modules = [extension]
            command = BuildExtension(self.distribution)
            command.build_lib, command.inplace = self.build_lib, self.inplace
            # kept between builds, and one per extension: they share sources but no flags
            command.build_temp = f"build/{sysconfig.get_config_var('SOABI')}/{extension.name}"
            command.ensure_finalized()
            command.run()
        self.distribution.ext_modules = self.extensions
        print(built)


if __name__ == "__main__":
    operations = Extension("vitkd_fast._C", OPERATIONS, py_limited_api=True)
    engine = Extension("vitkd_fast._int8", ENGINE)
    setup(ext_modules=[operations, engine], cmdclass={"build_ext": Build})
