"""The int8 engine beside other engines on the CPU: time, loading, memory, and what rounding costs.

All take turns on the same images, each in a process of its own (turns.py; int8_peers.py says how
each was quantised); those that are not installed are left out and named. One thread is timed by
CPU time, which other work on the machine does not change, several by the wall clock. Ours must
first give the bytes of the reference, the others the float model's top answers, and every layer
that a peer says is int8 must run so. VITKD_DATA names the folder with a
MobileNetV2 trained on ImageNet and 500 images; without it weights are random and images are
noise, which is as slow, and fidelity is not measured. The roof that is printed is a loop of
vpdpbusd, measured in the same run; what uses AMX may be above it.
"""

from __future__ import annotations

import functools
import io
import itertools
import json
import os
import statistics
import zipfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("timm")

from PIL import Image

import int8_peers
from int8_peers import PEERS, Network
from turns import Contender
from vitkd_fast import _int8, int8
from vitkd_fast.int8 import reference
from vitkd_fast.int8.graph import Classifier, Conv, Depthwise, Graph, SqueezeExcite, padding_of

MODELS = ("mobilenetv2_100", "mobilenetv3_large_100", "mobilenetv4_conv_small")
CASES = [
    pytest.param(
        model, batch, threads, limit, id=f"cpu-{model}, batch {batch}, {threads} thread(s){ending}"
    )
    for model in MODELS
    for batch, threads, limit, ending in (
        (1, 1, "", ""),
        (8, 1, "", ""),
        (1, 2, "", ""),
        (1, 1, "avx2", ", AVX2"),
        (1, 1, "avxvnni", ", AVX-VNNI"),
        (1, 1, "avx512vnni", ", AVX-512 VNNI"),
    )
]
NORMALISED = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}  # as int8_peers.Pixels
FOLDS = 4
FAITHFUL = [name for name in PEERS if " int8" in name and name != "torchao int8"]


@functools.cache
def folder() -> Path | None:
    return Path(name) if (name := os.environ.get("VITKD_DATA")) else None


