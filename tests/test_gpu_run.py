"""`make gpu` without a GPU: its stages, their limits, and what a run that is cut off leaves."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).parents[1] / "benches/gpu_run.py"
spec = importlib.util.spec_from_file_location("gpu_run", FILE)
assert spec and spec.loader
gpu_run = sys.modules["gpu_run"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu_run)


def stage(name: str, script: str, limit: float = 20, **more: Any) -> Any:
    return gpu_run.Stage(name, ["sh", "-c", script], limit, **more)


def summary(out: Path) -> dict[str, str]:
    stages = json.loads((out / "summary.json").read_text())["stages"]
    return {x["name"]: x["status"] for x in stages}


def test_a_failure_stops_none_but_what_needs_it(tmp_path: Path) -> None:
    stages = [
        stage("build", "echo built", needed=True), stage("bad", "echo wrong; exit 3", alone=False),
        stage("slow", "echo begun; sleep 30 & wait", limit=0.5, alone=False),
        stage("none", "exit 5", alone=False), stage("bench", "echo 7 us"),
    ]  # fmt: skip
    began = time.monotonic()
    assert not gpu_run.Run(stages, tmp_path, 60).all()
    assert time.monotonic() - began < 20
    assert summary(tmp_path) == {
        "build": "passed", "bad": "failed", "slow": "out of time", "none": "nothing to do",
        "bench": "passed",
    }  # fmt: skip
    logs = {x.name: (tmp_path / f"{x.name}.log").read_text() for x in stages}
    assert logs["bad"] == "wrong\n"
    assert logs["slow"] == "begun\n"  # what it wrote until then
    assert logs["bench"] == "7 us\n"


def test_nothing_runs_without_what_is_needed(tmp_path: Path) -> None:
    stages = [stage("build", "exit 1", needed=True), stage("test", "echo", alone=False)]
    assert not gpu_run.Run(stages, tmp_path, 60).all()
    assert summary(tmp_path) == {"build": "failed", "test": "not run"}


def test_all_stages_together_have_a_limit(tmp_path: Path) -> None:
    stages = [stage("first", "sleep 30"), stage("second", "echo")]
    assert not gpu_run.Run(stages, tmp_path, 0.5).all()
    assert summary(tmp_path) == {"first": "out of time", "second": "no time left"}


def test_all_good(tmp_path: Path) -> None:
    stages = [stage("test", "echo", alone=False), stage("other", "exit 5", alone=False)]
    assert gpu_run.Run(stages, tmp_path, 60).all()


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_cut_off_leaves_its_part(end: signal.Signals, tmp_path: Path) -> None:
    code = f"""if True:
        import importlib.util, signal, sys
        from pathlib import Path
        spec = importlib.util.spec_from_file_location("gpu_run", {str(FILE)!r})
        gpu_run = sys.modules["gpu_run"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(gpu_run)
        stages = [
            gpu_run.Stage("test", ["echo", "done"], 20),
            gpu_run.Stage("bench", ["sh", "-c", "echo $$; sleep 60"], 60),
            gpu_run.Stage("more", ["echo"], 20),
        ]
        run = gpu_run.Run(stages, Path({str(tmp_path)!r}), 60)
        signal.signal(signal.SIGTERM, run.stop)
        run.all()
    """
    process = subprocess.Popen([sys.executable, "-c", code])
    log = tmp_path / "bench.log"
    until = time.monotonic() + 60
    while not (log.exists() and log.read_text().endswith("\n")) and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(end)
    process.wait(30)
    left = "running" if end == signal.SIGKILL else "cut off"
    assert summary(tmp_path) == {"test": "passed", "bench": left, "more": "not run"}
    assert (tmp_path / "test.log").read_text() == "done\n"
    child = int(log.read_text())
    if end == signal.SIGTERM:  # none of its processes is left
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)
    else:
        os.killpg(child, signal.SIGKILL)


def test_every_stage_has_its_file() -> None:
    stages = gpu_run.stages_of("python", Path("bin"), "make install", Path("out"))
    files = [Path(x) for s in stages for x in s.command if x.endswith(".py")]
    assert len(files) == len(gpu_run.TESTS) + len(gpu_run.BENCHES)
    assert [str(x) for x in files if not x.exists()] == []
    assert sum(s.needed for s in stages) == 2
    assert stages[0].command == ["make", "install"]


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    command = [sys.executable, str(FILE), "--out", str(tmp_path)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 1
    assert "not all passed" in result.stdout
    found = summary(tmp_path)
    assert (found.pop("gpu"), set(found.values())) == ("failed", {"not run"})
