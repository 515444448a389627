"""The number of threads that a run finds: on simulated machines, and what a run sets."""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from vitkd_fast.distill import config, data, experiment, threads
from vitkd_fast.distill.loop import Trainer
from vitkd_fast.distill.runtime import Runtime
from vitkd_fast.distill.threads import Threads

QUIET = {1: 0.11, 2: 0.086, 4: 0.05, 8: 0.03, 16: 0.02}  # seconds of a step, by threads


def machine(cores: int, seed: int = 0) -> Callable[[int, int], float]:
    """Seconds of a step with so many threads beside so many other processes.

    Where there are more than cores it takes 4 to 25 times as long, as measured on two cores.
    """
    draw = random.Random(seed)

    def seconds(count: int, neighbours: int) -> float:
        waits = count > 1 and count + neighbours > cores
        return QUIET[count] * draw.uniform(0.92, 1.1) * (draw.choice([4, 10, 25]) if waits else 1)

    return seconds


@pytest.mark.parametrize("cores", [2, 16])
@pytest.mark.parametrize("plan", [[0], [1], [0, 1, 0, 1]], ids=str)
def test_keeps_most_of_the_best_speed(plan: list[int], cores: int) -> None:
    """In 200 s with each number of neighbours, trials and the time to notice included."""
    step = machine(cores)
    counts = tuple(n for n in sorted(QUIET, reverse=True) if n <= cores)
    chosen = Threads(counts)
    for neighbours in plan:
        spent, steps = 0.0, 0
        while spent < 200:
            seconds = step(chosen.count, neighbours)
            chosen.took(seconds)
            spent, steps = spent + seconds, steps + 1
        best = min(sum(step(n, neighbours) for _ in range(100)) / 100 for n in counts)
        assert steps * best / spent > 0.9


def test_one_step_is_enough_where_a_core_is_taken() -> None:
    chosen, step = Threads((2, 1)), machine(2)
    used = []
    for _ in range(20):
        used.append(chosen.count)
        chosen.took(step(chosen.count, 1))
    assert used == [2] + 19 * [1]


def test_a_first_step_that_warms_up_says_nothing_yet() -> None:
    chosen, step = Threads((2, 1)), machine(2)
    for i in range(20):
        chosen.took(step(chosen.count, 0) + (0.15 if i == 0 else 0))
    assert chosen.count == 2


def test_stays_where_it_is_as_fast() -> None:
    """Late batches and a model that gains nothing of threads are no reason to change for long."""
    chosen, draw, used = Threads((2, 1)), random.Random(0), Counter[int]()
    for i in range(1000):
        used[chosen.count] += 1
        late = 5.0 if i % 50 == 49 else 0.0
        chosen.took(0.1 * draw.uniform(0.97, 1.03) + late)
    assert used[2] > 950


def test_a_slower_step_for_all_is_no_reason() -> None:
    chosen, used = Threads((2, 1)), Counter[int]()
    for i in range(400):
        used[chosen.count] += 1
        chosen.took((0.1 if i < 200 else 0.4) * (1.3 if chosen.count == 1 else 1))
    assert used[2] > 380


@pytest.mark.usefixtures("one_thread")
def test_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 12)
    assert threads.candidates(None) == (12, 6, 3, 1)
    assert threads.candidates(4) == ()
    assert Runtime.of(config.load("digits", [])).threads == (12, 6, 3, 1)
    for key in ("run.compile=true", "run.device=meta", "run.threads=1"):
        assert Runtime.of(config.load("digits", [key])).threads == ()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "2")
            assert threads.candidates(None) == ()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert threads.candidates(None) == ()


@pytest.mark.usefixtures("one_thread")
def test_a_run_sets_what_it_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps run with the number that is chosen, and the process has its own again after the run.

    Nothing is computed with two threads here, which may wait long for each other.
    """
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    now = 2
    seen: list[tuple[int, int]] = []
    update = Trainer.update

    def set_threads(count: int) -> None:
        nonlocal now
        now = count

    def watched(self: Trainer, batches: Iterator[data.Batch]) -> None:
        seen.append((self.threads.count, now))
        update(self, batches)

    monkeypatch.setattr(torch, "set_num_threads", set_threads)
    monkeypatch.setattr(torch, "get_num_threads", lambda: now)
    monkeypatch.setattr(Trainer, "update", watched)
    given = [
        *("data.dataset=digits", "data.image_size=32", "data.holdout=0.03", "data.workers=0"),
        *("student.model=mobilenetv2_035", "run.max_steps=8", "int8.enabled=false"),
        f"run.folder={tmp_path / 'run'}",
    ]
    experiment.distill(config.load(None, given))
    assert len(seen) == 8
    assert all(chosen == there for chosen, there in seen)
    assert {chosen for chosen, _ in seen} == {1, 2}
    assert now == 2
