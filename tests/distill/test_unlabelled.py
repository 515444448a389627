"""Runs without labels: a folder of images, a teacher's features, k-NN and a linear classifier."""

from __future__ import annotations

import os
import shutil
from html import unescape
from pathlib import Path

import pytest
import torch
from torch import nn

from support.loop_tools import TINY, student, teacher
from support.run_tools import distill
from vitkd_fast import int8, models
from vitkd_fast.distill import datasets, identity, logger, report, sources
from vitkd_fast.distill.config import ConfigError, load
from vitkd_fast.distill.loop import Trainer
from vitkd_fast.distill.runtime import Runtime
from vitkd_fast.distill.task import DistillationTask

pytestmark = pytest.mark.usefixtures("one_thread")

LEAST = ["data.unlabelled=true", "data.train=x", "teacher.model=vit_tiny_patch16_224"]
LEAST += ["student.model=mobilenetv2_035"]


@pytest.fixture(scope="module")
def loose_folder(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images of training, without classes: some below a folder, and a text among them."""
    root = tmp_path_factory.mktemp("loose")
    (root / "more" / "deep").mkdir(parents=True)
    for i, file in enumerate(sorted((image_folder / "train").rglob("*.png"))):
        shutil.copy(file, root / "more" / "deep" if i % 3 == 0 else root)
    (root / "notes.txt").write_text("no image")
    return root


def arguments(train: Path, model: Path, folder: Path) -> list[str]:
    return [
        "data.unlabelled=true",
        f"data.train={train}",
        "data.image_size=32",
        "data.batch_size=16",
        "data.workers=0",
        "data.holdout=0.2",
        f"teacher.model={model}",
        "student.model=mobilenetv3_small_050",
        "losses={features: {stride: 8}, relation: {stride: 8}}",
        "optimizer={lr: 4e-3, ema_decay: 0.8}",
        "augmentation={scale: [0.8, 1.0], hflip: 0.0}",
        "run.epochs=8",
        "run.eval_every=8",
        "run.log_every=4",
        "run.precision=float32",
        f"run.folder={folder}",
        "int8.calibration_images=32",
    ]


@pytest.fixture(scope="module")
def teacher_file(run_folder: Path) -> Path:
    return run_folder / "teacher" / "last.safetensors"


@pytest.fixture(scope="module")
def features_run(
    loose_folder: Path, image_folder: Path, teacher_file: Path, tmp_path_factory
) -> Path:
    """A run without labels, with a small labelled set; with the teacher's classifier left out."""
    folder = tmp_path_factory.mktemp("runs") / "features"
    given = arguments(loose_folder, teacher_file, folder)
    given += [f"data.probe={image_folder}/train", f"data.probe_val={image_folder}/val"]
    (folder / "said").write_text(distill(*given, "run.seeds=[0, 1]"))
    return folder


# images


def test_images_of_a_folder_have_no_classes(loose_folder: Path, tmp_path: Path) -> None:
    config = load(None, [*LEAST, f"data.train={loose_folder}", "data.holdout=0.2"])
    splits = sources.open_data(config.data)
    assert splits.classes == []
    assert (len(splits.train), len(splits.val)) == (120, 30)
    assert splits.notes == ["data.train: files that are no images, ignored: 1 (1 .txt)"]
    names = [part.name(i) for part in splits[:2] for i in range(len(part))]
    assert len(set(names)) == 150 and any("more/deep" in name for name in names)
    assert {splits.val.read(i)[1] for i in range(30)} == {datasets.NO_LABEL}
    shutil.copytree(loose_folder / "more", tmp_path / "val")
    both = config.data.model_copy(update={"val": str(tmp_path / "val")})
    assert [len(part) for part in sources.open_data(both)[:2]] == [150, 50]
    inside = config.data.model_copy(update={"val": str(loose_folder / "more")})
    with pytest.raises(sources.DataError, match=r"^data.val: 50 of its 50 images are in data.trai"):
        sources.open_data(inside)


def test_a_data_set_keeps_its_parts_and_loses_its_labels() -> None:
    config = load("digits", ["losses={ce: {}}", "teacher.model=''"]).data
    labelled = sources.open_data(config)
    splits = sources.open_data(config.model_copy(update={"unlabelled": True}))
    assert splits.classes == [] and sources.labels(splits.train) is None
    for i in (0, 1):
        assert splits[i].name(3) == labelled[i].name(3) and len(splits[i]) == len(labelled[i])
        image, label = splits[i].read(3)
        assert label == datasets.NO_LABEL and image.tobytes() == labelled[i].read(3)[0].tobytes()
    probed = sources.open_probe(config.model_copy(update={"unlabelled": True, "probe": "digits"}))
    assert probed is not None and probed.val.name(3) == splits.val.name(3)
    assert sources.labels(probed.val) == sources.labels(labelled.val)
    # of one data set, what is scored is never trained on
    assert identity.probed_in_training(splits, probed) == []


def test_folders_that_hold_nothing_to_use(tmp_path: Path, image_folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    section = load(None, LEAST).data
    for changed, error in (
        ({"train": str(tmp_path / "none")}, "data.train: .*none is no folder"),
        ({"train": str(tmp_path / "empty")}, "data.train: .*empty holds no images"),
    ):
        with pytest.raises(sources.DataError, match=error):
            sources.open_data(section.model_copy(update=changed))
    one = tmp_path / "one"
    shutil.copytree(image_folder / "train" / "3", one / "3")
    shutil.copytree(image_folder / "train" / "4", one / "4")
    for changed, error in (
        ({"probe": str(tmp_path / "empty")}, "^data.probe: .* holds no class folder with images"),
        ({"probe": str(one), "probe_val": str(image_folder / "val")}, "^data.probe_val: .* class"),
        ({"probe": str(one), "holdout": 0.97}, "^data.probe: .* have no image: .* to fit a class"),
    ):
        with pytest.raises(sources.DataError, match=error):
            sources.open_probe(section.model_copy(update=changed))
    assert sources.open_probe(section) is None


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        (
            ["losses={kd: {}}"],
            "losses.kd: is of classes, and data.unlabelled has none; use ",
        ),
        (["losses={features: {}, ce: {}}"], "losses.ce: is of classes, and data.unlabelled"),
        (["teacher.epochs=3"], "teacher.epochs: expected 0, as data.unlabelled has no labels"),
        (["teacher.model=''"], "teacher.model: missing, and losses.features needs a teacher"),
        (["data.train=''"], "data.train: missing; name a folder with images"),
        (["data.labels=y.csv"], "data.labels: expected none with data.unlabelled=true"),
        (["data.probe_val=y"], "data.probe: missing, and data.probe_val is the other part"),
        (
            ["data.unlabelled=false", "data.probe=y", "losses={kd: {}}"],
            "data.probe: has no meaning without data.unlabelled=true",
        ),
        (["losses={features: {cosine: 0}}"], "losses.features.cosine: 0 .* greater than 0"),
    ],
)
def test_what_cannot_be_without_labels(changed: list[str], error: str) -> None:
    assert [name for name, _ in load(None, LEAST).losses.terms()] == ["features"]
    with pytest.raises(ConfigError, match=f"^{error}"):
        load(None, [*LEAST, *changed])


