#!/usr/bin/env bash
# ai-edge-quantizer's static recipe follows a map's range by a moving average that begins with the
# first image and gives each later one a twentieth: the same calibration images in another order give
# other scales, three times as large here. Most expect the range of all images.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet ai-edge-quantizer==0.10.0 ai-edge-litert==2.3.0 \
  flatbuffers==25.12.19 numpy
cat > "$folder/order.py" <<'PY'
import sys
from importlib.metadata import version

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as s
from ai_edge_litert.interpreter import Interpreter
from ai_edge_quantizer import quantizer, recipe

CHANNELS = 16


def model():
    """A 1x1 convolution of an 8x8 map, in float32."""
    rng = np.random.default_rng(0)
    arrays = [
        rng.normal(0, 0.1, (CHANNELS, 1, 1, CHANNELS)).astype(np.float32),
        np.zeros(CHANNELS, np.float32),
    ]
    shapes = {
        "images": (1, 8, 8, CHANNELS),
        "weight": arrays[0].shape,
        "bias": arrays[1].shape,
        "made": (1, 8, 8, CHANNELS),
    }
    places = {"weight": 1, "bias": 2}
    kind = s.TensorType.FLOAT32
    tensors = [
        s.TensorT(shape=np.int32(shape), type=kind, buffer=places.get(name, 0), name=name)
        for name, shape in shapes.items()
    ]
    buffers = [s.BufferT(), *(s.BufferT(a.reshape(-1).view(np.uint8)) for a in arrays)]
    options = s.Conv2DOptionsT(padding=1, strideH=1, strideW=1)
    conv = s.OperatorT(
        0, [0, 1, 2], [3], builtinOptionsType=s.BuiltinOptions.Conv2DOptions, builtinOptions=options
    )
    number = s.BuiltinOperator.CONV_2D
    signature = s.SignatureDefT(
        [s.TensorMapT("images", 0)], [s.TensorMapT("made", 3)], "serving_default", 0
    )
    made = s.ModelT(
        version=3,
        operatorCodes=[s.OperatorCodeT(number, None, 1, number)],
        subgraphs=[s.SubGraphT(tensors, [0], [3], [conv])],
        buffers=buffers,
        signatureDefs=[signature],
    )
    builder = flatbuffers.Builder(1 << 14)
    builder.Finish(made.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def scale(images):
    """Of the input map."""
    tool = quantizer.Quantizer(model(), recipe.static_wi8_ai8())
    found = tool.calibrate({"serving_default": [{"images": image} for image in images]})
    made = bytes(tool.quantize(found, enable_progress_report=False).quantized_model)
    interpreter = Interpreter(model_content=made)
    return float(interpreter.get_input_details()[0]["quantization"][0])


rng = np.random.default_rng(1)
images = [np.clip(rng.normal(0, 1, (1, 8, 8, CHANNELS)), -3, 3).astype(np.float32) for _ in range(20)]
images[0] *= 10  # an outlier
first, last = scale(images), scale(images[::-1])
whole = float(max(np.abs(image).max() for image in images)) * 2 / 255
print("ai-edge-quantizer", version("ai-edge-quantizer"))
print(f"expected: one scale in any order, {whole:.3f} for the range of all images")
print(f"observed: {first:.3f} with the outlier first, {last:.3f} with it last")
sys.exit(0 if first > 2 * last else 1)
PY
"$folder/venv/bin/python" "$folder/order.py"
