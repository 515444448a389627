"""The int8 engine and other runtimes on the same images: how near, how fast, how large.

Each model has a process of its own, and they take turns, image by image: what else the machine does
hits all alike. Per image a model's first call gives its logits, and only the calls after it are
timed, since caches hold the other's data before.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from .._extras import require
from ..images import DataError, list_images, read
from ..int8 import file
from ..int8.graph import Array, Graph
from .compare_runtimes import RUNTIMES, SUFFIXES
from .compare_worker import ENGINE, Turn, Worker, WorkerError

VERSION = 1
CALLS = 300  # that are timed of each model, at least
SHOWN = 20  # images with other answers
_BINS = (0, 0.25, 0.5, 1, 2, 4, 8, math.inf)  # of differences, in steps
_BUSY = 1.5  # a clock so far above the CPU time shows a machine that did other work


def compare(
    student: str | Path,
    model: str | Path,
    images: str | Path | Sequence[Path],
    *,
    runtimes: Sequence[str] | None = None,
    threads: int = 1,
    count: int = 500,
    skip_bad: bool = False,
) -> dict[str, Any]:
    """Runs a file of `int8.quantize` and a model that `write` made of it, in turns.

    Args:
        student: the file.
        model: the model; its suffix names the runtimes.
        images: a folder, or files; prepared as `vitkd predict` prepares them.
        runtimes: keys of `RUNTIMES`; None: those for the suffix that are installed.
        threads: of a call.
        count: images, evenly spread over those that there are.
        skip_bad: leave out images that cannot be read, and count them.

    Returns:
        What `compare_card.write` writes; docs/quickstart/compare.md names its keys. A step is 1/255
        of the range of the engine's logits on these images: what a byte of them would be.

    Raises:
        ValueError: an unknown suffix or runtime, a model of another student, or one that takes
            other inputs.
        ImportError: no runtime for the suffix is installed; names the extra that brings one.
        FileError, DataError: as `int8.load` and `images.read`.
        WorkerError: a runtime cannot open or run the model.
    """
    from ..distill.sources import spread

    student, model = Path(student), Path(model)
    names = chosen(model, runtimes)
    graph = file.read(student)
    if not model.exists():
        raise ValueError(f"compare: MODEL: there is no {model}")
    files = list_images(images) if isinstance(images, str | Path) else list(images)
    files = [files[i] for i in spread(len(files), count)]
    calls = math.ceil(CALLS / len(files))
    with ExitStack() as stack:
        workers = [
            stack.enter_context(Worker(name, student if name == ENGINE else model, threads))
            for name in (ENGINE, *names)
        ]
        for worker in workers[1:]:
            _check(worker.about, student, model, graph)
        turns: list[list[Turn]] = [[] for _ in workers]
        read_files: list[Path] = []
        for path in files:
            try:
                pixels = read(path, graph)
            except DataError:
                if not skip_bad:
                    raise
                continue
            read_files.append(path)
            # who is first changes: no one always finds the caches that another left
            order = list(range(len(workers)))
            for i in order[:: 1 if len(read_files) % 2 else -1]:
                turns[i].append(workers[i].turn(pixels, calls))
        if not read_files:
            raise DataError(f"{images}: not one of {len(files)} images can be read")
        found = [
            _costs(worker, taken, threads) | {"operators": None}
            for worker, taken in zip(workers, turns, strict=True)
        ]
        for row, worker in zip(found, workers, strict=True):  # a profile takes memory
            row["operators"] = worker.operators(pixels)
    logits = [np.stack([turn.logits for turn in taken]) for taken in turns]
    step = float(np.ptp(logits[0])) / 255 or 1.0
    for row, theirs in zip(found[1:], logits[1:], strict=True):
        row |= fidelity(logits[0], theirs, step, graph.multilabel)
    return {
        "version": VERSION,
        "student": _file(student) | {
            "fingerprint": file.fingerprint(graph), "image_size": graph.image_size,
            "classes": logits[0].shape[1], "multilabel": graph.multilabel,
        },
        "model": _file(model) | {"fingerprint": workers[-1].about["metadata"].get("student")},
        "images": {
            "folder": str(images) if isinstance(images, str | Path) else None,
            "count": len(read_files), "skipped": len(files) - len(read_files),
        },
        "threads": threads,
        "calls": calls * len(read_files),
        "step": step,
        "models": found,
        "disagreements": _disagreements(graph, read_files, names, logits, step),
        "environment": {
            "CPU": cpu(), "system": f"{platform.system()} {platform.machine()}",
            "Python": platform.python_version(), "NumPy": np.__version__,
        },
    }  # fmt: skip


def chosen(model: Path, runtimes: Sequence[str] | None) -> list[str]:
    """The runtimes that a model is run in.

    Raises:
        ValueError: an unknown suffix, or runtime.
        ImportError: none is installed.
    """
    if model.suffix not in SUFFIXES:
        raise ValueError(f"compare: MODEL: expected a name in {', '.join(SUFFIXES)}, got {model}")
    known = [name for name, runtime in RUNTIMES.items() if runtime.suffix == model.suffix]
    if unknown := [name for name in runtimes or () if name not in known]:
        raise ValueError(
            f"compare: runtimes: expected {', '.join(known)} for {model.suffix}, got {unknown[0]}"
        )
    names = list(runtimes or (name for name in known if RUNTIMES[name].is_installed))
    for name in names or known[:1]:
        runtime = RUNTIMES[name]
        if runtime.is_installed:
            continue
        if runtime.extra:
            require(runtime.extra, f"compare: a {model.suffix} file", (runtime.module,))
        raise ImportError(f"compare: {name} is not installed: pip install {runtime.package}")
    return names


def _check(about: dict[str, Any], student: Path, model: Path, graph: Graph) -> None:
    """That a model is of this student, and takes and gives what the engine does."""
    ours = file.fingerprint(graph)
    theirs = about["metadata"].get("student", ours)
    if theirs != ours:
        raise ValueError(
            f"compare: {model}: expected a model of {student} ({ours[:12]}), got one of another "
            f"file ({theirs[:12]}): `vitkd export` makes one"
        )
    size, classes = graph.image_size, len(graph.nodes[-1].weight)  # type: ignore[attr-defined]
    for what, given, dtype, shape in (
        ("input", about["inputs"], "uint8", [size, size, 3]),
        ("output", about["outputs"], "float32", [classes]),
    ):
        fits = len(given) == 1 and given[0][0] == dtype and given[0][1][1:] == shape
        if not fits or given[0][1][0] not in (1, *_free(given[0][1])):
            got = ", ".join(f"{dtype} [{', '.join(map(str, dims))}]" for dtype, dims in given)
            want = f"{dtype} [N, {', '.join(map(str, shape))}]"
            raise ValueError(f"compare: {model}: expected one {what}, {want}, got {got}")


def _free(shape: list[Any]) -> list[Any]:
    return [n for n in shape if not isinstance(n, int)]


def _file(path: Path) -> dict[str, Any]:
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    return {"file": str(path), "bytes": sum(p.stat().st_size for p in files)}


def _costs(worker: Worker, turns: list[Turn], threads: int) -> dict[str, Any]:
    """Milliseconds and bytes of a model."""
    wall, cpu_time = (
        dict(zip(("p50", "p90", "p99"), np.percentile(times, (50, 90, 99)).tolist(), strict=True))
        for times in (
            1e3 * np.array([seconds for turn in turns for seconds in turn.wall]),
            1e3 * np.array([seconds for turn in turns for seconds in turn.cpu]),
        )
    )
    runtime = RUNTIMES.get(worker.name)
    return {
        "name": worker.name,
        "version": worker.about["version"],
        "settings": runtime.settings if runtime else "",
        "bytes": _file(worker.file)["bytes"],
        "latency_ms": wall,
        "cpu_ms": cpu_time,
        "busy": wall["p50"] > _BUSY * cpu_time["p50"],
        "peak_bytes": worker.peak_bytes(),
        "before_bytes": worker.about["before_bytes"],
    }


def fidelity(ours: Array, theirs: Array, step: float, multilabel: bool = False) -> dict[str, Any]:
    """How near logits [N, classes] are to the engine's.

    Args:
        ours: the engine's.
        theirs: the runtime's.
        step: the unit of `steps`.
        multilabel: agreement is of each label at a probability of one half, not of top-1.
    """
    off = np.abs(theirs.astype(np.float64) - ours)
    if multilabel:
        agreement = float(((ours > 0) == (theirs > 0)).mean())
    else:
        agreement = float((ours.argmax(1) == theirs.argmax(1)).mean())
    noise = float(np.square(off).sum())
    signal = float(np.square(ours, dtype=np.float64).sum())
    counts, _ = np.histogram(off / step, [*_BINS[:-1], np.inf])
    return {
        "agreement": agreement,
        "largest": float(off.max()),
        "mean": float(off.mean()),
        "largest_steps": float(off.max()) / step,
        "mean_steps": float(off.mean()) / step,
        "sqnr_db": 10 * math.log10(signal / noise) if noise and signal else None,
        "histogram": [
            {"from": low, "to": None if high == math.inf else high, "share": int(n) / off.size}
            for low, high, n in zip(_BINS, _BINS[1:], counts, strict=False)
        ],
    }


def _disagreements(
    graph: Graph, files: list[Path], names: list[str], logits: list[Array], step: float
) -> list[dict[str, Any]]:
    """Images with another top-1; the engine's margin over the runtime's class, in steps."""
    if graph.multilabel:
        return []
    classes = graph.classes or tuple(map(str, range(logits[0].shape[1])))
    ours, rows = logits[0].argmax(1), []
    for name, theirs in zip(names, logits[1:], strict=True):
        best = theirs.argmax(1)
        for i in np.flatnonzero(best != ours)[:SHOWN].tolist():
            margin = float(logits[0][i, ours[i]] - logits[0][i, best[i]]) / step
            answers = {"ours": classes[ours[i]], "theirs": classes[best[i]]}
            rows.append({"image": str(files[i]), "name": name, **answers, "margin_steps": margin})
    return rows


def cpu() -> str:
    """The CPU's name, where the system says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def verdict(results: dict[str, Any]) -> str:
    """One sentence."""
    engine, *others = results["models"]
    of = "labels" if results["student"]["multilabel"] else "top-1"
    parts = [
        f"{row['name']} gives the engine's {of} on {100 * row['agreement']:.1f}% of "
        f"{results['images']['count']} images and takes "
        f"{row['cpu_ms']['p50'] / engine['cpu_ms']['p50']:.2f} times its CPU time"
        for row in others
    ]
    return "; ".join(parts) + "."


__all__ = ["RUNTIMES", "WorkerError", "chosen", "compare", "cpu", "fidelity", "verdict"]
