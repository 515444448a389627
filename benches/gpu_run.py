"""`make gpu`: build, the GPU tests in order of risk, then the GPU benches, within twelve minutes.

    python benches/gpu_run.py [--python FILE] [--out FOLDER] [--minutes M] [--build COMMAND]

Each stage is a process with a time limit and a log of its own in FOLDER ($OUT, else build/gpu);
`summary.json` there is written anew whenever a stage starts or ends, so a run that is cut off
leaves what it has. A stage that fails stops none but those that cannot do without it.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MINUTES = 12.0
AT_ONCE = 4  # processes that share the GPU in tests; benches have it to themselves

# in order of risk: files of tests/ops, or folders of tests, and the seconds each may take
TESTS = {
    "kd": 60, "attention_map": 90, "int8_ops": 60, "kd_gpu": 60, "attention_map_gpu": 60,
    "int8_ops_gpu": 60, "row_loss": 60, "kd_topk": 60, "rkd": 60, "dist": 60, "contract": 120,
    "kd_autograd": 60, "attention_map_autograd": 60, "row_loss_ops": 60, "feature_losses": 90,
    "kd_triton": 120, "attention_map_triton": 120, "row_loss_triton": 120, "int8_ops_triton": 120,
    "logit_relations": 60, "relation": 60, "deit": 60, "fused_linear_kd": 60, "nn": 60,
    "kd_backends": 120, "row_loss_backends": 120,
}  # fmt: skip
BENCHES = {"kd": 180, "attention_map": 90, "int8_ops": 90, "row_loss": 60, "loop": 60, "rkd": 30,
           "kd_topk": 30, "dist": 30}  # fmt: skip


@dataclass
class Stage:
    """A command, the seconds it may take, and how it went."""

    name: str
    command: list[str]
    limit: float
    needed: bool = False  # without it, nothing after it can run
    alone: bool = True  # nothing else runs beside it
    status: str = "not run"
    seconds: float = 0.0
    code: int | None = None
    environment: dict[str, str] = field(default_factory=dict)


class Run:
    """Stages in their order, until all are done or the time is over."""

    def __init__(self, stages: list[Stage], out: Path, seconds: float) -> None:
        self.stages, self.out = stages, out
        self.start = time.monotonic()
        self.end = self.start + seconds
        self.lock = threading.Lock()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.stopped = False
        out.mkdir(parents=True, exist_ok=True)
        self.write()

    def write(self) -> None:
        """The summary, whole at any moment."""
        rows = [
            {k: getattr(stage, k) for k in ("name", "status", "seconds", "limit", "code")}
            for stage in self.stages
        ]
        taken = round(time.monotonic() - self.start, 1)
        text = json.dumps({"seconds": taken, "stages": rows}, indent=1)
        part = self.out / "summary.part"
        part.write_text(text + "\n")
        part.replace(self.out / "summary.json")

    def note(self, stage: Stage, status: str) -> None:
        with self.lock:
            stage.status = status
            self.write()

    def do(self, stage: Stage) -> None:
        limit = min(stage.limit, self.end - time.monotonic())
        if self.stopped or limit <= 0:
            return self.note(stage, "no time left" if limit <= 0 else "not run")
        self.note(stage, "running")
        began = time.monotonic()
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **stage.environment}
        with open(self.out / f"{stage.name}.log", "wb") as log:
            # a session of its own, so that its children end with it
            process = subprocess.Popen(
                stage.command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                cwd=ROOT, env=environment, start_new_session=True,
            )  # fmt: skip
            with self.lock:
                self.processes[stage.name] = process
            if self.stopped:  # before it was there to be ended
                kill(process)
            try:
                stage.code = process.wait(limit)
                status = "passed" if stage.code == 0 else "failed"
            except subprocess.TimeoutExpired:
                status = "out of time"
            kill(process)
            with self.lock:
                del self.processes[stage.name]
        # pytest's 5: of such tests, there are none
        status = "nothing to do" if stage.code == 5 else status
        stage.seconds = round(time.monotonic() - began, 1)
        self.note(stage, "cut off" if self.stopped else status)
        print(f"{stage.status:14} {stage.seconds:6.1f} s  {stage.name}", flush=True)

    def all(self) -> bool:
        """Whether all that ran passed, and all ran."""
        waiting = list(self.stages)
        while waiting:
            together = [waiting.pop(0)]
            while not together[0].alone and waiting and not waiting[0].alone:
                together.append(waiting.pop(0))
            with ThreadPoolExecutor(AT_ONCE) as pool:
                list(pool.map(self.do, together))
            if together[0].needed and together[0].status != "passed":
                break
        self.write()
        return all(stage.status in ("passed", "nothing to do") for stage in self.stages)

    def stop(self, *_: Any) -> None:
        """Ends what runs; what has ended keeps its result."""
        self.stopped = True
        for process in list(self.processes.values()):
            kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def stages_of(python: str, scripts: Path, build: str, out: Path) -> list[Stage]:
    pytest = [str(scripts / "pytest"), "-p", "no:cacheprovider", "-m", "gpu"]
    about = "import torch; print(torch.__version__, torch.cuda.get_device_name())"
    found = [Stage("build", shlex.split(build), 420, needed=True)] if build else []
    found += [Stage("gpu", [python, "-c", about], 60, needed=True)]
    found += [Stage("package", [str(scripts / "vitkd"), "show"], 60)]
    for stem, limit in TESTS.items():
        file = ROOT / f"tests/ops/test_{stem}.py"
        command = [*pytest, str(file), "-v", "--tb=short", f"--junitxml={out}/test-{stem}.xml"]
        found.append(Stage(f"test-{stem}", command, limit, alone=False))
    for stem, limit in BENCHES.items():
        file = ROOT / f"benches/bench_{stem}.py"
        command = [*pytest, str(file), f"--benchmark-json={out}/bench-{stem}.json"]
        found.append(Stage(f"bench-{stem}", command, limit))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--scripts", type=Path, help="pytest's folder, if not that of PYTHON")
    default = Path(os.environ.get("OUT") or ROOT / "build/gpu")
    parser.add_argument("--out", type=Path, default=default)
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--build", default="", help="what builds and installs the package")
    arguments = parser.parse_args()
    out = arguments.out.absolute()
    scripts = (arguments.scripts or Path(arguments.python).parent).absolute()
    stages = stages_of(arguments.python, scripts, arguments.build, out)
    run = Run(stages, out, 60 * arguments.minutes)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, run.stop)
    good = run.all()
    print(f"make gpu: {'all passed' if good else 'not all passed'}; see {out}/summary.json")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
