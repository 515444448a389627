#!/usr/bin/env bash
# ONNX Runtime forms a QLinearConv's multiplier in float32, (x_scale * w_scale) / y_scale. For some
# x_scale no float32 w_scale gives the multiplier that is wanted, and a sum that is an exact tie with
# it is rounded to the other side. Most expect that a multiplier can be split into scales at will.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnxruntime==1.32.0 onnx==1.23.2 numpy
cat > "$folder/tie.py" <<'PY'
import sys
from importlib.metadata import version

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

WANTED = np.float32(87 / 2**15)
X, W = np.uint8([128, 128]), np.int8([127, 1])  # the sum is 2^14, and 2^14 * WANTED = 43.5


def answer(x_scale, w_scale):
    """The byte of a 1x1 convolution of two channels."""
    constants = {
        "xs": np.float32(x_scale), "xz": np.uint8(0), "w": W.reshape(1, 2, 1, 1),
        "ws": np.float32(w_scale), "wz": np.int8(0), "ys": np.float32(1), "yz": np.uint8(0),
    }
    graph = helper.make_graph(
        [helper.make_node("QLinearConv", ["x", *constants], ["y"])],
        "tie",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [1, 2, 1, 1])],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return int(session.run(None, {"x": X.reshape(1, 2, 1, 1)})[0].item())


x_scale = np.float32(1.1486259698867798)
nearest = np.float32(np.float64(WANTED) / x_scale)
candidates = [np.nextafter(nearest, np.float32(0)), nearest, np.nextafter(nearest, np.float32(1))]
products = [x_scale * scale for scale in candidates]
whole, split = answer(1, WANTED), [answer(x_scale, scale) for scale in candidates]
print(f"onnxruntime {version('onnxruntime')}: the sum times the multiplier is 43.5")
print("expected: 44, the even one, however the multiplier is split into scales")
print(f"observed: x_scale 1: {whole}; x_scale {x_scale:.7f} and the three nearest w_scale: {split}")
print(f"products less the multiplier: {[float(p - WANTED) for p in products]}")
still = whole == 44 and not any(p == WANTED for p in products) and set(split) == {43, 44}
sys.exit(0 if still else "this is no longer so")
PY
"$folder/venv/bin/python" "$folder/tie.py"
