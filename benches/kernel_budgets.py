"""What the compiler made of the CUDA kernels: registers, spills, loops; no GPU is needed.

    python benches/kernel_budgets.py FILE... [--only TEXT]

reads cubins, or an extension that holds some (vitkd_fast/_C*.so), and prints a Markdown table, a
row for each kernel and architecture whose name holds TEXT. Of a loop (a branch backwards, without
the loops within it): its shuffles (SHFL) or its loads from global memory (LDG, cp.async), and its
instructions. Loads of one iteration are those that a thread has in flight, where it does not wait.

    python benches/kernel_budgets.py --notes

compiles the files of `STEMS` with nvcc for `GPUS`, into build/budgets, and writes the tables of
benches/notes/gpu-budgets.md: these, what bytes and instructions predict for `TARGETS`, and the
instructions of attention_map's tiles.
"""

import argparse
import subprocess
from pathlib import Path
from typing import NamedTuple

from sass import Loop, back_edges, code_of, kernels, longest, loops, on_each, ways


class Gpu(NamedTuple):
    """From its maker's data sheet."""

    name: str
    multiprocessors: int
    clock: float  # GHz
    bandwidth: float  # GB/s


GPUS = {
    80: Gpu("A100 80 GB", 108, 1.41, 2039),
    89: Gpu("RTX 4090", 128, 2.52, 1008),
    90: Gpu("H200", 132, 1.98, 4800),
    100: Gpu("B200", 148, 1.96, 8000),
    120: Gpu("RTX 5090", 170, 2.41, 1792),
}
STEMS = [
    "kd", "kd_topk", "row_loss", "dist", "rkd", "attention_map_fwd", "attention_map_grad",
    "int8_dwconv", "int8_pwconv",
]  # fmt: skip
ROOT = Path(__file__).parents[1]


def rows_kernel(dtype: str, access: int) -> str:
    """Loss and gradient."""
    return f"kd_rows_kernel<float, {dtype}, (Access){access}, (Pass)1>"


# kernels of the table, and how a reader knows them
SHOWN = {
    **{
        rows_kernel(dtype, access): f"kd, {dtype}, {how}"
        for dtype in ("float", "BFloat16")
        for access, how in enumerate(("16-byte loads", "one by one", "strided", "few classes"))
    },
    "sum_kernel<Numbers<float>, double>": "sum over rows",
    "sum_kernel<RowWeights<Call<float> >, double>": "sum of the rows' weights",
    "kd_scale_kernel<float, BFloat16>": "kd_scale_, bfloat16",
    "kd_topk_kernel<float, float, (Pass)1>": "kd_topk, float",
    "kd_topk_kernel<float, BFloat16, (Pass)1>": "kd_topk, BFloat16",
    "row_loss_kernel<float, float, (Access)0>": "row_loss, float, 16-byte loads",
    "row_loss_kernel<float, BFloat16, (Access)0>": "row_loss, BFloat16, 16-byte loads",
    "row_loss_kernel<float, float, (Access)1>": "row_loss, float, one by one",
    "row_loss_kernel<float, float, (Access)2>": "row_loss, float, strided",
    "dist_rows_kernel<float>": "dist, rows",
    "dist_rows_kernel<double>": "dist, rows, double",
    "dist_columns_kernel<float>": "dist, columns",
    "dist_bwd_kernel<float, BFloat16>": "dist, gradient, BFloat16",
    "rkd_mean_kernel<float>": "rkd, mean distances",
    "rkd_distance_kernel<float>": "rkd, distances",
    "rkd_pairs_kernel<float>": "rkd, angles and gradient",
    "attention_map_fwd_kernel<Bf16, (Kind)0, false>": "attention_map, BFloat16, kl",
    "attention_map_fwd_kernel<Wide<true>, (Kind)0, false>": "attention_map, float, kl",
    "attention_map_grad_kernel<Bf16, 2, 64, true, false>": "attention_map, BFloat16, d_q",
    "attention_map_grad_kernel<Bf16, 2, 64, false, false>": "attention_map, BFloat16, d_k",
    "int8_dwconv_kernel<3, 1, false>": "depthwise 3x3",
    "int8_dwconv_kernel<5, 1, false>": "depthwise 5x5",
    "int8_dwconv_kernel<3, 2, false>": "depthwise 3x3, stride 2",
    "int8_dwconv_kernel<5, 2, false>": "depthwise 5x5, stride 2",
    "int8_pwconv_kernel<64, true>": "pointwise, 64 outputs",
    "int8_pwconv_kernel<64, false>": "pointwise, 64 outputs, weights streamed",
}