# the loop


def trainer(
    folder: Path, changed: tuple[str, ...] = (), constant: nn.Module | None = None
) -> Trainer:
    options = [
        "run.precision=float32",
        "data.unlabelled=true",
        "teacher.epochs=0",
        "losses={features: {stride: 8}}",
    ]
    tiny = [x for x in TINY if not x.startswith("losses")]
    config = load("digits", ["run.epochs=5", *tiny, *options, *changed])
    models_of = models.headless(student()), constant or models.headless(teacher())
    torch.manual_seed(0)  # of what losses learn
    task = DistillationTask.create(config, *models_of, Runtime.of(config))
    splits = sources.open_data(config.data)

    def save_model(path: Path, model: nn.Module) -> None:
        torch.save(model.state_dict(), path)

    return Trainer(config, task, splits, folder, seed=0, save_model=save_model)


@pytest.mark.slow
def test_the_losses_of_validation_choose_the_best_average(tmp_path: Path) -> None:
    changed = (
        "run.max_steps=8",
        "run.eval_every=1",
        "run.precision=float32",
        "data.batch_size=64",
        "optimizer.lr=2e-2",
    )
    run = trainer(tmp_path, changed)
    run.run()
    rows = [row for row in logger.read(tmp_path) if row["kind"] == "val"]
    assert len(rows) == 2
    assert all(row["loss"] == pytest.approx(row["features"]) for row in rows)
    assert run.best == -min(row["loss"] for row in rows)
    # once more by hand, of the average, with the layers as they are
    own = [x.clone() for x in run.model.state_dict().values()]
    average = run.trained.state_dict()
    assert any(not torch.equal(x, y) for x, y in zip(own, average.values(), strict=True))
    run.model.load_state_dict(average)
    run.task.eval()
    with torch.inference_mode():
        found = [
            (run.task(batch.images, batch.labels, 1.0)["loss"], len(batch.images))
            for batch in run.val_loader.epoch()
        ]
    mean = float(sum(loss * n for loss, n in found) / sum(n for _, n in found))
    assert rows[-1]["loss"] == pytest.approx(mean, rel=1e-5)
    run.model.load_state_dict(dict(zip(average, own, strict=True)))
    assert run._losses()["loss"] == pytest.approx(mean, rel=1e-5)
    again = run.model.state_dict().values()
    assert all(torch.equal(x, y) for x, y in zip(own, again, strict=True))


