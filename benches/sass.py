"""Machine code of CUDA kernels, as cuobjdump prints it: registers, memory, loops, ways."""

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


def code_of(sass: str) -> list[tuple[int, str]]:
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", sass)
    return [(int(at, 16), op) for at, op in found]


def target_of(at: int, op: str) -> tuple[bool, int | None] | None:
    """Of a jump: whether it has a condition, and where it leads (None: out of the kernel)."""
    if not (jump := re.match(r"(@\S+ )?(BRA|EXIT)\b", op)):
        return None
    to = re.search(r"0x([0-9a-f]+)", op) if jump[2] == "BRA" else None
    conditional = bool(jump[1] or re.search(r"\bBRA\S*\s+!?U?P\d", op))
    return conditional, int(to[1], 16) if to else None


def back_edges(code: list[tuple[int, str]]) -> dict[int, int]:
    """Of each loop, its first instruction and its last."""
    found: dict[int, int] = {}
    for at, op in code:
        if (jump := target_of(at, op)) and jump[1] is not None and jump[1] < at:
            found[jump[1]] = at
    return found


def ways(
    code: list[tuple[int, str]], by: list[str], first: int = 0, last: int = 1 << 62
) -> dict[tuple[int, ...], int]:
    """Instructions of the shortest way from `first` back to it (0: to the kernel's end).

    By how many instructions on it match each pattern; loops within are taken once.
    """
    body = [(at, op) for at, op in code if first <= at <= last]
    known: dict[int, dict[tuple[int, ...], int]] = {body[0][0]: {(0,) * len(by): 0}}
    ends: dict[tuple[int, ...], int] = {}
    for (at, op), (following, _) in zip(body, [*body[1:], (-1, "")], strict=True):
        jump = target_of(at, op)
        on = [following] if following > 0 and not (jump and not jump[0]) else []
        if jump and jump[1] is not None and at < jump[1] <= last:
            on.append(jump[1])
        over = jump and (jump[1] is None if first == 0 else jump[1] == first)
        marks = [bool(re.search(x, op)) for x in by]
        for count, steps in known.get(at, {}).items():
            now = tuple(n + mark for n, mark in zip(count, marks, strict=True))
            if over:
                ends[now] = min(steps + 1, ends.get(now, steps + 1))
            for to in on:
                of_next = known.setdefault(to, {})
                of_next[now] = min(steps + 1, of_next.get(now, steps + 1))
    return ends


def loops(sass: str) -> list[Loop]:
    """Innermost first."""
    code = code_of(sass)
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
    body = [(at, op) for at, op in code_of(sass) if first <= at <= last]
    best = {body[0][0]: 0}  # before an instruction
    ends = [0]
    for (at, op), (following, _) in zip(body, [*body[1:], (-1, "")], strict=True):
        if at not in best:
            continue
        steps = best[at] + 1
        ends.append(steps)
        jump = target_of(at, op)
        on = [following] if following > 0 and not (jump and not jump[0]) else []
        if jump and jump[1] is not None and jump[1] > at:
            on.append(jump[1])
        for to in on:
            best[to] = max(steps, best.get(to, 0))
    return max(ends)


@cache
def on_each(file: Path) -> dict[tuple[str, str], tuple[str, str, str]]:
    """Registers, bytes of the stack and code of each kernel, by architecture and readable name."""
    usage = by_kernel(dumped("-res-usage", str(file)), r" *Function ")
    found = {}
    for (arch, name), sass in by_kernel(dumped("-sass", str(file)), r"\s*Function : ").items():
        used = usage.get((arch, name)) or usage["", name]
        registers, *memory = (re.findall(rf"{x}:(\d+)", used)[0] for x in ("REG", "STACK", "LOCAL"))
        found[arch, readable(name)] = registers, str(sum(map(int, memory))), sass
    return found


def kernels(file: Path) -> dict[str, tuple[str, str, str]]:
    """Of a file for one architecture, by name."""
    return {name: of for (_, name), of in on_each(file).items()}
