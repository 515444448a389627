"""Predictions by the processes of a Ray cluster: a piece is a chunk of files, one line for each.

Chunks are kept in FILE.parts, beside the file to write, until all are there: so a run that was
interrupted goes on, and the file is there entirely or not at all. A chunk's lines depend on the
model and the images alone: the engine's logits are the same on every CPU.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from . import _cluster
from ._cluster import EXPECTED, Answer, ClusterError, Noting, named
from ._extras import require
from ._files import create, locked, replacing
from ._opened import open_model
from .distill.cache import quarantine
from .predict_command import Form, Said, said

_FILES = 64  # of a chunk
_ABOUT = "about.json"


class Chunk(NamedTuple):
    """Files that follow one another."""

    number: int
    start: int  # the number of the first file
    files: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.number:07}.json"


class Worker:
    """An actor of Ray, which is given one chunk of files at a time.

    Args:
        model, digest: an int8 file, and the SHA-256 that it must have.
        parts: where chunks are kept, on storage that all machines share.
        cwd: the driver's, from which paths may be given.
        threads: of the engine.
    """

    def __init__(
        self, model: str, digest: str, parts: Path, cwd: str, form: Form, skip: bool, threads: int
    ) -> None:
        self.parts, self.form, self.skip_bad, self.threads = parts, form, skip, threads
        self.notes = Noting()
        self.refused: Exception | None = None
        try:
            os.chdir(cwd)
            if (other := _sha256(model)) != digest:
                raise ClusterError(
                    f"{model}: the driver's is {digest[:12]}..., not {other[:12]}..."
                )
            if not (parts / _ABOUT).exists():
                raise ClusterError(f"{parts}: is not on storage that this machine shares")
            self.opened = open_model(model, threads)
        except EXPECTED as error:
            self.refused = named(error)

    def answer(self) -> Answer:
        return Answer.here(self.threads, self.refused)

    def make(self, chunk: Chunk, left_out: Collection[int], note: Path) -> Exception | None:
        """Predicts and commits a chunk; what went wrong is a value, as Ray wraps exceptions."""
        try:
            self.notes.begin(note)
            numbered = enumerate(chunk.files, chunk.start)
            found = [self._ask(i, file, left_out) for i, file in numbered]
            commit(self.parts / chunk.name, found)
        except EXPECTED as error:
            return named(error)
        finally:
            self.notes.end()
        return None

    def _ask(self, image: int, file: str, left_out: Collection[int]) -> Said:
        if image in left_out:
            why = "cannot be read: processes died reading it"
            return Said(self.form.unread(file, why), read=False)
        with self.notes.reading(image):
            [answer] = said([file], self.opened, self.form, self.skip_bad)
        return answer


def commit(path: Path, found: list[Said]) -> None:
    """Writes a chunk under its name, atomically, unless the same is there.

    Raises:
        ClusterError: another is there.
    """
    tree = {"lines": [x.line for x in found], "unread": sum(not x.read for x in found)}
    if not create(path, data := json.dumps(tree).encode()) and path.read_bytes() != data:
        raise ClusterError(f"{path}: holds other predictions; did an image change meanwhile?")


def predict(
    model: str,
    files: list[str],
    output: Path,
    form: Form,
    skip_bad: bool = False,
    threads: int = 1,
    workers: int | None = None,
) -> int:
    """Writes what an int8 file says of images, by actors of the cluster at RAY_ADDRESS, or of this
    machine; returns how many cannot be read.

    Every machine must have the package, and see the images, the model and the output's folder at
    the same paths.

    Args:
        workers: processes, each of `threads` CPUs; None: as many as the cluster has CPUs for.

    Raises:
        ImportError: Ray is not installed.
        ClusterError: an interrupted run of something else has begun the file; processes keep dying;
            nothing has moved for ten minutes.
        DataError: naming a file that cannot be read, unless `skip_bad`.
    """
    require("ray", "vitkd predict --engine ray")
    parts = output.absolute().with_name(f"{output.name}.parts")
    about = {
        "model": _sha256(model),
        "files": hashlib.sha256("\0".join(files).encode(errors="surrogateescape")).hexdigest(),
        "form": form._asdict(),
        "chunk": _FILES,
        "version": version("vitkd-fast"),
    }
    job = _Chunks(
        files, parts, (model, about["model"], parts, os.getcwd(), form, skip_bad, threads)
    )
    chunks = [
        Chunk(i, start, tuple(files[start : start + _FILES]))
        for i, start in enumerate(range(0, len(files), _FILES))
    ]
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(parts))
        except BlockingIOError:
            raise ClusterError(f"-o: {parts} is in use by another process") from None
        _begin(parts, about)
        if todo := [chunk for chunk in chunks if not (parts / chunk.name).exists()]:
            ray = stack.enter_context(_cluster.connected())
            share = _cluster.of_cpus(ray.cluster_resources(), threads, workers)
            try:
                _cluster.Driver(ray, job, todo, share).run()
            finally:
                _clear(parts)
        unread = 0
        with replacing(output) as part, open(part, "wb") as file:
            for chunk in chunks:
                tree = json.loads((parts / chunk.name).read_bytes())
                lines = "".join(f"{line}\n" for line in tree["lines"])
                file.write(lines.encode(errors="surrogateescape"))
                unread += tree["unread"]
        shutil.rmtree(parts)
    return unread


def _begin(parts: Path, about: dict[str, Any]) -> None:
    """Notes of what the chunks are, or compares it with what is noted."""
    path = parts / _ABOUT
    if path.exists():
        begun = json.loads(path.read_bytes())
        if others := [key for key, value in about.items() if begun.get(key) != value]:
            raise ClusterError(
                f"-o: {parts} is of an interrupted run with another {', '.join(others)}; remove it "
                "to begin anew"
            )
    else:
        with replacing(path) as part:
            part.write_text(json.dumps(about))
    _clear(parts)


def _clear(parts: Path) -> None:
    """Removes what processes that were killed had begun."""
    for part in parts.glob(".*.part"):
        part.unlink(missing_ok=True)


def _sha256(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


class _Chunks:
    """Files by the chunk, as a `_cluster.Job`."""

    pieces = "chunks"
    worker: Any = Worker

    def __init__(self, files: list[str], parts: Path, given: tuple[Any, ...]) -> None:
        self.files, self.parts, self.given = files, parts, given

    def called(self, piece: Chunk) -> str:
        return str(self.parts / piece.name)

    def path(self, piece: Chunk) -> Path:
        return self.parts / piece.name

    def images(self, piece: Chunk) -> int:
        return len(piece.files)

    def name(self, image: int) -> str:
        return self.files[image]

    def left_out(self) -> Collection[int]:
        return quarantine.read(self.parts)

    def leave_out(self, image: int) -> Collection[int]:
        return quarantine.add(self.parts, image, self.name(image))
