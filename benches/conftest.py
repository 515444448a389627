"""How a bench measures: contenders take turns in one process on the same input.

A bench calls `race` once. It checks every contender against the reference first and refuses to time
a wrong one; then each round runs every contender once, so that a noisy minute hits all alike. The
table (median, 20th and 80th percentile, GB/s, share of the measured roof) is printed, and stored as
`extra_info` in pytest-benchmark's JSON, from which `benches/tables.py` makes the tables of README
and docs/benchmarks.md.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable

import pytest
import torch

Contender = Callable[[], object]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="torch sees no GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.pop("node", None)  # a host's name says nothing to a reader


@pytest.fixture
def device(request) -> torch.device:
    return torch.device("cuda" if request.node.get_closest_marker("gpu") else "cpu")


def _timer(device: torch.device, calls: int) -> Callable[[Contender], float]:
    """Seconds of one call."""
    if device.type == "cpu":

        def cpu(run: Contender) -> float:
            start = time.thread_time()  # one thread's, which other work on the machine leaves alone
            for _ in range(calls):
                run()
            return (time.thread_time() - start) / calls

        return cpu

    cold = torch.empty(256 << 20, dtype=torch.uint8, device=device)  # larger than any L2
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def cuda(run: Contender) -> float:
        cold.zero_()  # also a backlog, so that the events do not time the launch gap
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    return cuda


def peak_bytes(run: Contender, device: torch.device) -> int:
    """The most memory that `run` holds at once beyond what was there before.

    `run.grads`, where it has any, are the gradients that it left. On the CPU large ones lie in
    memory that vitkd_fast uses again, which torch's profiler does not see: they count here.
    """
    run()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        kept = run()
    del kept
    reused = {
        storage.data_ptr(): storage.nbytes()
        for grad in getattr(run, "grads", None) or ()
        if not (storage := grad.untyped_storage()).resizable()
    }
    held = peak = sum(reused.values())
    for event in sorted(
        (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"),
        key=lambda e: e.start_ns(),
    ):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.fixture
def peak(device) -> Callable[[Contender], int]:
    """peak(run): `peak_bytes` on this bench's device."""
    return lambda run: peak_bytes(run, device)


@pytest.fixture
def triton_launcher(device) -> Callable[[str, str], Callable | None]:
    """triton_launcher(stem, op): what launches an operation's Triton kernel; None on a CPU.

    For benches to race it with the C++ kernel, which the dispatcher prefers.
    """

    def launcher(stem: str, op: str) -> Callable | None:
        if device.type == "cpu" or not importlib.util.find_spec("triton"):
            return None
        return getattr(importlib.import_module(f"vitkd_fast.kernels.{stem}"), op)

    return launcher


@pytest.fixture
def race(benchmark, device, capsys):
    """race(contenders, check=..., moved=bytes, roof=name of the one that moves `roof_moved`).

    timed: the seconds of one call of a contender; without it, `calls` calls by the wall clock.
    """

    def run(
        contenders: dict[str, Contender],
        *,
        check: Callable[[str, Contender], None],
        moved: int | None = None,
        roof: str | None = None,
        roof_moved: int = 0,
        memory: tuple[str, ...] = (),
        rounds: int = 11,
        calls: int = 1,
        timed: Callable[[Contender], float] | None = None,
    ) -> dict[str, dict[str, float]]:
        for name, contender in contenders.items():
            check(name, contender)
        timed = timed or _timer(device, calls)
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for i in range(rounds + 2):
            for name, contender in contenders.items():
                value = timed(contender)
                if i >= 2:  # the first two warm caches and allocators
                    seconds[name].append(value)
        rate = roof_moved / statistics.median(seconds[roof]) if roof else None
        table = {}
        for name, values in seconds.items():
            cut = statistics.quantiles(values, n=5)
            row = {"median_us": statistics.median(values) * 1e6}
            row |= {"p20_us": cut[0] * 1e6, "p80_us": cut[-1] * 1e6}
            if moved and rate:
                row["gb_per_s"] = moved / statistics.median(values) / 1e9
                row["percent_of_copy"] = 100 * moved / statistics.median(values) / rate
            if name in memory:
                row["peak_mb"] = peak_bytes(contenders[name], device) / 1e6
            table[name] = row
        benchmark.extra_info["race"] = table
        benchmark.extra_info["torch"] = torch.__version__
        benchmark.extra_info["device"] = (
            torch.cuda.get_device_name()
            if device.type == "cuda"
            else f"cpu, {torch.get_num_threads()} thread(s)"
        )
        with capsys.disabled():
            print(f"\n{benchmark.name}")
            for name, row in table.items():
                cells = "  ".join(f"{key} {value:10.1f}" for key, value in row.items())
                print(f"  {name:22} {cells}")
        benchmark.pedantic(lambda: timed(contenders["vitkd_fast"]), rounds=3, warmup_rounds=1)
        return table

    return run
