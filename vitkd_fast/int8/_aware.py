"""What `aware.QuantizationAware` is made of: its layers, its learned ranges, a pass's constants."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .float_graph import BatchNorm, FloatNode, Origin
from .graph import Array, Classifier, Depthwise, Node, Quantized
from .quantizer import _Step
from .report import QuantizedModel
from .straight_through import Range, replaced, scale_gradient, significant

LEVELS, WEIGHT_LEVELS = 255, 127
# Of what is learned of ranges. An adaptive optimiser moves every parameter by about its learning
# rate, whatever the gradient: fine for weights, but in some hundred steps it takes ranges anywhere.
_PACE = 0.01


@dataclass
class Layer:
    """A node of the graph, and where its weights are in the model."""

    node: Any  # as it was at the start
    inputs: tuple[int, ...]
    modules: tuple[str, ...]  # of the model, whose output it makes
    activation: str | None
    origins: tuple[Origin, ...]
    constant: Tensor | None = None  # a weight that is not the model's, as of an average
    channels: int = 0  # of the output, where it has weights that `Ranges` knows
    size: int = 0  # weights of a channel
    place: int = -1  # among the layers with such weights
    exact: bool = False  # its sums may leave float32

    @classmethod
    def of(cls, step: _Step, node: Node, last: FloatNode) -> Layer:
        """Raises ValueError where weights cannot be traced to the model's, or have other shapes."""
        own = step.node
        origins, folds = own.origins, [len(origin.folds) for origin in own.origins]
        most = 1 if own.op == "conv" else 0
        if any(origin.weight is None for origin in origins) or max(folds, default=0) > most:
            raise ValueError(
                f"QuantizationAware: {own.name}: expected weights that are the model's own, with "
                f"up to {most} batch norms after them, got others"
            )
        layer = cls(node, node.inputs, last.modules, step.activation, origins)
        if own.op == "conv":
            assert own.weight is not None
            held: Any = node
            if own.weight.numel() != held.weight.size or getattr(node, "fine", False):
                raise ValueError(
                    "QuantizationAware: start: expected maps of eight bits, as quantize makes them "
                    f"without mixed, got others in or before {own.name}"
                )
            layer.channels, layer.size = len(own.weight), own.weight[0].numel()
            layer.constant = None if origins else own.weight.float()
        return layer

    @property
    def norm(self) -> BatchNorm | None:
        """The batch norm after it, if its statistics are the model's."""
        folds = self.origins[0].folds if self.origins else ()
        return folds[0] if folds and isinstance(folds[0], BatchNorm) else None

    @property
    def reads_image(self) -> bool:
        return self.inputs[0] == -1

    @property
    def in_steps(self) -> bool:
        """Whether its sums times the multiplier are levels of its map, and not values."""
        return not isinstance(self.node, Classifier) and self.node.hardswish_scale is None

    def weight(self, model: nn.Module, std: tuple[float, ...]) -> Tensor:
        """[C, C_in / groups, kh, kw], of images as bytes where it reads them."""
        if self.constant is not None:
            return self.constant
        weight = tensor(model, self.origins[0].weight)
        weight = weight.view(*weight.shape, 1, 1) if weight.ndim == 2 else weight
        if self.reads_image:
            weight = weight.double() / (255 * weight.new_tensor(std).double().view(3, 1, 1))
        return weight

    def affine(self, model: nn.Module, one: Tensor, zero: Tensor) -> dict[str, Tensor]:
        """The batch norm after it, and its own bias, [C] each; the identity where there is none.

        one and zero are of as many channels, or more.
        """
        origin = self.origins[0] if self.origins else Origin(weight=None, bias=None)
        one, zero = one[: self.channels], zero[: self.channels]
        own = tensor(model, origin.bias) if origin.bias else zero
        found = {"mean": zero, "var": one, "weight": one, "bias": zero, "own": own}
        if self.norm:
            given = {name: getattr(self.norm, name) for name in ("mean", "var", "weight", "bias")}
            found |= {name: tensor(model, path) for name, path in given.items() if path}
        elif origin.folds:
            fold: Any = origin.folds[0]
            scale, shift = (x.to(one.device) for x in fold)
            found |= {"weight": scale.expand(self.channels), "bias": shift.expand(self.channels)}
        return found

    def gates(self, model: nn.Module) -> list[tuple[Tensor, ...]]:
        """Of a squeeze-excite's linear layers weight and q [in, out], q's scale [out], and bias."""
        found: list[tuple[Tensor, ...]] = []
        for origin in self.origins:
            weight = tensor(model, origin.weight).flatten(1).T
            double = weight.detach().double()
            scale = (double.abs().amax(0) / WEIGHT_LEVELS).clamp(min=2.0**-100).float()
            q = (double / scale).round().clamp(-WEIGHT_LEVELS, WEIGHT_LEVELS).float()
            bias = tensor(model, origin.bias) if origin.bias else torch.zeros_like(scale)
            found.append((replaced(weight.float(), q * scale), q, scale, bias.float()))
        return found

    def span(self, zero_point: int) -> Range:
        lo = 0 if self.activation in ("relu", "relu6") else -zero_point
        return Range(lo, LEVELS - zero_point)


