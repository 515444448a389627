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


# of an H200: a row is read twice, and the second time should be found in the L2
MULTIPROCESSORS, L2_BYTES = 132, 50 << 20


def long_row_threads(row_bytes: int) -> int:
    """Threads of a program of 64 registers each; the rows of all take half the L2, if they can."""
    for threads in (256, 512):
        if MULTIPROCESSORS * (1024 // threads) * row_bytes <= L2_BYTES // 2:
            return threads
    return 1024


@lru_cache(maxsize=4096)
def kd(
    inner: int, classes: int, element_size: int, align: int, dense: bool, per_thread: int = 32
) -> KdTile:
    """The tile for rows of `classes` logits; it does not depend on how many rows there are.

    `dense` says that rows, in runs of `inner`, and not classes are next to one another in memory.
    `align` is the largest power of two that divides the classes and all strides from row to row.
    What each thread of a row does once weighs as much as ten classes: a thread takes up to
    `per_thread` of them, and 1024 are one warp of kd_loss, which needs no barrier.
    """
    shrink = max(1, element_size // 4)  # float64 takes two registers
    wide = _power_of_2(classes)
    if dense:
        # a warp reads 32 neighbouring rows at a time
        block_rows = min(32, _power_of_2(inner))
        whole_row = wide <= 32
        tile = wide if whole_row else 32
        threads = max(32, block_rows * tile // (per_thread // 2 if whole_row else 8))
        vec = 1
    else:
        whole_row = wide <= 4096 // shrink
        block_rows = min(32, max(1, 1024 // wide)) if whole_row else 1
        vec = min(max(1, 16 // element_size), align, wide)
        long = long_row_threads(2 * classes * element_size) if per_thread // shrink == 32 else 256
        # 1024 threads have 64 registers each, too few for more than 8 classes
        of_thread = 8 if long == 1024 else min(max(8, 2 * vec), per_thread // 2)
        tile = wide if whole_row else long * of_thread // shrink
        threads = max(32, block_rows * tile // per_thread) if whole_row else long
    lanes = min(tile // vec, max(1, threads // block_rows))
    return KdTile(tile // (lanes * vec), block_rows, lanes, vec, whole_row, threads // 32)


# a divergence's terms need more registers than kd_loss's
ROW_LOSS_PER_THREAD = 16


def row_loss_registers(tile: KdTile) -> int | None:
    """Said of long rows, where ptxas would rather put a few bytes on the stack."""
    return None if tile.whole_row else 128


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


@lru_cache(maxsize=4096)
def kd_topk(classes: int, element_size: int) -> tuple[int, int]:
    """Classes that pass a row's program at a time, and its warps."""
    block = max(32, min(_power_of_2(classes), 2048 * 4 // max(4, element_size)))
    return block, max(1, min(8, block // 256))


class MapTile(NamedTuple):
    """A program's tile: block_x tokens that it is in charge of, by block_y tokens at a time."""

    block_x: int
    block_y: int
    block_d: int  # how much of dim is read at a time, at most
    block_out: int  # how much of a gradient's dim is one program's, at most
    num_warps: int = 4
    num_stages: int = 2
    # said where ptxas would rather spill a few bytes than run fewer programs side by side
    registers: int | None = None


def _map_block_y(tokens: int) -> int:
    """Half of 64 would be idle too often where few tokens end within a block."""
    return 32 if tokens < 512 and -tokens % 64 >= 32 else 64


# The largest tiles that spill nothing on sm_80 and sm_90, whatever the kind of divergence. Without
# tensor cores (`ieee`), both factors of a product come to registers: dim is cut to 16.


def attention_map_fwd(
    keys: int, dim: int, element_size: int, ieee: bool, sums_first: bool
) -> MapTile:  # fmt: skip
    """The tile of a program in charge of queries.

    `sums_first` says that the divergence needs the rows' sums: scores that fit one tile wait for
    them in registers, others are formed twice.
    """
    if ieee:
        return MapTile(64, 32, 16, 64, num_stages=1, registers=255)
    dim_bytes = _power_of_2(dim) * element_size
    if sums_first and dim_bytes <= 256 and 64 < keys <= 256:
        block_x, block_y = (64, 128) if keys <= 128 else (32, 256)
        return MapTile(block_x, block_y, 128, 128, num_warps=8, num_stages=1)
    if dim > 128:
        return MapTile(32, 32, 256 // element_size, 128, registers=255)
    if dim_bytes > 256:
        return MapTile(64, 16, 128, 128)
    return MapTile(64, _map_block_y(keys), 128, 128)


def attention_map_bwd(tokens: int, dim: int, element_size: int, ieee: bool) -> MapTile:
    """The tile of a program in charge of the gradient of queries or keys, from all `tokens`."""
    if ieee:
        block_y, block_out = (32, 64) if dim <= 64 else (16, 128)
        return MapTile(64, block_y, 16, block_out, num_stages=1, registers=255)
    dim_bytes = _power_of_2(dim) * element_size
    if dim > 128:
        return MapTile(32, 32, 256 // element_size, 128, registers=255)
    if dim_bytes > 256:
        return MapTile(32, 32, 128, 128, registers=255)
    if dim_bytes > 128:
        return MapTile(64, 32, 128, 128, num_stages=3, registers=255)
    return MapTile(64, _map_block_y(tokens), 128, 128, num_stages=3)
