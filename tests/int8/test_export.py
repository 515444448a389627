"""Exported models in the runtimes that they are for, and what they hold."""

from __future__ import annotations

import dataclasses
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from support.export_tools import HALF, Added, in_litert, in_onnxruntime, plain, smooth
from support.int8_builder import FIELDS, Builder
from support.int8_models import MEAN, STD, Block, randomised, sqnr
from vitkd_fast import cli, export, int8
from vitkd_fast.export import scales
from vitkd_fast.export.command import Runtime
from vitkd_fast.int8 import file
from vitkd_fast.int8.graph import Classifier, Conv, Depthwise, Graph

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("ai_edge_litert.interpreter")
pytestmark = pytest.mark.usefixtures("one_thread")

RUNTIMES: dict[str, Any] = {".onnx": in_onnxruntime, ".tflite": in_litert}


@pytest.mark.parametrize("suffix", RUNTIMES)
@pytest.mark.parametrize(("mean", "std"), [(HALF, HALF), (MEAN, STD)])
def test_bytes_are_the_engines(mean: Any, std: Any, suffix: str, tmp_path: Path) -> None:
    """Also where each channel of the image is padded with another byte."""
    images = smooth(64, 32)
    graph = int8.quantize(plain(), images[:16], mean=mean, std=std).graph
    ours = int8.load(graph)(images)
    run = RUNTIMES[suffix]
    export.write(graph, path := tmp_path / f"a{suffix}")
    found, operations = run(path, images)
    # the last bytes are the same, of which logits are sums in another order
    np.testing.assert_allclose(found, ours, rtol=0, atol=1e-6 * np.abs(ours).max())
    assert not operations["Conv"] + operations["FusedConv"]
    assert operations["QLinearConv"] == 4 or operations["CONV_2D"] == 3 + (mean is MEAN)
    assert suffix != ".onnx" or (operations["QGemm"] == 1 and not operations["Gemm"])
    assert suffix == ".onnx" or operations["DELEGATE"] == 1  # XNNPACK runs all of it
    # without rounding it is as near as the network's bits allow
    export.write(graph, path, exact=True)
    exact, operations = run(path, images)
    assert sqnr(exact, ours) > 25 and not operations["QLinearConv"] + operations["QUANTIZE"]


@pytest.mark.parametrize("suffix", RUNTIMES)
def test_every_level_of_a_pixel_counts(suffix: str, tmp_path: Path) -> None:
    """A runtime that scaled by 2 / 255 first would keep 215 of them, or 129."""
    builder = Builder()
    builder.conv(1, inputs=(-1,), weight=1, bias=0, multiplier=1 / 3, zero_point=0)
    builder.conv(2, cls=Classifier, weight=1, bias=0, multiplier=1.0)
    graph = Graph(nodes=tuple(builder.nodes), image_size=1, **FIELDS)
    levels = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(256, 1, 1, 3)
    export.write(graph, path := tmp_path / f"a{suffix}")
    found, _ = RUNTIMES[suffix](path, levels)
    assert len(np.unique(found[:, 0])) == 256
    np.testing.assert_array_equal(found, int8.load(graph)(levels))


FLOAT = {  # convolutions that ONNX Runtime does not run in int8
    "mobilenetv1_100": 0,
    "mobilenetv2_050": 0,
    "mobilenetv3_small_050": 18,  # of the squeeze-excites
    "mobilenetv4_conv_small_050": 0,
    "efficientnet_lite0": 0,
}


