"""Where runtimes round otherwise than the engine: the smallest case of each, by version.

docs/quickstart/compare.md states each. A test fails when its runtime changes, and is skipped where
another version is installed: then it is to be run once with that version, and the docs renewed.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.int8_builder import FIELDS, Builder
from vitkd_fast import export, int8
from vitkd_fast.export.compare_runtimes import RUNTIMES
from vitkd_fast.int8.graph import Add, Array, Classifier, Graph, Pool

onnx = pytest.importorskip("onnx")
pytestmark = pytest.mark.usefixtures("one_thread")

VERSIONS = {"onnxruntime": "1.32.", "openvino": "2026.4.", "ai-edge-litert": "2.3."}


def only(package: str) -> pytest.MarkDecorator:
    """Skips where another version than that of `VERSIONS`, or none, is installed."""
    try:
        found = version(package)
    except PackageNotFoundError:
        found = "none"
    reason = f"a fact of {package} {VERSIONS[package]}*, and {found} is installed"
    return pytest.mark.skipif(not found.startswith(VERSIONS[package]), reason=reason)


ORT, OPENVINO, LITERT = map(only, VERSIONS)


def in_onnxruntime(path: Path, images: Array, fused: bool = True) -> Array:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    if not fused:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images})[0]


def in_openvino(path: Path, images: Array) -> Array:
    model = RUNTIMES["openvino"].open(path, 1)
    return np.concatenate([model.run(image[None]) for image in images])


def in_litert(path: Path, images: Array, kernels: str = "AUTO") -> Array:
    """By XNNPACK, or other kernels, of LiteRT's names for them."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    resolver = getattr(OpResolverType, kernels)
    interpreter = Interpreter(str(path), experimental_op_resolver_type=resolver)
    interpreter.resize_tensor_input(0, images.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], images)
    interpreter.invoke()
    return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])


BUILT_IN, REFERENCE = "BUILTIN_WITHOUT_DEFAULT_DELEGATES", "BUILTIN_REF"


def levels(*columns: Array) -> Array:
    """Images of one pixel, whose first channels are given."""
    images = np.zeros((len(columns[0]), 1, 1, 3), np.uint8)
    for channel, values in enumerate(columns):
        images[:, 0, 0, channel] = values
    return images


def channels(builder: Builder, count: int, zero_point: int) -> None:
    """The image's first channels as they are."""
    weight = np.eye(count, 3).reshape(count, 1, 1, 3)
    of = {"multiplier": 1.0, "zero_point": zero_point, "bias": -zero_point}
    builder.conv(count, inputs=(-1,), weight=weight, **of)


def graph(builder: Builder, size: int = 1) -> Graph:
    """Whose logits are the last map's bytes."""
    count = builder.channels[-1]
    builder.conv(count, cls=Classifier, weight=np.eye(count), bias=0, multiplier=1.0)
    return Graph(nodes=tuple(builder.nodes), image_size=size, **FIELDS)


@pytest.fixture
def bytes_of(tmp_path: Path) -> Callable[..., Array]:
    """bytes_of(run, graph, images): those of the last map."""

    def found(run: Any, of: Graph, images: Array, **options: Any) -> Array:
        suffix = ".tflite" if run is in_litert else ".onnx"
        export.write(of, path := tmp_path / f"a{suffix}")
        return np.rint(run(path, images, **options)).astype(int)

    return found


def engines(of: Graph, images: Array) -> Array:
    """The engine's bytes of the last map."""
    return np.rint(int8.load(of)(images)).astype(int)


HALVES = np.arange(256)


def halved() -> Graph:
    """A convolution whose result is x / 2: every odd level is a tie."""
    builder = Builder()
    weight = np.eye(1, 3).reshape(1, 1, 1, 3)
    builder.conv(1, inputs=(-1,), weight=weight, bias=0, multiplier=0.5, zero_point=0)
    return graph(builder)


