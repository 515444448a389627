"""A term of the student alone: distributions that lose little when they are rounded to int8."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from .term import StepOutputs, TapSpec, Term

UNIFORM = 1.8  # kurtosis of a uniform distribution
_TINY = 1e-12


def weight_kurtosis(weight: Tensor) -> Tensor:
    """mean over channels of E[w^4] / E[w^2]^2, of a layer's weights [C_out, ...].

    About zero, and each channel by itself: the engine's weights are symmetric, with a scale for
    each channel.
    """
    squares = weight.float().flatten(1).square()
    return (squares.square().mean(1) / (squares.mean(1).square() + _TINY)).mean()


def map_kurtosis(x: Tensor) -> Tensor:
    """E[(x - mean)^4] / E[(x - mean)^2]^2 of all values of a map."""
    x = x.float()
    squares = (x - x.mean()).square()
    return squares.square().mean() / (squares.mean().square() + _TINY)


def relative_range(x: Tensor) -> Tensor:
    """(max - min) / (sqrt(12) std) of all values of a map: 1 of a uniform distribution.

    20 log10 of it is what the range costs of 8 bits' signal to quantization noise ratio, in dB.
    """
    x = x.float()
    return (x.amax() - x.amin()) / (math.sqrt(12) * x.std(correction=0) + _TINY)


def imbalance(weight: Tensor) -> Tensor:
    """Variance over input channels of ln(root mean square of their weights), [C_out, C_in, ...].

    The weights of an output channel share a scale: those of input channels with small weights,
    which read the larger values of a map, have fewer bits.
    """
    squares = weight.float().transpose(0, 1).flatten(1).square().mean(1)
    return (squares + _TINY).log().div(2).var(correction=0)


class KURE(Term):
    """weight * (weights W + equalization E + maps M + range R), of the student alone.

        W = mean over layers of (kurtosis of the weights - 1.8)^2
        E = mean over layers of the variance of ln(RMS of an input channel's weights)
        M = mean over maps of ln(kurtosis / 1.8)^2
        R = mean over maps of ln((max - min) / (sqrt(12) std))

    W is kurtosis regularization (Shkolnik et al., 2020, arXiv:2002.07686), here of each channel:
    1.8 is a uniform distribution's, which a grid of levels costs least. E is what cross-layer
    equalization (Nagel et al., 2019, arXiv:1906.04721) makes small, here in training. Layers are
    convolutions and linear layers, of E those that are not depthwise; maps are outputs of batch
    norms with their activations, each as a whole, and have logarithms, since after a ReLU a
    kurtosis may be in the hundreds. A student in quantisation-aware training goes without the
    term.
    """

    distils: ClassVar[bool] = False

    weights: float = Field(1.0, ge=0)  # factor of W
    equalization: float = Field(0.0, ge=0)  # of E
    maps: float = Field(0.0, ge=0)  # of M
    range: float = Field(0.0, ge=0)  # of R

    def taps(self) -> tuple[TapSpec, TapSpec]:
        return {"norms": True} if self.maps or self.range else {}, {}

    def __call__(self, outputs: StepOutputs, x: float, learned: nn.Module | None) -> Tensor:
        assert outputs.model is not None
        layers = [m for m in outputs.model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        weights = [layer.weight for layer in layers]
        parts = []
        if self.weights:
            found = torch.stack([weight_kurtosis(weight) for weight in weights])
            parts.append(self.weights * (found - UNIFORM).square().mean())
        if self.equalization:
            dense = [weight for weight in weights if weight.shape[1] > 1]
            parts.append(self.equalization * torch.stack([imbalance(w) for w in dense]).mean())
        maps = outputs.student.norms
        if self.maps:
            found = torch.stack([map_kurtosis(y) for y in maps])
            parts.append(self.maps * (found / UNIFORM).clamp(min=_TINY).log().square().mean())
        if self.range:
            found = torch.stack([relative_range(y) for y in maps])
            parts.append(self.range * found.clamp(min=_TINY).log().mean())
        total = torch.stack(parts).sum() if parts else outputs.student.logits.new_zeros(())
        return self.weight.at(x) * total
