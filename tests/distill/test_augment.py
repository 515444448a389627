"""Augmentation: timm's crops, Pillow's pixels, and draws that depend on (seed, epoch, index)."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from timm.data import create_transform, random_erasing, transforms
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import ColorJitter

from support.pillow_tools import rows_first
from vitkd_fast import _int8
from vitkd_fast.distill.augment import Augment, bits, boxes, colours, draw, erasures, uniform
from vitkd_fast.distill.config import Augmentation, ConfigError, Data

INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")


def noise(rng: np.random.Generator, height: int, width: int) -> Any:
    """Of all levels, or black and white, which overshoots most."""
    if rng.random() < 0.3:
        return np.uint8(255) * rng.integers(2, size=(height, width, 3), dtype=np.uint8)
    return rng.integers(256, size=(height, width, 3), dtype=np.uint8)


def by_pillow(frame: Any, box: Any, size: tuple[int, int], interpolation: str) -> Any:
    """Height and width of the result by Pillow 12's crop, resize and flip."""
    top, left, height, width, flip = (int(x) for x in box)
    image = Image.fromarray(frame).crop((left, top, left + width, top + height))
    resampled = rows_first(image).resize(size[::-1], Image.Resampling[interpolation.upper()])
    return np.asarray(resampled)[:, :: -1 if flip else 1]


