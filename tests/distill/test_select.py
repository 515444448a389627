"""`vitkd select`: its statistics, its splits, a choice that comes out again, and its page."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

from support.browser import measured
from vitkd_fast.distill import data, sources
from vitkd_fast.distill.cache import build
from vitkd_fast.distill.cache.read import CachedTeacher
from vitkd_fast.distill.config import ConfigError, load
from vitkd_fast.distill.datasets import Digits
from vitkd_fast.images import DataError

pytest.importorskip("statsmodels", reason="the extra select brings statsmodels")
from vitkd_fast.select import candidates, report, statistics
from vitkd_fast.select.trials import Splitter

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_corrected_test_is_the_paired_one_with_a_larger_error() -> None:
    scores = np.random.default_rng(0).normal([0.9, 0.88, 0.8], 0.02, (12, 3))
    rows = statistics.compare(scores, ["a", "b", "c"], 0.25, 0.05)
    assert [(x["first"], x["second"]) for x in rows] == [("a", "b"), ("a", "c"), ("b", "c")]
    p = []
    for (i, j), row in zip([(0, 1), (0, 2), (1, 2)], rows, strict=True):
        plain = scipy.stats.ttest_rel(scores[:, i], scores[:, j]).statistic
        t = plain * math.sqrt((1 / 12) / (1 / 12 + 0.25))
        p.append(2 * scipy.stats.t.sf(abs(t), 11))
        assert row["t"] == pytest.approx(t) and row["p"] == pytest.approx(p[-1])
        low, high = row["interval"]
        assert (low > 0 or high < 0) == (p[-1] < 0.05)
    # Holm: the smallest times 3, then 2, then 1, never less than one before
    order = np.argsort(p)
    holm = np.maximum.accumulate(np.array(p)[order] * [3, 2, 1]).clip(max=1)
    assert [rows[i]["p_holm"] for i in order] == pytest.approx(holm)
    assert [x["better"] for x in rows] == ["a" if rows[0]["p_holm"] < 0.05 else "", "a", "b"]


def test_equal_differences_have_no_error() -> None:
    scores = np.array([[0.9, 0.9, 0.8]] * 4)
    rows = statistics.compare(scores, ["a", "b", "c"], 0.25, 0.05)
    assert [(x["t"], x["p"], x["better"]) for x in rows] == [
        (None, 1.0, ""), (None, 0.0, "a"), (None, 0.0, "b"),
    ]  # fmt: skip
    found = statistics.stability(scores, ["b", "a", "c"], 0.05, 0.005)
    assert found["stable"] and found["choice"] == "b"
    assert [x["state"] for x in found["rivals"]] == ["tied", "behind"]


@pytest.mark.parametrize("alpha", [0.05, 0.2])
def test_looking_after_every_split_does_not_find_what_is_not_there(alpha: float) -> None:
    """Of 2,000 pairs without a difference, no more are found than alpha, though one looks 96
    times; the usual interval would find more."""
    d = np.random.default_rng(0).normal(size=(2000, 100))
    at = np.arange(5, 101)
    means = np.stack([d[:, :n].mean(1) for n in at], 1)
    deviations = np.stack([d[:, :n].std(1, ddof=1) for n in at], 1)
    widths = np.array([statistics.width(1.0, int(n), alpha) for n in at])
    found = (abs(means) > deviations * widths).any(1).mean()
    usual = scipy.stats.t.isf(alpha / 2, at - 1) / np.sqrt(at)
    assert 0 < found <= alpha < (abs(means) > deviations * usual).any(1).mean()


def test_how_many_splits_would_decide() -> None:
    scores = np.zeros((10, 2))
    scores[:, 0] = np.random.default_rng(1).normal(0.003, 0.01, 10)
    found = statistics.stability(scores, ["a", "b"], 0.05, 0.001)
    [rival] = found["rivals"]
    assert rival["state"] == "open" and not found["stable"]
    deviation = float((scores[:, 0] - scores[:, 1]).std(ddof=1))
    widths = [statistics.width(deviation, rival["needed"] + k, 0.05) for k in (-1, 0)]
    assert widths[0] >= rival["difference"] > widths[1]


def test_winners_and_entropy() -> None:
    counts = statistics.winners(np.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.0, 1.0, 0.5]]))
    assert counts == [1.5, 1.5, 0.0]
    assert statistics.entropy(counts) == pytest.approx(1.0)
    assert statistics.entropy([3, 0, 0]) == 0


def test_splits_keep_classes_and_places() -> None:
    config = load("digits")
    splits = sources.open_data(config.data)
    one, other = (Splitter(0.2, 0).split(splits, i) for i in (0, 1))
    again = Splitter(0.2, 0).split(splits, 0)
    assert one.train.index == again.train.index != other.train.index
    assert sorted([*one.train.index, *one.val.index]) == list(range(len(splits.train)))
    every = np.bincount(sources.labels(splits.train))
    tested = np.bincount(sources.labels(one.val))
    assert abs(tested - 0.2 * every).max() <= 1
    # an image is augmented as in a run on all of them
    whole, part = (data.loaders(config, x, seed=0)[0] for x in (splits, one))
    of_all = {int(i): x for b in whole.epoch() for i, x in zip(b.indices, b.images, strict=True)}
    seen = [(int(i), x) for b in part.epoch() for i, x in zip(b.indices, b.images, strict=True)]
    assert {i for i, _ in seen} <= set(one.train.index)
    assert all(torch.equal(x, of_all[i]) for i, x in seen if i in of_all)
    with pytest.raises(DataError, match=r"--share: 0\.001 of 899 images"):
        Splitter(0.001, 0).split(splits, 0)


def test_a_cache_of_all_images_serves_a_split(run_folder: Path, tmp_path: Path) -> None:
    config = load("digits", [f"teacher={{model: {run_folder}/teacher/last.safetensors}}"])
    config = config.model_copy(update={"data": config.data.model_copy(update={"holdout": 0.9})})
    build.build(config, tmp_path, build.Options(1))
    split = Splitter(0.2, 0).split(sources.open_data(config.data), 0)
    cache = CachedTeacher(tmp_path)
    loader, _ = data.loaders(config, split, seed=5, drawn=cache.drawn)
    batch = next(iter(loader.epoch()))
    # the pixels are compared with those that the teacher saw
    said = cache.outputs(batch, 0)
    assert said.logits.shape == (len(batch.images), 10)


@pytest.fixture(scope="module")
def selected(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Selects with a seed, in a folder for each: students that begin trained, and at random."""
    root = tmp_path_factory.mktemp("selected")
    teacher = run_folder / "teacher" / "last.safetensors"
    options = "{patch_size: 8, embed_dim: 32, depth: 1, num_heads: 2}"

    def select(vitkd: Any, seed: int, *more: object) -> Any:
        result = vitkd(
            "select", "data.dataset=digits", "data.holdout=0.8", "data.image_size=32",
            "data.batch_size=32", "data.workers=0", "data.crop_pct=1.0", "run.epochs=1",
            "augmentation.scale=[0.8,1.0]", "augmentation.hflip=0", "optimizer.lr=2e-3",
            f"student={{model: vit_tiny_patch16_224, options: {options}}}",
            f"teacher={{model: {teacher}}}", "losses={kd: {temperature: 2}}",
            "-o", root / str(seed), "--candidate", "random:optimizer.warmup_epochs=0",
            "--candidate", f"trained:student.checkpoint={teacher},losses={{ce: {{}}}},teacher={{}}",
            "--seed", seed, "--json", "--most", 12, "--least", 3, "--margin", 0.02, "--alpha", 0.2,
            *more,
        )  # fmt: skip
        assert result.code == 0, result.err
        return json.loads(result.out[result.out.index("\n{") :]), root / str(seed)

    return select