@pytest.mark.parametrize(
    "run", [pytest.param(in_onnxruntime, marks=ORT), pytest.param(in_openvino, marks=OPENVINO),
            pytest.param(in_litert, marks=LITERT)],
)  # fmt: skip
def test_a_convolutions_ties_are_rounded_to_even(run: Any, bytes_of: Any) -> None:
    even = np.rint(HALVES / 2)
    np.testing.assert_array_equal(engines(halved(), levels(HALVES))[:, 0], even)
    np.testing.assert_array_equal(bytes_of(run, halved(), levels(HALVES))[:, 0], even)


@LITERT
@pytest.mark.parametrize("kernels", [BUILT_IN, REFERENCE])
def test_litert_without_xnnpack_rounds_a_convolutions_ties_up(kernels: str, bytes_of: Any) -> None:
    found = bytes_of(in_litert, halved(), levels(HALVES), kernels=kernels)
    np.testing.assert_array_equal(found[:, 0], np.floor(HALVES / 2 + 0.5))


def added(first: float, second: float) -> Graph:
    """first (a - 128) + second (b - 128) + 128, of the image's first two channels."""
    builder = Builder()
    channels(builder, 2, 128)
    for channel in range(2):
        weight = np.eye(2)[channel].reshape(1, 1, 1, 2)
        builder.conv(1, inputs=(0,), weight=weight, bias=-128, multiplier=1.0, zero_point=128)
    multipliers = float(np.float32(first)), float(np.float32(second))
    builder.add(Add, (1, 2), 1, multipliers=multipliers, zero_point=128)
    return graph(builder)


A, B = (x.ravel() for x in np.meshgrid(HALVES, HALVES))
SUM = (A - 128.0) + (B - 128.0)


@pytest.mark.parametrize(
    ("run", "options", "rule"),
    [
        pytest.param(in_onnxruntime, {}, np.rint, marks=ORT, id="onnxruntime"),
        pytest.param(in_openvino, {}, np.rint, marks=OPENVINO, id="openvino"),
        pytest.param(in_litert, {}, lambda x: np.floor(x + 0.5), marks=LITERT, id="xnnpack"),
        pytest.param(
            in_litert, {"kernels": BUILT_IN}, lambda x: np.trunc(x + np.copysign(0.5, x)),
            marks=LITERT, id="litert built-in",
        ),
    ],
)  # fmt: skip
def test_ties_of_an_addition(run: Any, options: Any, rule: Any, bytes_of: Any) -> None:
    """Three rules: to even (the engine's), up, and away from zero."""
    chosen = slice(None) if run is not in_openvino else slice(None, None, 61)
    images, of = levels(A[chosen], B[chosen]), added(0.5, 0.5)
    np.testing.assert_array_equal(engines(of, images)[:, 0], np.rint(SUM[chosen] / 2) + 128)
    found = bytes_of(run, of, images, **options)[:, 0]
    np.testing.assert_array_equal(found, np.clip(rule(SUM[chosen] / 2) + 128, 0, 255))


@ORT
def test_onnxruntimes_fused_addition_is_another_one(bytes_of: Any) -> None:
    """Where multipliers are tenths, tenths of the pairs are near a tie; 0.37 and 0.61 have few."""
    images = levels(A, B)
    for multipliers, least, most in (((0.3, 0.4), 0.01, 0.04), ((0.37, 0.61), 0.001, 0.004)):
        of = added(*multipliers)
        fused, unfused = (bytes_of(in_onnxruntime, of, images, fused=f) for f in (True, False))
        assert least < (fused != unfused).mean() < most
        assert np.abs(fused - unfused).max() == 1
        assert least < (fused != engines(of, images)).mean() < most


@LITERT
def test_litert_without_xnnpack_is_off_by_one_in_means(bytes_of: Any) -> None:
    """Of 3x3 maps with multiplier 1.25: some means are ties, and more are wrong there."""
    builder = Builder()
    channels(builder, 1, 128)
    builder.add(Pool, (0,), 1, ratio=1.25, zero_point=100)
    of = graph(builder, size=3)
    images = np.random.default_rng(0).integers(0, 256, (2000, 3, 3, 3), dtype=np.uint8)
    exact = (images[..., 0].astype(int) - 128).sum((1, 2)) * 5 / 36
    tie = np.abs(exact - np.floor(exact) - 0.5) < 1e-9
    exact = np.clip(exact, -100, 155)

    def wrong(kernels: str) -> float:
        found = bytes_of(in_litert, of, images, kernels=kernels)[:, 0] - 100
        off = np.abs(found - exact) > 0.5 + 1e-9
        assert not np.any(np.abs(found - exact) > 1.51)
        return float(off[~tie].mean())

    assert wrong("AUTO") == 0
    assert wrong(BUILT_IN) > 0.05 and wrong(REFERENCE) > 0.05


