"""The compiled engine gives the reference's bytes, on every instruction set.

With poisoned memory and node by node, so that a failure names the first node that differs.
"""

import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.int8_builder import FIELDS, ISAS, Builder, engine, images_for
from support.int8_graphs import random_graph
from vitkd_fast import int8
from vitkd_fast.int8 import file, reference
from vitkd_fast.int8.graph import Add, Array, Classifier, Graph, Pool, SqueezeExcite

pytestmark = pytest.mark.usefixtures("one_thread")


def run(session: Any, images: Array) -> Array:
    logits = np.full((len(images), session.classes), np.nan, np.float32)
    session.run(images, logits)
    return logits


def assert_equal(
    graph: Graph,
    images: Array,
    *,
    batches: Sequence[int] = (1, 2, 5),
    threads: Sequence[int] = (1, 2, 3),
    size: int | None = None,
) -> None:
    """Engine and reference agree in every byte, on every instruction set, with and without fuse."""
    size = size or graph.image_size
    maps = reference.outputs(graph, images)
    for isa in ISAS:
        for fuse in (True, False):
            what = f"{isa}, fuse={fuse}"
            session = engine(graph, isa=isa, fuse=fuse, image_size=size)
            for index, output in enumerate(session.activations(images[0])):
                # none for the classifier, and of a chain only the last
                if output is None or output.tobytes() == maps[index][0].tobytes():
                    continue
                wrong = np.argwhere(output != maps[index][0])
                at = tuple(wrong[0])
                pytest.fail(
                    f"{what}: node {index} ({graph.nodes[index].op}) is the first to differ, in "
                    f"{len(wrong)} of {output.size} bytes: {output[at]} at {list(map(int, at))}, "
                    f"the reference has {maps[index][0][at]}"
                )
            for count in threads:
                session = engine(graph, isa=isa, fuse=fuse, threads=count, image_size=size)
                for batch in batches:
                    logits = run(session, images[:batch])
                    same = logits.tobytes() == maps[-1][:batch].tobytes()
                    assert same, f"{what}, threads={count}, batch={batch}: logits differ"


# equality


@pytest.mark.parametrize("seed", range(16))
def test_random_graphs(seed: int) -> None:
    graph = random_graph(seed)
    assert_equal(file.read(file.dump(graph)), images_for(graph, 5))


@pytest.mark.parametrize(
    "name",
    ["mobilenetv1_100", "mobilenetv2_050", "mobilenetv3_small_050", "mobilenetv4_conv_small_050",
     "efficientnet_lite0"],
)  # fmt: skip
def test_families(name: str) -> None:
    """Quantized at 64 pixels, and run at an odd size."""
    pytest.importorskip("timm")
    from support.int8_models import PIXELS, create

    images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)
    graph = replace(int8.quantize(create(name), images, **PIXELS).graph, image_size=47)
    assert_equal(graph, images_for(graph, 3), batches=(1, 3), threads=(1, 2))


def test_more_images_than_a_head_takes_at_once() -> None:
    graph = random_graph(0)
    assert_equal(graph, images_for(graph, 19), batches=(9, 19), threads=(1, 2))


def test_a_stride_of_one_pixel_in_a_batch() -> None:
    b = Builder()
    b.conv(16, 3, inputs=(-1,), stride=(2, 2), padding="same")
    b.add(Pool, None, 16, ratio=1.0, zero_point=100)
    b.conv(24, stride=(3, 2))
    b.conv(7, cls=Classifier)
    graph = Graph(nodes=tuple(b.nodes), image_size=9, **FIELDS)
    assert_equal(graph, images_for(graph, 5))


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_small_maps(size: int) -> None:
    graph = random_graph(size, image_size=size)
    assert_equal(graph, images_for(graph, 2), batches=(2,), threads=(1, 2))


@pytest.mark.parametrize(("seed", "more"), [(0, 1), (1, 6), (2, 13), (3, 40), (4, -2)])
def test_other_sizes_than_the_files(seed: int, more: int) -> None:
    graph = random_graph(seed)
    size = graph.image_size + more
    images = images_for(graph, 2, size)
    want = reference.run(graph, images)
    assert int8.load(file.dump(graph), image_size=size)(images).tobytes() == want.tobytes()
    assert_equal(graph, images, batches=(2,), threads=(2,), size=size)


