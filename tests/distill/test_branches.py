"""Branch and merge: groups of classes, their images, the mean of weights, and the recipe."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support.loop_tools import student
from vitkd_fast import models
from vitkd_fast.distill import branches, data, sources
from vitkd_fast.distill.config import Branch, ConfigError, load

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ["data.holdout=0.9", "run.epochs=1", "run.seeds=[0]", "optimizer.warmup_epochs=0",
         "branch={groups: 2, trunk: 1, epochs: 1}", "int8.enabled=false"]  # fmt: skip


def test_groups_of_classes() -> None:
    names = list("abcde")
    assert branches.groups(Branch(groups=2), names) == [[0, 1, 2], [3, 4]]
    assert branches.groups(Branch(groups=[["e", "a"], ["b", "c", "d"]]), names) == [
        [4, 0],
        [1, 2, 3],
    ]
    for wrong, name in (([["a", "b"], ["b", "c", "d", "e"]], "b"), ([["a", "b", "c", "d"]], "e"),
                        ([names, ["x"]], "x")):  # fmt: skip
        with pytest.raises(ConfigError, match=f"each class in one group, got '{name}' not so"):
            branches.groups(Branch(groups=wrong), names)
    with pytest.raises(ConfigError, match="expected at most 5 classes, got 6"):
        branches.groups(Branch(groups=6), names)


def test_a_specialist_sees_its_classes_as_the_student_does() -> None:
    config = load("digits")
    splits = sources.open_data(config.data)
    part = branches.images_of(splits, [3, 4])
    assert set(sources.labels(part.train)) == set(sources.labels(part.val)) == {3, 4}
    every = np.array(sources.labels(splits.train))
    assert len(part.train) == np.isin(every, [3, 4]).sum() and part.classes == splits.classes
    batch = next(iter(data.loaders(config, part, seed=0)[0].epoch()))
    assert torch.equal(torch.from_numpy(every[batch.indices.numpy()]), batch.labels)


def test_the_mean_of_weights() -> None:
    config = load("digits")
    splits = sources.open_data(config.data)
    one: Any = student().eval()
    other, third = copy.deepcopy(one), copy.deepcopy(one)
    with torch.no_grad():
        other.classifier.weight += 3.0
        third.classifier.weight -= 6.0
    merged: Any = branches.merge([one, other, third], config, splits)
    assert merged.training and merged is not one
    torch.testing.assert_close(merged.classifier.weight, one.classifier.weight - 1.0)
    assert torch.equal(merged.conv_stem.weight, one.conv_stem.weight)
    # statistics of the images, not the mean of the three
    images = torch.cat([b.images for b in data.sample(config, splits.train, 2048)])
    with torch.inference_mode():
        x = merged.conv_stem(models.predictor(merged)[0](images))
    torch.testing.assert_close(merged.bn1.running_mean, x.mean((0, 2, 3)), rtol=1e-2, atol=1e-3)
    assert not torch.allclose(merged.bn1.running_mean, one.bn1.running_mean)


@pytest.mark.parametrize("again", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_recipe(again: bool, tmp_path: Path, vitkd: Any) -> None:
    run = ["digits-branches", *SMALL, "teacher={}", "losses={ce: {}}", f"run.folder={tmp_path}/run"]
    result = vitkd("distill", *run)
    assert result.code == 0, result.err
    said = json.loads((tmp_path / "run" / "report.json").read_text())["notes"]
    names = [re.match(r"(\S+): top-1 [\d.]+% of \d+ images", note) for note in said]
    assert [x[1] for x in names if x] == ["specialist-0-0", "specialist-0-1", "merged-0"]
    weights = {
        x: models.load(tmp_path / "run" / x / "last.safetensors").model.conv_stem.weight
        for x in ("trunk-0", "specialist-0-0", "specialist-0-1", "baseline-0")
    }
    assert len({tuple(x.flatten().tolist()) for x in weights.values()}) == 4
    if not again:
        return
    # the same run, from the trunk on
    for name in ("specialist-0-1", "baseline-0"):
        for file in (tmp_path / "run" / name).glob("*.safetensors"):
            file.unlink()
    assert vitkd("distill", *run, "--resume").code == 0
    resumed = models.load(tmp_path / "run" / "baseline-0" / "last.safetensors").model
    assert torch.equal(resumed.conv_stem.weight, weights["baseline-0"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.unlabelled=true", "losses={features: {}}", "teacher.epochs=0"],
            "data.unlabelled has not",
        ),
        (["branch={groups: 1}"], r"branch.groups"),
        (["branch={trunk: 0}"], r"branch.trunk: 0 .int. given"),
    ],
)
def test_what_has_no_branches(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load("digits-branches", overrides)