def residual(fused: bool, count: int = 8) -> Graph:
    """0.51 a + 0.83 b, b a convolution of a hidden map of a; `fused`: b is not rounded before."""
    builder = Builder(1)
    builder.conv(count, inputs=(-1,), zero_point=100)
    builder.conv(count, zero_point=0)
    first, second = (float(np.float32(x)) for x in (0.51, 0.83))
    weight = builder.rng.normal(0, 45, (count, 1, 1, count)).round()
    multiplier = builder.rng.uniform(0.004, 0.012, count)
    if fused:
        builder.conv(
            count, inputs=(1, 0), weight=weight, bias=0, multiplier=multiplier * second,
            residual_multiplier=first, zero_point=120,
        )  # fmt: skip
    else:
        builder.conv(count, weight=weight, bias=0, multiplier=multiplier)
        builder.add(Add, (0, 2), count, multipliers=(first, second), zero_point=120)
    return graph(builder)


@OPENVINO
@ORT
def test_openvino_drops_the_rounding_before_a_residual_addition(bytes_of: Any) -> None:
    """What it gives is what the engine gives where it does not round there."""
    images = np.random.default_rng(0).integers(0, 256, (500, 1, 1, 3), dtype=np.uint8)
    rounded, unrounded = (engines(residual(fused), images) for fused in (False, True))
    assert (rounded != unrounded).mean() > 0.1
    found = bytes_of(in_openvino, residual(False), images)
    assert (found != unrounded).mean() < 0.01 < 0.1 < (found != rounded).mean()
    assert (bytes_of(in_onnxruntime, residual(False), images) != rounded).mean() < 0.01


