"""What `quantize` is given: images in any memory, mean and std, a model that normalises itself."""

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")

from support.int8_graphs import random_images  # noqa: E402
from support.int8_models import MEAN, PIXELS, STD, Block, logits_of, sqnr  # noqa: E402
from vitkd_fast import models  # noqa: E402
from vitkd_fast.int8 import file, load, quantize  # noqa: E402
from vitkd_fast.int8.graph import Array  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def block() -> nn.Module:
    torch.manual_seed(0)
    return Block().eval()


IMAGES = random_images(0, (24, 16, 16, 3))


def test_images_are_read_once_in_any_form(block: nn.Module) -> None:
    reads = 0

    def batches() -> Iterator[Any]:
        nonlocal reads
        for begin in range(0, 24, 7):
            reads += 1
            yield IMAGES[begin : begin + 7]

    expected = file.dump(quantize(block, IMAGES, **PIXELS).graph)
    assert file.dump(quantize(block, batches(), **PIXELS).graph) == expected
    assert reads == 4
    tensors = [torch.from_numpy(IMAGES[:20]), IMAGES[20:20], IMAGES[20:]]
    assert file.dump(quantize(block, tensors, image_size=16, **PIXELS).graph) == expected


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], r"got no images \(no batches\)"),
        ([IMAGES[:0]], r"got no images \(\[0, 16, 16, 3\]\)"),
        ([IMAGES.astype(np.float32)], r"got float32 \[24, 16, 16, 3\] as batch 0"),
        ([IMAGES.transpose(0, 3, 1, 2)], r"expected uint8 batches .*, got uint8 \[24, 3, 16, 16\]"),
        ([torch.zeros(1, 3, 16, 16, dtype=torch.uint8)], r"torch.uint8 \[1, 3, 16, 16\]"),
        ([torch.zeros(1, 16, 16, 3)], r"torch.float32 \[1, 16, 16, 3\]"),
        (
            [IMAGES, IMAGES[:, :8, :8]],
            r"\[24, 8, 8, 3\] as batch 1 after \[24, 16, 16, 3\]",
        ),
        ([IMAGES[:, :8]], r"\[24, 8, 16, 3\]"),
        (list(IMAGES), r"uint8 \[16, 16, 3\]"),
        ([(IMAGES, 0)], "got a tuple as batch 0"),
    ],
)
def test_refused_images(block: nn.Module, images: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(block, images, **PIXELS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"calibration": "entropy"},
            "calibration: expected one of mse, percentile, minmax, got 'entropy'",
        ),
        ({"mean": None}, "mean: expected .*, got None and a model without pretrained_cfg"),
        ({"std": None}, "std: expected .*, got None and"),
        ({"std": (1, 1, 0)}, r"std: expected three numbers in \(0, 1\], got \(1.0, 1.0, 0.0\)"),
        ({"std": (1, 1, -0.5)}, r"std: .*, got \(1.0, 1.0, -0.5\)"),
        ({"std": 0}, r"std: .*, got \(0.0, 0.0, 0.0\)"),
        ({"mean": (0.5, 0.5)}, r"mean: expected one number or three.*, got \(0.5, 0.5\)"),
        ({"mean": "half"}, "mean: expected one number or three.*, got 'half'"),
        (
            {"mean": (0.5, 0.5, None)},
            r"mean: expected three numbers .* got \(0.5, 0.5, nan\)",
        ),
        ({"mean": (0.5, 0.5, float("nan"))}, r"mean: .* got \(0.5, 0.5, nan\)"),
        ({"mean": (127.5,) * 3}, r"mean: .* got \(127.5, .* divide by 255 what is for"),
        ({"mean": 123.7, "std": 58.4}, r"mean: .*, got \(123.7, .* divide by 255"),
        ({"std": (58.4, 57.1, 57.4)}, r"std: .*, got \(58.4, .* divide by 255"),
        ({"std": float("inf")}, r"std: expected three numbers .*, got \(inf, inf, inf\)"),
        ({"crop_pct": 87.5}, "crop_pct: expected 0.1 to 2, got 87.5; divide a percentage by 100"),
        ({"crop_pct": 0}, "crop_pct: expected 0.1 to 2, got 0.0"),
        ({"crop_pct": float("nan")}, "crop_pct: expected .*, got nan"),
        ({"image_size": 32}, r"image_size 32, got uint8 \[24, 16, 16, 3\]"),
        ({"classes": ["a"]}, "classes: expected 5 names, one per logit, got 1"),
        ({"interpolation": "cubic"}, "interpolation: expected .*, got cubic"),
    ],
)
def test_refused_arguments(block: nn.Module, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(block, [IMAGES], **(PIXELS | arguments))


def test_one_number_stands_for_three(block: nn.Module) -> None:
    expected = file.dump(quantize(block, [IMAGES], mean=(0.5,) * 3, std=(0.25,) * 3).graph)
    for mean, std in ((0.5, 0.25), (np.float32(0.5), torch.tensor(0.25)), ([0.5], [0.25] * 3)):
        assert file.dump(quantize(block, [IMAGES], mean=mean, std=std).graph) == expected
    tensors = {"mean": torch.full((1, 3, 1, 1), 0.5), "std": np.full((3, 1, 1), 0.25)}
    assert file.dump(quantize(block, [IMAGES], **tensors).graph) == expected  # type: ignore[arg-type]


def test_images_in_any_memory(block: nn.Module) -> None:
    """Read backwards, in other orders of the axes, and read-only, as Pillow's arrays are."""
    mirrored = np.ascontiguousarray(IMAGES[:, :, ::-1, ::-1])
    expected = file.dump(quantize(block, mirrored, **PIXELS).graph)
    read_only = mirrored.copy()
    read_only.flags.writeable = False
    planes = np.ascontiguousarray(mirrored.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for images in (IMAGES[:, :, ::-1, ::-1], read_only, planes, np.asfortranarray(mirrored)):
            before = images.copy()
            graph = quantize(block, images, **PIXELS).graph
            assert file.dump(graph) == expected and np.array_equal(images, before)
            assert np.array_equal(load(graph)(images), load(graph)(mirrored))


@pytest.mark.parametrize("calibration", ["mse", "percentile", "minmax"])
def test_the_order_of_images_does_not_count(block: nn.Module, calibration: Any) -> None:
    """Of images whose maps differ in scale, in batches of any sizes."""
    images = (IMAGES * np.linspace(0.1, 1, 24)[:, None, None, None]).astype(np.uint8)[:16]
    expected = quantize(block, images, calibration=calibration, **PIXELS).graph
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(16)
        batches = np.split(images[order], [3, 4, 11])
        graph = quantize(block, batches, calibration=calibration, **PIXELS).graph
        assert file.dump(graph) == file.dump(expected)


# what the model normalises itself


@pytest.mark.parametrize(
    "own",
    [
        models.Normalize(MEAN, STD),
        torchvision.transforms.Normalize(MEAN, STD),
        nn.Sequential(
            models.Normalize((0, 0, 0), (1, 1, 1)), torchvision.transforms.Normalize(MEAN, STD)
        ),
    ],
    ids=["ours", "torchvision", "both"],
)
def test_a_model_that_normalises(block: nn.Module, own: nn.Module) -> None:
    """Is quantised as the bare one with its mean and std."""
    bare = quantize(block, [IMAGES], **PIXELS)
    model = nn.Sequential(own, block).eval()
    for arguments in ({}, PIXELS, {"mean": MEAN}):
        quantized = quantize(model, [IMAGES], **arguments)
        graph = quantized.graph
        assert np.allclose(graph.mean, MEAN, atol=1e-6) and np.allclose(graph.std, STD, atol=1e-6)
        assert graph.padding_bytes == bare.graph.padding_bytes
        assert [type(x) for x in graph.nodes] == [type(x) for x in bare.graph.nodes]
        logits = load(graph)(IMAGES)
        assert sqnr(load(bare.graph)(IMAGES), logits) > 35
        pixels = torch.from_numpy(IMAGES).permute(0, 3, 1, 2)
        takes_bytes = not isinstance(own, torchvision.transforms.Normalize)
        with torch.no_grad():
            expected = model(pixels if takes_bytes else pixels / 255).numpy()
        assert sqnr(expected, logits) > 30


def test_our_predictor(block: nn.Module) -> None:
    """With images' sizes that pad, and whatever an inner model's pretrained_cfg says."""
    pixels = models.Pixels(16, (0.5, 0.25, 0.0), (1.0, 0.5, 0.25), "bicubic", 0.9)
    model = models.predictor(block, pixels).eval()
    graph = quantize(model, [IMAGES], crop_pct=0.9, interpolation="bicubic").graph
    assert (graph.mean, graph.std) == (pixels.mean, pixels.std)
    assert graph.padding_bytes == (128, 64, 0)
    with torch.no_grad():
        expected = model(torch.from_numpy(IMAGES).permute(0, 3, 1, 2)).numpy()
    assert sqnr(expected, load(graph)(IMAGES)) > 30
    model.pretrained_cfg = {"mean": MEAN, "std": STD}
    assert quantize(model, [IMAGES]).graph.mean == pixels.mean


@pytest.mark.parametrize(
    ("own", "arguments", "message"),
    [
        (
            models.Normalize(MEAN, STD),
            {"mean": 0.5},
            r"mean: expected None or \(0.48.* itself \(0\), got \(0.5, ",
        ),
        (models.Normalize(MEAN, STD), {"mean": 0, "std": 1}, "mean: expected None or .*, got"),
        (
            models.Normalize(MEAN, (0.5,) * 3),
            PIXELS,
            r"std: .* None or \(0.5.*, got \(0.229, ",
        ),
        (models.Normalize((0.5,) * 3, (-0.5,) * 3), {}, r"0: expected .*, got x \* \[-0.00"),
        (models.Normalize((2.5,) * 3, (0.5,) * 3), {}, r"expected \(x - mean\) / std, of pixels"),
    ],
)
def test_normalisations_that_contradict(
    block: nn.Module, own: nn.Module, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(nn.Sequential(own, block).eval(), [IMAGES], **arguments)


def test_calibrations_of_little_worth(block: nn.Module) -> None:
    def warnings_of(images: Array) -> tuple[str, ...]:
        quantized = quantize(block, images, **PIXELS)
        text = str(quantized.report())
        assert all(f"warning: {x}" in text for x in quantized.report().warnings)
        return quantized.report().warnings

    assert warnings_of(IMAGES[:5])[0].startswith("calibrated on 5 images; 100 to 500 are recomm")
    assert warnings_of(IMAGES[:1])[0].startswith("calibrated on 1 image; ")
    assert "all 3 calibration images are the same" in warnings_of(IMAGES[[2, 2, 2]])
    shifted = np.concatenate([IMAGES[:1]] * 2 + [255 - IMAGES[:1]])
    assert not any("are the same" in x for x in warnings_of(shifted))
    many = random_images(3, (100, 16, 16, 3))
    assert all("sees the same class in all 100" in x for x in warnings_of(many))
    classes = len(np.unique(logits_of(block, many).argmax(1)))
    assert len(warnings_of(many)) == (classes == 1)


def test_the_model_says_how_it_wants_images(block: nn.Module) -> None:
    model = copy.deepcopy(block)
    model.pretrained_cfg = {
        "mean": (0.5, 0.25, 0.0), "std": (1.0, 0.5, 0.25), "crop_pct": 0.9,
        "interpolation": "bicubic",
    }  # fmt: skip
    graph = quantize(model, [IMAGES[:2]]).graph
    assert (graph.mean, graph.std) == ((0.5, 0.25, 0.0), (1.0, 0.5, 0.25))
    assert (graph.crop_pct, graph.interpolation) == (0.9, "bicubic")
    assert graph.padding_bytes == (128, 64, 0)
    graph = quantize(model, [IMAGES[:2]], crop_pct=1.0, interpolation="nearest").graph
    assert (graph.crop_pct, graph.interpolation) == (1.0, "nearest")