@pytest.mark.slow
def test_a_resumed_run_gives_the_same_weights(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole").run()
    cut = trainer(tmp_path / "cut", ("run.save_every=1",))
    update = cut.update

    def crash(batches) -> None:
        if cut.step == 3:
            raise RuntimeError("crash")
        update(batches)

    cut.update = crash  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="crash"):
        cut.run()
    again = trainer(tmp_path / "cut")
    again.restore()
    assert again.step == 3
    trained = again.run().state_dict()
    assert all(torch.equal(x, trained[key]) for key, x in whole.state_dict().items())


def test_a_student_learns_features(tmp_path: Path) -> None:
    """Those of held-out images come closer to the teacher's, less what all have in common."""
    changed = ("run.max_steps=100", "run.log_every=20", "optimizer={lr: 4e-3}", "run.epochs=40")
    plain = (
        "run.precision=float32",
        "augmentation.mixup=0.0",
        "augmentation.cutmix=0.0",
        "data.batch_size=32",
    )
    run = trainer(tmp_path, (*changed, *plain))
    run.task.calibrate(run._first_images())
    before = run._losses()["similarity"]
    trained = run.run()
    [after] = {row["similarity"] for row in logger.read(tmp_path) if row["step"] == 100 and
               row["kind"] == "val"}  # fmt: skip
    assert abs(before) < 0.2 and after > 0.4, (before, after)
    # by hand
    (tapped,) = run.task.teacher_taps
    assert tapped is not None
    layers, cosines = run.learned["features"], []
    for batch in run.val_loader.epoch():
        with torch.inference_mode():
            f_s = models.predictor(trained).eval()(batch.images)
            f_t = tapped(batch.images).pooled
            f_t = layers["standardize_pooled"](nn.functional.layer_norm(f_t, (32,)))
            cosines.append(nn.functional.cosine_similarity(layers["pooled"](f_s), f_t))
    assert after == pytest.approx(float(torch.cat(cosines).mean()), abs=1e-4)


# whole runs


def test_a_run_leaves_features_a_classifier_and_int8(
    features_run: Path, image_folder: Path, vitkd
) -> None:
    found = report.read(features_run)
    assert [row["role"] for row in found["models"]] == ["teacher", "distilled", "int8"]
    assert found["comparison"] is None
    assert found["data"] == {"train": 120, "val": 50, "classes": [str(i) for i in range(10)]}
    of_teacher, distilled, small = (row["mean"] for row in found["models"])
    assert {"top1", "knn"} <= of_teacher.keys() and "similarity" not in of_teacher
    assert {"top1", "knn", "similarity", "agreement"} <= distilled.keys()
    assert small["unchanged"] > 0.7
    html = unescape((features_run / "report.html").read_text())
    assert found["verdict"] in html and "k-NN accuracy" in html and "Cosine similarity" in html
    assert f"classifier.safetensors {image_folder}/val" in html
    for seed in (0, 1):
        folder = features_run / f"distilled-{seed}"
        body = models.load(folder / "last.safetensors")
        classifier = models.load(folder / "classifier.safetensors")
        assert body.classes == () and len(classifier.classes) == 10
        for key, x in body.model.state_dict().items():
            assert torch.equal(x, classifier.model.state_dict()[key])
        image = torch.randn(1, 3, 32, 32)
        head = classifier.model.get_classifier()
        with torch.no_grad():
            torch.testing.assert_close(head(body.model(image)), classifier.model(image))
        assert len(int8.load(folder / "last.int8.safetensors").classes) == 10
        shown = vitkd("eval", folder / "classifier.safetensors", image_folder / "val")
        assert shown.code == 0, shown.err
        printed = dict(line.split() for line in shown.out.splitlines()[1:])
        assert printed["top1"] == f"{found['models'][1]['runs'][seed]['metrics']['top1']:.4f}"
    said = (features_run / "said").read_text()
    assert "data: 120 training images, 30 for validation, no classes\n" in said
    assert "probe: 150 labelled images to fit a classifier on, 50 to score on, 10 classes" in said
    assert "32 features, k-NN top-1" in said
    assert "k-NN %  similarity" in report.table(found)


