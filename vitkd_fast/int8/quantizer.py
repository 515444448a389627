"""From a float model and some images to a quantised graph.

The float graph runs once over the images for the ranges of its maps. Then, node by node, weights
are rounded and the rounded node runs over all images, so that each bias corrects the mean
error of all nodes before it. Maps are kept as bytes and freed after their last use.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from .. import _preprocessing
from . import _arguments, file, fine, mixed, reconstruct, sensitivity, simulate, twins
from .calibrate import CALIBRATIONS, Calibration, Histogram, Scale
from .float_graph import Activation, FloatNode, activated, forward, pre_activation
from .graph import Add, Array, Classifier, Conv, Depthwise, Graph, Node, Pool, SqueezeExcite
from .lower import checked, lower
from .report import LayerReport, QuantizedModel, Report

__all__ = ["QuantizedModel", "quantize"]

_CHUNK = 16  # images computed at a time
_COMPARED = 32  # images of which every map is compared with the float one
_ROUNDS = 2  # in which a bias before an activation is settled
_FEW = 100  # images: of a trained MobileNetV2 5 cost 2 dB of the logits' SQNR, 20 cost 1
_FITTED = 128  # images that weights are fitted on
_LARGEST = 2.0**20  # of a map; the file holds no larger constant


@torch.no_grad()
def quantize(
    model: nn.Module,
    images: Iterable[Any],
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    calibration: Calibration = "mse",
    bias_correction: bool = True,
    reconstruct: bool = False,
    mixed: Literal["auto"] | None = None,
    budget: float = 1.1,
    portable: bool = False,
    classes: Sequence[str] | None = None,
    multilabel: bool = False,
    image_size: int | None = None,
    crop_pct: float | None = None,
    interpolation: str | None = None,
) -> QuantizedModel:
    """int8 weights per channel, u8 activations per map, int32 biases: post-training, calibrated.

    Args:
        model: in evaluation mode, on any device; left as it is.
        images: batches [N, H, H, 3], uint8 ndarrays or tensors, or one of them: images as they
            are before normalisation. Some 100 to 500; read once and kept.
        mean: of the normalisation, for pixels in [0, 1], one number or three; None: as in
            model.pretrained_cfg. A model that normalises its input itself says so: then None, or
            the same; such a model may take pixels in [0, 1] or in 0..255 (`models.predictor`).
        std: likewise.
        calibration: how a map's range is found: "mse" (least expected squared error),
            "percentile" (99.99% of the values at either end) or "minmax".
        bias_correction: makes the mean of each convolution's output, before and after its
            activation, that of the float model, in order.
        reconstruct: fits each layer's weights, on up to 128 images, to give the float model's
            output from the rounded input, and rounds them by what they are multiplied with.
        mixed: "auto" gives more bits to the maps whose rounding costs the logits most: eleven to
            bottlenecks (fine.py), nine to channels of others (twins.py); None: eight to all.
        budget: multiply-adds with mixed="auto" over those without, at most.
        portable: rounds where other runtimes do, for `export`: an addition is a layer of its own,
            between bytes, and no map has eleven bits. In the engine it costs a few percent of
            time, and some accuracy.
        classes: names of the logits.
        multilabel: classes are not exclusive, which the file says and `vitkd predict` shows.
        image_size: checked against the images.
        crop_pct: kept for the user; None: as in model.pretrained_cfg, else 1.
        interpolation: likewise; else bilinear.

    Raises:
        ValueError: images of another type or shape, of several sizes, or none; an argument out of
            range; a model in training mode, or one whose maps hold NaN or Inf, or
            values too large for any scale.
        UnsupportedError: the model holds an operation that the engine does not have.
    """
    if calibration not in CALIBRATIONS:
        names = ", ".join(CALIBRATIONS)
        raise ValueError(f"quantize: calibration: expected one of {names}, got {calibration!r}")
    if mixed not in (None, "auto"):
        raise ValueError(f"quantize: mixed: expected 'auto' or None, got {mixed!r}")
    if not 1 <= budget < math.inf:
        raise ValueError(f"quantize: budget: expected 1 or more, got {budget!r}")
    model = checked(model)
    known = getattr(model, "pretrained_cfg", None) or {}
    known = known if isinstance(known, Mapping) else {}
    given = {"mean": _arguments.three("mean", mean), "std": _arguments.three("std", std)}
    batch = _arguments.batch(images, image_size)
    batch = batch.to(next(model.parameters(), torch.empty(0)).device)
    with torch.random.fork_rng([batch.device] if batch.is_cuda else []):
        nodes = lower(model, batch.shape[2])
    mean, std = _arguments.normalisation(nodes, given, known)
    if nodes[0].op == "normalize":  # the images are normalised once, by the graph's mean and std
        nodes = tuple(
            replace(node, inputs=tuple(max(source - 1, -1) for source in node.inputs))
            for node in nodes[1:]
        )
    crop_pct = float(known.get("crop_pct") or 1.0 if crop_pct is None else crop_pct)
    try:
        _preprocessing.check(mean, std, crop_pct)
        graph = Graph(
            nodes=(),
            image_size=batch.shape[2],
            padding_bytes=(round(255 * mean[0]), round(255 * mean[1]), round(255 * mean[2])),
            mean=mean,
            std=std,
            crop_pct=crop_pct,
            interpolation=interpolation or known.get("interpolation") or "bilinear",
            classes=tuple(classes or ()),
            multilabel=multilabel,
        )
        file.validate_preparation(graph)
    except ValueError as error:
        raise ValueError(f"quantize: {error}") from None
    logits = len(_numpy(nodes[-1].bias))
    if graph.classes and len(graph.classes) != logits:
        raise ValueError(
            f"quantize: classes: expected {logits} names, one per logit, got {len(graph.classes)}"
        )
    quantizer = _Quantizer(graph, nodes, batch, calibration, bias_correction)
    quantizer.reconstruct, quantizer.portable = reconstruct, portable
    quantizer.budget = budget if mixed else 1.0
    return quantizer.run()


_CHECK = (
    "look at the weights and batch-norm statistics (running_mean, running_var, weight) up to this "
    "layer, and check the float model's accuracy"
)


@dataclass(frozen=True)
class _Step:
    """A float node that becomes a quantised one, with the addition that it takes in."""

    node: FloatNode
    inputs: tuple[int, ...]  # the float nodes that it reads
    output: int  # the float node whose output it makes
    activation: Activation | None


class _Quantizer:
    """One run of `quantize`, its arguments checked. Maps have the indices of the float nodes."""

    def __init__(
        self,
        graph: Graph,
        nodes: tuple[FloatNode, ...],
        images: Tensor,
        calibration: Calibration,
        bias_correction: bool,
    ) -> None:
        self.reconstruct = self.portable = False
        self.budget = 1.0
        self.twins: twins.Twins = {}
        self.fine: set[int] = set()  # float nodes, whose maps are
        self.positions: dict[int, int] = {}  # height times width of the float maps
        self.graph, self.float_nodes, self.images = graph, nodes, images
        self.calibration, self.bias_correction = calibration, bias_correction
        # means [C] of the float maps, before their activation and after it
        self.before: list[Any] = [0.0] * len(nodes)
        self.after: list[Any] = [0.0] * len(nodes)
        self.scales = {-1: Scale(1.0, 0)}
        self.maps = {-1: images}  # bytes [N, C, H, W]
        self.kept: dict[int, Tensor] = {}  # the maps of the first images
        self.fitted = slice(None, None, -(-len(images) // _FITTED))
        self.floats: dict[int, Tensor] = {}  # float maps of the images that weights are fitted on
        self.lost: dict[int, Tensor] = {}  # by rounding the weights of the float nodes
        self.targets = torch.empty(0)  # of the step at hand, before its activation

    def run(self) -> QuantizedModel:
        float_logits = self.observe()
        if self.reconstruct:
            self.floats = {-1: self.normalised(self.images[self.fitted])}
        steps = _steps(self.float_nodes, fuses=not self.portable)
        if self.budget > 1:
            found = self.costs(steps).maps
            able = set() if self.portable else fine.candidates(steps, self.scales)
            self.fine, self.twins = mixed.choose(steps, self.positions, found, able, self.budget)
        last_use = {source: step.output for step in steps for source in step.inputs}
        index = {-1: -1} | {step.output: position for position, step in enumerate(steps)}
        nodes: list[Node] = []
        logits = float_logits
        for step in steps:
            inputs = tuple(index[source] for source in step.inputs)
            if self.reconstruct:
                self.advance(step)
            nodes.append(self.quantized(step, {"name": step.node.name, "inputs": inputs}))
            output = torch.cat(list(self.simulated(nodes[-1], step)))
            for source in {source for source in step.inputs if last_use[source] == step.output}:
                del self.maps[source]
                self.floats.pop(source, None)
            if isinstance(nodes[-1], Classifier):
                logits = output.flatten(1)
            else:
                self.maps[step.output] = output
                self.kept[step.output] = self.merged(output[:_COMPARED], step.output, 1).clone()
        graph = replace(self.graph, nodes=tuple(nodes))
        try:
            file.validate(graph)
        except file.FileError as error:
            raise ValueError(f"quantize: {error}; {_CHECK}") from error
        same = (float_logits.argmax(1) == logits.argmax(1)).double().mean()
        noise = (float_logits - logits).double()
        sqnr = _decibels(float_logits.double().square().sum(), noise.square().sum())
        costs = self.costs(steps)
        layers, warnings = self.layers(steps, nodes, costs), self.warnings(float_logits)
        last = costs.weights[len(self.float_nodes) - 1] / (costs.total or 1.0)
        report = Report(layers, float(same), sqnr, len(logits), last, warnings)
        return QuantizedModel(graph, report)

    # the float model

    def normalised(self, images: Tensor) -> Tensor:
        mean, std = (
            torch.tensor(value, dtype=torch.float32, device=images.device).view(3, 1, 1)
            for value in (self.graph.mean, self.graph.std)
        )
        return (images / 255 - mean) / std

    def observe(self) -> Tensor:
        """Scales, means and logits of the float graph on all images."""
        histograms = [Histogram() for _ in self.float_nodes]

        def count(index: int, before: Tensor, output: Tensor) -> None:
            for means, value in ((self.before, before), (self.after, output)):
                means[index] += value.mean((2, 3)).double().sum(0) / len(self.images)
            self.positions[index] = output.shape[2] * output.shape[3]
            try:
                histograms[index].add(output)
            except ValueError as error:
                name = self.float_nodes[index].name
                raise ValueError(f"quantize: {name}: {error}; {_CHECK}") from None

        chunks = self.images.split(_CHUNK)
        logits = [forward(self.float_nodes, self.normalised(chunk), count) for chunk in chunks]
        for index, histogram in enumerate(histograms):
            scale, node = histogram.range(self.calibration), self.float_nodes[index]
            fine = node.activation != "hardswish" or 6 * scale.scale > 1 / _LARGEST
            if not fine or max(-histogram.least, histogram.most) > _LARGEST:
                wanted = "up to 2^20" if fine else "in a range over 0.00005, after a hard-swish"
                raise ValueError(
                    f"quantize: {node.name}: expected float values {wanted}, got "
                    f"{histogram.least:.3g} to {histogram.most:.3g}; {_CHECK}"
                )
            self.scales[index] = scale
        return torch.cat(logits)

    def warnings(self, float_logits: Tensor) -> tuple[str, ...]:
        """What makes a calibration worth little."""
        found, count = [], len(self.images)
        if count < _FEW:
            found.append(
                f"calibrated on {count} image{'s' * (count > 1)}; 100 to 500 are recommended, "
                "spread over all classes"
            )
        if count > 1 and bool((self.images == self.images[:1]).all()):
            found.append(f"all {count} calibration images are the same")
        elif count > 1 and len(float_logits.argmax(1).unique()) == 1:
            found.append(
                f"the float model sees the same class in all {count} calibration images; check "
                "its weights, mean and std, and that the images are of all classes"
            )
        return tuple(found)

    def costs(self, steps: list[_Step]) -> sensitivity.Costs:
        """What the rounding of each map and of each layer's weights costs, on the first images."""
        scales = {step.output: self.scales[step.output] for step in steps[:-1]}
        images = self.images[:_COMPARED].split(_CHUNK // 2)
        batches = [self.normalised(chunk) for chunk in images]
        found = sensitivity.costs(self.float_nodes, batches, scales, self.lost)
        for output, copied in self.twins.items():
            found.maps[output][copied] *= 1 - twins.SAVED
        for output in self.fine:
            found.maps[output] *= 1 - fine.SAVED
        return found

    def layers(
        self, steps: list[_Step], nodes: list[Node], costs: sensitivity.Costs
    ) -> tuple[LayerReport, ...]:
        """Compares maps with those of the float graph, which runs once more."""
        # signal, noise, values clipped, values
        sums = {output: np.zeros(4) for output in self.kept}
        begin = 0

        def compare(index: int, _: Tensor, output: Tensor) -> None:
            if index not in self.kept:
                return
            scale, q = self.scales[index], self.kept[index][begin : begin + len(output)]
            lo, hi = scale.ends
            value = (q.float() - scale.zero_point) * scale.scale
            clipped = (output < lo - scale.scale / 2) | (output > hi + scale.scale / 2)
            found = (output.square().sum(), (output - value).square().sum(), clipped.sum())
            sums[index] += [*map(float, found), output.numel()]

        for chunk in self.images[:_COMPARED].split(_CHUNK):
            forward(self.float_nodes, self.normalised(chunk), compare)
            begin += len(chunk)
        layers, total = [], costs.total or 1.0
        for step, node in zip(steps[:-1], nodes[:-1], strict=True):
            signal, noise, clipped, count = sums[step.output]
            ends, sqnr = self.scales[step.output].ends, _decibels(signal, noise)
            shares = (
                float(costs.maps[step.output].sum()) / total,
                costs.weights.get(self.place(step), 0.0) / total,
            )
            layers.append(LayerReport(node.name, node.op, *ends, sqnr, clipped / count, *shares))
        return tuple(layers)

    # the quantised one

    def padding(self, source: int) -> Tensor:
        """What pads a map and stands for its zeros, [1 or 3, 1, 1]."""
        zeros = self.graph.padding_bytes if source == -1 else [self.scales[source].zero_point]
        return torch.tensor(zeros, dtype=torch.float32, device=self.images.device).view(-1, 1, 1)

    def simulated(self, node: Node, step: _Step) -> Iterator[Tensor]:
        """A node's output on all images, in chunks."""
        inputs = [(self.maps[source], self.padding(source)) for source in step.inputs]
        for i in range(0, len(self.images), _CHUNK):
            yield simulate.compute(node, [(data[i : i + _CHUNK], pad) for data, pad in inputs])

    def quantized(self, step: _Step, fields: dict[str, Any]) -> Node:
        node, scale = step.node, self.scales[step.output]
        if step.output == len(self.float_nodes) - 1:
            return self.weighed(step, Classifier, fields, 1.0)
        fields["zero_point"] = scale.zero_point
        if step.activation in ("relu", "relu6"):
            fields["lo"] = scale.zero_point
        if step.activation == "relu6":
            fields["hi"] = min(255, scale.zero_point + round(6 / scale.scale))
        ratios = [self.scales[source].scale / scale.scale for source in step.inputs]
        if node.op == "add":
            return Add(multipliers=(_ratio(ratios[0]), _ratio(ratios[1])), **fields)
        if node.op == "pool":
            return Pool(ratio=ratios[0], **fields)
        if node.op == "squeeze_excite":
            for number, weight, bias in (("1", node.w1, node.b1), ("2", node.w2, node.b2)):
                rounded, fields["s" + number] = SqueezeExcite.rounded(_numpy(weight).T)
                fields["q" + number] = np.ascontiguousarray(rounded)
                fields["b" + number] = _numpy(bias).astype(np.float32)
            fields["hidden_hardswish"] = node.hidden == "hardswish"
            own = self.scales[step.inputs[0]].scale
            return SqueezeExcite(scale=own, ratio=float(np.float32(ratios[0])), **fields)
        fields |= {"stride": node.stride, "padding": node.padding}
        if step.activation == "hardswish":
            fields["hardswish_scale"] = float(np.float32(1 / (6 * scale.scale)))
            return self.weighed(step, Depthwise if node.groups > 1 else Conv, fields, 1.0)
        if len(ratios) == 2:
            fields["residual_multiplier"] = _ratio(ratios[1])
        if step.output in self.fine:
            fields["fine"] = True
        return self.weighed(step, Depthwise if node.groups > 1 else Conv, fields, scale.scale)

    def weighed(self, step: _Step, cls: Any, fields: dict[str, Any], out: float) -> Node:
        """A node with weights; float(acc) * multiplier is its value / out.

        A unit of the sums is input scale * weight scale. It has a floor, so that a channel with
        few or no weights keeps its bias in 30 bits and its multiplier normal.
        """
        source, scale = step.inputs[0], self.scales[step.inputs[0]].scale
        weight, bias = _numpy(step.node.weight), _numpy(step.node.bias)
        pad = self.padding(source)
        zero = pad.double().cpu().numpy()
        if source == -1:  # bytes, not normalised pixels; what pads them is rounded
            weight = weight / (255 * np.array(self.graph.std)[:, None, None])
            zero = 255 * np.array(self.graph.mean)[:, None, None]
        if self.reconstruct:
            halves = self.moments(step, weight * scale, bias)
            flat = reconstruct.refit(reconstruct.flat(step.node, weight * scale), halves)
            weight = flat.reshape(weight.shape) / scale
        unit = np.abs(weight).max((1, 2, 3)) * scale / 127
        unit = np.maximum(unit, np.maximum(np.abs(bias) / 2**29, out * 2.0**-40))
        if step.activation in ("relu", "relu6"):
            # Multiples of 2^-16 let the engine make bytes in fewer instructions (kBitsGrid). From
            # 2^-12 on: half a unit times a byte is at most 0.03 of the output's.
            multiplier = np.ceil(np.maximum(unit / out, 2.0**-12) * 2**16) / 2**16
            multiplier = multiplier.astype(np.float32)
        else:
            multiplier = _significant(unit / out, 22)
        unit = multiplier.astype(np.float64) * out
        if self.reconstruct:
            flat = reconstruct.flat(step.node, weight * scale)
            q = reconstruct.rounded(flat, unit.reshape(flat.shape[:2]), halves[0] + halves[1])
            q = q.reshape(weight.shape)
        else:
            q = np.rint(weight * scale / unit[:, None, None, None]).clip(-127, 127)
        error = q * unit[:, None, None, None] / scale - weight
        if source == -1:
            error = error * (255 * np.array(self.graph.std)[:, None, None])
        self.lost[self.place(step)] = torch.from_numpy(error).to(self.images.device)
        mine, read = self.twins.get(step.output), self.twins.get(source)
        if step.node.groups == 1:
            q = fine.split(q) if source in self.fine else twins.split(q, read)
        q = twins.with_twins(q, mine)
        q = q.astype(np.int8)
        unit, multiplier = twins.with_twins(unit, mine), twins.with_twins(multiplier, mine)
        bias = twins.with_twins(bias, mine)
        if cls is Conv:
            q = q.transpose(0, 2, 3, 1)
        elif cls is Depthwise:
            q = q[:, 0].transpose(1, 2, 0)
        else:
            q = q[:, :, 0, 0]
        zeros = np.zeros(len(unit), np.int32)
        node = cls(weight=np.ascontiguousarray(q), bias=zeros, multiplier=multiplier, **fields)
        folded = simulate.folded(node, zero)
        if self.bias_correction:
            value = _numpy(simulate.sums(node, (self.mean_map(source) - pad)[None]).mean((0, 2, 3)))
            value = value + simulate.folded(node, pad.double().cpu().numpy()) - folded
            bias = twins.with_twins(_numpy(self.before[step.output]), mine) - value * unit
            for other in step.inputs[1:]:
                bias = bias - self.mean_value(other)
        most = 2**31 - 1 - simulate.largest(node)
        bias = bias / unit + twins.offsets(len(weight), mine) / multiplier
        node = _biased(node, bias - folded, most)
        if self.bias_correction and step.activation:
            for _ in range(_ROUNDS):
                error = twins.with_twins(self.error_after(node, step), mine)
                node = _biased(node, node.bias + error / unit, most)
        return node

    def advance(self, step: _Step) -> None:
        """The step's float map, and its values before the activation where they are seen."""
        maps, seen = [], []
        for i in range(0, len(self.floats[step.inputs[0]]), _CHUNK):
            inputs = [self.floats[source][i : i + _CHUNK] for source in step.inputs]
            y = pre_activation(step.node, inputs)
            if step.node.op == "conv" and len(inputs) == 2:
                y = y + inputs[1]
            if step.node.op == "conv":
                seen.append(reconstruct.seen(y))
            maps.append(activated(y, step.activation))
        self.floats[step.output] = torch.cat(maps)
        self.targets = torch.cat(seen) if seen else torch.empty(0)

    def moments(
        self, step: _Step, weight: Array, bias: Array
    ) -> tuple[reconstruct.Moments, reconstruct.Moments]:
        """Of what a convolution reads and of what its output lacks, on either half of the images.

        weight: [C_out, C_in / groups, kh, kw], of centred bytes.
        """
        source, others = step.inputs[0], step.inputs[1:]
        w = torch.from_numpy(reconstruct.flat(step.node, weight)).to(self.targets)
        b = torch.from_numpy(bias).to(self.targets).view(-1, 1, 1)
        first, second = (reconstruct.Moments.like(w) for _ in range(2))
        for i in range(0, len(self.targets), _CHUNK):
            some = slice(i, i + _CHUNK)
            x = self.merged(self.maps[source][self.fitted][some], source, 1)
            x = reconstruct.patches(step.node, x - self.padding(source), weight.shape[2:])
            rest = b.expand_as(self.targets[some])
            for other in others:
                rest = rest + self.values(other, some)
            y, rest = (reconstruct.grouped(step.node, v) for v in (self.targets[some], rest))
            got = activated(x @ w.mT + rest, step.activation)
            (first if i // _CHUNK % 2 else second).add(x, activated(y, step.activation) - got)
        return first, second

    def values(self, source: int, some: slice) -> Tensor:
        """What a map's bytes stand for, where they are seen."""
        scale = self.scales[source]
        seen = reconstruct.seen(self.maps[source][self.fitted][some])
        return (self.merged(seen, source, 1).float() - scale.zero_point) * scale.scale

    def merged(self, values: Tensor, source: int, axis: int) -> Tensor:
        """Levels of a map as if each channel was there once, with eight bits or more."""
        if source in self.fine:
            return fine.merged(values, self.scales[source].zero_point, axis)
        return twins.merged(values, self.twins.get(source), axis)

    def place(self, step: _Step) -> int:
        """The float node of a step."""
        return next(i for i, node in enumerate(self.float_nodes) if node is step.node)

    def error_after(self, node: Any, step: _Step) -> Array:
        """[C]: what to add before the activation, so that the mean after it is the float one.

        Where few values are between the flat parts of the activation it has little leverage, and
        is left small.
        """
        scale, copies = self.scales[step.output], self.twins.get(step.output)
        mean: Any = 0.0
        inside: Any = 0.0
        for output in self.simulated(node, step):
            between = (output > scale.zero_point) & (output < node.hi)
            mean += output.float().mean((2, 3)).double().sum(0) / len(self.images)
            inside += between.float().mean((2, 3)).double().sum(0) / len(self.images)
        mean, inside = twins.merged(mean, copies, 0), twins.merged(inside, copies, 0)
        error = self.after[step.output] - (mean - scale.zero_point) * scale.scale
        return _numpy(error * inside / (inside**2 + 0.0025))

    def mean_map(self, source: int) -> Tensor:
        """[C, H, W], of the bytes on all images, in float64."""
        chunks = self.maps[source].split(_CHUNK)
        total: Any = sum(chunk.float().sum(0).double() for chunk in chunks)
        return total / len(self.images)

    def mean_value(self, source: int) -> Array:
        """[C], of what the bytes stand for; of a channel and its twin, the mean of both."""
        scale, copied = self.scales[source], self.twins.get(source)
        mean = self.merged(self.mean_map(source).mean((1, 2)), source, 0) - scale.zero_point
        return twins.with_twins(_numpy(mean) * scale.scale, copied)


def _steps(nodes: tuple[FloatNode, ...], fuses: bool = True) -> list[_Step]:
    """The nodes in order; with `fuses`, an addition joins a convolution before it if it can."""
    readers = Counter(source for node in nodes for source in node.inputs)
    taken: dict[int, int] = {}  # addition -> convolution
    for index, node in enumerate(nodes):
        fit = [
            source
            for source in node.inputs
            if fuses
            and node.op == "add"
            and nodes[source].op == "conv"
            and (nodes[source].groups, nodes[source].activation) == (1, None)
            and readers[source] == 1
        ]
        if fit:
            taken[index] = max(fit)
    steps = []
    for index, node in enumerate(nodes):
        if index in taken:
            conv, (a, b) = nodes[taken[index]], node.inputs
            other = b if a == taken[index] else a
            steps.append(_Step(conv, (*conv.inputs, other), index, node.activation))
        elif index not in taken.values():
            steps.append(_Step(node, node.inputs, index, node.activation))
    return steps


def _biased(node: Any, bias: Array, most: Array) -> Any:
    """The node with a bias rounded, and no larger than most."""
    return replace(node, bias=np.clip(np.rint(bias), -most, most).astype(np.int32))


def _significant(x: Array, bits: int) -> Array:
    """Rounded to so many bits, as float32."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.rint(np.ldexp(mantissa, bits)), exponent - bits).astype(np.float32)


def _ratio(x: float) -> float:
    """Of 16 bits: its product with a difference of bytes is exact in float32."""
    return float(_significant(np.array(x), 16))


def _numpy(x: Tensor | None) -> Array:
    assert x is not None
    return x.double().cpu().numpy()


def _decibels(signal: Any, noise: Any) -> float:
    signal, noise = float(signal), float(noise)
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf
