"""Training for int8, and looks at it, on two ranks: those of one process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

pytest.importorskip("timm")

from support.int8_graphs import random_images
from support.loop_tools import splits, student, teacher, trainer
from support.process_tools import run_ranks
from vitkd_fast import int8, models
from vitkd_fast.distill import aware, logger, loop
from vitkd_fast.distill.config import Config, load
from vitkd_fast.distill.runtime import Runtime
from vitkd_fast.distill.task import DistillationTask
from vitkd_fast.distill.watch import Watch

RUN = [
    "student={model: mobilenetv2_035, checkpoint: a}", "run.epochs=1", "run.max_steps=3",
    "run.log_every=1", "run.precision=float32", "run.threads=1", "losses={kd: {}}",
    "optimizer={lr: 1e-4, options: {eps: 1e-3}}", "int8.aware={start: 0, freeze_bn: 0}",
]  # fmt: skip
WATCHED = ["optimizer.accumulate=1", "run.max_steps=1", "int8.watch=1", "int8.watch_images=10"]


def begin() -> nn.Module:
    """A student with statistics of images, as a trained one has."""
    made = student()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean of all batches
    images = torch.from_numpy(random_images(1, (64, 32, 32, 3))).permute(0, 3, 1, 2)
    with torch.no_grad():
        models.predictor(made.train())(images)
    return made.eval()


def train(folder: Path, batch: int) -> int8.QuantizationAware:
    """As an experiment does, with batch norms that are frozen from the start."""
    chosen: Config = load("digits", [*RUN, f"data.batch_size={batch}"])
    runtime, made = Runtime.of(chosen), begin()
    images = torch.from_numpy(random_images(0, (16, 32, 32, 3)))
    options = {"pixels": models.Pixels.of(made), "classes": list("0123456789"),
               "multilabel": False, "calibration": "mse"}  # fmt: skip
    module = aware.module(chosen, made, images if not runtime.rank else None, runtime, **options)
    task = DistillationTask.create(chosen, module, teacher(), runtime)
    run = loop.Trainer(chosen, task, splits(), folder, seed=0, save_model=lambda *_: None)
    trained = run.run()
    assert isinstance(trained, int8.QuantizationAware)
    return trained


def _rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/group", rank=rank, world_size=2)
    train(folder / "two", 8).save(folder / f"{rank}.int8.safetensors")
    trainer(folder / "watched", ["data.batch_size=8", *WATCHED]).run()
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_thread")
def test_two_ranks_are_one_process_with_the_doubled_batch(tmp_path: Path) -> None:
    run_ranks(__file__, tmp_path, seconds=600)
    train(tmp_path / "one", 16)
    one, two = (
        [row["loss"] for row in logger.read(tmp_path / name) if row["kind"] == "train"]
        for name in ("one", "two")
    )
    assert len({*one}) == len(one) == 3
    # a sum that is rounded otherwise may move a weight by a level of 127
    assert two[0] == pytest.approx(one[0], rel=1e-6)
    assert two[1] == pytest.approx(one[1], rel=1e-4)
    assert two[2] == pytest.approx(one[2], rel=2e-2)
    assert abs(one[1] / one[0] - 1) > 1e-2  # by the first update
    # what either rank would run is the same, to the byte
    files = [(tmp_path / f"{rank}.int8.safetensors").read_bytes() for rank in (0, 1)]
    assert files[0] == files[1]
    # the first rank looked, at the images of one process
    [found] = [row for row in logger.read(tmp_path / "watched") if row["kind"] == "int8"]
    watch = Watch(load("digits", WATCHED), splits())
    again = watch(models.load(tmp_path / "watched" / "last.safetensors").model.eval())
    assert found["agreement"] == again["agreement"]
    assert found["sqnr"] == pytest.approx(again["sqnr"], abs=0.01)  # of another memory format


if __name__ == "__main__":
    _rank(int(sys.argv[1]), Path(sys.argv[2]))
