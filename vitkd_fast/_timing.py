"""How long a call takes, and on how many CPUs it may run. Without torch."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

_WARM_UP, _ENOUGH, _LIMIT = 0.25, 1.0, 5.0  # seconds
_PERCENTILE = 100  # calls that a 99th percentile needs


@dataclass(frozen=True)
class Timing:
    """Seconds of a call by the clock, and of CPU time, of all threads of this process.

    Where the CPU computes, p50 far above the CPU time per thread says that the machine was busy.
    """

    p50: float
    p90: float
    p99: float | None  # None of fewer than 100 calls
    cpu: float  # the median
    calls: int


def measure(
    call: Callable[[], object], synchronize: Callable[[], object] = int, calls: int = _PERCENTILE
) -> Timing:
    """Times calls for a second and at least `calls` of them, but at most 5 s; a quarter warms up.

    Args:
        call: what is timed.
        synchronize: waits until what a call began is done; called before and after each.
        calls: how many there are at least.
    """
    for least, enough, limit in ((1, _WARM_UP, _WARM_UP), (calls, _ENOUGH, _LIMIT)):
        walls: list[float] = []
        cpus: list[float] = []
        begun = time.perf_counter()
        while (spent := time.perf_counter() - begun) < limit and (
            spent < enough or len(walls) < least
        ):
            synchronize()
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            synchronize()
            walls.append(time.perf_counter() - wall)
            cpus.append(time.process_time() - cpu)
    p50, p90, p99 = (float(x) for x in np.percentile(walls, (50, 90, 99)))
    return Timing(
        p50, p90, p99 if len(walls) >= _PERCENTILE else None, float(np.median(cpus)), len(walls)
    )


def warn_of_threads(key: str, threads: int) -> None:
    """Warns of more threads than this process has CPUs: they wait for each other."""
    # not on every system can a process be kept to some CPUs
    allowed = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or threads))(0)
    if threads > len(allowed):
        warnings.warn(
            f"{key}: {threads} given, and this process has {len(allowed)} CPUs", stacklevel=3
        )
