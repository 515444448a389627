"""ExecuTorch: an exported program with the graph's own scales, lowered to XNNPACK.

Bytes are the engine's less 128. XNNPACK's partitioner takes dequantize, operator, quantize as one
int8 operator; biases are float32 in the program and int32 at s_in s_w in XNNPACK. The weights
of a classifier and of a squeeze-excite stay int8 too: XNNPACK rounds what they read to bytes, by
the range of each call.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._extras import require
from .._files import replacing
from ..int8.graph import Array, Graph
from . import scales
from .scales import Map
from .walk import Layer, Pads, Walk

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram

METADATA = "vitkd_fast"


def write(graph: Graph, path: Path, exact: bool = False) -> None:
    """Writes the program, entirely or not at all; `exact`: float32, without rounding."""
    require("export-executorch", "export: a .pte file")
    lowered = lower(program(graph, exact), scales.preparation(graph))
    with replacing(path) as beside:
        beside.write_bytes(lowered.buffer)


def program(graph: Graph, exact: bool = False) -> ExportedProgram:
    """uint8 [1, H, W, 3] to float32 [1, classes], of torch's operators and quantized_decomposed."""
    import torch

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kept = torch.nn.ParameterDict()

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = _Writer(graph, exact, images, self.kept).logits()
            return logits

    network = Network()
    images = torch.zeros(1, graph.image_size, graph.image_size, 3, dtype=torch.uint8)
    with torch.no_grad():
        network(images)  # keeps the constants, which an export must find
        return torch.export.export(network, (images,), strict=False)


def lower(exported: ExportedProgram, about: dict[str, Any] | None = None) -> Any:
    """ExecuTorch's program; what XNNPACK does not take stays in portable kernels.

    Args:
        exported: the network.
        about: what a second method, `METADATA`, returns as JSON.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    edge = to_edge_transform_and_lower(
        exported,
        partitioner=[XnnpackPartitioner()],
        constant_methods={METADATA: json.dumps(about or {})},
    )
    return edge.to_executorch()


class _Writer(Walk):
    """Runs the network on an image, which torch.export writes down."""

    def __init__(self, graph: Graph, exact: bool, images: Tensor, kept: Any) -> None:
        import torch
        import torch.ao.quantization.fx._decomposed

        super().__init__(graph, exact)
        self.torch, self.functional = torch, torch.nn.functional
        self.ops = torch.ops.quantized_decomposed
        self.images, self.kept = images, kept

    def _constant(self, name: str, data: Array) -> Tensor:
        name = name.replace(".", "_")
        if name not in self.kept:
            held = self.torch.from_numpy(np.array(data))
            self.kept[name] = self.torch.nn.Parameter(held, requires_grad=False)
        found: Tensor = self.kept[name]
        return found

    def image(self, of: Map, pads: Pads | None) -> Any:
        x = self.images.permute(0, 3, 1, 2).to(self.torch.float32)
        if pads is None:
            return x - float(of.zero_point)
        bytes_ = np.array(self.graph.padding_bytes, np.float32).reshape(1, 3, 1, 1)
        x = self._padded(x - self._constant("around", bytes_), pads)
        return x + self._constant("around.real", bytes_ - of.zero_point)

    def _padded(self, x: Tensor, pads: Pads) -> Tensor:
        (top, bottom), (left, right) = pads
        return self.functional.pad(x, (left, right, top, bottom))

    def _bytes(self, of: Map) -> tuple[float, int, int, int, Any]:
        return of.scale, of.zero_point - 128, -128, 127, self.torch.int8

    def quantized(self, x: Any, of: Map, name: str) -> Any:
        if (of.lo, of.hi) != (0, 255):
            x = self.clipped(x, *of.range, f"{name}.clipped")
        return self.ops.quantize_per_tensor(x, *self._bytes(of))

    def real(self, x: Any, of: Map, name: str) -> Any:
        return self.ops.dequantize_per_tensor(x, *self._bytes(of))

    def clipped(self, x: Any, least: float, most: float, name: str) -> Any:
        return self.functional.hardtanh(x, least, most)

    def _weights(self, layer: Layer, name: str) -> Tensor:
        if self.exact:
            return self._constant(name, layer.real_weight)
        held, s = self._constant(name, layer.weight), self._constant(f"{name}.scale", layer.scale)
        zeros = self._constant(f"{name}.zero", np.zeros(len(layer.scale), np.int64))
        weight: Tensor = self.ops.dequantize_per_channel(
            held, s, zeros, 0, -127, 127, self.torch.int8
        )
        return weight

    def convolution(
        self, x: Any, layer: Layer, stride: tuple[int, int], pads: Pads, groups: int, name: str
    ) -> Any:
        (top, bottom), (left, right) = pads
        padding = (top, left)
        if padding != (bottom, right):
            x, padding = self._padded(x, pads), (0, 0)
        weight = self._weights(layer, f"{name}.weight")
        bias = self._constant(f"{name}.bias", layer.real_bias)
        return self.functional.conv2d(x, weight, bias, stride, padding, groups=groups)

    def linear(self, x: Any, layer: Layer, name: str) -> Any:
        return self._linear(x.flatten(1), layer, name)[..., None, None]

    def classified(self, x: Any, layer: Layer, name: str) -> Any:
        assert layer.reads is not None
        x = x.flatten(1)
        if not self.exact:
            # with both ends of the map beside it, for no weights, x is rounded to the map's bytes
            ends = self._constant(f"{name}.ends", np.array([layer.reads.range], np.float32))
            x = self.torch.cat([x, ends], 1)
            layer = replace(layer, weight=np.pad(layer.weight, ((0, 0), (0, 2))))
        return self._linear(x, layer, name)

    def _linear(self, x: Tensor, layer: Layer, name: str) -> Tensor:
        if not self.exact:
            least, most, kind = -128, 127, self.torch.int8
            s, zero = self.ops.choose_qparams.tensor(x, least, most, 1e-12, kind)
            x = self.ops.quantize_per_tensor.tensor(x, s, zero, least, most, kind)
            x = self.ops.dequantize_per_tensor.tensor(x, s, zero, least, most, kind)
        bias = self._constant(f"{name}.bias", layer.real_bias)
        return self.functional.linear(x, self._weights(layer, f"{name}.weight"), bias)

    def sum(self, x: Any, y: Any, name: str) -> Any:
        return x + y

    def product(self, x: Any, y: Any, name: str) -> Any:
        return x * y

    def mean(self, x: Any, name: str) -> Any:
        return x.mean((2, 3), keepdim=True)

    def relu(self, x: Any, name: str) -> Any:
        return self.functional.relu(x)

    def hard_swish(self, x: Any, name: str) -> Any:
        return self.functional.hardswish(x)

    def hard_sigmoid(self, x: Any, name: str) -> Any:
        return self.functional.hardtanh(x + 3.0, 0.0, 6.0) * (1 / 6)
