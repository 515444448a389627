"""The selection: one split after another, until more of them would not change the choice."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .._preprocessing import Array
from ..distill import checkpoint, results
from ..distill.config import ConfigError
from ..distill.runtime import Runtime
from . import statistics
from .candidates import Candidate, Varied
from .trials import Splitter, Variant, same_pool, trial_config, with_caches

VERSION = 1


def select(
    candidates: Sequence[Candidate],
    folder: Path,
    *,
    varied: Sequence[Varied] = (),
    most: int = 100,
    least: int = 5,
    share: float = 0.2,
    alpha: float = 0.05,
    margin: float = 0.005,
    seed: int = 0,
    cache: bool = True,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Which candidate to train, as the results that `report.write` writes.

    Args:
        candidates: two or more, the simplest first: the first of those that are equal is chosen.
        folder: where trials and caches are kept; what is there is not done again.
        varied: hyper-parameters, each tried with its values on the first `least` splits.
        most, least: splits, at most, and before the choice may be called stable.
        share: of the images, on which a split tests.
        alpha: the chance of a choice that is called stable and is not; of a false finding.
        margin: a difference of scores that does not matter.
        seed: of splits, initial weights and order.
        cache: keep what a teacher says of the augmented images, where that is possible.
        tell: is told what is being done.

    Raises:
        ConfigError, DataError, CacheError: what cannot be run, before any training.
        NonFiniteError, Stopped: as `Trainer.run`.
    """
    configs = [trial_config(x.config(), folder / "run") for x in candidates]
    # by the places of hyper-parameter, value and candidate
    tried = {
        (k, v, i): trial_config(x.config(one.override(value)), folder / "run")
        for k, one in enumerate(varied)
        for v, value in enumerate(one.values)
        for i, x in enumerate(candidates)
        if one.of(configs[i])
    }
    for k, one in enumerate(varied):
        if all(key[0] != k for key in tried):
            raise ConfigError(f"--vary: {one.key}: no candidate has it")
    folder.mkdir(parents=True, exist_ok=True)
    lock = checkpoint.lock(folder)
    threads = torch.get_num_threads()
    try:
        runtime = Runtime.of(configs[0])
        if runtime.ranks > 1:
            raise ConfigError(f"select: expected one process, got {runtime.ranks}")
        every = [*configs, *tried.values()]
        if cache:
            tell("the teachers' answers")
            every = with_caches(every, folder / "caches")
        splitter = Splitter(share, seed)
        titles = [x.name for x in candidates] + [candidates[i].name for _, _, i in tried]
        variants = [
            Variant(title, x, runtime, splitter, folder / "trials")
            for title, x in zip(titles, every, strict=True)
        ]
        same_pool(variants)
        for variant in variants[: len(candidates)]:
            variant.prepared.describe()
            variant.prepared.score_teachers(trained=False)
        one_split = splitter.split(variants[0].prepared.splits, 0)
        sizes = len(one_split.train), len(one_split.val)
        names = [x.name for x in candidates]
        base = variants[: len(candidates)]
        scores, path = _until_stable(base, names, most, least, alpha, margin, tell)
        sensitivity = []
        of_values = dict(zip(tried, variants[len(base) :], strict=True))
        for k, one in enumerate(varied):
            rows = []
            for v, value in enumerate(one.values):
                tell(f"{one.key}={value}")
                chosen = [of_values.get((k, v, i), x) for i, x in enumerate(base)]
                found = _scores(chosen, least)
                rows.append({"value": value} | _row(found, names, alpha, margin))
            sensitivity.append({"key": one.key, "rows": rows})
    finally:
        torch.set_num_threads(threads)
        lock.close()
    counts = statistics.winners(scores)
    seconds = [[v.score(i)["seconds"] for i in range(len(scores))] for v in base]
    return {
        "version": VERSION,
        "title": folder.name,
        "metric": base[0].score(0)["metric"],
        "candidates": [
            {
                "name": x.name,
                "given": [*([x.source] if x.source else []), *x.overrides],
                "student": config.student.model,
                "losses": [name for name, _ in config.losses.terms()],
                "mean": float(scores[:, i].mean()),
                "std": float(scores[:, i].std(ddof=1)),
                "best_on": counts[i],
                "seconds": float(np.mean(seconds[i])),
            }
            for i, (x, config) in enumerate(zip(candidates, configs, strict=True))
        ],
        "data": {"train": sizes[0], "test": sizes[1], "classes": len(one_split.classes)},
        "splits": len(scores),
        "most": most,
        "least": least,
        "share": share,
        "alpha": alpha,
        "margin": margin,
        "seed": seed,
        "stability": path[-1],
        "path": path,
        "comparisons": statistics.compare(scores, names, sizes[1] / sizes[0], alpha),
        "entropy": statistics.entropy(counts),
        "entropy_most": math.log2(len(names)),
        "scores": scores.tolist(),
        "sensitivity": sensitivity,
        "notes": sorted({note for x in variants for note in x.prepared.notes}),
        "environment": {
            "vitkd_fast": version("vitkd-fast"),
            "torch": torch.__version__,
            "timm": version("timm"),
            "device": results.device_name(runtime),
        },
    }


def _until_stable(
    variants: Sequence[Variant],
    names: Sequence[str],
    most: int,
    least: int,
    alpha: float,
    margin: float,
    tell: Callable[[str], None],
) -> tuple[Array, list[dict[str, Any]]]:
    """Scores, [splits, candidates], and what was found after each split from the second on."""
    scores: list[list[float]] = []
    path: list[dict[str, Any]] = []
    while len(scores) < most and not (len(scores) >= least and path[-1]["stable"]):
        scores.append([variant.score(len(scores))["score"] for variant in variants])
        if len(scores) > 1:
            path.append(statistics.stability(np.array(scores), names, alpha, margin))
            state = "stable" if path[-1]["stable"] else "not stable yet"
            tell(f"split {len(scores)} of at most {most}: {path[-1]['choice']}, {state}")
    return np.array(scores), path


def _scores(variants: Sequence[Variant], splits: int) -> Array:
    return np.array([[x.score(i)["score"] for x in variants] for i in range(splits)])


def _row(scores: Array, names: Sequence[str], alpha: float, margin: float) -> dict[str, Any]:
    found = statistics.stability(scores, names, alpha, margin)
    return {
        "means": scores.mean(0).tolist(),
        "errors": (scores.std(0, ddof=1) / math.sqrt(len(scores))).tolist(),
        "choice": found["choice"],
        "stable": found["stable"],
        "best_on": statistics.winners(scores),
    }
