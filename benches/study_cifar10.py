"""Does distillation pay? CIFAR-10, a hybrid teacher, two students, few labels and many, 3 seeds.

`python benches/study_cifar10.py FOLDER WORK` does the whole in WORK, with CIFAR-10's images in
FOLDER/train/CLASS and FOLDER/test/CLASS: packs, the teacher, its caches, and every run, each by the
command line with one thread. What is there already is not done again. The figures go to
benches/results/study-cifar10.json, of which tables.py makes those of docs/benchmarks.md.

Setting "all": 50,000 labels. Setting "few": 5,000 labels, and the other 45,000 images without. All
runs of a setting have as many updates and the same augmentations; those with a teacher differ in
their losses alone. The teacher was trained on all labels.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cpuinfo  # type: ignore[import-untyped]
import torch

from vitkd_fast import models
from vitkd_fast.distill import data, sources
from vitkd_fast.distill.config import load
from vitkd_fast.distill.preflight import create_teachers

RESULTS = Path(__file__).parent / "results" / "study-cifar10.json"
STUDENTS = ("mobilenetv3_small_100", "mobilenetv2_050")
SEEDS = (0, 1, 2)
EPOCHS = 2  # of 50,000 images
CACHED = 2  # epochs of augmentations in a cache
LABELLED = 500  # of each class, in the setting "few"
TEACHER = {
    "img_size": 64, "embed_dim": [32, 64, 160, 320], "depths": [2, 3, 4, 1], "stem_width": [16, 32],
}  # fmt: skip
LOSSES = {
    "baseline": {"ce": {}},
    "kd": {"kd": {"temperature": 4.0, "weight": 0.9}, "ce": {"weight": 0.1}},
    "dist": {"dist": {"temperature": 4.0, "beta": 2.0, "gamma": 2.0}, "ce": {}},
    "dkd": {"dkd": {"temperature": 4.0}, "ce": {}},
    "kd+attention": {
        "kd": {"temperature": 4.0, "weight": 0.9},
        "ce": {"weight": 0.1},
        "attention": {"stride": 8, "block": 3},
    },
}


def shell(command: list[str], log: Path) -> float:
    """Runs a command with one thread; the CPU seconds that it took."""
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\nfailed: {log}")
    return used.ru_utime + used.ru_stime


def key(path: str, value: Any) -> str:
    """key=value of the command line."""
    return f"{path}={json.dumps(value) if isinstance(value, dict | list | bool) else value}"


def pack(folder: Path, work: Path) -> None:
    """train, test, and the training images in two parts: labelled, and more without labels."""
    parts = {"train": folder / "train", "test": folder / "test"}
    for name in ("labelled", "more"):
        parts[name] = work / name
    for classes in sorted((folder / "train").iterdir()):
        for i, file in enumerate(sorted(classes.iterdir())):
            link = work / ("labelled" if i < LABELLED else "more") / classes.name / file.name
            if not link.is_symlink():
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(file.resolve())
    for name, part in parts.items():
        out = work / f"{name}.pack"
        if not out.exists():
            more = ["--unlabelled"] if name == "more" else []
            shell(["vitkd", "pack", str(part), "-o", str(out), *more], work / f"pack-{name}.log")


def images(work: Path, setting: str, labelled_only: bool = False) -> list[str]:
    train = "train" if setting == "all" else "labelled"
    more = setting == "few" and not labelled_only
    return [
        key("data.train", work / f"{train}.pack"),
        key("data.val", work / "test.pack"),
        *([key("data.extra", work / "more.pack")] if more else []),
        *(key(f"data.{k}", v) for k, v in {"crop_pct": 1.0, "workers": 0}.items()),
    ]


def teacher(work: Path, processes: int, epochs: int) -> Path:
    """The teacher, trained on all labels at 64 x 64; its weights."""
    folder = work / "teacher"
    file = folder / "baseline-0" / "last.safetensors"
    if not (folder / "report.json").exists():
        given = {
            "student": {"model": "coatnet_nano_rw_224", "options": TEACHER},
            "losses": {"ce": {}},
            "optimizer": {"lr": 1.5e-3, "warmup_epochs": 1, "clip_grad": 1.0},
            "augmentation.scale": [0.4, 1.0],
            "int8.enabled": False,
            "run": {"folder": str(folder), "epochs": epochs, "precision": "bfloat16", "threads": 1},
        }
        sizes = {"data.image_size": 64, "data.batch_size": 128 // processes}
        command = ["torchrun", "--no-python", f"--nproc-per-node={processes}", "vitkd", "distill"]
        command += [*images(work, "all"), *(key(k, v) for k, v in (given | sizes).items())]
        seconds = shell(command, work / "teacher.log")
        (work / "teacher.json").write_text(json.dumps({"cpu_s": seconds}))
    return file


def run(work: Path, setting: str, student: str, name: str, file: Path) -> None:
    """Three seeds of one student with one of the losses."""
    folder = work / f"{setting}-{student}-{name}"
    if (folder / "report.json").exists():
        return
    begun = folder.exists()
    alone = name == "baseline"
    # as many updates of the labelled images
    longer = 10 if alone and setting == "few" else 1
    given: dict[str, Any] = {
        "student.model": student,
        "losses": LOSSES[name],
        "optimizer": {"lr": 6e-3},
        "augmentation.scale": [0.6, 1.0],
        "run": {
            "folder": str(folder), "epochs": EPOCHS * longer, "seeds": list(SEEDS), "threads": 1,
            "baseline": False, "precision": "float32", "eval_every": EPOCHS * longer,
        },
        "data.image_size": 32,
        "data.batch_size": 128,
    }  # fmt: skip
    if longer > 1:
        given["run"]["max_steps"] = EPOCHS * (50_000 // 128)
    if not alone:
        given["teacher"] = {"model": str(file), "image_size": 64}
        if "attention" not in name:  # which a cache does not hold
            given["teacher"]["cache"] = str(cache(work, setting, file))
    command = ["vitkd", "distill", *images(work, setting, labelled_only=alone)]
    command += [key(k, v) for k, v in given.items()]
    seconds = shell([*command, *(["--resume"] if begun else [])], work / f"{folder.name}.log")
    if not begun:
        (folder / "cpu.json").write_text(json.dumps({"cpu_s": seconds / len(SEEDS)}))
    print(f"{folder.name}: {seconds:.0f} s", flush=True)


_LOCK = threading.Lock()


def cache(work: Path, setting: str, file: Path) -> Path:
    """What the teacher says in a setting, all classes of the augmentations of a few epochs."""
    folder = work / f"cache-{setting}"
    given: dict[str, Any] = {
        "student.model": STUDENTS[0],
        "teacher": {"model": str(file), "image_size": 64},
        "augmentation.scale": [0.6, 1.0],
        "data.image_size": 32,
        "run": {"precision": "bfloat16", "threads": 1},
    }
    command = ["vitkd", "cache", *images(work, setting), *(key(k, v) for k, v in given.items())]
    with _LOCK:
        if not (done := folder.with_suffix(".json")).exists():
            seconds = shell(
                [*command, "-o", str(folder), "--epochs", str(CACHED)], folder.with_suffix(".log")
            )
            done.write_text(json.dumps({"cpu_s": seconds}))
    return folder


@torch.inference_mode()
def choices(model: Any, batches: list[data.Batch]) -> torch.Tensor:
    predict = models.predictor(model).eval()
    return torch.cat([predict(batch.images).argmax(1) for batch in batches])


def figures(work: Path, file: Path) -> dict[str, Any]:
    """The results' file: a table per setting and student."""
    given = [*images(work, "all"), "student.model=mobilenetv2_050", "data.image_size=32"]
    config = load(None, [*given, key("teacher", {"model": str(file), "image_size": 64})])
    splits = sources.open_data(config.data)
    batches = list(data.val_loader(config, splits).epoch())
    labels = torch.cat([batch.labels for batch in batches])
    [model] = create_teachers(config, splits.classes)
    taught = choices(model, batches)
    top1 = 100 * (taught == labels).double().mean().item()
    benches = []
    for setting in ("few", "all"):
        for student in STUDENTS:
            rows: dict[str, Any] = {}
            scores: dict[str, list[float]] = {}
            for name in LOSSES:
                folder = work / f"{setting}-{student}-{name}"
                if not (folder / "report.json").exists():
                    continue
                found = json.loads((folder / "report.json").read_text())["models"]
                by_role = {row["role"]: row for row in found}
                role = "baseline" if name == "baseline" else "distilled"
                scores[name] = [100 * x["metrics"]["top1"] for x in by_role[role]["runs"]]
                of_int8 = [100 * x["metrics"]["top1"] for x in by_role["int8"]["runs"]]
                trained = [
                    models.load(folder / f"{role}-{seed}" / "last.safetensors").model
                    for seed in SEEDS
                ]
                agree = [(choices(m, batches) == taught).double().mean().item() for m in trained]
                gains = [a - b for a, b in zip(scores[name], scores["baseline"], strict=True)]
                rows[name] = {
                    "top-1 %": statistics.mean(scores[name]),
                    "s.e.": error(scores[name]),
                    "over baseline": statistics.mean(gains),
                    "s.e. of that": error(gains),
                    "agreement %": 100 * statistics.mean(agree),
                    "int8 top-1 %": statistics.mean(of_int8),
                    "CPU s a run": cpu_seconds(folder),
                    "each": {"top1": scores[name], "int8": of_int8, "agreement": agree},
                }
            if rows:
                info = {"study": rows, "teacher_top1": top1, "device": "cpu, 1 thread(s)"}
                info |= {"torch": torch.__version__}
                benches.append({"name": f"study_{setting}[{student}]", "extra_info": info})
    spent = {f.stem: json.loads(f.read_text())["cpu_s"] for f in sorted(work.glob("*.json"))}
    return {
        "machine_info": machine(),
        "cpu_s": spent,
        "benchmarks": benches,
    }


def machine() -> dict[str, Any]:
    """As pytest-benchmark says it."""
    cpu = cpuinfo.get_cpu_info()
    return {"cpu": {key: cpu[key] for key in ("brand_raw", "flags")}}


def cpu_seconds(folder: Path) -> float | None:
    """Of a seed; None of a run that was interrupted."""
    file = folder / "cpu.json"
    return json.loads(file.read_text())["cpu_s"] if file.exists() else None


def error(values: list[float]) -> float:
    """The standard error of the mean."""
    return statistics.stdev(values) / math.sqrt(len(values))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--teacher-epochs", type=int, default=40)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    pack(options.folder, options.work)
    file = teacher(options.work, options.jobs, options.teacher_epochs)
    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = [
            pool.submit(run, options.work, setting, student, name, file)
            for setting in ("few", "all")
            for name in LOSSES
            for student in STUDENTS
        ]
        for job in jobs:
            job.result()
    RESULTS.write_text(json.dumps(figures(options.work, file), indent=1) + "\n")


if __name__ == "__main__":
    main()
