"""Packed files: the folder's pixels, labels and batches, whole or refused by name."""

from __future__ import annotations

import io
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from support import loop_tools
from support.pillow_tools import rows_first
from vitkd_fast import images
from vitkd_fast.distill import pack, sources
from vitkd_fast.distill.config import Config, Data, validate
from vitkd_fast.distill.data import Loader, loaders
from vitkd_fast.distill.datasets import NO_LABEL
from vitkd_fast.images import DataError, open_rgb

pytestmark = pytest.mark.usefixtures("one_thread")


def noise(seed: int, height: int, width: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(256, size=(height, width, 3), dtype=np.uint8))


def folder(root: Path, classes: str = "c10 c2 c1", each: int = 6) -> Path:
    """Images of many sizes, PNG and JPEG."""
    for i, name in enumerate(classes.split() * each):
        (root / name).mkdir(parents=True, exist_ok=True)
        noise(i, 20 + i % 7, 40 - i % 5).save(root / name / f"{i}.{'jpg' if i % 3 else 'png'}")
    return root


def packed(root: Path, name: str = "a.pack", labels: str = "", **options: Any) -> str:
    chosen = pack.choose(str(root), labels, options.pop("unlabelled", False), False)
    path = root.parent / name
    pack.write(path, chosen, **options)
    return str(path)


def config(**data: Any) -> Config:
    data = {"image_size": 16, "batch_size": 4, "workers": 0, **data}
    rest = {"student": {"model": "mobilenetv2_050"}, "losses": {"ce": {}}}
    return validate({**rest, "data": {name: x for name, x in data.items() if x != ""}})


def opened(**data: Any) -> tuple[Loader, Loader]:
    whole = config(**data)
    return loaders(whole, sources.open_data(whole.data), seed=5)


def contents(batches: Any) -> list[list[bytes]]:
    return [
        [x.numpy().tobytes() for x in (batch.images, batch.labels, batch.indices)]
        for batch in batches
    ]


@pytest.mark.parametrize("encoded", [False, True], ids=["pixels", "files"])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_folders(tmp_path: Path, encoded: bool, workers: int) -> None:
    train, val = folder(tmp_path / "train"), folder(tmp_path / "val", "c2 c10", 4)
    of_folders = opened(train=str(train), val=str(val))
    files = [packed(x, f"{x.name}.pack", encoded=encoded, threads=3) for x in (train, val)]
    of_packs = opened(train=files[0], val=files[1], workers=workers)
    for ours, theirs in zip(of_packs, of_folders, strict=True):
        for epoch in (0, 3, 0):
            whole = contents(theirs.epoch(epoch))
            assert len(whole) > 1 and contents(ours.epoch(epoch)) == whole
            assert contents(ours.epoch(epoch, 1)) == whole[1:]
    # held out from one file, and beside a folder
    parts = [sources.open_data(config(train=x, holdout=0.4).data) for x in (files[0], str(train))]
    assert parts[0].val.index == parts[1].val.index
    mixed = opened(train=files[0], val=str(val))[1], opened(train=str(train), val=files[1])[1]
    assert (
        contents(mixed[0].epoch()) == contents(mixed[1].epoch()) == contents(of_folders[1].epoch())
    )


def test_names_classes_and_labels(tmp_path: Path) -> None:
    train = folder(tmp_path / "train")
    theirs = sources.open_folder(str(train), None, False).source
    ours = pack.Pack(packed(train))
    assert ours.classes == theirs.classes == ["c1", "c2", "c10"]
    assert ours.labels == theirs.labels and len(ours) == len(theirs) == 18
    assert [str(train / name) for name in ours.names] == theirs.files  # type: ignore[union-attr]
    assert ours.name(4) == f"{ours.path}/{ours.names[4]}"
    other = pickle.loads(pickle.dumps(ours.labelled([3] * 18, list("abcd"))))
    assert other.read(7)[1] == 3 and other.classes == list("abcd")
    assert np.array_equal(other.read(7)[0], ours.read(7)[0])


