"""What kd_loss should take on an H200, from its machine code and a model of the chip.

    python benches/kd_gpu_model.py [CUBIN]

prints a Markdown table for 4096 rows of 21841 classes, forward and gradient in one kernel; no GPU
is needed. CUBIN is csrc/cuda/kd.cu for sm_90 (else the one that kernel_budgets.py makes), in which
are counted: the instructions of both loops, for logits of one dtype, and of the rest of the kernel.
A block's row is four phases: it starts, sums, merges, forms the gradient. Each needs a time (of
waiting: loads of a loop's turn arrive while the turn before is worked on), instructions and bytes;
blocks on a multiprocessor share its issue slots, and all of them memory and L2. A row starts as a
block ends. What is assumed (`CASES`) has not been measured on that chip.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kernel_budgets import cubin, markdown, rows_kernel
from sass import back_edges, code_of, kernels, ways

MULTIPROCESSORS, CLOCK, COPY = 132, 1.98e9, 4.29e12  # an H200, and what torch copies there
ROWS, CLASSES, CHUNK = 4096, 21841, 8


class Case(NamedTuple):
    name: str
    issued: float  # of the slots, at most: one a clock and scheduler
    memory: float  # clocks until a load from memory arrives, or
    l2: float  # from L2
    l2_rate: float  # bytes from L2 for one of a copy
    turnover: float  # clocks from one block's end to the next one's first load


CASES = [
    Case("best", 1.0, 600, 250, 3.0, 300),
    Case("expected", 0.85, 800, 300, 2.0, 600),
    Case("worst", 0.75, 1000, 400, 1.5, 1000),
]
STEP = 30  # clocks of a merge's shuffle and what is done with it; a barrier is taken to be two


class Kernel(NamedTuple):
    """Instructions of a warp."""

    sums: int  # a turn of the loop
    gradient: int
    rest: int
    registers: int


def counted(dtype: str, file: Path) -> Kernel:
    """Of logits of one dtype, without a cross-entropy: two powers of a class."""
    registers, _, sass = kernels(file)[rows_kernel(dtype, 0)]
    code = code_of(sass)
    found: dict[bool, tuple[int, int]] = {}  # with stores: turn and start of the shortest loop
    for first, last in back_edges(code).items():
        for (powers, loads, stores), n in ways(
            code, [r"MUFU\.EX2", r"\bLDG", r"\bSTG"], first, last
        ).items():
            if powers >= 2 * CHUNK and loads:
                found[stores > 0] = min((n, first), found.get(stores > 0, (n, first)))
    # the whole way through both
    heads = [
        (f"{at:#x} {op}" if at in (found[False][1], found[True][1]) else op) for at, op in code
    ]
    marked = list(zip((at for at, _ in code), heads, strict=True))
    through = ways(marked, [rf"^{found[x][1]:#x} " for x in (False, True)])
    rest = through[1, 1] - found[False][0] - found[True][0]
    return Kernel(found[False][0], found[True][0], rest, int(registers))


def predicted(kernel: Kernel, size: int, threads: int, blocks: int, case: Case) -> float:
    """Clocks; `blocks` of so many threads on each multiprocessor, numbers of `size` bytes."""
    warps, turns = threads // 32, CLASSES / CHUNK / threads
    row = CLASSES * size
    merge = 2 * STEP * (5 + np.log2(warps) + 4)
    # phases: clocks of waiting, instructions, bytes of memory and of L2
    phases = np.array(
        [
            (case.turnover + case.memory, kernel.rest * warps / 2, 0, 0),
            (case.memory * (1 + turns), kernel.sums * warps * turns, 2 * row, 0),
            (merge, kernel.rest * warps / 2, 0, 0),
            (case.l2 * (1 + turns), kernel.gradient * warps * turns, row, 2 * row),
        ]
    )
    copy = COPY / CLOCK
    phase = np.full((MULTIPROCESSORS, blocks), -1)
    left = np.zeros(phase.shape)
    waiting, clocks = ROWS, 0.0
    while True:
        for slot in np.argwhere(left.T <= 0):  # multiprocessors take turns
            at = tuple(slot[::-1])
            over = phase[at] in (-1, len(phases) - 1)
            if over and not waiting:
                phase[at], left[at] = -1, np.inf
                continue
            waiting -= over
            phase[at], left[at] = (0 if over else phase[at] + 1), 1
        busy = phase >= 0
        if not busy.any():
            return clocks
        need = np.where(busy[..., None], phases[phase], 0)
        rate = np.where(busy, 1 / np.maximum(need[..., 0], 1), 0)
        issue = (rate * need[..., 1]).sum(1, keepdims=True) / (4 * case.issued)
        rate /= np.maximum(issue, 1)
        for which, most in ((2, copy), (3, copy * case.l2_rate)):
            over = (rate * need[..., which]).sum() / most
            rate = np.where(need[..., which] > 0, rate / max(over, 1), rate)
        step = max(20.0, (left[busy] / rate[busy]).min())
        left = np.where(busy, left - rate * step, left)
        left[busy & (left < 1e-9)] = 0
        clocks += step


def main() -> None:
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else cubin("kd", 90)
    rows = []
    for dtype, size, threads in (("float", 4, 512), ("BFloat16", 2, 256)):
        kernel = counted(dtype, file)
        # long rows ask for shared memory, so that their multiprocessor has one block
        blocks = 1 if CLASSES * size > 65536 else 65536 // (kernel.registers * threads)
        roof = 3 * CLASSES * size * ROWS / COPY * CLOCK
        ratios = [predicted(kernel, size, threads, blocks, case) / roof for case in CASES]
        us = f"{roof / CLOCK * 1e6:.0f}"
        counts = [str(x) for x in (kernel.sums, kernel.gradient, kernel.rest)]
        rows.append([dtype, f"{blocks} x {threads}", *counts, us, *(f"{x:.2f}" for x in ratios)])
    columns = ["logits", "threads", "sums", "gradient", "rest", "three passes, us"]
    print(markdown(columns + [case.name for case in CASES], rows))
    print()
    fields = [f for f in Case._fields if f != "name"]
    print(
        markdown(
            ["", *(c.name for c in CASES)],
            [[f, *(f"{getattr(c, f):g}" for c in CASES)] for f in fields],
        )
    )


if __name__ == "__main__":
    main()
