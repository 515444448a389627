"""Tests in processes of their own: other backends, other instruction sets, the interpreter."""

import multiprocessing
import os
import re
import runpy
import subprocess
import sys
from multiprocessing import forkserver
from pathlib import Path

import pytest

from vitkd_fast import _ops

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent

# of the tests that are repeated on a slow path (Triton's interpreter, the reference) or for another
# instruction set one in so many runs every day, always the same ones; `make test-all` runs all
_SAMPLE = os.environ.get("VITKD_SAMPLE_SLOW_PATHS", "4")

# other stems whose tests call the operations of one, too
CALLERS = {"attention_map": ["relation"], "rkd": ["feature", "nst"]}


def files_of(stem: str) -> list[str]:
    """Files with tests of an operation that are repeated, but for Triton's, which repeat them."""
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
    marks = re.compile("every_isa|emulated|interpreted|sanitized")
    return sorted(
        str(file)
        for file in found
        if not file.stem.endswith("_triton") and marks.search(file.read_text())
    )


def _environment(changes: dict[str, str]) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("VITKD_FAST_", "TRITON_"))}
    return kept | changes


def of_tests() -> dict[str, str]:
    """The environment of a test file that runs as a script: it finds `support`."""
    paths = filter(None, (str(TESTS), os.environ.get("PYTHONPATH")))
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def _script(file: str, arguments: list[str]) -> None:
    sys.argv = [file, *arguments]
    runpy.run_path(file, run_name="__main__")


def run_ranks(file: str, *arguments: object, ranks: int = 2, seconds: float = 120) -> None:
    """Runs a test file as a script, at once for each rank, its first argument.

    The processes are forked from one that has done the slow imports, and computed nothing.
    """
    forkserver.set_forkserver_preload(["vitkd_fast.distill.loop"])
    context = multiprocessing.get_context("forkserver")
    given = [str(x) for x in arguments]
    running = [
        context.Process(target=_script, args=(file, [str(rank), *given])) for rank in range(ranks)
    ]
    for process in running:
        process.start()
    for process in running:
        process.join(seconds)
    codes = [process.exitcode for process in running]
    for process in running:
        process.kill()
    assert codes == [0] * ranks


def python(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code outside the checkout."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd, env=_environment(environment), capture_output=True, text=True, check=False,
    )  # fmt: skip


def run_tests(cwd: Path, start: list[str], *arguments: str, **environment: str) -> None:
    """Runs pytest in a process of its own, outside the checkout.

    Without plugins, whose imports take 1.7 s of CPU time.
    """
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
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
    run_tests(cwd, start, *arguments, **sampled(**interpreted))


def sampled(**environment: str) -> dict[str, str]:
    """The environment, and which part of the tests runs in it."""
    return environment | {"VITKD_SAMPLE": _SAMPLE}


def run_every_isa(cwd: Path, stem: str, marked: str, **environment: str) -> None:
    """What is marked every_isa, where another environment chooses the kernels."""
    marked = f"every_isa and {marked}"
    run_tests(cwd, ["-m", "pytest"], *files_of(stem), "-m", marked, **sampled(**environment))


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