def random_box(rng: np.random.Generator, height: int, width: int) -> list[int]:
    h, w = int(rng.integers(1, height + 1)), int(rng.integers(1, width + 1))
    top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
    return [int(top), int(left), h, w, int(rng.integers(2))]


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_crops_are_pillow_12s(interpolation: str) -> None:
    rng = np.random.default_rng(0)
    for i in range(60):
        most = (5, 40, 200)[i % 3]
        size = int(rng.integers(1, 70)), int(rng.integers(1, 70))
        frames = [noise(rng, *rng.integers(1, most + 1, 2)) for _ in range(3)]
        frames[1] = frames[1][::-1]  # bottom up
        frames[2] = frames[2][:, : max(1, frames[2].shape[1] // 2)]  # rows that lie apart
        drawn = np.array([random_box(rng, *frame.shape[:2]) for frame in frames])
        expected = np.stack(
            [by_pillow(x, b, size, interpolation) for x, b in zip(frames, drawn, strict=True)]
        )
        for isa in _int8.isa():
            out = np.full_like(expected, 77)
            _int8.crop(frames, drawn, interpolation=interpolation, isa=isa, out=out)
            assert np.array_equal(out, expected), (isa, drawn, size)


def test_crop_reads_nothing_behind_an_image() -> None:
    """The last row lies at the end of a page, behind which nothing is mapped."""
    code = """
import ctypes, mmap, numpy as np
from vitkd_fast import _int8
page = mmap.PAGESIZE
pages = mmap.mmap(-1, 2 * page)
address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.mprotect(ctypes.c_void_p(address + page), page, 0) == 0
every = np.frombuffer(pages, np.uint8)
for height, width in ((1, 1), (3, 2), (7, 5), (9, 33), (20, 60)):
    frame = every[page - 3 * height * width : page].reshape(height, width, 3)
    for isa in _int8.isa():
        for top in range(height):
            for left in range(0, width, 3):
                box = np.array([[top, left, height - top, width - left, 0]])
                out = np.empty((1, 9, 9, 3), np.uint8)
                _int8.crop([frame], box, interpolation="bicubic", isa=isa, out=out)
                whole = np.empty_like(out)
                _int8.crop([frame.copy()], box, interpolation="bicubic", isa=isa, out=whole)
                assert np.array_equal(out, whole)
print("read", flush=True)
import os; os._exit(0)  # a view keeps the map from being closed
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "read\n"), done.stderr


def test_crop_refuses_what_it_cannot_read() -> None:
    frame, out = np.zeros((4, 6, 3), np.uint8), np.empty((1, 5, 5, 3), np.uint8)

    def crop(frames: Any = (frame,), box: Any = (0, 0, 4, 6, 0), by: str = "bicubic") -> None:
        _int8.crop(list(frames), np.array([box]), interpolation=by, out=out)

    crop()
    for box in ((1, 0, 4, 6, 0), (0, 1, 4, 6, 0), (-1, 0, 2, 2, 0), (0, -1, 2, 2, 0), (0,) * 5):
        with pytest.raises(ValueError, match=r"box: expected .* within \[4, 6\], got "):
            crop(box=box)
    with pytest.raises(ValueError, match="box: expected"):
        crop(box=(2**62, 0, 2**62, 1, 0))
    for frames in ((frame, frame), (), (frame[0],), (frame[:, ::2],), (frame[..., :1],)):
        with pytest.raises(ValueError, match="of the wrong shape"):
            crop(frames)
    for other in (frame.astype(np.int8), frame.astype(np.float32), None, "x"):
        with pytest.raises(ValueError, match="a frame is not of uint8"):
            crop((other,))
    with pytest.raises(ValueError, match="interpolation: expected one of"):
        crop(by="cubic")


def test_crop_runs_in_threads() -> None:
    rng = np.random.default_rng(0)
    frames = [noise(rng, 90, 120) for _ in range(8)]
    drawn = np.array([random_box(rng, 90, 120) for _ in frames])
    results = [np.empty((8, 32, 32, 3), np.uint8) for _ in range(5)]

    def run(out: Any) -> None:
        for _ in range(20):
            _int8.crop(frames, drawn, interpolation="bicubic", out=out)

    threads = [threading.Thread(target=run, args=(out,)) for out in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    run(expected := np.empty_like(results[0]))
    assert all(np.array_equal(out, expected) for out in results)


class Script:
    """Python's `random`, of numbers in [0, 1) that are given."""

    def __init__(self, drawn: Any) -> None:
        self.attempts = iter(drawn[:20].reshape(2, 10).T.flatten())
        self.places = iter(drawn[20:])

    def uniform(self, a: float, b: float) -> float:
        return a + (b - a) * next(self.attempts)

    def randint(self, a: int, b: int) -> int:
        return a + int(next(self.places) * (b - a + 1))


@pytest.mark.parametrize(
    ("scale", "ratio"),
    [((0.08, 1), (3 / 4, 4 / 3)), ((0.9, 1), (0.5, 0.6)), ((0.5, 1.5), (2, 4)), ((1, 1), (1, 1))],
)
def test_boxes_are_timms(
    scale: tuple[float, float], ratio: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, [[600, 600]] * 1000 + [[9, 9]] * 300 + [[1000, 3], [3, 1000]] * 100)
    drawn = uniform(0, range(len(sizes)), 22)
    middle = 0
    for size, numbers, box in zip(sizes, drawn, boxes(sizes, drawn, scale, ratio), strict=True):
        monkeypatch.setattr(transforms, "random", Script(numbers))
        image = Image.new("L", (int(size[1]), int(size[0])))
        expected = RandomResizedCropAndInterpolation.get_params(image, scale, ratio)
        assert (box >= [0, 0, 1, 1]).all() and (box[:2] + box[2:] <= size).all()
        if min(expected[2:]) == 0:  # which timm cannot resize
            continue
        assert tuple(box) == expected, (size, numbers)
        middle += (size - box[2:]).max() > 0
    assert middle > 100


def test_draws_are_uniform_and_independent() -> None:
    drawn = uniform(draw(3, 1), range(4000), 22)
    assert drawn.dtype == np.float64 and 0 <= drawn.min() < 1e-4 < 1 - 1e-4 < drawn.max() < 1
    counts = np.histogram(drawn, bins=100, range=(0, 1))[0]
    assert ((counts - 880) ** 2 / 880).sum() < 160  # chi squared with 99 degrees: p < 1e-4
    correlations = np.corrcoef(drawn, rowvar=False) - np.eye(22)
    assert np.abs(correlations).max() < 0.08  # five standard errors
    neighbours = np.corrcoef(drawn[1:, 0], drawn[:-1, 0])[0, 1]
    epochs = np.corrcoef(drawn[:, 0], uniform(draw(3, 2), range(4000), 1)[:, 0])[0, 1]
    assert max(abs(neighbours), abs(epochs)) < 0.08
    every = bits(draw(0, 0), range(2000), 64)
    assert len(np.unique(every)) == every.size
    # SplitMix64's first numbers from state 1234567, as its authors' program prints them
    assert bits(1234567, [0], 3)[0].tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


def frames_of(rng: np.random.Generator, count: int) -> list[Any]:
    return [noise(rng, *rng.integers(20, 90, 2)) for _ in range(count)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"color_jitter": 0.4, "erasing": 0.5},
        {"auto_augment": "rand-m9-mstd0.5"},
        {"auto_augment": "augmix-m3"},
    ],
    ids=str,
)
def test_an_image_depends_on_key_and_index_alone(options: dict[str, Any]) -> None:
    augment = Augment(Data(image_size=24), Augmentation(**options))
    frames = frames_of(np.random.default_rng(0), 9)
    indices = [5, 1, 9, 0, 7, 10**9, 2**40, 3, 4]
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]
    whole = augment(frames, 17, indices)
    assert whole.shape == (9, 24, 24, 3) and whole.dtype == np.uint8
    for part in ([0], [8, 3], [4, 5, 6, 7], list(range(9))[::-1]):
        some = augment([frames[i] for i in part], 17, [indices[i] for i in part])
        assert np.array_equal(some, whole[part])
    other = augment(frames, 18, indices)
    assert all((a != b).any() for a, b in zip(whole, other, strict=True))
    same = augment([frames[0]] * 9, 17, indices)
    assert len({x.tobytes() for x in same}) == 9
    assert state[:2] == (random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), state[2])
    assert augment([], 17, []).shape == (0, 24, 24, 3)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
