"""A student that branches off a run and is trained for int8: resumed, averaged, reported."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("timm")

from support.int8_graphs import random_images
from support.loop_tools import splits, student, teacher
from support.run_tools import arguments
from vitkd_fast import cli, int8, models
from vitkd_fast.distill import aware, logger, loop, preflight, quantized
from vitkd_fast.distill.config import Config, ConfigError, load
from vitkd_fast.distill.experiment import distill
from vitkd_fast.distill.runtime import Runtime
from vitkd_fast.distill.task import DistillationTask
from vitkd_fast.functional import kd_loss

pytestmark = pytest.mark.usefixtures("one_thread")

RUN = [
    "student.model=mobilenetv2_035", "data.batch_size=16", "run.epochs=5", "run.max_steps=6",
    "run.log_every=1", "run.precision=float32", "run.threads=1",
    "optimizer.ema_decay=0.9",
    "int8.aware={start: 0.5, freeze_bn: 0.8}", "losses.kd={ce_weight: 0.3}",
]  # fmt: skip


def config(*more: str) -> Config:
    return load("digits", [*RUN, *more])


def begin(folder: Path, chosen: Config, made: Any, **options: Any) -> loop.Trainer:
    task = DistillationTask.create(chosen, made, teacher(), Runtime.of(chosen))
    save = options.pop("save_model", lambda *_: None)
    kind = aware.AwareTrainer if "requantize" in options else loop.Trainer
    return kind(chosen, task, splits(), folder, seed=0, save_model=save, **options)


def branched_module(made: Any) -> int8.QuantizationAware:
    images = torch.from_numpy(random_images(0, (16, 32, 32, 3)))
    pixels = models.Pixels.of(made)
    start = int8.quantize(made.eval(), images, mean=pixels.mean, std=pixels.std)
    return int8.QuantizationAware(made, start)


def branched(
    folder: Path, branch: Path, chosen: Config, asked: list[bool] | None = None
) -> loop.Trainer:
    """As an experiment makes it; notes for which batch norms ranges were found."""
    made = student()
    aware.take_weights(made, branch)
    images = torch.from_numpy(random_images(0, (16, 32, 32, 3)))
    options = {"pixels": models.Pixels.of(made), "classes": list("0123456789"),
               "multilabel": False, "calibration": "mse"}  # fmt: skip
    runtime, asked = Runtime.of(chosen), asked if asked is not None else []
    module = aware.module(chosen, made, images, runtime, **options)

    def requantize(now: torch.nn.Module, frozen: bool) -> int8.QuantizedModel:
        asked.append(frozen)
        batch_size = 0 if frozen else chosen.data.batch_size
        return aware.quantized_by_first(now, images, runtime, batch_size=batch_size, **options)

    about = {"name": "mobilenetv2_035", "options": {}, "num_classes": 10,
             "pixels": options["pixels"], "classes": options["classes"]}  # fmt: skip

    def save(path: Path, trained: torch.nn.Module) -> None:
        aware.save(path, trained, **about)

    again = {"start": 0.5, "requantize": requantize}
    return begin(folder, chosen, module, save_model=save, **again)


def test_a_branch_goes_on_and_resumes(tmp_path: Path) -> None:
    """Where the float run left it, with its optimiser and average; the same weights again."""
    chosen = config()
    plain = begin(tmp_path / "float", chosen, student(), branch=0.5)
    plain.run()
    branch = tmp_path / "float" / loop.BRANCH
    asked: list[bool] = []
    first = branched(tmp_path / "first", branch, chosen, asked)
    aware.take_state(first, branch)
    assert first.step == 3
    module, ema = first.model, first.ema
    assert isinstance(module, int8.QuantizationAware) and ema
    moments = [first.optimizer.state[p] for p in module.model.parameters()]
    assert all(float(state["step"]) == 3 for state in moments)
    assert not any(p in first.optimizer.state for p in module.ranges.parameters())
    averaged = ema.module.model.state_dict()
    assert any(not torch.equal(x, averaged[key]) for key, x in module.model.state_dict().items())
    modes: list[tuple[bool, bool]] = []
    steps: list[torch.Tensor] = []
    begun = module.ranges.map_step.clone()

    def look(own: int8.QuantizationAware, _: Any) -> None:
        if own.training:
            modes.append((own.model.training, own.frozen))
            steps.append(own.ranges.map_step.clone())

    module.register_forward_pre_hook(look)
    trained = first.run()
    # 3 and 4 of 6 steps are before 0.8 of them; ranges are found again at 0.6, 0.7 and 0.8
    assert modes == [(True, False), (True, False), (True, True)]
    assert asked == [False, True]
    assert torch.equal(steps[0], begun)
    assert not torch.equal(steps[1], begun) and not torch.equal(steps[2], steps[1])
    assert isinstance(trained, int8.QuantizationAware)
    assert torch.equal(trained.ranges.map_step, steps[-1])
    assert trained is ema.module
    # stopped after a step, and resumed
    second = branched(tmp_path / "second", branch, chosen)
    aware.take_state(second, branch)
    second.task.train()
    second.update(second.loader.epoch(0, second.step))
    second._save()
    third = branched(tmp_path / "second", branch, chosen)
    third.restore()
    again = third.run()
    for key, value in trained.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    # what is saved is the average, in both forms
    images = random_images(1, (4, 32, 32, 3))
    saved = int8.load(tmp_path / "first" / "last.int8.safetensors")(images)
    trained.eval()
    with torch.no_grad():
        expected = trained(torch.from_numpy(images).permute(0, 3, 1, 2))
    assert torch.equal(torch.from_numpy(saved), expected)
    weights = models.load(tmp_path / "first" / "last.safetensors").model.state_dict()
    assert all(torch.equal(x, weights[key]) for key, x in trained.model.state_dict().items())


def test_when_ranges_are_found() -> None:
    assert aware.searches(0.7, 0.85) == pytest.approx([0.75, 0.8, 0.85, 0.925])
    assert aware.searches(0.7, 0.7) == aware.searches(0.0, 0.0) == []


def test_ranges_are_those_of_batches(tmp_path: Path) -> None:
    """Of a student as it is in training. Its own running statistics stay as they are."""
    images = torch.from_numpy(random_images(0, (70, 32, 32, 3)))
    pixels = images.permute(0, 3, 1, 2)
    made = student().eval()
    before = {key: x.clone() for key, x in made.state_dict().items()}
    given = aware.with_statistics(made, images, batch_size=32)
    assert not given.training
    assert all(torch.equal(x, before[key]) for key, x in made.state_dict().items())
    with torch.no_grad():
        sums = torch.stack(
            [made.conv_stem(models.predictor(made)[0](pixels[i : i + 32])) for i in (0, 32)]
        )
    of_batches = sums.transpose(1, 2).flatten(2)
    torch.testing.assert_close(given.bn1.running_mean, of_batches.mean(2).mean(0))
    torch.testing.assert_close(given.bn1.running_var, of_batches.var(2).mean(0))
    norms = {key: x for key, x in given.state_dict().items() if "running" in key}
    # two whole batches; the six images that are left are not looked at
    more = aware.with_statistics(made, images[:64], batch_size=32).state_dict()
    assert all(torch.equal(x, more[key]) for key, x in norms.items())
    assert all(int(x) == 2 for key, x in more.items() if key.endswith("num_batches_tracked"))
    options = {"pixels": models.Pixels.of(made), "classes": list("0123456789"),
               "multilabel": False, "calibration": "mse"}  # fmt: skip
    for size, of in ((0, made), (32, given)):
        runtime = Runtime.of(config())
        aware.quantized_by_first(made, images, runtime, batch_size=size, **options).save(
            tmp_path / "found"
        )
        quantized.quantize(of, images, **options).save(tmp_path / "expected")
        assert (tmp_path / "found").read_bytes() == (tmp_path / "expected").read_bytes()


def test_ranges_are_no_part_of_what_is_clipped(tmp_path: Path) -> None:
    """Their gradients, which LSQ scales, are thousands of times the weights'."""
    chosen = config("optimizer.clip_grad=0.01")
    run = begin(tmp_path, chosen, branched_module(student()))
    module: Any = run.model
    norms: list[float] = []

    def look(*_: Any) -> None:
        for part in (module.model, module.ranges):
            grads = [p.grad for p in part.parameters() if p.grad is not None]
            norms.append(float(torch.nn.utils.get_total_norm(grads)))

    run.optimizer.register_step_pre_hook(look)
    run.task.train()
    run.update(run.loader.epoch(0, 0))
    assert norms[0] == pytest.approx(0.01, rel=1e-3) and norms[1] > 1