def pixels_at_two_over_255(folder: Path) -> tuple[Path, Array]:
    """All 256 pixels, normalised by mean = std = 0.5, through bytes of scale 2/255."""
    h = onnx.helper
    nodes = [
        h.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        h.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    ends = (
        [h.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 256])] for name in ("x", "y")
    )
    constants = {"s": np.float32(2 / 255), "z": np.uint8(128)}
    held = [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()]
    made = h.make_graph(nodes, "a", *ends, initializer=held)
    model = h.make_model(made, opset_imports=[h.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, path := folder / "a.onnx")
    return path, ((np.arange(256, dtype=np.float32) / 255 - 0.5) / 0.5)[None]


@ORT
def test_onnxruntime_keeps_215_levels(tmp_path: Path) -> None:
    import onnxruntime as ort

    path, x = pixels_at_two_over_255(tmp_path)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert len(np.unique(session.run(None, {"x": x})[0])) == 215


@OPENVINO
def test_openvino_keeps_129_levels(tmp_path: Path) -> None:
    import openvino

    path, x = pixels_at_two_over_255(tmp_path)
    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert len(np.unique(compiled([x])[0])) == 129


def swished() -> Graph:
    builder = Builder()
    builder.conv(16, 3, inputs=(-1,), padding=(1, 1, 1, 1), hardswish_scale=float(np.float32(3)))
    builder.add(Pool, None, 16, ratio=1.0, zero_point=0)
    return graph(builder, size=8)


NONE = np.zeros((1, 8, 8, 3), np.uint8)


@ORT
def test_onnxruntime_takes_a_hard_swish_apart_in_float(tmp_path: Path) -> None:
    export.write(swished(), path := tmp_path / "a.onnx")
    found = RUNTIMES["onnxruntime"].open(path, 1).operators(NONE)
    assert found and found["float"] == {"HardSigmoid": 1, "Mul": 1}


@OPENVINO
def test_openvino_fuses_a_hard_swish_with_its_bytes(tmp_path: Path) -> None:
    export.write(swished(), path := tmp_path / "a.onnx")
    found = RUNTIMES["openvino"].open(path, 1).operators(NONE)
    assert found and found["int8"]["Convolution"] == 1 and not found["float"]["Convolution"]
    assert not {"Math", "Eltwise"} & found["float"].keys()


@OPENVINO
def test_openvino_pads_in_int8_where_a_transpose_follows_the_dequantize(tmp_path: Path) -> None:
    """Why the export transposes real numbers, not bytes."""
    builder = Builder()
    builder.conv(16, 3, inputs=(-1,), padding=(1, 1, 1, 1), zero_point=0)
    builder.add(Pool, None, 16, ratio=1.0, zero_point=0)
    fields = FIELDS | {"padding_bytes": (128,) * 3, "mean": (0.5,) * 3}
    of = Graph(nodes=graph(builder).nodes, image_size=8, **fields)
    export.write(of, path := tmp_path / "a.onnx")
    images = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), np.uint8)
    opened = RUNTIMES["openvino"].open(path, 1)
    found, ours = np.concatenate([opened.run(x[None]) for x in images]), int8.load(of)(images)
    np.testing.assert_allclose(found, ours, rtol=0, atol=np.ptp(ours) / 255)
    assert (operators := opened.operators(NONE)) and operators["int8"]["Convolution"] == 1
    model = onnx.load(path)
    nodes = model.graph.node
    dequantize, transpose = nodes[:2]
    assert (dequantize.op_type, transpose.op_type) == ("DequantizeLinear", "Transpose")
    (reader,) = (node for node in nodes if transpose.output[0] in node.input)
    reader.input[0] = dequantize.output[0]
    transpose.input[0], dequantize.input[0] = "images", transpose.output[0]
    first = onnx.NodeProto.FromString(transpose.SerializeToString())
    del nodes[1]
    nodes.insert(0, first)
    onnx.save(model, path)
    operators = RUNTIMES["openvino"].open(path, 1).operators(NONE)
    assert operators and operators["float"]["Convolution"] == 1


@OPENVINO
def test_openvino_needs_no_bytes_before_a_hard_swish(tmp_path: Path) -> None:
    """With its profile it rounds where the engine does, and runs one kernel less."""
    graph, images = swished(), np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), np.uint8)
    ours, off, kernels = int8.load(graph)(images), [], []
    for profile in ("qdq", "openvino"):
        export.write(graph, path := tmp_path / "a.onnx", profile=profile)
        opened = RUNTIMES["openvino"].open(path, 1)
        found = np.concatenate([opened.run(x[None]) for x in images])
        off.append(np.abs(found - ours).mean())
        operators = opened.operators(NONE)
        assert operators and operators["int8"]["Convolution"] == 1
        kernels.append(sum(sum(counts.values()) for counts in operators.values()))
    assert off[1] < off[0] / 2 and kernels[1] < kernels[0]


@LITERT
def test_xnnpack_takes_no_int8_hard_swish(tmp_path: Path) -> None:
    """In bytes from end to end it is left to another kernel, and cuts XNNPACK's part in two."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.interpreter import Interpreter

    def parts(path: Path) -> int:
        interpreter = Interpreter(str(path))
        interpreter.allocate_tensors()
        return [x["op_name"] for x in interpreter._get_ops_details()].count("DELEGATE")

    export.write(swished(), path := tmp_path / "a.tflite")
    assert parts(path) == 1
    model = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    operators = model.subgraphs[0].operators
    names = [model.operatorCodes[x.opcodeIndex].builtinCode for x in operators]
    at = names.index(schema.BuiltinOperator.HARD_SWISH)
    before, swish, after = operators[at - 1 : at + 2]
    swish.inputs, swish.outputs = before.inputs[:1], after.outputs
    operators.remove(before)
    operators.remove(after)
    builder = flatbuffers.Builder()
    builder.Finish(model.Pack(builder), b"TFL3")
    path.write_bytes(builder.Output())
    assert parts(path) == 2
