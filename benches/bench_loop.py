"""A step of the loop beside the same step by timm's LogitDistillationTask: the CIFAR-10 recipe.

`timm, fused task` is timm's step with FusedLogitDistillationTask in the runtime of that task.

On a CPU an image is read by the cores that the models run on; `in memory` is a step without that.
Both sides get their own batches from the same loader, the same seeds, weights, memory format,
mixing and optimiser. In float32 both compute the same; `auto` is what the loop chooses by itself:
on a CPU that is fast in it a teacher in bfloat16, which timm's step would need by hand. `models
alone` is the teacher's forward and the student's forward and backward: the rest of a step is what
the loop costs. VITKD_DATA names the folder that holds cifar10-train.zip; without it the images
are digits.
"""

from __future__ import annotations

import copy
import itertools
import os
import zipfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("timm.task")
pytest.importorskip("pydantic")
pytest.importorskip("torchmetrics")

from timm.data.mixup import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.task import LogitDistillationTask
from torch import nn

from vitkd_fast import models
from vitkd_fast.distill import config, data, sources
from vitkd_fast.distill.loop import Trainer
from vitkd_fast.distill.runtime import Runtime
from vitkd_fast.distill.task import DistillationTask
from vitkd_fast.timm_task import FusedLogitDistillationTask

T, CE_WEIGHT = 4.0, 0.5
CHANNELS_LAST = torch.channels_last


@pytest.fixture(scope="session")
def image_folders(tmp_path_factory) -> list[str]:
    """Overrides that name the image_folders: the first 400 of each of CIFAR-10's classes."""
    if not (folder := os.environ.get("VITKD_DATA")):
        return ["data.dataset=digits"]
    root = tmp_path_factory.mktemp("cifar10")
    with zipfile.ZipFile(Path(folder) / "cifar10-train.zip") as archive:
        archive.extractall(root, [x for x in archive.namelist() if x[-8:-4] < "0400"])
    return [f"data.train={root}/train"]


@pytest.fixture
def threads(device):
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


def endless(loader: data.Loader):
    return itertools.chain.from_iterable(loader.epoch(epoch) for epoch in itertools.count())


@pytest.mark.parametrize("precision", ["float32", "auto"])
@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def bench_step(race, benchmark, device, where, precision, image_folders, threads, tmp_path, capsys):
    recipe = config.load(
        "cifar10",
        [
            *image_folders,
            f"losses.kd={{temperature: {T}, ce_weight: {CE_WEIGHT}}}",
            # a worker would take a core from the models, and both of theirs would wait for it
            f"data.workers={0 if where == 'cpu' else 4}",
            f"run.device={where}",
            f"run.precision={precision}",
            "run.epochs=60",
        ],
    )
    splits, runtime = sources.open_data(recipe.data), Runtime.of(recipe)
    torch.manual_seed(0)
    teacher, student = (
        models.create(part.model, num_classes=10, image_size=64, options=part.options)
        for part in (recipe.teacher, recipe.student)
    )
    pair = student, teacher
    kinds = {"timm": LogitDistillationTask, "timm, fused task": FusedLogitDistillationTask}
    timm_steps = {
        name: timms(kind, recipe, *map(copy.deepcopy, pair), splits) for name, kind in kinds.items()
    }
    task = DistillationTask.create(recipe, student, teacher, runtime)
    trainer = Trainer(recipe, task, splits, tmp_path, seed=0, save_model=lambda path, model: None)
    trainer.forward.train()
    batches = endless(trainer.loader)
    others = list(itertools.islice(data.loaders(recipe, splits, 1)[0].epoch(), 4))
    kept = itertools.cycle(others)
    images = others[0].images.to(runtime.device)
    batch = recipe.data.batch_size
    gradient = torch.randn(batch, 10, device=runtime.device) / batch

    def models_alone():
        with torch.inference_mode():
            task.teachers[0](images)
        with runtime.autocast():
            logits = trainer.forward(images)
        logits.backward(gradient.to(logits.dtype))
        trainer.optimizer.zero_grad()

    losses = {}

    def check(name, contender):
        """All must find the same loss in their first step."""
        contender()
        if name == "vitkd_fast":
            losses[name] = trainer.meter.sums.sum()
        elif name in timm_steps:
            # a teacher in bfloat16 answers a little differently
            tolerance = 1e-4 if precision == "float32" else 3e-2
            _, loss = timm_steps[name]
            torch.testing.assert_close(losses["vitkd_fast"], loss(), rtol=tolerance, atol=0)

    table = race(
        {
            "vitkd_fast": lambda: trainer.update(batches),
            **{name: step for name, (step, _) in timm_steps.items()},
            "in memory": lambda: trainer.update(kept),
            "models alone": models_alone,
        },
        check=check,
        rounds=40 if where == "cpu" else 200,
    )
    medians = {name: row["median_us"] for name, row in table.items()}
    shares = {
        f"percent outside models, {name}": 100 * (1 - medians["models alone"] / medians[name])
        for name in ("vitkd_fast", "in memory")
    }
    rates = {
        f"images/s, {name}": batch / medians[name] * 1e6 for name in ("vitkd_fast", *timm_steps)
    }
    benchmark.extra_info |= shares | rates
    with capsys.disabled():
        print("  " + "; ".join(f"{name} {value:.1f}" for name, value in (shares | rates).items()))


