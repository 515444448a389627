"""The command line and whole runs: what is printed, what is written, what bad input gets."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from timm.data import ImageNetInfo
from timm.data.transforms_factory import create_transform

from support.run_tools import INT8, arguments
from vitkd_fast import int8, models
from vitkd_fast.distill import checkpoint, config, evaluate, report, results

pytestmark = pytest.mark.usefixtures("one_thread")

COMMANDS = (
    "distill recipes eval predict pack cache quantize profile replay report bench-loop show demo"
).split()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_a_real_example(command: str, vitkd) -> None:
    result = vitkd(command, "--help")
    assert result.code == 0
    assert f"Example: vitkd {command}" in result.out


def test_help_lists_every_command(vitkd) -> None:
    out = vitkd("--help").out
    assert all(re.search(rf"^ +{command} ", out, re.MULTILINE) for command in COMMANDS)


# distill


def test_recipes_and_version(vitkd) -> None:
    lines = vitkd("recipes").out.splitlines()
    assert [line.split()[0] for line in lines] == config.recipes()
    assert "vit_tiny_patch16_224 -> mobilenetv3_small_050; losses: kd; 20 epochs" in lines[1]
    assert vitkd("--version").out == f"vitkd_fast {version('vitkd-fast')}\n"


def test_distill_leaves_a_whole_report(run_folder: Path) -> None:
    results = report.read(run_folder)
    assert [m["role"] for m in results["models"]] == ["teacher", "baseline", "distilled", "int8"]
    assert [len(m["runs"]) for m in results["models"]] == [1, 2, 2, 2]
    assert results["data"] == {
        "train": 150,
        "val": 50,
        "classes": [str(i) for i in range(10)],
    }
    assert results["comparison"]["seeds"] == 2
    assert set(results["curves"]) == {
        "teacher, seed 0",
        *(f"{role}, seed {seed}" for role in ("baseline", "distilled") for seed in (0, 1)),
    }
    assert all(curve["val"] for curve in results["curves"].values())
    assert sum(map(sum, results["confusion"]["matrix"])) == 50
    assert results["config"] == yaml.safe_load((run_folder / "config.yaml").read_text())
    disagreements = results["disagreements"]
    assert disagreements["of"] == 50
    assert len(disagreements["shown"]) == min(disagreements["count"], 24)
    html = (run_folder / "report.html").read_text()
    assert results["verdict"] in html
    for name in ("teacher", "baseline-0", "baseline-1", "distilled-0", "distilled-1"):
        assert (run_folder / name / "last.safetensors").exists()
        assert (run_folder / name / "best.safetensors").exists()
        assert (run_folder / name / "metrics.jsonl").exists()


def test_the_seeds_differ_and_the_table_is_of_the_last_weights(
    run_folder: Path, image_folder: Path, vitkd
) -> None:
    results = report.read(run_folder)
    distilled = results["models"][2]
    losses = [run["metrics"]["nll"] for run in distilled["runs"]]
    assert losses[0] != losses[1]
    shown = vitkd("eval", run_folder / "distilled-1" / "last.safetensors", image_folder / "val")
    assert shown.code == 0
    assert "50 images, 0 skipped" in shown.out
    printed = dict(line.split() for line in shown.out.splitlines()[1:])
    assert printed["top1"] == f"{distilled['runs'][1]['metrics']['top1']:.4f}"
    assert float(printed["nll"]) == pytest.approx(losses[1], abs=2e-4)


def test_the_student_becomes_int8(run_folder: Path, image_folder: Path, vitkd) -> None:
    results = report.read(run_folder)
    distilled, row = results["models"][2:]
    for seed, run in enumerate(row["runs"]):
        file = run_folder / f"distilled-{seed}" / "last.int8.safetensors"
        shown = vitkd("eval", file, image_folder / "val")
        assert shown.code == 0, shown.err
        printed = dict(line.split() for line in shown.out.splitlines()[1:])
        for name, value in run["metrics"].items():
            assert printed[name] == f"{value:.4f}"
        # rounding changes the answers, yet few of them
        float_nll = distilled["runs"][seed]["metrics"]["nll"]
        assert 0 < abs(run["metrics"]["nll"] - float_nll) < 0.3
        assert run["fidelity"]["unchanged"] > 0.7
        session, saved = int8.load(file), models.load(file.with_name("last.safetensors"))
        assert session.classes == saved.classes
        for name in ("image_size", "mean", "std", "crop_pct", "interpolation"):
            assert getattr(session, name) == getattr(saved.pixels, name), name
    first = run_folder / "distilled-0" / "last.int8.safetensors"
    assert row["bytes"] == first.stat().st_size < distilled["bytes"] / 3
    assert (row["parameters"], row["macs"]) == (distilled["parameters"], distilled["macs"])
    assert row["mean"]["agreement"] == pytest.approx(distilled["mean"]["agreement"], abs=0.2)
    assert "unchanged" not in distilled["mean"]
    assert "Agreement with itself in float32" in (run_folder / "report.html").read_text()
    ran = {"device": "CPU", "threads": 1, "runs": f"int8, {int8.isa()[0]}"}
    assert row["conditions"] == ran
    assert distilled["conditions"]["runs"] == "PyTorch, float32"
    assert sum(map(sum, results["int8_confusion"]["matrix"])) == 50
    recalls = [one["recall"] for one in results["per_class"]["int8"]]
    images = [one["images"] for one in results["per_class"]["int8"]]
    assert sum(images) == 100  # of two seeds
    right = sum(r * n for r, n in zip(recalls, images, strict=True) if n)
    assert right / 100 == pytest.approx(row["mean"]["top1"])


def test_a_student_that_the_engine_lacks_has_no_row(
    image_folder: Path, tmp_path: Path, vitkd
) -> None:
    given = [
        *arguments(image_folder, tmp_path / "run"),
        *INT8,
        "run.seeds=[0]",
        "run.baseline=false",
        "int8.watch=1",
    ]
    result = vitkd("distill", *given, "student.model=ghostnet_100")
    assert result.code == 0, result.err
    results = report.read(tmp_path / "run")
    assert [m["role"] for m in results["models"]] == ["teacher", "distilled"]
    lines = [line for line in result.out.splitlines() if line.startswith("int8: no row: ")]
    assert len(lines) == 1
    assert "GhostModule): aten.cat.default" in lines[0]
    said, watched = results["notes"][-2:]
    assert said == lines[0].replace("int8: no", "No int8", 1)
    assert watched.startswith("int8.watch: distilled, seed 0: not quantised at 1 of 1 looks, ")
    assert "aten.cat.default" in watched


def test_distill_refuses_a_folder_with_a_run(image_folder: Path, run_folder: Path, vitkd) -> None:
    result = vitkd("distill", *arguments(image_folder, run_folder))
    assert result.code == 2
    assert result.err == (
        f"vitkd: ConfigError: run.folder: {run_folder} holds a run; --resume goes on with it, or "
        "name another (traceback: vitkd --debug)\n"
    )


def test_resume_refuses_another_configuration(image_folder: Path, run_folder: Path, vitkd) -> None:
    changed = [*arguments(image_folder, run_folder), "optimizer.lr=0.5", "losses.kd.temperature=1"]
    result = vitkd("distill", *changed, "--resume")
    assert result.code == 2
    assert f"{run_folder} was begun with another losses.kd, optimizer.lr" in result.err


def test_resume_of_a_finished_run_only_reports(
    image_folder: Path, run_folder: Path, tmp_path: Path, vitkd
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run_folder, copy)
    (copy / "report.html").unlink()
    result = vitkd("distill", *arguments(image_folder, copy), *INT8, "--resume")
    assert result.code == 0, result.err
    assert " train step " not in result.out
    assert (copy / "report.html").exists()
    again, first = report.read(copy), report.read(run_folder)
    assert [m["mean"] for m in again["models"]] == [m["mean"] for m in first["models"]]


def test_one_more_seed_keeps_the_finished_ones(
    image_folder: Path, run_folder: Path, tmp_path: Path, vitkd
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run_folder, copy)
    result = vitkd("distill", *arguments(image_folder, copy), "run.seeds=[0, 1, 2]", "--resume")
    assert result.code == 0, result.err
    assert "distilled-2: train" in result.out or "distilled-2: val" in result.out
    assert "distilled-1: val" not in result.out
    assert len(report.read(copy)["models"][2]["runs"]) == 3


def test_distill_without_a_teacher_trains_alone(image_folder: Path, tmp_path: Path, vitkd) -> None:
    kept = arguments(image_folder, tmp_path / "run")
    kept = [x for x in kept if not x.startswith(("teacher.", "losses."))]
    result = vitkd("distill", *kept, "losses.ce.label_smoothing=0.1", "run.seeds=[0]")
    assert result.code == 0, result.err
    results = report.read(tmp_path / "run")
    assert [m["role"] for m in results["models"]] == ["baseline"]
    assert results["models"][0]["runs"][0]["fidelity"] == {}
    assert results["disagreements"] is None


@pytest.mark.parametrize(
    ("changed", "code", "error"),
    [
        (["optimizer.lrr=1"], 2, "optimizer.lrr: unknown key; the nearest is optimizer.lr"),
        (["data.train=/nowhere"], 1, "data.train: /nowhere is no folder"),
        (["optimizer.name=adamx"], 2, "optimizer.name: timm has no 'adamx'; the nearest is adamax"),
        (["optimizer.options={beta: 1}"], 2, "optimizer.options: {'beta': 1}: "),
        (
            ["augmentation.auto_augment=foo"],
            2,
            "augmentation.auto_augment: 'foo' is none of",
        ),
        (
            ["augmentation.scale=[-1, 1]"],
            2,
            "augmentation.scale.0: -1 (int) given; ",
        ),
        (["run.seeds=[-1]"], 2, "run.seeds.0: -1 (int) given; input should be greater than"),
        (["run.seeds=[1, 1]"], 2, "run.seeds: [1, 1] names a seed twice"),
        (["run.device=cuda"], 2, "run.device: expected cpu, as torch sees no GPU, got cuda"),
        (
            ["data.batch_size=1"],
            2,
            "data.batch_size: expected 2 or more for the batch norms of",
        ),
        (["teacher.epochs=0", "teacher.options.num_classes=10"], 2, "teacher.model: vit_tiny_patc"),
        (["losses={ce: {}}"], 2, "teaches nothing without losses.kd or another loss"),
        (["losses={attention: {}}"], 2, "losses.attention: trains no classifier; add losses.kd"),
        (["losses.attention={stride: 7}"], 2, "losses: Taps: maps: expected [2, 4, 8"),
        (["losses.attention={block: 9}"], 2, "losses: Taps: attention: expected ["),
        (["losses.attention={heads: 5}"], 2, "heads: expected a divisor of teacher_dim"),
        (
            ["losses.attention={kind: l2}"],
            2,
            "losses.attention.kind: 'l2' (str) given; input should be 'kl'",
        ),
        (["teacher.options.img_size=64"], 2, "teacher.model: cannot read images of data.image_"),
        (["optimizer.accumulate=100"], 1, "are fewer than an update takes: 1600"),
        (["student.model=mobilenetv2_10"], 1, "mobilenetv2_100"),
        (
            ["teacher.epochs=0"],
            2,
            "would teach with random weights (random); name its weights by t",
        ),
        (["run.folder=/proc/nowhere/run"], 1, "run.folder: /proc/nowhere/run cannot be written"),
        (["data.batch_size=1000"], 1, "150 training images are fewer than an update takes: 1000"),
    ],
)
def test_what_cannot_run_is_one_line(
    image_folder: Path, tmp_path: Path, vitkd, changed: list[str], code: int, error: str
) -> None:
    if "run.device=cuda" in changed and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = vitkd("distill", *arguments(image_folder, tmp_path / "run"), *changed)
    assert result.code == code
    assert error in result.err
    assert len(result.err.splitlines()) == 1


def test_unknown_recipe_names_the_nearest(vitkd) -> None:
    result = vitkd("distill", "cifar")
    assert result.code == 2
    assert "the nearest is cifar10" in result.err


def test_what_cannot_run_leaves_no_run_behind(image_folder: Path, tmp_path: Path, vitkd) -> None:
    wrong = [*arguments(image_folder, tmp_path / "run"), "student.options={nonsense: 1}"]
    for _ in range(2):
        result = vitkd("distill", *wrong)
        assert result.code == 1
        assert "nonsense" in result.err
    assert not (tmp_path / "run").exists()


def test_a_folder_without_a_saved_step_is_no_run(
    image_folder: Path, run_folder: Path, tmp_path: Path, vitkd
) -> None:
    """A run that was ended before its first checkpoint does not block the next."""
    folder = tmp_path / "run"
    (folder / "teacher").mkdir(parents=True)
    shutil.copy(run_folder / "config.yaml", folder)
    shutil.copy(run_folder / "teacher" / "metrics.jsonl", folder / "teacher")
    given = [x for x in arguments(image_folder, folder) if not x.startswith("teacher.")]
    given += [f"teacher.model={run_folder / 'teacher' / 'last.safetensors'}", "run.baseline=false"]
    result = vitkd("distill", *given, "run.seeds=[0]")
    assert result.code == 0, result.err


def test_a_folder_takes_one_run_at_a_time(image_folder: Path, tmp_path: Path, vitkd) -> None:
    (tmp_path / "run").mkdir()
    held = checkpoint.lock(tmp_path / "run")
    result = vitkd("distill", *arguments(image_folder, tmp_path / "run"))
    held.close()
    assert result.code == 1
    assert f"run.folder: {tmp_path}/run is in use by another process" in result.err
    assert [file.name for file in (tmp_path / "run").iterdir()] == [".lock"]


def test_a_dry_run_says_what_a_run_costs_and_writes_nothing(
    image_folder: Path, tmp_path: Path, vitkd
) -> None:
    result = vitkd("distill", *arguments(image_folder, tmp_path / "run"), "--dry-run")
    assert result.code == 0, result.err
    assert "data: 150 training images, 50 for validation, 10 classes\n" in result.out
    assert re.search(r"^classes \(training images\): 0 \(14\), 1 \(16\), ", result.out, re.M)
    assert re.search(r"^student: \d{3},\d{3} parameters, \S+ MMACs an image$", result.out, re.M)
    assert re.search(
        r"^a step: \S+ s; 9 steps for each of 2 seeds: \S+ h, and as", result.out, re.M
    )
    assert re.search(rf"^disk: \d+ MB at most in {tmp_path}/run, \S+ MB free$", result.out, re.M)
    assert not (tmp_path / "run").exists()


def test_batch_norms_that_forget_are_warned_of(image_folder: Path, tmp_path: Path, vitkd) -> None:
    """transformers' MobileNetV2 has momentum 0.997: TensorFlow's decay for PyTorch's share."""
    given = [
        x for x in arguments(image_folder, tmp_path / "run") if not x.startswith(("teac", "los"))
    ]
    for momentum, warned in ((0.997, True), (0.1, False)):
        options = f"student.options={{bn_momentum: {momentum}}}"
        result = vitkd("distill", *given, options, "--dry-run")
        assert result.code == 0, result.err
        line = f"warning: student.model: its batch norms have momentum {momentum}, so that"
        assert (line in result.out) == warned


