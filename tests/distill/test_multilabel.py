"""Images with several labels: folders with a file of them, metrics, and whole runs."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score, f1_score, precision_score, recall_score

from vitkd_fast import int8, models
from vitkd_fast.distill import data, datasets, multilabel, report, sources
from vitkd_fast.distill.config import ConfigError, Data, load
from vitkd_fast.images import DataError
from vitkd_fast.int8 import file as int8_file

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = ["even", "large", "round"]


def names_of(digit: int) -> list[str]:
    """One has none of them, eight has all."""
    return [
        name
        for name, known in zip(CLASSES, ("02468", "56789", "0689"), strict=True)
        if str(digit) in known
    ]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits as PNG files below train/ and val/, with labels.csv and labels.json in each."""
    root = tmp_path_factory.mktemp("labelled")
    digits = datasets.Digits()
    for part, first in (("train", 0), ("val", 160)):
        rows = {}
        for i in range(first, first + (160 if part == "train" else 48)):
            image, digit = digits.read(i)
            file = root / part / "images" / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(file)
            rows[f"images/{i}.png"] = names_of(digit)
        (root / part / "labels.json").write_text(json.dumps(rows))
        with open(root / part / "labels.csv", "w", newline="") as text:
            lines = csv.writer(text)
            lines.writerow(["file", *CLASSES])
            lines.writerows([f, *(int(c in r) for c in CLASSES)] for f, r in rows.items())
    return root


@pytest.mark.parametrize("file", ["labels.csv", "labels.json"])
def test_a_folder_with_a_file_of_labels(labelled: Path, file: str) -> None:
    section = {"train": f"{labelled}/train", "val": f"{labelled}/val", "labels": file}
    splits = sources.open_data(Data(**section))
    assert splits.classes == CLASSES
    assert (len(splits.train), len(splits.val)) == (160, 48)
    digits = datasets.Digits()
    for i in (0, 1, 8):
        want = [float(name in names_of(digits.labels[i])) for name in CLASSES]
        assert splits.train.read(i)[1].tolist() == want
    held = sources.open_data(Data(train=section["train"], labels=file, holdout=0.25))
    assert (len(held.train), len(held.val)) == (120, 40)
    counted = sources.labels(held.train)
    assert counted is not None
    assert len(counted) == sum(int(held.train.read(i)[1].sum()) for i in range(120))
    loader = data.Loader(
        splits.val,
        data.eval_transform(32, 1.0, "bicubic"),
        Data(batch_size=20, workers=0),
        seed=None,
    )
    batches = list(loader.epoch())
    assert [[*batch.labels.shape] for batch in batches] == [[20, 3], [20, 3], [8, 3]]
    assert batches[0].labels.dtype == torch.float32


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("a.csv", "file,x\nno.png,1\n", "image .*no.png of a.csv does not exist; --skip-bad"),
        ("a.csv", "file,x\nb.png,2\n", "line 2: expected a file and 1 of 0 and 1"),
        ("a.csv", "file,x\nb.png\n", "line 2: expected a file and 1 of 0 and 1"),
        ("a.csv", "file,x\nb.png,1\nb.png,0\n", "line 3: b.png stands twice"),
        ("a.csv", "file,x,x\nb.png,1,1\n", "a class stands twice"),
        ("a.csv", "", "names no image, or no class"),
        ("a.json", '{"b.png": "x"}', "expected a mapping of files to lists of names"),
        ("a.json", "[1]", "has no attribute"),
        ("a.json", "{", "Expecting"),
        ("none.csv", "", "none.csv cannot be read"),
    ],
)
def test_files_that_are_not_right(tmp_path: Path, file: str, text: str, message: str) -> None:
    Image.fromarray(datasets.Digits().read(0)[0]).save(tmp_path / "b.png")
    if not file.startswith("none"):
        (tmp_path / file).write_text(text)
    with pytest.raises(DataError, match=f"^data.train: .*{message}"):
        sources.open_data(Data(train=str(tmp_path), labels=file))


