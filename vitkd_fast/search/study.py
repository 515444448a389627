"""The study: Optuna draws candidates, the device says what they cost, and a crew trains some.

What happened is in study.db (SQLite, Optuna's) in the search's folder, trial by trial: a search
that was killed goes on from there, and has lost the trials it was at, which are drawn again. One
process draws, measures, judges and writes the study, whoever trains.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from .._cluster import ClusterError
from .._files import replacing
from ..distill import checkpoint
from ..distill.config import Config, ConfigError
from . import flash, training
from .device import Cost, Device, open_device
from .space import Space

NAME, FILE, COSTS = "vitkd", "study.db", "costs.json"
_HOPELESS = 60  # candidates over the bound, one after another
_FAILURES = 3  # likewise, after which the search fails: what is wrong is wrong with all
_DEATHS = 3  # of processes that trained a candidate, after which nobody tries it
_AUDITED = 4  # of so many within the bounds one is trained in full, whatever is predicted
STARTUP = 8  # trials before a sampler learns from them


@dataclass(frozen=True)
class Settings:
    """How a study searches; another of them is another study.

    Attributes:
        device: as of `device.open_device`.
        latency_ms: of an image, at most.
        memory_mb: of the engine, at most; None: any.
        sampler: tpe, nsga2 or random.
        pareto: searches for the whole front of accuracy and latency, not for accuracy alone.
        flash: the share of the steps after which a candidate is judged; 0: none is.
        trust: Spearman's correlation from which on that judgement decides.
        seed: of what is drawn.
    """

    device: str = "int8"
    latency_ms: float = 3.0
    memory_mb: float | None = None
    sampler: str = "tpe"
    pareto: bool = False
    flash: float = 0.08
    trust: float = 0.5
    seed: int = 0


class Died(NamedTuple):
    """A process of a crew, while it trained."""

    machine: str  # "": it counts against no candidate


class Crew(Protocol):
    """Who trains candidates; one that was begun is finished by the same process."""

    def free(self) -> bool:
        """Whether another candidate can be begun now."""

    def begin(self, piece: training.Begin) -> None: ...

    def finish(self, piece: training.Finish) -> None: ...

    def heard(self) -> Iterable[tuple[int, training.Outcome | Died]]:
        """What there is of which trials; waits for a while."""

    def alive(self) -> set[str]:
        """The machines that are there."""


class Here:
    """This process, a candidate at a time."""

    def __init__(self) -> None:
        self.worker = training.Worker()
        self.asked: training.Begin | training.Finish | None = None

    def free(self) -> bool:
        return self.asked is None

    def begin(self, piece: training.Begin) -> None:
        self.asked = piece

    def finish(self, piece: training.Finish) -> None:
        self.asked = piece

    def heard(self) -> Iterable[tuple[int, training.Outcome | Died]]:
        piece, self.asked = self.asked, None
        assert piece
        return [(piece.number, self.worker.make(piece))]

    def alive(self) -> set[str]:
        return set()


@dataclass
class _Candidate:
    """That is in training."""

    trial: Trial
    config: Config
    cost: Cost
    judged: bool = False

    def __str__(self) -> str:
        model, number = self.config.student.model, self.trial.number
        return f"trial {number}: {model}, {self.cost.latency_ms:.3g} ms"


class Search:
    """A study in a folder.

    Args:
        recipe: whose candidates differ in what `space` draws.
        space: what is drawn.
        folder: study.db, the teacher and its caches, and the trials.
        settings: of the study.
        tell: is told what happens, a line each.

    Raises:
        ConfigError: the folder holds a study of another recipe, space or settings, or the recipe
            has no labels, a trained student, or a cache of one resolution.
    """

    def __init__(
        self,
        recipe: Config,
        space: Space,
        folder: Path,
        settings: Settings,
        tell: Callable[[str], None] = print,
    ) -> None:
        self.recipe, self.space, self.settings, self.tell = recipe, space, settings, tell
        _check(recipe, space)
        self.folder = folder = folder.resolve()  # recipes name files in it
        checkpoint.check_folder(folder, 1 << 20)
        self.device: Device = open_device(settings.device)
        self.lesson = training.Lesson(_with_schedule(recipe, settings), folder)
        begun = _asked(recipe, space, settings)
        if (folder / FILE).exists():
            stored = _open(folder, settings).user_attrs.get("asked", begun)
            if differ := [key for key, value in begun.items() if stored.get(key) != value]:
                raise ConfigError(f"-o: {folder} holds a study of another {', '.join(differ)}")
        self.lock = checkpoint.lock(folder)
        self.running: dict[int, _Candidate] = {}
        self.over = self.failed = 0  # one after another
        self.study = _open(folder, settings)
        self.study.set_user_attr("asked", begun)
        self._take_up()

    def __enter__(self) -> Search:
        return self

    def __exit__(self, *_: object) -> None:
        """Lets others into the folder."""
        self.lock.close()

    def _take_up(self) -> None:
        """Ends the trials that a killed process left, and has them drawn again."""
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self._again(trial, trial.user_attrs.get("died_on", []))
            self.tell(f"trial {trial.number} was interrupted: its candidate is tried again")

    def _again(self, trial: Trial | FrozenTrial, died_on: list[str]) -> None:
        self.study.tell(trial.number, state=TrialState.FAIL)
        self.study.enqueue_trial(trial.params, {"died_on": died_on} if died_on else None)
        shutil.rmtree(self._trial_folder(trial.number), ignore_errors=True)

    def run(self, trials: int, cpu_seconds: float | None = None, crew: Crew | None = None) -> None:
        """Tries candidates until so many within the bounds were trained.

        Args:
            trials: of all calls together.
            cpu_seconds: of training, of all calls together, after which no other begins.
            crew: trains them; None: this process.
        """
        crew = crew or Here()
        self.running, self.over, self.failed = {}, 0, 0
        while (wanted := self._wanted(trials, cpu_seconds)) or self.running:
            if wanted and crew.free():
                self._begin(crew)
                continue
            for number, said in crew.heard():
                self._hear(crew, number, said)
        if self.over >= _HOPELESS:
            self.tell(f"{self.over} candidates one after another were over the bounds: no more")

    def _wanted(self, trials: int, cpu_seconds: float | None) -> bool:
        """Whether another candidate is to be begun."""
        if len(self.trained()) + len(self.running) >= trials or self.over >= _HOPELESS:
            return False
        return cpu_seconds is None or self.seconds() < cpu_seconds

    def trained(self) -> list[FrozenTrial]:
        """The trials whose candidates were within the bounds, and are done."""
        done = (TrialState.COMPLETE, TrialState.PRUNED)
        found = self.study.get_trials(deepcopy=False, states=done)
        return [x for x in found if x.user_attrs["within"]]

    def finished(self) -> list[FrozenTrial]:
        """Those that were trained in full."""
        return [x for x in self.trained() if x.state is TrialState.COMPLETE]

    def seconds(self) -> float:
        """CPU time of all training so far."""
        return sum(x.user_attrs.get("cpu_seconds", 0.0) for x in self.study.trials)

    def correlation(self, key: str = "predicted", intervals: bool = True) -> dict[str, Any]:
        """Of what was predicted early and what was reached, over the finished trials."""
        found = [x.user_attrs for x in self.finished() if key in x.user_attrs]
        return flash.correlation([x[key] for x in found], [x["accuracy"] for x in found], intervals)

    def _begin(self, crew: Crew) -> None:
        """Draws a candidate, which is trained if it is within the bounds."""
        # of the trial's number, so that a search that goes on draws what it would have
        self.study.sampler = _sampler(self.settings, len(self.study.trials))
        trial = self.study.ask()
        try:
            config = _with_schedule(self.space.draw(trial, self.recipe), self.settings)
            trial.set_user_attr("config", config.model_dump())
            cost = self.cost(config)
            for key, value in cost._asdict().items():
                trial.set_user_attr(key, value)
            within = all(x <= 0 for x in _excess(cost, self.settings))
            trial.set_user_attr("within", within)
            if not within:
                self._told(trial, TrialState.PRUNED)
                self.over += 1
                return
            config = self.lesson.given(config)
        except training.FAILURES as error:
            self._fail(trial, error)
            return
        trial.set_user_attr("config", config.model_dump())
        self.over = 0
        self.running[trial.number] = _Candidate(trial, config, cost)
        folder = self._trial_folder(trial.number)
        crew.begin(training.Begin(trial.number, config, folder, self.settings.flash))

    def _hear(self, crew: Crew, number: int, said: training.Outcome | Died) -> None:
        """Goes on with a candidate, or ends it."""
        candidate = self.running[number]
        trial, cost = candidate.trial, candidate.cost
        if isinstance(said, Died):
            self._died(crew, self.running.pop(number).trial, said)
            return
        trial.set_user_attr("cpu_seconds", said.seconds)
        trial.set_user_attr("steps", said.total)
        if said.error:
            self._fail(self.running.pop(number).trial, said.error)
        elif not candidate.judged:
            whole = not self.settings.flash or not self._hopeless(trial, said, cost)
            candidate.judged, self.failed = True, 0
            crew.finish(training.Finish(number, whole))
        elif said.accuracy is None:
            predicted = trial.user_attrs["predicted"]
            self._told(self.running.pop(number).trial, TrialState.PRUNED)
            self.tell(f"{candidate}: stopped at a predicted {predicted:.1%}")
        else:
            trial.set_user_attr("accuracy", said.accuracy)
            values = [said.accuracy, cost.latency_ms] if self.settings.pareto else [said.accuracy]
            self._told(self.running.pop(number).trial, TrialState.COMPLETE, values)
            self.tell(f"{candidate}: {said.accuracy:.1%} after {said.seconds:.0f} s of CPU time")

    def _told(self, trial: Trial, state: TrialState, values: Sequence[float] | None = None) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            self.study.tell(trial, values, state)

    def _died(self, crew: Crew, trial: Trial, said: Died) -> None:
        alive = crew.alive()
        machines = [*trial.user_attrs.get("died_on", []), said.machine]
        if sum(machine in alive for machine in machines) >= _DEATHS:
            why = f"{_DEATHS} processes died training it; is there too little memory?"
            self._fail(trial, ClusterError(why))
            return
        self._again(trial, machines)
        self.tell(f"trial {trial.number}: its process died: its candidate is tried again")

    def _fail(self, trial: Trial, error: Exception) -> None:
        """Raises the error where candidates one after another fail."""
        why = " ".join(str(error).split())[:500]
        trial.set_user_attr("error", why)
        self.study.tell(trial, state=TrialState.FAIL)
        self.tell(f"trial {trial.number}: failed: {why}")
        self.failed += 1
        if self.failed == _FAILURES:
            raise error

    def cost(self, config: Config) -> Cost:
        """Of a candidate's architecture, which is measured once, and kept in costs.json."""
        student, file = config.student, self.folder / COSTS
        name = " ".join(
            [
                self.device.name,
                student.model,
                json.dumps(student.options),
                str(config.data.image_size),
            ]
        )
        known = json.loads(file.read_text()) if file.exists() else {}
        if name not in known:
            known[name] = self.device.cost(training.quantize(config))._asdict()
            with replacing(file) as part:
                part.write_text(json.dumps(known, indent=1))
        return Cost(**known[name])

    def _predict(self, trial: Trial, said: training.Outcome) -> float:
        """The accuracy of the whole run, from its first steps."""
        steps, scores = [x for x, _ in said.early], [x for _, x in said.early]
        predicted = flash.extrapolate(steps, scores, said.total) if steps else 0.0
        trial.set_user_attr("early", [list(x) for x in said.early])
        trial.set_user_attr("early_score", scores[-1] if scores else 0.0)
        trial.set_user_attr("early_seconds", said.seconds)
        trial.set_user_attr("predicted", predicted)
        if not self.settings.pareto:
            trial.report(predicted, steps[-1] if steps else 0)
        return predicted

    def _hopeless(self, trial: Trial, said: training.Outcome, cost: Cost) -> bool:
        """Whether predictions are trusted, and this one says that training is not worth it."""
        predicted = self._predict(trial, said)
        trusted = flash.trusted(self.correlation(intervals=False), self.settings.trust)
        trial.set_user_attr("trusted", trusted)
        # some go on all the same: only they show that predictions have become wrong
        judged = len(self.trained()) + sum(x.judged for x in self.running.values())
        if not trusted or judged % _AUDITED == 0:
            return False
        if not self.settings.pareto:
            return trial.should_prune()
        return any(
            x.user_attrs["accuracy"] >= predicted and x.user_attrs["latency_ms"] <= cost.latency_ms
            for x in self.finished()
        )

    def _trial_folder(self, number: int) -> Path:
        return self.folder / "trials" / f"{number:04}"