def test_the_same_choice_twice(selected: Any, vitkd: Any) -> None:
    found = [selected(vitkd, seed)[0] for seed in (0, 1)]
    assert found[0]["scores"] != found[1]["scores"]
    for x in found:
        assert x["stability"]["choice"] == "trained" and x["stability"]["stable"]
        assert 3 <= x["splits"] < 12 and x["entropy"] < 0.6
        assert x["data"] == {"train": 287, "test": 72, "classes": 10}
        assert x["comparisons"][0]["difference"] < -0.02  # the margin
        assert "Choose trained: stable after" in report.verdict(x)[0]


def test_what_is_done_is_not_done_again(selected: Any, vitkd: Any) -> None:
    before, folder = selected(vitkd, 0)
    files = {x: x.stat().st_mtime_ns for x in folder.glob("trials/*/*.json")}
    assert len(files) == 2 * before["splits"]
    assert [x.name for x in (folder / "caches").iterdir()] and not list(folder.glob("trials/*/*-*"))
    # a third candidate, and a hyper-parameter that only one has
    more = ["--candidate", "alone:losses={ce: {}},teacher={}"]
    found, _ = selected(vitkd, 0, *more, "--vary", "losses.kd.temperature=[2.0,8]")
    assert (
        files.items() <= {x: x.stat().st_mtime_ns for x in folder.glob("trials/*/*.json")}.items()
    )
    splits = min(before["splits"], found["splits"])
    assert np.array_equal(np.array(found["scores"])[:splits, :2], before["scores"][:splits])
    [varied] = found["sensitivity"]
    assert [x["value"] for x in varied["rows"]] == [2.0, 8]
    assert {x["choice"] for x in varied["rows"]} == {"trained"}
    first = np.array(found["scores"])[:3].mean(0)
    for row in varied["rows"]:
        assert row["means"][1:] == pytest.approx(first[1:])
    # the value that it has anyway
    assert varied["rows"][0]["means"] == pytest.approx(first)
    assert "With every losses.kd.temperature" in report.verdict(found)[-1]
    text = report.table(found)
    assert re.search(r"\ntrained .* leader ", text) and re.search(r"\nrandom .* behind ", text)
    assert report.render(found) == (folder / "report.html").read_text()


