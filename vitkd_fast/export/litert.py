"""LiteRT (TensorFlow Lite): int8 as its quantisation specification has it, for XNNPACK.

Bytes are the engine's less 128, with zero points likewise; weights are symmetric, a scale for each
output channel; biases are int32 at s_in s_w. Where the engine rounds once, behind a hard-swish or a
residual addition, LiteRT rounds before it too.
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
    SqueezeExcite,
    padding_of,
)
from . import scales, tflite_metadata
from .scales import Map

_VERSIONS = {  # the first of each operator that takes int8
    "CONV_2D": 3, "DEPTHWISE_CONV_2D": 3, "ADD": 2, "MUL": 2, "MEAN": 2, "PAD": 2, "DEQUANTIZE": 2,
    "MAXIMUM": 2, "MINIMUM": 2,
}  # fmt: skip
_RELU6 = 3  # ActivationFunctionType
_SAME, _VALID = 0, 1  # Padding


def write(graph: Graph, path: Path, exact: bool = False) -> None:
    """Writes the file, entirely or not at all; `exact`: float32, without rounding."""
    require("export-litert", "export: a .tflite file")
    model = tflite_metadata.with_labels(_Writer(graph, exact).model(), graph)
    with replacing(path) as beside:
        beside.write_bytes(model)


class _Writer:
    def __init__(self, graph: Graph, exact: bool) -> None:
        from ai_edge_litert import schema_py_generated as schema  # type: ignore[import-untyped]

        self.schema: Any = schema
        self.graph, self.exact = graph, exact
        self.maps = scales.of_maps(graph)
        self.buffers = [schema.BufferT()]  # the first is that of tensors without data
        self.tensors: list[Any] = []
        self.operators: list[Any] = []
        self.codes: list[str] = []
        # of each node: its tensor, and rows, columns, channels
        self.outputs: dict[int, tuple[int, tuple[int, int, int]]] = {}

    def model(self) -> bytes:
        import flatbuffers  # type: ignore[import-untyped]

        schema, graph, size = self.schema, self.graph, self.graph.image_size
        images = self._tensor("images", (1, size, size, 3), "UINT8", self._input(-1))
        self.images = images
        for index, node in enumerate(graph.nodes):
            self._node(index, node)
        subgraph = schema.SubGraphT(
            self.tensors, [images], [self.logits], self.operators, "vitkd_fast"
        )
        metadata = {
            tflite_metadata.NAME: tflite_metadata.metadata(graph, self._input(-1).zero_point),
            "vitkd_fast": json.dumps(scales.preparation(graph)).encode(),
        }
        made = schema.ModelT(
            version=3,
            operatorCodes=[self._code(name) for name in self.codes],
            subgraphs=[subgraph],
            description="vitkd_fast",
            metadata=[
                schema.MetadataT(name, self._buffer(np.frombuffer(data, np.uint8)))
                for name, data in metadata.items()
            ],
            buffers=self.buffers,
        )
        builder = flatbuffers.Builder(1 << 20)
        builder.Finish(made.Pack(builder), b"TFL3")
        return bytes(builder.Output())

    # parts of the file

    def _code(self, name: str) -> Any:
        number = getattr(self.schema.BuiltinOperator, name)
        return self.schema.OperatorCodeT(min(number, 127), None, _VERSIONS.get(name, 1), number)

    def _buffer(self, data: Array) -> int:
        self.buffers.append(
            self.schema.BufferT(np.ascontiguousarray(data).reshape(-1).view(np.uint8))
        )
        return len(self.buffers) - 1

    def _tensor(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: str,
        of: Map | None = None,
        data: Array | None = None,
        scale: Array | None = None,
        axis: int = 0,
    ) -> int:
        """A tensor; a map is of any batch, constants have data, and weights a scale per channel."""
        schema, quantization = self.schema, None
        if of is not None:
            zero = of.zero_point - (128 if dtype == "INT8" else 0)
            quantization = schema.QuantizationParametersT(
                scale=np.array([of.scale], np.float32), zeroPoint=np.array([zero], np.int64)
            )
        elif scale is not None:
            quantization = schema.QuantizationParametersT(
                scale=scale, zeroPoint=np.zeros(len(scale), np.int64), quantizedDimension=axis
            )
        self.tensors.append(
            schema.TensorT(
                shape=np.array(shape, np.int32),
                type=getattr(schema.TensorType, dtype),
                buffer=0 if data is None else self._buffer(data),
                name=name,
                quantization=quantization,
                shapeSignature=None if data is not None else np.array((-1, *shape[1:]), np.int32),
            )
        )
        return len(self.tensors) - 1

    def _constant(self, name: str, data: Any, dtype: Any) -> int:
        array = np.asarray(data, dtype)
        return self._tensor(name, array.shape, array.dtype.name.upper(), data=array)

    def _run(self, op: str, inputs: list[int], output: int | list[int], **options: Any) -> int:
        schema = self.schema
        if op not in self.codes:
            self.codes.append(op)
        kind = {
            "CONV_2D": "Conv2D", "DEPTHWISE_CONV_2D": "DepthwiseConv2D", "MEAN": "Reducer",
            "ADD": "Add", "MUL": "Mul", "FULLY_CONNECTED": "FullyConnected", "RESHAPE": "Reshape",
        }.get(op)  # fmt: skip
        made = getattr(schema, f"{kind}OptionsT")(**options) if kind else None
        number = getattr(schema.BuiltinOptions, f"{kind}Options") if kind else 0
        outputs = output if isinstance(output, list) else [output]
        self.operators.append(
            schema.OperatorT(
                self.codes.index(op), inputs, outputs, builtinOptionsType=number,
                builtinOptions=made,
            )
        )  # fmt: skip
        return outputs[0]

    # maps

    def _map(self, name: str, size: tuple[int, ...], of: Map) -> int:
        dtype = "FLOAT32" if self.exact else "INT8"
        return self._tensor(name, (1, *size), dtype, None if self.exact else of)

    def _real(self, x: int, name: str, size: tuple[int, ...]) -> int:
        """A map in float32."""
        if self.exact:
            return x
        return self._run("DEQUANTIZE", [x], self._float(name, size))

    def _float(self, name: str, size: tuple[int, ...]) -> int:
        return self._tensor(name, (1, *size), "FLOAT32")

    def _bytes(self, x: int, output: int) -> int:
        """A map in float32, rounded to its bytes."""
        return x if self.exact else self._run("QUANTIZE", [x], output)

    def _clamped(self, x: int, name: str, size: tuple[int, int, int], of: Map) -> int:
        """Cut to what the map's bytes may be, where they do not all occur; in floats always."""
        if not self.exact and (of.lo, of.hi) == (0, 255):
            return x
        for op, real, byte in (("MAXIMUM", of.range[0], of.lo), ("MINIMUM", of.range[1], of.hi)):
            if self.exact:
                bound = self._constant(f"{name}.{op}", [real], np.float32)
            else:
                data = np.array([byte - 128], np.int8)
                bound = self._tensor(f"{name}.{op}", (1,), "INT8", of, data)
            x = self._run(op, [x, bound], self._map(f"{name}.{op.lower()}", size, of))
        return x

    def _image(self, node: Conv | Depthwise, pads: list[tuple[int, int]]) -> tuple[int, Array, Any]:
        """The image as a map, the weights that read it, and its sums where there is only padding.

        Bytes that pad all channels alike are its zero point. Where they differ, three more channels
        hold them, with the negated weights, and zeros pad: a sum of differences from them.
        """
        size, bytes_, of = self.graph.image_size, self.graph.padding_bytes, self._input(-1)
        x = self._map("pixels", (size, size, 3), of)
        self._run("DEQUANTIZE" if self.exact else "QUANTIZE", [self.images], x)
        if len(set(bytes_)) == 1 or not any(map(any, pads)):
            return x, node.weight, 0
        if isinstance(node, Depthwise):
            raise ValueError(
                "export: mean: expected one number for all channels, as a depthwise convolution "
                f"reads the image, got {self.graph.mean}"
            )
        weight = np.concatenate([np.eye(3), np.zeros((3, 3))]).astype(np.int8)
        bias = np.array([0, 0, 0, *bytes_], np.int32)
        inputs = [
            x,
            self._weights("bytes.weight", weight[:, None, None], np.ones(6, np.float32), 0),
            self._bias("bytes.bias", bias, np.ones(6, np.float32)),
        ]
        x = self._map("bytes", (size, size, 6), of)
        self._run("CONV_2D", inputs, x, padding=_VALID, strideH=1, strideW=1)
        total = (node.weight.astype(np.int64) * bytes_).sum((1, 2, 3))
        return x, np.concatenate([node.weight, -node.weight], 3), total

    def _bias(self, name: str, bias: Array, unit: Array) -> int:
        """int32 in these units, or with `exact` float32."""
        if self.exact:
            return self._constant(name, bias * unit.astype(np.float64), np.float32)
        return self._tensor(name, bias.shape, "INT32", data=bias, scale=unit)

    def _input(self, source: int) -> Map:
        """The image's bytes, or a node's."""
        if source < 0:
            bytes_ = self.graph.padding_bytes
            return Map(1.0, bytes_[0] if len(set(bytes_)) == 1 else 0)
        of = self.maps[source]
        assert of is not None
        return of

    def _node(self, index: int, node: Node) -> None:
        name = f"{index}.{node.name}"
        if isinstance(node, Conv | Depthwise):
            return self._convolution(index, node, name)
        x, size = self.outputs[node.inputs[0]]
        of, output = self._input(node.inputs[0]), self.maps[index]
        if isinstance(node, Classifier):
            return self._classifier(node, x, of, name)
        assert output is not None
        if isinstance(node, Add):
            y = self._run(
                "ADD", [x, self.outputs[node.inputs[1]][0]], self._map(name, size, output)
            )
        elif isinstance(node, Pool):
            size = (1, 1, size[2])
            y = self._mean(x, name, self._map(name, size, output))
        else:
            assert isinstance(node, SqueezeExcite)
            y = self._squeeze_excite(node, x, size, self._map(name, size, output), name)
        self.outputs[index] = self._clamped(y, name, size, output), size

    def _mean(self, x: int, name: str, output: int) -> int:
        axes = self._constant(f"{name}.axes", [1, 2], np.int32)
        return self._run("MEAN", [x, axes], output, keepDims=True)

    def _weights(self, name: str, q: Array, scale: Array, axis: int) -> int:
        """Weights of int8, a scale for each channel along `axis`; with `exact` in float32."""
        if not self.exact:
            return self._tensor(name, q.shape, "INT8", data=q, scale=scale, axis=axis)
        shape = [1] * q.ndim
        shape[axis] = -1
        return self._constant(name, q * scale.astype(np.float64).reshape(shape), np.float32)

    def _linear(self, x: int, weight: Array, scale: Array, bias: Array, name: str) -> int:
        """float32 [N, out] of float32 [N, in]: weights int8 [out, in] in the file."""
        held = self._weights(f"{name}.weight", weight, scale, 0)
        if not self.exact:
            real = self._tensor(f"{name}.weight.real", weight.shape, "FLOAT32")
            self.tensors[real].shapeSignature = None
            held = self._run("DEQUANTIZE", [held], real)
        inputs = [x, held, self._constant(f"{name}.bias", bias, np.float32)]
        return self._run("FULLY_CONNECTED", inputs, self._tensor(name, (1, len(weight)), "FLOAT32"))

    def _flat(self, x: int, channels: int, name: str) -> int:
        shape = self._constant(f"{name}.shape", [-1, channels], np.int32)
        flat = self._tensor(name, (1, channels), "FLOAT32")
        return self._run("RESHAPE", [x, shape], flat, newShape=[-1, channels])

    def _classifier(self, node: Classifier, x: int, of: Map, name: str) -> None:
        scale, channels = scales.of_weights(node, of, None), node.weight.shape[1]
        bias = scales.unfolded(node, of.zero_point) * (scale.astype(np.float64) * of.scale)
        flat = self._flat(self._real(x, f"{name}.real", (1, 1, channels)), channels, f"{name}.flat")
        self.logits = self._linear(flat, node.weight, scale, bias, "logits")

    def _squeeze_excite(
        self, node: SqueezeExcite, x: int, size: tuple[int, int, int], output: int, name: str
    ) -> int:
        """The gate in float32, from a mean in float32; the product of bytes."""
        channels = size[2]
        mean = self._tensor(f"{name}.mean", (1, 1, 1, channels), "FLOAT32")
        y = self._mean(self._real(x, f"{name}.real", size), f"{name}.mean", mean)
        y = self._flat(y, channels, f"{name}.flat")
        y = self._linear(y, np.ascontiguousarray(node.q1.T), node.s1, node.b1, f"{name}.fc1")
        hidden = self._tensor(f"{name}.hidden", (1, node.q1.shape[1]), "FLOAT32")
        y = self._run("HARD_SWISH" if node.hidden_hardswish else "RELU", [y], hidden)
        y = self._linear(y, np.ascontiguousarray(node.q2.T), node.s2, node.b2, f"{name}.fc2")
        three = self._constant(f"{name}.three", [3], np.float32)
        sixth = self._constant(f"{name}.sixth", [1 / 6], np.float32)
        moved, gate = (
            self._tensor(f"{name}.{part}", (1, channels), "FLOAT32") for part in ("moved", "gate")
        )
        y = self._run("ADD", [y, three], moved, fusedActivationFunction=_RELU6)
        y = self._run("MUL", [y, sixth], gate)
        whole = self._tensor(f"{name}.gates", (1, 1, 1, channels), "FLOAT32")
        shape = self._constant(f"{name}.gates.shape", [-1, 1, 1, channels], np.int32)
        y = self._run("RESHAPE", [y, shape], whole, newShape=[-1, 1, 1, channels])
        y = self._bytes(y, self._map(f"{name}.gates.bytes", (1, 1, channels), Map(1 / 255, 0)))
        return self._run("MUL", [x, y], output)

    def _convolution(self, index: int, node: Conv | Depthwise, name: str) -> None:
        depthwise, source, size = isinstance(node, Depthwise), node.inputs[0], self.graph.image_size
        kernel = node.weight.shape[:2] if depthwise else node.weight.shape[1:3]
        x, (rows, columns, _) = (0, (size, size, 3)) if source < 0 else self.outputs[source]
        pads, same = (
            [
                padding_of(side, kernel[axis], node.stride[axis], padding, axis)
                for axis, side in enumerate((rows, columns))
            ]
            for padding in (node.padding, "same")
        )
        rows, columns = (
            (side + sum(pad) - taps) // stride + 1
            for side, pad, taps, stride in zip(
                (rows, columns), pads, kernel, node.stride, strict=True
            )
        )
        weight, more, of, output = node.weight, 0, self._input(source), self.maps[index]
        assert output is not None
        if source < 0:
            x, weight, more = self._image(node, pads)
        padding = _SAME if any(map(any, pads)) else _VALID
        if padding == _SAME and pads != same:
            before = self.tensors[x].shape
            shape = (before[1] + sum(pads[0]), before[2] + sum(pads[1]), before[3])
            around = self._constant(f"{name}.paddings", [(0, 0), *pads, (0, 0)], np.int32)
            x = self._run("PAD", [x, around], self._map(f"{name}.padded", shape, of))
            padding = _VALID
        scale = scales.of_weights(node, of, output)
        bias = (scales.unfolded(node, of.zero_point) + more).astype(np.int32)
        w = weight[None] if depthwise else weight
        inputs = [
            x,
            self._weights(f"{name}.weight", w, scale, 3 if depthwise else 0),
            self._bias(f"{name}.bias", bias, scale * np.float32(of.scale)),
        ]
        full, linear = (rows, columns, len(scale)), output
        residual = isinstance(node, Conv) and node.residual_multiplier is not None
        if node.hardswish_scale is not None:
            linear = scales.before_activation(output)
        elif residual:
            linear = scales.before_residual(output, self._input(node.inputs[1]))
        options = {"padding": padding, "strideH": node.stride[0], "strideW": node.stride[1]}
        if depthwise:
            options["depthMultiplier"] = 1
        y = self._map(name if linear is output else f"{name}.linear", full, linear)
        self._run("DEPTHWISE_CONV_2D" if depthwise else "CONV_2D", inputs, y, **options)
        if node.hardswish_scale is not None:
            # in float32: XNNPACK has none of bytes, and would leave each to slower kernels
            y = self._real(y, f"{name}.real", full)
            y = self._run("HARD_SWISH", [y], self._float(f"{name}.hardswish", full))
            y = self._bytes(y, self._map(name, full, output))
        elif residual:
            added = [y, self.outputs[node.inputs[1]][0]]
            y = self._run("ADD", added, self._map(name, full, output))
        self.outputs[index] = self._clamped(y, name, full, output), full
