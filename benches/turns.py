"""Contenders with a process each, which is stopped while another has its turn.

In one process the threads of one engine spin on into the turn of the next, and what limits an
instruction set or sets OpenMP up is read once, for all. Here a contender keeps its threads, and
spins as it likes while it is timed: SIGSTOP takes all of them off the cores. As a script:
`python benches/turns.py ENGINE FILE THREADS`, the other end of the pipe.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from int8_peers import PEERS, Pixels

Array = np.ndarray
EXPORT = "export "  # before a runtime's name: a file of `vitkd export` in it
# by what every contender is held to; ONNX Runtime and LiteRT know no such limit
LIMITS = {
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "VITKD_FAST_ISA": "avx2"},
    "avxvnni": {"ONEDNN_MAX_CPU_ISA": "AVX2_VNNI", "VITKD_FAST_ISA": "avxvnni"},
    "avx512vnni": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI", "VITKD_FAST_ISA": "avx512vnni"},
}


class Contender:
    """An open engine: `contender()` are its logits of the images, uint8 [N, H, W, 3].

    Args:
        name: a key of PEERS, "vitkd_fast", `EXPORT` and a runtime of `vitkd compare`, or "numpy",
            which has no engine.
        file: the engine's.
        images: of every call.
        threads: of a call.
        limit: a key of LIMITS, or nothing.
    """

    def __init__(self, name: str, file: Path, images: Array, threads: int, limit: str = "") -> None:
        command = [sys.executable, __file__, name, str(file), str(threads)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)} | LIMITS.get(limit, {})
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        self._ask(images)
        self._process.send_signal(signal.SIGSTOP)

    def _ask(self, request: Any) -> Any:
        process = self._process
        process.send_signal(signal.SIGCONT)
        assert process.stdin and process.stdout
        pickle.dump(request, process.stdin)
        process.stdin.flush()
        try:
            return pickle.load(process.stdout)
        except EOFError:
            raise RuntimeError(f"{process.args} ended; its error is above") from None

    def _turn(self, what: str, calls: int = 0) -> Any:
        answer = self._ask((what, calls))
        self._process.send_signal(signal.SIGSTOP)
        return answer

    def __call__(self) -> Array:
        return self._turn("logits")

    def seconds(self, calls: int, clock: str) -> float:
        """Of one call, by the process's "cpu" clock or by the "wall" clock."""
        return self._turn(clock, calls)

    def layers(self) -> Counter[str]:
        return self._turn("layers")

    def resident_mb(self) -> float:
        """What its process holds."""
        return self._turn("resident_mb")

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> Contender:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _resident_mb() -> float:
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1e3


def main(name: str, file: str, threads: int) -> None:
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what an engine prints is no answer

    def answer(value: Any) -> None:
        pickle.dump(value, answers)
        answers.flush()

    images, layers = pickle.load(requests), Counter
    if name == "vitkd_fast":
        from vitkd_fast import int8

        session = int8.load(file, threads=threads)
        out = np.empty((len(images), len(session.classes)), np.float32)

        def call() -> Any:
            return session(images, out)

    elif name == "numpy":
        call = int
    elif name.startswith(EXPORT):
        from vitkd_fast.export.compare_runtimes import RUNTIMES

        model = RUNTIMES[name.removeprefix(EXPORT)].open(Path(file), threads)

        def call() -> Any:
            return model.run(images)

    else:
        peer = PEERS[name].open(Path(file), Pixels(), len(images), threads)
        prepared, layers = peer.prepare(images), peer.layers

        def call() -> Any:
            return peer(prepared)

    call()
    assert name.startswith(("torchao", f"{EXPORT}executorch")) or "torch" not in sys.modules
    answer("ready")
    clocks = {"cpu": time.process_time, "wall": time.perf_counter}
    others = {"logits": call, "layers": layers, "resident_mb": _resident_mb}
    while True:
        try:
            what, calls = pickle.load(requests)
        except EOFError:
            return
        if what in others:
            answer(others[what]())
            continue
        call()  # caches hold another's data
        start = clocks[what]()
        for _ in range(calls):
            call()
        answer((clocks[what]() - start) / calls)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
