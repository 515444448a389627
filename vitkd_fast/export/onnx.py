"""ONNX, opset 21: Q/DQ around every layer, which ONNX Runtime and OpenVINO turn into int8 layers.

Where the engine rounds once, behind a hard-swish or a residual addition, a runtime rounds twice:
before it too, to bytes that cover what can be there. A profile says what else a runtime asks for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from .._extras import require
from .._files import replacing
from ..int8.graph import Array, Graph
from . import scales
from .scales import Map
from .walk import Layer, Pads, Walk

OPSET = 21


def write(graph: Graph, path: Path, exact: bool = False, profile: str = "qdq") -> None:
    """Writes the file, entirely or not at all; `exact`: float32, without rounding."""
    require("export-onnx", "export: a .onnx file")
    import onnx

    made = model(graph, exact, profile)
    with replacing(path) as beside:
        onnx.save(made, str(beside))


def model(graph: Graph, exact: bool = False, profile: str = "qdq") -> Any:
    """The onnx.ModelProto, checked; `exact` leaves nothing that a profile could say."""
    import onnx

    from . import onnx_profiles

    if exact or profile == "qdq":
        writer = Writer(graph, exact)
    else:
        writer = onnx_profiles.WRITERS[profile](graph)
    made = writer.model()
    onnx.checker.check_model(made, full_check=True)
    return made


class Writer(Walk):
    """Nodes and constants by name; bytes are the engine's own."""

    batch: str | int = "N"
    flat_bytes = True  # ONNX Runtime looks for bytes right before a product

    def __init__(self, graph: Graph, exact: bool) -> None:
        super().__init__(graph, exact)
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}

    def model(self) -> Any:
        from onnx import TensorProto, helper

        size = self.graph.image_size
        classes = len(self.graph.nodes[-1].weight)  # type: ignore[attr-defined]
        shape: list[Any] = [self.batch, size, size, 3]
        self.logits()
        made = helper.make_graph(
            self.nodes,
            "vitkd_fast",
            [helper.make_tensor_value_info("images", TensorProto.UINT8, shape)],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [self.batch, classes])],
            initializer=list(self.constants.values()),
        )
        model = helper.make_model(
            made,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=10,
            producer_name="vitkd_fast",
        )
        about = scales.preparation(self.graph)
        helper.set_model_props(model, {key: json.dumps(value) for key, value in about.items()})
        return model

    def add(self, op: str, inputs: list[str], name: str, **attributes: Any) -> str:
        """A node of one output, which has its name."""
        from onnx import helper

        self.nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def constant(self, name: str, value: Any, dtype: Any) -> str:
        from onnx import numpy_helper

        self.constants[name] = numpy_helper.from_array(np.asarray(value, dtype), name)
        return name

    # maps

    def parameters(self, of: Map, name: str) -> list[str]:
        """The names of a map's scale and zero point."""
        return [
            self.constant(f"{name}.scale", of.scale, np.float32),
            self.constant(f"{name}.zero_point", of.zero_point, np.uint8),
        ]

    def image(self, of: Map, pads: Pads | None) -> str:
        # in this order OpenVINO needs no Transpose, and pads with a zero point in int8
        return self.planes(self.real(self.padded(pads), of, "image"))

    def planes(self, x: str) -> str:
        """[N, H, W, 3] as [N, 3, H, W]."""
        return self.add("Transpose", [x], "planes", perm=[0, 3, 1, 2])

    def around(self, x: str, of: Map, pads: Pads | None) -> str:
        """Real bytes [N, 3, H, W] in float32 as those of a map; with `pads`, in `padding_bytes`."""
        if pads is None:
            zero = self.constant("planes.zero", of.zero_point, np.float32)
            return self.add("Sub", [x, zero], "planes.less")
        bytes_ = np.array(self.graph.padding_bytes, np.float32).reshape(1, 3, 1, 1)
        (top, bottom), (left, right) = pads
        by = self.constant("pads", [0, 0, top, left, 0, 0, bottom, right], np.int64)
        x = self.add("Sub", [x, self.constant("around", bytes_, np.float32)], "planes.less")
        real = self.constant("around.real", bytes_ - of.zero_point, np.float32)
        return self.add("Add", [self.add("Pad", [x, by], "planes.padded"), real], "planes.around")

    def padded(self, pads: Pads | None) -> str:
        """The image's bytes [N, H, W, 3]; with `pads`, in `padding_bytes`."""
        from onnx import helper

        if pads is None:
            return "images"
        (top, bottom), (left, right) = pads
        by = self.constant("pads", [0, top, left, 0, 0, bottom, right, 0], np.int64)
        bytes_ = self.graph.padding_bytes
        if len(set(bytes_)) == 1:
            byte = self.constant("planes.byte", bytes_[0], np.uint8)
            return self.add("Pad", ["images", by, byte], "padded")
        channels = [f"planes.{i}" for i in range(3)]
        split = helper.make_node("Split", ["images"], channels, name="split", axis=3, num_outputs=3)
        self.nodes.append(split)
        padded = [
            self.add(
                "Pad",
                [channel, by, self.constant(f"{channel}.byte", byte, np.uint8)],
                f"{channel}.padded",
            )
            for channel, byte in zip(channels, bytes_, strict=True)
        ]
        return self.add("Concat", padded, "padded", axis=3)

    def rounded_image(self, x: str, of: Map) -> str:
        return x  # it is bytes

    def quantized(self, x: str, of: Map, name: str) -> str:
        y = self.add("QuantizeLinear", [x, *self.parameters(of, name)], f"{name}.bytes")
        if (of.lo, of.hi) == (0, 255):
            return y
        least = self.constant(f"{name}.lo", of.lo, np.uint8)
        most = self.constant(f"{name}.hi", of.hi, np.uint8)
        return self.add("Clip", [y, least, most], f"{name}.clipped")

    def real(self, x: str, of: Map, name: str) -> str:
        return self.add("DequantizeLinear", [x, *self.parameters(of, name)], f"{name}.real")

    def clipped(self, x: str, least: float, most: float, name: str) -> str:
        bounds = [
            self.constant(f"{name}.{key}", value, np.float32)
            for key, value in (("min", least), ("max", most))
        ]
        return self.add("Clip", [x, *bounds], name)

    # layers

    def weights(self, layer: Layer, name: str) -> str:
        """Real weights [C_out, ...]."""
        if self.exact:
            return self.constant(name, layer.real_weight, np.float32)
        return self._dequantized(layer.weight, layer.scale, name)

    def bias(self, layer: Layer, name: str) -> str:
        """Real biases, of int32 ones where the layer reads a map."""
        if self.exact or layer.unit is None:
            return self.constant(name, layer.real_bias, np.float32)
        return self._dequantized(layer.bias, layer.unit, name)

    def _dequantized(self, held: Array, scale: Array, name: str) -> str:
        inputs = [
            self.constant(f"{name}.q", held, held.dtype),
            self.constant(f"{name}.scale", scale, np.float32),
            self.constant(f"{name}.zero_point", np.zeros(len(scale)), held.dtype),
        ]
        return self.add("DequantizeLinear", inputs, name, axis=0)

    def convolution(
        self, x: str, layer: Layer, stride: tuple[int, int], pads: Pads, groups: int, name: str
    ) -> str:
        inputs = [x, self.weights(layer, f"{name}.weight"), self.bias(layer, f"{name}.bias")]
        (top, bottom), (left, right) = pads
        return self.add(
            "Conv", inputs, name, strides=list(stride), pads=[top, left, bottom, right],
            group=groups,
        )  # fmt: skip

    def linear(self, x: str, layer: Layer, name: str) -> str:
        return self.convolution(x, layer.as_convolution(), (1, 1), ((0, 0), (0, 0)), 1, name)

    def classified(self, x: str, layer: Layer, name: str) -> str:
        flat = self.add("Flatten", [x], f"{name}.flat")
        if self.flat_bytes and (of := layer.reads):
            flat = self.again(flat, Map(of.scale, of.zero_point), f"{name}.input")
        inputs = [flat, self.weights(layer, f"{name}.weight"), self.bias(layer, f"{name}.bias")]
        return self.add("Gemm", inputs, "logits", transB=1)

    def sum(self, x: str, y: str, name: str) -> str:
        return self.add("Add", [x, y], name)

    def product(self, x: str, y: str, name: str) -> str:
        return self.add("Mul", [x, y], name)

    def mean(self, x: str, name: str) -> str:
        return self.add("GlobalAveragePool", [x], name)

    def relu(self, x: str, name: str) -> str:
        return self.add("Relu", [x], name)

    def hard_swish(self, x: str, name: str) -> str:
        return self.add("HardSwish", [x], name)

    def hard_sigmoid(self, x: str, name: str) -> str:
        return self.add("HardSigmoid", [x], name, alpha=1 / 6, beta=0.5)