def test_classes_of_validation_are_trainings(labelled: Path, tmp_path: Path) -> None:
    Image.fromarray(datasets.Digits().read(0)[0]).save(tmp_path / "b.png")
    (tmp_path / "labels.csv").write_text("file,even,odd\nb.png,1,0\n")
    with pytest.raises(DataError, match=r"data.val: .* has a class 'odd' that is not known"):
        sources.open_data(Data(train=f"{labelled}/train", val=str(tmp_path), labels="labels.csv"))
    (tmp_path / "labels.csv").write_text("file,even\nb.png,1\nno.png,1\n")
    section = {"train": f"{labelled}/train", "val": str(tmp_path), "labels": "labels.csv"}
    splits = sources.open_data(Data(**section, skip_bad=True))
    assert splits.val.read(0)[1].tolist() == [1, 0, 0]
    assert splits.skipped == [f"image {tmp_path}/no.png of labels.csv does not exist"]
    assert "data.val: 2 of 3 classes have no image: 'large', 'round'" in splits.notes


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ("kd: {}", "losses.kd: is of images with one class each, and data.labels gives them"),
        ("binary_kd: {}, ce: {}", "losses.ce: is of images with one class each"),
    ],
)
def test_losses_belong_to_the_labels(losses: str, message: str) -> None:
    given = ["student.model=a", "teacher.model=b", "data.train=c", f"losses={{{losses}}}"]
    with pytest.raises(ConfigError, match=f"^{message}"):
        load(None, [*given, "data.labels=labels.csv"])
    with pytest.raises(ConfigError, match=r"^losses.binary_kd: .* and data.labels is missing"):
        load(None, [*given[:3], "losses={binary_kd: {}}"])
    several = load(None, [*given[:3], "data.labels=labels.csv"]).losses
    assert [name for name, _ in several.terms()] == ["binary_kd"]
    assert [name for name, _ in several.baseline().terms()] == ["bce"]
    with pytest.raises(ConfigError, match=r"^data.labels: expected a folder data.train"):
        load("digits", ["data.labels=labels.csv", "losses={binary_kd: {}}"])


def test_metrics_are_sklearns() -> None:
    torch.manual_seed(0)
    y = torch.rand(50, 4) < torch.tensor([0.1, 0.5, 0.8, 0.0])  # the last one never occurs
    x = 2 * torch.randn(50, 4) + y
    t = x + torch.randn(50, 4)
    parts = [slice(0, 30), slice(30, 50)]
    places = iter(parts), iter(parts)
    found = multilabel.evaluate(
        lambda images: x[next(places[0])],
        [(torch.zeros(len(y[i]), 3, 1, 1), y[i].float()) for i in parts],
        classes=4,
        teacher=lambda images: t[next(places[1])],
    )
    odds, said = x.sigmoid().numpy(), (x > 0).numpy()
    truth = y.numpy()
    macro = {"average": "macro", "zero_division": 0}
    wanted = {
        "map": np.mean([average_precision_score(truth[:, i], odds[:, i]) for i in range(3)]),
        "f1": f1_score(truth, said, **macro),
        "precision": precision_score(truth, said, **macro),
        "recall": recall_score(truth, said, **macro),
        "micro_f1": f1_score(truth, said, average="micro"),
        "exact": (said == truth).all(1).mean(),
        "nll": torch.nn.functional.binary_cross_entropy_with_logits(x, y.float()).item(),
    }
    assert found.metrics == pytest.approx(wanted, abs=1e-5)
    assert found.fidelity["agreement"] == pytest.approx(((x > 0) == (t > 0)).float().mean().item())
    assert found.fidelity["kl"] > 0
    assert multilabel.chance(found.confusion) == pytest.approx(truth[:, :3].mean())
    rows = multilabel.per_class(found.confusion, list("abcd"))
    assert [row["images"] for row in rows] == truth.sum(0).tolist()
    assert rows[1]["recall"] == pytest.approx(recall_score(truth[:, 1], said[:, 1]))
    assert rows[3]["recall"] is None
    with pytest.raises(ValueError, match=r"labels: expected multi-hot \[5, 4\], got \[5\]"):
        multilabel.evaluate(lambda x: x, [(torch.zeros(5, 3, 1, 1), torch.zeros(5))], classes=4)
    nan = torch.full((5, 4), torch.nan)
    with pytest.raises(ValueError, match="student: expected finite logits, got NaN or Inf for 5"):
        multilabel.evaluate(lambda x: nan, [(torch.zeros(5, 3, 1, 1), nan * 0 + 1)], classes=4)


def arguments(labelled: Path, folder: Path) -> list[str]:
    return [
        f"data={{train: {labelled}/train, val: {labelled}/val, labels: labels.csv}}",
        *("data.image_size=32", "data.batch_size=16", "data.workers=0"),
        "teacher={model: vit_tiny_patch16_224, epochs: 10, optimizer: {lr: 4e-3}}",
        "teacher.options={patch_size: 8, embed_dim: 32, depth: 1, num_heads: 2}",
        *("augmentation.scale=[0.8, 1.0]", "augmentation.hflip=0.0", "augmentation.mixup=0.1"),
        "student.model=mobilenetv2_035",
        "losses={binary_kd: {temperature: 2, bce_weight: 0.5}}",
        *("run.epochs=2", "run.seeds=[0, 1]", f"run.folder={folder}"),
        "int8.calibration_images=32",
    ]


