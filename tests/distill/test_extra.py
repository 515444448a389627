"""Training images without labels beside labelled ones, and teachers that read other sizes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vitkd_fast import models
from vitkd_fast.distill import data, sources
from vitkd_fast.distill.config import Config, ConfigError, load
from vitkd_fast.distill.datasets import NO_LABEL
from vitkd_fast.distill.experiment import distill
from vitkd_fast.distill.preflight import create_teachers
from vitkd_fast.distill.runtime import Runtime
from vitkd_fast.distill.task import DistillationTask
from vitkd_fast.functional import dkd_loss, kd_loss
from vitkd_fast.images import DataError
from vitkd_fast.nn import AttentionMapProjection
from vitkd_fast.taps import Taps

pytestmark = pytest.mark.usefixtures("one_thread")

TEACHER = (
    "teacher={model: vit_tiny_patch16_224, epochs: 1, optimizer: {lr: 4e-3, warmup_epochs: 1}, "
    "options: {patch_size: 8, embed_dim: 32, depth: 1, num_heads: 2}}"
)


@pytest.fixture(scope="module")
def parts(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every third training image in train/CLASS/; the others, unsorted, in more/."""
    root = tmp_path_factory.mktemp("parts")
    for i, file in enumerate(sorted((image_folder / "train").rglob("*.png"))):
        folder = root / "train" / file.parent.name if i % 3 == 0 else root / "more"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder)
    return root


def made(parts: Path, image_folder: Path, *overrides: str) -> Config:
    given = [f"data.train={parts}/train", f"data.val={image_folder}/val", "data.image_size=32"]
    given += [f"data.extra={parts}/more", "data.batch_size=16", "data.workers=0", TEACHER]
    return load(None, [*given, "student.model=mobilenetv2_035", *overrides])


def test_they_join_the_labelled_images(parts: Path, image_folder: Path) -> None:
    config = made(parts, image_folder)
    splits = sources.open_data(config.data)
    alone = sources.without_extra(splits).train
    assert (len(alone), len(splits.train)) == (50, 150)
    assert sources.labels(splits.train) == sources.labels(alone) == alone.labels
    assert any("100 images without labels" in note for note in splits.notes)
    train, val = data.loaders(config, splits, seed=0)
    batches = list(train.epoch())
    seen = [pair for x in batches for pair in zip(x.indices, x.labels, strict=True)]
    assert len(seen) == 144
    for index, label in seen:
        assert label == (alone.labels[index] if index < 50 else NO_LABEL)
    assert all((batch.labels != NO_LABEL).all() for batch in val.epoch())


def test_training_images_that_are_there_again_count_once(parts: Path, image_folder: Path) -> None:
    config = made(parts, image_folder, f"data.extra={parts}")
    splits = sources.open_data(config.data)
    assert len(splits.train) == 150
    assert len({splits.train.name(i) for i in range(150)}) == 150


def test_errors(parts: Path, image_folder: Path) -> None:
    for extra, message in (
        (image_folder, r"data.extra: 50 of its 200 images are validation images, such as"),
        (parts / "train", "holds no image that data.train does not"),
        (parts / "none", "data.extra: .*none is no folder"),
    ):
        with pytest.raises(DataError, match=message):
            sources.open_data(made(parts, image_folder, f"data.extra={extra}").data)
    for overrides, message in (
        (["losses={kd: {ce_weight: 0.1}}"], "losses.kd: expected ce_weight 0, with losses.ce"),
        (["losses={deit_hard: {}}"], "losses.deit_hard: needs a label of each image, and"),
        (["losses={ce: {}}", "teacher={}"], "data.extra: nothing learns from images without"),
        (["data.unlabelled=true", "losses={features: {}}"], "expected none with data.unlabelled"),
    ):
        with pytest.raises(ConfigError, match=message):
            made(parts, image_folder, *overrides)


