"""Tests in processes of their own: other backends, other instruction sets, the interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vitkd_fast import _ops

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent

# of the tests that are repeated on a slow path (Triton's interpreter, the reference, no vectors),
# one in so many runs every day, always the same ones; `make test-all` runs all
_SAMPLE = os.environ.get("VITKD_SAMPLE_SLOW_PATHS", "4")

# other stems whose tests call the operations of one, too
CALLERS = {"attention_map": ["relation"], "rkd": ["feature", "nst"]}


def files_of(stem: str) -> list[str]:
    """The files with tests of an operation, but for Triton's, which run these in processes."""
    found = [
        file
        for name in (stem, *CALLERS.get(stem, []))
        for pattern in (f"test_{name}.py", f"test_{name}_*.py")
        for file in (TESTS / "ops").glob(pattern)
        # kd_topk is a stem of its own
        if not any(
            other.startswith(f"{name}_") and file.stem.startswith(f"test_{other}")
            for other in {op.stem for op in _ops.OPERATIONS}
        )
    ]
    return sorted(str(file) for file in found if not file.stem.endswith("_triton"))


def _environment(changes: dict[str, str]) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("VITKD_FAST_", "TRITON_"))}
    return kept | changes


def of_tests() -> dict[str, str]:
    """The environment of a test file that runs as a script: it finds `support`."""
    paths = filter(None, (str(TESTS), os.environ.get("PYTHONPATH")))
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def python(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code outside the checkout."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd, env=_environment(environment), capture_output=True, text=True, check=False,
    )  # fmt: skip


def run_tests(cwd: Path, start: list[str], *arguments: str, **environment: str) -> None:
    """Runs pytest in a process of its own, outside the checkout."""
    fixed = ["-q", "--tb=short", "-p", "no:cacheprovider"]
    fixed += ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    result = subprocess.run(
        [sys.executable, *start, *fixed, *arguments],
        cwd=cwd, env=_environment(environment), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
    assert " failed" not in result.stdout


def run_in_interpreter(cwd: Path, *arguments: str) -> None:
    """Where Triton's kernels, interpreted, are the CPU's operations."""
    start = [str(TESTS / "support/triton_tools.py")]
    interpreted = {"TRITON_INTERPRET": "1", "VITKD_FAST_BACKEND": "reference"}
    run_tests(cwd, start, *arguments, VITKD_SAMPLE=_SAMPLE, **interpreted)


def run_every_isa(cwd: Path, stem: str, marked: str, **environment: str) -> None:
    """What is marked every_isa, where another environment chooses the kernels."""
    if "reference" in environment.values() or "scalar" in environment.values():
        environment["VITKD_SAMPLE"] = _SAMPLE
    run_tests(
        cwd, ["-m", "pytest"], *files_of(stem), "-m", f"every_isa and {marked}", **environment
    )


def run_every_isa_on_a_gpu(cwd: Path, stem: str, backend: str) -> None:
    """Skips where tests in this process run on that backend, or this build does not have it."""
    name = {"reference": "reference", "triton": "Triton", "cuda": "CUDA C++"}[backend]
    if name == _ops.backends()["kd_fwd"]["CUDA"]:  # as all that have kernels
        pytest.skip(f"the other files ran on {name}")
    code = """if True:
        from vitkd_fast import _ops
        print({_ops.backends()[op.name]["CUDA"] for op in _ops.OPERATIONS if op.has_cuda})
    """
    served = python(code, cwd, VITKD_FAST_BACKEND=backend)
    if backend == "cuda" and "has no CUDA C++ kernel in this build" in served.stderr:
        pytest.skip("the extension was built without CUDA")
    if backend == "triton":
        pytest.importorskip("triton")
    assert served.stdout == f"{{{name!r}}}\n", served.stderr
    run_every_isa(cwd, stem, "gpu", VITKD_FAST_BACKEND=backend)
