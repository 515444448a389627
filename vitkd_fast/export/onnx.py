"""ONNX, opset 21: Q/DQ around every layer, which ONNX Runtime and OpenVINO turn into int8 layers.

Where the engine rounds once, behind a hard-swish or a residual addition, a runtime rounds twice:
before it too, to bytes that cover what can be there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from .._extras import require
from .._files import replacing
from ..int8.graph import (
    Add,
    Array,
    Classifier,
    Conv,
    Depthwise,
    Graph,
    Node,
    Pool,
    Quantized,
    SqueezeExcite,
    padding_of,
)
from . import scales
from .scales import Map

OPSET = 21


def write(graph: Graph, path: Path, exact: bool = False) -> None:
    """Writes the file, entirely or not at all; `exact`: float32, without rounding."""
    require("export-onnx", "export: a .onnx file")
    import onnx

    model = _Writer(graph, exact).model()
    onnx.checker.check_model(model, full_check=True)
    with replacing(path) as beside:
        onnx.save(model, str(beside))


class _Writer:
    def __init__(self, graph: Graph, exact: bool) -> None:
        self.graph, self.exact = graph, exact
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.maps = scales.of_maps(graph)
        # of each node: the name of its real numbers, and rows and columns
        self.outputs: dict[int, tuple[str, int, int]] = {}

    def model(self) -> Any:
        import onnx
        from onnx import TensorProto, helper

        size, graph = self.graph.image_size, self.graph
        for index, node in enumerate(graph.nodes):
            self._node(index, node)
        last = graph.nodes[-1]
        assert isinstance(last, Classifier)
        images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", size, size, 3])
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", len(last.weight)])
        made = helper.make_graph(
            self.nodes, "vitkd_fast", [images], [logits], initializer=self.constants
        )
        model = helper.make_model(
            made,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=10,
            producer_name="vitkd_fast",
        )
        about = scales.preparation(graph)
        helper.set_model_props(model, {key: json.dumps(value) for key, value in about.items()})
        assert isinstance(model, onnx.ModelProto)
        return model

    def _add(self, op: str, inputs: list[str], name: str, **attributes: Any) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def _constant(self, name: str, value: Any, dtype: Any) -> str:
        from onnx import numpy_helper

        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def _rounded(self, x: str, name: str, of: Map) -> str:
        """Real numbers through the bytes of a map, and real again."""
        if self.exact:
            least, most = (
                self._constant(f"{name}.{key}", value, np.float32)
                for key, value in zip(("min", "max"), of.range, strict=True)
            )
            return self._add("Clip", [x, least, most], name)
        scale = self._constant(f"{name}.scale", of.scale, np.float32)
        zero = self._constant(f"{name}.zero_point", of.zero_point, np.uint8)
        bytes_ = self._add("QuantizeLinear", [x, scale, zero], f"{name}.bytes")
        if (of.lo, of.hi) != (0, 255):
            least = self._constant(f"{name}.lo", of.lo, np.uint8)
            most = self._constant(f"{name}.hi", of.hi, np.uint8)
            bytes_ = self._add("Clip", [bytes_, least, most], f"{name}.clipped")
        return self._add("DequantizeLinear", [bytes_, scale, zero], name)

    def _weights(self, name: str, q: Array, scale: Array) -> str:
        """Real weights [C_out, ...] of int8 or int32 ones, a scale for each output channel."""
        if self.exact:
            shape = (-1, *[1] * (q.ndim - 1))
            return self._constant(name, q * scale.astype(np.float64).reshape(shape), np.float32)
        held = self._constant(f"{name}.q", q, q.dtype)
        s = self._constant(f"{name}.scale", scale, np.float32)
        zero = self._constant(f"{name}.zero_point", np.zeros(len(scale)), q.dtype)
        return self._add("DequantizeLinear", [held, s, zero], name, axis=0)

    def _image(self, pads: list[tuple[int, int]]) -> tuple[str, list[tuple[int, int]], int]:
        """The image as [N, 3, H, W], what a convolution still has to pad, and the zero point.

        Its bytes are put around the image before: OpenVINO would run a convolution in float that
        pads with a zero point.
        """
        x = self._add("Transpose", ["images"], "planes", perm=[0, 3, 1, 2])
        bytes_ = self.graph.padding_bytes
        zero = bytes_[0] if len(set(bytes_)) == 1 else 0
        if any(map(any, pads)):
            (top, bottom), (left, right) = pads
            around = self._constant("pads", [0, 0, top, left, 0, 0, bottom, right], np.int64)
            x, pads = self._padded(x, around), [(0, 0), (0, 0)]
        one = self._constant("planes.scale", 1.0, np.float32)
        of = self._constant("planes.zero_point", zero, np.uint8)
        return self._add("DequantizeLinear", [x, one, of], "pixels"), pads, zero

    def _padded(self, x: str, around: str) -> str:
        """With one byte, or each channel with its own."""
        from onnx import helper

        bytes_ = self.graph.padding_bytes
        if len(set(bytes_)) == 1:
            byte = self._constant("planes.byte", bytes_[0], np.uint8)
            return self._add("Pad", [x, around, byte], "padded")
        channels = [f"planes.{i}" for i in range(3)]
        self.nodes.append(
            helper.make_node("Split", [x], channels, name="split", axis=1, num_outputs=3)
        )
        padded = [
            self._add(
                "Pad",
                [channel, around, self._constant(f"{channel}.byte", byte, np.uint8)],
                f"{channel}.padded",
            )
            for channel, byte in zip(channels, bytes_, strict=True)
        ]
        return self._add("Concat", padded, "padded", axis=1)

    def _node(self, index: int, node: Node) -> None:
        name = f"{index}.{node.name}"
        if isinstance(node, Conv | Depthwise | Classifier):
            return self._linear(index, node, name)
        x, rows, columns = self.outputs[node.inputs[0]]
        output = self.maps[index]
        assert output is not None
        if isinstance(node, Add):
            y = self._add("Add", [x, self.outputs[node.inputs[1]][0]], f"{name}.sum")
        elif isinstance(node, Pool):
            y = self._add("GlobalAveragePool", [x], f"{name}.mean")
            rows = columns = 1
        else:
            assert isinstance(node, SqueezeExcite)
            y = self._squeeze_excite(node, x, name)
        self.outputs[index] = self._rounded(y, name, output), rows, columns

    def _squeeze_excite(self, node: SqueezeExcite, x: str, name: str) -> str:
        y = self._add("GlobalAveragePool", [x], f"{name}.mean")
        for i, (q, s, b) in enumerate(((node.q1, node.s1, node.b1), (node.q2, node.s2, node.b2))):
            part = f"{name}.fc{i + 1}"
            weight = self._weights(f"{part}.weight", np.ascontiguousarray(q.T)[..., None, None], s)
            bias = self._constant(f"{part}.bias", b, np.float32)
            y = self._add("Conv", [y, weight, bias], part)
            if i == 0:
                y = self._add("HardSwish" if node.hidden_hardswish else "Relu", [y], f"{part}.act")
        gate = self._add("HardSigmoid", [y], f"{name}.hardsigmoid", alpha=1 / 6, beta=0.5)
        gate = self._rounded(gate, f"{name}.gate", Map(1 / 255, 0))
        return self._add("Mul", [x, gate], f"{name}.scaled")

    def _linear(self, index: int, node: Conv | Depthwise | Classifier, name: str) -> None:
        w = node.weight
        if isinstance(node, Conv):
            w = w.transpose(0, 3, 1, 2)
        elif isinstance(node, Depthwise):
            w = w.transpose(2, 0, 1)[:, None]
        source = node.inputs[0]
        x, *sizes = ("", *2 * (self.graph.image_size,)) if source < 0 else self.outputs[source]
        pads = kept = [(0, 0), (0, 0)]
        if isinstance(node, Conv | Depthwise):
            pads = kept = [
                padding_of(size, w.shape[2 + axis], node.stride[axis], node.padding, axis)
                for axis, size in enumerate(sizes)
            ]
        if source < 0:
            x, kept, zero = self._image(pads)
            of = Map(1.0, zero)
        else:
            found = self.maps[source]
            assert found is not None
            of = found
        output = self.maps[index]
        weight = scales.of_weights(node, of, output)
        inputs = [
            x,
            self._weights(f"{name}.weight", np.ascontiguousarray(w), weight),
            self._weights(
                f"{name}.bias",
                scales.unfolded(node, of.zero_point),
                (weight * np.float32(of.scale)),
            ),
        ]
        if isinstance(node, Classifier):
            flat = self._add("Flatten", [x], f"{name}.flat")
            # the same bytes again: ONNX Runtime looks for them right before a product
            inputs[0] = flat if self.exact else self._rounded(flat, f"{name}.input", of)
            self._add("Gemm", inputs, "logits", transB=1)
            return
        (top, bottom), (left, right) = kept
        y = self._add(
            "Conv", inputs, f"{name}.conv", strides=list(node.stride),
            pads=[top, left, bottom, right], group=len(w) if isinstance(node, Depthwise) else 1,
        )  # fmt: skip
        rows, columns = (
            (size + sum(pad) - kernel) // stride + 1
            for size, pad, kernel, stride in zip(sizes, pads, w.shape[2:], node.stride, strict=True)
        )
        assert isinstance(node, Quantized) and output is not None
        if node.hardswish_scale is not None:
            if not self.exact:
                y = self._rounded(y, f"{name}.linear", scales.before_activation(output))
            y = self._add("HardSwish", [y], f"{name}.hardswish")
        elif isinstance(node, Conv) and node.residual_multiplier is not None:
            other = self.maps[node.inputs[1]]
            assert other is not None
            if not self.exact:
                y = self._rounded(y, f"{name}.linear", scales.before_residual(output, other))
            y = self._add("Add", [y, self.outputs[node.inputs[1]][0]], f"{name}.sum")
        self.outputs[index] = self._rounded(y, name, output), rows, columns
