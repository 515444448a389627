"""Who lost what: an injected bias is found and nobody else accused; intervals, tests, groups."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

from support.audit_tools import CLASSES, Trained
from vitkd_fast.audit import answers, harm, statistics
from vitkd_fast.images import DataError

pytestmark = pytest.mark.usefixtures("one_thread")


def test_an_injected_bias_is_found_and_no_other_class_accused(trained: Trained) -> None:
    pair = answers.open_pair(str(trained.teacher), str(trained.biased))
    said = answers.ask(answers.open_images(str(trained.folder), pair), pair)
    rows = harm.by_class(said, CLASSES)
    assert [row["name"] for row in rows if row["finding"] == "harmed"] == ["3"]
    worst = rows[0]
    assert worst["name"] == "3" and worst["p_holm"] < 0.05 and worst["interval"][1] < 0
    assert worst["difference"] == (worst["gained"] - worst["lost"]) / worst["images"]


def test_a_model_beside_itself_harms_nobody(trained: Trained) -> None:
    pair = answers.open_pair(str(trained.biased), str(trained.biased))
    said = answers.ask(answers.open_images(str(trained.folder), pair), pair)
    for row in harm.by_class(said, CLASSES):
        assert (row["difference"], row["p"], row["p_holm"], row["finding"]) == (0, 1, 1, "")
        assert row["interval"][0] < 0 < row["interval"][1] and row["taken_for"] is None


def test_rows_are_what_the_answers_say(said) -> None:
    rows = harm.by_class(said, CLASSES)
    assert sorted(row["name"] for row in rows) == CLASSES
    labels = said.labels.numpy()
    t, s = said.teacher.argmax(1).numpy() == labels, said.student.argmax(1).numpy() == labels
    p = {}
    for row in rows:
        of = labels == int(row["name"])
        lost, gained = int((t & ~s & of).sum()), int((s & ~t & of).sum())
        assert (row["images"], row["lost"], row["gained"]) == (of.sum(), lost, gained)
        assert (row["teacher"], row["student"]) == (t[of].mean(), s[of].mean())
        if lost + gained:
            p[row["name"]] = scipy.stats.binomtest(lost, lost + gained).pvalue
        assert row["p"] == pytest.approx(p.setdefault(row["name"], 1))
        # the Wald interval, of counts with half an image more in each cell
        n, b, c = of.sum() + 2, lost + 0.5, gained + 0.5
        error = 1.959964 * np.sqrt((b + c) - (b - c) ** 2 / n) / n
        assert row["interval"] == pytest.approx(((c - b) / n - error, (c - b) / n + error))
    # Holm: the i-th smallest of m is multiplied by m - i, and none is below one that is smaller
    largest = 0.0
    for i, name in enumerate(sorted(p, key=p.__getitem__)):
        largest = max(largest, min((len(p) - i) * p[name], 1))
        [row] = [row for row in rows if row["name"] == name]
        assert row["p_holm"] == pytest.approx(largest)
    whole = harm.overall(said)
    assert whole["lost"] == sum(row["lost"] for row in rows) and whole["images"] == len(labels)


@pytest.mark.parametrize(("n", "b", "c"), [(30, 0.1, 0.1), (40, 0.2, 0.02), (100, 0.05, 0.01)])
def test_intervals_hold_the_truth_as_often_as_they_say(n: int, b: float, c: float) -> None:
    """The exact chance, over all outcomes, that the interval of 95% holds c - b."""
    held = 0.0
    for lost in range(n + 1):
        for gained in range(n + 1 - lost):
            chance = scipy.stats.multinomial.pmf(
                [lost, gained, n - lost - gained], n, [b, c, 1 - b - c]
            )
            if chance > 1e-9:
                low, high = statistics.difference(lost, gained, n, 0.05)
                held += chance * (low <= c - b <= high)
    assert 0.94 < held < 0.99


def test_shares_have_wilsons_interval() -> None:
    low, high = statistics.share(0, 20, 0.05)
    assert low == pytest.approx(0, abs=1e-12) and high == pytest.approx(3.8414588 / 23.8414588)


NAMES = [
    os.path.join(*x.split("/")) for x in ("cat/a.png", "cat/b.png", "dog/a.png", "dog/n/c.png")
]


def test_groups_of_a_csv(tmp_path: Path) -> None:
    file = tmp_path / "groups.csv"
    file.write_text("image,group\ncat/a.png,day\n./dog/a.png,night\n\ncat/b.png,day\n")
    assert answers.groups_of(NAMES, str(file)) == ["day", "day", "night", None]


def test_groups_of_folders() -> None:
    assert answers.groups_of(NAMES, "folders") == [None, None, None, "n"]
    with pytest.raises(DataError, match="no image lies in a folder below its class folder"):
        answers.groups_of(NAMES[:3], "folders")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,group\n", "line 1: expected image,group, got file,group"),
        ("", "line 1: expected image,group, got $"),
        ("image,group\ncat/a.png\n", "line 2: expected an image and a group"),
        ("image,group\ncat/a.png,x\ncat/a.png,y\n", "line 3: cat/a.png stands twice"),
        ("image,group\ncow/a.png,x\n", "1 of its 1 images are not in DIR, such as cow/a.png"),
        ("image,group\n", "names no image of DIR"),
    ],
)
def test_groups_that_cannot_be_read(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "groups.csv"
    file.write_text(text)
    with pytest.raises(DataError, match=message):
        answers.groups_of(NAMES, str(file))
    with pytest.raises(DataError, match="No such file"):
        answers.groups_of(NAMES, str(tmp_path / "none.csv"))


def test_a_group_that_is_harmed_is_found(said) -> None:
    """Half of the right answers of one group are taken from the student."""
    groups = [str(i % 3) for i in range(len(said.labels))]
    student = said.student.clone()
    hit = torch.tensor([i % 6 == 1 for i in range(len(groups))])
    student[hit, said.labels[hit]] = -100
    wronged = answers.Answers(said.indices, said.names, said.labels, said.teacher, student)
    rows = harm.by_group(wronged, groups)
    assert [row["name"] for row in rows if row["finding"] == "harmed"] == ["1"]
    assert sum(row["images"] for row in rows) == len(groups)
    some = [name if name != "2" else None for name in groups]
    assert {row["name"] for row in harm.by_group(wronged, some)} == {"0", "1"}