def test_pixels_are_pillows(interpolation: str) -> None:
    data = Data(image_size=32, interpolation=interpolation)  # type: ignore[arg-type]
    augment = Augment(data, Augmentation())
    frames = frames_of(np.random.default_rng(1), 30)
    drawn = augment.boxes([frame.shape[:2] for frame in frames], uniform(3, range(30), 64))
    assert 5 < drawn[:, 4].sum() < 25
    for image, frame, box in zip(augment(frames, 3, range(30)), frames, drawn, strict=True):
        assert np.array_equal(image, by_pillow(frame, box, (32, 32), interpolation))
    for hflip in (0.0, 1.0):
        never = Augment(data, Augmentation(hflip=hflip))
        assert (never.boxes([(9, 9)] * 50, uniform(3, range(50), 64))[:, 4] == hflip).all()


ENHANCE = ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color


def test_colours_are_pillows() -> None:
    rng = np.random.default_rng(0)
    for i in range(150):
        height, width = (int(x) for x in rng.integers(1, 40, 2))
        images = np.stack([noise(rng, height, width) for _ in range(2)])
        factors = rng.uniform(0, 2, (2, 3)).astype(np.float32)
        if i % 5 == 0:
            factors[0, i % 3] = i % 3
        orders = np.stack([rng.permutation(3) for _ in range(2)]).astype(np.uint8)
        for isa in _int8.isa():
            ours = images.copy()
            _int8.jitter(ours, factors, orders, isa=isa)
            for image, before, by, order in zip(ours, images, factors, orders, strict=True):
                expected = Image.fromarray(before)
                for which in order:
                    expected = ENHANCE[which](expected).enhance(float(by[which]))
                assert np.array_equal(image, expected), (isa, by, order)


def test_jitter_refuses_what_it_cannot_use() -> None:
    images, orders = np.zeros((2, 3, 4, 3), np.uint8), np.array([[0, 1, 2]] * 2, np.uint8)
    factors = np.ones((2, 3), np.float32)
    _int8.jitter(images, factors, orders)
    _int8.jitter(images[:0], factors[:0], orders[:0])
    _int8.jitter(images[:, :0], factors, orders)
    for other in (
        (images[0], factors, orders),
        (images[..., :2].copy(), factors, orders),
        (images, factors[:1], orders),
        (images, factors, orders[:, :2].copy()),
    ):
        with pytest.raises(ValueError, match="of the wrong shape"):
            _int8.jitter(*other)
    with pytest.raises(ValueError, match="orders: expected 0, 1 and 2"):
        _int8.jitter(images, factors, orders + np.uint8(1))
    with pytest.raises(TypeError):
        _int8.jitter(images, factors.astype(np.float64), orders)  # type: ignore[arg-type]