@pytest.mark.parametrize("at", ["teacher: val", "data: "])
def test_ctrl_c_ends_with_130(image_folder: Path, tmp_path: Path, at: str) -> None:
    """Within the loop, which saves, and before it."""
    given = [*arguments(image_folder, tmp_path / "run"), "teacher.epochs=10000", "run.threads=1"]
    command = [sys.executable, "-m", "vitkd_fast.cli", "distill", *given]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout and process.stderr
        for line in process.stdout:
            if line.startswith(at):
                break
        for _ in range(3):  # a library that catches everything may swallow one
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                _, printed = process.communicate(timeout=8)
                break
        assert "Traceback" not in printed
        assert process.returncode == 130


def test_what_is_printed_before_the_first_step(
    image_folder: Path, run_folder: Path, tmp_path: Path, vitkd
) -> None:
    file = run_folder / "teacher" / "last.safetensors"
    given = [x for x in arguments(image_folder, tmp_path / "run") if not x.startswith("teacher.")]
    result = vitkd(
        "distill", *given, f"teacher.model={file}", "run.seeds=[0]", "run.baseline=false"
    )
    assert result.code == 0, result.err
    said = result.out[: result.out.index("distilled-0: ")]
    assert "classes (training images): 0 (14), 1 (16)" in said
    top1 = report.read(run_folder)["models"][0]["mean"]["top1"]
    assert f"teacher: {file}: top-1 {top1:.1%} of 50 validation images (guessing: 10.0%)" in said