def test_predict_reads_the_classifier_and_says_what_a_body_lacks(
    features_run: Path, image_folder: Path, tmp_path: Path, vitkd
) -> None:
    image = next((image_folder / "val" / "7").iterdir())
    folder = features_run / "distilled-0"
    for name in ("classifier.safetensors", "last.int8.safetensors"):
        result = vitkd("predict", folder / name, image)
        assert result.code == 0 and result.out.startswith(f"{image}: "), result.err
    body = folder / "last.safetensors"
    commands = [("predict", body, image), ("eval", body, image_folder / "val")]
    commands += [("quantize", body, "--images", image_folder, "-o", tmp_path / "x.safetensors")]
    for command in commands:
        result = vitkd(*command)
        assert result.code == 1
        assert "last.safetensors has no classifier: it returns features" in result.err


@pytest.mark.slow
def test_a_finished_run_is_resumed_to_the_same_report(
    features_run: Path, loose_folder: Path, image_folder: Path, teacher_file: Path, tmp_path, vitkd
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(features_run, folder)
    os.unlink(folder / "distilled-0" / "classifier.safetensors")
    given = arguments(loose_folder, teacher_file, folder)
    given += [f"data.probe={image_folder}/train", f"data.probe_val={image_folder}/val"]
    result = vitkd("distill", *given, "run.seeds=[0, 1]", "--resume", "int8.enabled=false")
    assert result.code == 0, result.err
    before, after = report.read(features_run), report.read(folder)
    assert after["models"][1]["mean"] == before["models"][1]["mean"]
    files = [x / "distilled-0" / "classifier.safetensors" for x in (features_run, folder)]
    first, second = (models.load(file).model.state_dict() for file in files)
    assert all(torch.equal(x, second[key]) for key, x in first.items())


@pytest.mark.slow
def test_without_a_probe_there_is_similarity_alone(
    features_run: Path, loose_folder: Path, teacher_file: Path, tmp_path: Path, vitkd
) -> None:
    """And a headless student is a teacher too: here it teaches the next."""
    body = features_run / "distilled-0" / "last.safetensors"
    given = arguments(loose_folder, body, tmp_path / "run")
    given = [x for x in given if not x.startswith("losses")]
    given += ["losses={features: {stride: 8, teacher_stride: 8}}", "run.epochs=1"]
    result = vitkd("distill", *given, "--dry-run")
    assert result.code == 0, result.err
    assert not (tmp_path / "run").exists()
    result = vitkd("distill", *given)
    assert result.code == 0, result.err
    found = report.read(tmp_path / "run")
    assert [row["role"] for row in found["models"]] == ["teacher", "distilled"]
    assert found["models"][1]["mean"].keys() == {"similarity"}
    assert "A labelled data.probe would measure what they are worth." in result.out
    assert not (tmp_path / "run" / "distilled-0" / "classifier.safetensors").exists()
    assert models.load(tmp_path / "run" / "distilled-0" / "last.safetensors").classes == ()


@pytest.mark.slow
def test_several_teachers_of_features(
    features_run: Path, loose_folder: Path, image_folder: Path, teacher_file: Path, tmp_path, vitkd
) -> None:
    body = features_run / "distilled-0" / "last.safetensors"
    given = arguments(loose_folder, teacher_file, tmp_path / "run")
    given = [x for x in given if not x.startswith(("losses", "teacher"))]
    given += [f"teacher=[{{model: {teacher_file}}}, {{model: {body}, weight: 2}}]"]
    given += ["losses={features: {parts: pooled}}", "run.epochs=1"]
    given += [f"data.probe={image_folder}/train", f"data.probe_val={image_folder}/val"]
    result = vitkd("distill", *given, "int8.enabled=false")
    assert result.code == 0, result.err
    rows = report.read(tmp_path / "run")["models"]
    assert [row["role"] for row in rows] == ["teacher-0", "teacher-1", "teacher", "distilled"]
    assert ["knn" in row["mean"] for row in rows] == [True, True, False, True]


def test_a_teacher_that_knows_nothing_is_refused(loose_folder: Path, tmp_path: Path, vitkd) -> None:
    given = arguments(loose_folder, Path("vit_tiny_patch16_224"), tmp_path / "run")
    result = vitkd("distill", *given)
    assert result.code == 2
    assert "would teach with random weights" in result.err
    blind = models.headless(teacher())
    with torch.no_grad():
        for x in blind.parameters():
            x.zero_()
        blind.norm.bias.fill_(1)  # the same features for all images
    options = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    pixels = models.Pixels.of(blind)
    models.save(
        tmp_path / "blind.safetensors", blind, name="vit_tiny_patch16_224", options=options,
        num_classes=0, pixels=pixels, classes=(),
    )  # fmt: skip
    given = arguments(loose_folder, tmp_path / "blind.safetensors", tmp_path / "run")
    result = vitkd("distill", *given, "data.probe=digits")
    assert result.code == 2
    assert "has features whose k-NN gets" in result.err and "they cannot teach" in result.err


def test_images_that_are_trained_on_and_scored_are_noted(image_folder: Path) -> None:
    """Without labels the student has seen them, which is worth a word."""
    folder = str(image_folder / "train")
    section = load(None, [*LEAST, f"data.train={folder}", f"data.probe={folder}"]).data
    splits, probed = sources.open_data(section), sources.open_probe(section)
    assert probed is not None
    [note] = identity.probed_in_training(splits, probed)
    both = {splits.train.name(i) for i in range(len(splits.train))} & {
        probed.val.name(i) for i in range(len(probed.val))
    }
    assert note.startswith(f"data.probe: {len(both)} of the {len(probed.val)} images") and both
    assert identity.probed_in_training(splits, None) == []


@pytest.mark.slow
def test_the_recipe_runs_with_another_file_of_its_teacher(
    loose_folder: Path, image_folder: Path, tmp_path: Path, vitkd
) -> None:
    """DINOv2's architecture with one block of random weights: a checkpoint without a classifier."""
    made = models.create("vit_small_patch14_dinov2", options={"depth": 1, "img_size": 28})
    assert made.num_classes == 0
    torch.save(made.state_dict(), tmp_path / "dino.pt")
    given = [f"data.train={loose_folder}", "data.image_size=28", "data.batch_size=16"]
    given += ["data.workers=0", "teacher.pretrained=false", "teacher.options={depth: 1}"]
    given += [f"teacher.checkpoint={tmp_path / 'dino.pt'}", f"data.probe={image_folder}/train"]
    given += ["run.max_steps=3", f"run.folder={tmp_path / 'run'}", "run.log_every=1"]
    result = vitkd("distill", "features-unlabelled", *given)
    assert result.code == 0, result.err
    rows = [x for x in logger.read(tmp_path / "run" / "distilled-0") if x["kind"] == "train"]
    assert len(rows) == 3 and rows[0].keys() > {"features", "relation"}
    assert [row["role"] for row in report.read(tmp_path / "run")["models"]][1:] == [
        "distilled",
        "int8",
    ]


def test_a_step_without_labels_is_replayed(
    loose_folder: Path, teacher_file: Path, tmp_path: Path, vitkd
) -> None:
    given = arguments(loose_folder, teacher_file, tmp_path / "run")
    given = [x for x in given if not x.startswith("losses")]
    given += ["losses={features: {stride: 8, weight: {start: 1, end: 1e41}}}", "run.log_every=2"]
    result = vitkd("distill", *given)
    assert result.code == 1
    assert "loss features is not finite at step 1" in result.err
    result = vitkd("replay", tmp_path / "run" / "distilled-0" / "nonfinite.safetensors")
    assert result.code == 0, result.err
    assert "term features: inf is not finite" in result.out
