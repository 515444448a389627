"""Spaces: those that ship, what is drawn of them, and what is none."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
import torch

from support.search_tools import recipe
from vitkd_fast import models
from vitkd_fast.distill.config import ConfigError
from vitkd_fast.search import space


@pytest.mark.parametrize("name", space.spaces())
def test_what_ships_can_be_drawn_and_built(name: str) -> None:
    every, drawn = space.load(name), recipe(Path("images"))
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    for _ in range(20):
        found = every.draw(study.ask(), drawn)
        assert found.data.image_size in every.image_size
    built = {
        (model, depth)
        for family in every.students.values()
        for model in family.width.values()
        for depth in (family.depth[-1],)
    }
    for model, depth in sorted(built):
        options = {} if depth == 1.0 else {"depth_multiplier": depth}
        with torch.device("meta"):
            assert models.create(model, num_classes=10, options=options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("students: {}", "students"),
        ("studentz: {}", "studentz"),
        ("students: {a: {width: {1.0: x}}}\noptimizer: {lr: {low: 2, high: 1}}", "low below high"),
        ("students: {a: {width: {1.0: x}}}\noptimizer: {lr: {low: 1, hi: 2}}", "hi"),
        ("students: {a: {width: {1.0: x}}}\noptimizer: {lr: []}", "expected a choice"),
        ("students: {a: {width: {1.0: x}}}\noptimizer: {schedule: cosine}", "the search's own"),
        ("a: [", "no YAML"),
    ],
)
def test_no_space(text: str, message: str, tmp_path: Path) -> None:
    (file := tmp_path / "s.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        space.load(str(file))


def test_no_such_space() -> None:
    with pytest.raises(ConfigError, match=r"expected a \.yaml file or one of default, digits"):
        space.load("defualt")


def test_what_does_not_fit_the_recipe_is_said() -> None:
    every = space.Space.model_validate(
        {"students": {"a": {"width": {1.0: "x"}}}, "losses": {"b": {"kd": {"temprature": 4.0}}}}
    )
    with pytest.raises(ConfigError, match=r"the nearest is losses\.kd\.temperature"):
        every.draw(optuna.create_study().ask(), recipe(Path("images")))
