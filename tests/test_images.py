"""Image files: what becomes of their pixels, and which files of a folder are images."""

from __future__ import annotations

import io
import itertools
import os
import resource
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from timm.data.transforms_factory import create_transform

from support.pillow_tools import rows_first
from vitkd_fast import images, models
from vitkd_fast.distill.augment import Augment
from vitkd_fast.distill.config import Augmentation, Data
from vitkd_fast.images import DataError, open_rgb

HALF = (0.5, 0.5, 0.5)
PIXELS = models.Pixels(32, HALF, HALF, "bicubic", 0.875)
EVERY = np.arange(65536, dtype=np.uint16).reshape(256, 256)


def noise(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)


def write_png16(file: Path, pixels: np.ndarray[Any, Any], colour: int) -> None:
    """Pillow writes no colours of 16 bits."""
    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    chunks = {b"IHDR": header, b"IDAT": zlib.compress(rows), b"IEND": b""}
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks.items()
    )
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def write_tiff(file: Path, data: bytes, side: int, bits: int, order: str, **tags: int) -> None:
    """Grey, uncompressed, in the byte order "<" or ">"."""
    values = {256: side, 257: side, 258: bits, 259: 1, 262: tags.get("photometric", 1), 273: 8}
    values |= {277: 1, 278: side, 279: len(data), 339: tags.get("sample", 1)}
    entries = b"".join(struct.pack(order + "HHII", tag, 4, 1, x) for tag, x in values.items())
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8 + len(data))
    table = struct.pack(order + "H", len(values)) + entries + struct.pack(order + "I", 0)
    file.write_bytes(head + data + table)


def grey(file: Path) -> np.ndarray[Any, Any]:
    """The one channel of an image whose channels are equal."""
    pixels = np.asarray(open_rgb(file))
    assert pixels.dtype == np.uint8 and (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


@pytest.mark.parametrize("kind", ["png", "tif <", "tif >", "pgm"])
def test_grey_of_16_bits_keeps_its_256_levels(kind: str, tmp_path: Path) -> None:
    file = tmp_path / f"a.{kind.split()[0]}"
    if kind.startswith("tif"):
        order = kind[-1]
        write_tiff(file, EVERY.astype(order + "u2").tobytes(), 256, 16, order)
    elif kind == "pgm":
        file.write_bytes(b"P5 256 256 65535\n" + EVERY.astype(">u2").tobytes())
    else:
        Image.fromarray(EVERY).save(file)
    assert np.array_equal(grey(file), np.round(EVERY / 257))


def test_grey_of_12_bits_and_white_of_zero(tmp_path: Path) -> None:
    values = np.arange(4096).reshape(64, 64)
    pairs = values.reshape(-1, 2)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1]])
    write_tiff(tmp_path / "12.tif", packed.T.astype(np.uint8).tobytes(), 64, 12, "<")
    assert np.array_equal(grey(tmp_path / "12.tif"), np.round(values * 255 / 4095))
    data = EVERY.astype("<u2").tobytes()
    write_tiff(tmp_path / "white.tif", data, 256, 16, "<", photometric=0)
    assert np.array_equal(grey(tmp_path / "white.tif"), 255 - np.round(EVERY / 257))


def test_of_colours_of_16_bits_the_upper_byte_counts(tmp_path: Path) -> None:
    for colour, channels in ((2, 3), (4, 2), (6, 4)):
        write_png16(tmp_path / "a.png", np.stack([EVERY] * channels, -1), colour)
        assert np.array_equal(grey(tmp_path / "a.png"), EVERY >> 8)


