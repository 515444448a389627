"""ThreadTeam on machines that reorder memory: every interleaving that C++ allows, in a model.

csrc/int8/thread_team.cpp itself runs on the atomics and threads of interleavings.h.
"""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "csrc/int8/thread_team.cpp"
WEAKER = {"acquire": ["relaxed"], "release": ["relaxed"], "acq_rel": ["acquire", "release"]}


def weakened() -> list[tuple[int, str]]:
    """A line and a weaker order than there, or a line whose notify_all is left out."""
    found = []
    for number, line in enumerate(SOURCE.read_text().splitlines(), 1):
        if match := re.search("memory_order_(acquire|release|acq_rel)", line):
            found += [(number, order) for order in WEAKER[match[1]]]
        elif "notify_all" in line:
            found.append((number, "no notify_all"))
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("model") / "thread_team"
    folder = ROOT / "tests/support/cpp"
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}"]
    command = ["g++", *flags, folder / "thread_team_model.cpp", "-o", program]
    subprocess.run(command, check=True)
    return program


def run(*command: object) -> tuple[int, str]:
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    return result.returncode, result.stdout


@pytest.mark.parametrize("threads", [2, 3])
def test_every_interleaving(model: Path, threads: int) -> None:
    """No data race, no thread that waits for ever, and every sum as it should be."""
    code, out = run(model, threads)
    assert code == 0, out
    assert int(re.fullmatch(r"(\d+) executions, no error\n", out)[1]) > 10_000


@pytest.mark.parametrize(("line", "order"), weakened(), ids=str)
def test_no_order_is_stronger_than_it_must_be(model: Path, line: int, order: str) -> None:
    """Each that is weakened gives an execution with an error."""
    code, out = run(model, 2, line, order)
    what = "no thread can go on" if order == "no notify_all" else "a data race"
    assert code == 1 and f"error: {what}" in out, out