@pytest.mark.parametrize(
    ("distilled", "baseline", "verdict"),
    [
        (
            [0.90, 0.92, 0.94],
            [0.80, 0.81, 0.85],
            "Distilled beats the baseline: +10.0 points, +17.3",
        ),
        ([0.9, 0.9, 0.9], [0.8, 0.8, 0.8], "Distilled beats the baseline: +10.0 points, p = 0"),
        # 4.2 standard errors, and p = 0.053 with two degrees of freedom
        (
            [0.95, 0.96, 0.94],
            [0.935, 0.935, 0.932],
            "Distilled is not shown to beat the baseline: +1.6",
        ),
        (
            [0.80, 0.81, 0.85],
            [0.90, 0.92, 0.94],
            "Distilled is worse than the baseline: -10.0 points",
        ),
        (
            [0.90, 0.80, 0.91],
            [0.80, 0.85, 0.90],
            "Distilled is not shown to beat the baseline: +2.0",
        ),
        ([0.90, 0.92], [0.80, 0.81], "Distilled is not shown to beat the baseline: +10.5 points"),
        ([0.9], [0.8], "One seed says nothing about chance"),
    ],
)
def test_the_verdict_says_what_the_numbers_say(
    distilled: list[float], baseline: list[float], verdict: str
) -> None:
    comparison = None
    if len(baseline) > 1:
        comparison = {"metric": "top1", **evaluate.paired_test(distilled, baseline)}
    assert results.verdict(comparison, True).startswith(verdict)


