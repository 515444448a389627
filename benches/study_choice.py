"""Is a choice the same twice, and is a bias found? `vitkd select` and `vitkd audit` on CIFAR-10.

`python benches/study_choice.py FOLDER WORK --weights FILE` does the whole in WORK, with CIFAR-10's
images in FOLDER/train/CLASS and FOLDER/test/CLASS and weights of mobilenetv2_100 in FILE (batch
norms folded, pixels in -1..1), each step by the command line with one thread. What is there already
is not done again. The figures go to benches/results/study-choice.json, of which tables.py makes
those of docs/benchmarks.md.

The teacher is mobilenetv2_100 of ImageNet's weights, fine-tuned on 2,000 images of each class at
32 x 32. Selection: 200 others of each class; the same model from the same weights, with and without
that teacher, and with it at two learning rates, each twice, with other seeds. Audit: two students
of the teacher's weights without 30% of their channels, trained on its images, of which one saw most
images of cats under other labels.
"""

from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from study_cifar10 import key, machine, shell
from vitkd_fast import models
from vitkd_fast.distill import data, sources
from vitkd_fast.distill.config import load

RESULTS = Path(__file__).parent / "results" / "study-choice.json"
NAME = "mobilenetv2_100"
SIZE = 32
BIASED, NOISED = "cat", 0.7  # the class, and the share of its images with other labels
SEEDS = (0, 1)
CANDIDATES = {
    "teacher": {"alone": "losses={ce: {}},teacher={}", "taught": "optimizer.warmup_epochs=0"},
    "rate": {"fast": "optimizer.lr=1e-3", "slow": "optimizer.lr=1e-4"},
}
STUDENT = {"model": NAME, "options": {"pad_type": "same"}}
COMMON = {
    "data.image_size": SIZE, "data.crop_pct": 1.0, "data.workers": 0, "data.batch_size": 64,
    "augmentation.scale": [0.5, 1.0], "int8.enabled": False, "run.threads": 1,
    "run.baseline": False, "run.epochs": 2, "optimizer.lr": 1e-3, "run.log_every": 20,
}  # fmt: skip


def link(folder: Path, work: Path) -> None:
    """train and test, smaller; few; and biased: train with other labels of a class."""
    classes = sorted(x.name for x in (folder / "train").iterdir())
    parts = (("train", "train", 0, 2000), ("few", "train", 2000, 2200), ("test", "test", 0, 500))
    for name, source, first, last in parts:
        for label in classes:
            for file in sorted((folder / source / label).iterdir())[first:last]:
                _link(file, work / name / label)
    for label in classes:
        files = sorted((work / "train" / label).iterdir())
        for i, file in enumerate(files):
            noised = label == BIASED and i < NOISED * len(files)
            others = [x for x in classes if x != BIASED]
            name = others[i % len(others)] if noised else label
            _link(file.resolve(), work / "biased" / name, f"{label}-{file.name}")


