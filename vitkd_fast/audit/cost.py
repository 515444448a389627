"""What an image costs on this machine's CPU: time, memory and energy.

Each model is measured by a process of its own, `python -m vitkd_fast.audit.cost MODEL THREADS`, so
that the peak of memory is that of one model. Energy is the CPU packages', by the counters of RAPL
under /sys/class/powercap, while nothing else is asked of this process: all that the machine does
meanwhile is in it, idling included. Where the counters cannot be read it is None, with the reason.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .._opened import open_model
from .._timing import measure

_POWERCAP = Path("/sys/class/powercap")
_SECONDS = 2.0  # that energy is measured for


class Energy(NamedTuple):
    """Of a call."""

    joules: float | None
    why: str = ""  # there is no number


class _Zone(NamedTuple):
    """A package's counter, in microjoules, which starts again at 0 above its range."""

    file: Path
    range: int

    def read(self) -> int:
        return int(self.file.read_text())


def _zones(root: Path) -> list[_Zone]:
    """Of whole packages: of their parts, the names hold a second colon.

    Raises:
        OSError: there is none, or it cannot be read.
    """
    folders = sorted(x for x in root.glob("intel-rapl:*") if x.name.count(":") == 1)
    packages = [x for x in folders if (x / "name").read_text().startswith("package")]
    if not packages:
        raise FileNotFoundError(f"no counter of RAPL under {root}")
    zones = [_Zone(x / "energy_uj", int((x / "max_energy_range_uj").read_text())) for x in packages]
    for zone in zones:
        zone.read()
    return zones


def energy(call: Callable[[], object], seconds: float = _SECONDS, root: Path = _POWERCAP) -> Energy:
    """Joules of a call: of all packages, over some seconds of calls.

    Args:
        call: what is measured.
        seconds: for which it is called again and again, at least once.
        root: where the counters are.
    """
    try:
        zones = _zones(root)
    except (OSError, ValueError) as error:
        why = "only the administrator may read it" if isinstance(error, PermissionError) else error
        return Energy(None, f"not available: {why}")
    before, begun, calls = [zone.read() for zone in zones], time.perf_counter(), 0
    while not calls or time.perf_counter() - begun < seconds:
        call()
        calls += 1
    used = [(zone.read() - x) % (zone.range + 1) for zone, x in zip(zones, before, strict=True)]
    return Energy(sum(used) / 1e6 / calls)


def peak_memory() -> int | None:
    """Bytes of memory that this process has held at most; None where Linux does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM")]
    return found[0] if found else None


def measured(model: str, threads: int) -> dict[str, Any]:
    """Of this process, which has done nothing else: see `cost`."""
    empty = peak_memory()
    opened = open_model(model, threads)
    size = opened.pixels.image_size
    image = np.random.default_rng(0).integers(256, size=(1, size, size, 3), dtype=np.uint8)
    opened.logits(image)
    timing = measure(lambda: opened.logits(image))
    spent = energy(lambda: opened.logits(image))
    return {
        "latency_ms": 1e3 * timing.p50,
        "latency_p90_ms": 1e3 * timing.p90,
        "latency_p99_ms": None if timing.p99 is None else 1e3 * timing.p99,
        "latency_cpu_ms": 1e3 * timing.cpu,
        "latency_calls": timing.calls,
        "memory_bytes": peak_memory(),
        "memory_before_bytes": empty,
        "energy_j": spent.joules,
        "energy_note": spent.why,
        "file_bytes": Path(model).stat().st_size if Path(model).is_file() else None,
    }


def cost(model: str, threads: int = 1) -> dict[str, Any]:
    """Time, memory and energy of one image, by a process that only does that.

    Args:
        model: a file, or the name of a timm model.
        threads: on the CPU.

    Returns:
        latency_ms (the median), latency_p90_ms, latency_p99_ms, latency_cpu_ms, latency_calls;
        memory_bytes, the peak of the process, and memory_before_bytes, what it held before it read
        the model; energy_j, or None and energy_note; file_bytes.

    Raises:
        RuntimeError: the process failed; the message is its last line.
    """
    command = [sys.executable, "-m", __name__, model, str(threads)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"audit: cost of {model}: {last}")
    return dict(json.loads(result.stdout.splitlines()[-1]))


if __name__ == "__main__":
    print(json.dumps(measured(sys.argv[1], int(sys.argv[2]))))