def test_a_truncated_image_stops_or_is_skipped(image_folder: Path, tmp_path: Path, vitkd) -> None:
    copy = tmp_path / "images"
    shutil.copytree(image_folder, copy)
    victim = next((copy / "train" / "3").iterdir())
    victim.write_bytes(victim.read_bytes()[:60])
    options = [*arguments(copy, tmp_path / "run"), "run.seeds=[0]", "run.baseline=false"]
    # an epoch leaves out the images that fill no batch: enough epochs meet the bad one
    options.append("teacher.epochs=4")
    result = vitkd("distill", *options)
    assert result.code == 1
    assert f"DataError: {victim} cannot be read" in result.err
    assert "Traceback" not in result.err
    result = vitkd("distill", *options, "--resume", "--skip-bad")
    assert result.code == 0, result.err
    assert f"skipped 1 images that cannot be read: {victim}" in result.out


# eval and predict


def test_eval_skips_bad_files_and_counts_them(
    image_folder: Path, run_folder: Path, tmp_path: Path, vitkd
) -> None:
    copy = tmp_path / "val"
    shutil.copytree(image_folder / "val", copy)
    victim = next((copy / "3").iterdir())
    victim.write_text("no image")
    (copy / "3" / "notes.txt").write_text("no image")
    model = run_folder / "distilled-0" / "best.safetensors"
    result = vitkd("eval", model, copy)
    assert result.code == 1
    assert f"{victim} cannot be read" in result.err
    result = vitkd("eval", model, copy, "--skip-bad")
    assert result.code == 0, result.err
    assert "49 images, 1 skipped" in result.out
    assert result.err == "DIR: files that are no images, ignored: 1 (1 .txt)\n"


