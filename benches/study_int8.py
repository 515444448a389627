"""What does int8 cost a student with a teacher, and one without? CIFAR-10, 4 MobileNets, 3 seeds.

`python benches/study_int8.py WORK`, after study_cifar10.py in that folder, whose teacher, packs and
cache it takes. Every float student (all 50,000 labels) leaves a branch at 70% of its run. From
there the same images, losses and learning rates go on in three ways: in float, to be quantized at
the end (`int8`); in the engine's arithmetic (`int8-aware`); and in torchao's, by prepare_qat_pt2e
(`torchao QAT`). The figures go to benches/results/study-int8.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from study_cifar10 import EPOCHS, LOSSES, SEEDS, cache, error, images, key, machine, shell
from vitkd_fast import int8, models
from vitkd_fast.audit import calibration
from vitkd_fast.distill import aware, data, loop, preflight, sources
from vitkd_fast.distill.config import Config, load
from vitkd_fast.distill.runtime import Runtime
from vitkd_fast.distill.task import DistillationTask

RESULTS = Path(__file__).parent / "results" / "study-int8.json"
STUDENTS = (
    "mobilenetv2_050",
    "mobilenetv3_small_100",
    "mobilenetv4_conv_small",
    "mobilenetv3_large_100",
)
WAYS = {"alone": LOSSES["baseline"], "taught": LOSSES["kd"]}
START, FREEZE = 0.7, 0.85  # shares of a run: where it branches, where batch norms are frozen
PT2E = "pt2e.json"  # torchao's accuracy by seed, in a run's folder


def settings(work: Path, student: str, way: str) -> list[str]:
    """key=value of a run."""
    file = work / "teacher" / "baseline-0" / "last.safetensors"
    run = {
        "folder": str(work / f"int8-{student}-{way}"), "epochs": EPOCHS, "seeds": list(SEEDS),
        "threads": 1, "baseline": False, "precision": "float32", "eval_every": EPOCHS,
    }  # fmt: skip
    given: dict[str, Any] = {
        "student.model": student,
        "losses": WAYS[way],
        "optimizer": {"lr": 6e-3},
        "augmentation.scale": [0.6, 1.0],
        "int8.aware": {"start": START, "freeze_bn": FREEZE},
        "run": run,
        "data.image_size": 32,
        "data.batch_size": 128,
    }
    if way == "taught":
        folder = str(cache(work, "all", file))
        given["teacher"] = {"model": str(file), "image_size": 64, "cache": folder}
    return [*images(work, "all"), *(key(k, v) for k, v in given.items())]


def run(work: Path, student: str, way: str) -> None:
    """Three seeds, float and in both int8 arithmetics."""
    folder = work / f"int8-{student}-{way}"
    if not (folder / "report.json").exists():
        more = ["--resume"] if folder.exists() else []
        command = ["vitkd", "distill", *settings(work, student, way), *more]
        print(f"{folder.name}: {shell(command, work / f'{folder.name}.log'):.0f} s", flush=True)
    if not (folder / PT2E).exists():
        command = [sys.executable, __file__, str(work), "--pt2e", student, way]
        seconds = shell(command, work / f"{folder.name}-pt2e.log")
        print(f"{folder.name}, torchao: {seconds:.0f} s", flush=True)


class Exported(nn.Module):
    """A program of torch.export with torchao's fake quantisation, trained like a module.

    Args:
        model: a float student.
        size: of images, in pixels.
    """

    def __init__(self, model: nn.Module, size: int) -> None:
        super().__init__()
        from torchao.quantization.pt2e import quantize_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
        batch = torch.export.Dim("batch", min=2, max=4096)
        example = torch.zeros(4, 3, size, size)
        program = torch.export.export(model.train(), (example,), dynamic_shapes=({0: batch},))
        self.program = quantize_pt2e.prepare_qat_pt2e(program.module(), quantizer)
        self.frozen = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.program(x)

    def train(self, mode: bool = True) -> Exported:
        from torchao.quantization import pt2e

        self.training = mode
        change = pt2e.move_exported_model_to_train if mode else pt2e.move_exported_model_to_eval
        change(self.program)
        if mode and self.frozen:
            self.freeze()
        return self

    def freeze(self) -> None:
        """Keeps ranges and the batch norms' statistics from here on, as torchao's tutorial does."""
        from torchao.quantization import pt2e

        self.frozen = True
        self.program.apply(pt2e.disable_observer)
        for node in self.program.graph.nodes:
            if node.target is torch.ops.aten.batch_norm.default:
                args = list(node.args)
                args[5] = False
                node.args = tuple(args)
        self.program.recompile()

    def converted(self) -> nn.Module:
        from torchao.quantization.pt2e import move_exported_model_to_eval, quantize_pt2e

        converted = quantize_pt2e.convert_pt2e(self.program)
        return move_exported_model_to_eval(converted)


def train_pt2e(work: Path, student: str, way: str) -> None:
    """Goes on from the branches in torchao's arithmetic."""
    config: Config = load(None, settings(work, student, way))
    runtime = Runtime.of(config)
    splits = sources.open_data(config.data)
    found = []
    for seed in SEEDS:
        begun = time.thread_time()
        data.seed_all(seed)
        model = preflight.create_student(config, splits.classes)
        folder = Path(config.run.folder)
        branch = next(folder.glob(f"[bd]*-{seed}/{loop.BRANCH}"))
        aware.take_weights(model, branch)
        cached = preflight.open_cache(config, splits)[0] if way == "taught" else None
        made = Exported(model, config.data.image_size)
        normalize = models.predictor(model)[0]
        task = DistillationTask(
            config.losses, nn.Sequential(normalize, made), [], runtime, 32, None, cached
        )
        trainer = loop.Trainer(
            config, task, splits, folder / f"pt2e-{seed}", seed=seed,
            save_model=lambda path, model: None,
        )  # fmt: skip
        trainer.step = round(START * trainer.total)
        trainer.scheduler.step_update(trainer.step)
        task.train()
        epoch, start = divmod(trainer.step, trainer.steps_per_epoch)
        while trainer.step < trainer.total:
            for batch in trainer.loader.epoch(epoch, start):
                if trainer.step >= FREEZE * trainer.total and not made.frozen:
                    made.freeze()
                trainer.update(iter([batch]))
            epoch, start = epoch + 1, 0
        images, labels = validation(config, splits)
        with torch.no_grad():
            scored = nn.Sequential(normalize, made.converted())
            logits = torch.cat([scored(x) for x in images.split(config.data.batch_size)])
        seconds = time.thread_time() - begun
        found.append(score(logits, labels) | {"cpu_s": seconds})
        print(found[-1], flush=True)
    (folder / PT2E).write_text(json.dumps(found))


