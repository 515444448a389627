"""A student that branches off a run and is trained for int8: resumed, averaged, reported."""

from __future__ import annotations

import json
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
from vitkd_fast.distill import aware, loop
from vitkd_fast.distill.config import Config, ConfigError, load
from vitkd_fast.distill.runtime import Runtime
from vitkd_fast.distill.task import DistillationTask

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
    return loop.Trainer(chosen, task, splits(), folder, seed=0, save_model=save, **options)


def branched(folder: Path, branch: Path, chosen: Config) -> loop.Trainer:
    """As an experiment makes it."""
    made = student()
    aware.take_weights(made, branch)
    images = torch.from_numpy(random_images(0, (16, 32, 32, 3)))
    options = {"pixels": models.Pixels.of(made), "classes": list("0123456789"),
               "multilabel": False, "calibration": "mse"}  # fmt: skip
    module = aware.module(chosen, made, images, Runtime.of(chosen), **options)
    about = {"name": "mobilenetv2_035", "options": {}, "num_classes": 10,
             "pixels": options["pixels"], "classes": options["classes"]}  # fmt: skip

    def save(path: Path, trained: torch.nn.Module) -> None:
        aware.save(path, trained, **about)

    return begin(folder, chosen, module, save_model=save)


def test_a_branch_goes_on_and_resumes(tmp_path: Path) -> None:
    """Where the float run left it, with its optimiser and average; the same weights again."""
    chosen = config()
    plain = begin(tmp_path / "float", chosen, student(), branch=0.5)
    plain.run()
    branch = tmp_path / "float" / loop.BRANCH
    first = branched(tmp_path / "first", branch, chosen)
    aware.take_state(first, branch)
    assert first.step == 3
    module, ema = first.model, first.ema
    assert isinstance(module, int8.QuantizationAware) and ema
    moments = [first.optimizer.state[p] for p in module.model.parameters()]
    assert all(float(state["step"]) == 3 for state in moments)
    assert not any(p in first.optimizer.state for p in module.ranges.parameters())
    averaged = ema.module.model.state_dict()
    assert any(not torch.equal(x, averaged[key]) for key, x in module.model.state_dict().items())
    modes = []
    module.register_forward_pre_hook(lambda own, _: modes.append((own.training, own.frozen)))
    trained = first.run()
    # 3 and 4 of 6 steps are before 0.8 of them
    assert [frozen for training, frozen in modes if training] == [False, False, True]
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


def test_what_cannot_be_trained_for_int8() -> None:
    for more, why in (
        (["int8.aware={start: 0}"], "int8.aware.start: expected more than 0, or the weights"),
        (["int8.enabled=false"], "int8.enabled: expected true with int8.aware, got false"),
        (
            ["data.unlabelled=true", "losses={features: {}}", "teacher.epochs=0"],
            "int8.aware: needs a student with a",
        ),
    ):
        with pytest.raises(ConfigError, match=why):
            config(*more)
    with pytest.raises(ConfigError, match=r"int8\.aware\.starts: unknown key; the nearest is"):
        config("int8.aware={starts: 0.5}")
