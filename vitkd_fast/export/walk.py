"""A graph as layers of real numbers between bytes, whatever library they are written in.

A layer reads maps in real numbers and rounds what it makes to bytes: dequantize, operator,
quantize. A library's own writer gives the operators. Where the engine rounds once, behind a
hard-swish or a residual addition, these layers round before it too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..int8.graph import (
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
from . import scales
from .scales import Map

Pads = tuple[tuple[int, int], tuple[int, int]]  # of rows and columns, before and after
GATE = Map(1 / 255, 0)


@dataclass(frozen=True)
class Layer:
    """Weights int8 [C_out, ...] with a scale each, and a bias: int32 in `unit`s, or float32."""

    weight: Array
    scale: Array
    bias: Array
    unit: Array | None = None  # float32 [C_out]: scale times that of what it reads
    reads: Map | None = None  # where that is the real numbers of a map

    @property
    def real_weight(self) -> Array:
        """Float32."""
        scale = self.scale.astype(np.float64).reshape(-1, *[1] * (self.weight.ndim - 1))
        real: Array = (self.weight * scale).astype(np.float32)
        return real

    @property
    def real_bias(self) -> Array:
        """Float32."""
        if self.unit is None:
            return self.bias
        real: Array = (self.bias * self.unit.astype(np.float64)).astype(np.float32)
        return real

    def as_convolution(self) -> Layer:
        """Weights [out, in] as [out, in, 1, 1]."""
        return replace(self, weight=self.weight[..., None, None])


class Walk(ABC):
    """Writes a graph; values `Any` are the library's own, [N, C, H, W].

    Args:
        graph: what to write.
        exact: in float32, without rounding.
    """

    rounds_before_activations = True  # that is, once more than the engine

    def __init__(self, graph: Graph, exact: bool) -> None:
        self.graph, self.exact = graph, exact
        self.maps = scales.of_maps(graph)
        # of each node: its bytes (with `exact`: real numbers), and rows and columns
        self._outputs: dict[int, tuple[Any, tuple[int, int]]] = {}

    def logits(self) -> Any:
        """Writes all nodes; the last one's result, [N, classes]."""
        for index, node in enumerate(self.graph.nodes):
            name = f"{index}.{node.name}"
            if isinstance(node, Classifier):
                return self._classifier(node, name)
            self._outputs[index] = self._node(index, node, name)
        raise AssertionError("a graph ends with a classifier")

    # what a library's writer says

    @abstractmethod
    def image(self, of: Map, pads: Pads | None) -> Any:
        """The image's bytes as real numbers of a map; with `pads`, in `padding_bytes`."""

    @abstractmethod
    def quantized(self, x: Any, of: Map, name: str) -> Any:
        """The bytes of real numbers, cut to lo and hi."""

    @abstractmethod
    def real(self, x: Any, of: Map, name: str) -> Any:
        """Real numbers of bytes."""

    @abstractmethod
    def clipped(self, x: Any, least: float, most: float, name: str) -> Any:
        """Real numbers, cut."""

    @abstractmethod
    def convolution(
        self, x: Any, layer: Layer, stride: tuple[int, int], pads: Pads, groups: int, name: str
    ) -> Any:
        """Weights [C_out, C_in / groups, kh, kw]; padded with zeros."""

    @abstractmethod
    def linear(self, x: Any, layer: Layer, name: str) -> Any:
        """Weights [out, in], of [N, in, 1, 1]: [N, out, 1, 1], in float32."""

    @abstractmethod
    def classified(self, x: Any, layer: Layer, name: str) -> Any:
        """Likewise, the logits [N, out]."""

    @abstractmethod
    def sum(self, x: Any, y: Any, name: str) -> Any: ...

    @abstractmethod
    def product(self, x: Any, y: Any, name: str) -> Any: ...

    @abstractmethod
    def mean(self, x: Any, name: str) -> Any:
        """Over rows and columns, [N, C, 1, 1]."""

    @abstractmethod
    def relu(self, x: Any, name: str) -> Any: ...

    @abstractmethod
    def hard_swish(self, x: Any, name: str) -> Any: ...

    @abstractmethod
    def hard_sigmoid(self, x: Any, name: str) -> Any: ...

    # the walk

    def _rounded(self, x: Any, of: Map, name: str) -> Any:
        """The bytes of a map; with `exact`, real numbers cut to what its bytes cover."""
        if self.exact:
            return self.clipped(x, *of.range, name)
        return self.quantized(x, of, name)

    def again(self, x: Any, of: Map, name: str) -> Any:
        """Through bytes and back, where the network rounds at all."""
        if self.exact:
            return x
        return self.real(self._rounded(x, of, name), of, f"{name}.real")

    def read(self, source: int, name: str) -> tuple[Any, Map]:
        """A map in real numbers, for this reader alone."""
        of = self.maps[source]
        assert of is not None
        x = self._outputs[source][0]
        return (x if self.exact else self.real(x, of, f"{name}.of.{source}")), of

    def _node(self, index: int, node: Node, name: str) -> tuple[Any, tuple[int, int]]:
        output = self.maps[index]
        assert output is not None
        if isinstance(node, Conv | Depthwise):
            return self._convolution(node, output, name)
        x, _ = self.read(node.inputs[0], name)
        size = self._outputs[node.inputs[0]][1]
        if isinstance(node, Add):
            y = self.sum(x, self.read(node.inputs[1], f"{name}.other")[0], f"{name}.sum")
        elif isinstance(node, Pool):
            y, size = self.mean(x, f"{name}.mean"), (1, 1)
        else:
            assert isinstance(node, SqueezeExcite)
            y = self.product(x, self.gate(node, name), f"{name}.product")
        return self._rounded(y, output, name), size

    def _convolution(
        self, node: Conv | Depthwise, output: Map, name: str
    ) -> tuple[Any, tuple[int, int]]:
        if isinstance(node, Depthwise):
            w, groups = node.weight.transpose(2, 0, 1)[:, None], node.weight.shape[2]
        else:
            w, groups = node.weight.transpose(0, 3, 1, 2), 1
        source, side = node.inputs[0], self.graph.image_size
        sizes = self._outputs[source][1] if source >= 0 else (side, side)
        pads: Any = tuple(
            padding_of(size, w.shape[2 + axis], node.stride[axis], node.padding, axis)
            for axis, size in enumerate(sizes)
        )
        rows, columns = (
            (size + sum(pad) - taps) // stride + 1
            for size, pad, taps, stride in zip(sizes, pads, w.shape[2:], node.stride, strict=True)
        )
        if source < 0:
            x, of, pads = self._image(pads)
        else:
            x, of = self.read(source, name)
        layer = self._layer(node, np.ascontiguousarray(w), of, output)
        y = self.convolution(x, layer, node.stride, pads, groups, f"{name}.conv")
        if node.hardswish_scale is not None:
            if self.rounds_before_activations:
                y = self.again(y, scales.before_activation(output), f"{name}.linear")
            y = self.hard_swish(y, f"{name}.hardswish")
        elif isinstance(node, Conv) and node.residual_multiplier is not None:
            other, of = self.read(node.inputs[1], f"{name}.other")
            y = self.again(y, scales.before_residual(output, of), f"{name}.linear")
            y = self.sum(y, other, f"{name}.sum")
        return self._rounded(y, output, name), (rows, columns)

    def _image(self, pads: Pads) -> tuple[Any, Map, Pads]:
        """The image in real numbers, its map, and what a convolution still has to pad."""
        of, around = self.image_map(), set(self.graph.padding_bytes)
        zeros_pad = around == {of.zero_point}
        if zeros_pad or not any(map(any, pads)):
            return self.rounded_image(self.image(of, None), of), of, pads
        return self.rounded_image(self.image(of, pads), of), of, ((0, 0), (0, 0))

    def image_map(self) -> Map:
        """Of the image's bytes: zeros pad where all channels are padded alike."""
        bytes_ = self.graph.padding_bytes
        return Map(1.0, bytes_[0] if len(set(bytes_)) == 1 else 0)

    def rounded_image(self, x: Any, of: Map) -> Any:
        """Real numbers of the image's bytes, as those of a map."""
        return self.again(x, of, "pixels")

    def _layer(
        self, node: Conv | Depthwise | Classifier, weight: Array, of: Map, output: Map | None
    ) -> Layer:
        scale = scales.of_weights(node, of, output)
        bias = scales.unfolded(node, of.zero_point)
        return Layer(weight, scale, bias, scale * np.float32(of.scale), of)

    def gate_layers(self, node: SqueezeExcite) -> tuple[Layer, Layer]:
        """Both products of a squeeze-excite."""
        first = Layer(np.ascontiguousarray(node.q1.T), node.s1, node.b1)
        return first, Layer(np.ascontiguousarray(node.q2.T), node.s2, node.b2)

    def gate(self, node: SqueezeExcite, name: str) -> Any:
        """What a squeeze-excite multiplies its input with, [N, C, 1, 1], in real numbers."""
        y = self.mean(self.read(node.inputs[0], f"{name}.gate")[0], f"{name}.mean")
        first, second = self.gate_layers(node)
        y = self.linear(y, first, f"{name}.fc1")
        y = (self.hard_swish if node.hidden_hardswish else self.relu)(y, f"{name}.act")
        y = self.linear(y, second, f"{name}.fc2")
        return self.again(self.hard_sigmoid(y, f"{name}.hardsigmoid"), GATE, f"{name}.gate")

    def _classifier(self, node: Classifier, name: str) -> Any:
        x, of = self.read(node.inputs[0], name)
        return self.classified(x, self._layer(node, node.weight, of, None), name)