class Launch(NamedTuple):
    stem: str
    kernel: str
    warps: float
    again: tuple[float, ...] = ()  # turns beyond the first through its loops, the longest one first
    mark: str = "LDG"  # what such a loop has, so many of it at least, and no shuffles
    least: int = 4


class Target(NamedTuple):
    """A call, forward and backward."""

    call: str
    numbers: float  # that it has to read and write once
    size: int
    launches: list[Launch]


def of_kd(shape: str, dtype: str, access: int, numbers: int, warps: float, again: float) -> Target:
    how = ("", ", one by one", ", strided", ", few classes")[access]
    kernel = Launch("kd", rows_kernel(dtype, access), warps, (again, again))
    return Target(f"kd, {dtype}, {shape}{how}", 3 * numbers, SIZES[dtype], [kernel])


def of_vectors(rows: int, classes: int, dtype: str, group: int) -> Target:
    turns = max(1.0, classes / 8 / group)
    warps = rows * group / 32
    return of_kd(f"{rows}x{classes}", dtype, 0, rows * classes, warps, turns - 1)


SIZES = {"float": 4, "BFloat16": 2}
ROWS, CLASSES, MANY = 4096, 1000, 21841
TARGETS = [
    *(
        of_vectors(ROWS, classes, dtype, group)
        for dtype, groups in (("float", (32, 512)), ("BFloat16", (32, 256)))
        for classes, group in zip((CLASSES, MANY), groups, strict=True)
    ),
    of_kd("4194304x21", "float", 3, 21 << 22, (1 << 22) / 8, 0),
    of_kd("16x21x512x512", "float", 2, 21 << 22, (1 << 22) / 32, 21 / 4 - 1),
    of_kd("8x150x128x128", "float", 2, 150 << 17, (1 << 17) * 8 / 32, 150 / 32 - 1),
    *(
        # its longest loop is over segments of 65536 classes, and has one turn
        Target(f"kd_topk, {dtype}, {ROWS}x{MANY}", 2 * ROWS * MANY, size, [
            Launch("kd_topk", f"kd_topk_kernel<float, {dtype}, (Pass)1>", 8 * ROWS,
                   (0, MANY / 1024 - 1, MANY / 1024 - 1))])
        for dtype, size in SIZES.items()
    ),
    *(
        Target(f"row_loss, {dtype}, {ROWS}x{CLASSES}", 3 * ROWS * CLASSES, size, [
            Launch("row_loss", f"row_loss_kernel<float, {dtype}, (Access)0>", ROWS,
                   (CLASSES / 256 - 1,) * 3)])
        for dtype, size in SIZES.items()
    ),
    Target(f"dist, BFloat16, {ROWS}x{CLASSES}", 5 * ROWS * CLASSES, 2, [
        Launch("dist", "dist_rows_kernel<float>", 8 * ROWS),
        Launch("dist", "dist_columns_kernel<float>", 8 * 32 * ROWS / 256, (31,)),
        Launch("dist", "dist_bwd_kernel<float, BFloat16>", 8 * ROWS, (CLASSES / 256 - 1,) * 2)]),
    # 136 of 256 tiles; 16 samples of a tile in 8 turns, 16 times
    Target("rkd, float, the Grams of 256", 3 * 256**2, 4, [
        Launch("rkd", "rkd_pairs_kernel<float>", 8 * 136, (15, 112), "LDS", 16)]),
]  # fmt: skip


