"""What the compiler made of the CUDA kernels: registers, spills, loops; no GPU is needed.

    python benches/kernel_budgets.py FILE... [--only TEXT]

reads cubins, or an extension that holds some (vitkd_fast/_C*.so), and prints a Markdown table, a
row for each kernel and architecture whose name holds TEXT. Of a loop (a branch backwards, without
the loops within it): its shuffles (SHFL) or its loads from global memory (LDG, cp.async), and its
instructions. Loads of one iteration are those that a thread has in flight, where it does not wait.

    python benches/kernel_budgets.py --notes

compiles the files of `STEMS` with nvcc for `GPUS`, into build/budgets, and writes the tables of
benches/notes/gpu-budgets.md: these, and what bytes and instructions predict for `TARGETS`.
"""

import argparse
import re
import subprocess
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple


class Loop(NamedTuple):
    instructions: int
    shuffles: int
    loads: int


def tool() -> str:
    """Triton's cuobjdump, else the toolkit's."""
    if (spec := find_spec("triton")) and spec.origin:
        found = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"
        if found.exists():
            return str(found)
    return "cuobjdump"


def dumped(option: str, file: str) -> str:
    return subprocess.run([tool(), option, file], capture_output=True, text=True, check=True).stdout


def by_kernel(text: str, opening: str) -> dict[tuple[str, str], str]:
    """What follows `opening` and a kernel's name, by architecture and name."""
    found, arch = {}, ""
    for part in re.split(rf"(?m)(?=^arch = |^\s*code for |{opening})", text):
        if match := re.match(r"(?:arch =|\s*code for) (\S+)", part):
            arch = match[1]
        elif match := re.match(rf"{opening}\s*([^\s:]+)", part):
            found[arch, match[1]] = part
    return found


