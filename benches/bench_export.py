"""Exported models in their runtimes, a family at a time: how near, what is in float, how fast.

`pytest benches/bench_export.py --benchmark-json=benches/results/cpu-export.json` makes the table of
docs/quickstart/compare.md (with benches/tables.py); export_networks.py says where weights are from.
A student is quantised with `portable=True`, but for OpenVINO, which has a profile of its own. Each
runtime's model of it is judged beside the engine with the same file, on 500 images: ImageNet's
photographs, or scans of digits at 64x64. Times are of one 224x224 image on one thread, CPU
time, in turns with the engine (of the file that is not portable), and with what that runtime's own
quantiser made of the same float student (int8_peers.py): `quantize_static`, NNCF, litert-torch with
ai-edge-quantizer.
Of what is not installed there is no row.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest

pytest.importorskip("timm")

import export_networks
import int8_peers
from bench_int8 import NORMALISED, folder, photographs
from int8_peers import PEERS
from turns import EXPORT, Contender
from vitkd_fast import export, int8
from vitkd_fast.export.compare import fidelity
from vitkd_fast.export.compare_runtimes import RUNTIMES
from vitkd_fast.int8 import reference

FAMILIES = (*export_networks.IMAGENET, *export_networks.DIGITS)
OWN = {  # a runtime's own quantiser, each of its variants
    "onnxruntime": ("onnxruntime int8", "onnxruntime int8 prepared"),
    "openvino": ("openvino int8",),
    "litert": ("litert int8", "litert-torch"),
}
CALIBRATION = {True: 32, False: 128}  # of photographs, of digits


@pytest.mark.parametrize("family", FAMILIES)
def bench_export(race, benchmark, capsys, tmp_path, family):
    if not folder():
        pytest.skip("VITKD_DATA is not set: it names the folder with the development data")
    trained = family in export_networks.IMAGENET
    if family == "efficientnet_lite0" and not find_spec(export_networks.LITE0):
        pytest.skip(f"no {export_networks.LITE0}")
    module = export_networks.network(family, folder())
    if trained:
        judges, labels = photographs()
        calibration = judges[:: len(judges) // CALIBRATION[trained]][: CALIBRATION[trained]]
    else:
        images, labels = export_networks.digits()
        judges, labels = images[: export_networks.JUDGES], labels[: export_networks.JUDGES]
        calibration = images[-CALIBRATION[trained] :]
    want = int8_peers.Network(family, module, judges).logits(judges)
    graphs, answers, rows = {}, {}, {}
    for portable in (True, False):
        graph = int8.quantize(module, calibration, **NORMALISED, portable=portable).graph
        graphs[portable], answers[portable] = graph, int8.load(graph)(judges)
        exact = reference.run(graph, judges[:2])
        np.testing.assert_array_equal(answers[portable][:2], exact)
    for name, runtime in RUNTIMES.items():
        if runtime.is_installed:
            portable = name != "openvino"
            graph, ours = graphs[portable], answers[portable]
            export.write(graph, path := tmp_path / f"judged{runtime.suffix}", profile=profile(name))
            model = runtime.open(path, 1)
            theirs = np.concatenate([model.run(image[None]) for image in judges])
            found = fidelity(ours, theirs, float(np.ptp(ours)) / 255)
            del found["histogram"]
            rows[name] = found | {
                "float_db": fidelity(want, theirs, 1.0)["sqnr_db"],
                "engine_float_db": fidelity(want, ours, 1.0)["sqnr_db"],
                "version": runtime.version,
                "portable": portable,
                "bytes": path.stat().st_size,
                "operators": model.operators(judges[:1]),
            }
    benchmark.extra_info |= {
        "family": family,
        "weights": "ImageNet" if trained else "digits",
        "image_size": judges.shape[1],
        "top1": 100 * float((answers[True].argmax(1) == labels).mean()),
        "exports": rows,
    }
    times(race, capsys, tmp_path, int8_peers.Network(family, module, judges[:1]), graphs, rows)


def profile(runtime: str) -> export.Profile:
    return "openvino" if runtime == "openvino" else "qdq"


def times(race, capsys, tmp_path, network, graphs, rows) -> None:
    """Adds the ratio of CPU times to each row: to the engine's, and to the runtime's own."""
    images = photographs()[0][::64]
    size = images.shape[1]
    if network.name not in export_networks.IMAGENET:
        images = export_networks.digits(size, len(images))[0]
    image = images[:1]
    larges = {key: replace(graph, image_size=size) for key, graph in graphs.items()}
    int8.file.save(larges[False], ours := tmp_path / "ours.safetensors")
    files = {"vitkd_fast": ours}
    # so few that its quantiser is quick: what it makes is as fast
    network = replace(network, images=images)
    if network.name == "mobilenetv2_100":
        network = int8_peers.trained_network(folder(), network.images)
    for name in rows:
        path = tmp_path / f"{name}{RUNTIMES[name].suffix}"
        export.write(larges[rows[name]["portable"]], path, profile=profile(name))
        files[f"{EXPORT}{name}"] = path
        for own in OWN.get(name, ()):
            if not PEERS[own].missing() and (made := PEERS[own].convert(network)):
                files[own] = made
    exact, want = int8.load(larges[False])(image), network.logits(image)

    def check(name, contender):
        got = contender()
        if name == "vitkd_fast":
            np.testing.assert_array_equal(got, exact)
        elif name.startswith(EXPORT):
            assert np.corrcoef(got.ravel(), exact.ravel())[0, 1] > 0.9, name
        else:
            assert np.corrcoef(got.ravel(), want.ravel())[0, 1] > 0.5, name

    with ExitStack() as stack:
        contenders = {
            name: stack.enter_context(Contender(name, file, image, threads=1))
            for name, file in files.items()
        }
        table = race(contenders, check=check, rounds=25, timed=lambda it: it.seconds(5, "cpu"))
    medians = {name: row["median_us"] / 1e3 for name, row in table.items()}
    for name, row in rows.items():
        row["ms"] = mine = medians[f"{EXPORT}{name}"]
        row["times_engine"] = mine / medians["vitkd_fast"]
        own = {peer: medians[peer] for peer in OWN.get(name, ()) if peer in medians}
        if own:
            row["own"] = min(own, key=own.__getitem__)
            row["own_over_ours"] = own[row["own"]] / mine
    with capsys.disabled():
        print()
        for name, row in rows.items():
            floats = sum(row["operators"]["float"].values()) if row["operators"] else "?"
            print(
                f"  {name:12} agreement {100 * row['agreement']:.1f}%, largest "
                f"{row['largest_steps']:.2f} steps, {floats} operators in float, "
                f"{row['times_engine']:.2f} of the engine's time, own "
                f"{row.get('own_over_ours', float('nan')):.2f} of ours ({row.get('own')})"
            )
