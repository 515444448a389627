"""An ARM machine where there is none: the package on aarch64, in a Python that QEMU emulates.

build/arm holds all of it. Debian's arm64 packages are unpacked there, not installed, and so are the
wheels of what the package needs, in the versions that are installed here. The emulated Python
builds the package's wheel as it would on ARM, but for the compiler: QEMU runs a program of this
machine natively, so a cross compiler serves it at full speed.

    python tests/support/arm_tools.py     prints the wheel's path, and makes what is missing
"""

from __future__ import annotations

import fcntl
import getpass
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "arm"
PROGRAMS = ("qemu-aarch64", "aarch64-linux-gnu-g++", "apt-get", "dpkg-deb")
DEBIAN = ("python3-minimal", "libpython3-stdlib", "libpython3-dev", "libstdc++6")
WHEELS = ("numpy", "pillow", "typer")
BUILD_WHEELS = ("setuptools>=77", "pybind11>=3")
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64")
# of what the wheel is built from
SOURCES = ("csrc", "vitkd_fast", "kernels", "setup.py", "pyproject.toml", "README.md", "LICENSE")
BUILD = """
import os, sys
from setuptools import build_meta
os.chdir(sys.argv[1])
build_meta.build_wheel(sys.argv[2])
"""

# QEMU's name of a CPU -> what the engine finds there. SVE and SME are off, as on what most people
# have: emulated, SME changes the bytes of other libraries.
CPUS = {
    "cortex-a72": ("neon", "scalar"),
    "cortex-a76": ("neondot", "neon", "scalar"),
    "max,sve=off,sme=off": ("neoni8mm", "neondot", "neon", "scalar"),
}


class Unavailable(Exception):
    """Why there is no such machine here."""


class Machine(NamedTuple):
    """qemu-aarch64 and a folder with the files of an arm64 system."""

    folder: Path

    @property
    def root(self) -> Path:
        return self.folder / "root"

    @property
    def site(self) -> Path:
        """Where the package and what it needs are installed."""
        return self.folder / "site"

    @property
    def interpreter(self) -> Path:
        return next((self.root / "usr/bin").glob("python3.*"))

    @property
    def wheel(self) -> Path:
        return next((self.folder / "wheel").glob("*.whl"))

    @property
    def library(self) -> Path:
        return next((self.site / "vitkd_fast").glob("_int8.*.so"))

    @property
    def objects(self) -> list[Path]:
        """Of the compiled engine."""
        return sorted((self.folder / "src/build").glob("cpython-*/csrc/**/*.o"))

    def run(
        self, cpu: str, program: Path, *arguments: object, qemu: tuple[str, ...] = (), **env: str
    ) -> subprocess.CompletedProcess[str]:
        """A program for arm64; `qemu`: options of the emulator."""
        command = ["qemu-aarch64", "-cpu", cpu, "-L", str(self.root), *qemu, str(program)]
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VITKD_FAST_"))}
        return subprocess.run(
            [*command, *map(str, arguments)],
            cwd=self.folder, env=kept | {"PYTHONPATH": str(self.site)} | env,
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    def python(self, cpu: str, *arguments: object, **env: str) -> str:
        """What an emulated Python prints; an assertion fails where it fails."""
        result = self.run(cpu, self.interpreter, *arguments, **env)
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-5000:]
        return result.stdout


def machine() -> Machine:
    """Makes what is missing in build/arm, some 80 MB from package registries.

    Raises:
        Unavailable: a tool is not installed, or packages cannot be fetched.
    """
    if absent := [name for name in PROGRAMS if not shutil.which(name)]:
        raise Unavailable(f"no {', '.join(absent)} (Debian: `make test-arm` installs them)")
    FOLDER.mkdir(parents=True, exist_ok=True)
    made = Machine(FOLDER)
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _once("root", " ".join(DEBIAN), lambda: _unpack_debian(made))
        wheels = [*(f"{name}=={metadata.version(name)}" for name in WHEELS), *BUILD_WHEELS]
        _once("site", " ".join(wheels), lambda: unpack_wheels(made, wheels, made.site))
        _once("wheel", f"{_digest()} {' '.join(wheels)}", lambda: _build(made))
    return made


def _once(name: str, key: str, make) -> None:
    """Makes build/arm/NAME anew unless it was made from the same."""
    stamp = FOLDER / f"{name}.stamp"
    if not stamp.exists() or stamp.read_text() != key:
        shutil.rmtree(FOLDER / name, ignore_errors=True)
        (FOLDER / name).mkdir()
        make()
        stamp.write_text(key)


def _fetch(*command: object) -> None:
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if line.startswith("E")]
        raise Unavailable(f"arm64 packages cannot be fetched: {' '.join(errors[-1:])}")


def _unpack_debian(made: Machine) -> None:
    apt = made.folder / "apt"
    for folder in ("lists/partial", "cache/archives/partial"):
        (apt / folder).mkdir(parents=True, exist_ok=True)
    (apt / "status").touch()
    settings = {
        "Dir::State::lists": apt / "lists",
        "Dir::State::status": apt / "status",
        "Dir::Cache": apt / "cache",
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Install-Recommends": "0",
        "APT::Sandbox::User": getpass.getuser(),
    }
    get = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in settings.items())]
    _fetch(*get, "update")
    _fetch(*get, "--yes", "--download-only", "install", *DEBIAN)
    for package in (apt / "cache/archives").glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", package, made.root], check=True)


def unpack_wheels(made: Machine, requirements: list[str], folder: Path) -> None:
    """Installs packages for arm64, and what they need, in a folder.

    Raises:
        Unavailable: they cannot be fetched.
    """
    options = [f"--platform={name}" for name in PLATFORMS]
    options += ["--only-binary=:all:", f"--python-version={made.interpreter.name[6:]}"]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _fetch(*pip, *options, "--target", folder, *requirements)


def _sources() -> Iterator[Path]:
    for name in SOURCES:
        path = ROOT / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and file.suffix not in (".so", ".pyc"):
                yield file


def _digest() -> str:
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for path in _sources():
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()


def _build(made: Machine) -> None:
    source, include = made.folder / "src", made.root / "usr/include"
    shutil.rmtree(source, ignore_errors=True)
    for path in _sources():
        copy = source / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)
    compiler = {
        "CC": "aarch64-linux-gnu-gcc",
        "CXX": "aarch64-linux-gnu-g++",
        "CPPFLAGS": f"-I{include / made.interpreter.name} -I{include}",
        "MAX_JOBS": str(os.cpu_count()),
        "VITKD_FAST_CUDA": "0",
    }
    made.python(list(CPUS)[-1], "-c", BUILD, source, made.folder / "wheel", **compiler)
    for old in made.site.glob("vitkd_fast*"):
        shutil.rmtree(old)
    shutil.unpack_archive(made.wheel, made.site, "zip")


if __name__ == "__main__":
    try:
        print(machine().wheel)
    except Unavailable as reason:
        sys.exit(f"unavailable: {reason}")
