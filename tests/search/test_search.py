"""`vitkd search` on digits: what is trained, what is not, what is left, kills, and a cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
import yaml
from optuna.trial import TrialState, create_trial
from safetensors.torch import load_file

from support.browser import measured
from support.cluster_tools import Died, pretend
from support.process_tools import of_tests
from support.search_tools import BOUND_MS, FLASH, SPACE, recipe, searched, settings
from vitkd_fast import _extras
from vitkd_fast._cluster import ClusterError
from vitkd_fast.distill import config, experiment
from vitkd_fast.distill.config import ConfigError
from vitkd_fast.search import cluster, report, space, study

pytestmark = pytest.mark.usefixtures("one_thread")


def test_what_is_over_the_bound_is_not_trained(done: study.Search) -> None:
    trials = done.study.trials
    trained = [x for x in trials if x.user_attrs["within"]]
    over = [x for x in trials if not x.user_attrs["within"]]
    assert len(trained) == 2 and over
    assert all(x.user_attrs["latency_ms"] > BOUND_MS for x in over)
    assert all(x.state is TrialState.PRUNED and "cpu_seconds" not in x.user_attrs for x in over)
    folders = {int(x.name) for x in (done.folder / "trials").iterdir()}
    assert folders == {x.number for x in trained}
    assert all(x.user_attrs["latency_ms"] <= BOUND_MS for x in trained)
    assert all(0 < x.user_attrs["early_seconds"] < x.user_attrs["cpu_seconds"] for x in trained)
    # one cache of a resolution, whatever the trials
    sizes = {x.user_attrs["config"]["data"]["image_size"] for x in trained}
    assert {x.name for x in done.folder.glob("cache-*")} == {f"cache-{size}" for size in sizes}


def test_a_recipe_trains_the_same_student(
    done: study.Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trunk and cooldown are the run that `vitkd distill` does in one go, bit by bit."""
    monkeypatch.chdir(tmp_path)
    report.write_recipes(done)
    best = study.front(done.finished())[-1]
    [*_, file] = sorted((done.folder / "recipes").iterdir())
    assert str(best.number) in file.read_text().splitlines()[0]
    experiment.distill(config.load(str(file)))
    folder = Path(yaml.safe_load(file.read_text())["run"]["folder"])
    ours = load_file(folder / "distilled-0" / "last.safetensors")
    [there] = (done.folder / "trials" / f"{best.number:04}").glob("*/last.safetensors")
    theirs = load_file(there)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


_DIES = """
import os, signal
from pathlib import Path
import torch
from support.search_tools import searched
from vitkd_fast.search import training
torch.set_num_threads(1)
real, calls = training.Training.score, []
def score(self, branch):
    calls.append(real(self, branch))
    if len(calls) == 2:  # full training is next
        os.kill(os.getpid(), signal.SIGKILL)
    return calls[-1]
training.Training.score = score
searched(Path("copy"), Path({images!r}), Path({target!r})).run(2)
"""


def test_killed_and_taken_up(
    done: study.Search,
    copied: Callable[..., study.Search],
    images: Path,
    target: Path,
    tmp_path: Path,
) -> None:
    """Nothing is lost but the trial that was being trained, which is drawn again."""
    copied().lock.close()
    code = _DIES.format(images=str(images), target=str(target))
    died = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=of_tests(), capture_output=True, text=True
    )
    assert died.returncode == -signal.SIGKILL, died.stderr
    found = searched(folder := tmp_path / "copy", images, target)
    [killed] = [x for x in found.study.trials if x.state is TrialState.FAIL]
    [waiting] = [x for x in found.study.trials if x.state is TrialState.WAITING]
    assert not (folder / "trials" / f"{killed.number:04}").exists()
    found.run(1)
    again, first = found.study.trials[waiting.number], done.trained()[0]
    assert again.state is TrialState.COMPLETE
    # the first of a search that was not killed: trained to the same accuracy
    assert again.params == killed.params == first.params
    assert again.user_attrs["accuracy"] == first.user_attrs["accuracy"]


def _finished(found: study.Search, order: int, accuracy: float) -> None:
    """Six trials that were trained in full, and ranked as predicted (order 1) or the other way."""
    pareto = found.settings.pareto
    for i in range(6):
        reached = accuracy + 0.001 * order * i
        attributes = {"within": True, "latency_ms": 1e-3, "memory_mb": 1.0, "cpu_seconds": 0.0}
        attributes |= {"predicted": accuracy + 0.001 * i, "accuracy": reached, "early_score": 0.5}
        found.study.add_trial(
            create_trial(
                values=[reached, 1e-3] if pareto else [reached],
                system_attrs={"constraints": [0.0]},
                user_attrs=attributes | {"early_seconds": 0.0, "config": {}},
                intermediate_values={} if pareto else {9: accuracy + 0.001 * i},
            )
        )


