"""Scales of maps and weights, which a graph holds only as their products.

A convolution's multiplier is s_in s_w / s_out. What fixes s is a hard-swish, which is not linear,
a squeeze-excite, and what two maps have in common by an addition. A map that nothing fixes may
have any scale: no result depends on it, and it gets 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..int8.file import fingerprint
from ..int8.graph import (
    Add,
    Array,
    Classifier,
    Conv,
    Depthwise,
    Graph,
    Pool,
    Quantized,
    SqueezeExcite,
)


@dataclass(frozen=True)
class Map:
    """A tensor of bytes: real = scale * (byte - zero_point)."""

    scale: float
    zero_point: int
    lo: int = 0
    hi: int = 255

    @property
    def range(self) -> tuple[float, float]:
        """The least and the largest real value."""
        return self.scale * (self.lo - self.zero_point), self.scale * (self.hi - self.zero_point)

    @classmethod
    def over(cls, least: float, largest: float) -> Map:
        """Bytes for these real numbers, 0 among them."""
        least, largest = min(least, 0.0), max(largest, 0.0)
        scale = float(np.float32((largest - least) / 255)) or 1.0
        return cls(scale, round(-least / scale))


def preparation(graph: Graph) -> dict[str, Any]:
    """What a model's metadata say of its images and classes, and of what file it was made."""
    names = ("classes", "mean", "std", "crop_pct", "interpolation", "multilabel")
    return {name: getattr(graph, name) for name in names} | {"student": fingerprint(graph)}


def of_maps(graph: Graph) -> list[Map | None]:
    """Of each node's output; None for the classifier's logits."""
    factor = _related(graph)
    found: list[Map | None] = []
    for index, node in enumerate(graph.nodes):
        if isinstance(node, Quantized):
            scale = float(np.float32(factor[index]))
            found.append(Map(scale, node.zero_point, node.lo, node.hi))
        else:
            found.append(None)
    return found


def _related(graph: Graph) -> dict[int, float]:
    """The scale of each map: those that are related by a known factor, from one that is known."""
    edges: dict[int, list[tuple[int, float]]] = {i: [] for i in range(len(graph.nodes))}
    known: dict[int, float] = {}

    def relate(a: int, b: int, ratio: float) -> None:
        """scale of a = ratio * scale of b."""
        edges[a].append((b, 1 / ratio))
        edges[b].append((a, ratio))

    for i, node in enumerate(graph.nodes):
        if isinstance(node, Conv | Depthwise) and node.hardswish_scale is not None:
            known[i] = 1 / (6 * node.hardswish_scale)
        if isinstance(node, Conv) and node.residual_multiplier is not None:
            relate(node.inputs[1], i, node.residual_multiplier)
        elif isinstance(node, Add):
            for source, multiplier in zip(node.inputs, node.multipliers, strict=True):
                relate(source, i, multiplier)
        elif isinstance(node, SqueezeExcite | Pool):
            relate(node.inputs[0], i, node.ratio)
            if isinstance(node, SqueezeExcite):
                known.setdefault(node.inputs[0], node.scale)
    scales: dict[int, float] = {}
    for i in (*known, *edges):
        if i in scales:
            continue
        scales[i] = known.get(i, 1.0)
        waiting, found = [i], [i]
        while waiting:
            a = waiting.pop()
            for b, ratio in edges[a]:
                if b not in scales:
                    scales[b] = known.get(b, scales[a] * ratio)
                    waiting.append(b)
                    found.append(b)
        if i not in known and len(found) > 1:
            unit = _unit(graph, {j: scales[j] for j in found})
            scales.update({j: unit * scales[j] for j in found})
    return scales


def _unit(graph: Graph, scales: dict[int, float]) -> float:
    """What to multiply these scales with, so that runtimes form the multipliers that read them.

    Those of few bits, whose sums are ties now and then, have to be right to the last bit. What
    reads such a map has an output of scale 1: its weights' scale is the multiplier over the map's,
    and not every product of two float32 numbers is the number that was divided.
    """
    readers = [
        (node, scales[node.inputs[0]])
        for i, node in enumerate(graph.nodes)
        if isinstance(node, Conv | Depthwise) and node.inputs[0] in scales and i not in scales
    ]

    def wrong(unit: float) -> int:
        count = 0
        for node, scale in readers:
            short = np.ldexp(np.frexp(node.multiplier)[0], 16) % 1 == 0
            reads = Map(float(np.float32(unit * scale)), 0)
            count += int((_off(node, _near(node, reads, 1.0), reads, 1.0) != 0)[short].sum())
        return count

    return min((1 + k / 2048 for k in range(2048)), key=wrong) if readers else 1.0


def of_weights(node: Conv | Depthwise | Classifier, inputs: Map, output: Map | None) -> Array:
    """Float32 [C_out], of a convolution whose sums, times s_in s_w, are real numbers.

    ONNX Runtime and XNNPACK form s_in s_w / s_out in float32: of the numbers beside a quotient, the
    one whose product is the engine's multiplier, or nearest to it. Else some sums that are almost
    ties would be rounded to the other side.
    """
    return _near(node, inputs, 1.0 if output is None or _has_hardswish(node) else output.scale)


def _near(node: Conv | Depthwise | Classifier, inputs: Map, output: float) -> Array:
    """Of the float32 numbers beside m s_out / s_in, the one whose product is nearest to m."""
    exact = (node.multiplier.astype(np.float64) * output / inputs.scale).astype(np.float32)
    below, above = (np.nextafter(exact, np.float32(end)) for end in (0, np.inf))
    found = np.stack([exact, below, above])
    nearest = np.abs(_off(node, found, inputs, output)).argmin(0)
    scale: Array = np.take_along_axis(found, nearest[None], 0)[0]
    return scale


def _off(node: Conv | Depthwise | Classifier, scale: Array, inputs: Map, output: float) -> Array:
    """By how much the multiplier is missed in float32."""
    missed: Array = np.float32(inputs.scale) * scale / np.float32(output) - node.multiplier
    return missed


def _has_hardswish(node: Conv | Depthwise | Classifier) -> bool:
    return isinstance(node, Conv | Depthwise) and node.hardswish_scale is not None


def unfolded(node: Conv | Depthwise | Classifier, zero_point: int) -> Array:
    """The bias, int32 [C_out], for inputs less their zero point."""
    axes = (0, 1) if isinstance(node, Depthwise) else tuple(range(1, node.weight.ndim))
    return (node.bias + zero_point * node.weight.sum(axes, dtype=np.int64)).astype(np.int32)


def before_activation(output: Map) -> Map:
    """Of what a hard-swish with this output reads: below -3 it is 0."""
    most = output.range[1]
    if most < 3:  # where x (x + 3) / 6 is the largest value
        most = (-3 + float(np.sqrt(9 + 24 * most))) / 2
    return Map.over(-3.0, most)


def before_residual(output: Map, other: Map) -> Map:
    """Of what is added to another map: no sum needs more."""
    (least, most), (b_least, b_most) = output.range, other.range
    return Map.over(least - b_most, most - b_least)
