"""ONNX models for runtimes that are not here: what they ask of a file, and its answers on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from support.export_tools import HALF, Added, Gated, in_onnxruntime, plain, smooth
from support.int8_models import MEAN, STD, sqnr
from vitkd_fast import export, int8
from vitkd_fast.export.onnx_profiles import bounds
from vitkd_fast.export.walk import Layer
from vitkd_fast.int8.graph import Conv, Graph

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.usefixtures("one_thread")

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"


def quantized(model: nn.Module, mean: Any = HALF, std: Any = HALF) -> Graph:
    return int8.quantize(model, smooth(16, 32), mean=mean, std=std, portable=True).graph


def gated() -> nn.Module:
    torch.manual_seed(3)
    return Gated().eval()


class File:
    """An ONNX file, its constants, and which node makes and which nodes read a tensor."""

    def __init__(self, path: Path) -> None:
        self.graph = onnx.load(path).graph
        self.constants = {x.name: onnx.numpy_helper.to_array(x) for x in self.graph.initializer}
        self.makes = {name: node for node in self.graph.node for name in node.output}
        self.reads: dict[str, list[Any]] = {}
        for node in self.graph.node:
            for name in node.input:
                self.reads.setdefault(name, []).append(node)

    def of(self, *ops: str) -> list[Any]:
        return [node for node in self.graph.node if node.op_type in ops]

    def source(self, node: Any, index: int) -> Any:
        return self.makes.get(node.input[index])


@pytest.mark.parametrize("make", [plain, lambda: Added().eval(), gated])
@pytest.mark.parametrize("mean", [HALF, MEAN])
def test_qoperator_answers_like_qdq(make: Any, mean: Any, tmp_path: Path) -> None:
    graph, images = quantized(make(), mean), smooth(32, 32)
    answers = {}
    for profile in ("qdq", "qoperator"):
        path = tmp_path / f"{profile}.onnx"
        export.write(graph, path, profile=profile)
        answers[profile], _ = in_onnxruntime(path, images)
    most = np.abs(answers["qdq"]).max()
    np.testing.assert_allclose(answers["qoperator"], answers["qdq"], rtol=0, atol=1e-6 * most)
    file = File(tmp_path / "qoperator.onnx")
    assert len(file.of("QLinearConv")) == sum(x.op in ("conv", "depthwise") for x in graph.nodes)
    assert len(file.of("QLinearAdd")) == sum(x.op == "add" for x in graph.nodes)
    assert len(file.of("QGemm")) == len(file.of("QLinearGlobalAveragePool")) == 1
    if make is not gated:  # no float32 at all
        assert not file.of(QUANTIZE, DEQUANTIZE, "Conv", "Gemm")
    # nothing is left of what was fused
    assert set(file.constants) <= set(file.reads)


@pytest.mark.parametrize("make", [plain, gated])
@pytest.mark.parametrize(("mean", "std"), [(HALF, HALF), (MEAN, STD)])
def test_tensorrt_finds_no_zero_point(make: Any, mean: Any, std: Any, tmp_path: Path) -> None:
    """It takes int8 alone, and zero points that are 0; it wants biases in float32."""
    graph, images = quantized(make(), mean, std), smooth(32, 32)
    export.write(graph, tmp_path / "a.onnx", profile="tensorrt")
    file = File(tmp_path / "a.onnx")
    pairs = file.of(QUANTIZE, DEQUANTIZE)
    assert pairs and all(file.constants[node.input[2]].dtype == np.int8 for node in pairs)
    assert not any(file.constants[node.input[2]].any() for node in pairs)
    convolutions = file.of("Conv", "Gemm")
    assert all(file.constants[node.input[2]].dtype == np.float32 for node in convolutions)
    # weights are the engine's: they were symmetric
    for index, layer in enumerate(graph.nodes):
        if isinstance(layer, Conv):
            held = file.constants[f"{index}.{layer.name}.conv.weight.q"]
            np.testing.assert_array_equal(held, layer.weight.transpose(0, 3, 1, 2))
    answers, _ = in_onnxruntime(tmp_path / "a.onnx", images)
    assert sqnr(int8.load(graph)(images), answers) > 20


def test_tensorrts_image_has_every_level(tmp_path: Path) -> None:
    """The first map is the image's bytes less 128."""
    graph = quantized(plain(), MEAN, STD)
    export.write(graph, tmp_path / "a.onnx", profile="tensorrt")
    model = onnx.load(tmp_path / "a.onnx")
    [first] = [x for x in model.graph.node if x.name == "pixels.bytes"]
    del model.graph.output[:]
    model.graph.output.append(
        onnx.helper.make_tensor_value_info(first.output[0], onnx.TensorProto.INT8, None)
    )
    onnx.save(model, tmp_path / "b.onnx")
    images = np.arange(3072, dtype=np.uint32).astype(np.uint8).reshape(1, 32, 32, 3)
    found, _ = in_onnxruntime(tmp_path / "b.onnx", images)
    bytes_ = images.transpose(0, 3, 1, 2).astype(int) - 128
    inside = found[:, :, 1:33, 1:33]  # padded by one, with each channel's own byte
    np.testing.assert_array_equal(inside, bytes_)
    np.testing.assert_array_equal(found[0, :, 0, 0], np.array(graph.padding_bytes) - 128)


