"""An epoch of digits with each term of a run's loss: what a step costs, and that the term falls.

The recipe `digits`, one thread, CPU time, an untrained teacher of four blocks; each term is alone,
with the options that these 32x32 pixels ask for. One whose mean over the last eighth of the epoch
is not below that over the first is refused, as one that is not finite.
"""

from __future__ import annotations

import itertools
import statistics
import time

import pytest
import torch

pytest.importorskip("timm.task")
pytest.importorskip("pydantic")
pytest.importorskip("torchmetrics")

from vitkd_fast import models
from vitkd_fast.distill import config, sources
from vitkd_fast.distill.loop import Trainer
from vitkd_fast.distill.losses import Losses
from vitkd_fast.distill.runtime import Runtime
from vitkd_fast.distill.task import DistillationTask

OPTIONS = {
    "attention": {"stride": 8, "block": -1},
    "ofa": {"strides": [4, 8, 16, 32]},
    **{name: {"stride": 8} for name in ("at", "feature", "nst", "relation", "sp", "mmd")},
    **{name: {"stride": 8} for name in ("features", "wkd_feature", "sliced_wasserstein")},
    "wkd_logit": {"target_weight": 0.0},
}
# without a teacher, or of classes that do not exclude one another
OTHERS = ("ce", "binary_kd", "bce")


def trainer(name: str, folder) -> Trainer:
    recipe = config.load("digits", ["run.epochs=1", "run.device=cpu", "run.precision=float32"])
    values = recipe.model_dump() | {"losses": {name: OPTIONS.get(name, {}), "ce": {"weight": 0.0}}}
    recipe = config.Config.model_validate(values)
    torch.manual_seed(0)
    teacher, student = (
        models.create(part.model, num_classes=10, image_size=32, options=part.options)
        for part in (recipe.teacher, recipe.student)
    )
    task = DistillationTask.create(recipe, student, teacher, Runtime.of(recipe))
    splits = sources.open_data(recipe.data)
    return Trainer(recipe, task, splits, folder, seed=0, save_model=lambda path, model: None)


def epoch(made: Trainer) -> tuple[list[float], list[list[float]]]:
    """Seconds of each step, and its terms."""
    made.forward.train()
    batches = itertools.chain.from_iterable(map(made.loader.epoch, itertools.count()))
    seconds, terms = [], []
    for _ in range(made.steps_per_epoch):
        made.meter.reset()
        start = time.thread_time()
        made.update(batches)
        seconds.append(time.thread_time() - start)
        terms.append(made.meter.sums.tolist())
    return seconds, terms


@pytest.mark.parametrize("name", [x for x in Losses.model_fields if x not in OTHERS])
def bench_epoch(benchmark, capsys, tmp_path, name):
    made = trainer(name, tmp_path)
    seconds, terms = epoch(made)
    place = [*made.task.trainable_module.terms].index(name)
    course = [step[place] for step in terms]
    eighth = len(course) // 8
    first, last = (statistics.mean(part) for part in (course[:eighth], course[-eighth:]))
    assert torch.tensor(course).isfinite().all(), name
    assert last < first, f"{name}: {first} in the first eighth of the epoch, {last} in the last"
    step = statistics.median(seconds) * 1e3
    benchmark.extra_info.update(ms_per_step=step, first=first, last=last)
    with capsys.disabled():
        print(f"\n  {name:20} {step:7.1f} ms a step; {first:.4g} to {last:.4g}")
    benchmark.pedantic(lambda: None, rounds=1)