@pytest.mark.parametrize(
    ("order", "pareto", "sampler", "state"),
    [
        (1, False, "tpe", TrialState.PRUNED),
        pytest.param(-1, False, "nsga2", TrialState.COMPLETE, marks=pytest.mark.slow),
        pytest.param(1, True, "tpe", TrialState.PRUNED, marks=pytest.mark.slow),
    ],
)
def test_only_predictions_that_proved_right_stop_a_trial(
    order: int, pareto: bool, sampler: str, state: TrialState, copied: Callable[..., study.Search]
) -> None:
    found = copied(pareto=pareto, sampler=sampler, seed=3)
    _finished(found, order, accuracy=0.98)
    before = found.study.get_trials(deepcopy=False)
    found.run(7)
    new = [x for x in found.study.trials[len(before) :] if x.user_attrs["within"]]
    assert [x.state for x in new] == [state]
    assert new[0].user_attrs["trusted"] is (order == 1)
    full = (found.folder / "trials" / f"{new[0].number:04}").glob("*/last.safetensors")
    assert len(list(full)) == (state is TrialState.COMPLETE)


def test_another_study_is_refused(done: study.Search, images: Path, target: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds a study of another latency_ms, flash"):
        searched(done.folder, images, target, latency_ms=1.0, flash=0.1)
    other = space.Space.model_validate({"students": {"v2": SPACE["students"]["v2"]}})
    with pytest.raises(ConfigError, match=r"holds a study of another recipe, space"):
        study.Search(recipe(images, "run.epochs=3"), other, done.folder, settings(target))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("teacher.cache=somewhere", "teacher.cache: is of 24 pixels, and the space draws others"),
        ("student.checkpoint=x", "int8.aware.start: expected more than 0"),
    ],
)
def test_recipes_that_cannot_be_searched(
    given: str, message: str, images: Path, target: Path, tmp_path: Path
) -> None:
    more = ["int8.enabled=true", "int8.aware={start: 0}"] if "checkpoint" in given else []
    more += ["teacher.epochs=0"]
    every = space.Space.model_validate(SPACE)
    with pytest.raises(ConfigError, match=message):
        study.Search(recipe(images, given, *more), every, tmp_path / "s", settings(target))
    assert not (tmp_path / "s").exists()


def test_no_candidate_within_the_bound(
    copied: Callable[..., study.Search], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "_HOPELESS", 5)
    found = copied(latency_ms=1e-6, sampler="random")
    found.run(2)
    assert not found.trained() and len(found.study.trials) == 5
    text = report.write(found).read_text()
    assert "No student within 1e-06 ms was trained" in text
    assert measured(text, 360, tmp_path) == [360, [], [], []]


def test_what_is_wrong_with_all_ends_the_search(images: Path, target: Path, tmp_path: Path) -> None:
    every = space.Space.model_validate({"students": {"a": {"width": {1.0: "test_vit"}}}})
    found = study.Search(recipe(images), every, tmp_path / "s", settings(target), lambda _: None)
    with pytest.raises(ValueError):
        found.run(2)
    assert [x.state for x in found.study.trials] == [TrialState.FAIL] * 3
    assert all(x.user_attrs["error"] for x in found.study.trials)


@pytest.fixture(scope="module")
def written(done: study.Search) -> dict[str, Any]:
    """Of the study, with finished and stopped trials beside those that were trained."""
    found = report.results(done)
    trials, rows = [x for x in found["trials"] if x["state"] == "trained"], found["trials"]
    for i in range(12):
        more = {"trial": 100 + i, "predicted": 0.2 + 0.01 * i, "early_score": 0.1 + 0.01 * i}
        more |= {"accuracy": 0.3 + 0.02 * i, "state": "trained" if i % 3 else "stopped"}
        rows.append(trials[0] | more | {"latency_ms": 0.03 + 0.004 * i})
    return found


@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_at_a_width(width: int, written: dict[str, Any], tmp_path: Path) -> None:
    """Nothing is wider than the page, no table hides a column, and no two words overlap."""
    text = report.render(written)
    assert measured(text, width, tmp_path) == [width, [], [], []]
    assert "<script" not in text and text.count("<svg") == 2