def vitkd(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["vitkd", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


@pytest.mark.slow
def test_a_run_and_one_more_epoch(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows and tests of the report, then --from, which trains no float student."""
    folder = tmp_path / "run"
    keys = [*arguments(image_folder, folder), "int8.enabled=true", "int8.calibration_images=32"]
    assert not vitkd(monkeypatch, "distill", *keys, "run.baseline=false", "int8.aware={start: 0.5}")
    found = json.loads((folder / "report.json").read_text())
    roles = [row["role"] for row in found["models"]]
    assert roles == ["teacher", "distilled", "int8", "int8-aware"]
    assert set(found["int8_comparisons"]) == {"distilled", "int8"}
    assert found["int8_comparisons"]["int8"]["seeds"] == 2
    assert any(note.startswith("int8-aware less int8: ") for note in found["notes"])
    assert (folder / "int8-aware-1" / "last.int8.safetensors").exists()
    more = tmp_path / "more"
    keys = [key.replace(str(folder), str(more)) for key in keys]
    file = folder / "distilled-0" / "last.safetensors"
    teaching = ["teacher.epochs=0", f"teacher.model={folder}/teacher/last.safetensors",
                "teacher.options={}"]  # fmt: skip
    assert not vitkd(monkeypatch, "distill", *keys, *teaching, "run.seeds=[0]", "--from", str(file))
    found = json.loads((more / "report.json").read_text())
    assert [row["role"] for row in found["models"]] == roles
    assert not (more / "distilled-0" / "metrics.jsonl").exists()
    assert (more / "int8-aware-0" / "metrics.jsonl").exists()


@pytest.fixture(scope="module")
def trained_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student's file, as a run leaves it."""
    made, file = student(), tmp_path_factory.mktemp("student") / "last.safetensors"
    pixels = models.Pixels(32, (0.4, 0.5, 0.6), (0.2, 0.2, 0.3), "bilinear", 0.9)
    names = tuple(f"digit {i}" for i in range(10))
    about: dict[str, Any] = {"options": {}, "num_classes": 10, "pixels": pixels, "classes": names}
    models.save(file, made, name="mobilenetv2_035", **about)
    return file


def test_from_a_file_without_any_label(
    image_folder: Path, trained_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The float student teaches; no image has a class, and the file says what the student is."""
    images, folder = tmp_path / "images", tmp_path / "run"
    images.mkdir()
    for file in sorted((image_folder / "train").rglob("*.png"))[:72]:
        shutil.copy(file, images)
    small = ["data.batch_size=16", "data.workers=0", "int8.calibration_images=16", "run.threads=1",
             "run.precision=float32", "run.log_every=1", f"run.folder={folder}"]  # fmt: skip
    given = ["distill", "int8-unlabelled", f"data.train={images}", *small, "--from"]
    assert not vitkd(monkeypatch, *given, str(trained_file))
    found = json.loads((folder / "report.json").read_text())
    section = found["config"]["data"]
    assert [section[key] for key in ("image_size", "crop_pct", "interpolation")] == [
        32, 0.9, "bilinear",
    ]  # fmt: skip
    rows = {row["role"]: row for row in found["models"]}
    assert list(rows) == ["distilled", "int8", "int8-aware"]
    assert not rows["distilled"]["mean"]
    for role in ("int8", "int8-aware"):
        mean = rows[role]["mean"]
        assert mean.keys() == {"agreement", "kl", "correlation", "unchanged"}
        assert 0 <= mean["unchanged"] == mean["agreement"] <= 1
    assert found["verdict"].startswith("Trained for int8, the student agrees with itself")
    # 65 images to train on, 4 updates; they have no other loss
    train = [row for row in logger.read(folder / "int8-aware-0") if row["kind"] == "train"]
    assert [row["step"] for row in train] == [1, 2, 3, 4]
    assert all(row["loss"] == row["kd"] > 0 for row in train)
    [val] = [row for row in logger.read(folder / "int8-aware-0") if row["kind"] == "val"]
    assert val["loss"] > 0 and "top1" not in val
    # weights that moved, with the file's classes
    before, after = (
        models.load(x) for x in (trained_file, folder / "int8-aware-0" / "last.safetensors")
    )
    assert before.classes == after.classes and before.pixels == after.pixels
    weights = after.model.state_dict()
    assert any(not torch.equal(x, weights[key]) for key, x in before.model.state_dict().items())
    statistics = {k: x for k, x in before.model.state_dict().items() if "running_" in k}
    assert statistics and all(torch.equal(x, weights[key]) for key, x in statistics.items())
    session = int8.load(folder / "int8-aware-0" / "last.int8.safetensors")
    assert session.classes == before.classes
    assert not vitkd(monkeypatch, *given[:-1], "--resume", "--from", str(trained_file))


def test_who_teaches() -> None:
    """The run's teacher, the float student, or the mean of both."""
    torch.manual_seed(0)
    final, other = student(), teacher()
    images, labels = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8), torch.arange(4)
    predictions = {
        name: models.predictor(x.eval())(images).detach()
        for name, x in (("float", final), ("teacher", other))
    }
    mean = sum(x.softmax(1) for x in predictions.values()) / 2
    made = branched_module(student())
    for by, expected in (
        ("teacher", predictions["teacher"]), ("float", predictions["float"]), ("both", mean.log()),
    ):  # fmt: skip
        chosen = config(f"int8.aware={{start: 0.5, teacher: {by}}}", "losses={kd: {}}")
        lesson, teachers = preflight.aware_lesson(chosen, [other], final)
        task = DistillationTask.create(lesson, made, teachers, Runtime.of(chosen)).eval()
        with torch.no_grad():
            result = task(images, labels)
        torch.testing.assert_close(result["loss"], kd_loss(result["output"], expected))


def test_teachers_that_do_not_fit(image_folder: Path, tmp_path: Path) -> None:
    """They are refused before any training."""
    keys = [*arguments(image_folder, tmp_path), "int8.enabled=true", "run.seeds=[0]"]
    for losses, by, why in (
        ("{kd: {}, attention: {stride: 8}}", "both", "both: losses: .*attention"),
        ("{kd: {}, feature: {features: pooled}}", "float", "the losses learn layers beside the"),
    ):
        chosen = load(None, [*keys, f"losses={losses}", f"int8.aware={{teacher: {by}}}"])
        with pytest.raises(ConfigError, match=rf"int8\.aware\.teacher: .*{why}"):
            distill(chosen, dry_run=True)


def test_what_cannot_be_trained_for_int8(trained_file: Path) -> None:
    file = f"student.checkpoint={trained_file}"
    given = ["int8.aware={start: 0, teacher: float}", "data.unlabelled=true", file, "teacher={}"]
    for more, why in (
        (["int8.aware={start: 0}"], "int8.aware.start: expected more than 0, or the weights"),
        (["int8.enabled=false"], "int8.enabled: expected true with int8.aware, got false"),
        (
            ["data.unlabelled=true", "losses={features: {}}", "teacher.epochs=0"],
            "int8.aware: needs a student with a",
        ),
        (
            ["losses={ce: {}}", "teacher={}", "int8.aware.teacher=both"],
            "int8.aware.teacher: expected teacher without losses",
        ),
        (["teacher={}", "int8.aware.teacher=both", file], "teacher.model: missing, and losses.kd"),
        (
            ["int8.aware.teacher=both", "teacher={model: a, cache: b}"],
            "expected teacher or float with teacher.cache, got both",
        ),
        (given, "losses.kd: expected ce_weight 0, with losses.ce instead, and data.unlabelled has"),
        ([*given, "losses={kd: {}, ce: {}}"], "losses.ce: is of labels, and data.unlabelled has"),
        ([*given, "losses={kd: {}}", "data.probe=digits"], "data.probe: expected none with int8"),
    ):
        with pytest.raises(ConfigError, match=why):
            config(*more)
    with pytest.raises(ConfigError, match=r"int8\.aware\.starts: unknown key; the nearest is"):
        config("int8.aware={starts: 0.5}")