@functools.cache
def photographs() -> tuple[np.ndarray, np.ndarray]:
    """500 ImageNet images, uint8 [500, 224, 224, 3], in the order of their names; classes."""
    index = json.loads((folder() / "imagenet_wnid_to_index.json").read_text())
    images, classes = [], []
    with zipfile.ZipFile(folder() / "imagenet-sample-a.zip") as archive:
        for name in sorted(n for n in archive.namelist() if n.endswith(".JPEG")):
            image = Image.open(io.BytesIO(archive.read(name))).convert("RGB")
            enlarged = [round(256 * side / min(image.size)) for side in image.size]
            image = image.resize(enlarged, Image.Resampling.BICUBIC)
            left, top = ((side - 224) // 2 for side in enlarged)
            images.append(np.asarray(image.crop((left, top, left + 224, top + 224))))
            classes.append(index[Path(name).name.split("_")[0]])
    return np.stack(images), np.array(classes)


@functools.cache
def network(model: str) -> Network:
    if folder():
        images = photographs()[0][::16]
        if model == "mobilenetv2_100":
            return int8_peers.trained_network(folder(), images)
    else:
        images = int8_peers.smooth_images(32)
    return int8_peers.random_network(model, images)


@functools.cache
def ours(model: str) -> int8.QuantizedModel:
    return int8.quantize(network(model).module, network(model).images, **NORMALISED)


def others(net: Network, capsys, names=tuple(PEERS)) -> dict[str, Path]:
    """The engines that can run here, and the model's file for each."""
    reasons = {name: PEERS[name].missing() for name in names}
    absent = [name for name, reason in reasons.items() if reason]
    if absent:
        why = "; ".join(sorted(set(filter(None, reasons.values()))))
        with capsys.disabled():
            print(f"\n  left out: {', '.join(absent)} ({why})")
    files = {name: PEERS[name].convert(net) for name in names if name not in absent}
    return {name: file for name, file in files.items() if file}


def multiply_adds(graph: Graph) -> int:
    """Of one image."""
    count, sides = 0, {-1: graph.image_size}
    for index, node in enumerate(graph.nodes):
        side = sides[node.inputs[0]]
        if isinstance(node, Conv | Depthwise):
            kernel = node.weight.shape[1 if isinstance(node, Conv) else 0]
            before, after = padding_of(side, kernel, node.stride[0], node.padding, 0)
            side = (side + before + after - kernel) // node.stride[0] + 1
            count += side * side * node.weight.size
        elif isinstance(node, Classifier):
            count += node.weight.size
        elif isinstance(node, SqueezeExcite):
            count += node.w1.size + node.w2.size
        sides[index] = side
    return count


def layers(module: torch.nn.Module) -> int:
    """Its convolutions and matrix products."""
    return sum(isinstance(m, torch.nn.Conv2d | torch.nn.Linear) for m in module.modules())


@pytest.mark.parametrize(("model", "batch", "threads", "limit"), CASES)
def bench_call(race, benchmark, capsys, tmp_path, model, batch, threads, limit):
    if limit and limit not in int8.isa():
        pytest.skip(f"this CPU has no {limit}")
    torch.set_num_threads(threads)
    net, graph = network(model), ours(model).graph
    images = np.ascontiguousarray(net.images[:batch])
    ours(model).save(path := tmp_path / "ours.safetensors")
    # oneDNN alone can be held to an instruction set, and none of these has bf16
    names = [
        name
        for name, peer in PEERS.items()
        if not limit or (name.startswith("openvino") and not peer.needs_bf16)
    ]
    files = {"vitkd_fast": path} | others(net, capsys, names)
    want, exact = net.logits(images), reference.run(graph, images)
    found, clock = {}, "cpu" if threads == 1 else "wall"

    def check(name, contender):
        got = contender()
        if name == "vitkd_fast":
            np.testing.assert_array_equal(got, exact)
            return
        likeness = np.corrcoef(got.ravel(), want.ravel())[0, 1]
        assert likeness > (0.9999 if name.endswith("fp32") else 0.7), f"{name}: {likeness}"
        found[name] = dict(contender.layers())
        if name in FAITHFUL:  # torchao leaves some in float, wherever it is asked
            assert found[name] == {"int8": layers(net.module)}, f"{name}: {found[name]}"

    with ExitStack() as stack:
        contenders = {
            name: stack.enter_context(Contender(name, file, images, threads, limit))
            for name, file in files.items()
        }
        table = race(
            contenders,
            check=check,
            rounds=15,
            timed=lambda contender: contender.seconds(8 // batch, clock),
        )
    medians = {name: row["median_us"] / 1e3 for name, row in table.items()}
    mine = medians.pop("vitkd_fast")
    rate, peak = batch * multiply_adds(graph) / mine / 1e6, _int8.vnni_peak(0.3) / 1e9 * threads
    row = {"ms": mine, "clock": clock, "isa": limit or int8.isa()[0], "gmac_per_s": rate}
    if medians:
        first = min(medians, key=medians.__getitem__)
        row |= {"best_peer": first, "best_peer_over_ours": medians[first] / mine}
    if peak and not limit:
        row |= {"vpdpbusd_gmac_per_s": peak, "percent_of_vpdpbusd": 100 * rate / peak}
    benchmark.extra_info |= row | {"layers": found, "best": int8_peers.best(medians)}
    with capsys.disabled():
        print("  " + "; ".join(f"{k} {v if str(v) == v else f'{v:.3g}'}" for k, v in row.items()))


@pytest.mark.parametrize("model", MODELS)
def bench_layers(benchmark, capsys, model):
    """Each layer's share of a call on one image, one thread, beside what it should take.

    Counted is the time of its multiply-adds at the peak of vpdpbusd and of 1.75 instructions per 16
    outputs on two ports, as before a ReLU; tiles (AMX) multiply up to eight times as fast.
    """
    session, image = int8.load(ours(model).graph), network(model).images[:1]
    profile = session.profile(image, rounds=20)
    peak = _int8.vnni_peak(0.3) / 1e9
    rows = {}
    for n in profile.layers:
        multiplied = n.gmacs * n.us / peak
        finished = np.prod(n.shape) * 1.75 / 32 * 0.128 / peak
        rows[n.name] = {"kernel": n.kernel, "us": n.us, "counted_us": multiplied + finished}
    benchmark.extra_info |= {"layers": rows, "vpdpbusd_gmac_per_s": peak}
    with capsys.disabled():
        print(f"\n{model}, vpdpbusd loop {peak:.0f} GMAC/s\n{profile}")
        for name, row in rows.items():
            print(f"{name:44} {row['us']:8.1f} us, counted {row['counted_us']:8.1f}")
    benchmark.pedantic(lambda: session(image), rounds=3)


@pytest.mark.parametrize(("channels", "side"), [(64, 56), (128, 28), (384, 14)])
@pytest.mark.parametrize("kernel", [3, 5])
def bench_depthwise(benchmark, capsys, channels, side, kernel):
    """Eight depthwise convolutions of stride 1, one after another, by their profile.

    Epilogue included; what one writes is in L2 when the next reads it. Of the peak, which is the
    best of many tries, is given the best of 700 rounds and the median one.
    """
    if "avx512vnni" not in int8.isa():
        pytest.skip("needs AVX-512 VNNI")
    images = int8_peers.smooth_images(8, 2 * side)
    depthwise = functools.partial(
        nn.Conv2d, channels, channels, kernel, padding="same", groups=channels
    )
    blocks = [layer for _ in range(8) for layer in (depthwise(), nn.ReLU())]
    first = [nn.Conv2d(3, channels, 3, stride=2, padding=1), nn.ReLU()]
    last = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 7)]
    model = nn.Sequential(*first, *itertools.chain(*blocks), *last).eval()
    graph = int8.quantize(model, images, **NORMALISED).graph
    session = int8.load(graph, isa="avx512vnni")
    image = images[:1]
    np.testing.assert_array_equal(session(image), reference.run(graph, image))
    rates, peaks = [], []
    for _ in range(7):
        for _ in range(100):
            layers = session.profile(image, rounds=1).layers[1:9]
            rates.append(statistics.median(layer.gmacs for layer in layers))
        peaks.append(_int8.vnni_peak(0.05) / 1e9)
    best, median = (100 * of(rates) / max(peaks) for of in (max, statistics.median))
    benchmark.extra_info |= {"percent_of_vpdpbusd": best, "median_percent": median}
    benchmark.extra_info |= {"gmac_per_s": max(rates), "vpdpbusd_gmac_per_s": max(peaks)}
    with capsys.disabled():
        print(f"\n{benchmark.name}: {best:.1f}% of the peak of vpdpbusd, median {median:.1f}%")
    benchmark.pedantic(lambda: session.profile(image), rounds=3)


