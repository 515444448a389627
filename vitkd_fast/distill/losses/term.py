"""What the terms of a loss share: schedules, the outputs of a step, and the class of a term."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Collection, Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeAlias, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from torch import Tensor, nn

from ...functional import (
    Labels,
)
from ...taps import TapOutputs, Taps

TapSpec: TypeAlias = Mapping[str, tuple[int, ...] | bool]  # arguments of Taps


_Part = TypeVar("_Part", bound=nn.Module)


class StepOutputs(NamedTuple):
    """Outputs of student and teacher for a batch, its labels, and the student itself."""

    student: TapOutputs
    teacher: TapOutputs | None
    labels: Labels
    model: nn.Module | None = None


class Section(BaseModel):
    """A part of the configuration: unknown keys and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Ramp(Section):
    """A number that goes from `start` to `end` within the first `until` of a run, then stays."""

    start: float
    end: float
    until: float = Field(1.0, gt=0, le=1)
    shape: Literal["linear", "cosine"] = "linear"

    def at(self, progress: float) -> float:
        """The value after this share of the run, 0 to 1."""
        x = min(progress / self.until, 1.0)
        if self.shape == "cosine":
            x = (1 - math.cos(math.pi * x)) / 2
        return self.start + (self.end - self.start) * x


def _constant(value: Any) -> Any:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return {"start": value, "end": value}
    return value


Schedule = Annotated[Ramp, BeforeValidator(_constant)]


def _temperature(value: float | str) -> float | str:
    names = ("learned", "curriculum", "entropy")
    if value in names or (isinstance(value, float | int) and value > 0):
        return value
    raise ValueError(f"expected a number > 0, {', '.join(names[:-1])} or {names[-1]}")


Temperature = Annotated[float | str, AfterValidator(_temperature)]


ONE, ZERO = Ramp(start=1, end=1), Ramp(start=0, end=0)


class Term(Section):
    """One term of the loss, times its weight."""

    distils: ClassVar[bool] = True  # compares the student with a teacher
    classifies: ClassVar[bool] = False  # trains the student's classifier
    averages: ClassVar[bool] = False  # compares logits alone, of several teachers their average
    independent: ClassVar[bool] = False  # of classes that are not exclusive: several labels

    weight: Schedule = ONE  # factor of the term

    def taps(self) -> tuple[TapSpec, TapSpec]:
        """Arguments of `Taps` for student and teacher; logits are always there."""
        return {}, {}

    def why_dense(self, temperatures: Collection[float]) -> str:
        """Why a teacher's K largest logits, with log-sum-exps at these temperatures, are not
        enough; "" if they are."""
        reads = self.distils and (self.classifies or not self.taps()[1])
        return "needs the logits of all classes" if reads else ""

    def why_labels(self) -> str:
        """Why every image must have a label; "" if the term does without, or leaves them out."""
        return ""

    def learned(self, student: TapOutputs, teacher: TapOutputs, taps: Taps) -> nn.Module | None:
        """The module that is trained with the student, from one output of the taps, or None."""
        return None

    def learned_alone(self) -> nn.Module | None:
        """The same of a module that depends on no output."""
        return None

    def among_teachers(self) -> Term:
        """The term of one of several teachers."""
        return self

    def observe(self, teacher: TapOutputs, learned: nn.Module) -> None:
        """Adds a teacher's outputs to the statistics of what is learned, before any training."""

    @abstractmethod
    def __call__(self, outputs: StepOutputs, x: float, learned: nn.Module | None) -> Tensor:
        """The term, 0-dim, after the share x of the run."""


def _pooled(outputs: TapOutputs, *tokens: int) -> Tensor:
    """What a classifier reads, [B, features], or with so many tokens in between."""
    x = outputs.pooled
    assert x is not None
    return x.reshape(len(x), *tokens, -1)


def _part(learned: nn.Module | None, name: str, kind: type[_Part]) -> _Part | None:
    """One of the modules that a term learns."""
    part = learned[name] if isinstance(learned, nn.ModuleDict) and name in learned else None
    return part if isinstance(part, kind) else None