def cubin(stem: str, arch: int) -> Path:
    """Compiled as the extension is, unless it is there and newer than all that it includes."""
    to = ROOT / f"build/budgets/{stem}.sm_{arch}.cubin"
    listed = to.with_suffix(".d")
    if to.exists() and listed.exists():
        sources = listed.read_text().split(":", 1)[1].replace("\\\n", " ").split()
        if to.stat().st_mtime > max(Path(f).stat().st_mtime for f in sources):
            return to
    import torch

    include = Path(torch.__file__).parent / "include"
    to.parent.mkdir(parents=True, exist_ok=True)
    defined = ["USE_CUDA", "TORCH_TARGET_VERSION=0x020b000000000000"]
    subprocess.run(
        [
            "nvcc", "-cubin", "-MD", f"-arch=sm_{arch}", "-std=c++20", "-O3",
            "--expt-relaxed-constexpr",
            *(f"-D{x}" for x in defined),
            *(f"-I{x}" for x in (ROOT / "csrc", include, include / "torch/csrc/api/include")),
            str(ROOT / f"csrc/cuda/{stem}.cu"), "-o", str(to),
        ],
        check=True,
    )  # fmt: skip
    return to


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    return "\n".join(
        "| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *rows)
    )


def cells(found: list[Loop]) -> list[str]:
    """Loops with shuffles, and with loads; those that are alike, as unrolled copies are, once."""
    shuffles = dict.fromkeys(f"{x.shuffles} in {x.instructions}" for x in found if x.shuffles)
    loads = dict.fromkeys(f"{x.loads} in {x.instructions}" for x in found if x.loads)
    return [", ".join(shuffles) or "-", ", ".join(loads) or "-"]


def instructions(launch: Launch, arch: int) -> float:
    """Of a warp, at most."""
    sass = kernels(cubin(launch.stem, arch))[launch.kernel][2]
    code = code_of(sass)
    bodies = []
    for first, last in back_edges(code).items():
        body = [op for at, op in code if first <= at <= last]
        # of classes, not of a branch to what a compiler put aside
        if sum(launch.mark in x for x in body) >= launch.least and not any(
            "SHFL" in x for x in body
        ):
            bodies.append(longest(sass, first, last))
    again = zip(launch.again, sorted(bodies, reverse=True), strict=False)
    return longest(sass) + sum(turns * body for turns, body in again)


def issued(warps: float, of_each: float, gpu: Gpu) -> float:
    """us, at one instruction a clock and scheduler."""
    return warps * of_each / (4 * gpu.multiprocessors * gpu.clock * 1e3)


def predicted(target: Target, arch: int) -> list[str]:
    """us: of the bytes, and of the instructions if every warp went the longest way."""
    gpu = GPUS[arch]
    issue = sum(issued(x.warps, instructions(x, arch), gpu) for x in target.launches)
    roof = target.size * target.numbers / gpu.bandwidth / 1e3
    ratio = max(roof, issue) / roof
    return [f"{roof:.1f}", f"{issue:.1f}", f"{ratio:.2f}" if ratio < 100 else "-"]


# attention_map's forward, kl, bfloat16, dim 64: a batch of 256 with 12 heads of 196 tokens, which
# are 6 tiles of 32 and an end: 4 queries cost 16, 4 keys cost 8
HEADS, TOKENS = 256 * 12, 196
TILES = (6 + 16 / 32) * (6 + 8 / 32)
FORWARD = "attention_map_fwd_kernel<Bf16, (Kind)0, false>"


def tile_instructions(sass: str) -> tuple[int, float]:
    """Of a tile of 32x32 pairs in both maps, and with what it has of a stage's two tiles."""
    code = code_of(sass)
    marks = [r"\bHMMA", r"MUFU\.EX2", r"\bLDGSTS"]
    found = {x: ways(code, marks, *x) for x in back_edges(code).items()}
    tile, inner = min((x[64, 64, 0], at) for at, x in found.items() if (64, 64, 0) in x)
    copy = min(x[0, 0, 1] for x in found.values() if (0, 0, 1) in x)  # of 16 bytes
    # a stage: the loop around that with the first copies of both models, and its tile left out,
    # unless it is the tile's loop that ends at the top (sm_80)
    around = [x for at, x in found.items() if at[0] < inner[0] and inner[1] < at[1]]
    with_tile = [x[64, 64, 2] - tile for x in around if (64, 64, 2) in x]
    stage = min(with_tile or [x[0, 0, 2] for x in around if (0, 0, 2) in x])
    return tile, tile + (stage + 6 * copy) / 2


