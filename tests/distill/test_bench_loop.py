"""Where a step's time goes: the parts are the step, and what takes time is seen where it is."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from support import cache_tools
from vitkd_fast import models
from vitkd_fast.distill import bench_loop, config, sources
from vitkd_fast.distill.cache.read import CachedTeacher
from vitkd_fast.distill.loop import Trainer
from vitkd_fast.distill.runtime import Runtime
from vitkd_fast.distill.task import DistillationTask

pytestmark = pytest.mark.usefixtures("one_thread")

PARTS = {*bench_loop.PARTS, "idle"}


@pytest.mark.parametrize(
    "given",
    [
        ["digits"],
        # a student with taps, several terms, and what they learn
        ["digits-attention", "optimizer.accumulate=2", "optimizer.ema_decay=0.9"],
        ["digits", "data.workers=1"],
        pytest.param(["digits", "run.device=cuda"], marks=pytest.mark.gpu),
    ],
    ids=" ".join,
)
def test_parts_are_the_step(given: list[str]) -> None:
    found = bench_loop.bench_loop(config.load(given[0], given[1:]), steps=3)
    cuda = "run.device=cuda" in given
    assert set(found.parts) == PARTS - {"idle"} if cuda else PARTS
    # the CPU clock of a busy machine runs up to some percent ahead of the wall's
    assert sum(found.parts.values()) == pytest.approx(found.step, rel=0.1)
    assert all(ms > 0 for name, ms in found.parts.items() if name != "idle")
    assert found.images == (64 if "optimizer.accumulate=2" in given else 32)
    assert (found.overlapped is not None) == cuda
    assert found.images_per_s == pytest.approx(
        1e3 * found.images / (found.overlapped if cuda else found.step)
    )


def test_a_cached_teacher_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = cache_tools.save_teacher(tmp_path / "teacher.safetensors")
    cache_tools.make(file, tmp_path / "cache", monkeypatch=monkeypatch)
    given = cache_tools.config(file, "run.epochs=2", cache=tmp_path / "cache")
    read = CachedTeacher.outputs
    monkeypatch.setattr(CachedTeacher, "outputs", lambda *given: (spin(0.1), read(*given))[1])
    found = bench_loop.bench_loop(given, 2)
    # the CPU clock of a busy machine runs up to some percent ahead of the wall's
    assert sum(found.parts.values()) == pytest.approx(found.step, rel=0.1)
    assert found.parts["teacher"] >= 100
    assert all(0 < ms < 100 for name, ms in found.parts.items() if name not in ("teacher", "idle"))


def spin(seconds: float) -> None:
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


class Slow(nn.Module):
    """A layer that takes seconds in the forward pass or the backward one."""

    def __init__(self, forward: Callable[[], None], backward: Callable[[], None]) -> None:
        super().__init__()
        self.passes = forward, backward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes[0]()
        if x.requires_grad:
            x.register_hook(lambda _: self.passes[1]())
        return x


def nothing() -> None: ...


def trainer_with(tmp_path: Path, wait: Callable[[], None], where: str) -> Trainer:
    """Of small models, with something that takes time in one of a step's parts."""
    recipe = config.load("digits", ["data.batch_size=4", "run.threads=1"])
    splits = sources.open_data(recipe.data)
    teacher, student = (
        models.create(name, num_classes=10, image_size=32, options=options)
        for name, options in (("mobilenetv2_035", {}), (recipe.student.model, {}))
    )
    if where == "teacher":
        teacher.classifier = nn.Sequential(Slow(wait, nothing), teacher.classifier)
    if where in ("student forward", "backward"):
        passes = (wait, nothing) if where == "student forward" else (nothing, wait)
        student.classifier = nn.Sequential(Slow(*passes), student.classifier)
    runtime = Runtime.of(recipe)
    task = DistillationTask.create(recipe, student, teacher, runtime)
    trainer = Trainer(
        recipe, task, splits, tmp_path / "run", seed=0, save_model=lambda path, model: None
    )
    if where == "optimiser":
        step = trainer.scheduler.step_update
        trainer.scheduler.step_update = lambda at: (wait(), step(at))
    if where == "loss":
        term = task.trainable_module.terms["kd"]
        task.trainable_module.terms["kd"] = lambda *given: (wait(), term(*given))[1]
    if where == "data":
        epoch = trainer.loader.epoch
        trainer.loader.epoch = lambda at=0: (wait() or batch for batch in epoch(at))
    return trainer


@pytest.mark.parametrize("where", bench_loop.PARTS)
def test_time_is_seen_where_it_goes(where: str, tmp_path: Path) -> None:
    """CPU time is the part's, whatever else runs on this machine."""
    trainer = trainer_with(tmp_path, lambda: spin(0.1), where)
    found = bench_loop.measure(trainer, 2).parts
    assert found[where] >= 100
    assert all(ms < 100 for name, ms in found.items() if name not in (where, "idle"))


def test_sleep_is_idle(tmp_path: Path) -> None:
    found = bench_loop.measure(trainer_with(tmp_path, lambda: time.sleep(0.2), "teacher"), 2).parts
    assert found["idle"] >= 199
    assert found["teacher"] < 100


def test_a_trainer_is_as_before(tmp_path: Path) -> None:
    """A run has no stopwatch."""
    trainer = trainer_with(tmp_path, nothing, "")
    owners = trainer, trainer.task, trainer.task.trainable_module, trainer.meter
    before = [set(vars(owner)) for owner in owners]
    bench_loop.measure(trainer, 1)
    assert [set(vars(owner)) for owner in owners] == before


def test_command(vitkd) -> None:
    given = "bench-loop", "digits", "data.batch_size=8", "--steps=1"
    out = vitkd(*given).out
    assert "8 images a step, cpu, 1 threads, 1 steps" in out
    assert all(f"\n{part} " in out for part in (*PARTS, "step"))
    assert "images/s" in out
    found = json.loads(vitkd(*given, "--json").out)
    assert set(found["parts"]) == PARTS
    assert found["images_per_s"] == pytest.approx(8e3 / found["step"])
    assert vitkd("bench-loop", "digits", "--steps=0").code == 2
    assert vitkd("bench-loop", "digitz").code == 2