@pytest.mark.parametrize("seed", range(6))
def test_chains(seed: int) -> None:
    """Maps too large to stay near, so that nodes are fused and keep only some rows."""
    b = Builder(seed)
    rng = b.rng
    size, channels = int(rng.integers(115, 135)), (17, 24, 32)
    b.conv(int(rng.choice(channels)), 3, inputs=(-1,), padding="same")
    first = len(b.nodes) - 1
    for _ in range(2):
        start = b.conv(int(rng.choice(channels)), 1, inputs=(len(b.nodes) - 1,))
        for _ in range(3):
            kernel = int(rng.choice([1, 2, 3, 5]))
            half = (kernel - 1) // 2
            odd = (half, kernel - 1 - half, kernel - 1 - half, half)
            padding: Any = ["same", odd][rng.integers(2)]
            hardswish: Any = {"hardswish_scale": 3.0, "zero_point": 7}
            b.conv(None, kernel, padding=padding, **hardswish if rng.random() < 0.3 else {})
        last = len(b.nodes) - 1
        b.conv(b.channels[start + 1], inputs=(last, start), residual_multiplier=0.75)
    stride = ((1, 1), (2, 2), (1, 2), (2, 1), (3, 1), (5, 5))[seed]
    b.conv(None, 2 if seed == 5 else 3, stride=stride, padding="same")
    b.conv(20, 3 if seed % 2 else 1, stride=stride)
    assert first == 0
    graph = b.graph(size)
    assert engine(graph).steps < len(graph.nodes) == engine(graph, fuse=False).steps
    assert_equal(graph, images_for(graph, 2), batches=(1, 2), threads=(1, 3))


@pytest.mark.parametrize("seed", range(4))
def test_fine_maps(seed: int) -> None:
    """Written and read by 1x1 and 3x3 products and as residuals, at the image's size and the head.

    The first maps are too large to stay near, so that chains keep some rows of fine ones.
    """
    b = Builder(seed)
    rng, fine = b.rng, {"fine": True, "zero_point": int(b.rng.integers(40, 200))}
    size, channels = int(rng.integers(60, 135)), (5, 16, 17, 24, 40, 65)
    out = [int(c) for c in rng.choice(channels, 3)]
    b.conv(out[0], 3, inputs=(-1,), padding="same", **fine)
    b.conv(out[1], **fine)
    start = b.conv(out[1], 3, padding=(1, 1, 1, 1), **fine)
    b.conv(33)
    for more in (fine, {}, fine):  # fine to fine, fine to bytes, bytes to fine
        last = len(b.nodes) - 1
        start = b.conv(out[1], inputs=(last, start), residual_multiplier=0.75, **more)
    b.conv(None, 3, stride=(2, 2), padding="same")  # as a map of twice the channels
    b.conv(out[2], 3, stride=(2, 3), **fine)
    b.conv(160, stride=(1, 2), lo=30, hi=220, **fine)
    b.add(Pool, None, b.channels[-1], ratio=1.0, zero_point=100)
    head = b.conv(24, **fine)
    b.conv(24, inputs=(head, head), residual_multiplier=-0.625, **fine)
    b.conv(7, cls=Classifier)
    graph = Graph(nodes=tuple(b.nodes), image_size=size, **FIELDS)
    assert_equal(file.read(file.dump(graph)), images_for(graph, 3), batches=(1, 3))


