"""Whether models and images belong together: classes, resumed runs, and a teacher's score."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo

from vitkd_fast import models
from vitkd_fast.distill import identity, preflight, sources
from vitkd_fast.distill.config import Data, load
from vitkd_fast.images import DataError

ANIMALS = ["ant", "bee", "cat"]


def test_indices_are_by_name() -> None:
    assert identity.class_indices("m", ANIMALS, ["cat", "ant"]) == {"cat": 2, "ant": 0}
    ids = ImageNetInfo().label_names()
    words = ImageNetInfo().label_descriptions()
    assert identity.class_indices("m", words, [ids[7], ids[3]]) == {ids[7]: 7, ids[3]: 3}


def test_numbers_are_indices() -> None:
    assert identity.class_indices("m", ANIMALS, ["2", "000"]) == {"2": 2, "000": 0}
    # names before numbers: of these classes "2" is the second
    assert identity.class_indices("m", ["1", "2", "3"], ["2"]) == {"2": 1}


def test_names_that_say_nothing_are_by_position() -> None:
    assert identity.class_indices("m", ["0", "1", "2"], ANIMALS) == {"ant": 0, "bee": 1, "cat": 2}
    with pytest.raises(DataError, match="lacks: ant, bee;"):
        identity.class_indices("m", ["0", "1", "2"], ["ant", "bee"])


def test_other_classes_are_named() -> None:
    with pytest.raises(
        DataError, match=r"^m: classes of the images that it lacks: zebra; its.*ant$"
    ):
        identity.class_indices("m", ANIMALS, ["bee", "cat", "zebra"])


def test_a_files_classes_are_the_images_in_their_order() -> None:
    file = models.Origin("file m.safetensors", classes=tuple(ANIMALS))
    identity.check_classes("m", file, ANIMALS)
    assert identity.same_classes(file, ANIMALS)
    with pytest.raises(
        DataError, match=r"^m: its classes are the images' in another order: ant, b"
    ):
        identity.check_classes("m", file, ["bee", "ant", "cat"])
    with pytest.raises(DataError, match=r"^m: classes of the images that it lacks: zebra;"):
        identity.check_classes("m", file, ["ant", "bee", "zebra"])
    assert not identity.same_classes(file, ["ant", "bee", "zebra"])


def test_timms_names_for_imagenet_are_one_of_many() -> None:
    timm = models.Origin("timm's vit", classes=tuple(ImageNetInfo().label_descriptions()))
    ids = ImageNetInfo().label_names()
    identity.check_classes("m", timm, ids)
    identity.check_classes("m", timm, [f"class {i}" for i in range(1000)])
    with pytest.raises(DataError, match="in another order"):
        identity.check_classes("m", timm, ids[::-1])


def test_what_the_weights_were_not_trained_on_is_said() -> None:
    half = (0.5, 0.5, 0.5)
    own = models.Pixels(224, half, half, "bicubic", 0.9)
    used = models.Pixels(32, half, half, "bicubic", 1.0)
    assert identity.differences("teacher", models.Origin("file a", pixels=own), used) == [
        "teacher: file a wants image_size 224, and data.image_size is 32",
        "teacher: file a wants crop_pct 0.9, and data.crop_pct is 1.0",
    ]
    assert identity.differences("teacher", models.Origin(), used) == []


def folder(root: Path, classes: list[str], images: int) -> Path:
    for i, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for k in range(images):
            Image.new("RGB", (8, 8), (40 * i, 9 * k, 0)).save(root / name / f"{k}.png")
    return root


def prints(root: Path) -> dict:
    return identity.fingerprint(sources.open_data(Data(train=str(root), holdout=0.25)))


def test_a_run_goes_on_with_its_images_wherever_they_are(tmp_path: Path) -> None:
    begun = prints(folder(tmp_path / "a", ANIMALS, 4))
    assert begun["train"]["images"] == 9 and begun["val"]["images"] == 3
    identity.check_resumed(begun, prints(folder(tmp_path / "elsewhere" / "b", ANIMALS, 4)))


def test_a_run_does_not_go_on_with_others(tmp_path: Path) -> None:
    begun = prints(folder(tmp_path / "a", ANIMALS, 4))
    with pytest.raises(DataError, match="begun with the classes ant, bee, cat; the images have be"):
        identity.check_resumed(begun, prints(folder(tmp_path / "b", ["bee", "cat", "zebra"], 4)))
    with pytest.raises(DataError, match=r"with 9 images in data\.train, and there are 12 now"):
        identity.check_resumed(begun, prints(folder(tmp_path / "c", ANIMALS, 5)))
    (tmp_path / "a" / "ant" / "1.png").rename(tmp_path / "a" / "ant" / "one.png")
    with pytest.raises(DataError, match="and there are files of other names now"):
        identity.check_resumed(begun, prints(tmp_path / "a"))


@pytest.mark.parametrize(
    ("right", "images", "classes", "refused"),
    [
        (0, 256, 1000, True),
        (15, 256, 1000, True),
        (20, 256, 1000, False),  # 7.8%, and 10.1% cannot be ruled out
        (200, 256, 1000, False),
        (85, 256, 3, True),  # guessing
        (154, 256, 3, False),
        (0, 18, 3, True),  # classes in another order
        (6, 18, 3, False),  # too few images to say
        (115, 256, 2, True),
        (2, 4, 2, False),
    ],
)
def test_what_can_be_no_teacher(right: int, images: int, classes: int, refused: bool) -> None:
    assert identity.is_no_teacher(right, images, classes) == refused


@pytest.mark.parametrize("classes", [10, 1000])
def test_a_new_classifier_starts_near_guessing(classes: int) -> None:
    """timm's own of ten classes starts with a loss of about 5."""
    names = [str(i) for i in range(classes)]
    given = ["student.model=mobilenetv2_050", "data.train=images", "data.image_size=32"]
    torch.manual_seed(0)
    student = preflight.create_student(load(None, given), names).train()
    images = torch.randn(32, 3, 32, 32)
    loss = torch.nn.functional.cross_entropy(student(images), torch.arange(32) % classes)
    assert loss < math.log(classes) + 0.5
