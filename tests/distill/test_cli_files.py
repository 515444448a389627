"""Runs with files of models: whose classes they have, and what a file that teaches is asked."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from support.run_tools import arguments
from vitkd_fast import models
from vitkd_fast.distill import report

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def named(image_folder: Path, tmp_path: Path) -> Path:
    """The images with classes that are called c0 to c9."""
    shutil.copytree(image_folder, tmp_path / "named")
    for folder in (tmp_path / "named").glob("*/*"):
        folder.rename(folder.with_name(f"c{folder.name}"))
    return tmp_path / "named"


def saved_teacher(file: Path, classes: list[str]) -> Path:
    options = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    name, half = "vit_tiny_patch16_224", (0.5, 0.5, 0.5)
    count = len(classes)
    model = models.create(name, num_classes=count, image_size=32, options=options)
    pixels = models.Pixels(32, half, half, "bicubic", 0.875)
    models.save(
        file, model, name=name, options=options, num_classes=count, pixels=pixels, classes=classes
    )
    return file


@pytest.mark.parametrize(
    ("classes", "code", "error"),
    [
        ([f"c{i}" for i in range(9)] + ["zebra"], 1, "images that it lacks: c9; its others: zebra"),
        ([f"c{i}" for i in reversed(range(10))], 1, "its classes are the images' in another order"),
        (["c0", "c1"], 2, "has 2 classes, and the images have 10"),
    ],
)
def test_a_teacher_of_other_classes_is_refused(
    named: Path, tmp_path: Path, vitkd, classes: list[str], code: int, error: str
) -> None:
    file = saved_teacher(tmp_path / "teacher.safetensors", classes)
    given = [x for x in arguments(named, tmp_path / "run") if not x.startswith("teacher.")]
    result = vitkd("distill", *given, f"teacher.model={file}")
    assert (result.code, result.out) == (code, "")
    assert f"teacher.model: {'file ' if code == 1 else ''}{file}" in result.err
    assert error in result.err


def test_eval_matches_classes_by_name(named: Path, tmp_path: Path, vitkd) -> None:
    file = saved_teacher(tmp_path / "m.safetensors", [f"c{i}" for i in range(9)] + ["zebra"])
    result = vitkd("eval", file, named / "val")
    assert result.code == 1
    assert f"{file}: classes of the images that it lacks: c9; its others: zebra" in result.err


def test_a_run_goes_on_with_its_own_images_only(
    image_folder: Path, run_folder: Path, named: Path, tmp_path: Path, vitkd
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run_folder, copy)
    result = vitkd("distill", *arguments(named, copy), "--resume")
    assert result.code == 1
    assert (
        "--resume: the run was begun with the classes 0, 1, 2, 3, 4, 5, 6, 7, 8, 9;" in result.err
    )


def test_a_student_begins_with_weights_of_other_classes(named: Path, tmp_path: Path, vitkd) -> None:
    """Its classifier is new, which is said: for another number of classes, and for other names."""
    given = [x for x in arguments(named, tmp_path / "run") if not x.startswith(("teacher.", "los"))]
    for classes in (["a", "b", "c"], [f"x{i}" for i in range(10)]):
        file, pixels = tmp_path / "start.safetensors", models.Pixels.of(models.create("resnet18"))
        model = models.create("mobilenetv2_035", num_classes=len(classes))
        models.save(
            file, model, name="mobilenetv2_035", options={}, num_classes=len(classes),
            pixels=pixels, classes=classes,
        )  # fmt: skip
        result = vitkd("distill", *given, f"student.checkpoint={file}", "--dry-run")
        assert result.code == 0, result.err
        assert f"student: mobilenetv2_035: weights: checkpoint {file}; new classifier" in result.out


def test_a_trained_file_teaches(
    image_folder: Path, run_folder: Path, tmp_path: Path, vitkd
) -> None:
    kept = arguments(image_folder, tmp_path / "run")
    kept = [x for x in kept if not x.startswith("teacher.")]
    file = run_folder / "teacher" / "last.safetensors"
    result = vitkd("distill", *kept, f"teacher.model={file}", "run.seeds=[0]", "run.baseline=false")
    assert result.code == 0, result.err
    again, first = report.read(tmp_path / "run"), report.read(run_folder)
    assert again["models"][0]["mean"] == first["models"][0]["mean"]


def test_a_file_that_teaches_is_all_that_is_said_of_it(
    image_folder: Path, run_folder: Path, tmp_path: Path, vitkd
) -> None:
    file = run_folder / "teacher" / "last.safetensors"
    result = vitkd("distill", *arguments(image_folder, tmp_path / "run"), f"teacher.model={file}")
    assert result.code == 2
    assert "is a file, with which pretrained, checkpoint, options and epochs have" in result.err


def test_a_teachers_checkpoint_has_the_images_classes(
    image_folder: Path, run_folder: Path, tmp_path: Path, vitkd
) -> None:
    file = run_folder / "teacher" / "last.safetensors"
    given = [*arguments(image_folder, tmp_path / "run"), "run.seeds=[0]", "run.baseline=false"]
    result = vitkd("distill", *given, "teacher.epochs=0", f"teacher.checkpoint={file}")
    assert result.code == 0, result.err
    again, first = report.read(tmp_path / "run"), report.read(run_folder)
    assert again["models"][0]["mean"] == first["models"][0]["mean"]


def test_thumbnails_are_of_the_images_they_name(
    image_folder: Path, run_folder: Path, tmp_path: Path, vitkd
) -> None:
    copy = tmp_path / "images"
    shutil.copytree(image_folder, copy)
    first = next(iter(sorted((copy / "val" / "0").iterdir())))
    first.write_text("no image")
    given = [x for x in arguments(copy, tmp_path / "run") if not x.startswith("teacher.")]
    given += [f"teacher.model={run_folder / 'teacher' / 'last.safetensors'}", "run.baseline=false"]
    result = vitkd("distill", *given, "run.seeds=[0]", "--skip-bad")
    assert result.code == 0, result.err
    results = report.read(tmp_path / "run")
    assert results["data"]["val"] == 49
    shown = results["disagreements"]["shown"]
    assert len(shown) > 5
    assert all(Path(image["name"]).parent.name == image["label"] for image in shown)
    assert any(str(first) in note for note in results["notes"])