@pytest.mark.parametrize("mixed", [False, True])
def test_the_teacher_counts_everywhere_and_labels_where_they_are(mixed: bool) -> None:
    given = ["student.model=a", "teacher.model=b", "data.train=c", "data.image_size=32"]
    torch.manual_seed(0)
    student, teacher = (models.create("mobilenetv2_035", num_classes=10) for _ in range(2))
    images = torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8)
    ids = torch.tensor([3, NO_LABEL, 1, NO_LABEL, NO_LABEL, 0])
    labels = (ids, ids.flip(0), 0.25) if mixed else ids

    def of(losses: str) -> tuple[Tensor, Tensor, Tensor]:
        config = load(None, [*given, f"losses={losses}"])
        task = DistillationTask.create(config, student, teacher, Runtime(torch.device("cpu")))
        task.eval()
        result = task(images, labels)
        return result["loss"], result["output"], task.teacher_outputs(images)[0].logits

    loss, z, t = of("{kd: {temperature: 2}, ce: {weight: 0.5}}")
    known = torch.tensor([0, 2, 5] if not mixed else [0, 5])  # both halves of a mixture
    ce = F.cross_entropy(z[known], ids[known])
    if mixed:
        ce = 0.25 * ce + 0.75 * F.cross_entropy(z[known], ids.flip(0)[known])
    torch.testing.assert_close(loss, kd_loss(z, t, temperature=2.0) + 0.5 * ce)
    loss, z, t = of("{dkd: {}}")
    filled = torch.where(ids == NO_LABEL, t.argmax(1), ids)
    expected = dkd_loss(z, t, labels=filled, temperature=4.0, beta=8.0)
    if mixed:
        flipped = torch.where(ids.flip(0) == NO_LABEL, t.argmax(1), ids.flip(0))
        expected = 0.25 * expected + 0.75 * dkd_loss(
            z, t, labels=flipped, temperature=4.0, beta=8.0
        )
    torch.testing.assert_close(loss, expected)


def test_a_run_whose_baseline_has_as_many_updates_of_labels(
    parts: Path, image_folder: Path, tmp_path: Path
) -> None:
    run = ["run.epochs=2", "run.log_every=1", f"run.folder={tmp_path}", "int8.enabled=false"]
    distill(made(parts, image_folder, "losses={kd: {}, ce: {}}", *run))
    steps = {}
    for role in ("distilled-0", "baseline-0", "teacher"):
        lines = (tmp_path / role / "metrics.jsonl").read_text().splitlines()
        rows = [row for row in map(json.loads, lines) if row["kind"] == "train"]
        steps[role] = rows[-1]["step"]
        assert all(("kd" in row) == (role == "distilled-0") for row in rows)
    # 150 and 50 images in batches of 16
    assert steps == {"distilled-0": 18, "baseline-0": 18, "teacher": 3}


def test_a_teacher_of_another_size_sees_the_students_image_resized(
    parts: Path, image_folder: Path, tmp_path: Path
) -> None:
    run = [
        f"data.train={image_folder}/train",
        "data.extra=''",
        "augmentation={scale: [0.8, 1.0], hflip: 0.0}",
    ]
    run += ["int8.enabled=false", "run.baseline=false", "run.epochs=1"]
    given = ["teacher.image_size=64", "teacher.epochs=8", f"run.folder={tmp_path}/a"]
    config = made(parts, image_folder, *run, *given)
    [teacher] = create_teachers(config, [str(i) for i in range(10)])
    assert models.input_size(teacher) == (64, 64)
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    larger = F.interpolate(images.float(), (64, 64), mode="bicubic", antialias=True).clamp(0, 255)
    predict = models.predictor(teacher).eval()
    own = models.predictor(models.create("vit_tiny_patch16_224"))[0]  # resizes nothing
    with torch.no_grad():
        torch.testing.assert_close(predict(images), teacher(own(larger)))
        assert predict(larger).equal(predict(images))
    # trained, saved, and loaded again, where it needs the size too
    distill(config)
    file = tmp_path / "a/teacher/last.safetensors"
    assert models.load(file).pixels.image_size == 64
    given = [f"teacher={{model: {file}, image_size: 64}}", f"run.folder={tmp_path}/b"]
    found = distill(made(parts, image_folder, *run, *given))
    assert found["config"]["teacher"]["image_size"] == 64
    with pytest.raises(ConfigError, match=r"teacher.model: cannot read images of data.image_size"):
        distill(made(parts, image_folder, *run, f"teacher={{model: {file}}}"))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("visformer_tiny", {"embed_dim": 48, "depth": (1, 1, 1)}),
        ("coatnet_nano_rw_224", {"embed_dim": (16, 32, 64, 96), "depths": (1, 1, 1, 1)}),
    ],
)
def test_attention_of_a_hybrids_stages(name: str, options: dict[str, Any]) -> None:
    """Each has a grid of its own, which is known after a call."""
    model = models.create(name, num_classes=2, image_size=64, options=options)
    taps = Taps(model.eval(), attention=[0, 1])
    with torch.no_grad():
        outputs = taps(torch.randn(2, 3, 64, 64))
    assert taps.grids == {0: (4, 4), 1: (2, 2)} and taps.grid is None
    features = torch.randn(2, 16, 8, 8)
    for block in taps.grids:
        module = AttentionMapProjection.between(features, outputs.queries[block], taps, block)
        assert module(features, outputs.queries[block], outputs.keys[block]).isfinite()