def test_the_page_at_two_widths(selected: Any, vitkd: Any, tmp_path: Path) -> None:
    """Nothing is wider than the page, no table hides a column, and no two words overlap."""
    more = ["--candidate", "alone:losses={ce: {}},teacher={}"]
    found, _ = selected(vitkd, 0, *more, "--vary", "losses.kd.temperature=[2.0,8]")
    page = report.render(found | {"title": '<b>&"'})
    assert '<b>&"' not in page and "<script" not in page
    for width in (360, 1280):
        assert measured(page, width, tmp_path) == [width, [], [], []]


def test_what_is_not_settled_is_said() -> None:
    scores = np.random.default_rng(0).normal([0.9, 0.899], 0.01, (6, 2))
    names = ["a", "b"]
    found = {
        "stability": statistics.stability(scores, names, 0.05, 0.002), "splits": 6, "alpha": 0.05,
        "margin": 0.002, "comparisons": statistics.compare(scores, names, 0.25, 0.05),
        "candidates": [{"name": x, "best_on": 3.0} for x in names], "entropy": 1.0,
        "entropy_most": 1.0, "sensitivity": [],
    }  # fmt: skip
    sentences = report.verdict(found)
    needed = found["stability"]["rivals"][0]["needed"]
    assert sentences[0].startswith("Not settled by 6 splits: ")
    assert f"About {needed} splits would tell" in sentences[0]
    assert "No candidate is shown to be better" in sentences[1]