def test_real_weights_read_real_images(request, tmp_path: Path, vitkd) -> None:
    """A MobileNetV2 with ImageNet's weights finds 88.8% of one image of every eighth class."""
    folder = request.getfixturevalue("data")
    model = models.create(
        "mobilenetv2_100",
        checkpoint=folder / "mobilenetv2_100.tf_in1k.safetensors",
        options={"pad_type": "same"},
    )
    half = (0.5, 0.5, 0.5)
    models.save(
        tmp_path / "model.safetensors",
        model,
        name="mobilenetv2_100",
        options={"pad_type": "same"},
        num_classes=1000,
        pixels=models.Pixels(224, half, half, "bicubic", 224 / 256),
        classes=ImageNetInfo().label_descriptions(),
    )
    with zipfile.ZipFile(folder / "imagenet-sample-a.zip") as archive:
        images = sorted(name for name in archive.namelist() if name.endswith(".JPEG"))
        for name in images[::4]:
            wnid = Path(name).name.split("_")[0]
            (tmp_path / "val" / wnid).mkdir(parents=True, exist_ok=True)
            (tmp_path / "val" / wnid / Path(name).name).write_bytes(archive.read(name))
    result = vitkd("eval", tmp_path / "model.safetensors", tmp_path / "val")
    assert result.code == 0, result.err
    assert "125 images, 0 skipped" in result.out
    scores = dict(line.split() for line in result.out.splitlines()[1:])
    assert float(scores["top1"]) == pytest.approx(0.888, abs=0.017)  # JPEG decoders differ
    image = next((tmp_path / "val" / "n01440764").iterdir())
    assert "tench" in vitkd("predict", tmp_path / "model.safetensors", image).out


