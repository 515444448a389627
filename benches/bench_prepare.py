"""Preparing images for 224x224, bicubic, crop_pct 0.875, by CPU time on one thread.

bench_frame: pixels in memory, as a camera gives them; `pillow resize` is given its own image, and
does no more than resize the whole. bench_files: JPEG photographs of ImageNet from VITKD_DATA (noise
without it), from bytes to pixels; the time is that of one. Ours is with the extra `turbo`, where it
is installed, and with Pillow's decoder.
"""

from __future__ import annotations

import io
import os
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("timm")

from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as torchvision

from vitkd_fast import _int8, images, models

SIZES = [(640, 480), (1920, 1080), (4000, 3000)]
PIXELS = models.Pixels(224, (0.5,) * 3, (0.5,) * 3, "bicubic", 0.875)


def resized(height: int, width: int) -> tuple[int, int]:
    """Height and width before the crop."""
    short = min(height, width)
    return 256 * height // short, 256 * width // short


def by_pillow(image: Image.Image) -> np.ndarray:
    height, width = resized(image.height, image.width)
    left, top = round((width - 224) / 2), round((height - 224) / 2)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image.crop((left, top, left + 224, top + 224)))


def by_torchvision(image: torch.Tensor) -> np.ndarray:
    """Of uint8 [3, H, W]."""
    size = list(resized(*image.shape[1:]))
    image = torchvision.resize(image, size, InterpolationMode.BICUBIC, antialias=True)
    return torchvision.center_crop(image, [224, 224]).permute(1, 2, 0).numpy()


def race_of(race, contenders, given) -> None:
    """Of functions of the same images, each timed per image."""

    def check(name, run):
        for frame, result in zip(given, run(), strict=True):
            ours = images.prepare(frame, PIXELS)
            if name.startswith("vitkd_fast"):
                assert np.array_equal(result, ours), name
            elif name != "pillow resize":
                # Pillow 13's order of passes; torchvision's weights of 16 bits
                assert np.abs(result.astype(int) - ours).mean() < 0.2, name

    def cpu(run):
        start = time.thread_time()
        run()
        return (time.thread_time() - start) / len(given)

    race(contenders, check=check, timed=cpu, rounds=21)


@pytest.mark.parametrize(("width", "height"), SIZES, ids=[f"{w}x{h}" for w, h in SIZES])
def bench_frame(width, height, race):
    noise = np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8)
    scalar = np.empty((224, 224, 3), np.uint8)
    _int8.prepare(noise, crop_pct=0.875, interpolation="bicubic", isa="scalar", out=scalar)
    assert np.array_equal(scalar, images.prepare(noise, PIXELS))
    image, tensor = Image.fromarray(noise), torch.from_numpy(noise).permute(2, 0, 1)
    size = resized(height, width)[::-1]
    contenders = {
        "vitkd_fast": lambda: [images.prepare(noise, PIXELS)],
        "pillow": lambda: [by_pillow(Image.fromarray(noise))],
        "pillow resize": lambda: [image.resize(size, Image.Resampling.BICUBIC)],
        "torchvision": lambda: [by_torchvision(tensor)],
    }
    race_of(race, contenders, [noise])


def files() -> list[bytes]:
    if folder := os.environ.get("VITKD_DATA"):
        with zipfile.ZipFile(Path(folder) / "imagenet-sample-a.zip") as archive:
            names = sorted(name for name in archive.namelist() if name.endswith(".JPEG"))
            return [archive.read(name) for name in names[::20]]
    noise = np.random.default_rng(0).integers(256, size=(375, 500, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG")
    return [buffer.getvalue()]


@pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")
def bench_files(race, monkeypatch):
    data = files()
    tensors = [torch.frombuffer(bytearray(x), dtype=torch.uint8) for x in data]
    turbo = images.simplejpeg

    def ours(decoder):
        monkeypatch.setattr(images, "simplejpeg", decoder)
        return [images.read(io.BytesIO(x), PIXELS) for x in data]

    contenders = {
        "vitkd_fast": lambda: ours(turbo),
        "vitkd_fast, Pillow decodes": lambda: ours(None),
        "pillow": lambda: [by_pillow(Image.open(io.BytesIO(x)).convert("RGB")) for x in data],
        "torchvision": lambda: [by_torchvision(decode_jpeg(x, ImageReadMode.RGB)) for x in tensors],
    }
    race_of(race, contenders, [images.open_rgb(io.BytesIO(x)) for x in data])
