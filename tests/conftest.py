"""What every test shares: poisoned memory, fixed seeds, and where the GPU and the data are."""

import os
import random
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from vitkd_fast import _timing

# helpers that compare: a failure there shows its numbers, too
pytest.register_assert_rewrite("support")

# times are looked at, never judged; a run with its report measures eight
_timing._WARM_UP, _timing._ENOUGH, _timing._LIMIT = 0.02, 0.1, 0.5

# where only the losses' dependencies are, as on a bare machine with a GPU, the loop is left out
_EXTRA = "jinja2 matplotlib pydantic rich scipy sklearn tensorboard timm torchmetrics yaml".split()
_MISSING = [name for name in _EXTRA if not find_spec(name)]
_LOOP = [
    "audit",
    "distill",
    "int8/test_cli.py",
    "search",
    "test_examples.py",
    "test_images.py",
    "test_wheel.py",
]
collect_ignore = _LOOP if _MISSING else []


def pytest_report_header() -> list[str]:
    lines = []
    if _MISSING:
        lines += [
            f"left out: {', '.join(collect_ignore)}: no {', '.join(_MISSING)} (extra: distill)"
        ]
    if not torch.cuda.is_available():
        lines += ["left out: tests that need a GPU: torch.cuda.is_available() is False"]
    return lines


def deselect(config: pytest.Config, items: list[pytest.Item], left_out: Collection[str]) -> None:
    """Leaves tests out, by their ids: to skip one takes 3 ms, and a GPU has 9,000."""
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in left_out])
    items[:] = [item for item in items if item.nodeid not in left_out]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if (one_in := int(os.environ.get("VITKD_SAMPLE", 1))) > 1:  # see support/process_tools.py
        isa = os.environ.get("VITKD_FAST_ISA", "")  # each runs others
        names = [x.nodeid for x in items]
        deselect(config, items, {x for x in names if zlib.crc32((isa + x).encode()) % one_in})
    if not torch.cuda.is_available():
        deselect(config, items, {x.nodeid for x in items if "gpu" in x.keywords})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What was skipped, and why: a line for each reason."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    if reasons:
        terminalreporter.section("skipped")
    for reason, count in reasons.most_common():
        terminalreporter.line(f"{count:6} {reason}")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Of a marker with keywords, only the forms that have the values named there keep it."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    item.own_markers[:] = [
        mark
        for mark in item.own_markers
        if mark.name not in ("every_isa", "emulated", "interpreted")
        or all(params[name] in values for name, values in mark.kwargs.items())
    ]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fills new tensors with NaN (integers: the maximum), so that unwritten outputs show."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    # warn_only: torch's own operations may be nondeterministic, ours are compared bit by bit
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For models so small that threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Result(NamedTuple):
    """Of a command: its exit code, and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def compiled() -> Iterator[Callable[..., Callable[..., Any]]]:
    """torch.compile, of one graph, that has seen nothing yet."""
    torch._dynamo.reset()
    yield partial(torch.compile, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()


@pytest.fixture
def vitkd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """The command line, in this process."""
    from vitkd_fast import cli

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["vitkd", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0  # type: ignore[assignment]
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder with the development data; skips where VITKD_DATA names none."""
    if not (folder := os.environ.get("VITKD_DATA")):
        pytest.skip("VITKD_DATA is not set: it names the folder with the development data")
    return Path(folder)


@pytest.fixture(scope="session")
def emulated_amx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library with attention_map's AMX kernels on the emulator; skips without AVX-512."""
    from support.amx_tools import build
    from vitkd_fast import int8

    if "avx512" not in int8.isa():
        pytest.skip(f"the emulator of AMX needs AVX-512; this CPU has {', '.join(int8.isa())}")
    return build(tmp_path_factory.mktemp("emulated_amx"))
