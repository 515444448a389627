"""Tile shapes and warps, as pure functions of a call's shape: no autotuning at run time.

A benchmark run inside a training step would stall it, differ from run to run, and forbid capturing
the first step in a CUDA graph.
"""

from functools import lru_cache
from typing import NamedTuple


class KdTile(NamedTuple):
    """A program's tile: block_rows rows by steps * lanes * vec classes."""

    steps: int  # loads of a thread, lanes * vec classes apart
    block_rows: int
    lanes: int  # threads that share a row
    vec: int  # neighbouring classes of a load
    whole_row: bool  # all classes in one tile
    num_warps: int


def _power_of_2(n: int) -> int:
    """The smallest power of two that is not less than n."""
    return 1 << (n - 1).bit_length()


@lru_cache(maxsize=4096)
def kd(inner: int, classes: int, element_size: int, align: int, dense: bool) -> KdTile:
    """The tile for rows of `classes` logits; it does not depend on how many rows there are.

    `dense` says that rows, in runs of `inner`, and not classes are next to one another in memory.
    `align` is the largest power of two that divides the classes and all strides from row to row.
    What each thread of a row does once weighs as much as ten classes: a thread takes up to 32 of
    them, and 1024 are one warp, which needs no barrier.
    """
    shrink = max(1, element_size // 4)  # float64 takes two registers
    wide = _power_of_2(classes)
    if dense:
        # a warp reads 32 neighbouring rows at a time
        block_rows = min(32, _power_of_2(inner))
        whole_row = wide <= 32
        tile = wide if whole_row else 32
        threads = max(32, block_rows * tile // (16 if whole_row else 8))
        vec = 1
    else:
        whole_row = wide <= 4096 // shrink
        block_rows = min(32, max(1, 1024 // wide)) if whole_row else 1
        vec = min(max(1, 16 // element_size), align, wide)
        tile = wide if whole_row else 256 * max(8, 2 * vec) // shrink
        threads = max(32, block_rows * tile // 32) if whole_row else 256
    lanes = min(tile // vec, max(1, threads // block_rows))
    return KdTile(tile // (lanes * vec), block_rows, lanes, vec, whole_row, threads // 32)


TOTAL_BLOCK = 1024  # rows whose weights one program adds up at a time
TOTAL_PARTS = 128  # partial sums at most: every program of the next kernel adds them up
SCAN_BLOCK = 256


def kd_total_parts(rows: int) -> int:
    """Programs that add up the rows' weights; 0 where each program had better do so itself."""
    return 0 if rows <= 2 * SCAN_BLOCK else min(TOTAL_PARTS, -(-rows // TOTAL_BLOCK))


SCALE_BLOCK = 4096
SCALE_PROGRAMS = 1024  # fills the GPU, and costs little where there is nothing to do


def kd_scale_programs(numel: int) -> int:
    return min(SCALE_PROGRAMS, -(-numel // SCALE_BLOCK))
