"""What the compiler made of the CUDA kernels: registers, spills, loops; no GPU is needed.

    python benches/kernel_budgets.py FILE... [--only TEXT]

reads cubins, or an extension that holds some (vitkd_fast/_C*.so), and prints a Markdown table, a
row for each kernel and architecture whose name holds TEXT. Of a loop (a branch backwards, without
the loops within it): its shuffles (SHFL) or its loads from global memory (LDG, cp.async), and its
instructions. Loads of one iteration are those that a thread has in flight, where it does not wait.
"""

import argparse
import re
import subprocess
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+")
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    columns = ["kernel", "for", "registers", "spills", "instructions", "shuffles", "loads"]
    print("|", " | ".join(columns), "|\n|" + "---|" * len(columns))
    for file in arguments.files:
        usage = by_kernel(dumped("-res-usage", file), r" *Function ")
        for (arch, name), sass in by_kernel(dumped("-sass", file), r"\s*Function : ").items():
            if arguments.only not in name:
                continue
            found = loops(sass)
            used = next(text for (_, of), text in usage.items() if of == name)
            registers, local = (re.findall(rf"{x}:(\d+)", used)[0] for x in ("REG", "LOCAL"))
            # loops that are alike, as unrolled copies are, once
            shuffles = dict.fromkeys(
                f"{x.shuffles} in {x.instructions}" for x in found if x.shuffles
            )
            loads = dict.fromkeys(f"{x.loads} in {x.instructions}" for x in found if x.loads)
            total = len(re.findall(r"/\*[0-9a-f]{4,}\*/\s+[^;]*;", sass))
            row = [readable(name), arch, registers, local, total]
            row += [", ".join(shuffles) or "-", ", ".join(loads) or "-"]
            print("|", " | ".join(map(str, row)), "|")


if __name__ == "__main__":
    main()