def test_predict_prints_names_and_probabilities(
    image_folder: Path, run_folder: Path, vitkd
) -> None:
    files = sorted((image_folder / "val" / "7").iterdir())[:2]
    result = vitkd("predict", run_folder / "distilled-0" / "best.safetensors", *files)
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert len(lines) == 2
    loaded = models.load(run_folder / "distilled-0" / "best.safetensors")
    for file, line in zip(files, lines, strict=True):
        pixels = loaded.pixels
        transform = create_transform(
            pixels.image_size,
            use_prefetcher=True,
            crop_pct=pixels.crop_pct,
            interpolation=pixels.interpolation,
        )
        image = torch.as_tensor(transform(Image.open(file).convert("RGB")))[None]
        with torch.inference_mode():
            x = (image / 255 - torch.tensor(pixels.mean).view(3, 1, 1)) / torch.tensor(
                pixels.std
            ).view(3, 1, 1)
            best = loaded.model(x).softmax(1).max(1)
        name = loaded.classes[best.indices.item()]
        assert line.startswith(f"{file}: {name} {100 * best.values.item():.1f}%, ")


@pytest.mark.parametrize("command", ["eval", "predict"])
def test_a_model_that_is_none(command: str, image_folder: Path, tmp_path: Path, vitkd) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nothing")
    given = (
        image_folder / "val" if command == "eval" else next((image_folder / "val" / "7").iterdir())
    )
    result = vitkd(command, broken, given)
    assert result.code == 1
    assert "broken.safetensors" in result.err
    assert vitkd(command, "mobilenetv2_1000", given).code == 1


def test_predict_names_the_file_that_is_no_image(run_folder: Path, tmp_path: Path, vitkd) -> None:
    (tmp_path / "text.png").write_text("no image")
    model = run_folder / "distilled-0" / "best.safetensors"
    result = vitkd("predict", model, tmp_path / "text.png")
    assert result.code == 1
    assert f"DataError: {tmp_path}/text.png cannot be read" in result.err


def test_report_is_written_again(run_folder: Path, tmp_path: Path, vitkd) -> None:
    (tmp_path / "report.json").write_text((run_folder / "report.json").read_text())
    result = vitkd("report", tmp_path)
    assert result.code == 0, result.err
    assert report.table(json.loads((tmp_path / "report.json").read_text())) in result.out
    assert (tmp_path / "report.html").read_text() == (run_folder / "report.html").read_text()
    (tmp_path / "report.json").write_text("{")
    assert vitkd("report", tmp_path).code == 1