def timms(kind, recipe, student, teacher, splits):
    """The step that a user of such a task writes, and a function that gives its last loss."""
    runtime = Runtime.of(recipe)
    student, teacher = (
        m.to(runtime.device, memory_format=CHANNELS_LAST) for m in (student, teacher)
    )
    task = kind(
        student,
        teacher,
        criterion=SoftTargetCrossEntropy(),
        distill_loss_weight=1.0,
        task_loss_weight=CE_WEIGHT,
        temperature=T,
        device=runtime.device,
        verbose=False,
    )
    task.train()
    options, mixing = recipe.optimizer, recipe.augmentation
    optimizer = create_optimizer_v2(
        student, opt=options.name, lr=options.warmup_lr, weight_decay=options.weight_decay
    )
    mixup = Mixup(
        mixing.mixup, mixing.cutmix, prob=mixing.mix_prob, label_smoothing=0.0, num_classes=10
    )
    pixels = models.Pixels.of(student)
    normalize = models.Normalize(pixels.mean, pixels.std).to(runtime.device)
    batches = endless(data.loaders(recipe, splits, 0)[0])
    last = [0, torch.zeros(())]

    def step():
        data.seed_all(0, last[0], 0)  # to mix as the loop does
        batch = next(batches)
        images = batch.images.to(runtime.device, non_blocking=True).float()
        images, target = mixup(images, batch.labels.to(runtime.device, non_blocking=True))
        with runtime.autocast():
            loss = task(normalize(images), target)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        last[:] = last[0] + 1, loss.detach()

    return step, lambda: last[1]


class Logits(nn.Module):
    """A model whose logits are its weight: what is left of a task's step is the task."""

    in_chans = 3

    def __init__(self, rows: int, classes: int) -> None:
        super().__init__()
        self.num_classes = classes
        self.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
        self.weight = nn.Parameter(3 * torch.randn(rows, classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1.0 * self.weight


@pytest.mark.parametrize("classes", [1000, 21841])
@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def bench_task(race, device, where, classes):
    """Forward and backward of both tasks without models: batch 128, temperature 4, class ids."""
    rows, found = 128, {}
    torch.manual_seed(0)
    student, teacher = Logits(rows, classes).to(device), Logits(rows, classes).to(device)
    images = torch.zeros(rows, 3, 1, 1, device=device)
    labels = torch.randint(classes, (rows,), device=device)

    def contender(kind):
        task = kind(
            student, teacher, nn.CrossEntropyLoss(), temperature=T, device=device, verbose=False
        )

        def step():
            student.weight.grad = None
            loss = task(images, labels)["loss"]
            loss.backward()
            return loss.detach()

        return step

    def check(name, step):
        found[name] = step(), student.weight.grad
        torch.testing.assert_close(found[name], found["vitkd_fast"], rtol=1e-4, atol=1e-7)

    race(
        {
            "vitkd_fast": contender(FusedLogitDistillationTask),
            "timm": contender(LogitDistillationTask),
        },
        check=check,
        memory=("vitkd_fast", "timm"),
        calls=10 if classes == 1000 else 1,
    )