def tensor(model: nn.Module, name: str | None) -> Any:
    """A parameter or buffer of the model."""
    assert name is not None
    path, _, own = name.rpartition(".")
    return getattr(model.get_submodule(path), own)


class Ranges(nn.Module):
    """Steps and zero points of maps, steps of weights, and what calibration added to biases.

    Steps are float64, as multiples exp(0.01 log) of those of the start, and zero points those of
    the start and 2.55 shift; `log` and `shift` are learned.
    """

    map_step: Tensor  # [maps], at the start
    map_zero: Tensor
    weight_step: Tensor  # [channels of all layers]
    correction: Tensor  # of biases, likewise
    # made again by the constructor
    reads: Tensor
    makes: Tensor
    on_grid: Tensor
    most: Tensor
    residual: Tensor
    eps: Tensor
    map_gain: Tensor
    weight_gain: Tensor

    def __init__(
        self, start: QuantizedModel, layers: list[Layer], sizes: list[int], learned: bool
    ) -> None:
        super().__init__()
        weighed = [layer for layer in layers if layer.channels]
        counts = [layer.channels for layer in weighed]
        self.counts = counts

        def channels(values: list[Any]) -> Tensor:
            dtype = torch.float64 if isinstance(values[0], float) else None
            return torch.tensor(values, dtype=dtype).repeat_interleave(torch.tensor(counts))

        # of the image, and of values instead of levels, the step is 1: the last of all
        last = len(sizes)
        reads = [layer.inputs[0] % (last + 1) for layer in weighed]
        makes = [i if x.in_steps else last for i, x in enumerate(layers) if x.channels]
        kept = _quantized(start, layers)
        for name, value in kept.items():
            self.register_buffer(name, value)
        ends = [6 / LEVELS if layer.activation == "relu6" else np.inf for layer in layers[:-1]]
        residual = [
            (layer.inputs[1], i)
            for i, layer in enumerate(layers)
            if layer.channels and len(layer.inputs) > 1
        ]
        fixed = {
            "reads": channels(reads),
            "makes": channels(makes),
            "on_grid": channels([x.activation in ("relu", "relu6") for x in weighed]),
            "most": torch.tensor(ends, dtype=torch.float64),
            "residual": torch.tensor(residual, dtype=torch.int64).view(-1, 2).T,
            # of batch norms
            "eps": channels([layer.norm.eps if layer.norm else 0.0 for layer in weighed]),
            # 1 / sqrt(N Q) of LSQ, N features of an image, or weights of a channel
            "map_gain": (torch.tensor(sizes, dtype=torch.float64) * LEVELS).rsqrt(),
            "weight_gain": (channels([x.size for x in weighed]) * WEIGHT_LEVELS).double().rsqrt(),
        }
        for name, value in fixed.items():
            self.register_buffer(name, value, persistent=False)
        self.added = [made for _, made in residual]
        self.asymmetric = (kept["map_zero"] > 0).tolist()
        self.map_log, self.map_shift, self.weight_log = (
            nn.Parameter(torch.zeros(count), requires_grad=learned)
            for count in (last, last, sum(counts))
        )
        # what no output depends on has no gradient to share
        self.map_shift.requires_grad_(learned and any(self.asymmetric))

    @torch.no_grad()
    def take(self, start: QuantizedModel, layers: list[Layer]) -> None:
        """Begins again at what `quantize` made of the same layers; corrections stay."""
        kept = _quantized(start, layers)
        for name in ("map_step", "map_zero", "weight_step"):
            getattr(self, name).copy_(kept[name])
        for learned in self.parameters():
            learned.zero_()

    def maps(self) -> tuple[Tensor, Tensor]:
        """Steps and zero points, [maps] float64; no ReLU6 has a level above 6."""
        step = self.map_step * (_PACE * self.map_log.detach().double()).exp()
        gain = self.map_gain / step.square() / _PACE
        learned = self.map_step * (_PACE * scale_gradient(self.map_log.double(), gain)).exp()
        shift = scale_gradient(self.map_shift.double(), gain / LEVELS**2)
        zero = self.map_zero + _PACE * LEVELS * shift
        return (
            replaced(learned, step.minimum(self.most)),
            replaced(zero, zero.detach().round().clamp(0, LEVELS)),
        )

    def weights(self) -> Tensor:
        """Steps, [channels]."""
        step = self.weight_step * (_PACE * self.weight_log.detach().double()).exp()
        gain = self.weight_gain / step.square() / _PACE
        return self.weight_step * (_PACE * scale_gradient(self.weight_log.double(), gain)).exp()

    def split(self, *of_channels: Tensor) -> list[tuple[Tensor, ...]]:
        """By layer."""
        return list(zip(*(x.split(self.counts) for x in of_channels), strict=True))

    def ratios(self, steps: Tensor) -> Tensor:
        """What levels that a convolution's are added to are multiplied by, float32."""
        source, made = self.residual
        return short(steps[source] / steps[made])


