#!/usr/bin/env bash
# XNNPACK inside LiteRT takes no int8 HARD_SWISH: each one ends its part of the graph, and runs in
# another kernel. In float32 between DEQUANTIZE and QUANTIZE all is one part, and many times faster.
# Most expect an operator that is int8 from end to end to be the faster one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet ai-edge-litert==2.3.0 flatbuffers==25.12.19 numpy
cat > "$folder/parts.py" <<'PY'
import statistics
import sys
import time
from importlib.metadata import version

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as s
from ai_edge_litert.interpreter import Interpreter

SIDE, CHANNELS, LAYERS = 56, 64, 6
rng = np.random.default_rng(0)


def model(in_float):
    """Six 1x1 convolutions, a hard-swish behind each."""
    buffers, tensors, operators = [s.BufferT()], [], []
    codes = ["CONV_2D", "HARD_SWISH", "DEQUANTIZE", "QUANTIZE"]

    def tensor(shape, kind, scale=None, zero=0, data=None):
        if data is not None:
            buffers.append(s.BufferT(np.ascontiguousarray(data).reshape(-1).view(np.uint8)))
        quantization = None
        if scale is not None:
            scales = np.broadcast_to(np.float32(scale), CHANNELS if data is not None else 1)
            quantization = s.QuantizationParametersT(
                scale=np.array(scales), zeroPoint=np.full(len(scales), zero, np.int64)
            )
        tensors.append(
            s.TensorT(
                shape=np.int32(shape),
                type=getattr(s.TensorType, kind),
                buffer=0 if data is None else len(buffers) - 1,
                name=str(len(tensors)),
                quantization=quantization,
            )
        )
        return len(tensors) - 1

    def run(name, inputs, output, options=None):
        kind = 0 if options is None else s.BuiltinOptions.Conv2DOptions
        operators.append(
            s.OperatorT(
                codes.index(name), inputs, [output], builtinOptionsType=kind, builtinOptions=options
            )
        )
        return output

    shape = (1, SIDE, SIDE, CHANNELS)
    first = x = tensor(shape, "INT8", 0.05, -128)
    for _ in range(LAYERS):
        weight = rng.integers(-127, 128, (CHANNELS, 1, 1, CHANNELS), dtype=np.int8)
        given = [
            x,
            tensor(weight.shape, "INT8", 0.002, data=weight),
            tensor((CHANNELS,), "INT32", 0.0001, data=np.zeros(CHANNELS, np.int32)),
        ]
        valid = s.Conv2DOptionsT(padding=1, strideH=1, strideW=1)
        x = run("CONV_2D", given, tensor(shape, "INT8", 0.05, 0), valid)
        if in_float:
            x = run("DEQUANTIZE", [x], tensor(shape, "FLOAT32"))
            x = run("HARD_SWISH", [x], tensor(shape, "FLOAT32"))
            x = run("QUANTIZE", [x], tensor(shape, "INT8", 0.05, -128))
        else:
            x = run("HARD_SWISH", [x], tensor(shape, "INT8", 0.05, -128))
    numbers = [getattr(s.BuiltinOperator, name) for name in codes]
    versions = {"CONV_2D": 3, "DEQUANTIZE": 2}
    made = s.ModelT(
        version=3,
        operatorCodes=[
            s.OperatorCodeT(n, None, versions.get(c, 1), n)
            for c, n in zip(codes, numbers, strict=True)
        ],
        subgraphs=[s.SubGraphT(tensors, [first], [x], operators)],
        buffers=buffers,
    )
    builder = flatbuffers.Builder(1 << 16)
    builder.Finish(made.Pack(builder), b"TFL3")
    return bytes(builder.Output())


calls, parts = {}, {}
for name, in_float in (("int8", False), ("float32", True)):
    rng = np.random.default_rng(0)
    interpreter = Interpreter(model_content=model(in_float), num_threads=1)
    interpreter.allocate_tensors()
    parts[name] = sum(x["op_name"] == "DELEGATE" for x in interpreter._get_ops_details())
    calls[name] = interpreter
image = rng.integers(-128, 128, (1, SIDE, SIDE, CHANNELS), dtype=np.int8)
times, bytes_ = {name: [] for name in calls}, {}
for _ in range(30):
    for name, interpreter in calls.items():
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], image)
        start = time.thread_time()
        interpreter.invoke()
        times[name].append(time.thread_time() - start)
        bytes_[name] = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
ratio = statistics.median(times["int8"]) / statistics.median(times["float32"])
off = np.abs(bytes_["int8"].astype(int) - bytes_["float32"]).max()
print("ai-edge-litert", version("ai-edge-litert"))
print("expected: one part of XNNPACK for either hard-swish, int8 the faster")
print(f"observed: {parts['int8']} parts with int8, {parts['float32']} with float32, whose time the")
print(f"int8 one takes {ratio:.1f} times; bytes differ by {off} at most")
sys.exit(0 if parts["int8"] > 1 and parts["float32"] == 1 and ratio > 1.2 else 1)
PY
"$folder/venv/bin/python" "$folder/parts.py"
