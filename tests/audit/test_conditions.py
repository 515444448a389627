"""Corruptions, augmentations, and whose answers they flip."""

from __future__ import annotations

import colorsys
import io

import numpy as np
import pytest
from PIL import Image

from vitkd_fast.audit import conditions
from vitkd_fast.audit.conditions import Condition
from vitkd_fast.audit.robustness import robustness
from vitkd_fast.distill.sources import spread

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def image() -> np.ndarray:
    """Smooth, with all colours, and black in a corner: [48, 48, 3]."""
    x, y = np.meshgrid(np.arange(48), np.arange(48))
    waves = [127 + 127 * np.sin(x / a + y / b) for a, b in ((5, 9), (7, -6), (11, 4))]
    pixels = np.stack(waves, axis=2).astype(np.uint8)
    pixels[:8, :8] = 0
    return pixels


def test_the_numbers_are_of_the_data_set_of_this_size() -> None:
    assert [conditions.strength("noise", 5, side) for side in (32, 64, 224)] == [0.1, 0.18, 0.38]
    assert [conditions.strength("blur", 1, side) for side in (47, 48, 120)] == [0.4, 0.5, 1]
    assert [conditions.strength("jpeg", 3, side) for side in (32, 64, 224)] == [58, 50, 15]
    assert conditions.strength("brightness", 2, 32) == 0.1


@pytest.mark.parametrize("name", ["noise", "blur", "jpeg", "brightness"])
def test_a_higher_severity_changes_more(name: str, image: np.ndarray) -> None:
    before = image.copy()
    changes = [
        np.abs(Condition(name, severity)(image, (0, 0)) - image.astype(float)).mean()
        for severity in conditions.SEVERITIES
    ]
    assert changes == sorted(changes) and changes[0] > 0
    assert np.array_equal(image, before)


def test_noise_is_drawn_from_the_seed(image: np.ndarray) -> None:
    condition = Condition("noise", 3)
    one, other = condition(image, (0, 1)), condition(image, (0, 2))
    assert np.array_equal(one, condition(image, (0, 1))) and not np.array_equal(one, other)
    grey = np.full((100, 100, 3), 128, np.uint8)
    drawn = condition(grey, (0, 0)) / 255.0
    assert drawn.std() == pytest.approx(0.12, rel=0.03)
    assert drawn.mean() == pytest.approx(128 / 255, abs=0.005)


def test_blur_is_a_gaussian_with_its_edges_repeated(image: np.ndarray) -> None:
    found = Condition("blur", 3)(image, (0, 0))  # of standard deviation 1
    steps = np.arange(-4, 5)
    kernel = np.exp(-(steps**2) / 2)
    kernel /= kernel.sum()
    padded = np.pad(image / 255, ((4, 4), (4, 4), (0, 0)), mode="edge")
    rows = sum(k * padded[i : i + 48] for i, k in enumerate(kernel))
    both = sum(k * rows[:, i : i + 48] for i, k in enumerate(kernel))
    assert np.abs(found - 255 * both).max() < 0.51


def test_jpeg_is_pillows(image: np.ndarray) -> None:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=65)
    assert np.array_equal(Condition("jpeg", 1)(image, (0, 0)), np.asarray(Image.open(file)))


def test_brightness_adds_to_v_of_hsv(image: np.ndarray) -> None:
    found = Condition("brightness", 2)(image, (0, 0))
    for y, x in np.ndindex(48, 48):
        h, s, v = colorsys.rgb_to_hsv(*(image[y, x] / 255))
        expected = 255 * np.array(colorsys.hsv_to_rgb(h, s, min(v + 0.2, 1)))
        assert np.abs(found[y, x] - expected).max() < 0.51


def test_augmentations(image: np.ndarray) -> None:
    assert np.array_equal(Condition("mirror")(image, (0, 0)), image[:, ::-1])
    shifted = Condition("shift")(image, (0, 0))
    assert np.array_equal(shifted[:, 6:], image[:, :-6])
    assert (shifted[:, :6] == image[:, :1]).all()
    for name in ("rotate", "zoom"):
        changed = Condition(name)(image, (0, 0))
        assert changed.shape == image.shape and changed.dtype == np.uint8
        # the middle stays where it is
        assert np.abs(changed[23:25, 23:25] - image[23:25, 23:25].astype(float)).max() < 25


@pytest.mark.parametrize(
    ("name", "severity"), [("fog", 1), ("noise", 6), ("noise", None), ("zoom", 1)]
)
def test_unknown_conditions(name: str, severity: int | None) -> None:
    with pytest.raises(ValueError, match=f"Condition: expected noise, .* got {name} of severity"):
        Condition(name, severity)


def test_flips_are_of_the_networks(images, pair, said) -> None:
    found = robustness(images, pair, said, count=90, severities=(5,), batch_size=40)
    names = [(row["name"], row["severity"]) for row in found["rows"]]
    assert names == [(x.name, x.severity) for x in conditions.every((5,))] and len(names) == 8
    chosen = spread(len(said.indices), 90)
    changed = []
    for i in chosen:
        frame, _ = images.source.read(said.indices[i])
        changed.append(Condition("shift")(pair.student.prepare(frame), (0, said.indices[i])))
    flips, right = {}, {}
    for who, model in (("teacher", pair.teacher), ("student", pair.student)):
        now = model(np.stack(changed)).argmax(1)
        flips[who] = (now != getattr(said, who)[chosen].argmax(1)).numpy()
        right[who] = (now == said.labels[chosen]).numpy()
    [row] = [row for row in found["rows"] if row["name"] == "shift"]
    for who in ("teacher", "student"):
        assert row[f"{who}_flips"] == pytest.approx(flips[who].mean(), abs=1e-9)
        assert row[who] == pytest.approx(right[who].mean(), abs=1e-9)
    assert row["student_alone"] == (flips["student"] & ~flips["teacher"]).sum()
    assert row["teacher_alone"] == (flips["teacher"] & ~flips["student"]).sum()
    assert row["difference"] == pytest.approx(flips["teacher"].mean() - flips["student"].mean())
    for name, error in found["corruption_error"].items():
        [row] = [row for row in found["rows"] if row["name"] == name]
        wrong = 1 - row["teacher"]
        assert error == (pytest.approx((1 - row["student"]) / wrong) if wrong else None)