@pytest.fixture(scope="module")
def run(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from vitkd_fast.distill.experiment import distill

    folder = tmp_path_factory.mktemp("runs") / "several"
    torch.set_num_threads(1)
    distill(load(None, arguments(labelled, folder)))
    return folder


def test_a_run(run: Path, vitkd) -> None:
    results = report.read(run)
    assert [m["role"] for m in results["models"]] == ["teacher", "baseline", "distilled", "int8"]
    assert results["data"] == {"train": 160, "val": 48, "classes": CLASSES}
    teacher = results["models"][0]["mean"]
    assert teacher["map"] > 0.55  # guessing gets 0.47
    assert {"f1", "micro_f1", "exact", "nll"} <= teacher.keys()
    assert results["models"][3]["mean"]["unchanged"] > 0.8
    assert results["comparison"]["metric"] == "map"
    assert results["confusion"] is None and results["disagreements"] is None
    rows = results["per_class"]["distilled"]
    assert [row["class"] for row in rows] == CLASSES
    shown = vitkd("report", run)
    assert shown.code == 0
    assert "mAP %" in shown.out
    page = (run / "report.html").read_text()
    assert "Mean average precision" in page and "validation mAP, %" in page
    assert "Top-1 accuracy" not in page and "Top-1, %" not in page
    curve = results["curves"]["distilled, seed 0"]["val"]
    assert [row["map"] for row in curve] and "top1" not in curve[0]


@pytest.mark.parametrize("name", ["last.safetensors", "last.int8.safetensors"])
def test_predict_and_eval(run: Path, labelled: Path, vitkd, name: str) -> None:
    """Every class above the threshold, and the metrics that the report has."""
    file = run / "distilled-0" / name
    image = labelled / "val" / "images" / "160.png"
    for threshold in (0.0, 0.4, 1.0):
        shown = vitkd("predict", file, image, f"--threshold={threshold}")
        assert shown.code == 0, shown.err
        _, _, answers = shown.out.strip().partition(": ")
        found = [x.rpartition(" ") for x in answers.split(", ") if answers != "none"]
        odds = [float(x.rstrip("%")) / 100 for *_, x in found]
        assert odds == sorted(odds, reverse=True)
        assert all(x >= threshold - 1e-3 for x in odds)
        if threshold == 0:
            assert sorted(name for name, *_ in found) == CLASSES
        if threshold == 1:
            assert answers == "none"
    shown = vitkd("eval", file, labelled / "val", "--labels", "labels.json", "--json")
    assert shown.code == 0, shown.err
    tree = json.loads(shown.out)
    assert tree["images"] == 48
    assert [row["class"] for row in tree["classes"]] == CLASSES
    role = "int8" if "int8" in name else "distilled"
    rows = {m["role"]: m["runs"][0]["metrics"] for m in report.read(run)["models"]}
    assert tree["metrics"]["map"] == pytest.approx(rows[role]["map"], abs=1e-3)
    lines = vitkd("eval", file, labelled / "val").out.splitlines()
    assert lines[0] == "48 images, 0 skipped"
    assert vitkd("eval", file, labelled / "train" / "images").code == 1  # without a file of labels


def test_files_say_that_classes_are_not_exclusive(
    run: Path, labelled: Path, tmp_path: Path, vitkd
) -> None:
    file = run / "distilled-0" / "last.int8.safetensors"
    graph = int8_file.read(file)
    assert graph.multilabel and int8.load(file).multilabel
    assert int8_file.read(int8_file.dump(graph)).multilabel
    alone = dataclasses.replace(graph, multilabel=False)
    assert b"multilabel" not in int8_file.dump(alone)  # so that older readers take the file
    assert not int8.load(alone).multilabel
    with pytest.raises(int8.FileError, match="multilabel: expected a bool, got 1"):
        int8_file.dump(dataclasses.replace(graph, multilabel=1))  # type: ignore[arg-type]
    weights, again = run / "distilled-0" / "last.safetensors", tmp_path / "a.int8.safetensors"
    assert models.Origin.of(models.load(weights).model).multilabel
    images = labelled / "train" / "images"
    result = vitkd("quantize", weights, "--images", images, "-o", again, "--count", "32")
    assert result.code == 0, result.err
    assert int8.load(again).multilabel


@pytest.mark.slow
def test_a_teacher_of_the_other_kind_is_refused(
    run: Path, labelled: Path, tmp_path: Path, vitkd
) -> None:
    loaded = models.load(run / "teacher" / "last.safetensors")
    other = tmp_path / "other.safetensors"
    models.save(
        other,
        loaded.model,
        name="vit_tiny_patch16_224",
        options={"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2},
        num_classes=3,
        pixels=loaded.pixels,
        classes=CLASSES,
    )
    given = [x for x in arguments(labelled, tmp_path / "run") if not x.startswith("teacher")]
    result = vitkd("distill", *given, f"teacher.model={other}")
    assert result.code == 2
    assert "trained on one class for each image; there is several labels" in result.err
    given.append("run.max_steps=2")
    files = [f"{{model: {run}/teacher/{name}.safetensors}}" for name in ("last", "best")]
    average = f"teacher=[{', '.join(files)}]"
    result = vitkd("distill", *given, average, "run.seeds=[0]", "int8.enabled=false")
    assert result.code == 0, result.err  # of several teachers, the mean of their sigmoids
