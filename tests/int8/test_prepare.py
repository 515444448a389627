"""Frames of any size become Pillow 12's pixels, cropped as by timm, on every instruction set."""

from __future__ import annotations

import ctypes
import io
import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, features
from timm.data.transforms_factory import create_transform

from support.int8_builder import images_for
from support.int8_graphs import random_graph
from support.pillow_tools import rows_first
from vitkd_fast import _int8, images, int8, models
from vitkd_fast.int8 import file

HALF = (0.5, 0.5, 0.5)
INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")


def noise(rng: np.random.Generator, height: int, width: int) -> np.ndarray[Any, Any]:
    """Of all levels, or black and white, which overshoots most."""
    if rng.random() < 0.3:
        return np.uint8(255) * rng.integers(2, size=(height, width, 3), dtype=np.uint8)
    return rng.integers(256, size=(height, width, 3), dtype=np.uint8)


def ours(frame: Any, size: int, crop_pct: float, interpolation: str, isa: str = "") -> Any:
    out = np.full((size, size, 3), 77, np.uint8)
    _int8.prepare(frame, crop_pct=crop_pct, interpolation=interpolation, isa=isa, out=out)
    return out


def timms(frame: Any, size: int, crop_pct: float, interpolation: str) -> Any:
    transform = create_transform(
        size, use_prefetcher=True, crop_pct=crop_pct, interpolation=interpolation
    )
    return np.asarray(transform(rows_first(Image.fromarray(frame)))).transpose(1, 2, 0)


def test_2000_sizes_and_crops_are_pillow_12s() -> None:
    rng = np.random.default_rng(0)
    tested = 0
    for i in itertools.count():
        if tested == 2000:
            break
        most = (24, 90, 400, 24)[i % 4]
        sides = rng.integers(1, (most, most if i % 4 < 3 else 300), endpoint=True)
        height, width = (int(side) for side in rng.permutation(sides))
        size = int(rng.integers(2, 120))
        crop_pct = float(rng.choice([0.5, 0.875, 1.0, 1.25, rng.uniform(0.1, 2)]))
        if size / crop_pct * max(sides) / min(sides) > 5000:  # Pillow's would take long
            continue
        tested += 1
        frame = noise(rng, height, width)
        interpolation = str(rng.choice(INTERPOLATIONS, p=(0.05, 0.05, 0.3, 0.1, 0.4, 0.1)))
        case = size, crop_pct, interpolation
        expected = timms(frame, *case)
        for isa in _int8.isa():
            assert np.array_equal(ours(frame, *case, isa), expected), (frame.shape, case, isa)


