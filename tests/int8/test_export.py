"""Exported models in the runtimes that they are for, and what they hold."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from support.int8_builder import FIELDS, Builder
from support.int8_models import MEAN, STD, Block, randomised, sqnr
from vitkd_fast import cli, export, int8
from vitkd_fast.export import scales
from vitkd_fast.int8.graph import Array, Classifier, Graph

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
litert = pytest.importorskip("ai_edge_litert.interpreter")
pytestmark = pytest.mark.usefixtures("one_thread")

HALF = (0.5, 0.5, 0.5)


def in_onnxruntime(path: Path, images: Array) -> tuple[Array, Counter[str]]:
    """Logits, and the operations that it runs, after its optimisations."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.optimized_model_filepath = str(path.with_suffix(".optimised"))
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    logits = [session.run(None, {"images": part[None]})[0] for part in images]
    nodes = onnx.load(options.optimized_model_filepath).graph.node
    return np.concatenate(logits), Counter(node.op_type for node in nodes)


def in_litert(path: Path, images: Array) -> tuple[Array, Counter[str]]:
    """Logits, by XNNPACK, and the operations; DELEGATE is a part that XNNPACK runs."""
    interpreter = litert.Interpreter(str(path), num_threads=1)
    interpreter.resize_tensor_input(0, images.shape)  # the batch is free
    interpreter.allocate_tensors()
    [given], [made] = interpreter.get_input_details(), interpreter.get_output_details()
    interpreter.set_tensor(given["index"], images)
    interpreter.invoke()
    operations = Counter(x["op_name"] for x in interpreter._get_ops_details())
    return interpreter.get_tensor(made["index"]), operations


RUNTIMES: dict[str, Any] = {".onnx": in_onnxruntime, ".tflite": in_litert}


def smooth(count: int, size: int) -> Array:
    torch.manual_seed(0)
    coarse = torch.rand(count, 3, 4, 4) * 255
    large = nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 255)
    return large.to(torch.uint8).permute(0, 2, 3, 1).numpy().copy()


def plain() -> nn.Module:
    """Layers that the engine and the runtimes round alike: no hard-swish, no addition."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU6(),
        nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.ReLU(),
        nn.Conv2d(8, 16, 1), nn.Conv2d(16, 12, 3, 2, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 7),
    ).eval()  # fmt: skip


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


class Added(nn.Module):
    """Convolutions whose results are added."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.fc((x + self.b(self.a(x).relu())).mean((2, 3)))


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


def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph: Graph = int8.quantize(plain(), smooth(4, 32), mean=HALF, std=HALF).graph
    with pytest.raises(
        ValueError, match=r"export: path: expected a name in \.onnx, \.tflite, got .*pb"
    ):
        export.write(graph, tmp_path / "a.pb")
    with pytest.raises(int8.FileError):
        export.write(b"no file", tmp_path / "a.onnx")
    builder = Builder()
    builder.conv(8, inputs=(-1,), fine=True)
    with pytest.raises(ValueError, match=r"expected no fine maps, .* got one from node 0 \(node0"):
        export.write(builder.graph(4), tmp_path / "a.onnx")
    monkeypatch.setattr("vitkd_fast._extras.find_spec", lambda name: None)
    for suffix, extra in ((".onnx", "export-onnx"), (".tflite", "export-litert")):
        with pytest.raises(ImportError, match=rf'pip install "vitkd-fast\[{extra}\]"'):
            export.write(graph, tmp_path / f"a{suffix}")
    assert not list(tmp_path.iterdir())


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.int8.safetensors"
    int8.quantize(plain(), smooth(4, 32), mean=HALF, std=HALF).save(file)
    for arguments, code in ((["-o", f"{tmp_path}/a.onnx"], 0), (["-o", f"{tmp_path}/a.pt"], 2)):
        monkeypatch.setattr(sys, "argv", ["vitkd", "export", str(file), *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert (stop.value.code or 0) == code
    out, err = capsys.readouterr()
    assert "a.onnx: 0.0" in out and "expected a name in .onnx, .tflite" in err
