"""What other runtimes than ONNX Runtime and OpenVINO ask of an ONNX model, and QOperator."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from ..int8.graph import Graph, SqueezeExcite
from .onnx import Writer
from .scales import Map
from .walk import GATE, Layer, Pads

_MICROSOFT = "com.microsoft"  # ONNX Runtime's own operators
_FUSED = {
    "Conv": ("QLinearConv", ""),
    "Add": ("QLinearAdd", _MICROSOFT),
    "Mul": ("QLinearMul", _MICROSOFT),
    "GlobalAveragePool": ("QLinearGlobalAveragePool", _MICROSOFT),
}


class OpenVINO(Writer):
    """A hard-swish is one kernel with its convolution; so is an addition, whose bytes it drops."""

    rounds_before_activations = False

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph, False)


class QOperator(Writer):
    """Dequantize, operator, quantize as one operator: QLinearConv, and ONNX Runtime's own others.

    What has no such operator, a hard-swish and a hard-sigmoid, stays in float32.
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph, False)

    def image(self, of: Map, pads: Pads | None) -> str:
        return self.real(self.planes(self.padded(pads)), of, "image")

    def model(self) -> Any:
        made = super().model()
        _fuse(made)
        return made


class TensorRT(Writer):
    """Symmetric: int8 maps without zero points, of the image its bytes less 128; float32 biases.

    A map from 0 to 255 s keeps 128 of its 256 levels. Weights have no zero points anyway.
    """

    flat_bytes = False

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph, False)

    def image_map(self) -> Map:
        return Map(1.0, 128)

    def image(self, of: Map, pads: Pads | None) -> str:
        return self.around(self.add("Cast", [self.planes("images")], "planes.real", to=1), of, pads)

    def rounded_image(self, x: str, of: Map) -> str:
        return self.again(x, of, "pixels")

    def parameters(self, of: Map, name: str) -> list[str]:
        least, most = of.range
        return [
            self.constant(f"{name}.scale", max(-least / 128, most / 127), np.float32),
            self.constant(f"{name}.zero_point", 0, np.int8),
        ]

    def quantized(self, x: str, of: Map, name: str) -> str:
        if of.range[0] == 0:
            x = self.relu(x, f"{name}.relu")  # bytes from 0 on had it for nothing
        elif (of.lo, of.hi) != (0, 255):
            x = self.clipped(x, *of.range, f"{name}.clipped")
        return self.add("QuantizeLinear", [x, *self.parameters(of, name)], f"{name}.bytes")

    def bias(self, layer: Layer, name: str) -> str:
        return self.constant(name, layer.real_bias, np.float32)