@pytest.mark.slow
@pytest.mark.skipif(
    Image.__version__.startswith("12."), reason="the suite runs with Pillow 12 itself"
)
def test_the_same_with_pillow_12(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path]
    installed = subprocess.run([*pip, "pillow==12.3.*"], capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"pip finds no Pillow 12.3: {installed.stderr.splitlines()[-1]}")
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    code = "import PIL; assert PIL.__version__.startswith('12.3.'); "
    code += "import test_prepare; test_prepare.test_2000_sizes_and_crops_are_pillow_12s()"
    subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path + os.pathsep + str(Path(__file__).parent)},
        check=True,
    )


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("height", "width"), [(480, 640), (1080, 1920), (3000, 4000), (37, 5)])
def test_cameras(height: int, width: int, interpolation: str) -> None:
    frame = noise(np.random.default_rng(0), height, width)
    expected = timms(frame, 224, 0.875, interpolation)
    for isa in _int8.isa():
        assert np.array_equal(ours(frame, 224, 0.875, interpolation, isa), expected), isa


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_strips_and_single_pixels(interpolation: str) -> None:
    """What makes the whole of a resized image too large is no more work than another frame."""
    rng = np.random.default_rng(0)
    for height, width in ((1, 1), (1, 2), (2, 1), (1, 100_000), (100_000, 1), (4, 10_000)):
        frame = noise(rng, height, width)
        expected = ours(frame, 224, 0.875, interpolation, "scalar")
        for isa in _int8.isa():
            assert np.array_equal(ours(frame, 224, 0.875, interpolation, isa), expected), isa
        # far from its ends a strip is what its middle is
        if max(height, width) > 10 * min(height, width):
            middle = tuple(
                slice(max(side // 2 - 50, 0), side // 2 + 50) for side in (height, width)
            )
            assert np.array_equal(ours(frame[middle], 224, 0.875, interpolation), expected)


def test_a_frame_is_read_where_it_lies() -> None:
    rng = np.random.default_rng(0)
    large = noise(rng, 90, 120)
    views = {
        "rows apart": large[10:60, 20:70],
        "bottom up": large[::-1],
        "every other row": large[::2],
        "columns apart": large[:, ::3],
        "BGR": large[..., ::-1],
        "transposed": large.transpose(1, 0, 2),
        "columns first": np.asfortranarray(large),
        "one row": large[:1],
        "a row repeated": np.broadcast_to(large[:1], large.shape),
        "one column": large[:, 7:8],
    }
    session = int8.load(random_graph(11, image_size=33))
    for name, view in views.items():
        whole = session.prepare(view.copy(order="C"))
        assert np.array_equal(session.prepare(view), whole), name
        assert np.array_equal(images.prepare(view, session), whole), name
    assert np.array_equal(
        session.prepare(torch.from_numpy(large)), images.prepare(Image.fromarray(large), session)
    )


def test_no_byte_outside_is_read() -> None:
    """A frame that ends where its memory ends, on the last bytes of a page before one that may not
    be read; bottom up too."""
    page = os.sysconf("SC_PAGESIZE")
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *3 * [ctypes.c_int], ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    pages = 16
    start = libc.mmap(None, (pages + 1) * page, 3, 0x22, -1, 0)  # anonymous, read and write
    assert libc.mprotect(start + pages * page, page, 0) == 0
    memory = np.ctypeslib.as_array((ctypes.c_uint8 * (pages * page)).from_address(start))
    memory[:] = noise(np.random.default_rng(0), 1, pages * page)[0, :, 0]
    for height in range(1, 40, 3):
        for width in range(1, 40):
            frame = memory[-3 * height * width :].reshape(height, width, 3)
            for isa in ("scalar", _int8.isa()[0]):
                for given in (frame, frame[::-1]):
                    expected = ours(given.copy(), 16, 0.875, "bicubic", "scalar")
                    assert np.array_equal(ours(given, 16, 0.875, "bicubic", isa), expected)


def test_session_prepares_frames_of_any_size() -> None:
    graph = random_graph(11, image_size=33)
    session, rng = int8.load(graph), np.random.default_rng(0)
    frames = [noise(rng, *sides) for sides in ((40, 50), (7, 9), (300, 200), (33, 33))]
    prepared = np.stack([session.prepare(frame) for frame in frames])
    expected = session(prepared)
    assert np.array_equal(session(frames, prepare=True), expected)
    out = np.empty_like(expected)
    assert session(frames, out, prepare=True) is out and np.array_equal(out, expected)
    assert session([], prepare=True).shape == (0, expected.shape[1])
    same = images_for(graph, 3)
    assert np.array_equal(
        session(same, prepare=True), session(np.stack([session.prepare(x) for x in same]))
    )
    reused = np.empty_like(prepared[0])
    assert session.prepare(frames[0], reused) is reused
    assert np.array_equal(reused, prepared[0])


def test_what_is_no_frame_is_refused() -> None:
    session = int8.load(random_graph(11, image_size=33))
    frame = np.zeros((40, 50, 3), np.uint8)
    expected = r"int8\.Session\.prepare: expected a frame, uint8 \[H, W, 3\], got "
    rgba = np.zeros((4, 4, 4), np.uint8)
    for got in (frame / 255, frame[None], frame[..., 0], rgba, frame[:0]):
        with pytest.raises(ValueError, match=expected + rf"{got.dtype} \[.*\]"):
            session.prepare(got)
        with pytest.raises(ValueError, match=expected):
            session([frame, got], prepare=True)
        with pytest.raises(ValueError, match=r"images\.prepare: expected a frame"):
            images.prepare(got, session)
    with pytest.raises(ValueError, match=r"prepare: out: expected .* uint8 .*\[33, 33, 3\]"):
        session.prepare(frame, np.empty((32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match=r"expected crop_pct to 16777216, got 1"):
        images.prepare(frame, models.Pixels(1, HALF, HALF, "bicubic", 1.5))
    with pytest.raises(ValueError, match=r"interpolation: expected one of nearest, .*, got cubic"):
        images.prepare(frame, models.Pixels(32, HALF, HALF, "cubic", 0.875))


def test_threads_share_nothing() -> None:
    session, rng = int8.load(random_graph(11, image_size=33)), np.random.default_rng(0)
    frames = [noise(rng, int(h), int(w)) for h, w in rng.integers(5, 300, (40, 2))]
    expected = [session.prepare(frame) for frame in frames]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for result, right in zip(pool.map(session.prepare, frames), expected, strict=True):
                assert np.array_equal(result, right)


@pytest.mark.skipif("avx2" not in _int8.isa(), reason="the directions are x86's")
@pytest.mark.parametrize("direction", [0x400, 0x800, 0xC00])
def test_rounding_of_the_callers_floats(direction: int) -> None:
    libm = ctypes.CDLL("libm.so.6")
    frame = noise(np.random.default_rng(0), 256, 256)
    case = 168, 0.875, "nearest"  # of 4 pixels 3, some from between two
    expected = ours(frame, *case)
    assert libm.fesetround(direction) == 0
    try:
        result = ours(frame, *case)
        assert libm.fegetround() == direction
    finally:
        libm.fesetround(0)
    assert np.array_equal(result, expected)


def test_without_torch_and_pillow(tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np; from vitkd_fast import int8; "
        "s = int8.load(sys.argv[1]); s([np.zeros((9, 9, 3), np.uint8)], prepare=True); "
        "assert not {'torch', 'PIL'} & set(sys.modules)"
    )
    file.save(random_graph(11, image_size=33), tmp_path / "a.int8.safetensors")
    subprocess.run([sys.executable, "-c", code, tmp_path / "a.int8.safetensors"], check=True)


# JPEG files by the extra `turbo`


def jpegs() -> dict[str, bytes]:
    """Of every kind."""
    y, x = np.mgrid[:101, :151]
    smooth = np.stack([128 + 100 * np.sin(x / 9), 128 + 90 * np.cos(y / 7), x * y % 255], -1)
    colours = Image.fromarray(smooth.astype(np.uint8))
    orientations = {}
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        orientations[f"orientation {orientation}"] = (colours, {"exif": exif})
    kinds = {
        f"{sampling} {quality} {progressive=}": (
            colours,
            {"subsampling": sampling, "quality": quality, "progressive": progressive},
        )
        for sampling in ("4:4:4", "4:2:2", "4:2:0", "4:1:1")
        for quality in (30, 75, 95)
        for progressive in (False, True)
    }
    kinds |= {mode: (colours.convert(mode), {}) for mode in ("L", "CMYK")}
    kinds |= orientations | {"RGB inside": (colours, {"keep_rgb": True})}
    files = {}
    for name, (image, options) in kinds.items():
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", **options)
        files[name] = buffer.getvalue()
    return files


@pytest.mark.skipif(not features.check("libjpeg_turbo"), reason="Pillow has another libjpeg")
def test_turbo_gives_pillows_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    simplejpeg = pytest.importorskip("simplejpeg")
    decoded = []

    def decode(data: bytes) -> Any:
        decoded.append(len(data))
        return simplejpeg.decode_jpeg(data)

    monkeypatch.setattr(images, "simplejpeg", type("_", (), {"decode_jpeg": staticmethod(decode)}))
    files = jpegs()
    rng = np.random.default_rng(0)
    for i in range(300):  # damaged ones
        broken = bytearray(files["4:2:0 75 progressive=False"])
        for at in rng.integers(2, len(broken), size=2):
            broken[at] = rng.integers(256)
        files[f"damaged {i}"] = bytes(broken[: rng.integers(len(broken))] if i % 3 else broken)

    def opened() -> dict[str, Any]:
        results = {}
        for name, data in files.items():
            try:
                results[name] = np.asarray(images.open_rgb(io.BytesIO(data))).tobytes()
            except images.UNREADABLE as error:
                results[name] = type(error)
        return results

    fast, count = opened(), len(decoded)
    monkeypatch.setattr(images, "simplejpeg", None)
    assert fast == opened() and len(decoded) == count
    assert 26 < count < len(files)
