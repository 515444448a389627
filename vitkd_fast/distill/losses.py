"""The terms of a run's loss: one class each, which is its options in YAML and its computation.

A new loss is a class here and a field of `Losses`, whose name is its key in a configuration.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from torch import Tensor, nn

from ..functional import Labels, dist_loss, kd_loss
from ..nn import AttentionMapProjection
from ..taps import TapOutputs, Taps

TapSpec: TypeAlias = Mapping[str, tuple[int, ...]]  # arguments of Taps


class StepOutputs(NamedTuple):
    """Outputs of student and teacher for a batch, and its labels."""

    student: TapOutputs
    teacher: TapOutputs | None
    labels: Labels


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


class Term(Section):
    """One term of the loss, times its weight."""

    weight: Schedule = ONE  # factor of the term

    def taps(self) -> tuple[TapSpec, TapSpec]:
        """Arguments of `Taps` for student and teacher; logits are always there."""
        return {}, {}

    def learned(self, student: TapOutputs, teacher: TapOutputs, taps: Taps) -> nn.Module | None:
        """The module that is trained with the student, from one output of the taps, or None."""
        return None

    @abstractmethod
    def __call__(self, outputs: StepOutputs, x: float, learned: nn.Module | None) -> Tensor:
        """The term, 0-dim, after the share x of the run."""


class CE(Term):
    """weight * CE(student, labels), the loss of a student without a teacher."""

    label_smoothing: float = Field(0.0, ge=0, le=1)  # of the cross-entropy

    def __call__(self, outputs: StepOutputs, x: float, learned: nn.Module | None) -> Tensor:
        student = outputs.student.logits
        return kd_loss(
            student,
            student.detach(),  # its own teacher at weight 0, for the pass that takes mixed labels
            labels=outputs.labels,
            kd_weight=0.0,
            ce_weight=self.weight.at(x),
            label_smoothing=self.label_smoothing,
        )


class KD(Term):
    """weight * T^2 * KL(teacher || student) at temperature T + ce_weight * CE(student, labels).

    Hinton, Vinyals and Dean, 2015, arXiv:1503.02531; one fused pass, `functional.kd_loss`.
    """

    temperature: float = Field(1.0, gt=0)  # divides both logits
    ce_weight: Schedule = ZERO  # factor of the cross-entropy
    label_smoothing: float = Field(0.0, ge=0, le=1)  # of the cross-entropy

    def __call__(self, outputs: StepOutputs, x: float, learned: nn.Module | None) -> Tensor:
        assert outputs.teacher is not None
        return kd_loss(
            outputs.student.logits,
            outputs.teacher.logits,
            temperature=self.temperature,
            labels=outputs.labels,
            kd_weight=self.weight.at(x),
            ce_weight=self.ce_weight.at(x),
            label_smoothing=self.label_smoothing,
        )


class DIST(Term):
    """weight * T^2 * (beta (1 - rho of rows) + gamma (1 - rho of classes)), rho: Pearson's.

    Huang et al., 2022, arXiv:2205.10536; `functional.dist_loss`, over all processes of a run.
    """

    temperature: float = Field(1.0, gt=0)  # divides both logits
    beta: float = Field(1.0, ge=0)  # factor of the rows' correlations, over their classes
    gamma: float = Field(1.0, ge=0)  # factor of the classes' correlations, over the batch

    def __call__(self, outputs: StepOutputs, x: float, learned: nn.Module | None) -> Tensor:
        assert outputs.teacher is not None
        loss = dist_loss(
            outputs.student.logits,
            outputs.teacher.logits,
            temperature=self.temperature,
            beta=self.beta,
            gamma=self.gamma,
            sync=True,
        )
        return self.weight.at(x) * loss


class Attention(Term):
    """weight * attention_map_loss of a map of the student, for a block of the teacher.

    The student's queries and keys are those of `nn.AttentionMapProjection`, which is trained with
    it and documents the options.
    """

    block: int = -1  # of the teacher
    stride: int = Field(16, ge=1)  # of the student's map
    heads: int | None = Field(None, ge=1)  # the teacher's, unless given
    head_dim: int | None = Field(None, ge=1)  # of the student's heads
    teacher_heads: Literal["split", "mean"] = "split"  # where the numbers of heads differ
    temperature: float = Field(1.0, gt=0)  # divides both scores
    kind: Literal["kl", "reverse_kl", "js", "mse"] = "kl"  # the divergence

    def taps(self) -> tuple[TapSpec, TapSpec]:
        return {"maps": (self.stride,)}, {"attention": (self.block,)}

    def learned(self, student: TapOutputs, teacher: TapOutputs, taps: Taps) -> nn.Module:
        return AttentionMapProjection.between(
            student.maps[self.stride],
            teacher.queries[self.block],
            taps,
            self.block,
            heads=self.heads,
            head_dim=self.head_dim,
            teacher_heads=self.teacher_heads,
            temperature=self.temperature,
            kind=self.kind,
        )

    def __call__(self, outputs: StepOutputs, x: float, learned: nn.Module | None) -> Tensor:
        assert outputs.teacher is not None and learned is not None
        block = self.block
        features = outputs.student.maps[self.stride]
        loss = learned(features, outputs.teacher.queries[block], outputs.teacher.keys[block])
        return self.weight.at(x) * loss


class Losses(Section):
    """The terms that are added up; each is left out until it is named."""

    kd: KD | None = None
    ce: CE | None = None
    dist: DIST | None = None
    attention: Attention | None = None

    def terms(self) -> Iterator[tuple[str, Term]]:
        """The terms that were named, with their names."""
        for name in type(self).model_fields:
            if (term := getattr(self, name)) is not None:
                yield name, term

    def baseline(self) -> Losses:
        """Without a teacher: the cross-entropy, with the same label smoothing."""
        terms = (term for term in (self.kd, self.ce) if term)
        smoothing = max((term.label_smoothing for term in terms), default=0.0)
        return Losses(ce=CE(label_smoothing=smoothing))