@pytest.mark.parametrize("kernel", [7, 31])
def test_large_kernels(kernel: int) -> None:
    b = Builder(kernel)
    uneven = (kernel - 1, 0, 3, kernel // 2)
    b.conv(19, kernel, inputs=(-1,), stride=(2, 1), padding=uneven)
    b.conv(None, kernel, padding="same")
    b.conv(None, kernel, stride=(3, 2), padding=uneven)
    b.conv(None, kernel, stride=(1, 8), padding="same")
    b.conv(35, kernel, padding=(kernel - 1, kernel - 1, 5, kernel // 2))
    graph = b.graph(40)
    assert_equal(graph, images_for(graph, 2), batches=(2,), threads=(1, 2))


@pytest.mark.parametrize("value", ["127", "-127", "pairs", "signs"])
@pytest.mark.parametrize("hardswish", [False, True])
def test_extreme_weights(value: str, hardswish: bool) -> None:
    """Weights and inputs as large as they get, sums over 2^22 and 2^24, multipliers of 24 bits.

    A pair of products of 127 and 255 leaves 16 bits.
    """
    b = Builder(5)
    signs = np.random.default_rng(1)

    def weight(*shape: int) -> Array:
        if value == "signs":
            return signs.choice([-127, 127], shape)
        # in pairs: what saturates is followed by what takes it back
        pair = np.where(np.arange(shape[-1]) % 4 < 2, 127, -127)
        return np.broadcast_to(pair if value == "pairs" else int(value), shape)

    full = np.float32(1e-6).view(np.uint32) | np.uint32(0xFFF)
    fields: dict[str, Any] = {"multiplier": full.view(np.float32), "zero_point": 128}
    if hardswish:
        fields |= {"hardswish_scale": float(np.float32(0.7))}
    # 0 or 255 in each channel
    b.conv(160, inputs=(-1,), weight=weight(160, 1, 1, 3), bias=0, multiplier=1.0, zero_point=0)
    b.conv(160, inputs=(0,), weight=weight(160, 1, 1, 160), bias=0, **fields)
    b.conv(34, 3, inputs=(0,), weight=weight(34, 3, 3, 160), bias=0, padding="same", **fields)
    b.conv(None, 7, inputs=(0,), weight=weight(7, 7, 160), bias=0, padding="same", **fields)
    b.conv(None, 31, inputs=(0,), weight=weight(31, 31, 160), bias=0, padding="same", **fields)
    residual = {} if hardswish else {"residual_multiplier": float(np.float32(0.3))}
    b.conv(160, inputs=(3,) if hardswish else (3, 4), **residual, **fields)
    b.add(Pool, (0,), 160, ratio=255.0, zero_point=0)
    b.conv(18, cls=Classifier, weight=weight(18, 160), bias=2**24 + 1, multiplier=1.0)
    graph = Graph(nodes=tuple(b.nodes), image_size=9, **FIELDS)
    images = images_for(graph, 3)
    images[0], images[1] = 255, np.random.default_rng(0).choice([0, 255], images[1].shape)
    assert_equal(graph, images, batches=(3,), threads=(1,))


def test_ties() -> None:
    """Halves in every epilogue, also below zero: to even, and the zero point is added after."""
    b = Builder()
    b.conv(48, inputs=(-1,), weight=np.eye(48, 3).reshape(48, 1, 1, 3), bias=0, multiplier=1.0,
           zero_point=0)  # fmt: skip
    eye = np.eye(48).reshape(48, 1, 1, 48)
    half: dict[str, Any] = {"bias": -128, "multiplier": 0.5}
    b.conv(48, inputs=(0,), weight=eye, zero_point=101, **half)
    b.conv(48, inputs=(0,), weight=eye, hardswish_scale=0.125, bias=-5, multiplier=0.5)
    b.conv(48, inputs=(0, 1), weight=eye, residual_multiplier=0.25, zero_point=7, **half)
    b.conv(None, inputs=(0,), weight=1, zero_point=101, **half)
    b.conv(None, inputs=(0,), weight=1, hardswish_scale=0.125, bias=-5, multiplier=0.5)
    b.add(Add, (0, 1), 48, multipliers=(0.5, -0.25), zero_point=101)
    gates = {"q1": np.zeros((48, 48), np.int8), "q2": np.zeros((48, 48), np.int8)}
    gates |= {"s1": np.ones(48, np.float32), "s2": np.ones(48, np.float32)}
    gates |= {"b1": np.zeros(48, np.float32), "b2": np.zeros(48, np.float32)}  # each is 1/2
    b.add(SqueezeExcite, (0,), 48, scale=1.0, ratio=1.0, zero_point=1, **gates)
    b.add(Add, (7, 2), 48, multipliers=(0.5, 0.5), zero_point=3)
    b.add(Pool, None, 48, ratio=8.0, zero_point=1)  # 16 x 16 pixels: the sum / 32
    b.conv(5, cls=Classifier)
    graph = Graph(nodes=tuple(b.nodes), image_size=16, **FIELDS)
    images = np.arange(2 * 16 * 16 * 3).astype(np.uint8).reshape(2, 16, 16, 3)
    q = reference.outputs(graph, images)[1].astype(int)[..., 0]
    assert np.array_equal(q, np.rint((images[..., 0].astype(int) - 128) / 2) + 101)
    assert_equal(graph, images, batches=(2,), threads=(1, 2))


@pytest.mark.parametrize("channels", [16, 32, 48, 100])
@pytest.mark.parametrize("zero_point", [0, 101, 102])
@pytest.mark.parametrize("multiplier", [2**-16, 255 / 2**16, 0.25, 1.0, 4.0, 3e-3])
def test_multipliers_of_few_bits(channels: int, zero_point: int, multiplier: float) -> None:
    """Multiples of 2^-16 let a sum become a byte without a conversion, if it fits 16 bits.

    Ties, every byte and its neighbours beyond the ends, and sums just below and above 16 bits.
    """
    b, some = Builder(), np.arange(channels)
    fields: dict[str, Any] = {"multiplier": multiplier, "zero_point": zero_point}
    # 0 to 255 in each channel
    b.conv(channels, inputs=(-1,), weight=np.tile([1, 0, 0], (channels, 1, 1, 1)), bias=0,
           multiplier=1.0, zero_point=0)  # fmt: skip
    sign = np.where(some % 2, 1, -1)
    eye = (np.eye(channels) * sign).reshape(channels, 1, 1, channels)
    middle = round((128 - zero_point) / multiplier)
    for most in (300, 31_900, 32_100, 70_000):
        # steps of one in the sums, or as wide as bytes and weights allow
        large = int(min(most / multiplier, 2**22))
        near = np.where(some % 3, middle, large * sign)
        b.conv(channels, inputs=(0,), weight=eye, bias=near, **fields)
        b.conv(channels, inputs=(0,), weight=eye * 127, bias=near - 127 * 128 * sign, **fields)
        for kernel, stride in ((3, 1), (3, 2), (5, 1)):
            weight = np.zeros((kernel, kernel, channels))
            weight[1, 1] = sign
            weight[0, 2] = 3
            b.conv(None, kernel, inputs=(0,), weight=weight, bias=near, padding="same",
                   stride=(stride, stride), lo=zero_point // 2, hi=250 - most // 1000,
                   **fields)  # fmt: skip
    graph = b.graph(16)
    images = np.arange(2 * 16 * 16 * 3).astype(np.uint8).reshape(2, 16, 16, 3)
    images[0, ..., 0] = np.arange(256).reshape(16, 16)
    assert_equal(graph, images, batches=(2,), threads=(1,))


@pytest.mark.parametrize("what", ["add", "residual", "hardswish", "squeeze_excite"])
def test_values_beyond_int32_are_refused_and_below_are_equal(what: str) -> None:
    """An x86 conversion of 2^31 gives -2^31, another machine's does not."""

    def graph(power: int) -> Graph:
        b, huge = Builder(), 2.0**power
        b.conv(16, inputs=(-1,))
        some = np.ones(16, np.float32)
        if what == "add":
            b.add(Add, (0, 0), 16, multipliers=(huge, -0.5))
        elif what == "residual":
            b.conv(16, inputs=(0, 0), residual_multiplier=huge)
        elif what == "hardswish":
            b.conv(16, hardswish_scale=huge, bias=0, weight=127, multiplier=2.0**-12)
        else:
            q = np.ones((16, 16), np.int8)
            fields = {"q1": q, "q2": q, "s1": some, "s2": some, "b1": some, "b2": some}
            b.add(SqueezeExcite, (0,), 16, scale=1.0, ratio=huge, **fields)
        return b.graph(5)

    assert_equal(graph(19), images_for(graph(19), 1), batches=(1,), threads=(1,))
    with pytest.raises(int8.FileError, match=r"^node 1 \(node1\): "):
        int8.load(graph(30))


def test_trained_network(data: Path) -> None:
    """A MobileNetV2 trained on ImageNet, on photographs."""
    timm, images = pytest.importorskip("timm"), pytest.importorskip("PIL.Image")
    with zipfile.ZipFile(data / "imagenet-sample-a.zip") as archive:
        names = [name for name in archive.namelist() if name.endswith(".JPEG")][::60]
        files = [images.open(archive.open(name)).convert("RGB") for name in names]
        photographs = np.stack([np.array(file.resize((224, 224))) for file in files])
    weights = str(data / "mobilenetv2_100.tf_in1k.safetensors")
    model = timm.create_model("mobilenetv2_100", pad_type="same", checkpoint_path=weights).eval()
    graph = int8.quantize(model, photographs, mean=(0.5,) * 3, std=(0.5,) * 3).graph
    want = reference.run(graph, photographs[:2])
    for isa in ISAS:
        assert np.array_equal(int8.load(graph, isa=isa)(photographs[:2]), want), isa
