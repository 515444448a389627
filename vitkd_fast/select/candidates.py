"""What is compared: candidates, each a configuration, and values of hyper-parameters."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from ..distill import config as configuration
from ..distill.config import Config, ConfigError

# of a command line: a comma before a key and "="; those inside a value stay
_COMMA = re.compile(r",(?=[A-Za-z_][\w.]*=)")


class Candidate(NamedTuple):
    """One that may be chosen."""

    name: str
    source: str | None  # a recipe or a .yaml file
    overrides: list[str]

    def config(self, *more: str) -> Config:
        """Its configuration, as a trial needs it."""
        found = configuration.load(self.source, [*self.overrides, *more])
        if why := _why_not(found):
            raise ConfigError(f"{self.name}: {why}")
        int8 = found.int8.model_copy(update={"enabled": False, "aware": None, "watch": 0})
        return found.model_copy(update={"int8": int8})


class Varied(NamedTuple):
    """A hyper-parameter, and the values that it is tried with."""

    key: str
    values: list[Any]

    def override(self, value: Any) -> str:
        return f"{self.key}={json.dumps(value)}"

    def of(self, config: Config) -> bool:
        """Whether a configuration has the section of this key, such as losses.kd."""
        section: Any = config
        for part in self.key.split(".")[:-1]:
            # an unknown key is one for `config.load` to explain
            section = (
                section.get(part, {}) if isinstance(section, dict) else getattr(section, part, {})
            )
            if section is None:
                return False
        return True


def _why_not(config: Config) -> str:
    if config.data.unlabelled:
        return "data.unlabelled: expected false, as candidates are judged by labels"
    if config.data.extra:
        return "data.extra: expected none, as splits are of labelled images"
    if config.given:
        return "int8.aware.start: expected more than 0, as candidates are trained from the start"
    if config.branch:
        return "branch: expected none, as a trial is one training"
    for name, teacher in config.all_teachers().items():
        if teacher.epochs:
            return (
                f"{name}.epochs: expected 0, as all trials share a trained teacher; `vitkd distill`"
                " leaves it in teacher/last.safetensors: teacher={model: FILE}"
            )
    return ""


def parse(source: str | None, overrides: Sequence[str], given: Iterable[str]) -> list[Candidate]:
    """Candidates from `NAME:[RECIPE|FILE.yaml,]KEY=VALUE,...`, over what all of them share.

    Raises:
        ConfigError: fewer than two, a name twice, or other images.
    """
    found: list[Candidate] = []
    for text in given:
        name, colon, rest = text.partition(":")
        if not colon or not name.strip() or not rest:
            raise ConfigError(f"--candidate: expected NAME:KEY=VALUE,..., got {text!r}")
        own = _COMMA.split(rest)
        base = own.pop(0) if "=" not in own[0] else source
        found.append(Candidate(name.strip(), base, [*overrides, *own]))
    names = [x.name for x in found]
    if len(found) < 2:
        raise ConfigError(f"--candidate: expected two or more, got {len(found)}")
    if len(set(names)) < len(names):
        raise ConfigError(f"--candidate: a name stands twice: {', '.join(names)}")
    return found


def parse_varied(given: Iterable[str]) -> list[Varied]:
    """Hyper-parameters from `KEY=[VALUE,...]`.

    Raises:
        ConfigError: no list of values.
    """
    found = []
    for text in given:
        key, equals, value = text.partition("=")
        values = configuration.parse(value, key) if equals else None
        if not isinstance(values, list) or not values:
            raise ConfigError(f"--vary: expected KEY=[VALUE,...], got {text!r}")
        found.append(Varied(key, values))
    return found