class QNN(Writer):
    """For the HTP: one image, and Q/DQ around every operator, the last too.

    Where no bytes are known, in a squeeze-excite's gate and behind the classifier, there are 16
    bits for all that weights and inputs allow, and they go with int8 weights.
    """

    batch = 1
    flat_bytes = False

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph, False)

    def image(self, of: Map, pads: Pads | None) -> str:
        whole = Map(1.0, 0)
        x = self.planes(self.real("images", whole if pads else of, "images"))
        return self.around(x, of, pads) if pads else x

    def rounded_image(self, x: str, of: Map) -> str:
        return self.again(x, of, "pixels")

    def _wide(self, x: str, least: float, most: float, name: str) -> tuple[str, float]:
        """Through 16 bits and back; and their scale."""
        least, most = min(least, 0.0), max(most, 0.0)
        scale = float(np.float32((most - least) / 65535)) or 1.0
        by = [
            self.constant(f"{name}.scale", scale, np.float32),
            self.constant(f"{name}.zero_point", round(-least / scale), np.uint16),
        ]
        x = self.add("QuantizeLinear", [x, *by], f"{name}.words")
        return self.add("DequantizeLinear", [x, *by], f"{name}.real"), scale

    def _of_words(self, x: str, layer: Layer, scale: float, name: str) -> str:
        """A 1x1 convolution of what has 16 bits at this scale."""
        unit = layer.scale * np.float32(scale)
        bias = np.rint(layer.real_bias / unit.astype(np.float64)).astype(np.int32)
        whole = Layer(layer.weight[..., None, None], layer.scale, bias, unit)
        return self.convolution(x, whole, (1, 1), ((0, 0), (0, 0)), 1, name)

    def classified(self, x: str, layer: Layer, name: str) -> str:
        of = layer.reads
        assert of is not None
        x, scale = self._wide(x, *of.range, f"{name}.wide")
        y = self._of_words(x, layer, scale, f"{name}.product")
        range_ = bounds(layer, of.range)
        y, _ = self._wide(y, *range_, f"{name}.logits")
        y, _ = self._wide(self.add("Flatten", [y], f"{name}.flat"), *range_, "logits")
        self.nodes[-1].output[0] = "logits"
        return "logits"

    def gate(self, node: SqueezeExcite, name: str) -> str:
        x, of = self.read(node.inputs[0], f"{name}.gate")
        y = self.again(self.mean(x, f"{name}.mean"), Map(of.scale, of.zero_point), f"{name}.means")
        range_ = of.range
        y, scale = self._wide(y, *range_, f"{name}.wide")
        first, second = self.gate_layers(node)
        y = self._of_words(y, first, scale, f"{name}.fc1")
        range_ = bounds(first, range_)
        if node.hidden_hardswish:
            y, _ = self._wide(y, *range_, f"{name}.linear")
            y, range_ = self.hard_swish(y, f"{name}.hardswish"), (-0.375, range_[1])
        else:
            range_ = 0.0, range_[1]  # cut there
        y, scale = self._wide(y, *range_, f"{name}.hidden")
        y = self._of_words(y, second, scale, f"{name}.fc2")
        y, _ = self._wide(y, -3.0, 3.0, f"{name}.before")  # a hard-sigmoid sees no more
        y, _ = self._wide(self.hard_sigmoid(y, f"{name}.hardsigmoid"), 0.0, 1.0, f"{name}.gates")
        return self.again(y, GATE, f"{name}.gate")


def bounds(layer: Layer, reads: tuple[float, float]) -> tuple[float, float]:
    """What a product with the weights [out, in] can be, of inputs in a range."""
    ends = np.multiply.outer(np.array(reads), layer.real_weight.astype(np.float64))
    bias = layer.real_bias
    return (ends.min(0).sum(1) + bias).min(), (ends.max(0).sum(1) + bias).max()


WRITERS = {"openvino": OpenVINO, "qoperator": QOperator, "tensorrt": TensorRT, "qnn": QNN}


def _fuse(model: Any) -> None:
    from onnx import helper

    graph = model.graph
    makes = {output: node for node in graph.node for output in node.output}
    readers = Counter(name for node in graph.node for name in node.input)
    nodes = []
    for node in graph.node:
        if node.op_type == "QuantizeLinear" and readers[node.input[0]] == 1:
            op = makes[node.input[0]]
            sources = [makes.get(name) for name in op.input]
            if op.op_type in _FUSED and all(
                source is not None and source.op_type == "DequantizeLinear" for source in sources
            ):
                node = _fused(op, sources, node)
        elif node.op_type == "Gemm":  # behind a Flatten, and bytes and back
            real, *rest = (makes[name] for name in node.input)
            flat = makes[makes[real.input[0]].input[0]]
            read = makes[flat.input[0]].input
            bytes_ = f"{flat.name}.bytes"
            nodes.append(helper.make_node("Flatten", read[:1], [bytes_], name=bytes_))
            inputs = [bytes_, *read[1:], *rest[0].input, rest[1].input[0]]
            node = helper.make_node(
                "QGemm", inputs, node.output, name=node.name, domain=_MICROSOFT, transB=1
            )
        nodes.append(node)
    kept, wanted = [], {output.name for output in graph.output}
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            kept.append(node)
    constants = [constant for constant in graph.initializer if constant.name in wanted]
    for field, values in ((graph.node, kept[::-1]), (graph.initializer, constants)):
        del field[:]
        field.extend(values)
    model.opset_import.append(helper.make_opsetid(_MICROSOFT, 1))


def _fused(op: Any, sources: list[Any], quantize: Any) -> Any:
    from onnx import helper

    kind, domain = _FUSED[op.op_type]
    inputs = [name for source in sources[:2] for name in source.input]
    inputs += quantize.input[1:]
    if op.op_type == "Conv":
        inputs.append(sources[2].input[0])  # int32
    made = helper.make_node(kind, inputs, quantize.output, name=op.name, domain=domain)
    made.attribute.extend(op.attribute)
    return made
