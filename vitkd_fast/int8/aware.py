"""Quantisation-aware training: the engine's arithmetic over a float model's own weights.

A forward pass gives the engine's bytes; gradients pass roundings straight through, and the step of
every map and of every channel of the weights is learned (LSQ), as is where asymmetric maps have
their zero (LSQ+). What depends on weights alone is computed once a pass, for all channels of the
network together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import file
from ._aware import LEVELS, Constants, Layer, Ranges, short, tensor
from .float_graph import FloatNode, batch_norm, forward
from .graph import (
    Add,
    Array,
    Classifier,
    Conv,
    Depthwise,
    Graph,
    Node,
    Pool,
    SqueezeExcite,
    padding_of,
)
from .lower import lower
from .quantizer import _Step, _steps
from .report import QuantizedModel
from .straight_through import (
    Convolution,
    Gated,
    OrderedLinear,
    Rounded,
    RoundedWeight,
    Shape,
    replaced,
    significant,
)

# of a convolution in a batch: mean and variance of its sums, [C], and how many there are
_Statistics = tuple[Layer, Tensor, Tensor, int]
Observer = Callable[[int, Tensor], None]
_EXACT = 2.0**24  # float32 holds every integer up to here
_BIAS = 2.0**22  # of a unit of the sums; the quantizer allows 2^29, which float32 sums do not hold


class QuantizationAware(nn.Module):
    """A float model trained in the int8 engine's arithmetic.

    In evaluation mode, and in training once batch norms are frozen, logits and maps are those of
    the engine on `graph()`, to the byte, on a CPU: sums are exact, and what follows them is
    rounded in the engine's order. (A GPU may form sums in another precision.) Before, a batch norm
    in training normalises by the statistics of the batch, over weights that are rounded as the
    running ones fold them (Krishnamoorthi 2018, arXiv:1806.08342); stochastic depth and dropout do
    not occur. Gradients pass roundings straight through. The steps are learned as in LSQ (Esser et
    al. 2020, arXiv:1902.08153), with its gradient scale, and zero points of maps with negative
    values as in LSQ+ (Bhalgat et al. 2020, arXiv:2004.09576); both as multiples of where they
    began, so that an optimiser's step is relative, as for the thresholds of TQT (Jain et al. 2019,
    arXiv:1903.08066), and a hundredth of that: an adaptive optimiser moves all parameters by about
    its learning rate. Leave `ranges` out where gradients are clipped; LSQ's are large.

    It takes images as the engine does, before any normalisation, but as [N, 3, H, W]: uint8, or
    floats in 0..255, which are rounded. `vitkd_fast.taps.Taps` taps its maps and pooled
    features, in the float model's units and under the model's names.

    Args:
        model: float, with the engine's operations; its parameters are trained in place.
        start: what `quantize` made of it: the graph, its ranges and its corrected biases.
        learn_ranges: train the steps and zero points, else keep them.

    Attributes:
        model: the float model.
        ranges: steps, zero points and bias corrections, apart from the model.
        frozen: batch norms use running statistics in training, too; their weight and bias learn.

    Raises:
        ValueError: the graph is of another model or by `quantize(mixed="auto")`, or weights are
            computed from others.
        UnsupportedError: as `quantize`.
    """

    def __init__(
        self, model: nn.Module, start: QuantizedModel, *, learn_ranges: bool = True
    ) -> None:
        super().__init__()
        self.model, self.start, self.frozen = model, start.graph, False
        nodes = _lowered(model, start.graph.image_size)
        steps = _steps(nodes)
        if len(steps) != len(start.graph.nodes):
            steps = _steps(nodes, fuses=False)  # of a portable file
        self._check_graph(start, [step.node.name for step in steps])
        self.layers = [
            Layer.of(step, node, nodes[step.output])
            for step, node in zip(steps, start.graph.nodes, strict=True)
        ]
        self.weighed = [layer for layer in self.layers if layer.channels]
        for place, layer in enumerate(self.weighed):
            layer.place = place
        sizes = _sizes(nodes, steps, start.graph.image_size)
        self.ranges = Ranges(start, self.layers, sizes, learn_ranges)
        self.ranges.to(next(model.parameters()).device)
        with torch.no_grad():
            self.ranges.correction -= self._folded()[1]
        # what `Taps` looks for in a model of timm's: its places are modules of ours
        made = {path: i for i, layer in enumerate(self.layers) for path in layer.modules}
        self.places, self.feature_info = nn.ModuleDict(), []
        self._tapped: dict[int, nn.Module] = {}
        for entry in getattr(model, "feature_info", None) or ():
            if (path := entry["module"]) in made:
                name = path.replace(".", "_")
                self.places[name] = self._tapped[made[path]] = nn.Identity()
                self.feature_info.append({**entry, "module": f"places.{name}"})
        self.pooled = nn.Identity()
        self._checked = False
        self.train(model.training)

    def get_classifier(self) -> nn.Module:
        """What is given the pooled features [N, C], where it has a hook."""
        return self.pooled

    def train(self, mode: bool = True) -> QuantizationAware:
        """As of any module; the next pass looks for sums that may leave float32."""
        super().train(mode)
        self._checked = False
        return self

    def freeze_batch_norm(self, frozen: bool = True) -> QuantizationAware:
        """From now on batch norms use their running statistics, which stay as they are."""
        self.frozen = frozen
        return self

    def take_ranges(self, start: QuantizedModel) -> QuantizationAware:
        """Goes on with the steps and zero points that `quantize` finds for the model as it is now.

        Corrections of biases stay. Weights and statistics move on from what the first ranges were
        found for, and what learns them is too slow to follow.

        Raises:
            ValueError: the graph is of another model.
        """
        self._check_graph(start, [layer.node.name for layer in self.layers])
        self.ranges.take(start, self.layers)
        return self.train(self.training)

    def _check_graph(self, start: QuantizedModel, names: list[str]) -> None:
        if [node.name for node in start.graph.nodes] != names:
            raise ValueError(
                f"QuantizationAware: start: expected the graph of this {type(self.model).__name__},"
                " got that of another model"
            )

    def forward(self, images: Tensor, observe: Observer | None = None) -> Tensor:
        """Logits [N, classes], float32, of images [N, 3, H, W], bytes or floats in 0..255.

        observe(index, levels) is called with the map of each of the graph's nodes but the last,
        [N, C, H, W]: its bytes less their zero point, as float32.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"QuantizationAware: images: expected [N, 3, H, W], got {list(images.shape)}"
            )
        with torch.autocast(images.device.type, enabled=False):
            return self._forward(images, observe)

    def graph(self) -> Graph:
        """The engine's graph of the weights as they are now, with running statistics.

        Raises:
            ValueError: weights or statistics are NaN or Inf, or too large for the engine.
        """
        with torch.no_grad():
            constants = self._constants(live=False)
            nodes = [self._stored(i, layer, constants) for i, layer in enumerate(self.layers)]
        graph = replace(self.start, nodes=tuple(nodes))
        file.validate(graph)
        return graph

    def save(self, path: str | Path) -> None:
        """Writes `graph()` as a file that `load` reads."""
        file.save(self.graph(), path)

    # what depends on weights alone

    def _folded(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Scale and bias of every channel with its batch norm, float64, and that batch norm."""
        like, most = next(self.model.parameters()), max(self.ranges.counts)
        one, zero = like.new_ones(most), like.new_zeros(most)
        parts = [layer.affine(self.model, one, zero) for layer in self.weighed]
        norm = {name: torch.cat([part[name] for part in parts]).double() for name in parts[0]}
        own, norm["eps"] = norm.pop("own"), self.ranges.eps
        scale, shift = batch_norm(**norm)  # type: ignore[arg-type]
        return scale, own * scale + shift, norm

    def _constants(self, live: bool) -> Constants:
        ranges, counts = self.ranges, self.ranges.counts
        steps, zeros = ranges.maps()
        ratios = ranges.ratios(steps)
        with_one = torch.cat([steps, steps.new_ones(1)])
        inputs, outputs = with_one[ranges.reads], with_one[ranges.makes]
        scale, bias, norm = self._folded()
        bias = bias + ranges.correction
        unit = ranges.weights() * inputs
        unit = unit.maximum((bias.detach().abs() / _BIAS).maximum(outputs.detach() * 2.0**-40))
        # multipliers as the quantizer makes them: on a grid before a ReLU, else of few bits
        multiplier = unit / outputs
        given = multiplier.detach()
        grid = (given.clamp(min=2.0**-12) * 2**16).round() / 2**16
        few = torch.where(ranges.on_grid, grid, significant(given, 22))
        multiplier = replaced(multiplier, few)
        unit = multiplier * outputs
        levels = bias / unit
        weights = [
            RoundedWeight.apply(layer.weight(self.model, self.start.std), factor)
            for layer, factor in zip(
                self.weighed, (scale * inputs / unit).split(counts), strict=True
            )
        ]
        biases = list(replaced(levels, levels.detach().round()).float().split(counts))
        for layer, exact in zip(self.weighed, levels.split(counts), strict=True):
            if layer.reads_image:
                exact = exact + self._offset(weights[layer.place])
                biases[layer.place] = replaced(exact, exact.detach().round()).float()
        found: list[tuple[Tensor, ...]] = []
        if live:
            own = (unit / scale).detach()
            several = (
                norm["weight"].abs().clamp(min=1e-12) / outputs,
                norm["bias"] / outputs,
                (norm["eps"] / own.square()).clamp(min=1e-12),
            )
            found = ranges.split(*(x.float() for x in several), own)
        host = torch.cat([zeros.detach(), ratios.detach().double()]).tolist()
        return Constants(
            steps=steps.unbind(),
            zeros=[
                zero if learned else zero.detach()
                for zero, learned in zip(zeros.unbind(), ranges.asymmetric, strict=True)
            ],
            zero_points=[int(zero) for zero in host[: len(steps)]],
            ratios={
                place: (ratio, value)
                for place, ratio, value in zip(
                    ranges.added, ratios.unbind(), host[len(steps) :], strict=True
                )
            },
            weights=weights,
            multipliers=multiplier.float().split(counts),
            biases=biases,
            live=found,
        )

    def _offset(self, weight: Tensor) -> Tensor:
        """Of sums over images, [C]: the engine pads with a byte, where the mean may be between."""
        pad, mean = (
            weight.new_tensor(x).double() for x in (self.start.padding_bytes, self.start.mean)
        )
        return (weight.double() * (pad - 255 * mean).view(3, 1, 1)).sum((1, 2, 3))

    @torch.no_grad()
    def _check_sums(self, constants: Constants) -> None:
        """Finds the convolutions whose sums float32 may not hold."""
        largest = []
        for layer in self.weighed:
            zero = 0 if layer.reads_image else constants.zero_points[layer.inputs[0]]
            weight, bias = constants.weights[layer.place], constants.biases[layer.place]
            sums = weight.abs().sum((1, 2, 3)) * max(zero, LEVELS - zero) + bias.abs()
            largest.append(sums.amax())
        for layer, value in zip(self.weighed, torch.stack(largest).tolist(), strict=True):
            layer.exact = value >= _EXACT
        self._checked = True

    # maps

    def _forward(self, images: Tensor, observe: Observer | None) -> Tensor:
        constants = self._constants(self.training and not self.frozen)
        if not self.training or not self._checked:
            self._check_sums(constants)
        pad = torch.tensor(self.start.padding_bytes, device=images.device).view(3, 1, 1)
        x = images.round() if images.is_floating_point() else images
        x = x.to(torch.float32, memory_format=torch.channels_last) - pad
        last_use = {source: i for i, layer in enumerate(self.layers) for source in layer.inputs}
        maps = {-1: x}
        batch: list[_Statistics] = []
        for index, layer in enumerate(self.layers):
            inputs = [maps[source] for source in layer.inputs]
            if isinstance(layer.node, Classifier) and self.pooled._forward_hooks:
                self.pooled((inputs[0] * constants.steps[layer.inputs[0]].float()).flatten(1))
            if layer.channels:
                maps[index] = self._convolved(index, layer, inputs, constants, batch)
            else:
                maps[index] = self._mixed(index, layer, inputs, constants)
            if observe and index < len(self.layers) - 1:
                observe(index, maps[index])
            if index in self._tapped and self._tapped[index]._forward_hooks:
                self._tapped[index](maps[index] * constants.steps[index].float())
            for source in {source for source in layer.inputs if last_use[source] == index}:
                del maps[source]
        if batch:
            self._follow(batch, constants)
        return maps[len(self.layers) - 1].flatten(1)

    def _mixed(
        self, index: int, layer: Layer, inputs: list[Tensor], constants: Constants
    ) -> Tensor:
        """The levels of a node without weights of int8 sums."""
        node, x, steps = layer.node, inputs[0], constants.steps
        ratios = [steps[source] / steps[index] for source in layer.inputs]
        zero, span = constants.zeros[index], layer.span(constants.zero_points[index])
        y: Tensor
        if isinstance(node, Add):
            a, b = (levels * short(ratio) for levels, ratio in zip(inputs, ratios, strict=True))
            y = Rounded.apply(a + b, zero, span)
            return y
        area = x.shape[2] * x.shape[3]
        total = x.sum((2, 3), keepdim=True, dtype=torch.double if area >= 2**16 else None).float()
        if isinstance(node, Pool):
            y = Rounded.apply(total * (ratios[0] / area).float(), zero, span)
            return y
        assert isinstance(node, SqueezeExcite)
        (w1, *_, b1), (w2, *_, b2) = layer.gates(self.model)
        mean = total.flatten(1) * (steps[layer.inputs[0]] / area).float()
        hidden = OrderedLinear.apply(mean, w1, b1)
        if node.hidden_hardswish:
            hidden = (hidden * (hidden + 3).clamp(0, 6)) * (1 / 6)
        else:
            hidden = hidden.relu()
        gate = (OrderedLinear.apply(hidden, w2, b2) + 3).clamp(0, 6) * (1 / 6)
        y = Gated.apply(x, gate * ratios[0].float(), zero, span)
        return y

    def _convolved(
        self,
        index: int,
        layer: Layer,
        inputs: list[Tensor],
        constants: Constants,
        batch: list[_Statistics],
    ) -> Tensor:
        """The levels of a convolution, or the logits; adds to the statistics of the batch."""
        node, x, place = layer.node, inputs[0], layer.place
        weight, bias = constants.weights[place], constants.biases[place]
        multiplier = constants.multipliers[place]
        if isinstance(node, Classifier):
            return Shape(exact=layer.exact).sums(x, weight, bias) * multiplier.view(-1, 1, 1)
        (top, bottom), (left, right) = (
            padding_of(x.shape[axis + 2], weight.shape[axis + 2], stride, node.padding, axis)
            for axis, stride in enumerate(node.stride)
        )
        padding = (top, left)
        if (top, left) != (bottom, right):
            x, padding = F.pad(x, (left, right, top, bottom)), (0, 0)
        groups = len(weight) if isinstance(node, Depthwise) else 1
        shape = Shape(node.stride, padding, groups, layer.exact)
        k = None
        if node.hardswish_scale is not None:
            k = (1 / (6 * constants.steps[index])).float()
        other = (inputs[1], *constants.ratios[index]) if len(inputs) > 1 else (None, None, 0.0)
        zero, span = constants.zeros[index], layer.span(constants.zero_points[index])
        tail = (k, *other, zero, span, shape)
        y: Tensor
        if not constants.live or not layer.norm:
            y, _, _ = Convolution.apply(x, weight, multiplier, bias, *tail)
            return y
        gain, shift, eps, _ = constants.live[place]
        y, mean, var = Convolution.apply(x, weight, gain, shift, *tail, eps)
        batch.append((layer, mean, var, y.numel() // len(weight)))
        return y

    @torch.no_grad()
    def _follow(self, batch: list[_Statistics], constants: Constants) -> None:
        """Moves running statistics towards those of a batch's sums."""
        worth = torch.cat([constants.live[layer.place][3] for layer, *_ in batch])
        known = worth.isfinite()  # not of a channel whose weights are all zero
        worth = worth.where(known, 0)
        mean = torch.cat([mean for _, mean, *_ in batch]).double() * worth
        spread = torch.cat([var * (count / max(count - 1, 1)) for *_, var, count in batch])
        several = (mean, spread.double() * worth.square(), worth, known)
        counts = [layer.channels for layer, *_ in batch]
        split = zip(batch, *(x.split(counts) for x in several), strict=True)
        corrections = self.ranges.correction.split(self.ranges.counts)
        for (layer, *_), mean, var, unit, alive in split:
            assert layer.norm
            norm: Any = self.model.get_submodule(layer.norm.mean.rpartition(".")[0])
            norm.num_batches_tracked += 1
            share = 1 / int(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
            if layer.reads_image:
                mean = mean + self._offset(constants.weights[layer.place]) * unit
            if bias := layer.origins[0].bias:
                mean = mean + tensor(self.model, bias)
            for running, now in ((norm.running_mean, mean), (norm.running_var, var)):
                running.lerp_(now.to(running.dtype).where(alive, running), share)
            # the means that calibration corrected are in these statistics
            corrections[layer.place].mul_(1 - share)

    # for the engine

    def _stored(self, index: int, layer: Layer, constants: Constants) -> Node:
        node, steps = layer.node, constants.steps
        fields: dict[str, Any] = {}
        if not isinstance(node, Classifier):
            zero = constants.zero_points[index]
            span = layer.span(zero)
            fields |= {"zero_point": zero, "lo": zero + span.lo, "hi": zero + span.hi}
        if layer.channels:
            fields |= self._stored_weights(layer, constants)
            if index in constants.ratios:
                fields["residual_multiplier"] = constants.ratios[index][1]
            elif not layer.in_steps and not isinstance(node, Classifier):
                fields["hardswish_scale"] = float((1 / (6 * steps[index])).float())
            return replace(node, **fields)
        ratios = [steps[source] / steps[index] for source in layer.inputs]
        if isinstance(node, Add):
            fields["multipliers"] = tuple(float(short(ratio)) for ratio in ratios)
        elif isinstance(node, Pool):
            fields["ratio"] = float(ratios[0])
        else:
            fields |= {"scale": float(steps[layer.inputs[0]]), "ratio": float(ratios[0].float())}
            for number, (_, q, scale, bias) in zip("12", layer.gates(self.model), strict=True):
                fields["q" + number] = _array(q, np.int8)
                fields["s" + number] = _array(scale, np.float32)
                fields["b" + number] = _array(bias, np.float32)
        return replace(node, **fields)

    def _stored_weights(self, layer: Layer, constants: Constants) -> dict[str, Array]:
        node, weight = layer.node, constants.weights[layer.place].double()
        zero = (
            self.start.padding_bytes
            if layer.reads_image
            else [constants.zero_points[layer.inputs[0]]]
        )
        sums = (weight * weight.new_tensor(zero).view(-1, 1, 1)).sum((1, 2, 3))
        if isinstance(node, Conv):
            weight = weight.permute(0, 2, 3, 1)
        elif isinstance(node, Depthwise):
            weight = weight[:, 0].permute(1, 2, 0)
        else:
            weight = weight.flatten(1)
        return {
            "weight": _array(weight, np.int8),
            "bias": _array(constants.biases[layer.place].double() - sums, np.int32),
            "multiplier": _array(constants.multipliers[layer.place], np.float32),
        }


def _array(x: Tensor, dtype: Any) -> Array:
    return np.ascontiguousarray(x.detach().cpu().numpy()).astype(dtype)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, then in the one that each part was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _lowered(model: nn.Module, image_size: int) -> tuple[FloatNode, ...]:
    """As the quantizer lowers it: without the model's own normalisation, which the graph has."""
    with _evaluating(model), torch.random.fork_rng():
        nodes = lower(model, image_size)
    if nodes[0].op != "normalize":
        return nodes
    return tuple(
        replace(node, inputs=tuple(max(source - 1, -1) for source in node.inputs))
        for node in nodes[1:]
    )


def _sizes(nodes: tuple[FloatNode, ...], steps: list[_Step], image_size: int) -> list[int]:
    """Features of an image in each map."""
    found = {}

    def note(index: int, _: Tensor, output: Tensor) -> None:
        found[index] = output.numel()

    forward(nodes, torch.zeros(1, 3, image_size, image_size), note)
    return [found[step.output] for step in steps[:-1]]