def _link(file: Path, folder: Path, name: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not (made := folder / (name or file.name)).is_symlink():
        made.symlink_to(file.resolve())


@torch.inference_mode()
def begin(work: Path, weights: Path) -> Path:
    """The weights with batch norms that normalize: each gets the statistics of what it reads."""
    file = work / "begin.safetensors"
    if file.exists():
        return file
    options = {"pad_type": "same"}
    model: Any = models.create(NAME, checkpoint=weights, image_size=SIZE, options=options).eval()
    pixels = models.Pixels(SIZE, (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    read: dict[nn.Module, torch.Tensor] = {}
    for norm in norms:
        norm.register_forward_pre_hook(lambda m, x: read.__setitem__(m, x[0]))
    given = {k: v for k, v in COMMON.items() if k.startswith("data.")}
    given |= {"data.train": work / "train", "student.model": NAME}
    section = load(None, [key(k, v) for k, v in given.items()])
    splits = sources.open_data(section.data)
    images = torch.cat([x.images for x in data.sample(section, splits.train, 512)])
    models.predictor(model, pixels)(images)
    for norm, x in read.items():
        one: Any = norm
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
        scale = one.weight / (one.running_var + one.eps).sqrt()
        one.bias += scale * (mean - one.running_mean)
        one.weight.copy_(scale * (var + one.eps).sqrt())
        one.running_mean.copy_(mean)
        one.running_var.copy_(var)
    classes = [str(i) for i in range(model.num_classes)]
    models.save(file, model, name=NAME, options=options, num_classes=len(classes), pixels=pixels,
                classes=classes)  # fmt: skip
    return file


def train(work: Path, name: str, **given: Any) -> Path:
    """Trains on the labels alone; the weights."""
    folder = work / name
    if not (folder / "report.json").exists():
        keys = COMMON | {"data.val": work / "test", "run.folder": folder, "losses": {"ce": {}}}
        keys |= {k.replace("__", "."): v for k, v in given.items()}
        resume = ["--resume"] if folder.exists() else []
        shell(["vitkd", "distill", *(key(k, v) for k, v in keys.items()), *resume],
              work / f"{name}.log")  # fmt: skip
    return folder / "baseline-0" / "last.safetensors"


def select(
    work: Path, weights: Path, teacher: Path, between: str, seed: int, most: int
) -> dict[str, Any]:
    """What was selected, of splits that a seed draws."""
    folder = work / f"select-{between}-{seed}"
    if not (folder / "report.json").exists():
        keys = COMMON | {"data.train": work / "few", "data.val": work / "test"}
        keys |= {"data.batch_size": 32, "student": STUDENT | {"checkpoint": str(weights)}}
        keys |= {"teacher": {"model": str(teacher)}, "losses": {"kd": {"temperature": 4.0}}}
        command = ["vitkd", "select", *(key(k, v) for k, v in keys.items()), "-o", str(folder)]
        for name, changes in CANDIDATES[between].items():
            command += ["--candidate", f"{name}:{changes}"]
        command += ["--seed", str(seed), "--most", str(most)]
        shell(command, work / f"{folder.name}.log")
    return json.loads((folder / "report.json").read_text())


def audit(work: Path, teacher: Path, student: Path, name: str) -> dict[str, Any]:
    """What a student lost beside its teacher."""
    folder = work / f"audit-{name}"
    if not (folder / "audit.json").exists():
        command = [
            "vitkd",
            "audit",
            str(teacher),
            str(student),
            str(work / "test"),
            "-o",
            str(folder),
        ]
        command += ["--no-cost", "--robustness-images", "0", "--attention-images", "0"]
        shell(command, work / f"audit-{name}.log")
    return json.loads((folder / "audit.json").read_text())


def selected(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """A row for each selection."""
    rows = {}
    for seed, found in zip(SEEDS, runs, strict=True):
        [rival], [pair] = found["stability"]["rivals"], found["comparisons"]
        stability = found["stability"]
        settled = "" if stability["stable"] else ", not settled"
        rows[f"seed {seed}: {stability['choice']}{settled}"] = {
            "splits": found["splits"],
            **{f"{x['name']}, top-1 %": 100 * x["mean"] for x in found["candidates"]},
            "lead, points": 100 * rival["difference"],
            "its interval, ±": 100 * rival["width"],
            "p, corrected": pair["p_holm"],
            "entropy, bits": abs(found["entropy"]),
            "each": {"stable": stability["stable"], "scores": found["scores"]},
        }
    return rows


def audited(found: dict[str, Any]) -> dict[str, Any]:
    """A row for each class, the worst first."""
    return {
        row["name"] + (f" ({row['finding']})" if row["finding"] else ""): {
            "teacher, %": 100 * row["teacher"],
            "student, %": 100 * row["student"],
            "change, points": 100 * row["difference"],
            "lost": row["lost"],
            "gained": row["gained"],
            "p, Holm": row["p_holm"],
        }
        for row in found["harm"]["classes"]
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--most", type=int, default=30, help="splits of a selection")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    work = options.work.resolve()
    link(options.folder, work)
    weights = begin(work, options.weights.resolve())
    begun = STUDENT | {"checkpoint": str(weights)}
    teacher = train(work, "teacher", data__train=work / "train", student=begun)
    benches: list[dict[str, Any]] = []
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = {
            between: [
                pool.submit(select, work, weights, teacher, between, seed, options.most)
                for seed in SEEDS
            ]
            for between in CANDIDATES
        }
        pruned = STUDENT | {"checkpoint": str(teacher), "prune": 0.3}
        students = {
            name: pool.submit(
                train, work, f"student-{name}", data__train=work / name, student=pruned
            )
            for name in ("train", "biased")
        }
    for name, student in students.items():
        found = audit(work, teacher, student.result(), name)
        info = {"study": audited(found), "device": "cpu, 1 thread(s)", "torch": torch.__version__}
        benches.append({"name": f"audit[{name}]", "extra_info": info})
    for between, of_seeds in runs.items():
        rows = selected([x.result() for x in of_seeds])
        info = {"study": rows, "device": "cpu, 1 thread(s)", "torch": torch.__version__}
        benches.append({"name": f"select[{between}]", "extra_info": info})
    found = {"machine_info": machine(), "benchmarks": benches}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
