"""A process with one model in it, so that memory and CPU time are that model's alone.

As a script, `python -m vitkd_fast.export.compare_worker RUNTIME FILE THREADS`, it is the other end
of a Worker's pipes: pickled requests in, pickled answers out.
"""

from __future__ import annotations

import os
import pickle
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..int8.graph import Array

ENGINE = "vitkd_fast"


class WorkerError(RuntimeError):
    """A model that cannot be opened or run; the message says by whom and why."""


class Turn(NamedTuple):
    """Of an image."""

    logits: Array  # float32 [classes]
    wall: list[float]  # seconds of each call
    cpu: list[float]  # of all threads


class Worker:
    """An open model; close it, or use it as a context.

    Args:
        name: `ENGINE`, or a key of `RUNTIMES`.
        file: the model.
        threads: of a call.

    Raises:
        WorkerError: the file cannot be opened.
    """

    def __init__(self, name: str, file: Path, threads: int) -> None:
        self.name, self.file = name, file
        # what a runtime prints matters where it fails
        self._chatter = tempfile.TemporaryFile()
        command = [sys.executable, "-m", __name__, name, str(file), str(threads)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._chatter,
            env=environment,
        )  # fmt: skip
        try:
            self.about: dict[str, Any] = self._answer()
        except WorkerError:
            self.close()
            raise

    def _answer(self) -> Any:
        assert self._process.stdout
        try:
            answer = pickle.load(self._process.stdout)
        except (EOFError, pickle.UnpicklingError):
            self._process.wait()
            self._chatter.seek(0)
            said = self._chatter.read().decode(errors="replace").split("\n")
            why = next((line for line in reversed(said) if line.strip()), "it said nothing")
            raise WorkerError(f"{self.file}: {self.name} ended: {why.strip()}") from None
        if isinstance(answer, Exception):
            raise WorkerError(f"{self.file}: {self.name}: {answer}")
        return answer

    def _ask(self, *request: Any) -> Any:
        assert self._process.stdin
        try:
            pickle.dump(request, self._process.stdin)
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # what it said is read next
        return self._answer()

    def turn(self, image: Array, calls: int) -> Turn:
        """Logits of an image, uint8 [H, W, 3], and the time of some calls after the first one."""
        return Turn(*self._ask("turn", image, calls))

    def peak_bytes(self) -> int:
        """The most that its process has held."""
        return self._ask("peak")

    def operators(self, image: Array) -> Any:
        """As `Model.operators`."""
        return self._ask("operators", image)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._chatter.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _peak_bytes() -> int:
    try:  # the kernel's ru_maxrss counts what the parent held before exec
        status = Path("/proc/self/status").read_text()
        (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _open(name: str, file: Path, threads: int) -> tuple[Any, dict[str, Any]]:
    """A Model, and what is known of it."""
    from .compare_runtimes import RUNTIMES, Model

    before = _peak_bytes()
    if name != ENGINE:
        model = RUNTIMES[name].open(file, threads)
        version = RUNTIMES[name].version
    else:
        from .. import __version__, int8

        session = int8.load(file, threads=threads)
        size = session.image_size
        version = f"{__version__}, {session.isa}"
        model = Model(
            session,
            [("uint8", ["N", size, size, 3])],
            [("float32", ["N", len(session.classes)])],
            {},
            lambda image: None,
        )
    about = {"version": version, "before_bytes": before}
    return model, about | {
        "inputs": model.inputs, "outputs": model.outputs, "metadata": model.metadata
    }  # fmt: skip


def _turn(run: Any, image: Array, calls: int) -> tuple[Array, list[float], list[float]]:
    batch = image[None]
    logits = np.array(run(batch)[0], np.float32)  # caches hold another's data before
    walls, cpus = [], []
    for _ in range(calls):
        wall, cpu = time.perf_counter(), time.process_time()
        run(batch)
        cpus.append(time.process_time() - cpu)
        walls.append(time.perf_counter() - wall)
    return logits, walls, cpus


def main(name: str, file: str, threads: str) -> None:
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a runtime prints is no answer

    def answer(value: Any) -> None:
        pickle.dump(value, answers)
        answers.flush()

    try:
        model, about = _open(name, Path(file), int(threads))
        answer(about)
        does: dict[str, Any] = {
            "turn": lambda image, calls: _turn(model.run, image, calls),
            "peak": _peak_bytes,
            "operators": lambda image: model.operators(image[None]),
        }
        while True:
            try:
                what, *arguments = pickle.load(requests)
            except EOFError:
                return
            answer(does[what](*arguments))
    except Exception as error:
        # a runtime's own exceptions need not be known there
        answer(RuntimeError(" ".join(str(error).split()) or type(error).__name__))


if __name__ == "__main__":
    main(*sys.argv[1:])