def loops(sass: str) -> list[Loop]:
    """Innermost first."""
    code = [(int(at, 16), op) for at, op in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", sass)]
    ranges = []
    for at, op in code:
        if (match := re.search(r"\bBRA\b.*?0x([0-9a-f]+)", op)) and int(match[1], 16) < at:
            ranges.append((int(match[1], 16), at))
    found, taken = [], set[int]()
    for first, last in sorted(ranges, key=lambda r: r[1] - r[0]):
        body = [(at, op) for at, op in code if first <= at <= last and at not in taken]
        taken.update(at for at, _ in body)
        count = [
            sum(bool(re.search(rf"\b(?:{x})\b", op)) for _, op in body)
            for x in ("SHFL", "LDG|LDGSTS")
        ]
        if len(body) > 8:
            found.append(Loop(len(body), *count))
    return found


def readable(name: str) -> str:
    """A kernel's name and template arguments, without namespaces."""
    run = subprocess.run(["c++filt", "-p", name], capture_output=True, text=True, check=True)
    return re.sub(r"\w+::|\(anonymous namespace\)::", "", run.stdout.strip())


def longest(sass: str, first: int = 0, last: int = 1 << 62) -> int:
    """Instructions of the longest way through a kernel or a loop, its own loops taken once."""
    code = [(int(at, 16), op) for at, op in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", sass)]
    body = [(at, op) for at, op in code if first <= at <= last]
    best = {body[0][0]: 0}  # before an instruction
    ends = [0]
    for k, (at, op) in enumerate(body):
        if at not in best:
            continue
        steps = best[at] + 1
        ends.append(steps)
        jump = re.match(r"(@\S+ )?(BRA|EXIT)\b", op)
        if jump and (to := re.search(r"0x([0-9a-f]+)", op)) and int(to[1], 16) > at:
            best[int(to[1], 16)] = max(steps, best.get(int(to[1], 16), 0))
        if not (jump and not jump[1]) and k + 1 < len(body):
            best[body[k + 1][0]] = max(steps, best.get(body[k + 1][0], 0))
    return max(ends)


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
STEMS = ["kd", "int8_dwconv", "int8_pwconv"]
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
    "int8_dwconv_kernel<3, 1, false>": "depthwise 3x3",
    "int8_dwconv_kernel<5, 1, false>": "depthwise 5x5",
    "int8_pwconv_kernel<64, true>": "pointwise, 64 outputs",
    "int8_pwconv_kernel<64, false>": "pointwise, 64 outputs, weights streamed",
}


class Target(NamedTuple):
    """A call of kd_loss, forward and backward."""

    shape: str
    dtype: str
    access: int
    numbers: int
    warps: float
    again: float  # turns of a warp through either loop, beyond the first


def of_vectors(rows: int, classes: int, dtype: str, group: int) -> Target:
    turns = max(1.0, classes / 8 / group)
    return Target(f"{rows}x{classes}", dtype, 0, rows * classes, rows * group / 32, turns - 1)


TARGETS = [
    *(
        of_vectors(4096, classes, dtype, group)
        for dtype, groups in (("float", (32, 512)), ("BFloat16", (32, 256)))
        for classes, group in zip((1000, 21841), groups, strict=True)
    ),
    Target("4194304x21", "float", 3, 21 << 22, (1 << 22) / 8, 0),
    Target("16x21x512x512", "float", 2, 21 << 22, (1 << 22) / 32, 21 / 4 - 1),
    Target("8x150x128x128", "float", 2, 150 << 17, (1 << 17) * 8 / 32, 150 / 32 - 1),
]


def cubin(stem: str, arch: int) -> Path:
    """Compiled as the extension is, unless it is there and newer than all of csrc."""
    to = ROOT / f"build/budgets/{stem}.sm_{arch}.cubin"
    sources = [f for f in (ROOT / "csrc").rglob("*") if f.is_file()]
    if to.exists() and to.stat().st_mtime > max(f.stat().st_mtime for f in sources):
        return to
    import torch

    include = Path(torch.__file__).parent / "include"
    to.parent.mkdir(parents=True, exist_ok=True)
    defined = ["USE_CUDA", "TORCH_TARGET_VERSION=0x020b000000000000"]
    subprocess.run(
        [
            "nvcc", "-cubin", f"-arch=sm_{arch}", "-std=c++20", "-O3", "--expt-relaxed-constexpr",
            *(f"-D{x}" for x in defined),
            *(f"-I{x}" for x in (ROOT / "csrc", include, include / "torch/csrc/api/include")),
            str(ROOT / f"csrc/cuda/{stem}.cu"), "-o", str(to),
        ],
        check=True,
    )  # fmt: skip
    return to


@cache
def kernels(file: Path) -> dict[str, tuple[str, str, str]]:
    """Of each kernel, by its readable name: registers, spilled bytes, and its code."""
    usage = by_kernel(dumped("-res-usage", str(file)), r" *Function ")
    found = {}
    for (_, name), sass in by_kernel(dumped("-sass", str(file)), r"\s*Function : ").items():
        used = next(text for (_, of), text in usage.items() if of == name)
        registers, *memory = (re.findall(rf"{x}:(\d+)", used)[0] for x in ("REG", "STACK", "LOCAL"))
        found[readable(name)] = registers, str(sum(map(int, memory))), sass
    return found


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    return "\n".join(
        "| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *rows)
    )


def cells(found: list[Loop]) -> list[str]:
    """Loops with shuffles, and with loads; those that are alike, as unrolled copies are, once."""
    shuffles = dict.fromkeys(f"{x.shuffles} in {x.instructions}" for x in found if x.shuffles)
    loads = dict.fromkeys(f"{x.loads} in {x.instructions}" for x in found if x.loads)
    return [", ".join(shuffles) or "-", ", ".join(loads) or "-"]


def predicted(target: Target, arch: int) -> list[str]:
    """us: of the bytes, and of the instructions if every warp went the longest way."""
    gpu = GPUS[arch]
    sass = kernels(cubin("kd", arch))[rows_kernel(target.dtype, target.access)][2]
    code = [(int(at, 16), op) for at, op in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", sass)]
    bodies = []
    for at, op in code:
        if (match := re.search(r"\bBRA\b.*?0x([0-9a-f]+)", op)) and int(match[1], 16) < at:
            body = [x for a, x in code if int(match[1], 16) <= a <= at]
            # of classes, not of a branch to what a compiler put aside
            if sum("LDG" in x for x in body) >= 4 and not any("SHFL" in x for x in body):
                bodies.append(longest(sass, int(match[1], 16), at))
    instructions = longest(sass) + target.again * sum(sorted(bodies)[-2:])
    issue = instructions * target.warps / (4 * gpu.multiprocessors * gpu.clock * 1e3)
    size = 4 if target.dtype == "float" else 2
    roof = 3 * size * target.numbers / gpu.bandwidth / 1e3
    return [f"{roof:.0f}", f"{issue:.0f}", f"{max(roof, issue) / roof:.2f}"]


def notes() -> str:
    budgets, times = [], []
    for name, label in SHOWN.items():
        for arch in GPUS:
            for stem in STEMS:
                if of := kernels(cubin(stem, arch)).get(name):
                    row = [label, f"sm_{arch}", of[0], of[1], str(longest(of[2]))]
                    budgets.append(row + cells(loops(of[2])))
    for target in TARGETS:
        how = ("16-byte loads", "one by one", "strided", "few classes")[target.access]
        for arch, gpu in GPUS.items():
            times.append([target.shape, target.dtype, how, gpu.name, *predicted(target, arch)])
    of_kernel = ["kernel", "for", "registers", "spills", "longest way", "shuffles", "loads"]
    of_target = ["kd_loss", "dtype", "classes", "GPU", "bytes, us", "issue, us, at most", "ratio"]
    return f"""# The CUDA kernels on five architectures: counts, no times

Made by `python benches/kernel_budgets.py --notes` from machine code; nothing here has run on a GPU.
A loop is written "8 in 118": 8 shuffles, or 8 loads from global memory, among 118 instructions.
"Longest way": instructions of the longest way through the kernel, its loops taken once.

{markdown(of_kernel, budgets)}

## What that predicts

Bytes: student and teacher read and the gradient written once, at the data sheet's bandwidth. Issue:
if every warp went the longest way (branches for logits of other dtypes or for labels taken where
they are longer, 8 classes a thread even where a row has fewer), at one instruction a clock and
scheduler; latencies are not in it. The ratio is that of the larger one to the bytes: what a call
takes should lie between 1 and that. attention_map: gpu.md.

{markdown(of_target, times)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*")
    parser.add_argument("--only", default="")
    parser.add_argument("--notes", action="store_true", help="write benches/notes/gpu-budgets.md")
    arguments = parser.parse_args()
    if arguments.notes:
        (ROOT / "benches/notes/gpu-budgets.md").write_text(notes())
    columns = ["kernel", "for", "registers", "spills", "instructions", "shuffles", "loads"]
    for file in arguments.files:
        usage = by_kernel(dumped("-res-usage", file), r" *Function ")
        rows = []
        for (arch, name), sass in by_kernel(dumped("-sass", file), r"\s*Function : ").items():
            if arguments.only not in name:
                continue
            used = next(text for (_, of), text in usage.items() if of == name)
            registers, local = (re.findall(rf"{x}:(\d+)", used)[0] for x in ("REG", "LOCAL"))
            total = len(re.findall(r"/\*[0-9a-f]{4,}\*/\s+[^;]*;", sass))
            rows.append([readable(name), arch, registers, local, str(total), *cells(loops(sass))])
        print(markdown(columns, rows))


if __name__ == "__main__":
    main()
