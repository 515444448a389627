"""The terms of a run's loss: one class each, which is its options in YAML and its computation.

A new loss is a class here and a field of `Losses`, whose name is its key in a configuration.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from torch import Tensor

from ..functional import Labels, kd_loss


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
ONE, ZERO = Ramp(start=1, end=1), Ramp(start=0, end=0)


class CE(Section):
    """weight * CE(student, labels): what a student learns without a teacher."""

    weight: Schedule = ONE
    label_smoothing: float = Field(0.0, ge=0, le=1)

    def __call__(self, student: Tensor, teacher: Tensor | None, labels: Labels, x: float) -> Tensor:
        return kd_loss(
            student,
            student.detach(),  # taught by itself at weight 0, for the pass that takes mixed labels
            labels=labels,
            kd_weight=0.0,
            ce_weight=self.weight.at(x),
            label_smoothing=self.label_smoothing,
        )


class KD(Section):
    """weight * T^2 * KL(teacher || student) at temperature T + ce_weight * CE(student, labels).

    Hinton, Vinyals and Dean, 2015, arXiv:1503.02531; one fused pass, `functional.kd_loss`.
    """

    weight: Schedule = ONE
    temperature: float = Field(1.0, gt=0)
    ce_weight: Schedule = ZERO
    label_smoothing: float = Field(0.0, ge=0, le=1)

    def __call__(self, student: Tensor, teacher: Tensor | None, labels: Labels, x: float) -> Tensor:
        assert teacher is not None
        return kd_loss(
            student,
            teacher,
            temperature=self.temperature,
            labels=labels,
            kd_weight=self.weight.at(x),
            ce_weight=self.ce_weight.at(x),
            label_smoothing=self.label_smoothing,
        )


class Losses(Section):
    """The terms that are added up; each is left out until it is named."""

    kd: KD | None = None
    ce: CE | None = None

    def terms(self) -> Iterator[tuple[str, CE | KD]]:
        """The terms that were named, with their names."""
        for name in type(self).model_fields:
            if (term := getattr(self, name)) is not None:
                yield name, term

    def alone(self) -> Losses:
        """What is left without a teacher: the cross-entropy, smoothed as it was."""
        smoothing = max((term.label_smoothing for _, term in self.terms()), default=0.0)
        return Losses(ce=CE(label_smoothing=smoothing))