@pytest.mark.parametrize("make", [plain, lambda: Added().eval(), gated])
@pytest.mark.parametrize(("mean", "std"), [(HALF, HALF), (MEAN, STD)])
def test_qnn_finds_pairs_around_every_operator(
    make: Any, mean: Any, std: Any, tmp_path: Path
) -> None:
    """As ONNX Runtime's QNN provider asks: what has none is of float32, on another device."""
    graph, images = quantized(make(), mean, std), smooth(32, 32)
    export.write(graph, tmp_path / "a.onnx", profile="qnn")
    file = File(tmp_path / "a.onnx")
    [given], [made] = file.graph.input, file.graph.output
    assert [x.dim_value for x in given.type.tensor_type.shape.dim] == [1, 32, 32, 3]
    assert file.makes[made.name].op_type == DEQUANTIZE
    in_float = []
    for node in file.graph.node:
        if node.op_type in (QUANTIZE, DEQUANTIZE):
            continue
        sources = [file.source(node, i) for i in range(len(node.input))]
        if all(x is not None and x.op_type == DEQUANTIZE for x in sources) and all(
            x.op_type == QUANTIZE for x in file.reads[node.output[0]]
        ):
            continue
        in_float.append(node.op_type)
    # an image whose channels are padded with different bytes
    assert in_float == ([] if mean is HALF else ["Transpose", "Sub", "Pad", "Add"])
    for node in file.of("Conv"):
        types = [file.constants[file.source(node, i).input[2]].dtype for i in range(3)]
        assert types[0] in (np.uint8, np.uint16) and types[1:] == [np.int8, np.int32]
        # both maps have bytes, or words
        [after] = file.reads[node.output[0]]
        assert file.constants[after.input[2]].dtype == types[0]
        scale = [file.constants[file.source(node, i).input[1]] for i in range(3)]
        np.testing.assert_allclose(scale[2], scale[0] * scale[1], rtol=1e-6)
    answers, _ = in_onnxruntime(tmp_path / "a.onnx", images)
    export.write(graph, tmp_path / "b.onnx")
    # as near as without the profile, but for the words
    without, _ = in_onnxruntime(tmp_path / "b.onnx", images)
    ours = int8.load(graph)(images)
    assert sqnr(ours, answers) > 25 and sqnr(without, answers) > 40 - 12 * (make is gated)


def test_no_product_leaves_its_bounds() -> None:
    rng = np.random.default_rng(0)
    weight = rng.integers(-127, 128, (5, 9)).astype(np.int8)
    scale, bias = rng.uniform(0.01, 0.1, 5).astype(np.float32), rng.normal(size=5)
    layer = Layer(weight, scale, bias.astype(np.float32))
    least, most = bounds(layer, (-0.5, 2.0))
    corners = np.where(layer.real_weight > 0, 2.0, -0.5)
    reached = (layer.real_weight * corners).sum(1) + layer.bias
    np.testing.assert_allclose(reached.max(), most, rtol=1e-6)
    x = rng.uniform(-0.5, 2.0, (1000, 9))
    products = x @ layer.real_weight.T + layer.bias
    assert least < products.min() and products.max() < most