def score(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """top1 and nll, and nll_scaled: of the logits divided by the temperature of the other half."""
    found = calibration.calibrate(logits, labels)
    right = (logits.argmax(1) == labels).double().mean()
    return {"top1": float(right), "nll": found.nll, "nll_scaled": found.nll_scaled}


def each(work: Path, student: str, way: str) -> dict[str, list[dict[str, float]]]:
    """Of each seed, in float and in the int8 arithmetics; of torchao where it has run."""
    config = load(None, settings(work, student, way))
    images, labels = validation(config, sources.open_data(config.data))
    pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
    folder = Path(config.run.folder)
    role = "distilled" if way == "taught" else "baseline"
    files = {"int8": f"{role}-{{}}", "int8-aware": "int8-aware-{}"}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ("float", *files)}
    for seed in SEEDS:
        opened = models.load(folder / f"{role}-{seed}" / "last.safetensors")
        with torch.inference_mode():
            logits = models.predictor(opened.model).eval()(images)
        found["float"].append(score(logits, labels))
        for name, place in files.items():
            engine = int8.load(folder / place.format(seed) / "last.int8.safetensors", threads=1)
            found[name].append(score(torch.from_numpy(engine(pixels)), labels))
    if (folder / PT2E).exists():
        found["torchao QAT"] = json.loads((folder / PT2E).read_text())
    return found


def validation(config: Config, splits: sources.Splits) -> tuple[torch.Tensor, torch.Tensor]:
    """All images, uint8 [N, 3, size, size], and labels."""
    batches = [(x.images.clone(), x.labels) for x in data.val_loader(config, splits).epoch()]
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def figures(work: Path) -> dict[str, Any]:
    """The results' file: a table per student, and of all pairs one per metric."""
    benches = []
    for student in STUDENTS:
        rows: dict[str, Any] = {}
        for way in WAYS:
            if not (work / f"int8-{student}-{way}" / "report.json").exists():
                continue
            found = each(work, student, way)
            scores = {k: [round(100 * x["top1"], 4) for x in v] for k, v in found.items()}
            rows[way] = {"float top-1 %": statistics.mean(scores["float"])}
            rows[way]["s.e."] = error(scores["float"])
            for name in ("int8", "int8-aware", "torchao QAT"):
                more = [a - b for a, b in zip(scores.get(name, ()), scores["float"], strict=False)]
                rows[way][f"{name} - float"] = round(statistics.mean(more), 4) if more else None
                rows[way][f"s.e. of {name}"] = error(more) if more else None
            rows[way]["each"] = found
        if rows:
            info = {"study": rows, "device": "cpu, 1 thread(s)", "torch": torch.__version__}
            info["torchao"] = version("torchao")
            benches.append({"name": f"study_int8[{student}]", "extra_info": info})
    pairs = [pooled(benches, metric) for metric in ("top1", "nll", "nll_scaled")]
    return {"machine_info": machine(), "benchmarks": [*benches, *pairs]}


def pooled(benches: list[dict[str, Any]], metric: str) -> dict[str, Any]:
    """A table of all pairs, a student in int8 and the float one of its seed, by way of training.

    Of top1 in points.
    """
    unit = 100 if metric == "top1" else 1
    found: dict[str, list[float]] = {}
    for bench in benches:
        for way, row in bench["extra_info"]["study"].items():
            each = row["each"].items()
            scores = {k: [x[metric] for x in v] for k, v in each if metric in v[0]}
            for name in [*scores][1:]:
                pairs = zip(scores[name], scores["float"], strict=True)
                found.setdefault(f"{name}, {way}", []).extend(unit * (a - b) for a, b in pairs)
    rows = {
        name: {
            "pairs": len(values),
            "mean - float": statistics.mean(values),
            "s.e.": error(values),
            "s.d. of a pair": statistics.stdev(values),
        }
        for name, values in sorted(found.items())
    }
    shared = {key: benches[0]["extra_info"][key] for key in ("device", "torch", "torchao")}
    return {"name": f"study_int8[{metric}]", "extra_info": {"study": rows, **shared}}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("work", type=Path, help="of study_cifar10.py")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--pt2e", nargs=2, metavar=("STUDENT", "WAY"), help="only this part")
    options = parser.parse_args()
    if options.pt2e:
        train_pt2e(options.work, *options.pt2e)
        return
    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = [pool.submit(run, options.work, s, way) for s in STUDENTS for way in WAYS]
        for job in jobs:
            job.result()
    RESULTS.write_text(json.dumps(figures(options.work), indent=1) + "\n")


if __name__ == "__main__":
    main()