def front(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Of finished trials those that no other beats in accuracy and latency; the fastest is first.

    Of equals, the earlier.
    """
    order = sorted(
        trials,
        key=lambda x: (x.user_attrs["latency_ms"], -x.user_attrs["accuracy"], x.number),
    )
    found: list[FrozenTrial] = []
    for trial in order:
        if not found or trial.user_attrs["accuracy"] > found[-1].user_attrs["accuracy"]:
            found.append(trial)
    return found


def _check(recipe: Config, space: Space) -> None:
    if recipe.data.unlabelled:
        raise ConfigError("data.unlabelled: expected false, as a search compares accuracies")
    if recipe.given:
        raise ConfigError("int8.aware.start: expected more than 0, as a search trains students")
    sizes = {*space.image_size} - {recipe.data.image_size}
    if recipe.teacher.cache and sizes:
        raise ConfigError(
            f"teacher.cache: is of {recipe.data.image_size} pixels, and the space draws others; "
            "leave it out, and the search makes one of each"
        )


def _with_schedule(config: Config, settings: Settings) -> Config:
    """A candidate's run: WSD, and a warm-up that ends before the first cooldown."""
    section = config.optimizer
    longest = config.run.epochs * (settings.flash or 1.0) / 16
    optimizer = section.model_copy(
        update={
            "schedule": "wsd",
            "cooldown": flash.COOLDOWN,
            "warmup_epochs": min(section.warmup_epochs or longest, longest),
        }
    )
    run = config.run.model_copy(update={"baseline": False, "seeds": config.run.seeds[:1]})
    return config.model_copy(update={"optimizer": optimizer, "run": run})


def _excess(cost: Cost, settings: Settings) -> list[float]:
    """What a cost is over its bounds; above 0, it is."""
    found = [cost.latency_ms - settings.latency_ms]
    if settings.memory_mb is not None:
        found.append(cost.memory_mb - settings.memory_mb)
    return found


def _sampler(settings: Settings, trials: int) -> optuna.samplers.BaseSampler:
    seed = (settings.seed * 1_000_003 + trials) % 2**32

    def constraints(trial: FrozenTrial) -> Sequence[float]:
        known = trial.user_attrs
        if "latency_ms" not in known:
            return [0.0]
        return _excess(Cost(known["latency_ms"], known["memory_mb"]), settings)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        if settings.sampler == "random":
            return optuna.samplers.RandomSampler(seed)
        if settings.sampler == "nsga2":
            return optuna.samplers.NSGAIISampler(
                population_size=STARTUP, seed=seed, constraints_func=constraints
            )
        return optuna.samplers.TPESampler(
            seed=seed,
            multivariate=True,
            group=True,  # each family has parameters of its own
            n_startup_trials=STARTUP,
            constraints_func=constraints,
            constant_liar=True,  # what is in training counts as bad, so that others differ from it
        )


def _open(folder: Path, settings: Settings) -> Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    both = [StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE]
    return optuna.create_study(
        study_name=NAME,
        storage=f"sqlite:///{(folder / FILE).absolute()}",
        directions=both if settings.pareto else both[:1],
        pruner=optuna.pruners.MedianPruner(n_startup_trials=flash.LEAST, n_warmup_steps=0),
        load_if_exists=True,
    )


def _asked(recipe: Config, space: Space, settings: Settings) -> dict[str, Any]:
    """What a study is of, as JSON gives it back."""
    tree = {"recipe": recipe.model_dump(), "space": space.model_dump(), **asdict(settings)}
    return dict(json.loads(json.dumps(tree)))
