"""ExecuTorch's programs: as torch runs them, and by XNNPACK where executorch is installed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from support.export_tools import HALF, Added, Gated, plain, smooth
from support.int8_models import MEAN, STD, sqnr
from vitkd_fast import export, int8
from vitkd_fast.export import executorch
from vitkd_fast.export.compare import compare
from vitkd_fast.images import list_images, read
from vitkd_fast.int8 import file
from vitkd_fast.int8.graph import Array, Graph

pytestmark = pytest.mark.usefixtures("one_thread")


def quantized(make: Any, mean: Any = HALF, std: Any = HALF) -> Graph:
    torch.manual_seed(3)
    model = make().eval()
    return int8.quantize(model, smooth(16, 32), mean=mean, std=std, portable=True).graph


@pytest.mark.parametrize(("mean", "std"), [(HALF, HALF), (MEAN, STD)])
@pytest.mark.parametrize("make", [plain, Added, Gated])
@pytest.mark.parametrize("exact", [False, True])
def test_the_program_computes_what_the_engine_does(
    make: Any, mean: Any, std: Any, exact: bool
) -> None:
    graph, images = quantized(make, mean, std), smooth(32, 32)
    module = executorch.program(graph, exact).module()
    with torch.no_grad():
        found = np.concatenate([module(torch.from_numpy(x[None])).numpy() for x in images])
    ours = int8.load(graph)(images)
    assert found.shape == ours.shape and sqnr(ours, found) > 25


def test_the_program_holds_the_engines_weights() -> None:
    graph = quantized(Gated)
    held = [x.numpy() for x in executorch.program(graph).state_dict.values()]
    int8s = [x for x in held if x.dtype == np.int8]
    arrays = [getattr(node, name) for node in graph.nodes for name in node.arrays]
    expected = [x for x in arrays if x.dtype == np.int8]
    # in another order of axes, and the classifier's with two inputs that count nothing
    assert len(int8s) == len(expected)
    for ours, theirs in zip(expected, int8s, strict=True):
        np.testing.assert_array_equal(np.sort(ours[ours != 0]), np.sort(theirs[theirs != 0]))


def by_xnnpack(path: Path, images: Array) -> Array:
    from executorch.runtime import Runtime  # type: ignore[import-not-found]

    method = Runtime.get().load_program(path).load_method("forward")
    found = [method.execute([torch.from_numpy(x[None])])[0].numpy().copy() for x in images]
    return np.concatenate(found)


@pytest.mark.parametrize(
    ("make", "mean", "std"), [(plain, HALF, HALF), (Added, MEAN, STD), (Gated, HALF, HALF)]
)
def test_xnnpack_runs_all_of_it(make: Any, mean: Any, std: Any, tmp_path: Path) -> None:
    pytest.importorskip("executorch.runtime")
    graph, images = quantized(make, mean, std), smooth(32, 32)
    lowered = executorch.lower(executorch.program(graph))
    nodes = lowered.exported_program().graph.nodes
    operators = Counter(str(x.target) for x in nodes if x.op == "call_function")
    delegates = [count for name, count in operators.items() if "delegate" in name]
    outside = {
        name.split(".")[-2] for name in operators if name.endswith(".out")
    }  # portable kernels
    assert delegates == [1] and outside == {"permute_copy", "_to_dim_order_copy"}
    export.write(graph, path := tmp_path / "a.pte")
    found, ours = by_xnnpack(path, images), int8.load(graph)(images)
    if make is Gated:  # rounded once more, before the hard-swish
        assert sqnr(ours, found) > 25
    else:
        np.testing.assert_allclose(found, ours, rtol=0, atol=1e-5 * np.abs(ours).max())


def test_compare_runs_it(tmp_path: Path) -> None:
    """Beside the engine, in processes of their own; a program of another student is refused."""
    pytest.importorskip("executorch.runtime")
    small, images = tmp_path / "student.int8.safetensors", tmp_path / "images"
    images.mkdir()
    for i, image in enumerate(smooth(12, 32)):
        Image.fromarray(image).save(images / f"{i}.png")
    file.save(graph := quantized(Added), small)
    export.write(small, path := tmp_path / "student.pte")
    found = compare(small, path, images)
    other = found["models"][1]
    files = list_images(images)
    batch = np.stack([read(x, graph) for x in files])
    off = np.abs(by_xnnpack(path, batch) - int8.load(graph)(batch))
    assert other["name"] == "executorch" and other["operators"] is None
    assert other["largest"] == pytest.approx(off.max()) and other["agreement"] > 0.9
    assert found["model"]["fingerprint"] == found["student"]["fingerprint"]
    export.write(quantized(plain), path)
    with pytest.raises(ValueError, match="got one of another file"):
        compare(small, path, images)
