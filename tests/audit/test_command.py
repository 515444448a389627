"""`vitkd audit`: its files, its table, a stored temperature, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support.audit_tools import CLASSES, PIXELS, Trained
from support.browser import measured
from vitkd_fast import _extras, int8, models
from vitkd_fast.audit import calibration, report, run
from vitkd_fast.images import read

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = ("--no-cost", "--robustness-images", 20, "--attention-images", 8, "--severities", "2,4")


class Page(HTMLParser):
    """The elements of a page, which must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.headings = 0
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "br", "path", "use"):
            self.open.append(tag)
        self.headings += tag == "h2"
        self.links += [v or "" for k, v in attributes if k in ("src", "href", "xlink:href")]

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.links += [v or "" for k, v in attributes if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("meta", "img", "br", "path", "use"):
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def results(trained: Trained) -> dict[str, Any]:
    """The audit of a student that saw most images of the class 3 under other labels."""
    files = map(str, (trained.teacher, trained.biased, trained.folder))
    return run.audit(
        *files,
        robustness_images=20,
        severities=(2, 4),
        attention_images=8,
        measure_cost=False,
    )


def test_a_biased_student(results: dict[str, Any], trained: Trained, tmp_path: Path) -> None:
    assert "Harmed: 1 of 10 classes lost accuracy" in report.verdict(results)[0]
    assert ": 3 (" in report.verdict(results)[0]
    assert re.search(r"\n3 .* harmed\n", report.table(results))
    assert report.write(results, tmp_path / "audit") == tmp_path / "audit" / "audit.html"
    found = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert found["version"] == 1 and found["data"]["classes"] == CLASSES
    assert found["data"]["images"] == sum(1 for _ in trained.folder.glob("*/*.png"))
    assert [r["name"] for r in found["harm"]["classes"] if r["finding"] == "harmed"] == ["3"]
    assert found["attention"]["methods"] == {"teacher": "attention rollout", "student": "Grad-CAM"}
    assert {row["severity"] for row in found["robustness"]["rows"]} == {None, 2, 4}
    most = found["differ"]
    assert [x["similarity"] for x in most] == sorted(x["similarity"] for x in most)
    assert all((trained.folder / x["name"]).is_file() for x in most)
    # the page is made of what the JSON holds
    assert report.render(found) == (tmp_path / "audit" / "audit.html").read_text()


def test_the_page_loads_nothing(results: dict[str, Any]) -> None:
    text = report.render(results | {"teacher": {"file": '<b>&"', "int8": False}})
    page = Page(text)
    assert page.headings == 6
    assert page.links and all(x.startswith(("data:", "#")) for x in page.links)
    assert "width=device-width" in text and 'class="harmed">harmed' in text
    assert '<b>&"' not in text and "<script" not in text


@pytest.mark.parametrize("width", [360, 1280])
def test_at_a_width(width: int, results: dict[str, Any], tmp_path: Path) -> None:
    """Nothing is wider than the page, no table hides a column, and no two words overlap."""
    found = measured(report.render(results), width, tmp_path)
    assert found == [width, [112] * 3 * len(results["differ"]), [], []]


def test_groups_and_an_int8_file_whose_temperature_is_stored(
    trained: Trained, tmp_path: Path, vitkd
) -> None:
    file = shutil.copy(trained.int8, tmp_path / "student.int8.safetensors")
    names = sorted(x.relative_to(trained.folder) for x in trained.folder.glob("*/*.png"))
    groups = tmp_path / "groups.csv"
    lines = [f"{name},{('odd', 'even')[i % 2]}" for i, name in enumerate(names)]
    groups.write_text("\n".join(["image,group", *lines]))
    arguments = [file, trained.folder, "-o", tmp_path / "audit", *QUICK, "--groups", groups]
    result = vitkd("audit", trained.teacher, *arguments, "--store", "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert {row["name"] for row in found["harm"]["groups"]} == {"odd", "even"}
    assert "int8 file, which has no gradients" in found["attention"]["why"]
    temperature = found["calibration"]["student"]["temperature"]
    before, after = int8.load(trained.int8), int8.load(file)
    assert (before.temperature, after.temperature) == (1.0, temperature)
    assert temperature != 1 and f"temperature {temperature:.4g} is stored" in found["notes"][-1]
    pixels = np.stack([read(trained.folder / name, after) for name in names[:20]])
    assert np.array_equal(before(pixels), after(pixels))
    # it is the one that fits the engine's own logits
    every = np.stack([read(trained.folder / name, after) for name in names])
    labels = np.array([int(name.parent.name) for name in names])
    logits = torch.from_numpy(before(every))
    fitted = calibration.fit_temperature(logits, torch.from_numpy(labels))
    assert temperature == pytest.approx(fitted, rel=1e-3)
    Page((tmp_path / "audit" / "audit.html").read_text())


def test_costs_of_the_table_and_of_the_page() -> None:
    one = {"latency_ms": 10.0, "latency_p90_ms": 11.0, "latency_p99_ms": None, "file_bytes": None,
           "latency_cpu_ms": 9.5, "latency_calls": 50, "memory_bytes": 3 << 20, "energy_j": None,
           "memory_before_bytes": 1 << 20, "energy_note": "not available: no"}  # fmt: skip
    cost = {"teacher": one, "student": one | {"latency_ms": 2.0, "energy_j": 0.0125}, "threads": 1}
    rows = dict(report._costs(cost))
    assert rows["Energy, J an image"] == ["not available", "0.0125"]
    assert rows["p99, ms"] == ["n/a", "n/a"] and rows["Latency p50, ms"] == ["10.0", "2.00"]
    results = {"cost": cost, "harm": {"overall": {"teacher": 0.9, "student": 0.81}}}
    assert report.ratio(results) == pytest.approx({"kept": 0.9, "time": 0.2, "ratio": 4.5})


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["{trained.teacher}", "{trained.student}", "{trained.folder}", "--store"],
            2,
            "--store: STUDENT: expected an int8",
        ),
        (
            ["{trained.teacher}", "{trained.student}", "{trained.folder}", "--severities", "0"],
            2,
            "expected some of 1,2,3",
        ),
        (
            ["{trained.teacher}", "{trained.student}", "{trained.folder}", "--alpha", "0.5"],
            2,
            "--alpha: expected more than",
        ),
        (
            ["{trained.teacher}", "{trained.student}", "{trained.folder}", "-o", "none/x"],
            2,
            "none/x is in no folder",
        ),
        (
            ["{trained.teacher}", "none.safetensors", "{trained.folder}"],
            1,
            "none.safetensors is not a file",
        ),
        (["{trained.teacher}", "{trained.student}", "none"], 1, "DIR: none is no folder"),
        (
            ["{trained.teacher}", "{other}", "{trained.folder}"],
            1,
            "expected the same classes, got 10 and 3",
        ),
        (
            ["{trained.teacher}", "{trained.student}", "{trained.folder}", "--groups", "none.csv"],
            1,
            "--groups: none.csv",
        ),
    ],
)
def test_what_cannot_be_audited(
    arguments: list[str],
    code: int,
    message: str,
    trained: Trained,
    tmp_path: Path,
    vitkd,
    monkeypatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    other = models.create("mobilenetv3_small_050", num_classes=3)
    models.save(
        "other.safetensors", other, name="mobilenetv3_small_050", options={}, num_classes=3,
        pixels=PIXELS, classes=list("abc"),
    )  # fmt: skip
    known = {"trained": trained, "other": "other.safetensors"}
    result = vitkd("audit", *(x.format(**known) for x in arguments))
    assert result.code == code
    assert re.search(message, re.sub(r"\s*[│\n]\s*", " ", result.err)), result.err


def test_the_missing_extra_is_named(vitkd, monkeypatch: pytest.MonkeyPatch) -> None:
    found = _extras.find_spec
    monkeypatch.setattr(_extras, "find_spec", lambda x: None if x == "captum" else found(x))
    result = vitkd("audit", "a.safetensors", "b.safetensors", "images")
    assert result.code == 1 and 'pip install "vitkd-fast[audit]" brings it' in result.err


def test_a_bad_image_is_named_or_left_out(trained: Trained, tmp_path: Path, vitkd) -> None:
    folder = tmp_path / "images"
    for name in ("0", "1"):
        (folder / name).mkdir(parents=True)
        for file in sorted((trained.folder / name).iterdir())[:6]:
            shutil.copy(file, folder / name)
    (folder / "1" / "bad.png").write_bytes(b"no image")
    quick = ["--no-cost", "--robustness-images", 0, "--attention-images", 0, "-o", tmp_path / "out"]
    command = ["audit", trained.teacher, trained.student, folder, *quick]
    assert "bad.png cannot be read" in vitkd(*command).err
    result = vitkd(*command, "--skip-bad", "--json")
    found = json.loads(result.out)
    assert (found["data"]["images"], found["data"]["skipped"]) == (12, 1)
    assert found["robustness"] is None and found["attention"] is None and found["cost"] is None
    assert len(found["harm"]["classes"]) == 2


def test_a_teacher_of_another_order_and_size_of_images(trained: Trained, tmp_path: Path) -> None:
    """Its logits are put into the student's order, and it reads images as it wants them."""
    from vitkd_fast.audit import answers

    loaded = models.load(trained.student)
    order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    classifier = loaded.model.get_classifier()
    classifier.weight.data = classifier.weight.data[order]
    classifier.bias.data = classifier.bias.data[order]
    pixels = models.Pixels(48, PIXELS.mean, PIXELS.std, "bicubic", 1.0)
    models.save(
        tmp_path / "teacher.safetensors", loaded.model, name="mobilenetv3_small_050", options={},
        num_classes=10, pixels=pixels, classes=[CLASSES[i] for i in order],
    )  # fmt: skip
    pair = answers.open_pair(str(tmp_path / "teacher.safetensors"), str(trained.student))
    images = answers.open_images(str(trained.folder), pair)
    [batch] = answers.read(images, pair, range(0, len(images.source), 60), batch_size=100)
    assert batch.teacher.shape[1:] == (48, 48, 3) and batch.student.shape[1:] == (32, 32, 3)
    first = images.source.read(0)[0]
    assert np.array_equal(batch.teacher[0], pair.teacher.prepare(first))
    with torch.inference_mode():
        given = torch.from_numpy(batch.teacher).permute(0, 3, 1, 2)
        expected = models.predictor(models.load(trained.student).model, pixels)(given)
    torch.testing.assert_close(pair.teacher(batch.teacher), expected)
    assert not torch.allclose(expected[:, order], expected)