def attention(arch: int) -> list[str]:
    gpu = GPUS[arch]
    tile, in_all = tile_instructions(kernels(cubin("attention_map_fwd", arch))[FORWARD][2])
    issue = issued(HEADS * TILES, in_all, gpu)
    powers = HEADS * TILES * 2 * 32 * 32 / (16 * gpu.multiprocessors * gpu.clock * 1e3)
    memory = 4 * HEADS * TOKENS * 64 * 2 / gpu.bandwidth / 1e3
    return [str(tile), f"{in_all:.0f}", *(f"{x:.0f}" for x in (issue, powers, memory))]


def notes() -> str:
    budgets, times = [], []
    for name, label in SHOWN.items():
        for arch in GPUS:
            for stem in STEMS:
                if of := kernels(cubin(stem, arch)).get(name):
                    row = [label, f"sm_{arch}", of[0], of[1], str(longest(of[2]))]
                    budgets.append(row + cells(loops(of[2])))
                    break
    for target in TARGETS:
        for arch, gpu in GPUS.items():
            times.append([target.call, gpu.name, *predicted(target, arch)])
    tiles = [[f"sm_{arch}, {gpu.name}", *attention(arch)] for arch, gpu in GPUS.items()]
    of_kernel = ["kernel", "for", "registers", "stack", "longest way", "shuffles", "loads"]
    of_target = ["call", "GPU", "bytes, us", "issue, us, at most", "ratio"]
    of_tile = ["for", "a tile", "with its stage", "issue, us", "powers, us", "bytes, us"]
    return f"""# The CUDA kernels on five architectures: counts, no times

Made by `python benches/kernel_budgets.py --notes` from machine code; nothing here has run on a GPU.
A loop is written "8 in 118": 8 shuffles, or 8 loads from global memory, among 118 instructions.
"Longest way": instructions of the longest way through the kernel, its loops taken once. "Stack":
bytes of a thread in local memory, spills among them.

{markdown(of_kernel, budgets)}

## What that predicts

Bytes: logits read and the gradient written once (dist: read twice), at the data sheet's bandwidth.
Issue: if every warp went the longest way (branches for logits of other dtypes, for labels or for a
divergence taken where they are longer, 8 classes a thread even where a row has fewer), at one
instruction a clock and scheduler; latencies are not in it. The ratio is that of the larger one to
the bytes: what a call takes should lie between 1 and that. kd_loss on an H200 with latencies, and
without labels: kd.md.

{markdown(of_target, times)}

attention_map's forward, kl, bfloat16, a batch of 256 with 12 heads of {TOKENS} tokens and dim 64:
instructions of a tile of 32x32 pairs of both maps, and with its part of what a stage of two tiles
has (barriers, and a thread's 8 copies of 16 bytes); then what all {TILES:.1f} tiles of each head
take, were one of these the only bound: issue, 2 powers a pair at 16 a clock and multiprocessor,
queries and keys read once.

{markdown(of_tile, tiles)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*")
    parser.add_argument("--only", default="")
    parser.add_argument("--notes", action="store_true", help="write benches/notes/gpu-budgets.md")
    arguments = parser.parse_args()
    if arguments.notes:
        (ROOT / "benches/notes/gpu-budgets.md").write_text(notes())
    columns = ["kernel", "for", "registers", "stack", "instructions", "shuffles", "loads"]
    for file in arguments.files:
        print(
            markdown(
                columns,
                [
                    [name, arch, registers, stack, str(len(code_of(sass))), *cells(loops(sass))]
                    for (arch, name), (registers, stack, sass) in on_each(Path(file)).items()
                    if arguments.only in name
                ],
            )
        )


if __name__ == "__main__":
    main()
