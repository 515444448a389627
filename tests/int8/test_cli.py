"""`vitkd quantize`, `profile`, and `eval` and `predict` on int8 files; the pixels they read."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from timm.data import ImageNetInfo
from timm.data.transforms_factory import create_transform

from support.pillow_tools import rows_first
from vitkd_fast import _timing, cli, int8, models
from vitkd_fast.distill import config, datasets, sources
from vitkd_fast.distill import quantized as quantized_run
from vitkd_fast.images import DataError, list_images, prepare, read

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
HALF = (0.5, 0.5, 0.5)
PIXELS = models.Pixels(32, HALF, (0.25, 0.5, 0.3), "bicubic", 0.875)


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty digits as PNG files, in a folder for each class, two of three sizes."""
    root = tmp_path_factory.mktemp("images")
    digits = datasets.Digits()
    for i in range(60):
        image, label = digits.read(i)
        folder = root / digits.classes[label]
        folder.mkdir(exist_ok=True)
        Image.fromarray(image).resize((40, (28, 40, 50)[i % 3])).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small student whose answers differ from image to image."""
    torch.manual_seed(0)
    student = models.create("mobilenetv2_035", num_classes=10).train()
    for _ in range(3):  # statistics that leave a signal in an untrained network
        student(torch.rand(16, 3, 32, 32) * 4 - 2)
    file = tmp_path_factory.mktemp("model") / "model.safetensors"
    models.save(
        file,
        student,
        name="mobilenetv2_035",
        options={},
        num_classes=10,
        pixels=PIXELS,
        classes=[str(i) for i in range(10)],
    )
    return file


def timms(size: int, crop_pct: float, interpolation: str):
    """timm's validation transform: what the pixels are compared with."""
    return create_transform(
        size, use_prefetcher=True, crop_pct=crop_pct, interpolation=interpolation
    )


def pixels_of(transform, file: Path) -> np.ndarray:
    """By a transform of training: [H, W, 3]."""
    image = rows_first(Image.open(file).convert("RGB"))
    return np.asarray(transform(image)).transpose(1, 2, 0)


def expected(model: Path, files: list[Path], size: int = 32, **options) -> bytes:
    """The bytes that quantize should write."""
    transform = timms(size, PIXELS.crop_pct, PIXELS.interpolation)
    images = [pixels_of(transform, file) for file in files]
    loaded = models.load(model)
    made = int8.quantize(
        loaded.model,
        np.stack(images),
        mean=PIXELS.mean,
        std=PIXELS.std,
        classes=loaded.classes,
        crop_pct=PIXELS.crop_pct,
        interpolation=PIXELS.interpolation,
        **options,
    )
    file = model.with_name("expected.safetensors")
    made.save(file)
    return file.read_bytes()