def bench_load(race, capsys, tmp_path):
    """From a file to a session that has not run yet."""
    model = "mobilenetv2_100"
    net, path, images = network(model), tmp_path / "ours.safetensors", network(model).images[:1]
    ours(model).save(path)
    contenders = {"vitkd_fast": lambda: int8.load(path)}
    for name, file in others(net, capsys).items():
        if name != "torchao int8":  # it compiles, for seconds
            contenders[name] = functools.partial(PEERS[name].open, file, net.pixels, 1, 1)

    def check(name, contender):
        if name == "vitkd_fast":
            exact = reference.run(ours(model).graph, images)
            np.testing.assert_array_equal(contender()(images), exact)

    race(contenders, check=check, rounds=20)


def bench_memory(benchmark, capsys, tmp_path):
    """What a process holds (VmRSS) after one image, MB; `numpy` has loaded no engine."""
    path, net = tmp_path / "ours.safetensors", network("mobilenetv2_100")
    ours("mobilenetv2_100").save(path)
    files = {"vitkd_fast": path, "numpy": path} | others(net, capsys)
    files.pop("torchao int8", None)  # torch alone holds more than all others

    def resident(name: str) -> float:
        with Contender(name, files[name], net.images[:1], threads=1) as contender:
            return contender.resident_mb()

    table = benchmark.extra_info["resident_mb"] = {name: resident(name) for name in files}
    with capsys.disabled():
        print("\nresident MB\n" + "\n".join(f"  {n:22} {mb:8.1f}" for n, mb in table.items()))
    benchmark.pedantic(resident, args=("vitkd_fast",), rounds=1)


def bench_fidelity(benchmark, capsys):
    """Logits beside the float model's; a fold calibrates on a quarter and is tried on the rest.

    top-1 and its agreement with the float model's: percent. SQNR: 10 log10(sum ref^2 / sum (y -
    ref)^2), dB, the mean over images and that of all images at once.
    """
    if not folder():
        pytest.skip("VITKD_DATA is not set: it names the folder with the development data")
    images, classes = photographs()
    want = int8_peers.trained_network(folder(), images[:1]).logits(images)
    rows: dict[str, list[list[float]]] = {}
    for fold in range(FOLDS):
        held = np.arange(len(images)) % FOLDS != fold
        net = int8_peers.trained_network(folder(), images[~held])
        mine = int8.quantize(net.module, net.images, **NORMALISED).graph
        session = int8.load(mine)
        logits = {"vitkd_fast": session(images[held])}
        np.testing.assert_array_equal(
            logits["vitkd_fast"][:4], reference.run(mine, images[held][:4])
        )
        for name, file in others(net, capsys, FAITHFUL).items():
            peer = PEERS[name].open(file, net.pixels, 1, 1)
            each = [peer(peer.prepare(p[None])).copy() for p in images[held]]
            logits[name] = np.concatenate(each)
        for name, got in logits.items():
            rows.setdefault(name, []).append(fidelity(got, want[held], classes[held]))
    keys = ("top-1", "agreement", "SQNR mean", "SQNR all")
    top1 = benchmark.extra_info["float top-1"] = 100 * float((want.argmax(1) == classes).mean())
    benchmark.extra_info["fidelity"] = {
        name: dict(zip(keys, np.mean(folds, 0).tolist(), strict=True)) | {"folds": folds}
        for name, folds in rows.items()
    }
    with capsys.disabled():
        print(
            f"\nfold by fold, then their mean; the float model's top-1 is {top1:.2f}\n{'':22}"
            + "".join(f"{key:>34}" for key in keys)
        )
        for name, folds in rows.items():
            cells = ("  ".join(f"{v:5.2f}" for v in column) for column in zip(*folds, strict=True))
            print(f"  {name:20}" + "".join(f"{cell:>34}" for cell in cells))
            print(f"  {'':20}" + "".join(f"{v:34.2f}" for v in np.mean(folds, 0)))
    benchmark.pedantic(lambda: session(images[:1]), rounds=3)


def fidelity(got: np.ndarray, want: np.ndarray, classes: np.ndarray) -> list[float]:
    signal, noise = (want**2).sum(1, dtype=np.float64), ((got - want) ** 2).sum(1, dtype=np.float64)
    each, whole = 10 * np.log10(signal / noise), 10 * np.log10(signal.sum() / noise.sum())
    found = got.argmax(1)
    return [
        100 * float((found == classes).mean()),
        100 * float((found == want.argmax(1)).mean()),
        float(each.mean()),
        float(whole),
    ]
