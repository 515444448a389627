"""`vitkd compare`: the figures of models in processes of their own, the card, and refusals."""

from __future__ import annotations

import html
import json
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from support.browser import browse, measured
from support.int8_models import sqnr
from vitkd_fast import cli, export, int8
from vitkd_fast.distill import datasets
from vitkd_fast.export import compare_card, compare_runtimes
from vitkd_fast.export.compare import ENGINE, compare, fidelity, verdict
from vitkd_fast.export.compare_runtimes import RUNTIMES
from vitkd_fast.export.compare_worker import Worker, WorkerError
from vitkd_fast.images import DataError, list_images, read
from vitkd_fast.int8 import file

onnx = pytest.importorskip("onnx")
for module in ("onnxruntime", "ai_edge_litert"):
    pytest.importorskip(module)
pytestmark = pytest.mark.usefixtures("one_thread")

SIDE = 32
HALF = (0.5, 0.5, 0.5)
SUFFIXES = (".onnx", ".tflite")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty digits as PNG files, and one file that is none."""
    root = tmp_path_factory.mktemp("images")
    digits = datasets.Digits()
    for i in range(30):
        image, label = digits.read(i)
        Image.fromarray(image).resize((40, 36)).save(root / f"{i}_{label}.png")
    (root / "30_broken.png").write_bytes(b"\x89PNG nothing")
    return root


def digits() -> np.ndarray:
    images = [Image.fromarray(datasets.Digits().read(i)[0]).resize((SIDE,) * 2) for i in range(40)]
    return np.stack([np.asarray(image) for image in images])


def student(seed: int, swish: bool = False) -> int8.QuantizedModel:
    """Ten classes; with `swish` a hard-swish, which runtimes compute in float."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.Hardswish() if swish else nn.ReLU6(),
        nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.ReLU(),
        nn.Conv2d(16, 24, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10),
    ).eval()  # fmt: skip
    classes = [f"digit {i}" for i in range(10)]
    return int8.quantize(
        model, digits(), mean=HALF, std=HALF, classes=classes, crop_pct=0.9, interpolation="bicubic"
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """made(suffix): a student's file, and the runtime's of it."""
    root = tmp_path_factory.mktemp("student")
    student(0, swish=True).save(path := root / "student.int8.safetensors")

    def make(suffix: str) -> tuple[Path, Path]:
        export.write(path, there := root / f"student{suffix}")
        return path, there

    return make


@pytest.fixture(scope="module")
def results(made: Any, folder: Path) -> Callable[[str], dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}

    def of(suffix: str) -> dict[str, Any]:
        if suffix not in found:
            found[suffix] = compare(*made(suffix), folder, skip_bad=True)
        return json.loads(json.dumps(found[suffix]))

    return of


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_figures_are_those_of_the_logits(
    suffix: str, made: Any, results: Any, folder: Path
) -> None:
    """Beside both engines run here, one after the other, on the images that `predict` reads."""
    small, model = made(suffix)
    found = results(suffix)
    engine, *others = found["models"]
    session = int8.load(small)
    files = [path for path in list_images(folder) if "broken" not in path.name]
    images = np.stack([read(path, session) for path in files])
    ours = session(images)
    assert found["images"] == {"folder": str(folder), "count": 30, "skipped": 1}
    assert found["calls"] == 300 and found["threads"] == 1
    assert found["step"] == pytest.approx(np.ptp(ours) / 255)
    assert engine["name"] == ENGINE and engine["version"].endswith(session.isa)
    assert [row["name"] for row in others] == [
        name for name, it in RUNTIMES.items() if it.suffix == suffix and it.is_installed
    ]
    for row in others:
        runtime = RUNTIMES[row["name"]].open(model, 1)
        theirs = np.concatenate([runtime.run(image[None]) for image in images])
        agree = (theirs.argmax(1) == ours.argmax(1)).mean()
        assert row["agreement"] == agree
        off = np.abs(theirs - ours)
        assert row["largest"] == pytest.approx(off.max()) and off.max() > 0
        assert row["mean_steps"] == pytest.approx(off.mean() / found["step"])
        assert row["sqnr_db"] == pytest.approx(sqnr(ours, theirs), abs=1e-3)
        assert sum(part["share"] for part in row["histogram"]) == pytest.approx(1)
        below = sum(part["share"] for part in row["histogram"] if (part["to"] or 9) <= 1)
        assert below == pytest.approx((off < found["step"]).mean())
        assert row["version"] == RUNTIMES[row["name"]].version
        assert row["bytes"] == model.stat().st_size
    for row in found["models"]:
        for times in (row["latency_ms"], row["cpu_ms"]):
            assert 0 < times["p50"] <= times["p90"] <= times["p99"]
        # a process with Python and NumPy, not this one with torch
        assert 10e6 < row["before_bytes"] < row["peak_bytes"] < 400e6
    fingerprint = file.fingerprint(file.read(small))
    assert found["student"]["fingerprint"] == found["model"]["fingerprint"] == fingerprint


FLOAT: dict[str, set[str]] = {
    "onnxruntime": {"HardSigmoid", "Mul"},  # hard-swish
    "litert": {"HARD_SWISH", "FULLY_CONNECTED"},
    "openvino": set(),  # in one kernel with the rounding behind it
}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_operators_in_float(suffix: str, made: Any, results: Any, tmp_path: Path) -> None:
    for row in results(suffix)["models"][1:]:
        assert set(row["operators"]["float"]) == FLOAT[row["name"]]
        convolutions = {"CONV_2D", "DEPTHWISE_CONV_2D", "QLinearConv", "Convolution"}
        assert sum(row["operators"]["int8"].get(name, 0) for name in convolutions) == 3
    # of a model in float none is in int8, and with `exact` it has the same fingerprint
    small, _ = made(suffix)
    export.write(small, path := tmp_path / f"float{suffix}", exact=True)
    name = next(name for name, it in RUNTIMES.items() if it.suffix == suffix)
    model = RUNTIMES[name].open(path, 1)
    found = model.operators(np.zeros((1, SIDE, SIDE, 3), np.uint8))
    assert found is not None and not found["int8"] and sum(found["float"].values()) > 6
    assert model.metadata["student"] == file.fingerprint(file.read(small))


def test_fidelity() -> None:
    ours = np.array([[3.0, 1, 2], [0, 5, 4]], np.float32)
    theirs = np.array([[3.0, 1, 2.5], [0, 4, 5]], np.float32)
    found = fidelity(ours, theirs, step=0.5)
    assert found["agreement"] == 0.5 and found["largest_steps"] == 2
    assert found["mean"] == pytest.approx(2.5 / 6) and found["mean_steps"] == pytest.approx(5 / 6)
    assert found["sqnr_db"] == pytest.approx(10 * np.log10(55 / 2.25))
    shares = {part["from"]: part["share"] for part in found["histogram"] if part["share"]}
    assert shares == pytest.approx({0: 3 / 6, 1: 1 / 6, 2: 2 / 6})
    assert fidelity(ours, ours, step=0.5)["sqnr_db"] is None
    # of several labels: on which side of one half each is
    signs = fidelity(np.array([[1.0, -1]]), np.array([[2.0, 1]]), 1, multilabel=True)
    assert signs["agreement"] == 0.5


def test_disagreements_are_named(made: Any, folder: Path, tmp_path: Path) -> None:
    """A model of the same file whose classifier was turned by one class answers otherwise."""
    small, path = made(".onnx")
    model = onnx.load(path)
    for held in model.graph.initializer:
        if re.fullmatch(r".*fc.*|\d+\.8\..*", held.name) and list(held.dims)[:1] == [10]:
            values = onnx.numpy_helper.to_array(held)
            held.CopyFrom(onnx.numpy_helper.from_array(np.roll(values, 1, 0), held.name))
    onnx.save(model, turned := tmp_path / "turned.onnx")
    found = compare(small, turned, folder, runtimes=["onnxruntime"], skip_bad=True)
    assert found["models"][1]["agreement"] == 0 and len(found["disagreements"]) == 20
    first = found["disagreements"][0]
    number = int(first["ours"].split()[1])
    assert first["theirs"] == f"digit {(number + 1) % 10}" and first["margin_steps"] > 0
    assert Path(first["image"]).exists()
    page = compare_card.render(found)
    assert first["theirs"] in page and "no image on which" not in page


@pytest.fixture
def card(results: Any) -> dict[str, Any]:
    """Of all that it can show: two runtimes, names with HTML in them, long paths, images."""
    found = results(".onnx")
    del found["models"][2:]
    other = results(".tflite")["models"][1]
    found["models"].append(other | {"operators": None, "name": "a_<runtime>", "settings": "a < b"})
    found["student"]["file"] = "runs/" + "long_folder/" * 8 + '<b>"&.int8.safetensors'
    found["disagreements"] = [
        {"image": f"images/{'n' * 60}/{i}.png", "name": "a_<runtime>", "ours": "Löwe, " * 6,
         "theirs": "<i>", "margin_steps": 0.25} for i in range(3)
    ]  # fmt: skip
    found["models"][1]["busy"] = True
    return found


def test_the_card(card: dict[str, Any], tmp_path: Path) -> None:
    data = compare_card.write(card, tmp_path / "a.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "a.json"]
    assert json.loads(data.read_text(), parse_constant=pytest.fail) == card
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=|@import|url\(|<script|<i>|<runtime>", page)
    text = " ".join(html.unescape(re.sub("<[^>]+>", " ", page.split("</style>")[1])).split())
    engine, first, second = card["models"]
    for said in (
        verdict(card),
        f"s, % {100 * first['agreement']:.1f} {100 * second['agreement']:.1f} Largest",
        f"CPU time p99, ms {engine['cpu_ms']['p99']:.3g} {first['cpu_ms']['p99']:.3g}",
        "the machine was busy: trust it, not the latency",
        "a_<runtime> the runtime does not say",
        "1 HardSigmoid, 1 Mul",
        "a < b",
        card["student"]["fingerprint"],
    ):
        assert said in text.replace(" , ", ", "), said
    lines = compare_card.table(card).splitlines()
    assert lines[0].split() == ["vitkd_fast", "onnxruntime", "a_<runtime>"]
    assert lines[-1] == "onnxruntime in float: 1 HardSigmoid, 1 Mul"


def test_the_card_in_a_browser(card: dict[str, Any], tmp_path: Path) -> None:
    compare_card.write(card, tmp_path / "a.html")
    dom = browse(tmp_path, "--dump-dom", (tmp_path / "a.html").as_uri())
    sections = ["answers", "cost", "operators", "disagreements", "environment"]
    assert re.findall(r'<section id="(\w+)"', dom) == sections
    for width in (360, 1280):
        assert measured(compare_card.render(card), width, tmp_path) == [width, [], [], []]


def test_several_labels(folder: Path, tmp_path: Path) -> None:
    graph = replace(student(0).graph, multilabel=True)
    file.save(graph, small := tmp_path / "a.int8.safetensors")
    export.write(small, model := tmp_path / "a.tflite")
    found = compare(small, model, folder, count=5)
    assert found["student"]["multilabel"] and not found["disagreements"]
    assert "gives the engine's labels on" in verdict(found)
    page = compare_card.render(found)
    assert "Labels as the engine" in page and 'id="disagreements"' not in page


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_another_student_is_refused(suffix: str, made: Any, folder: Path, tmp_path: Path) -> None:
    small, _ = made(suffix)
    export.write(student(1).graph, other := tmp_path / f"other{suffix}")
    expected = r"expected a model of .*student\.int8\.safetensors \(\w{12}\), got one of another"
    with pytest.raises(ValueError, match=expected):
        compare(small, other, folder)
    # what does not say of what it was made is compared, and the card says so
    if suffix == ".onnx":
        model = onnx.load(other)
        del model.metadata_props[:]
        onnx.save(model, other)
        found = compare(small, other, folder, count=5, runtimes=["onnxruntime"])
        assert found["model"]["fingerprint"] is None
        assert "not said by the file" in compare_card.render(found)


def foreign(path: Path, dtype: int, shape: list[Any], outputs: int = 1) -> Path:
    """An ONNX model that only flattens."""
    h = onnx.helper
    nodes = [h.make_node("Cast", ["x"], ["f"], to=onnx.TensorProto.FLOAT)]
    nodes += [h.make_node("Flatten", ["f"], [f"y{i}"]) for i in range(outputs)]
    graph = h.make_graph(
        nodes,
        "a",
        [h.make_tensor_value_info("x", dtype, shape)],
        [h.make_tensor_value_info(f"y{i}", onnx.TensorProto.FLOAT, None) for i in range(outputs)],
    )
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, path)
    return path


def test_inputs_that_differ(made: Any, folder: Path, tmp_path: Path) -> None:
    small, _ = made(".onnx")
    for dtype, shape, got in (
        (onnx.TensorProto.FLOAT, [1, 3, SIDE, SIDE], "float32 [1, 3, 32, 32]"),
        (onnx.TensorProto.UINT8, ["N", 64, 64, 3], "uint8 [N, 64, 64, 3]"),
        (onnx.TensorProto.UINT8, [2, SIDE, SIDE, 3], "uint8 [2, 32, 32, 3]"),
    ):
        path = foreign(tmp_path / "a.onnx", dtype, shape)
        expected = f"expected one input, uint8 [N, 32, 32, 3], got {got}"
        with pytest.raises(ValueError, match=re.escape(expected)):
            compare(small, path, folder, runtimes=["onnxruntime"])
    path = foreign(tmp_path / "a.onnx", onnx.TensorProto.UINT8, [1, SIDE, SIDE, 3], outputs=2)
    with pytest.raises(ValueError, match=r"expected one output, float32 \[N, 10\], got float32 \["):
        compare(small, path, folder, runtimes=["onnxruntime"])


def test_bad_input(
    made: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, model = made(".onnx")
    (tmp_path / "damaged.onnx").write_bytes(b"nothing")
    (tmp_path / "damaged.tflite").write_bytes(b"nothing")
    (tmp_path / "empty").mkdir()
    for error, message, arguments in (
        (ValueError, r"MODEL: expected a name in \.onnx, .*got a\.pb", (small, "a.pb", folder)),
        (ValueError, r"MODEL: there is no .*none\.onnx", (small, tmp_path / "none.onnx", folder)),
        (int8.FileError, "student.onnx", (model, model, folder)),
        (DataError, "holds no images", (small, model, tmp_path / "empty")),
        (DataError, "30_broken.png cannot be read", (small, model, folder)),
        (DataError, "not one of 1 images", (small, model, [folder / "30_broken.png"])),
    ):
        with pytest.raises(error, match=message):
            compare(*arguments, skip_bad="not one" in message)
    for name in ("damaged.onnx", "damaged.tflite"):
        with pytest.raises(WorkerError, match=rf"{name}: (onnxruntime|litert)"):
            compare(small, tmp_path / name, folder)
    with pytest.raises(
        ValueError, match=r"runtimes: expected onnxruntime, openvino for \.onnx, got litert"
    ):
        compare(small, model, folder, runtimes=["litert"])
    monkeypatch.setattr(compare_runtimes, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"openvino is not installed: pip install openvino"):
        compare(small, model, folder, runtimes=["openvino"])
    models = {"onnxruntime": model, "ai_edge_litert": made(".tflite")[1]}
    monkeypatch.setattr("vitkd_fast._extras.find_spec", lambda name: None)
    for what, path in models.items():
        with pytest.raises(ImportError, match=rf'{what}.*pip install "vitkd-fast\[compare\]"'):
            compare(small, path, folder)


def test_a_runtime_that_dies(made: Any) -> None:
    small, model = made(".onnx")
    with Worker("onnxruntime", model, 1) as worker:
        assert worker.turn(np.zeros((SIDE, SIDE, 3), np.uint8), 3).logits.shape == (10,)
        os.kill(worker._process.pid, signal.SIGKILL)
        with pytest.raises(WorkerError, match=r"student\.onnx: onnxruntime ended"):
            worker.peak_bytes()
    with Worker(ENGINE, small, 1) as worker, pytest.raises(WorkerError, match="expected uint8"):
        worker.turn(np.zeros((4, 4, 3), np.uint8), 1)


def test_what_computes_nothing_is_not_counted() -> None:
    counted = compare_runtimes._counted(
        [("Conv", "float"), ("Reshape", "float"), ("QLinearConv", "uint8"), ("Conv", "bf16")]
    )
    assert counted == {"float": Counter(Conv=2), "int8": Counter(QLinearConv=1)}


def test_the_command(
    made: Any,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    small, model = made(".tflite")

    def vitkd(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vitkd", "compare", str(small), *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0), *capsys.readouterr()

    card = tmp_path / "a.html"
    code, out, _ = vitkd(str(model), str(folder), "-o", str(card), "--count", "10")
    assert code == 0 and "agreement %" in out and f"{card}, {tmp_path}/a.json" in out
    assert json.loads((tmp_path / "a.json").read_text())["images"]["count"] == 10
    code, out, _ = vitkd(str(model), str(folder), "--skip-bad", "--runtime", "litert")
    assert code == 0 and model.with_name("student.tflite.card.html").exists()
    for bad, why in ((tmp_path / "a.txt", "expected a name in .html"), ("no/a.html", "no folder")):
        code, _, err = vitkd(str(model), str(folder), "-o", str(bad))
        assert code == 2 and why in " ".join(err.split())
    code, _, err = vitkd("a.pb", str(folder))
    assert code == 1 and "expected a name in .onnx, .tflite, .pte, got a.pb" in err