@pytest.mark.parametrize("strength", [0.4, 1.5])
def test_factors_and_orders_are_torchvisions(strength: float) -> None:
    theirs = ColorJitter(strength, strength, strength)
    factors, orders = colours(uniform(1, range(6000), 4), strength)
    for i, name in enumerate(("brightness", "contrast", "saturation")):
        low, high = getattr(theirs, name)
        assert low <= factors[:, i].min() < low + 0.01 and high - 0.01 < factors[:, i].max() <= high
        assert abs(factors[:, i].mean() - (low + high) / 2) < 0.03
    seen, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(seen) == 6 and (seen.sum(1) == 3).all() and 880 < counts.min()


class Erasing(Script):
    """`Script` for timm's `RandomErasing`, which draws its ratio of height to width."""

    def random(self) -> float:
        return 0.0

    def uniform(self, a: float, b: float) -> float:
        if a < 0:  # the logarithm of a ratio, from the other end
            return b + (a - b) * next(self.attempts)
        return super().uniform(a, b)


def test_erasures_are_timms(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = uniform(9, range(1500), 23)
    drawn[:700, 11:21] *= 0.05  # of such ratios few fit
    for size in (32, 9):
        ours = erasures(size, drawn, 1.0)
        missing = 0
        for numbers, (top, left, height, width) in zip(drawn, ours, strict=True):
            monkeypatch.setattr(random_erasing, "random", Erasing(numbers[1:]))
            image = torch.ones(3, size, size)
            random_erasing.RandomErasing(1.0, device="cpu")(image)
            expected = torch.ones(3, size, size)
            expected[:, top : top + height, left : left + width] = 0
            if height and not (image == 0).any():  # a rectangle of no pixels, timm's; ours has one
                assert min(height, width) == 1
                continue
            assert torch.equal(image, expected), numbers
            missing += not height
        assert missing < 100
    share = (erasures(32, drawn, 0.3)[:, 2] > 0).mean()
    assert 0.25 < share < 0.35 and not erasures(32, drawn, 0.0).any()


def test_what_is_erased_has_the_mean_colour() -> None:
    frames = [np.zeros((40, 40, 3), np.uint8)] * 20
    images = Augment(Data(image_size=32), Augmentation(erasing=1.0))(frames, 3, range(20))
    parts = erasures(32, uniform(3, range(20), 50)[:, 27:], 1.0)
    for image, (_, _, height, width) in zip(images, parts, strict=True):
        colours_, counts = np.unique(image.reshape(-1, 3), axis=0, return_counts=True)
        assert colours_.tolist() == [[0, 0, 0], [124, 116, 104]] and counts[1] == height * width


@pytest.mark.parametrize("name", ["rand-m9-mstd0.5", "augmix-m3", "3a"])
def test_automatic_augmentation_is_timms(name: str) -> None:
    """Of a crop, its generators seeded by what the image's index gives."""
    augmentation = Augmentation(auto_augment=name, color_jitter=0.4)
    frames = frames_of(np.random.default_rng(1), 5)
    data = Data(image_size=32)
    crops = Augment(data, Augmentation())(frames, 3, range(5))
    _, theirs, _ = create_transform(
        32,
        is_training=True,
        use_prefetcher=True,
        separate=True,
        color_jitter=0.4,
        auto_augment=name,
        interpolation="bicubic",
    )
    ours = Augment(data, augmentation)(frames, 3, range(5))
    for image, crop, seed in zip(ours, crops, bits(3, range(5), 64)[:, 63].tolist(), strict=True):
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        torch.manual_seed(seed)
        assert np.array_equal(image, theirs(Image.fromarray(crop)))


def test_unknown_transforms() -> None:
    with pytest.raises(ConfigError, match=r"augmentation.auto_augment: 'rund' is none of timm's"):
        Augment(Data(), Augmentation(auto_augment="rund"))