@pytest.fixture(scope="module")
def quantized(model: Path, image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `vitkd quantize` makes it, under a name that does not say int8."""
    file = tmp_path_factory.mktemp("int8") / "student.safetensors"
    file.write_bytes(expected(model, list_images(image_folder)))
    return file


# pixels


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize(("size", "crop_pct"), [(32, 0.875), (33, 1.0), (24, 0.9), (48, 1.25)])
def test_pixels_are_those_of_training(size: int, crop_pct: float, interpolation: str) -> None:
    pixels = models.Pixels(size, HALF, HALF, interpolation, crop_pct)
    transform = timms(size, crop_pct, interpolation)
    generator = np.random.default_rng(0)
    for height, width in ((50, 50), (41, 77), (90, 37), (17, 16), (33, 60), (8, 80)):
        array = generator.integers(256, size=(height, width, 3), dtype=np.uint8)
        image = Image.fromarray(array)
        ours = prepare(image, pixels)
        assert ours.shape == (size, size, 3) and ours.flags.writeable
        assert np.array_equal(ours, np.asarray(transform(rows_first(image))).transpose(1, 2, 0)), (
            height,
            width,
        )


def test_a_image_in_any_mode(tmp_path: Path) -> None:
    for mode, name in (("L", "a.png"), ("RGBA", "b.png"), ("P", "c.png"), ("CMYK", "d.jpg")):
        Image.effect_noise((40, 30), 90).convert(mode).save(tmp_path / name)
        transform = timms(32, 0.875, "bicubic")
        wanted = pixels_of(transform, tmp_path / name)
        assert np.array_equal(read(tmp_path / name, PIXELS), wanted), mode


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no image")
    for name in ("a.png", "missing.png"):
        with pytest.raises(DataError, match=rf"{name} cannot be read: "):
            read(tmp_path / name, PIXELS)


def test_spread() -> None:
    assert sources.spread(10, 4) == [0, 2, 5, 7]
    assert sources.spread(3, 5) == [0, 1, 2]


def test_list_images(image_folder: Path, tmp_path: Path) -> None:
    for name in ("10.png", "9.JPG", "b/2.jpeg", "b/notes.txt", ".hidden.png", ".h/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert list_images(tmp_path) == [tmp_path / name for name in ("9.JPG", "10.png", "b/2.jpeg")]


# calibration in a run


def configured(**section: object) -> config.Config:
    rest = {"student": {"model": "mobilenetv2_035"}, "losses": {"ce": {}}}
    small = {"image_size": 32, "batch_size": 4, "workers": 0}
    return config.validate({"data": small | section, "int8": {"calibration_images": 7}, **rest})


def test_calibration_images_are_evenly_spread_and_not_augmented() -> None:
    whole = configured(dataset="digits")
    train = sources.open_data(whole.data).train
    images = quantized_run.images(whole, train, whole.int8.calibration_images)
    assert (images.dtype, images.shape) == (torch.uint8, (7, 32, 32, 3))
    for image, i in zip(images, sources.spread(len(train), 7), strict=True):
        pixels = models.Pixels(32, HALF, HALF, "bicubic", 0.875)
        assert np.array_equal(image, prepare(train.read(i)[0], pixels))


def test_calibration_images_of_a_stream(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "0.tar")) as shard:
        for i in range(10):
            shard.write({"__key__": str(i), "png": Image.new("RGB", (40, 40), (i, i, i)), "cls": 0})
    split = {"name": "", "num_samples": 10, "filenames": ["0.tar"], "shard_lengths": []}
    (tmp_path / "_info.json").write_text(
        json.dumps({"splits": {"train": split, "validation": split}})
    )
    whole = configured(dataset="wds/x", root=str(tmp_path))
    train = sources.open_data(whole.data, 2).train
    images = quantized_run.images(whole, train, whole.int8.calibration_images)
    values = images.float().mean((1, 2, 3)).tolist()
    assert len(values) == len(set(values)) == 7
    assert set(values) <= set(map(float, range(10)))


# quantize


@pytest.mark.parametrize(
    ("flags", "options", "size"),
    [
        ([], {}, 32),
        (["--calibration", "minmax", "--no-bias-correction"],
         {"calibration": "minmax", "bias_correction": False}, 32),
        (["--reconstruct", "--mixed", "--budget", "1.3"],
         {"reconstruct": True, "mixed": "auto", "budget": 1.3}, 32),
        (["--image-size", "48"], {}, 48),
    ],
)  # fmt: skip
def test_quantize_writes_what_the_function_makes(
    flags: list[str],
    options: dict,
    size: int,
    model: Path,
    image_folder: Path,
    tmp_path: Path,
    vitkd,
) -> None:
    file = tmp_path / "student.int8.safetensors"
    result = vitkd("quantize", model, "--images", image_folder, "-o", file, "--count", 20, *flags)
    assert result.code == 0, result.err
    files = list_images(image_folder)
    assert file.read_bytes() == expected(model, files[::3], size, **options)
    assert list(tmp_path.iterdir()) == [file]
    lines = result.out.splitlines()
    assert lines[0] == "20 of 60 images, 0 skipped"
    assert lines[1].split()[:2] == ["layer", "op"]
    report = [line for line in lines if not line.startswith("warning: ")]
    assert report[-2].startswith("top-1 agreement with the float model ")
    assert lines[-1] == f"{file}: {file.stat().st_size / 1e6:.2f} MB"
    assert int8.load(file).image_size == size


def test_a_flat_folder_will_do(model: Path, image_folder: Path, tmp_path: Path, vitkd) -> None:
    (tmp_path / "flat").mkdir()
    for file in list((image_folder / "3").iterdir()):
        shutil.copy(file, tmp_path / "flat")
    (tmp_path / "flat" / "notes.txt").write_text("no image, and not taken for one")
    file = tmp_path / "student.safetensors"
    result = vitkd("quantize", model, "--images", tmp_path / "flat", "-o", file)
    assert result.code == 0, result.err
    assert file.read_bytes() == expected(model, list_images(image_folder / "3"))


def test_quantize_skips_bad_images_and_counts_them(
    model: Path, image_folder: Path, tmp_path: Path, vitkd
) -> None:
    shutil.copytree(image_folder / "3", tmp_path / "in")
    bad = tmp_path / "in" / "100.png"
    bad.write_text("no image")
    given = ("quantize", model, "--images", tmp_path / "in", "-o", tmp_path / "a.safetensors")
    result = vitkd(*given)
    assert result.code == 1
    assert f"DataError: {bad} cannot be read" in result.err
    assert len(result.err.splitlines()) == 1
    assert not (tmp_path / "a.safetensors").exists()
    result = vitkd(*given, "--skip-bad")
    assert result.code == 0, result.err
    good = len(list((image_folder / "3").iterdir()))
    assert result.out.startswith(f"{good} of {good + 1} images, 1 skipped\n")


def test_what_cannot_be_quantized(
    model: Path, quantized: Path, image_folder: Path, tmp_path: Path, vitkd
) -> None:
    out = tmp_path / "out.safetensors"
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "1.png").write_text("no image")
    usage = {
        (model, image_folder, "out.onnx"): "-o: expected a name in .safetensors, got out.onnx",
        (model, image_folder, tmp_path / "no" / "out.safetensors"): f"{tmp_path}/no is no folder",
        (model, image_folder, model): "is the model itself",
        (quantized, image_folder, out): "student.safetensors is int8 already",
        (model, image_folder, out, "--count", 0): "--count",
        (model, image_folder, out, "--calibration", "best"): "--calibration",
        (model, image_folder): "-o",
    }
    failed = {
        (model, tmp_path / "none", out): f"DataError: {tmp_path}/none is no folder",
        (model, tmp_path / "empty", out): f"DataError: {tmp_path}/empty holds no images",
        (model, tmp_path / "bad", out, "--skip-bad"): "not one of 1 images can be read",
        (tmp_path / "none.safetensors", image_folder, out): "none.safetensors is not a file",
    }
    before = model.read_bytes()
    for code, cases in ((2, usage), (1, failed)):
        for (source, folder, *rest), message in cases.items():
            given = ["quantize", source, "--images", folder]
            result = vitkd(*given, *(["-o", *rest] if rest else []))
            assert result.code == code, (message, result)
            assert message in result.err
            assert code == 2 or len(result.err.splitlines()) == 1
    assert not out.exists()
    assert model.read_bytes() == before


def test_an_operation_that_the_engine_lacks_is_named(
    image_folder: Path, tmp_path: Path, vitkd
) -> None:
    torch.manual_seed(0)
    lacking = models.create("ghostnet_100", num_classes=10)
    names = [str(i) for i in range(10)]
    models.save(tmp_path / "ghost.safetensors", lacking, name="ghostnet_100", options={},
                num_classes=10, pixels=PIXELS, classes=names)  # fmt: skip
    given = ("--images", image_folder / "1", "-o", tmp_path / "out.safetensors")
    result = vitkd("quantize", tmp_path / "ghost.safetensors", *given)
    assert result.code == 1
    assert re.search(r"UnsupportedError: .*GhostModule.*aten\.cat", result.err)
    assert len(result.err.splitlines()) == 1


# eval, predict and profile


def test_eval_is_of_the_engines_answers(quantized: Path, image_folder: Path, vitkd) -> None:
    outputs = [vitkd("eval", quantized, image_folder, "--workers", 0, *more)
               for more in ([], ["--threads", 2, "--batch-size", 7])]  # fmt: skip
    assert [x.code for x in outputs] == [0, 0], outputs
    printed = dict(line.split() for line in outputs[0].out.splitlines()[1:])
    assert outputs[0].out.startswith("60 images, 0 skipped\n")
    assert outputs[1].out == outputs[0].out
    files = list_images(image_folder)
    logits = int8.load(quantized)(np.stack([read(file, PIXELS) for file in files]))
    labels = np.array([int(file.parent.name) for file in files])
    assert printed["top1"] == f"{(logits.argmax(1) == labels).mean():.4f}"
    nll = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(labels))
    assert float(printed["nll"]) == pytest.approx(nll.item(), abs=1e-4)


def test_eval_of_a_packed_file(
    quantized: Path, image_folder: Path, tmp_path: Path, vitkd, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "val.pack"
    assert vitkd("pack", image_folder, "-o", file).code == 0
    for _ in range(2):
        whole = vitkd("eval", quantized, image_folder, "--workers", 0)
        assert whole.out.startswith("60 images, 0 skipped\n")
        assert vitkd("eval", quantized, file, "--workers", 0).out == whole.out
        monkeypatch.setattr(cli, "find_spec", lambda _: None)  # as without the extra `distill`
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    result = vitkd("eval", quantized, file)
    assert result.code == 1 and f"DataError: {file}/0/0.png cannot be read: its bytes" in result.err
    assert vitkd("eval", quantized, file, "--skip-bad").out.startswith("59 images, 1 skipped\n")


def test_eval_gives_each_class_in_json(quantized: Path, image_folder: Path, vitkd) -> None:
    result = vitkd("eval", quantized, image_folder, "--workers", 0, "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)  # and nothing else on stdout
    plain = vitkd("eval", quantized, image_folder, "--workers", 0).out.splitlines()[1:]
    assert {k: f"{v:.4f}" for k, v in found["metrics"].items()} == dict(map(str.split, plain))
    assert (found["model"], found["folder"]) == (str(quantized), str(image_folder))
    assert (found["images"], found["skipped"]) == (60, 0)
    files = list_images(image_folder)
    answers = int8.load(quantized)(np.stack([read(file, PIXELS) for file in files])).argmax(1)
    labels = np.array([int(file.parent.name) for file in files])
    for i, row in enumerate(found["classes"]):
        mine = labels == i
        assert (row["class"], row["images"]) == (str(i), mine.sum())
        wanted = (answers[mine] == i).mean() if mine.any() else None
        assert row["recall"] == (None if wanted is None else pytest.approx(wanted))


def test_eval_knows_wordnet_ids() -> None:
    info = ImageNetInfo()
    assert models.class_names(info.label_descriptions())[1] == info.label_names()
    assert models.class_names(("a", "b")) == [["a", "b"]]


def test_predict_is_of_the_engines_answers(quantized: Path, image_folder: Path, vitkd) -> None:
    files = list_images(image_folder)[:5]
    result = vitkd("predict", quantized, *files, "--top", 2)
    assert result.code == 0, result.err
    assert vitkd("predict", quantized, *files, "--top", 2, "--threads", 2).out == result.out
    logits = int8.load(quantized)(np.stack([read(file, PIXELS) for file in files]))
    best = torch.tensor(logits).double().softmax(1).topk(2)
    for file, line, p, i in zip(files, result.out.splitlines(), *best, strict=True):
        assert line == f"{file}: {i[0]} {100 * p[0]:.1f}%, {i[1]} {100 * p[1]:.1f}%"


def test_predict_divides_logits_by_the_files_temperature(
    quantized: Path, image_folder: Path, tmp_path: Path, vitkd
) -> None:
    warm = tmp_path / "warm.int8.safetensors"
    int8.file.save(replace(int8.file.read(quantized), temperature=2.5), warm)
    image, session = list_images(image_folder)[0], int8.load(warm)
    logits = session(read(image, session)[None])[0].astype(np.float64)
    result = vitkd("predict", warm, image, "--json", "--top", 10)
    expected = np.sort(np.exp(logits / 2.5) / np.exp(logits / 2.5).sum())[::-1]
    assert json.loads(result.out)["probabilities"] == pytest.approx(expected, abs=1e-6)
    assert np.ptp(logits) > 0.01  # or any temperature would do


def test_predict_takes_folders(quantized: Path, image_folder: Path, tmp_path: Path, vitkd) -> None:
    for i, file in enumerate(list_images(image_folder)[:12]):
        (tmp_path / "in" / "deep").mkdir(parents=True, exist_ok=True)
        shutil.copy(file, tmp_path / "in" / ("deep" if i % 2 else "") / f"{i}.png")
    (tmp_path / "in" / "notes.txt").write_text("no image, and not taken for one")
    (tmp_path / "none").mkdir()
    files = [tmp_path / "in" / f"{i}.png" for i in range(0, 12, 2)]
    files += [tmp_path / "in" / "deep" / f"{i}.png" for i in range(1, 12, 2)]
    given = (files[3], tmp_path / "in", files[0])
    result = vitkd("predict", quantized, *given)
    assert result.code == 0, result.err
    assert result.out == vitkd("predict", quantized, files[3], *files, files[0]).out
    assert [line.split(":")[0] for line in result.out.splitlines()][1:-1] == list(map(str, files))
    for wrong, why in {
        "https://example.com/cat.jpg": "is a URL; download it, and name the file",
        f"{tmp_path}/none": "holds no images",
        f"{tmp_path}/cat.jpg": "cannot be read",
    }.items():
        result = vitkd("predict", quantized, wrong)
        assert (result.code, result.out) == (1, "") and len(result.err.splitlines()) == 1
        assert f"DataError: {wrong} {why}" in result.err


def test_a_path_in_the_home_folder(
    quantized: Path, image_folder: Path, tmp_path: Path, vitkd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell leaves ~ alone behind --option=."""
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(quantized, tmp_path / "student.safetensors")
    shutil.copytree(image_folder / "1", tmp_path / "in")
    given = ("predict", "~/student.safetensors", "~/in")
    assert vitkd(*given).out == vitkd("predict", quantized, tmp_path / "in").out != ""
    result = vitkd("quantize", "~/student.safetensors", "--images=~/in", "-o", "~/out.safetensors")
    assert "MODEL: " + str(tmp_path / "student.safetensors") + " is int8 already" in result.err


def test_predict_needs_no_torch(quantized: Path, image_folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from vitkd_fast.cli import app; app(standalone_mode=False);"
        "print('torch' in sys.modules, 'timm' in sys.modules)"
    )
    command = [sys.executable, "-c", code, "predict", str(quantized), str(image_folder / "1")]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[-1] == "False False"


def test_profile(quantized: Path, vitkd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_timing, "_LIMIT", 5.0)  # for a 99th percentile
    result = vitkd("profile", quantized, "--image-size", 64, "--batch", 3, "--threads", 2)
    assert result.code == 0, result.err
    *table, last = result.out.splitlines()
    session = int8.load(quantized, image_size=64)
    layers = session.profile(np.zeros((1, 64, 64, 3), np.uint8)).layers
    assert table[0].split()[:2] == ["layer", "kernel"]
    assert [row.split()[1] for row in table[1:-1]] == [layer.name for layer in layers]
    assert table[-1].startswith("all ")
    found = re.fullmatch(
        r"int8\.Session\(10 classes, 64x64, \w+, 2 threads, .*\), batch 3, ([\d,]+) calls: "
        r"p50 (\S+) ms, p90 (\S+) ms, p99 (\S+) ms, CPU (\S+) ms, ([\d,]+) images/s",
        last,
    )
    assert found, last
    calls, p50, p90, p99, cpu, rate = (float(x.replace(",", "")) for x in found.groups())
    assert 3e3 / p50 == pytest.approx(rate, rel=0.01)
    assert p50 <= p90 <= p99 and cpu > 0 and calls >= 100


def test_a_damaged_file_is_named(
    quantized: Path, image_folder: Path, tmp_path: Path, vitkd
) -> None:
    content = bytearray(quantized.read_bytes())
    content[-9] ^= 1
    (tmp_path / "flipped.safetensors").write_bytes(content)
    (tmp_path / "short.safetensors").write_bytes(content[: len(content) // 2])
    image = next((image_folder / "1").iterdir())
    for name in ("flipped", "short"):
        file = tmp_path / f"{name}.safetensors"
        for command in (("eval", file, image_folder), ("predict", file, image), ("profile", file)):
            result = vitkd(*command)
            assert result.code == 1
            assert f"FileError: {file}: " in result.err
            assert len(result.err.splitlines()) == 1


@pytest.mark.parametrize("name", ["model", "bare", "none", "text"])
def test_profile_of_what_is_no_int8_file(name: str, model: Path, tmp_path: Path, vitkd) -> None:
    file = model if name == "model" else tmp_path / f"{name}.safetensors"
    kind, sentence = (
        "FileError",
        "it is a float model; make an int8 file of it with `vitkd quantize`",
    )
    if name == "bare":  # as timm writes them
        safetensors.torch.save_file({"weight": torch.zeros(2, 2)}, file)
    elif name == "text":
        file.write_text("weights")
        sentence = "this is no safetensors file of an int8 graph"
    elif name == "none":
        kind, sentence = "FileNotFoundError", "No such file"
    result = vitkd("profile", file)
    assert result.code == 1 and len(result.err.splitlines()) == 1
    assert f"vitkd: {kind}: " in result.err and file.name in result.err
    assert sentence in result.err


def test_quantize_a_vision_transformer(image_folder: Path, tmp_path: Path, vitkd) -> None:
    """One sentence: where, what, and which models there are."""
    options = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3}
    file = tmp_path / "vit.safetensors"
    models.save(
        file,
        models.create("vit_tiny_patch16_224", num_classes=10, options=options),
        name="vit_tiny_patch16_224",
        options=options,
        num_classes=10,
        pixels=PIXELS,
        classes=[str(i) for i in range(10)],
    )
    result = vitkd("quantize", file, "--images", image_folder, "-o", tmp_path / "int8.safetensors")
    assert result.code == 1 and len(result.err.splitlines()) == 1
    for part in ("patch_embed (timm.", "aten.flatten", "MobileNets (timm's mobilenetv1*, "):
        assert part in result.err


def test_quantize_with_few_images(model: Path, image_folder: Path, tmp_path: Path, vitkd) -> None:
    output = tmp_path / "int8.safetensors"
    result = vitkd("quantize", model, "--images", image_folder, "-o", output, "--count", 5)
    assert result.code == 0, result.err
    assert "warning: calibrated on 5 images; 100 to 500 are recommended" in result.out


# README, and real weights


def test_readmes_snippets_run(
    model: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, vitkd
) -> None:
    """Each class of PNG and of JPEG files calibrates; where the int8 file runs, torch does not."""
    section = (ROOT / "README.md").read_text().split("\n## Run it in int8\n")[1].split("\n## ")[0]
    python = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    shell = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    assert len(python) == 2 and len(shell) == 1
    (tmp_path / "runs/first/distilled-0").mkdir(parents=True)
    shutil.copy(model, tmp_path / "runs/first/distilled-0/best.safetensors")
    for split in ("train", "val"):
        shutil.copytree(image_folder, tmp_path / "images" / split)
    for i, file in enumerate(sorted((tmp_path / "images/train").rglob("*.png"))):
        suffix = (".png", ".jpg", ".JPEG")[i % 3]
        Image.open(file).convert("RGB").save(file.with_suffix(suffix))
        if suffix != ".png":
            file.unlink()
    Image.open(next((image_folder / "1").iterdir())).convert("RGB").save(tmp_path / "cat.jpg")
    monkeypatch.chdir(tmp_path)
    for command in shell[0].replace("\\\n", "").splitlines():
        program, *arguments = command.split("#")[0].split()
        assert program == "vitkd"
        result = vitkd(*arguments)
        assert result.code == 0, result.err
    names: dict[str, object] = {}
    exec(compile(python[0], "README.md", "exec"), names)
    assert "100 to 500 are recommended" in capsys.readouterr().out
    assert np.shape(names["images"]) == (60, 32, 32, 3)
    code = python[1] + "\nimport sys\nassert 'torch' not in sys.modules"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[0] in {str(i) for i in range(10)}


@pytest.mark.slow
def test_real_weights_keep_their_accuracy(request, tmp_path: Path, vitkd) -> None:
    """MobileNetV2's 88.8% of one image of every second class, calibrated on 128 of them."""
    folder = request.getfixturevalue("data")
    same = {"pad_type": "same"}
    weights = folder / "mobilenetv2_100.tf_in1k.safetensors"
    model = models.create("mobilenetv2_100", checkpoint=weights, options=same)
    models.save(
        tmp_path / "model.safetensors",
        model,
        name="mobilenetv2_100",
        options=same,
        num_classes=1000,
        pixels=models.Pixels(224, HALF, HALF, "bicubic", 224 / 256),
        classes=ImageNetInfo().label_descriptions(),
    )
    with zipfile.ZipFile(folder / "imagenet-sample-a.zip") as archive:
        for name in archive.namelist():
            if name.endswith(".JPEG"):
                wnid = Path(name).name.split("_")[0]
                (tmp_path / "val" / wnid).mkdir(parents=True, exist_ok=True)
                (tmp_path / "val" / wnid / Path(name).name).write_bytes(archive.read(name))
    file = tmp_path / "model.int8.safetensors"
    given = ("--images", tmp_path / "val", "-o", file, "--count", 128)
    result = vitkd("quantize", tmp_path / "model.safetensors", *given)
    assert result.code == 0, result.err
    result = vitkd("eval", file, tmp_path / "val", "--threads", 2)
    assert result.code == 0, result.err
    assert "500 images, 0 skipped" in result.out
    scores = dict(line.split() for line in result.out.splitlines()[1:])
    assert float(scores["top1"]) > 0.87
    image = next((tmp_path / "val" / "n01440764").iterdir())
    assert "tench" in vitkd("predict", file, image).out
