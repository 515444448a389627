"""How many threads a step on a CPU is fastest with, found out while steps are taken.

Threads wait for each other hundreds of times in a step. Where another process takes the core of
one, all wait for it, and a step takes many times as long as with one thread less. So the number is
halved where steps became slow and that helps, and doubled where a trial of it is faster. What
trials cost is kept to a share of the time: a step with too many threads is a dear one.

The weights' last bits depend on the number: of a run to repeat it must be given.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import deque

import torch

_SHARE = 0.05  # of the time, that trials may cost
_TRIAL = 3  # steps
_SLOW, _BETTER = 1.5, 0.9  # times what steps took
_COLD = 1 / 3  # of the very first step, which warms up: a number is better only where that is clear
_UP, _DOWN = 20, 200  # steps between trials of more threads, or of less


def candidates(given: int | None) -> tuple[int, ...]:
    """All threads that torch has, and by halves down to 1; none where their number is given.

    Args:
        given: run.threads; OMP_NUM_THREADS and MKL_NUM_THREADS give it, too.
    """
    if given or os.environ.get("OMP_NUM_THREADS") or os.environ.get("MKL_NUM_THREADS"):
        return ()
    most = torch.get_num_threads()
    return tuple(most >> i for i in range(most.bit_length())) if most > 1 else ()


class Threads:
    """Sets the number of threads of the steps that are taken `with` it, and times them.

    Args:
        counts: from most to 1; none, and nothing is set.
    """

    def __init__(self, counts: tuple[int, ...] = ()) -> None:
        self.counts = counts
        self._best = 0  # its index
        self._usual = 0.0  # seconds of its steps
        self._trial: int | None = None  # the index that is tried
        self._times: deque[float] = deque(maxlen=_TRIAL)
        self._budget = 0.0  # seconds that trials may cost
        self._since = 0  # steps since the last trial
        self._cold = True

    def __enter__(self) -> None:
        if self.counts:
            torch.set_num_threads(self.count)
            self._begun = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self.counts:
            self.took(time.perf_counter() - self._begun)

    @property
    def count(self) -> int:
        """For the next step."""
        return self.counts[self._best if self._trial is None else self._trial]

    @property
    def tries(self) -> bool:
        """Whether the next step is a trial."""
        return self._trial is not None

    def took(self, seconds: float) -> None:
        """Chooses the next number, after a step that took so long."""
        self._since += 1
        self._times.append(seconds)
        if self._trial is not None:
            self._judge(self._trial, seconds)
            return
        first = not self._usual
        usual = self._usual or seconds
        late = seconds - _SLOW * usual
        # no more is saved than one step's time: what trials cost may have changed since
        self._budget = min(self._budget + _SHARE * seconds - max(late, 0), usual)
        self._usual = usual + (min(seconds, _SLOW * usual) - usual) / 8
        recent = statistics.median(self._times)
        if slow := len(self._times) == _TRIAL and recent > _SLOW * usual:
            self._usual = recent
        if not ((slow or first or self._since >= _DOWN) and self._try(self._best + 1)):
            if self._since >= _UP and self._budget >= 0:
                self._try(self._best - 1)

    def _try(self, index: int) -> bool:
        """Whether there is such a number; it is tried then."""
        if there := 0 <= index < len(self.counts):
            self._trial, self._since = index, 0
            self._times.clear()
        return there

    def _judge(self, index: int, seconds: float) -> None:
        """Of the number that is tried, by its steps so far."""
        self._budget -= max(seconds - self._usual, 0)
        failed = seconds > _SLOW * self._usual
        if not failed and len(self._times) < _TRIAL:
            return
        mean, before = statistics.fmean(self._times), self._best
        cold, self._cold = self._cold, False
        self._trial = None
        self._times.clear()
        if not failed and mean < (_COLD if cold else _BETTER) * self._usual:
            self._best, self._usual = index, mean
            self._try(2 * index - before)  # the next one that way
        elif cold:
            self._usual = 0.0  # to be measured
