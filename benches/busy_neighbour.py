"""Steps of the digits recipe with one thread, with all, and as the loop chooses, images/s.

Each by itself on the machine, then beside a process that computes without end on one CPU. What is
chosen begins anew each time, so its trials count. `python benches/busy_neighbour.py [seconds]`
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from vitkd_fast import models
from vitkd_fast.distill import config, sources
from vitkd_fast.distill.loop import Trainer
from vitkd_fast.distill.runtime import Runtime
from vitkd_fast.distill.task import DistillationTask
from vitkd_fast.distill.threads import Threads, candidates


def main(seconds: float) -> None:
    recipe = config.load("digits")
    counts = candidates(None)
    if not counts:
        raise SystemExit("more than one CPU is needed, and OMP_NUM_THREADS unset")
    runtime, splits = Runtime.of(recipe), sources.open_data(recipe.data)
    student, teacher = (
        models.create(x.model, num_classes=10, image_size=32, options=x.options)
        for x in (recipe.student, recipe.teacher)
    )
    task = DistillationTask.create(recipe, student, teacher, runtime)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            recipe, task, splits, Path(folder) / "run", seed=0, save_model=lambda *_: None
        )
    task.train()
    batches = itertools.chain.from_iterable(map(trainer.loader.epoch, itertools.count()))

    def rate(threads: Threads) -> float:
        trainer.update(batches)
        begun, steps = time.perf_counter(), 0
        while (took := time.perf_counter() - begun) < seconds:
            with threads:
                trainer.update(batches)
            steps += 1
        return steps * recipe.data.batch_size / took

    print(f"load average {os.getloadavg()[0]:.2f}, {counts[0]} threads at most")
    for neighbours in (0, 1):
        running = [
            subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(neighbours)
        ]
        try:
            found = {}
            for name, of in {"1 thread": (1,), "all": counts[:1], "chosen": counts}.items():
                torch.set_num_threads(of[0])
                found[name] = rate(Threads(of))
        finally:
            for process in running:
                process.kill()
                process.wait()
        best = max(found["1 thread"], found["all"])
        print(
            f"{neighbours} neighbours: "
            + ", ".join(f"{name} {x:.0f} images/s" for name, x in found.items())
            + f"; chosen / better of the two: {found['chosen'] / best:.0%}"
        )


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 30)
