"""Losses of rows as modules, temperatures that are learned or follow the teacher, and the terms."""

import math
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from support.kd_tools import draw, pair
from support.loop_tools import trainer
from vitkd_fast.functional import dkd_loss, js_loss, kd_loss, reverse_kl_loss, tv_loss
from vitkd_fast.nn import (
    CurriculumTemperature,
    DKDLoss,
    JSLoss,
    KDLoss,
    LearnableTemperature,
    ReverseKLLoss,
    TVLoss,
    entropy_temperature,
)

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.tensor([0, 3, 9, 5])


def test_modules_are_their_functions() -> None:
    student, teacher = pair(4, 10)
    for module, loss, options in (
        (ReverseKLLoss, reverse_kl_loss, {"temperature": 2.0}),
        (JSLoss, js_loss, {"beta": 0.3}),
        (TVLoss, tv_loss, {"ce_weight": 0.5}),
        (DKDLoss, dkd_loss, {"alpha": 2.0, "standardize": True}),
        (KDLoss, kd_loss, {"standardize": True, "temperature": 2.0}),
    ):
        given = module(**options)(student, teacher, IDS)
        assert torch.equal(given, loss(student, teacher, labels=IDS, **options))
        name, value = next(iter(options.items()))
        assert f"{name}={value!r}" in repr(module(**options))


def test_learnable_temperature_descends() -> None:
    """Its gradient is the loss's, and it stays above its least."""
    student, teacher = pair(4, 10)
    module = LearnableTemperature(4.0, low=0.5)
    assert_close(module(), torch.tensor(4.0))
    before = kd_loss(student, teacher, temperature=module())
    before.backward()
    with torch.no_grad():
        module.theta -= 0.01 * module.theta.grad
    assert kd_loss(student, teacher, temperature=module()) < before
    with torch.no_grad():
        module.theta.fill_(-100.0)
    assert module() == 0.5
    for start, low in ((1.0, 1.0), (1.0, -0.1), (0.5, 1.0)):
        with pytest.raises(ValueError, match="LearnableTemperature: start: expected more than"):
            LearnableTemperature(start, low)


@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_curriculum_ascends(progress: float) -> None:
    """The gradient's factor goes from 0 to -1 by a cosine (CTKD's CosineDecay of 0, -1)."""
    student, teacher = pair(4, 10)
    module = CurriculumTemperature()
    temperature = module(student, teacher, progress)
    assert_close(temperature, 1 + 20 * torch.ones(()).sigmoid())
    kd_loss(student, teacher, temperature=temperature).backward()
    plain = module.theta.detach().clone().requires_grad_()
    kd_loss(student, teacher, temperature=1 + 20 * plain.sigmoid()).backward()
    assert_close(module.theta.grad, (math.cos(math.pi * progress) - 1) / 2 * plain.grad)


def test_curriculum_of_instances() -> None:
    student, teacher = pair(4, 10)
    module = CurriculumTemperature(classes=10)
    temperature = module(student.requires_grad_(), teacher, 1.0)
    assert temperature.shape == (4,)
    assert ((temperature > 1) & (temperature < 21)).all()
    temperature.sum().backward()
    assert student.grad is None
    assert all(x.grad is not None for x in module.parameters())
    with pytest.raises(ValueError, match="CurriculumTemperature: span: expected a number > 0"):
        CurriculumTemperature(span=0.0)


def test_entropy_temperature() -> None:
    teacher = torch.tensor([[0.0] * 10, [1e4] + [0.0] * 9, [-torch.inf] * 9 + [1.0]])
    assert_close(entropy_temperature(teacher, 1.0, 4.0), torch.tensor([1.0, 4.0, 4.0]))
    some = entropy_temperature(draw(6, 10), 2.0, 3.0)
    assert ((some > 2) & (some < 3)).all()
    with pytest.raises(ValueError, match="entropy_temperature: low: expected 0 < low <= high"):
        entropy_temperature(teacher, 5.0, 4.0)


@pytest.mark.parametrize(
    ("name", "options", "learns"),
    [
        ("reverse_kl", "{temperature: 2}", False),
        ("js", "{beta: 0.3, ce_weight: 0.5}", False),
        ("tv", "{temperature: entropy}", False),
        ("dkd", "{temperature: curriculum, standardize: true, ce_weight: 1}", True),
        ("kd", "{temperature: learned, standardize: true}", True),
    ],
)
def test_terms(name: str, options: str, learns: bool, tmp_path: Path) -> None:
    """A few steps with mixed labels; the temperature moves where it is learned."""
    made = trainer(tmp_path, ["losses.kd=null", f"losses.{name}={options}"])
    before = [x.clone() for x in made.learned.parameters()]
    made.run()
    after = list(made.learned.parameters())
    assert len(after) == learns
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(x.isfinite().all() for x in made.model.state_dict().values())
