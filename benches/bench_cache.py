"""An epoch of the student with a cached teacher, with none, and with one that is asked.

With a cache an epoch should cost what it costs without a teacher: what is added is a gather of rows
from memory-mapped files, a checksum a batch, and the loss. The recipes `digits` and `cifar10`,
without mixing, on one thread that decodes and augments too; VITKD_DATA names the folder that holds
cifar10-train.zip. `10 classes` keeps all, for the same loss as online; `4 classes` is top-k.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
import zipfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("timm.task")
pytest.importorskip("pydantic")
pytest.importorskip("torchmetrics")

from vitkd_fast import models
from vitkd_fast.distill import config, preflight, sources
from vitkd_fast.distill.cache.build import Options, build
from vitkd_fast.distill.loop import Trainer
from vitkd_fast.distill.runtime import Runtime
from vitkd_fast.distill.task import DistillationTask

PLAIN = ["augmentation.mixup=0.0", "augmentation.cutmix=0.0", "data.workers=0", "run.device=cpu"]


def images(recipe: str, root: Path) -> list[str]:
    if recipe == "digits":
        return []
    if not (folder := os.environ.get("VITKD_DATA")):
        pytest.skip("VITKD_DATA is not set: it names the folder with cifar10-train.zip")
    with zipfile.ZipFile(Path(folder) / "cifar10-train.zip") as archive:
        archive.extractall(root, [x for x in archive.namelist() if x[-8:-4] < "0200"])
    return [f"data.train={root}/train"]


@pytest.mark.parametrize("recipe", ["digits", "cifar10"])
def bench_epoch(race, benchmark, recipe, tmp_path, capsys):
    overrides = [*PLAIN, *images(recipe, tmp_path / "images")]
    untrained = config.load(recipe, overrides)
    torch.manual_seed(0)
    section, file = untrained.teacher, tmp_path / "teacher.safetensors"
    teacher = models.create(
        section.model, num_classes=10, image_size=untrained.data.image_size, options=section.options
    )
    splits = sources.open_data(untrained.data)
    models.save(
        file, teacher, name=section.model, options=section.options, num_classes=10,
        pixels=models.Pixels.of(teacher), classes=splits.classes,
    )  # fmt: skip

    def load(cache: str = "") -> config.Config:
        kd = "losses.kd={temperature: 4, ce_weight: 0.5}"
        return config.load(recipe, [*overrides, f"teacher={{model: {file}, cache: '{cache}'}}", kd])

    for name, topk in (("10 classes", None), ("4 classes", 4)):
        build(load(), tmp_path / name, Options(1, topk))

    def trainer(name: str, whole: config.Config) -> Trainer:
        cache, _ = preflight.open_cache(whole, splits)
        teachers = [] if cache else preflight.create_teachers(whole, splits.classes)
        if name.startswith("no teacher"):
            whole, teachers = whole.for_baseline(), []
        student = preflight.create_student(whole, splits.classes)
        task = DistillationTask.create(whole, student, teachers, Runtime.of(whole), cache)
        made = Trainer(whole, task, splits, tmp_path / f"run {name}", seed=0, save_model=print)
        made.forward.train()
        return made

    trainers = {
        "vitkd_fast": trainer("vitkd_fast", load(str(tmp_path / "10 classes"))),
        "4 classes": trainer("4 classes", load(str(tmp_path / "4 classes"))),
        "no teacher": trainer("no teacher", load()),
        "no teacher, again": trainer("no teacher, again", load()),  # what chance does
        "teacher asked": trainer("teacher asked", load()),
    }
    batches = {
        name: itertools.chain.from_iterable(map(made.loader.epoch, itertools.count()))
        for name, made in trainers.items()
    }
    found = {}

    def check(name, step):
        step()
        found[name] = trainers[name].meter.sums.sum()
        if name == "teacher asked" and Runtime.of(load()).teacher_dtype == torch.float32:
            torch.testing.assert_close(found["vitkd_fast"], found[name], rtol=1e-3, atol=0)

    seconds = {name: [] for name in trainers}

    def timed(step) -> float:
        start = time.thread_time()
        step()
        taken = time.thread_time() - start
        seconds[next(name for name, x in steps.items() if x is step)].append(taken)
        return taken

    steps = {name: lambda name=name: trainers[name].update(batches[name]) for name in trainers}
    each = trainers["no teacher"].steps_per_epoch
    race(steps, check=check, rounds=each * (6 if recipe == "digits" else 3), timed=timed)
    # of steps that were taken one after another: a busy minute hits both alike
    pairs = seconds["no teacher"]
    for name, values in seconds.items():
        ratios = [x / y for x, y in zip(values[2:], pairs[2:], strict=False)]
        benchmark.extra_info[f"{name} / no teacher"] = statistics.median(ratios)
        error = 1.25 * statistics.stdev(ratios) / len(ratios) ** 0.5  # of a median
        with capsys.disabled():
            print(f"  {name} / no teacher {statistics.median(ratios):.3f}, s.e. {error:.3f}")