def short(x: Tensor) -> Tensor:
    """16 bits, as float32: the product with a difference of bytes is exact."""
    return replaced(x, significant(x.detach(), 16)).float()


@dataclass
class Constants:
    """What a pass computes before any map; lists by map, or by layer with weights."""

    steps: tuple[Tensor, ...]  # float64 []
    zeros: list[Tensor]  # float64 []
    zero_points: list[int]
    ratios: dict[int, tuple[Tensor, float]]  # of residuals, by node
    weights: list[Tensor]  # integers as float32
    multipliers: tuple[Tensor, ...]  # float32 [C]
    biases: list[Tensor]  # integers as float32, of sums of maps less their zero points
    # of batch norms over a batch: multiplier, bias and eps of sums, float32, and, float64, what a
    # sum is worth to them
    live: list[tuple[Tensor, ...]] = field(default_factory=list)


def _quantized(start: QuantizedModel, layers: list[Layer]) -> dict[str, Tensor]:
    """Steps and zero points of maps, steps of weights, and biases with what calibration added."""
    nodes = start.graph.nodes
    steps = [(x.hi - x.lo) / LEVELS for x in start.report().layers]
    zeros = [x.zero_point for x in nodes if isinstance(x, Quantized)]
    own, biases = [], []
    for index, layer in enumerate(layers):
        if not layer.channels:
            continue
        node: Any = nodes[index]
        source = layer.inputs[0]
        unit = node.multiplier.astype(np.float64) * (steps[index] if layer.in_steps else 1.0)
        zero = 255 * np.array(start.graph.mean) if layer.reads_image else zeros[source]
        own.append(unit if layer.reads_image else unit / steps[source])
        biases.append((node.bias + _sum_of(node, zero)) * unit)
    return {
        "map_step": torch.tensor(steps, dtype=torch.float64),
        "map_zero": torch.tensor(zeros, dtype=torch.float64),
        "weight_step": torch.from_numpy(np.concatenate(own)),
        "correction": torch.from_numpy(np.concatenate(biases)),
    }


def _sum_of(node: Any, zero: Any) -> Array:
    """What the sums of a map of nothing but `zero` are, [C_out]."""
    weight = node.weight.astype(np.float64)
    if isinstance(node, Depthwise):
        return weight.sum((0, 1)) * zero
    return (weight * zero).sum(tuple(range(1, weight.ndim)))
