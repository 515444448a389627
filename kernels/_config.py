"""Tile shapes and warps, as pure functions of a call's shape: no autotuning at run time.

A benchmark run inside a training step would stall it, differ from run to run, and forbid capturing
the first step in a CUDA graph.
"""

from functools import lru_cache
from typing import NamedTuple


class KdTile(NamedTuple):
    """A program's tile: block_rows adjacent rows by steps * lanes * vec classes."""

    steps: int  # classes that one thread visits, lanes * vec apart
    block_rows: int
    lanes: int  # neighbouring threads of a row
    vec: int  # neighbouring classes of a thread: one load
    row_vec: int  # the same where it is the rows that are next to one another
    whole_row: bool  # all classes in one tile
    num_warps: int


def _power_of_2(n: int) -> int:
    """The smallest power of two that is not less than n."""
    return 1 << (n - 1).bit_length()


def _clamp(x: int, low: int, high: int) -> int:
    return max(low, min(x, high))


@lru_cache(maxsize=4096)
def kd(inner: int, classes: int, element_size: int, align: int, dense: bool) -> KdTile:
    """The tile for logits of `classes` classes and `inner` adjacent rows.

    `align` is the largest power of two that divides every stride and extent in question, in
    elements; `dense` says that rows, not classes, are next to one another in memory.
    """
    wide, tall = _power_of_2(classes), _power_of_2(inner)
    load = _clamp(16 // element_size, 1, align)  # elements of a 16-byte load
    shrink = max(1, element_size // 4)  # float64 takes two registers
    if dense:
        whole_row = wide <= 256 // shrink
        rows = min(_clamp(4096 // wide, 32, 512) // shrink, tall) if whole_row else min(64, tall)
        classes_in = wide if whole_row else max(1, 4096 // shrink // rows)
        vec, row_vec = 1, min(load, rows)
        threads = _clamp(rows * classes_in // (32 if whole_row else 16), 128, 256)
        lanes = _clamp(threads * row_vec // rows, 1, classes_in)
    else:
        whole_row = wide <= 8192 // shrink
        rows = min(_clamp(1024 // wide, 1, 1024), tall) if whole_row else 1
        classes_in = wide if whole_row else 4096 // shrink
        vec, row_vec = min(load, classes_in), 1
        threads = _clamp(rows * classes_in // 16, 128, 512)
        lanes = min(classes_in // vec, max(32, threads // rows))
    steps = classes_in // (lanes * vec)
    return KdTile(steps, rows, lanes, vec, row_vec, whole_row, threads // 32)


TOTAL_BLOCK = 1024  # rows whose weights one program adds up at a time
TOTAL_PARTS = 128  # partial sums at most: every program of the next kernel adds them up


def kd_total_parts(rows: int) -> int:
    """Programs that add up the rows' weights; 0 where each program had better do so itself."""
    return 0 if rows <= TOTAL_BLOCK else min(TOTAL_PARTS, -(-rows // TOTAL_BLOCK))


SCALE_BLOCK = 4096
SCALE_PROGRAMS = 1024  # fills the GPU, and costs little where there is nothing to do


def kd_scale_programs(numel: int) -> int:
    return min(SCALE_PROGRAMS, -(-numel // SCALE_BLOCK))