@pytest.mark.parametrize("turbo", [True, False])
def test_every_kind_of_file_is_packed_as_it_is_opened(
    tmp_path: Path, turbo: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "train" / "a"
    root.mkdir(parents=True)
    image = noise(0, 30, 41)
    exif = Image.Exif()
    exif[0x0112] = 6
    for mode in ("L", "P", "RGBA", "1", "LA"):
        image.convert(mode).save(root / f"{mode}.png")
    for mode in ("L", "CMYK", "RGB"):
        image.convert(mode).save(root / f"{mode}.jpg", exif=exif)
    image.save(root / "progressive.jpg", progressive=True, subsampling=0)
    image.convert("L").save(root / "grey.jpg")
    levels = np.linspace(0, 65535, 1230).reshape(30, 41).astype(np.uint16)
    Image.fromarray(levels).save(root / "deep.png")
    Image.fromarray(levels).save(root / "deep.tiff")
    image.save(root / "one.webp", lossless=True)
    noise(1, 1, 1).save(root / "pixel.png")
    (root / "UPPER case é.JPG").write_bytes((root / "RGB.jpg").read_bytes())
    sizes = set()
    if not turbo:
        monkeypatch.setattr(images, "simplejpeg", None)
    for encoded in (False, True):
        ours = pack.Pack(packed(tmp_path / "train", encoded=encoded))
        assert len(ours) == len(list(root.iterdir()))
        for i, name in enumerate(ours.names):
            expected = np.asarray(open_rgb(tmp_path / "train" / name))
            assert np.array_equal(ours.read(i)[0], expected), name
            sizes.add(expected.shape)
    assert sizes == {(30, 41, 3), (41, 30, 3), (1, 1, 3)}


def test_the_short_side_is_resized_as_by_pillow(tmp_path: Path) -> None:
    shapes = [(50, 75), (75, 50), (33, 33), (20, 64), (19, 90), (200, 21), (1, 9), (301, 31)]
    (tmp_path / "train" / "a").mkdir(parents=True)
    for i, shape in enumerate(shapes):
        noise(i, *shape).save(tmp_path / "train" / "a" / f"{i}.png")
    ours = pack.Pack(packed(tmp_path / "train", size=20))
    for i, (height, width) in enumerate(shapes):
        image, short = noise(i, height, width), min(height, width)
        if short > 20:
            size = width * 20 // short, height * 20 // short
            image = rows_first(image).resize(size, Image.Resampling.BICUBIC)
        assert np.array_equal(ours.read(i)[0], np.asarray(image)), shapes[i]


def test_a_bad_image_is_named_or_skipped(tmp_path: Path) -> None:
    train = folder(tmp_path / "train")
    bad = train / "c2" / "1.jpg", train / "c10" / "3.png"
    bad[0].write_bytes(bad[0].read_bytes()[:-300])
    bad[1].write_text("no image")
    out = tmp_path / "a.pack"
    out.write_text("before")
    for options in ({}, {"encoded": True}, {"threads": 4}):
        with pytest.raises(DataError, match=f"^{bad[0]} cannot be read: "):
            packed(train, **options)  # type: ignore[arg-type]
        assert out.read_text() == "before" and {*os.listdir(tmp_path)} == {"train", "a.pack"}
    chosen = pack.choose(str(train), "", False, False)
    done = pack.write(out, chosen, skip_bad=True)
    assert done.images == 16 and set(done.skipped) == set(map(str, bad))
    assert done.bytes == out.stat().st_size
    ours = pack.Pack(str(out))
    assert len(ours) == 16 and not {str(train / x) for x in ours.names} & set(done.skipped)
    for i, name in enumerate(ours.names):
        assert ours.classes[ours.read(i)[1]] == name.split("/")[0]
    for file in train.glob("*/*"):
        file.write_text("no image")
    with pytest.raises(DataError, match=f"^{train}: not one of 18 images can be read"):
        pack.write(out, chosen, skip_bad=True)
    assert len(pack.Pack(str(out))) == 16


def test_what_was_cut_or_changed_is_refused(tmp_path: Path) -> None:
    train = folder(tmp_path / "train", each=2)
    path = Path(packed(train))
    whole = path.read_bytes()
    begin, length = (int.from_bytes(whole[i : i + 8], "little") for i in (8, 16))
    assert begin + length == len(whole)

    def refused(data: bytes, why: str) -> None:
        path.write_bytes(data)
        with pytest.raises(DataError, match=f"^data.train: {path}: .*{why}"):
            sources.open_data(config(train=str(path)).data)

    for size in (0, 1, 7):
        refused(whole[:size], "is no packed file")
    for size in (8, 63):
        refused(whole[:size], f"is cut: it ends after {size} bytes")
    for size in (64, 65, begin, begin + 9, len(whole) - 1):
        refused(whole[:size], f"expected {len(whole)} bytes, got {size}")
    refused(whole + b"\0", f"expected {len(whole)} bytes, got {len(whole) + 1}")
    rng = np.random.default_rng(0)
    for place in [24, 40, 55, *rng.integers(begin, len(whole), 40)]:
        data = bytearray(whole)
        data[place] ^= 1 << int(rng.integers(8))
        refused(bytes(data), "its index does not have its checksum")
    refused(b"x" + whole[1:], "is no packed file")
    path.unlink()
    refused_path = rf"^data.train: {path}: .*No such file"
    with pytest.raises(DataError, match=refused_path):
        sources.open_data(config(train=str(path)).data)


@pytest.mark.parametrize("encoded", [False, True])
def test_a_flipped_bit_of_an_image_is_found(tmp_path: Path, encoded: bool, vitkd: Any) -> None:
    path = Path(packed(folder(tmp_path / "train"), encoded=encoded))
    whole = path.read_bytes()
    begin = int.from_bytes(whole[8:16], "little")
    assert vitkd("pack", path, "--verify").out == f"{path}: 18 images, none damaged\n"
    rng = np.random.default_rng(0)
    for place in [64, begin - 1, *rng.integers(64, begin, 30)]:
        data = bytearray(whole)
        data[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        with pytest.raises(DataError, match=f"^{path}/c.*cannot be read: its bytes do not have"):
            pack.verify(str(path))
    result = vitkd("pack", path, "--verify")
    assert result.code == 1 and f"DataError: {path}/c" in result.err
    named = result.err.split(" cannot be read")[0].split("DataError: ")[1]
    train, val = opened(train=str(path), holdout=0.5, batch_size=3)
    with pytest.raises(DataError, match=f"^{named} cannot be read"):
        _ = list(train.epoch()), list(val.epoch())
    loaders_ = opened(train=str(path), holdout=0.5, batch_size=3, skip_bad=True)
    for loader in loaders_:
        list(loader.epoch())
    assert loaders_[0].skipped | loaders_[1].skipped == {named}


def test_an_index_of_another_form_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dump = pack._Tail.dump

    def refused(why: str, change: Any) -> None:
        monkeypatch.setattr(pack._Tail, "dump", lambda tail: dump(tail._replace(**change(tail))))
        with pytest.raises(DataError, match=f"^FILE: {tmp_path}/a.pack: {why}"):
            pack.Pack(packed(tmp_path / "train"))

    folder(tmp_path / "train")
    refused("has version 2; this .* reads", lambda tail: {"header": tail.header | {"version": 2}})
    refused("has another number of names", lambda tail: {"names": tail.names + b"\0a"})
    refused("buffer is smaller", lambda tail: {"header": tail.header | {"images": 10**6}})


def test_a_killed_writer_leaves_no_file(tmp_path: Path) -> None:
    train = folder(tmp_path / "train", each=40)
    code = f"""
import time
from pathlib import Path
from vitkd_fast.distill import pack
prepare = pack._prepare
def slow(*arguments):
    time.sleep(0.05)
    return prepare(*arguments)
pack._prepare = slow
pack.write(Path({str(tmp_path / "a.pack")!r}), pack.choose({str(train)!r}, "", False, False))
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    end = time.monotonic() + 60
    while not list(tmp_path.glob(".a.pack.part")) and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert sorted(x.name for x in tmp_path.iterdir()) == [".a.pack.part", "train"]
    packed(train)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["a.pack", "train"]
    assert pack.verify(str(tmp_path / "a.pack")) == 120


def test_several_labels(tmp_path: Path) -> None:
    train = folder(tmp_path / "train")
    rows = [
        f"c{(10, 2, 1)[i % 3]}/{i}.{'jpg' if i % 3 else 'png'},{i % 2},,{i % 4 // 2}"
        for i in range(18)
    ]
    (train / "labels.csv").write_text("file,x,y,z\n" + "\n".join(rows))
    path = packed(train, labels="labels.csv")
    whole = {"labels": "labels.csv", "holdout": 0.4}
    ours, theirs = (
        sources.open_data(Data(train=x, **whole))  # type: ignore[arg-type]
        for x in (path, str(train))
    )
    assert ours.classes == theirs.classes == ["x", "y", "z"] and ours.notes == theirs.notes
    for mine, other in ((ours.train, theirs.train), (ours.val, theirs.val)):
        assert mine.index == other.index and sources.labels(mine) == sources.labels(other)
        for i in range(len(mine)):
            (pixels, target), (wanted, labels) = mine.read(i), other.read(i)
            assert np.array_equal(pixels, wanted) and target.tolist() == labels.tolist()
            assert target.dtype == np.float32
    source, bad = sources.open_labelled(path, "labels.csv", "DIR", False, ["z", "q", "y", "x"])
    assert source.read(3)[1].tolist() == theirs.train.source.read(3)[1][[2, 1, 1, 0]].tolist()
    assert source.classes == ["z", "q", "y", "x"] and not bad
    with pytest.raises(DataError, match=r"a.pack has a class 'y' that the model does not know"):
        sources.open_labelled(path, "labels.csv", "DIR", False, ["x", "z"])
    for labels, has, wanted in (
        ("", "the labels of labels.csv", "a class of each image"),
        ("other.json", "the labels of labels.csv", "the labels of other.json"),
    ):
        message = f"data.train: {path} was packed with {has}; expected {wanted}"
        with pytest.raises(DataError, match=message):
            sources.open_data(Data(train=path, labels=labels))


def test_no_labels(tmp_path: Path) -> None:
    train = folder(tmp_path / "train")
    noise(99, 9, 9).save(train / "outside.png")
    path = packed(train, unlabelled=True)
    both = [
        sources.open_data(Data(train=x, unlabelled=True, holdout=0.2)) for x in (path, str(train))
    ]
    assert both[0].train.index == both[1].train.index and both[0].classes == []
    for i in range(15):
        assert np.array_equal(both[0].train.read(i)[0], both[1].train.read(i)[0])
        assert both[0].train.read(i)[1] == NO_LABEL
    with pytest.raises(DataError, match=r"a.pack was packed with no labels; expected a class"):
        sources.open_data(Data(train=path))
    (train / "outside.png").unlink()
    other = packed(train, "b.pack")
    splits = sources.open_data(Data(train=other, val=path, unlabelled=True))
    assert len(splits.train) == 18 and splits.train.read(0)[1] == NO_LABEL and splits.classes == []
    with pytest.raises(DataError, match=r"data.val: 18 of its 18 images are in data.train too"):
        sources.open_data(Data(train=other, val=other, unlabelled=True))


def test_classes_of_both_parts(tmp_path: Path) -> None:
    train = packed(folder(tmp_path / "train"), "train.pack")
    some = packed(folder(tmp_path / "some", "c10", 2), "some.pack")
    more = packed(folder(tmp_path / "more", "c10 c3", 2), "more.pack")
    splits = sources.open_data(Data(train=train, val=some))
    assert splits.val.classes == splits.classes and splits.val.read(0)[1] == 2
    assert splits.notes == ["data.val: 2 of 3 classes have no image: 'c1', 'c2'"]
    with pytest.raises(DataError, match=r"more.pack has a class .c3. that data.train does not"):
        sources.open_data(Data(train=train, val=more))
    with pytest.raises(DataError, match=r"data.val: 18 of its 18 images are in data.train too"):
        sources.open_data(Data(train=train, val=train))
    with pytest.raises(DataError, match=r"some.pack expected to hold two or more classes"):
        sources.open_data(Data(train=some))


def test_digits_train_alike(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vitkd: Any
) -> None:
    """From folders, and from packed pixels and files: the same weights."""
    weights = []
    for options in (None, [], ["--jpeg"]):
        parts = {}
        for part in ("train", "val"):
            parts[part] = str(image_folder / part)
            if options is not None:
                file = tmp_path / f"{part}.pack"
                result = vitkd("pack", parts[part], "-o", file, *options)
                images = 150 if part == "train" else 50
                size = f"{file.stat().st_size / 1e6:,.2f} MB"
                assert result.out == f"{file}: {images} images, 0 skipped, {size}\n"
                parts[part] = str(file)
        splits = sources.open_data(Data(**parts))  # type: ignore[arg-type]
        monkeypatch.setattr(loop_tools, "splits", lambda splits=splits: splits)
        trainer = loop_tools.trainer(tmp_path / f"run{len(weights)}")
        trainer.run()
        weights.append(trainer.task.student.state_dict())
    for name, first in weights[0].items():
        assert all(torch.equal(first, other[name]) for other in weights[1:]), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "a.zip"], r"-o: expected a name in .pack, got a.zip"),
        ([], r"-o: expected a name in .pack, got None"),
        (["-o", "nowhere/a.pack"], "-o: nowhere is no folder"),
        (["-o", "a.pack", "--jpeg", "--size", "8"], "expected --jpeg or --size, got both"),
        (["-o", "a.pack", "--labels", "x.csv", "--unlabelled"], "expected --labels or --unlab"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, tmp_path: Path, vitkd: Any) -> None:
    result = vitkd("pack", folder(tmp_path / "train"), *arguments)
    assert result.code == 2
    assert message.replace("\\", "") in " ".join(result.err.replace("│", " ").split())


def test_command(tmp_path: Path, vitkd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    train = folder(tmp_path / "train")
    (train / "c1" / "2.jpg").write_text("no image")
    (train / "notes.txt").write_text("")
    out = tmp_path / "a.pack"
    result = vitkd("pack", train, "-o", out)
    assert result.code == 1 and f"{train}/c1/2.jpg cannot be read" in result.err
    monkeypatch.setattr(pack, "_TOLD", 10)
    result = vitkd("pack", train, "-o", out, "--skip-bad", "--size", 12)
    assert result.out.startswith(f"{out}: 17 images, 1 skipped, ")
    ignored = "DIR: files that are no images, ignored: 1 (1 .txt)\n"
    assert result.err == ignored + "10 of 18 images\n"
    assert {min(pack.Pack(str(out)).read(i)[0].shape[:2]) for i in range(17)} == {12}
    result = vitkd("pack", out, "-o", out)
    assert result.code == 1 and "DIR: " in result.err and "is no folder" in result.err
    stream = io.BytesIO(out.read_bytes())
    assert stream.read(8) == b"vitkdpak"
