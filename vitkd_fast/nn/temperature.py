"""Temperatures that are not numbers: learned, scheduled, or of the teacher's entropy."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    pass


class LearnableTemperature(nn.Module):
    """T = low + softplus(theta), one number that is learned with the student.

    Called without arguments, it gives the temperature for any loss that takes one as a tensor; the
    losses form its gradient in the same pass. A temperature that descends with the loss grows where
    that makes the loss smaller: give it a schedule, or see `CurriculumTemperature`.

    Args:
        start: T at first; more than `low`.
        low: what T stays above; 0 or more.

    Raises:
        ValueError: naming the argument, what was expected and what was given.
    """

    def __init__(self, start: float = 4.0, low: float = 0.1) -> None:
        super().__init__()
        if not 0 <= low < start:
            raise ValueError(
                f"LearnableTemperature: start: expected more than low >= 0, got {start} and {low}"
            )
        self.low = low
        self.theta = nn.Parameter(torch.tensor(start - low).expm1().log())

    def forward(self) -> Tensor:
        return self.low + F.softplus(self.theta)


class _ScaleGradient(torch.autograd.Function):
    """x, whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.factor * grad, None


class CurriculumTemperature(nn.Module):
    """T = start + span * sigmoid(theta), learned against the student: CTKD.

    Its gradient is multiplied by a factor that goes from 0 to -1 by a cosine: the temperature makes
    the loss larger, and the task harder, the further a run is (Li et al., 2023, arXiv:2211.16231).

    Args:
        start, span: T is between start and start + span; the paper's are 1 and 20.
        classes: where given, T is one number for each instance, theta a network of two layers on
            both logits of `classes` classes; else theta is one parameter.
        hidden: width of that network.

    Raises:
        ValueError: naming the argument, what was expected and what was given.
    """

    def __init__(
        self, start: float = 1.0, span: float = 20.0, classes: int | None = None, hidden: int = 128
    ) -> None:
        super().__init__()
        for name, value in (("start", start), ("span", span)):
            if not value > 0:
                raise ValueError(
                    f"CurriculumTemperature: {name}: expected a number > 0, got {value}"
                )
        self.start, self.span = start, span
        if classes is None:
            self.theta = nn.Parameter(torch.ones(()))
        else:
            self.network = nn.Sequential(
                nn.Linear(2 * classes, hidden), nn.ReLU(), nn.Linear(hidden, 1)
            )

    @staticmethod
    def factor(progress: float) -> float:
        """That of the gradient, after this share of the curriculum, 0 to 1."""
        return (math.cos(math.pi * min(max(progress, 0.0), 1.0)) - 1) / 2

    def forward(self, student: Tensor, teacher: Tensor, progress: float) -> Tensor:
        """T: 0-dim or [*rows].

        Args:
            student, teacher: logits with the classes last, which get no gradient from here.
            progress: the share of the curriculum that is done, 0 to 1.
        """
        if hasattr(self, "network"):
            x = torch.cat([student.detach(), teacher.detach()], -1)
            dtype = next(self.network.parameters()).dtype
            theta = self.network(x.to(dtype)).squeeze(-1)
        else:
            theta = self.theta
        theta = _ScaleGradient.apply(theta, self.factor(progress))
        return self.start + self.span * theta.float().sigmoid()


def entropy_temperature(teacher: Tensor, low: float = 1.0, high: float = 4.0) -> Tensor:
    """T = high - (high - low) * H(softmax(teacher)) / log V, for each row of classes.

    A teacher that is sure of a row is softened there by up to `high`, one that is not is left as it
    is, at `low`. This form is our own, and has no gradient; [*rows], float32 or float64.

    Raises:
        ValueError: naming the argument, what was expected and what was given.
    """
    if not 0 < low <= high:
        raise ValueError(
            f"entropy_temperature: low: expected 0 < low <= high, got {low} and {high}"
        )
    wide = torch.float64 if teacher.dtype == torch.float64 else torch.float32
    with torch.no_grad():
        log_p = teacher.to(wide).log_softmax(-1)
        entropy = -(log_p.exp() * log_p.clamp(min=torch.finfo(wide).min)).sum(-1)
        return high - (high - low) * (entropy / math.log(teacher.shape[-1])).clamp(0, 1)
