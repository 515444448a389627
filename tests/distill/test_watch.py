"""`int8.watch`: a student that is quantised as it is, every few epochs of its training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("timm")

from support.loop_tools import splits, student, trainer
from vitkd_fast import int8, models
from vitkd_fast.distill import logger, results, sources
from vitkd_fast.distill.config import ConfigError, load
from vitkd_fast.distill.data import eval_transform
from vitkd_fast.distill.loop import Stopped
from vitkd_fast.distill.watch import Watch

pytestmark = pytest.mark.usefixtures("one_thread")

# two steps an epoch
RUN = ["data.batch_size=400", "optimizer.accumulate=1", "run.epochs=2", "run.eval_every=2"]
WATCHED = [*RUN, "int8.watch=1", "int8.watch_images=10"]


def looks(folder: Path) -> list[dict[str, Any]]:
    return [row for row in logger.read(folder) if row["kind"] == "int8"]


def test_every_epoch_whatever_else_is_due(tmp_path: Path) -> None:
    """It changes no weight, and a resumed run logs the same."""
    trained = trainer(tmp_path / "watched", WATCHED).run()
    found = looks(tmp_path / "watched")
    assert [(row["epoch"], row["step"]) for row in found] == [(1, 2), (2, 4)]
    assert all(0 <= row["agreement"] <= 1 and math.isfinite(row["sqnr"]) for row in found)
    assert len({row["sqnr"] for row in found}) == 2
    scored = [row["epoch"] for row in logger.read(tmp_path / "watched") if row["kind"] == "val"]
    assert scored == [2]
    plain = trainer(tmp_path / "plain", RUN).run().state_dict()
    assert all(torch.equal(x, plain[key]) for key, x in trained.state_dict().items())
    assert not looks(tmp_path / "plain")
    # stopped in the second epoch, after a look at which nothing else is due
    first = trainer(tmp_path / "resumed", WATCHED)
    update = first.update

    def stop(batches: Any) -> None:
        update(batches)
        if first.step == 3:
            first._save()
            raise Stopped("", 2)

    first.update = stop  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        first.run()
    trainer(tmp_path / "resumed", WATCHED, resume=True).run()
    assert looks(tmp_path / "resumed") == found
    assert list((tmp_path / "watched" / "tensorboard").iterdir())


def test_figures_are_those_of_quantize_and_the_engine() -> None:
    config, parts = load("digits", WATCHED), splits()
    made = student().eval()
    found = Watch(config, parts)(made)
    pixels = models.Pixels.of(made)

    def images(part: Any) -> np.ndarray:
        prepare = eval_transform(32, 1.0, "bicubic")
        return np.stack([prepare(part.read(i)[0]) for i in sources.spread(len(part), 10)])

    quantized = int8.quantize(made, images(parts.train), mean=pixels.mean, std=pixels.std)
    judged = images(parts.val)
    q = int8.load(quantized.graph)(judged)
    with torch.no_grad():
        z = models.predictor(made)(torch.from_numpy(judged).permute(0, 3, 1, 2)).numpy()
    assert found["agreement"] == (z.argmax(1) == q.argmax(1)).mean()
    noise = ((z - q).astype(np.float64) ** 2).sum()
    assert found["sqnr"] == pytest.approx(10 * np.log10((z.astype(np.float64) ** 2).sum() / noise))


def test_a_student_that_cannot_be_quantised_is_seen() -> None:
    watch = Watch(load("digits", WATCHED), splits())
    diverged = student().eval()
    with torch.no_grad():
        diverged.bn1.weight.mul_(1e12)
    assert "conv_stem" in str(watch(diverged)["error"])
    diverged.bn1.weight.data.fill_(math.nan)
    assert "NaN" in str(watch(diverged)["error"])
    lacking = models.create("ghostnet_050", num_classes=10).eval()
    assert "GhostModule" in str(watch(lacking)["error"])


def test_what_is_logged_and_said_of_such_a_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = iter([{"agreement": 0.5, "sqnr": 3.0}, {"error": "too large"}])
    monkeypatch.setattr(Watch, "__call__", lambda *_: next(answers))
    trainer(tmp_path / "run", WATCHED).run()
    assert "int8  step 4/4  error too large" in capsys.readouterr().out
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(x).get("error") for x in lines if '"int8"' in x] == [None, "too large"]
    curves = results.curves({"distilled, seed 0": tmp_path / "run"})
    assert results.unquantised(curves) == [
        "int8.watch: distilled, seed 0: not quantised at 1 of 2 looks, first after epoch 2: "
        "too large"
    ]


def test_without_a_classifier() -> None:
    given = ["data.unlabelled=true", "losses={features: {}}", "teacher.epochs=0", "int8.watch=1"]
    with pytest.raises(ConfigError, match=r"int8\.watch: needs a student with a classifier"):
        load("digits", given)


def test_teachers_are_not_watched() -> None:
    config = load("digits", ["int8.watch=2"])
    assert config.for_teacher(config.teacher).int8.watch == 0
    assert config.for_baseline().int8.watch == 2