@pytest.mark.parametrize("kind", ["int32", "float32", "int16"])
def test_pixels_of_an_unknown_range_are_refused(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "a.tif"
    if kind == "int16":
        write_tiff(file, EVERY.tobytes(), 256, 16, "<", sample=2)
    else:
        Image.fromarray(EVERY.astype(kind)).save(file)
    with pytest.raises(DataError, match=r"a\.tif cannot be read: .* an unknown range; save it"):
        images.read(file, PIXELS)


def test_alpha_is_dropped_as_by_torchvision(tmp_path: Path) -> None:
    image = Image.fromarray(noise(20, 30, 4))
    palette = image.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE)
    images = {"RGBA.png": image, "LA.png": image.convert("LA"), "P.png": palette}
    images["CMYK.jpg"] = image.convert("CMYK")
    for name, x in images.items():
        x.save(tmp_path / name)
    palette.save(tmp_path / "bytes.png", transparency=bytes(range(256)))
    palette.save(tmp_path / "one.gif", transparency=3)
    for file in tmp_path.iterdir():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = np.asarray(Image.open(file).convert("RGB"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert np.array_equal(np.asarray(open_rgb(file)), expected), file.name


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif", "avif"])
def test_images_are_upright(ending: str, orientation: int, tmp_path: Path) -> None:
    image = Image.new("RGB", (48, 32))
    image.paste((200, 30, 30), (0, 0, 24, 16))
    image.paste((30, 30, 200), (24, 16, 48, 32))
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"lossless": True} if ending == "webp" else {}
    image.info["exif"] = exif.tobytes()
    expected = np.asarray(ImageOps.exif_transpose(image)).astype(int)
    image.save(tmp_path / f"a.{ending}", exif=exif, **lossless)
    ours = np.asarray(open_rgb(tmp_path / f"a.{ending}"))
    assert ours.shape == expected.shape == ((48, 32, 3) if 5 <= orientation <= 8 else (32, 48, 3))
    assert np.abs(ours - expected).mean() < (6 if ending in ("jpg", "avif") else 1e-9)


@pytest.mark.filterwarnings("ignore")
def test_broken_exif_is_none(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "maker", 72.0
    whole = exif.tobytes()
    generator = np.random.default_rng(0)
    shapes = set()
    for i in range(2000):
        broken = bytearray(whole)
        for at in generator.integers(len(whole), size=3):
            broken[at] = generator.choice([0, 1, 2, 5, 10, 12, 255])
        image = Image.new("RGB", (6, 4))
        image.info["exif"] = bytes(broken[: generator.integers(len(whole))] if i % 3 else broken)
        shapes.add(images.to_rgb(image).size)
    assert shapes == {(6, 4), (4, 6)}


@pytest.mark.parametrize("ending", ["gif", "webp", "png", "tif", "avif"])
def test_of_many_frames_the_first_counts(ending: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (16, 16), (x, x, x)) for x in (40, 200, 120)]
    frames[0].save(tmp_path / f"a.{ending}", save_all=True, append_images=frames[1:])
    assert np.abs(grey(tmp_path / f"a.{ending}").astype(int) - 40).max() <= 2


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_every_ending_is_read_and_whole_files_alone(tmp_path: Path) -> None:
    for ending in images.EXTENSIONS:
        buffer = io.BytesIO()
        Image.fromarray(noise(40, 30, 3)).save(buffer, Image.registered_extensions()[ending])
        (tmp_path / f"whole{ending}").write_bytes(buffer.getvalue())
        assert images.read(tmp_path / f"whole{ending}", PIXELS).shape == (32, 32, 3)
        for part in (0, 10, len(buffer.getvalue()) // 2):
            (tmp_path / "part").write_bytes(buffer.getvalue()[:part])
            with pytest.raises(DataError, match="part cannot be read: "):
                images.read(tmp_path / "part", PIXELS)


# strips


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop_pct", [0.5, 0.875, 1.0, 1.25])
def test_a_strip_is_another_image(crop_pct: float, interpolation: str) -> None:
    pixels = models.Pixels(96, HALF, HALF, interpolation, crop_pct)
    whole = create_transform(
        96, use_prefetcher=True, crop_pct=crop_pct, interpolation=interpolation
    )
    for width, height in ((700, 20), (20, 700), (1, 40), (1100, 64)):
        image = Image.fromarray(noise(height // 4 + 1, width // 4 + 1, 3)).resize((width, height))
        expected = np.asarray(whole(rows_first(image))).transpose(1, 2, 0)
        assert np.array_equal(images.prepare(image, pixels), expected), (width, height)


def test_a_strip_takes_no_more_memory_than_a_photograph() -> None:
    train = Augment(Data(), Augmentation(auto_augment="rand-m9-mstd0.5"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for shape in ((12000, 1, 3), (1, 12000, 3)):  # whole, 2.4 GB
        image = Image.fromarray(noise(*shape))
        assert images.prepare(image, models.Pixels(224, HALF, HALF, "bicubic", 0.875)).any()
        assert train([np.asarray(image)], 0, [0]).shape == (1, 224, 224, 3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


# folders


def test_the_order_is_total() -> None:
    names = ["Cat", "b10", "b²", "b9", "cat", "1", "01", "2", "-"]
    ordered = ["01", "1", "2", "-", "b9", "b10", "b²", "Cat", "cat"]
    for order in itertools.islice(itertools.permutations(names), 0, None, 977):
        assert sorted(order, key=images.natural_key) == ordered


def test_links_lead_to_each_image_once(tmp_path: Path) -> None:
    root, other = tmp_path / "root", tmp_path / "other"
    for name in (
        "root/a/1.png",
        "root/a/deep/2.png",
        "root/z.png",
        "other/3.png",
        "pool/sub/4.png",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "pool" / "5.png").write_bytes(b"")
    links = {
        root / "a" / "up": "..",
        root / "a" / "deep" / "top": tmp_path,
        root / "a" / "self": "self",
        root / "a" / "again.png": "1.png",
        root / "b": "../other",
        root / "c": other,
        root / "a" / "out": other,
        root / "a" / "pool": tmp_path / "pool" / "sub",
        other / "back": root,
        other / "here": ".",
        tmp_path / "pool" / "sub" / "up": "..",
    }
    for link, target in links.items():
        os.symlink(target, link)
    once = ["a/1.png", "a/deep/2.png", "a/pool/4.png", "b/3.png", "z.png"]
    assert images.list_images(root) == [root / x for x in once]
    # what is above the folder that was asked for stays out, whatever way leads there
    once = ["1.png", "deep/2.png", "out/3.png", "pool/4.png"]
    assert images.list_images(root / "a") == [root / "a" / x for x in once]


def test_what_is_no_image_is_ignored_and_counted(tmp_path: Path) -> None:
    strays = ".DS_Store", "._1.jpg", "Thumbs.db", "notes.txt", "a/more.TXT", "LICENSE", "x.heic"
    hidden = "__MACOSX/1.jpg", "a/@eaDir/1.jpg/thumb.jpg", ".git/1.png"
    for name in (*strays, *hidden, "2.JPG", "a/1.WebP"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = images.find(str(tmp_path))
    assert list(found.files.values()) == [f"{tmp_path}/2.JPG", f"{tmp_path}/a/1.WebP"]
    assert found.ignored == {"hidden": 2, ".db": 1, ".txt": 2, "LICENSE": 1, ".heic": 1}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(mode=0)
    with pytest.raises(DataError, match=r"/a cannot be read: .*Permission denied"):
        images.find(str(tmp_path))