def test_the_command(
    done: study.Search, images: Path, target: Path, vitkd: Any, tmp_path: Path
) -> None:
    file = tmp_path / "space.yaml"
    file.write_text(yaml.safe_dump(SPACE))
    (given := tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(images).model_dump()))
    command = ["search", given, "--space", file, "--latency-ms", BOUND_MS, "--device", target]
    command += ["--flash", FLASH, "--trials", 2, "-o", done.folder]
    assert "--resume goes on with it" in vitkd(*command).err
    result = vitkd(*command, "--resume", "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert found == json.loads((done.folder / "report.json").read_text())
    assert len([x for x in found["trials"] if x["within"]]) == 2
    points = [x for x in found["front"]]
    assert points and all((done.folder / x["file"]).is_file() for x in points)
    assert report.render(found) == (done.folder / "report.html").read_text()
    plain = vitkd(*command, "--resume")
    assert plain.out.startswith("recipe ") and "Best within 0.09 ms: " in plain.out
    assert vitkd("search", "digits", "--latency-ms", 0).code == 2
    optuna.load_study(study_name=study.NAME, storage=f"sqlite:///{done.folder / study.FILE}")


# ---- with --engine ray


def known(trials: list[Any]) -> list[Any]:
    """What is the same whoever trains."""
    names = ("latency_ms", "within", "early", "predicted", "accuracy")
    return [(x.state, x.params, *(x.user_attrs.get(name) for name in names)) for x in trials]


def test_a_search_that_ray_began_goes_on_here(
    done: study.Search, copied: Callable[..., study.Search], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process of a cluster draws and trains what this one does."""
    found = copied()
    with pretend(monkeypatch, lambda call: None) as ray:
        cluster.run(found, 1, workers=1)
        cluster.run(found, 1, workers=1)  # starts nothing
    assert len(ray.actors) == 1 and ray.actors[0].killed and len(found.trained()) == 1
    found.run(2)
    assert known(found.study.trials) == known(done.study.trials)


def always(call: Any) -> None:
    raise Died("gone")


def test_the_third_death_of_a_candidate_ends_it(
    copied: Callable[..., study.Search], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, told = copied(), []
    found.tell = told.append
    with pretend(monkeypatch, always) as ray, pytest.raises(ClusterError, match=r"^3 processes"):
        cluster.run(found, 5, workers=2)
    trials = [x for x in found.study.trials if x.user_attrs.get("within")]
    given_up = [x for x in trials if "error" in x.user_attrs]
    assert len(given_up) == study._FAILURES and not found.trained()
    assert all(
        x.user_attrs["error"] == "3 processes died training it; is there too little memory?"
        for x in given_up
    )
    for last in given_up:
        tried = [x for x in trials if x.params == last.params]
        assert len(tried) == 3 and all(x.state is TrialState.FAIL for x in tried)
    # two were in training at once, and were different; each death was of a process of its own
    assert trials[0].params != trials[1].params
    again = f"trial {trials[0].number}: its process died: its candidate is tried again"
    assert told.count(again) == 1 and len(ray.actors) >= 2 + 7
    assert not list(found.folder.glob("trials/*"))


@pytest.mark.parametrize("why", ["lost", "preempted"])
def test_lost_machines_count_against_no_candidate(
    why: str, copied: Callable[..., study.Search], monkeypatch: pytest.MonkeyPatch
) -> None:
    deaths: list[Any] = []

    def dies(call: Any) -> None:
        if len(deaths) == 4:
            raise KeyboardInterrupt
        deaths.append(call.actor)
        error = Died("gone")
        error.preempted = why == "preempted"
        if why == "lost":
            call.ray.lost.add(call.actor.node)
        raise error

    found = copied()
    with pretend(monkeypatch, dies), pytest.raises(KeyboardInterrupt):
        cluster.run(found, 1, workers=1)
    tried = [x for x in found.study.trials if x.user_attrs.get("within")]
    assert [x.state for x in tried] == [TrialState.FAIL] * 4 + [TrialState.RUNNING]
    assert len({str(x.params) for x in tried}) == 1
    assert not any("error" in x.user_attrs for x in tried)


def test_what_is_in_training_is_not_drawn_again() -> None:
    """By TPE, though its random numbers are the same."""

    def drawn(running: bool) -> tuple[float, float]:
        found = optuna.create_study(direction="maximize")
        for i in range(study.STARTUP + 4):
            x = i / 20
            given = {"params": {"x": x}, "distributions": {"x": uniform}}
            within = {"constraints": [0.0]}
            found.add_trial(create_trial(value=-((x - 0.3) ** 2), system_attrs=within, **given))
        values = []
        for _ in range(2):
            found.sampler = study._sampler(study.Settings(), 50)
            trial = found.ask()
            values.append(trial.suggest_float("x", 0, 1))
            if not running:
                found.tell(trial, state=TrialState.FAIL)
        return values[0], values[1]

    uniform = optuna.distributions.FloatDistribution(0, 1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    first, second = drawn(running=False)
    assert first == second
    first, second = drawn(running=True)
    assert first != second


def test_a_folder_that_is_not_shared(tmp_path: Path) -> None:
    refused = cluster.Worker(tmp_path / "none", os.getcwd(), 1, "cpu").refused
    assert isinstance(refused, ClusterError)
    assert "none: is not on storage that this machine shares (on " in str(refused)


def test_wrong_usage(vitkd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["search", "digits", "--latency-ms", 1, "-o", tmp_path / "s"]
    found = vitkd(*command, "--workers", 2)
    assert found.code == 2 and "--workers: only with --engine ray" in found.err
    real = _extras.find_spec
    monkeypatch.setattr(_extras, "find_spec", lambda name: None if name == "ray" else real(name))
    found = vitkd(*command, "--engine", "ray")
    assert found.code == 1 and "vitkd search --engine ray needs ray, which is not" in found.err
    assert not (tmp_path / "s").exists()
