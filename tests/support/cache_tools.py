"""A cache of a small teacher's outputs on a few digits, which takes a second to make."""

from __future__ import annotations

import functools
import itertools
import shutil
from pathlib import Path
from typing import Any

import torch

from vitkd_fast import models
from vitkd_fast.distill import data, preflight, probe, sources
from vitkd_fast.distill.cache import plan
from vitkd_fast.distill.cache.build import Made, Options, build
from vitkd_fast.distill.config import Config, load
from vitkd_fast.distill.loop import Trainer
from vitkd_fast.distill.runtime import Runtime
from vitkd_fast.distill.task import DistillationTask

from .loop_tools import frozen, student, teacher

# 179 training images, of which a shard has 64
DATA = [
    "data.holdout=0.9",
    "data.batch_size=16",
    "augmentation={scale: [0.6, 1.0], hflip: 0.0}",
    "run.precision=float32",
    "run.seeds=[3]",
    "int8.enabled=false",
    "student.model=mobilenetv2_035",
]
ROWS, SHARDS = 64, 3


def save_teacher(path: Path, **changes: Any) -> Path:
    made = teacher()
    with_ten = {"num_classes": 10, "classes": tuple("0123456789"), **changes}
    options = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    pixels = models.Pixels.of(made)
    models.save(path, made, name="vit_tiny_patch16_224", options=options, pixels=pixels, **with_ten)
    return path


def good_teacher(path: Path, whole: Config) -> Path:
    """A random transformer with a fitted classifier."""
    torch.manual_seed(1)
    options = {"patch_size": 4, "embed_dim": 48, "depth": 1, "num_heads": 2}
    body = models.headless(
        models.create("vit_tiny_patch16_224", num_classes=10, image_size=32, options=options)
    ).eval()
    loader = data.whole_loader(whole, sources.open_data(whole.data).train)
    found = probe.features(models.predictor(body), loader.epoch(), "cpu")
    fitted = models.with_classifier(body, *probe.fit(found, 10))
    models.save(
        path, fitted, name="vit_tiny_patch16_224", options=options, num_classes=10,
        pixels=models.Pixels.of(fitted), classes=tuple("0123456789"),
    )  # fmt: skip
    return path


def config(file: Path, *overrides: str, cache: Path | None = None) -> Config:
    named = f", cache: {cache}" if cache else ""
    return load("digits", [*DATA, f"teacher={{model: {file}{named}}}", *overrides])


def make(
    file: Path, folder: Path, *overrides: str, monkeypatch: Any, epochs: int = 2, **options: Any
) -> Made:
    monkeypatch.setattr(plan, "_SHARD_ROWS", ROWS)
    return build(config(file, *overrides), folder, Options(epochs, **options))


def copied(folder: Path, to: Path, **changed: bytes) -> list[str]:
    """A copy, with the first image of a class under another name or with other contents."""
    shutil.copytree(folder / "train", to)
    for i, (name, found) in enumerate(changed.items()):
        first = sorted((to / str(i)).iterdir())[0]
        first.write_bytes(found or first.read_bytes())
        first.rename(first.with_name(f"{name}.png"))
    return ["data.dataset=''", f"data.train={to}", "data.holdout=0.1"]


def contents(folder: Path) -> dict[str, bytes]:
    """Of every file but the configuration and the lock."""
    files = [x for x in folder.rglob("*") if x.is_file()]
    kept = [x for x in files if x.name not in ("config.yaml", ".lock")]
    return {str(x.relative_to(folder)): x.read_bytes() for x in kept}


def trainer(folder: Path, whole: Config, seed: int = 3) -> Trainer:
    """Of a configuration, with the teacher or the cache that it names."""
    splits, runtime = sources.open_data(whole.data), Runtime.of(whole)
    cache, _ = preflight.open_cache(whole, splits)
    teachers = [] if cache else preflight.create_teachers(whole, splits.classes)
    torch.manual_seed(0)
    task = DistillationTask.create(whole, frozen(), teachers, runtime, cache)
    save_model = functools.partial(
        models.save, name="mobilenetv2_035", options={}, num_classes=10,
        pixels=models.Pixels.of(student()), classes=tuple("0123456789"),
    )  # fmt: skip
    return Trainer(whole, task, splits, folder, seed=seed, save_model=save_model)


def losses(run: Trainer, steps: int) -> torch.Tensor:
    """Of the next steps."""
    found: list[float] = []
    batches = itertools.chain.from_iterable(map(run.loader.epoch, itertools.count()))
    run.task.register_forward_hook(lambda *x: found.append(float(x[2]["loss"].detach())))
    run.task.calibrate(run._first_images())
    run.task.train()
    for _ in range(steps):
        run.update(batches)
    return torch.tensor(found)


# what the processes of the cluster import first: files that do something when they are opened,
# a disk that is full, and deaths before and after a shard has its name
HOOK = """
import os, sys, time
def hook(event, arguments):
    if event == "open" and isinstance(arguments[0], str) and arguments[0].endswith(".png"):
        if arguments[0].endswith("kills.png"):
            os.kill(os.getpid(), 9)
        if "/slow/" in arguments[0]:
            time.sleep(0.05)
        if arguments[0].endswith("hangs.png"):
            time.sleep(1000)
    if event == "os.link" and "/full/" in str(arguments[1]) and "epoch-00001" in str(arguments[1]):
        raise OSError(28, "No space left on device")
    dies = {"os.link": "cuts/c/epoch-00000/.shard-00001", "os.remove": "cuts/c/epoch-00001/.shard"}
    for of, part in dies.items():
        if event == of and part in str(arguments[0]) and "note" not in str(arguments[0]):
            try:
                os.mkdir(os.path.join(os.path.dirname(__file__), of))
            except FileExistsError:
                continue
            os.kill(os.getpid(), 9)
sys.addaudithook(hook)
"""
