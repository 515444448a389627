"""Core ML's package: the operators, scales, weights and labels in it, and what they compute.

Core ML, which needs macOS, never runs it here: tests/support/mil_tools.py computes it instead.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from support import mil_tools
from support.export_tools import HALF, Added, Gated, plain, smooth
from support.int8_models import MEAN, STD, sqnr
from vitkd_fast import export, int8
from vitkd_fast.export import scales
from vitkd_fast.int8.graph import Array, Classifier, Conv, Depthwise, Graph

ct = pytest.importorskip("coremltools")
pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = [f"class {i}" for i in range(7)]


def made(model: Any, path: Path, exact: bool = False, **options: Any) -> tuple[Graph, Any]:
    """The graph, and the program of the package that is written of it."""
    options = {"mean": HALF, "std": HALF, "portable": True} | options
    graph = int8.quantize(model, smooth(16, 32), **options).graph
    export.write(graph, path, exact=exact)
    return graph, mil_tools.saved_program(path)


def answers(program: Any, images: Array, name: str = "logits") -> Array:
    found = []
    for image in images:
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
        with torch.no_grad():
            values: dict[str, Tensor] = mil_tools.run(program, pixels)
        found.append(next(v for k, v in values.items() if k.startswith(name)).numpy())
    return np.concatenate(found)


@pytest.mark.parametrize(("mean", "std"), [(HALF, HALF), (MEAN, STD)])
def test_weights_and_scales_are_the_graphs(mean: Any, std: Any, tmp_path: Path) -> None:
    graph, program = made(plain(), tmp_path / "a.mlpackage", mean=mean, std=std)
    layers = [x for x in graph.nodes if isinstance(x, Conv | Depthwise | Classifier)]
    held = mil_tools.operations(program, "constexpr_affine_dequantize")
    for layer, op in zip(layers, held, strict=True):
        weight = layer.weight
        if isinstance(layer, Conv):
            weight = weight.transpose(0, 3, 1, 2)
        elif isinstance(layer, Depthwise):
            weight = weight.transpose(2, 0, 1)[:, None]
        np.testing.assert_array_equal(op.quantized_data.val, weight)
        assert op.quantized_data.val.dtype == np.int8 and op.zero_point.val == 0
        assert op.axis.val == 0 and op.scale.val.shape == (len(weight),)
    maps = [of for of in scales.of_maps(graph) if of is not None]
    rounded = mil_tools.operations(program, "quantize")
    # the image's bytes first, in parts of 128
    assert rounded[0].scale.val == 1 / 128
    for of, op in zip(maps, rounded[1:], strict=True):
        assert op.zero_point.val == of.zero_point and op.output_dtype.val == "uint8"
        # float16
        np.testing.assert_allclose(op.scale.val, of.scale, rtol=2**-11)
    # what reads a map undoes it
    read = mil_tools.operations(program, "dequantize")
    makes = {op.outputs[0].name: op for op in rounded}
    for op in read:
        source = makes[op.input.name]
        assert (op.scale.val, op.zero_point.val) == (source.scale.val, source.zero_point.val)
    assert len(read) == len(rounded)


@pytest.mark.parametrize(("mean", "std"), [(HALF, HALF), (MEAN, STD)])
@pytest.mark.parametrize("make", [plain, Added, Gated])
@pytest.mark.parametrize("exact", [False, True])
def test_it_computes_what_the_engine_does(
    make: Any, mean: Any, std: Any, exact: bool, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    path, images = tmp_path / "a.mlpackage", smooth(32, 32)
    graph, program = made(make().eval(), path, exact, mean=mean, std=std)
    ours = int8.load(graph)(images)
    assert sqnr(ours, answers(program, images)) > 25
    kinds = ("quantize", "dequantize", "constexpr_affine_dequantize")
    assert exact == (not any(mil_tools.operations(program, kind) for kind in kinds))


def test_it_takes_an_image_and_names_its_class(tmp_path: Path) -> None:
    path = tmp_path / "a.mlpackage"
    graph, program = made(plain(), path, classes=CLASSES, crop_pct=0.9)
    spec = ct.utils.load_spec(str(path))
    [given] = spec.description.input
    image = given.type.imageType
    assert (given.name, image.width, image.height) == ("image", 32, 32)
    assert image.colorSpace == ct.proto.FeatureTypes_pb2.ImageFeatureType.RGB
    assert spec.description.predictedFeatureName == "classLabel"
    assert {x.name for x in spec.description.output} == {"classLabel", "classLabel_probs"}
    [classify] = mil_tools.operations(program, "classify")
    assert list(classify.classes.val) == CLASSES
    images = smooth(8, 32)
    found = answers(program, images, "probabilities")
    ours = torch.from_numpy(int8.load(graph)(images)).softmax(1).numpy()
    np.testing.assert_allclose(found, ours, atol=0.02)
    about = dict(spec.description.metadata.userDefined)
    assert json.loads(about["classes"]) == CLASSES and json.loads(about["crop_pct"]) == 0.9
    # what is not exclusive has no label
    graph, program = made(plain(), path, classes=CLASSES, multilabel=True)
    spec = ct.utils.load_spec(str(path))
    assert not spec.description.predictedFeatureName
    assert [x.name for x in spec.description.output] == ["logits"]


def test_a_package_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.mlpackage"
    path.mkdir()
    (path / "old").touch()
    made(plain(), path)
    assert not (path / "old").exists() and (path / "Manifest.json").exists()
    assert [x.name for x in tmp_path.iterdir()] == ["a.mlpackage"]
