"""losses.kure: kurtosis and range of a student's weights and maps, and where it is left out."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import nn

pytest.importorskip("timm")

from support.loop_tools import student, teacher
from vitkd_fast import models
from vitkd_fast.distill import preflight
from vitkd_fast.distill.config import Config, ConfigError, load
from vitkd_fast.distill.losses.quantizable import (
    imbalance,
    map_kurtosis,
    relative_range,
    weight_kurtosis,
)
from vitkd_fast.distill.runtime import Runtime
from vitkd_fast.distill.task import DistillationTask
from vitkd_fast.taps import Taps

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)


def config(kure: str, *more: str) -> Config:
    losses = f"losses={{kd: {{}}, kure: {kure}}}"
    return load("digits", ["student.model=mobilenetv2_035", losses, *more])


def task(kure: str) -> DistillationTask:
    chosen = config(kure)
    return DistillationTask.create(chosen, student(), teacher(), Runtime.of(chosen))


def test_figures() -> None:
    uniform = torch.linspace(-1, 1, 10_001)
    assert float(weight_kurtosis(uniform[None])) == pytest.approx(1.8, abs=1e-3)
    assert float(map_kurtosis(uniform + 5)) == pytest.approx(1.8, abs=1e-3)
    assert float(relative_range(uniform * 3 - 1)) == pytest.approx(1, abs=1e-3)
    torch.manual_seed(0)
    x = torch.randn(6, 4, 5, 5).relu()
    assert float(map_kurtosis(x)) == pytest.approx(stats.kurtosis(x.flatten(), fisher=False))
    assert float(relative_range(x)) == pytest.approx(
        float((x.max() - x.min()) / x.std(correction=0)) / 12**0.5
    )
    # each channel has a scale of its own
    scaled = x[:, :, 0] * torch.tensor([1, 10, 0.1, 3, 1, 7]).view(-1, 1, 1)
    assert float(weight_kurtosis(scaled)) == pytest.approx(float(weight_kurtosis(x[:, :, 0])))
    ratios = torch.tensor([1.0, 10, 0.1, 3]).view(1, 4, 1, 1)
    one = torch.randn(6, 1, 5, 5).expand(6, 4, 5, 5)
    assert float(imbalance(one)) == pytest.approx(0, abs=1e-9)
    assert float(imbalance(one * ratios)) == pytest.approx(float(ratios.log().var(correction=0)))
    for of in (weight_kurtosis, imbalance, map_kurtosis, relative_range):
        dead = torch.zeros(2, 3, requires_grad=True)
        of(dead).backward()
        assert dead.grad is not None and dead.grad.isfinite().all()


def test_the_term_is_its_formula() -> None:
    made = task("{weight: 0.5, weights: 2, equalization: 0.7, maps: 0.1, range: 0.3}").eval()
    result = made(IMAGES, torch.arange(8))
    kd, kure = result["terms"]
    predict = made.trainable_module.predict
    norms = [m for m in made.student.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        maps = Taps(made.student, norms=True)(predict[0](IMAGES)).norms
    assert len(maps) == len(norms) == 52
    layers = [m for m in made.student.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    of_weights = [(float(weight_kurtosis(m.weight.detach())) - 1.8) ** 2 for m in layers]
    dense = [m for m in layers if getattr(m, "groups", 1) == 1]
    of_channels = [float(imbalance(m.weight.detach())) for m in dense]
    of_maps = [math.log(float(map_kurtosis(y)) / 1.8) ** 2 for y in maps]
    of_ranges = [math.log(float(relative_range(y))) for y in maps]
    expected = 0.5 * (
        2 * sum(of_weights) / len(layers)
        + 0.7 * sum(of_channels) / len(dense)
        + 0.1 * sum(of_maps) / 52
        + 0.3 * sum(of_ranges) / 52
    )
    assert float(kure) == pytest.approx(expected, rel=1e-3)
    assert float(result["loss"]) == pytest.approx(float(kd + kure))


@pytest.mark.parametrize("part", ["weights", "equalization", "maps", "range"])
def test_it_falls(part: str) -> None:
    of = {"weights": 0, part: 1}
    made = task(str(of).replace("'", "")).train()
    optimizer = torch.optim.Adam(made.student.parameters(), 1e-3)
    found = []
    for _ in range(6):
        term = made(IMAGES, torch.arange(8))["terms"][1]
        term.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(term))
    assert found[-1] < found[0] - 0.02 * abs(found[0])


def test_where_it_is() -> None:
    """In the baseline, as in the distilled student; not in a teacher, nor where int8 trains."""
    chosen = config("{maps: 0.1}", "int8.aware={start: 0.5}")
    terms = dict(chosen.for_baseline().losses.terms())
    assert set(terms) == {"ce", "kure"} and terms["kure"] == chosen.losses.kure
    assert not chosen.for_teacher(chosen.teacher).losses.kure
    lesson, _ = preflight.aware_lesson(chosen, [teacher()], student())
    assert [name for name, _ in lesson.losses.terms()] == ["kd"]


def test_what_it_cannot_do() -> None:
    with pytest.raises(ConfigError, match=r"losses\.kure: trains no classifier"):
        load("digits", ["losses={kure: {}}", "teacher={}"])
    norms = models.create("vit_tiny_patch16_224", num_classes=10, image_size=32)
    with pytest.raises(ValueError, match="norms: expected batch norms, VisionTransformer has none"):
        Taps(norms, norms=True)
