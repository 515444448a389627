"""Does a search find better students than chance, at equal cost? CIFAR-10, 3 seeds.

`python benches/study_search.py FOLDER WORK` does the whole in WORK, with CIFAR-10's images in
FOLDER/train/CLASS and FOLDER/test/CLASS; what is there already is not done again. Small on purpose:
3,200 images of 32 x 32 or 24 x 24, two epochs in batches of 32, which is 200 steps, and a bound of
0.08 ms on one thread of the int8 engine. The teacher is a RegNetX-200MF that four epochs of 20,000
other images trained, no more than a quick one. A search judges by 1,000 images that no model was
trained on, and what each found is scored on 2,000 test images that no search has seen.

Of each seed, `search` (TPE, flash prediction over the first fifth of these few steps) and `random`
(random candidates, each trained in full) may begin trials until they have spent the same CPU time
on training; candidates over the bound cost neither of them any. Two processes run at once, with a
thread each. The figures go to benches/results/study-search.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from optuna.trial import FixedTrial

from study_cifar10 import error, key, machine, shell
from vitkd_fast import models
from vitkd_fast.distill import config, data, evaluate, sources
from vitkd_fast.search import flash, space, study

RESULTS = Path(__file__).parent / "results" / "study-search.json"
SEEDS, METHODS = (0, 1, 2), ("search", "random")
PARTS = {"few": (0, 320), "val": (500, 600), "teacher": (600, 2600)}  # of each class
TESTED = 200  # of each class
EPOCHS, FLASH = 2, 0.2
BOUND_MS = 0.08
SPACE = {
    "students": {
        "mobilenetv2": {
            "width": {0.35: "mobilenetv2_035", 0.5: "mobilenetv2_050", 0.75: "mobilenetv2_075"},
            "depth": [1.0, 1.4],
        },
        "mobilenetv3_small": {
            "width": {0.5: "mobilenetv3_small_050", 0.75: "mobilenetv3_small_075",
                      1.0: "mobilenetv3_small_100"},
        },
        "mobilenetv4_conv_small": {
            "width": {0.5: "mobilenetv4_conv_small_050", 1.0: "mobilenetv4_conv_small"},
        },
    },
    "image_size": [24, 32],
    "losses": {
        "kd": {"kd": {"temperature": {"low": 1.0, "high": 8.0, "log": True},
                      "weight": {"low": 0.5, "high": 2.0, "log": True}}},
        "kd+ce": {"kd": {"temperature": {"low": 1.0, "high": 8.0, "log": True},
                         "ce_weight": {"low": 0.1, "high": 1.0, "log": True}}},
        "dist": {"dist": {"temperature": {"low": 1.0, "high": 8.0, "log": True},
                          "weight": {"low": 0.5, "high": 2.0, "log": True}}, "ce": {}},
    },
    "optimizer": {"lr": {"low": 5e-4, "high": 2e-2, "log": True},
                  "weight_decay": {"low": 0.005, "high": 0.2, "log": True}},
}  # fmt: skip


def prepare(folder: Path, work: Path) -> None:
    """Packs of the parts, the teacher, its caches, and the costs of all students."""
    parts = {name: (folder / "train", *bounds) for name, bounds in PARTS.items()}
    parts["test"] = (folder / "test", 0, TESTED)
    for name, (source, first, last) in parts.items():
        for classes in sorted(source.iterdir()):
            for file in sorted(classes.iterdir())[first:last]:
                link = work / name / classes.name / file.name
                link.parent.mkdir(parents=True, exist_ok=True)
                if not link.is_symlink():
                    link.symlink_to(file.resolve())
        if not (out := work / f"{name}.pack").exists():
            shell(["vitkd", "pack", str(work / name), "-o", str(out)], work / f"pack-{name}.log")
    if not (work / "teacher-run" / "report.json").exists():
        given: dict[str, Any] = {
            "student.model": "regnetx_002", "losses": {"ce": {}}, "optimizer": {"lr": 4e-3},
            "augmentation.scale": [0.6, 1.0], "int8.enabled": False, "data.image_size": 32,
            "data.crop_pct": 1.0, "data.workers": 0, "data.batch_size": 64,
            "data.train": str(work / "teacher.pack"), "data.val": str(work / "val.pack"),
            "run": {"folder": str(work / "teacher-run"), "epochs": 4, "threads": 1,
                    "eval_every": 4},
        }  # fmt: skip
        shell(["vitkd", "distill", *(key(k, v) for k, v in given.items())], work / "teacher.log")


def recipe(work: Path) -> config.Config:
    given: dict[str, Any] = {
        "data.train": str(work / "few.pack"), "data.val": str(work / "val.pack"),
        "data.image_size": 32, "data.crop_pct": 1.0, "data.workers": 0, "data.batch_size": 32,
        "teacher.model": str(work / "teacher-run" / "baseline-0" / "last.safetensors"),
        "student.model": "mobilenetv2_035", "losses": {"kd": {}},
        "augmentation.scale": [0.6, 1.0],
        "run": {"folder": str(work / "run"), "epochs": EPOCHS, "threads": 1,
                "log_every": 1000000, "precision": "float32"},
    }  # fmt: skip
    return config.load(None, [key(k, v) for k, v in given.items()])


def one(work: Path, method: str, seed: int, budget: float) -> None:
    """A study; its trials and what the best of it reaches on the test images go to a file."""
    folder, before = work / f"{method}-{seed}", work / f"{method}-{seed - 1}" / study.COSTS
    folder.mkdir(exist_ok=True)
    for part in ("cache-24", "cache-32"):
        if not (folder / part).exists():
            shutil.copytree(work / "shared" / part, folder / part)
    if before.exists() and not (folder / study.COSTS).exists():
        shutil.copyfile(before, folder / study.COSTS)
    settings = study.Settings(
        device="int8:threads=1",
        latency_ms=BOUND_MS,
        sampler="tpe" if method == "search" else "random",
        flash=FLASH if method == "search" else 0.0,
        seed=seed,
    )
    found = study.Search(recipe(work), space.Space.model_validate(SPACE), folder, settings)
    found.run(1000, budget)
    best = max(found.finished(), key=lambda x: x.user_attrs["accuracy"])
    result = {
        "method": method, "seed": seed, "budget_cpu_s": budget,
        "test": tested(work, folder / "trials" / f"{best.number:04}"),
        "latency_ms": best.user_attrs["latency_ms"],
        "trials": [
            {"number": x.number, "state": x.state.name, "params": x.params,
             **{k: v for k, v in x.user_attrs.items() if k != "config"}}
            for x in found.study.trials
        ],
    }  # fmt: skip
    (work / f"{method}-{seed}.json").write_text(json.dumps(result))


def tested(work: Path, trial: Path) -> float:
    """The accuracy of a trial's weights on the test images."""
    [file] = trial.glob("*/last.safetensors")
    loaded = models.load(file)
    source, *_ = sources.open_folder(str(work / "test.pack"), None, False)
    pixels = loaded.pixels
    transform = data.eval_transform(pixels.image_size, pixels.crop_pct, pixels.interpolation)
    loader = data.Loader(source, transform, config.Data(workers=0), seed=None)
    predictor = models.predictor(loaded.model.eval(), pixels)
    batches = ((batch.images, batch.labels) for batch in loader.epoch())
    scores = evaluate.evaluate(predictor, batches, classes=10, device=torch.device("cpu"))
    return scores.metrics["top1"]