def test_candidates_of_a_command_line() -> None:
    given = [
        "a:optimizer.lr=1e-4,losses={kd: {weight: 1, temperature: 2}}",
        "b:digits,run.epochs=7",
    ]
    one, two = candidates.parse(None, ["data.dataset=digits", "student.model=mobilenetv2_035",
                                       "teacher={model: t}"], given)  # fmt: skip
    assert one.overrides[-2:] == ["optimizer.lr=1e-4", "losses={kd: {weight: 1, temperature: 2}}"]
    assert one.config().losses.kd.temperature == 2
    assert two.source == "digits" and two.config().run.epochs == 7
    [varied] = candidates.parse_varied(["losses.kd.temperature=[1, 4]"])
    assert varied.of(one.config()) and varied.override(4) == "losses.kd.temperature=4"
    assert not candidates.Varied("losses.ce.weight", [1]).of(one.config())
    assert candidates.Varied("student.options.drop_rate", [1]).of(one.config())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["digits"], 2, "--candidate: expected two or more, got 0"),
        (["digits", "--candidate", "a"], 2, "--candidate: expected NAME:KEY=VALUE"),
        (["digits", *["--candidate", "a:run.epochs=1"] * 2], 2, "a name stands twice"),
        (["digits", "teacher={}", "losses={ce: {}}", "--candidate", "a:run.epochs=1",
          "--candidate", "b:run.epoch=1"], 2,
         "run.epoch: unknown key; the nearest is run.epochs"),
        (["digits", "--candidate", "a:run.epochs=1", "--candidate", "b:run.epochs=2"], 2,
         "a: teacher.epochs: expected 0, as all trials share a trained teacher"),
        (["digits", "--vary", "run.epochs=3"], 2, r"--vary: expected KEY=\[VALUE,...\]"),
        (["digits", "--share", "1"], 2, "--share: expected more than 0 and less than 1"),
        (["digits", "--least", "9", "--most", "4"], 2, "--least: expected at most --most, 4"),
        (["digits", "teacher={}", "losses={ce: {}}", "--candidate", "a:run.epochs=1",
          "--candidate", "b:run.epochs=2,data.holdout=0.3"], 2, "same training images"),
        (["digits", "teacher={}", "losses={ce: {}}", "--candidate", "a:run.epochs=1",
          "--candidate", "b:run.epochs=2", "--vary", "losses.kd.temperature=[1]"], 2,
         "--vary: losses.kd.temperature: no candidate has it"),
    ],
)  # fmt: skip
def test_what_cannot_be_selected(
    arguments: list[str], code: int, message: str, vitkd: Any, tmp_path: Path
) -> None:
    if "--candidate" not in arguments and "--vary" in arguments:
        arguments = [*arguments, "--candidate", "a:run.epochs=1", "--candidate", "b:run.epochs=2"]
    result = vitkd("select", *arguments, "-o", tmp_path / "out")
    assert result.code == code
    assert re.search(message, re.sub(r"\s*[│\n]\s*", " ", result.err)), result.err


def test_a_class_that_no_split_can_hold(tmp_path: Path) -> None:
    from PIL import Image

    digits = Digits()
    for i in range(30):
        image, label = digits.read(i)
        folder = tmp_path / ("odd" if label == 9 and i > 20 else "even")
        folder.mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / f"{i}.png")
    for file in sorted((tmp_path / "odd").iterdir())[1:]:
        file.unlink()
    config = load(None, [f"data.train={tmp_path}", f"data.val={tmp_path}",
                         "student.model=mobilenetv2_035"])  # fmt: skip
    train = sources.open_folder(str(tmp_path), None, False).source
    splits = sources.Splits(train, train, train.classes, [], [])
    with pytest.raises(DataError, match="--share"):
        Splitter(0.2, 0).split(splits, 0)
    assert config.data.train == str(tmp_path)


def test_runs_without_labels_are_refused() -> None:
    given = ["a:run.epochs=1", "b:run.epochs=2"]
    [one, _] = candidates.parse("features-unlabelled", ["data.train=x"], given)
    with pytest.raises(ConfigError, match=r"a: data.unlabelled: expected false"):
        one.config()
