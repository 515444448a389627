"""Writes the tables of README.md and docs/benchmarks.md from the committed results.

`python benches/tables.py` (make bench does). Each table stands between `<!-- table: FILE GROUP -->`
and `<!-- end -->`; FILE is a result under benches/results and GROUP the beginning of its benches'
names.
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/benchmarks.md", "docs/quickstart/compare.md")
MARK = re.compile(r"(<!-- table: (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
SETS = {"avx2": "AVX2", "avx_vnni": "AVX-VNNI", "avx512f": "AVX-512", "avx512_vnni": "AVX-512 VNNI",
        "amx_int8": "AMX"}  # fmt: skip
# values of a bench that is no race, and how they are shown
FIGURES = {
    "resident_mb": "{:.0f} MB",
    "fidelity": "{:.3g}",
    "counts": "{:.3g}",
    "study": "{:.3g}",
    "options": "{:.3g}",
}


def machine(results: dict, benches: list[dict]) -> str:
    """The CPU, what it can do that matters, threads and torch's version."""
    if "tools" in (info := benches[0]["extra_info"]):  # no machine at all
        return info["tools"]
    cpu = results["machine_info"]["cpu"]
    info = next((b["extra_info"] for b in benches if "device" in b["extra_info"]), {})
    device = info.get("device", "cpu")
    parts = [device]
    if device.startswith("cpu"):
        sets = [name for flag, name in SETS.items() if flag in cpu.get("flags", ())]
        parts = [f"{cpu.get('brand_raw', '?')} ({', '.join(sets)})", *device.split(", ")[1:]]
    return ", ".join([*parts, *([f"torch {info['torch']}"] if "torch" in info else [])])


def races(benches: list[dict]) -> list[list[str]]:
    """A row per bench, a column per contender, its time over ours.

    A bench with `best` has a column per key of that, whose value is the contender's name.
    """
    columns = (b["extra_info"].get("best") or b["extra_info"]["race"] for b in benches)
    others = [name for name in dict.fromkeys(n for c in columns for n in c) if name != "vitkd_fast"]
    rows = [["case", "vitkd_fast", *others]]
    for bench in benches:
        race, best = bench["extra_info"]["race"], bench["extra_info"].get("best")
        ours = race["vitkd_fast"]
        case = re.sub(r".*\[(?:cpu-|cuda-)?(.*)\]", r"\1", bench["name"])
        mine = f"{ours['median_us'] / 1e3:.3g} ms"
        if "percent_of_copy" in ours:
            mine += f", {ours['percent_of_copy']:.0f}% of copy"
        cells = [case, mine]
        for column in others:
            name = column if best is None else best.get(column)
            ratio = race[name]["median_us"] / ours["median_us"] if name in race else None
            variant = "" if best is None or not name else " " + name.removeprefix(f"{column} ")
            cells.append(f"{ratio:.2f}x{variant}" if ratio else "")
        rows.append(cells)
    return rows


def figures(benches: list[dict]) -> list[list[str]]:
    """A row per contender, a column per figure."""
    infos = [bench["extra_info"] for bench in benches]
    name, shown = next((name, shown) for name, shown in FIGURES.items() if name in infos[0])
    values = {k: v for info in infos for k, v in info.get(name, {}).items()}
    found = {k: v if isinstance(v, dict) else {name: v} for k, v in values.items()}
    columns = [k for k, v in next(iter(found.values())).items() if isinstance(v, (int, float))]
    cells = [
        [k, *("" if v[c] is None else shown.format(v[c]) for c in columns)]
        for k, v in found.items()
    ]
    return [["", *(c.replace("_mb", "") for c in columns)], *cells]


def exports(benches: list[dict]) -> list[list[str]]:
    """A row per exported model and runtime, of bench_export.py."""
    rows = [["student", "weights", "runtime", "top-1 as the engine's", "largest difference, steps",
             "SQNR beside float, dB (engine's)", "in float", "time, engine's = 1",
             "its own quantiser's, export's = 1"]]  # fmt: skip
    for info in (bench["extra_info"] for bench in benches):
        for name, row in info["exports"].items():
            floats = "it does not say"
            if row["operators"]:
                counts = row["operators"]["float"].items()
                floats = ", ".join(f"{n} {op}" for op, n in counts) or "nothing"
            own = f"{row['own_over_ours']:.2f}" if "own_over_ours" in row else ""
            rows.append([
                info["family"], f"{info['weights']}, {info['image_size']} px",
                f"{name} {row['version']}", f"{100 * row['agreement']:.1f}%",
                f"{row['largest_steps']:.1f}",
                f"{row['float_db']:.1f} ({row['engine_float_db']:.1f})",
                floats, f"{row['times_engine']:.2f}", own,
            ])  # fmt: skip
    return rows


def table(results: dict, group: str) -> str:
    """The machine, and a table in Markdown."""
    benches = [b for b in results["benchmarks"] if b["name"].startswith(group)]
    first = benches[0]["extra_info"]
    raced = "race" in first and "exports" not in first
    if "exports" in first:
        rows = exports(benches)
    else:
        rows = races(benches) if raced else figures(benches)
    rows.insert(1, ["---"] * len(rows[0]))
    note = machine(results, benches) + ("; time of each over ours" if raced else "")
    return f"{note}.\n\n" + "".join("| " + " | ".join(row) + " |\n" for row in rows)


def filled(page: str) -> str:
    """A page's text with every table made anew."""

    def fill(match: re.Match) -> str:
        results = ROOT / "benches" / "results" / match[2]
        return f"{match[1]}{table(json.loads(results.read_text()), match[3])}{match[4]}"

    return MARK.sub(fill, page)


def main() -> None:
    for page in PAGES:
        (ROOT / page).write_text(filled((ROOT / page).read_text()))


if __name__ == "__main__":
    main()