def share(work: Path) -> None:
    """Both caches, before any study begins."""
    shared, every = work / "shared", space.Space.model_validate(SPACE)
    shared.mkdir(exist_ok=True)
    settings = study.Settings(latency_ms=BOUND_MS, flash=0.0)
    begun = study.Search(recipe(work), every, shared, settings)
    fixed: dict[str, Any] = {"student": "mobilenetv2", "mobilenetv2.width": 0.35, "losses": "kd"}
    fixed |= {"mobilenetv2.depth": 1.0, "kd.kd.temperature": 4.0, "kd.kd.weight": 1.0}
    for size in every.image_size:
        trial = FixedTrial({**fixed, "lr": 1e-3, "weight_decay": 0.05, "image_size": size})
        begun.lesson.given(every.draw(trial, begun.recipe))


def summary(work: Path) -> dict[str, Any]:
    """What is committed: of each method its best students, and what predictions were worth."""
    files = {(m, s): work / f"{m}-{s}.json" for m in METHODS for s in SEEDS}
    runs = {key: json.loads(file.read_text()) for key, file in files.items() if file.exists()}
    rows: dict[str, Any] = {}
    for method in METHODS:
        of_seeds = [_figures(run) for (m, _), run in runs.items() if m == method]
        columns = {key: [row[key] for row in of_seeds] for key in of_seeds[0]}
        means = {key: statistics.fmean(values) for key, values in columns.items()}
        tests = columns["test top-1 %"]
        own = {"test top-1 %": means.pop("test top-1 %")}
        own["s.e."] = error(tests) if len(tests) > 1 else None
        rows[method] = {"seeds": len(tests), **own, **means}
    trials = [x for (m, _), run in runs.items() if m == "search" for x in run["trials"]]
    pairs = [[x["predicted"], x["early_score"], x["accuracy"]] for x in trials if "accuracy" in x]
    reached = [x[2] for x in pairs]
    ranks = {}
    for name, column in (("power law", 0), ("last early score", 1)):
        found = flash.correlation([x[column] for x in pairs], reached)
        ranks[name] = {"trials": found["trials"]}
        for rank in ("spearman", "kendall"):
            low, high = found[f"{rank}_interval"]
            ranks[name] |= {rank: found[rank], f"{rank}, low": low, f"{rank}, high": high}
    info = {"device": "cpu, 1 thread(s)", "torch": torch.__version__}
    return {
        "machine_info": machine(),
        "benchmarks": [
            {"name": "study_search[best]", "extra_info": {"study": rows, **info}},
            {"name": "study_search[rank]", "extra_info": {"study": ranks, **info}},
        ],
        "settings": {"bound_ms": BOUND_MS, "flash": FLASH, "epochs": EPOCHS},
        "predicted, early, reached": pairs,
        "runs": [
            {key: run[key] for key in ("method", "seed", "budget_cpu_s", "test", "latency_ms")}
            | {"best over time": _over_time(run)}
            for run in runs.values()
        ],
    }


