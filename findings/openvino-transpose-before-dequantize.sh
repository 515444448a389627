#!/usr/bin/env bash
# A first convolution of uint8 images [N, H, W, 3] in an ONNX Q/DQ model: where the Transpose stands decides whether
# OpenVINO's CPU plugin runs it in int8.
# Guess: Transpose and DequantizeLinear of one scale commute, and the compiler sees that.
# Seen: dequantized first, the transpose becomes a layout and the convolution reads bytes; transposed first, bytes are
# transposed, turned into float32 by a layer of its own, and the convolution runs in float32. Logits differ.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet openvino==2026.4.1 onnx==1.22.0 numpy
cat > "$folder/order.py" <<'PY'
import sys
import time

import numpy as np
import onnx
import openvino as ov
from onnx import TensorProto, helper, numpy_helper

folder = sys.argv[1]
draw = np.random.default_rng(0)
IMAGES = draw.integers(0, 256, (1, 224, 224, 3)).astype(np.uint8)
CONSTANTS = {
    "s": np.float32(1 / 58),
    "z": np.uint8(128),
    "w": draw.integers(-127, 128, (32, 3, 3, 3)).astype(np.int8),
    "w2": draw.integers(-127, 128, (32, 32, 1, 1)).astype(np.int8),
    "ws": np.full(32, 0.01, np.float32),
    "wz": np.zeros(32, np.int8),
    "qs": np.float32(0.05),
    "qz": np.uint8(0),
}


def dequantize(source, scale, zero, out, **options):
    return helper.make_node("DequantizeLinear", [source, scale, zero], [out], **options)


def compiled(order):
    def transpose(source, out):
        return helper.make_node("Transpose", [source], [out], perm=[0, 3, 1, 2])

    if order == "transpose, dequantize":
        nodes = [transpose("x", "t"), dequantize("t", "s", "z", "image")]
    else:
        nodes = [dequantize("x", "s", "z", "t"), transpose("t", "image")]
    nodes += [
        dequantize("w", "ws", "wz", "wf", axis=0),
        helper.make_node("Conv", ["image", "wf"], ["c"], pads=[1] * 4, strides=[2, 2]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("QuantizeLinear", ["r", "qs", "qz"], ["q"]),
        dequantize("q", "qs", "qz", "qf"),
        dequantize("w2", "ws", "wz", "w2f", axis=0),
        helper.make_node("Conv", ["qf", "w2f"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, list(IMAGES.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 32, 112, 112])],
        [numpy_helper.from_array(value, name) for name, value in CONSTANTS.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, f"{folder}/m.onnx")
    options = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    return ov.Core().compile_model(f"{folder}/m.onnx", "CPU", options)


print("openvino", ov.__version__)
orders = ("transpose, dequantize", "dequantize, transpose")
requests, runs = {}, {}
for order in orders:
    model = compiled(order)
    ops = [x.get_rt_info() for x in model.get_runtime_model().get_ordered_ops()]
    runs[order] = [
        f"{x['layerType'].astype(str)} {x['runtimePrecision'].astype(str)}"
        for x in ops
        if x["layerType"].astype(str) in ("Convolution", "Transpose", "Subgraph", "Eltwise")
    ]
    requests[order] = model.create_infer_request()
outputs = {order: request.infer({0: IMAGES})[0].copy() for order, request in requests.items()}
spent = {order: [] for order in orders}
for _ in range(50):
    for order, request in requests.items():
        begun = time.process_time()
        request.infer({0: IMAGES})
        spent[order].append(time.process_time() - begun)
for order in orders:
    print(f"{order}: {', '.join(runs[order])}; {1e3 * min(spent[order]):.2f} ms of CPU time")
off = np.abs(outputs[orders[0]] - outputs[orders[1]]).max()
print("expected: the same layers for both")
print(f"observed: a float convolution where the Transpose is first; outputs differ by {off:.3f}")
first = [next(x for x in runs[order] if x.startswith("Convolution")) for order in orders]
as_seen = first == ["Convolution f32", "Convolution u8"] and "Transpose u8" in runs[orders[0]]
sys.exit(0 if as_seen and off > 0 else 1)
PY
"$folder/venv/bin/python" "$folder/order.py" "$folder"
