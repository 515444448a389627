"""Tools of those engines beside what `int8_peers.PEERS` has: other quantisers, or closer ones.

As there: each by its documents' settings, on the same pixels, without labels.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

import int8_peers
from int8_peers import Engine


def litert_float(network: int8_peers.Network) -> Path | None:
    """The LiteRT file with float32 weights and maps: what its weights stand for."""
    source = int8_peers.litert_int8(network)
    if source is None:
        return None

    def make(path: Path) -> None:
        import flatbuffers
        from ai_edge_litert import schema_py_generated as schema

        model = schema.ModelT.InitFromPackedBuf(source.read_bytes(), 0)
        graph = model.subgraphs[0]
        graph.operators = graph.operators[1:]  # quantize, ...
        graph.inputs = graph.operators[0].inputs[:1]
        ends = {int(i) for op in graph.operators for ends in (op.inputs, op.outputs) for i in ends}
        place = {old: new for new, old in enumerate(sorted(ends))}  # no tensor that nothing makes
        graph.tensors = [graph.tensors[i] for i in place]
        for holder in (graph, *graph.operators):
            for end in ("inputs", "outputs"):
                setattr(holder, end, [place[int(i)] for i in getattr(holder, end)])
        types = {schema.TensorType.INT8: np.int8, schema.TensorType.INT32: np.int32}
        for tensor in graph.tensors:
            own = tensor.quantization
            if own is None or own.scale is None:  # shapes and axes
                continue
            buffer = model.buffers[tensor.buffer]
            if buffer.data is not None:
                q = buffer.data.view(types[tensor.type]).reshape(tensor.shape).astype(np.float64)
                along = [1] * q.ndim
                along[own.quantizedDimension] = -1
                value = q * np.asarray(own.scale, np.float64).reshape(along)
                buffer.data = np.frombuffer(value.astype(np.float32).tobytes(), np.uint8)
            tensor.type, tensor.quantization = schema.TensorType.FLOAT32, None
        names = []
        for name, (index,) in (("images", graph.inputs), ("logits", graph.outputs)):
            entry = schema.TensorMapT()
            entry.name, entry.tensorIndex = name, int(index)
            names.append([entry])
        signature = schema.SignatureDefT()
        signature.signatureKey, signature.subgraphIndex = "serving_default", 0
        signature.inputs, signature.outputs = names
        model.signatureDefs = [signature]
        builder = flatbuffers.Builder()
        builder.Finish(model.Pack(builder), b"TFL3")
        path.write_bytes(builder.Output())

    return int8_peers.cached(network, "ai-edge-litert", "-float.tflite", make)


def ai_edge_int8(network: int8_peers.Network) -> Path | None:
    """ai-edge-quantizer's recipe for static int8."""
    source = litert_float(network)
    if source is None:
        return None

    def make(path: Path) -> None:
        floats = network.pixels.floats(network.images).transpose(0, 2, 3, 1)
        int8_peers.quantize_ai_edge(source, floats, path)

    return int8_peers.cached(network, "ai-edge-litert ai-edge-quantizer", "-ai-edge.tflite", make)


_NNCF = ("openvino", "nncf", "onnx", "onnxscript")
TOOLS = {
    "openvino int8, accuracy control": Engine(
        _NNCF,
        functools.partial(int8_peers.openvino_int8, controlled=True),
        functools.partial(int8_peers.open_openvino, precision="f32"),
    ),
    "litert int8, ai-edge-quantizer": Engine(
        ("ai_edge_litert", "ai_edge_quantizer"), ai_edge_int8, int8_peers.open_litert
    ),
}
