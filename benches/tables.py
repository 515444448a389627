"""Writes README's tables from the committed results: `python benches/tables.py` (make bench does).

Each table stands between `<!-- table: FILE GROUP -->` and `<!-- end -->` in README.md; FILE is a
result under benches/results and GROUP the beginning of its benches' names.
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
MARK = re.compile(r"(<!-- table: (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(results: dict, group: str) -> str:
    """Markdown: a line per bench, a column per contender, its time over ours.

    A bench with `best` has a column per key of that, whose value is the contender's name.
    """
    benches = [b for b in results["benchmarks"] if b["name"].startswith(group)]
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
    rows.insert(1, ["---"] * len(rows[0]))
    cpu = results["machine_info"]["cpu"]
    device = benches[0]["extra_info"]["device"]
    what = cpu.get("brand_raw", "?") if device.startswith("cpu") else device
    note = f"{what}, {device}, torch {benches[0]['extra_info']['torch']}; time of each over ours.\n"
    return note + "\n" + "".join("| " + " | ".join(row) + " |\n" for row in rows)


def main() -> None:
    readme = ROOT / "README.md"

    def filled(match: re.Match) -> str:
        results = ROOT / "benches" / "results" / match[2]
        body = table(json.loads(results.read_text()), match[3])
        return f"{match[1]}{body}{match[4]}"

    readme.write_text(MARK.sub(filled, readme.read_text()))


if __name__ == "__main__":
    main()