@pytest.mark.parametrize("name", FLOAT)
def test_what_runs_in_int8(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, images = randomised(timm.create_model(name, num_classes=10)), smooth(8, 64)
    graph = int8.quantize(model, images, mean=HALF, std=HALF).graph
    export.write(graph, tmp_path / "a.onnx")
    _, operations = in_onnxruntime(tmp_path / "a.onnx", images[:1])
    assert operations["Conv"] + operations["FusedConv"] == FLOAT[name]
    convolutions = sum(node.op in ("conv", "depthwise") for node in graph.nodes)
    assert operations["QLinearConv"] == convolutions
    export.write(graph, tmp_path / "a.tflite")
    _, operations = in_litert(tmp_path / "a.tflite", images[:1])
    # XNNPACK runs all of it, in one piece
    assert operations["DELEGATE"] == 1


@pytest.mark.parametrize("suffix", RUNTIMES)
@pytest.mark.parametrize("portable", [False, True])
def test_a_portable_files_additions_are_the_engines(
    portable: bool, suffix: str, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    images = smooth(64, 32)
    model = Added().eval()
    graph = int8.quantize(model, images[:16], mean=HALF, std=HALF, portable=portable).graph
    assert [node.op for node in graph.nodes].count("add") == portable
    ours = int8.load(graph)(images)
    export.write(graph, path := tmp_path / f"a{suffix}")
    found, operations = RUNTIMES[suffix](path, images)
    assert operations["QLinearAdd"] + operations["ADD"] == 1 and sqnr(ours, found) > 25
    assert np.allclose(found, ours, rtol=0, atol=1e-6 * np.abs(ours).max()) == portable


@pytest.mark.parametrize("suffix", RUNTIMES)
def test_hard_swish_and_additions_are_near(suffix: str, tmp_path: Path) -> None:
    """They are rounded once more: to what, the file says."""
    torch.manual_seed(0)
    images = smooth(64, 32)
    graph = int8.quantize(Block().eval(), images[:16], mean=HALF, std=HALF).graph
    ours = int8.load(graph)(images)
    for exact in (False, True):
        export.write(graph, path := tmp_path / f"a{suffix}", exact=exact)
        found, _ = RUNTIMES[suffix](path, images)
        assert sqnr(ours, found) > 25, exact


def test_scales_multiply_to_the_multipliers() -> None:
    torch.manual_seed(0)
    model = randomised(timm.create_model("mobilenetv3_small_050", num_classes=3))
    graph = int8.quantize(model, smooth(8, 64), mean=HALF, std=HALF).graph
    maps = scales.of_maps(graph)
    kinds = set()
    for node, of in zip(graph.nodes, maps, strict=True):
        source: Any = scales.Map(1.0, 128) if node.inputs[0] < 0 else maps[node.inputs[0]]
        kinds.add(node.op)
        if node.op in ("conv", "depthwise", "classifier"):
            weight = scales.of_weights(node, source, of)
            out = 1 if of is None or getattr(node, "hardswish_scale", None) else of.scale
            np.testing.assert_allclose(weight * source.scale / out, node.multiplier, rtol=1e-6)
            if getattr(node, "residual_multiplier", None):
                ratio = maps[node.inputs[1]].scale / of.scale
                np.testing.assert_allclose(ratio, node.residual_multiplier, rtol=1e-6)
            if getattr(node, "hardswish_scale", None):
                np.testing.assert_allclose(of.scale * 6 * node.hardswish_scale, 1, rtol=1e-6)
        elif node.op in ("squeeze_excite", "pool"):
            np.testing.assert_allclose(source.scale / of.scale, node.ratio, rtol=1e-6)
    assert kinds == {"conv", "depthwise", "squeeze_excite", "pool", "classifier"}


def test_runtimes_form_the_engines_multipliers(monkeypatch: pytest.MonkeyPatch) -> None:
    """s_in s_w / s_out in float32, to the last bit, where a sum may be a tie: 99 of 100."""
    torch.manual_seed(0)
    model = randomised(timm.create_model("mobilenetv2_050", num_classes=10))
    graph = int8.quantize(model, smooth(8, 64), mean=HALF, std=HALF, portable=True).graph

    def missed() -> float:
        maps: Any = scales.of_maps(graph)
        found = []
        for node, of in zip(graph.nodes, maps, strict=True):
            if isinstance(node, Conv | Depthwise) and node.inputs[0] >= 0:
                source = maps[node.inputs[0]]
                weight = scales.of_weights(node, source, of)
                formed = np.float32(source.scale) * weight / np.float32(of.scale)
                # of at most 16 bits
                short = np.ldexp(np.frexp(node.multiplier)[0], 16) % 1 == 0
                found.append((formed != node.multiplier)[short])
        return float(np.concatenate(found).mean())

    chosen = missed()
    monkeypatch.setattr(scales, "_unit", lambda *_: 1.0)
    assert chosen < 0.015 and missed() > 2 * chosen


def test_the_file_says_how_images_are_prepared(tmp_path: Path) -> None:
    classes = [f"class {i}" for i in range(7)]
    graph = int8.quantize(
        plain(), smooth(4, 32), mean=MEAN, std=STD, classes=classes, crop_pct=0.9
    ).graph
    export.write(graph, tmp_path / "a.onnx")
    model = onnx.load(tmp_path / "a.onnx")
    about = {x.key: json.loads(x.value) for x in model.metadata_props}
    assert about["classes"] == classes and about["mean"] == list(MEAN)
    assert about["crop_pct"] == 0.9 and about["interpolation"] == "bilinear"
    [image] = model.graph.input
    sizes = image.type.tensor_type.shape.dim
    assert [size.dim_param or size.dim_value for size in sizes] == ["N", 32, 32, 3]


def test_tensorflows_metadata_have_the_labels(tmp_path: Path) -> None:
    """As metadata_schema.fbs of tensorflow/tflite-support numbers its tables' fields."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema
    from flatbuffers.number_types import Float32Flags, Int8Flags, Uint8Flags, Uint32Flags

    classes = ["tench", "wörld cup", "a, b"] + [f"class {i}" for i in range(4)]
    graph = int8.quantize(plain(), smooth(4, 32), mean=HALF, std=HALF, classes=classes).graph
    export.write(graph, path := tmp_path / "a.tflite")
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == ["labels.txt"] and archive.testzip() is None
        assert archive.read("labels.txt").decode().splitlines() == classes
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(path.read_bytes(), 0))
    [place] = [x.buffer for x in model.metadata if x.name == b"TFLITE_METADATA"]
    data = bytes(bytearray(model.buffers[place].data))
    assert data[4:8] == b"M001"

    def at(table: Any, field: int) -> int:
        """Where a field's value is."""
        offset = table.Offset(4 + 2 * field)
        assert offset, "the field is not there"
        return int(table.Pos + offset)

    def child(table: Any, field: int) -> Any:
        return flatbuffers.Table(data, table.Indirect(at(table, field)))

    def only(table: Any, field: int) -> Any:
        vector = table.Vector(table.Offset(4 + 2 * field))
        assert table.VectorLen(table.Offset(4 + 2 * field)) == 1
        return flatbuffers.Table(data, table.Indirect(vector))

    def number(table: Any, field: int, kind: Any) -> Any:
        return table.Get(kind, at(table, field))

    def real(table: Any, field: int) -> Any:
        return table.Get(Float32Flags, table.Vector(table.Offset(4 + 2 * field)))

    root = flatbuffers.Table(data, int.from_bytes(data[:4], "little"))
    subgraph = only(root, 3)
    image, logits = only(subgraph, 2), only(subgraph, 3)
    assert root.String(at(root, 7)) == b"1.0.0" and image.String(at(image, 0)) == b"images"
    content = child(image, 3)
    assert number(content, 0, Uint8Flags) == 2  # ImageProperties
    properties = child(content, 1)
    assert number(properties, 0, Int8Flags) == 1  # RGB
    size = child(properties, 1)
    assert [number(size, i, Uint32Flags) for i in (0, 1)] == [32, 32]
    unit = only(image, 4)
    assert number(unit, 0, Uint8Flags) == 1  # NormalizationOptions
    tensor = model.subgraphs[0].tensors[model.subgraphs[0].inputs[0]].quantization
    # less the mean, over the deviation, over the scale, and the zero point: the same byte
    assert real(child(unit, 1), 0) == tensor.zeroPoint[0] and real(child(unit, 1), 1) == 1
    assert tensor.scale[0] == 1 and real(child(image, 5), 0) == 255
    labels = only(logits, 6)
    assert labels.String(at(labels, 0)) == b"labels.txt"
    assert number(labels, 2, Int8Flags) == 2  # TENSOR_AXIS_LABELS

    # a runtime reads the model in front of the archive, and without classes there is none
    assert len(in_litert(path, smooth(1, 32))[0]) == 1
    export.write(dataclasses.replace(graph, classes=()), path)
    assert not zipfile.is_zipfile(path)
    with pytest.raises(ValueError, match=r"classes: expected names of one line, got 'a\\nb'"):
        export.write(dataclasses.replace(graph, classes=("a\nb", *classes[1:])), path)


def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph: Graph = int8.quantize(plain(), smooth(4, 32), mean=HALF, std=HALF).graph
    with pytest.raises(
        ValueError,
        match=r"export: path: expected a name in \.onnx, \.tflite, \.pte, \.mlpackage, got .*pb",
    ):
        export.write(graph, tmp_path / "a.pb")
    with pytest.raises(int8.FileError):
        export.write(b"no file", tmp_path / "a.onnx")
    newer = file.dump(graph).replace(b'\\"format\\": 1', b'\\"format\\": 2')
    with pytest.raises(int8.FileError, match="format: expected 1, which this version reads, got 2"):
        export.write(newer, tmp_path / "a.onnx")
    names: Any = ("qdq", "nnapi")
    for profile, suffix, exact, message in (
        (
            names[1],
            "onnx",
            False,
            "profile: expected qdq, openvino, qoperator, tensorrt, qnn, got 'nnapi'",
        ),
        ("qnn", "tflite", False, r"profile qnn: expected int8 in a \.onnx file, got .*a\.tflite"),
        (
            "qnn",
            "onnx",
            True,
            r"profile qnn: expected int8 in a \.onnx file, got a network",
        ),
    ):
        with pytest.raises(ValueError, match=f"export: {message}"):
            export.write(graph, tmp_path / f"a.{suffix}", exact=exact, profile=profile)
    builder = Builder()
    builder.conv(8, inputs=(-1,), fine=True)
    with pytest.raises(ValueError, match=r"expected no fine maps, .* got one from node 0 \(node0"):
        export.write(builder.graph(4), tmp_path / "a.onnx")
    monkeypatch.setattr("vitkd_fast._extras.find_spec", lambda name: None)
    for suffix, extra in (
        (".onnx", "export-onnx"),
        (".tflite", "export-litert"),
        (".pte", "export-executorch"),
        (".mlpackage", "export-coreml"),
    ):
        with pytest.raises(ImportError, match=rf'pip install "vitkd-fast\[{extra}\]"'):
            export.write(graph, tmp_path / f"a{suffix}")
    assert not list(tmp_path.iterdir())


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "a.int8.safetensors"
    int8.quantize(plain(), smooth(4, 32), mean=HALF, std=HALF).save(source)
    for arguments, code, says in (
        (["-o", f"{tmp_path}/a.onnx"], 0, "a.onnx: 0.0"),
        (["-o", f"{tmp_path}/b.onnx", "--profile", "tensorrt"], 0, "b.onnx: 0.0"),
        (["-o", f"{tmp_path}/a.pt"], 2, "expected a name in .onnx, .tflite, .pte, .mlpackage"),
        (
            ["-o", f"{tmp_path}/a.tflite", "--profile", "qnn"],
            2,
            "profile qnn: expected -o *.onnx",
        ),
        (["-o", f"{tmp_path}/no/a.onnx"], 2, "no is no folder"),
    ):
        monkeypatch.setattr(sys, "argv", ["vitkd", "export", str(source), *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert (stop.value.code or 0) == code
        out, err = capsys.readouterr()
        assert says in " ".join((out + err).split())
    assert [x.value for x in Runtime] == list(export.PROFILES)
    kinds = {x.data_type for x in onnx.load(tmp_path / "b.onnx").graph.initializer}
    assert onnx.TensorProto.UINT8 not in kinds


def test_a_float_student_is_sent_to_quantize(tmp_path: Path) -> None:
    save_file(plain().state_dict(), tmp_path / "student.safetensors")
    with pytest.raises(int8.FileError, match=r"student.safetensors: .*vitkd quantize"):
        export.write(tmp_path / "student.safetensors", tmp_path / "a.onnx")