def _figures(run: dict[str, Any]) -> dict[str, float]:
    within = [x for x in run["trials"] if x.get("within") and "cpu_seconds" in x]
    full = [x for x in within if "accuracy" in x]
    return {
        "test top-1 %": 100 * run["test"],
        "validation top-1 %": 100 * max(x["accuracy"] for x in full),
        "ms": run["latency_ms"],
        "candidates": len(run["trials"]),
        "within the bound": len(within),
        "trained in full": len(full),
        "CPU s": sum(x["cpu_seconds"] for x in within),
    }


def _over_time(run: dict[str, Any]) -> list[list[float]]:
    """CPU seconds, and the best accuracy by then, at each trial that was trained in full."""
    spent, best, found = 0.0, 0.0, []
    for x in run["trials"]:
        spent += x.get("cpu_seconds", 0.0)
        if "accuracy" in x:
            best = max(best, x["accuracy"])
            found.append([spent, best])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--cpu-seconds", type=float, default=100.0)
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "SEED"))
    parser.add_argument("--summary", action="store_true", help="of what is there")
    options = parser.parse_args()
    work = options.work.absolute()
    if options.one:
        one(work, options.one[0], int(options.one[1]), options.cpu_seconds)
        return
    if not options.summary:
        work.mkdir(parents=True, exist_ok=True)
        prepare(options.folder, work)
        share(work)
        command = [sys.executable, __file__, str(options.folder), str(work)]
        command += ["--cpu-seconds", str(options.cpu_seconds)]
        for seed in SEEDS:
            if all((work / f"{method}-{seed}.json").exists() for method in METHODS):
                continue
            both = [[*command, "--one", method, str(seed)] for method in METHODS]
            logs = [work / f"{method}-{seed}.log" for method in METHODS]
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(shell, both, logs))
    RESULTS.write_text(json.dumps(summary(work), indent=1) + "\n")
    print(RESULTS)


if __name__ == "__main__":
    main()
