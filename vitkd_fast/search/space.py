"""What a search draws from: students, resolutions, losses and the optimiser's numbers, in YAML."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from optuna.trial import BaseTrial
from pydantic import Field, ValidationError, model_validator

from .._files import home
from ..distill import config as configuration
from ..distill.config import Config, ConfigError
from ..distill.losses import Section


class Range(Section):
    """Numbers from low to high; log: their logarithms are drawn evenly."""

    low: float
    high: float
    log: bool = False

    @model_validator(mode="after")
    def _whole(self) -> Range:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(f"expected low below high, and above 0 with log, got {self}")
        return self


class Family(Section):
    """timm's models by width, and factors of depth, where timm's models of this family take one."""

    width: dict[float, str] = Field(min_length=1)
    depth: list[float] = Field([1.0], min_length=1)


class Space(Section):
    """Of what one candidate is drawn."""

    students: dict[str, Family] = Field(min_length=1)
    image_size: list[int] = Field([], min_length=0)  # []: the recipe's
    # one of these is drawn: terms of the configuration's section losses; {}: the recipe's
    losses: dict[str, dict[str, dict[str, Any]]] = Field({})
    optimizer: dict[str, Any] = Field({})  # over the recipe's

    @model_validator(mode="after")
    def _whole(self) -> Space:
        for terms in [*self.losses.values(), {"optimizer": self.optimizer}]:
            for options in terms.values():
                for value in options.values():
                    if isinstance(value, dict):
                        Range.model_validate(value)
                    if isinstance(value, list) and not value:
                        raise ValueError("expected a choice, got []")
        if own := {"schedule", "cooldown", "warmup_epochs"} & self.optimizer.keys():
            raise ValueError(f"optimizer.{own.pop()}: is the search's own")
        return self

    def draw(self, trial: BaseTrial, recipe: Config) -> Config:
        """The configuration of a candidate: the recipe's, with what is drawn put over it.

        Raises:
            ConfigError: what is drawn does not fit the recipe.
        """
        tree = recipe.model_dump()
        name = trial.suggest_categorical("student", list(self.students))
        family = self.students[name]
        width = trial.suggest_categorical(f"{name}.width", list(family.width))
        options = dict(recipe.student.options)
        if family.depth != [1.0]:
            depth = trial.suggest_categorical(f"{name}.depth", family.depth)
            options |= {} if depth == 1.0 else {"depth_multiplier": depth}
        tree["student"] |= {"model": family.width[width], "options": options, "checkpoint": ""}
        if self.image_size:
            size = trial.suggest_categorical("image_size", self.image_size)
            tree["data"]["image_size"] = size
        if self.losses:
            chosen = trial.suggest_categorical("losses", list(self.losses))
            tree["losses"] = {
                term: {
                    key: _drawn(trial, f"{chosen}.{term}.{key}", value)
                    for key, value in options.items()
                }
                for term, options in self.losses[chosen].items()
            }
        for key, value in self.optimizer.items():
            tree["optimizer"][key] = _drawn(trial, key, value)
        return configuration.validate(tree)


def _drawn(trial: BaseTrial, name: str, value: Any) -> Any:
    if isinstance(value, list):
        return trial.suggest_categorical(name, value)
    if isinstance(value, dict):
        found = Range.model_validate(value)
        return trial.suggest_float(name, found.low, found.high, log=found.log)
    return value


def spaces() -> list[str]:
    """The names of the spaces that ship with the package."""
    folder = resources.files("vitkd_fast") / "recipes" / "spaces"
    return sorted(file.name[:-5] for file in folder.iterdir() if file.name.endswith(".yaml"))


def load(source: str) -> Space:
    """A space by its name, or of a YAML file.

    Raises:
        ConfigError: there is no such space, or it is none; names the key.
    """
    if source.endswith((".yaml", ".yml")):
        try:
            text = Path(home(source)).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{source}: cannot be read: {error}") from error
    elif source in spaces():
        text = (resources.files("vitkd_fast") / "recipes" / "spaces" / f"{source}.yaml").read_text()
    else:
        raise ConfigError(
            f"--space: expected a .yaml file or one of {', '.join(spaces())}, got {source}"
        )
    tree = configuration.parse(text, source)
    try:
        return Space.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{source}: {key + ': ' if key else ''}{first['msg']}") from None
