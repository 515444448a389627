"""Pruned students: which channels stay, their files, and their way into the int8 engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from vitkd_fast import int8, models
from vitkd_fast.distill.config import ConfigError, load
from vitkd_fast.distill.preflight import create_student, rebuilding

pytest.importorskip("torch_pruning", reason="the extra prune brings torch-pruning")
from vitkd_fast import pruning

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("mobilenetv2_050", "mobilenetv3_small_050", "mobilenetv4_conv_small")
PIXELS = models.Pixels(32, (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0)


def made(name: str, share: float = 0.3) -> Any:
    return pruning.prune(models.create(name, num_classes=10, image_size=32), share, 32)


def widths(model: nn.Module) -> list[tuple[int, int]]:
    """Channels in and out of each convolution."""
    convs = (m for m in model.modules() if isinstance(m, nn.Conv2d))
    return [(m.in_channels, m.out_channels) for m in convs]


def written(model: nn.Module, path: Path, name: str) -> Path:
    about: Any = {"options": {}, "num_classes": 10, "pixels": PIXELS, "classes": list("0123456789")}
    models.save(path, model, name=name, **about)
    return path


@pytest.mark.parametrize("name", NAMES)
def test_a_file_remembers_the_widths(name: str, tmp_path: Path) -> None:
    model, whole = made(name).eval(), models.create(name, num_classes=10)
    pairs = list(zip(widths(model), widths(whole), strict=True))
    assert all(a <= b and c <= d for (a, c), (b, d) in pairs)
    narrower = [after[1] for after, before in pairs if after[1] < before[1]]
    assert len(narrower) > len(pairs) / 2 and not any(x % pruning.MULTIPLE for x in narrower)
    images = torch.rand(2, 3, 32, 32)
    file = written(model, tmp_path / "pruned.safetensors", name)
    loaded = models.load(file).model
    assert models.Origin.of(loaded).pruned and widths(loaded) == widths(model)
    with torch.inference_mode():
        expected = model(images)
        assert torch.equal(loaded(images), expected)
    # as the weights of a further run, with the same classes and with others
    again = models.create(name, num_classes=10, checkpoint=file).eval()
    with torch.inference_mode():
        assert torch.equal(again(images), expected)
    other: Any = models.create(name, num_classes=3, checkpoint=file, new_head=True)
    assert widths(other) == widths(model) and other(images).shape == (2, 3)
    other.reset_classifier(5)
    assert other(images).shape == (2, 5)
    # and a file of a whole model stays one
    assert not models.Origin.of(models.load(written(whole, file, name)).model).pruned


def test_the_channels_with_the_smallest_weights_go() -> None:
    model: Any = models.create("mobilenetv2_050", num_classes=10, image_size=32)
    block = model.blocks[3][1]  # one that is added to what it reads
    hidden = block.conv_pw.out_channels
    small = torch.arange(hidden) % 3 == 0
    with torch.no_grad():
        for weight in (
            block.conv_pw.weight,
            block.conv_dw.weight,
            block.conv_pwl.weight.transpose(0, 1),
        ):
            weight[small] *= 1e-4
    kept = block.conv_dw.weight[~small].clone()
    pruning.prune(model, 0.3, 32, multiple=1)
    assert len(block.conv_dw.weight) == int(0.7 * hidden)
    rows = {tuple(x.flatten().tolist()) for x in kept}
    stay = [tuple(x.flatten().tolist()) for x in block.conv_dw.weight]
    assert sum(x in rows for x in stay) == min(len(kept), len(stay))


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[] if "v3" in x else pytest.mark.slow) for x in NAMES]
)
def test_the_engine_runs_it(name: str, tmp_path: Path) -> None:
    model = made(name).eval()
    pixels = np.random.default_rng(0).integers(256, size=(8, 32, 32, 3), dtype=np.uint8)
    quantized = int8.quantize(model, pixels, mean=PIXELS.mean, std=PIXELS.std)
    quantized.save(tmp_path / "student.int8.safetensors")
    found = int8.load(tmp_path / "student.int8.safetensors")(pixels)
    with torch.inference_mode():
        expected = models.predictor(model, PIXELS)(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    error = np.linalg.norm(found - expected.numpy()) / np.linalg.norm(expected.numpy())
    assert error < 0.25


@pytest.mark.parametrize("aware", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_prunes_before_it_trains(aware: bool, tmp_path: Path, vitkd: Any) -> None:
    """And its int8 student, and the files of both, are as narrow."""
    run = ["digits", "student.prune=0.3", "data.holdout=0.05", "teacher={}", "losses={ce: {}}",
           "run.max_steps=3", "run.seeds=[0]", "data.batch_size=16", "int8.calibration_images=16",
           f"run.folder={tmp_path}/run",
           *(["int8.aware={start: 0.5}"] if aware else [])]  # fmt: skip
    result = vitkd("distill", *run)
    assert result.code == 0, result.err
    rows = {
        x["role"]: x for x in json.loads((tmp_path / "run" / "report.json").read_text())["models"]
    }
    whole = create_student(load("digits"), list("0123456789"))
    assert len(rows) == 2 + aware and len({x["macs"] for x in rows.values()}) == 1
    assert rows["baseline"]["parameters"] < 0.8 * sum(x.numel() for x in whole.parameters())
    student = models.load(tmp_path / "run" / "baseline-0" / "last.safetensors").model
    assert sum(x.numel() for x in student.parameters()) == rows["baseline"]["parameters"]
    # what a replay begins with
    config = load("digits", ["student.prune=0.3"])
    twin = create_student(config, list("0123456789"))
    section = rebuilding(config.student, twin)
    assert widths(create_student(config.model_copy(update={"student": section}), "0123456789")) == (
        widths(student)
    )


def test_what_cannot_be_pruned() -> None:
    with pytest.raises(
        ConfigError, match=r"student.prune: 1.0 .float. given; input should be less than 1"
    ):
        load("digits", ["student.prune=1.0"])
    with pytest.raises(ValueError, match="share: expected 0 to less than 1, got 2"):
        pruning.prune(models.create("mobilenetv2_035"), 2, 32)
