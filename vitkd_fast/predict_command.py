"""`vitkd predict`: what a model says of images, a line for each."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer

from ._files import replacing
from ._opened import Opened, is_int8, open_model

MODEL = "A .safetensors file of `vitkd distill`, or the name of a timm model."
MODEL_OR_INT8 = MODEL[:-1] + ", or a file of `vitkd quantize`."
Threads = Annotated[
    int | None,
    typer.Option(min=1, max=256, help="CPU threads; the default of an int8 file is 1."),
]


class Engine(str, Enum):
    """Whose processes read and predict."""

    local = "local"
    ray = "ray"


class Form(NamedTuple):
    """What is said of an image."""

    top: int = 3
    threshold: float = 0.5  # of several labels
    as_json: bool = False

    def line(self, file: str, logits: Any, opened: Opened) -> str:
        """Of the logits [classes] of an image."""
        answers = np.asarray(logits, np.float64) / opened.temperature
        if opened.multilabel:
            odds = 1 / (1 + np.exp(-answers))
            best = np.argsort(-odds, kind="stable")
            best = best[odds[best] >= self.threshold]
        else:
            odds = np.exp(answers - answers.max())
            odds /= odds.sum()
            best = np.argsort(-odds, kind="stable")[: self.top]
        names = [opened.classes[i] for i in best]
        if self.as_json:
            found = {"file": file, "classes": names, "probabilities": odds[best].round(6).tolist()}
            return json.dumps(found, ensure_ascii=False)
        pairs = zip(names, odds[best], strict=True)
        return f"{file}: " + (", ".join(f"{name} {p:.1%}" for name, p in pairs) or "none")

    def unread(self, file: str, why: str) -> str:
        """Of an image that cannot be read."""
        if self.as_json:
            return json.dumps({"file": file, "error": why}, ensure_ascii=False)
        return f"{file}: {why}"


class Said(NamedTuple):
    """Of an image."""

    line: str
    read: bool = True


def said(files: Iterable[str], opened: Opened, form: Form, skip_bad: bool) -> Iterator[Said]:
    """What a model says of each file, one after another.

    Raises:
        DataError: naming a file that cannot be read, unless `skip_bad`.
    """
    from .images import DataError, read

    for file in files:
        try:
            pixels = read(file, opened.pixels)
        except DataError as error:
            if not skip_bad:
                raise
            yield Said(form.unread(file, str(error).removeprefix(f"{file} ")), read=False)
        else:
            # alone: a float model's answer may depend on the others of a batch
            yield Said(form.line(file, opened.logits(pixels[None])[0], opened))


def predict(
    model: Annotated[str, typer.Argument(help=MODEL_OR_INT8)],
    images: Annotated[list[str], typer.Argument(help="Image files, and folders of them.")],
    top: Annotated[int, typer.Option(min=1, help="Classes per image.")] = 3,
    threshold: Annotated[
        float,
        typer.Option(min=0, max=1, help="Of a model of several labels: the least probability."),
    ] = 0.5,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write the lines there instead."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON object for each image, in a line.")
    ] = False,
    skip_bad: Annotated[
        bool,
        typer.Option("--skip-bad", help="Say of an image that it cannot be read, and go on."),
    ] = False,
    threads: Threads = None,
    engine: Annotated[
        Engine, typer.Option(help="This process, or, of an int8 file, a Ray cluster's.")
    ] = Engine.local,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes of --engine ray; the default is one for each CPU."),
    ] = None,
) -> None:
    """Print the most probable classes of images, or all their labels, by a model or an int8 file.

    Example: vitkd predict runs/first/distilled-0/best.safetensors cat.jpg dog.jpg

    All cores of a machine, or of those at RAY_ADDRESS; an interrupted run goes on: vitkd predict
    student.int8.safetensors images --engine ray -o predictions.txt
    """
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        why = "is a folder" if output.is_dir() else "is in no folder that is there"
        raise typer.BadParameter(f"-o: {output} {why}")
    if engine is Engine.local and workers:
        raise typer.BadParameter("--workers: only with --engine ray")
    if engine is Engine.ray and output is None:
        raise typer.BadParameter("-o: missing; --engine ray writes a file")
    if engine is Engine.ray and not is_int8(model):
        raise typer.BadParameter(f"MODEL: expected a file of `vitkd quantize`, got {model}")
    files, form = list_files(images), Form(top, threshold, as_json)
    if engine is Engine.ray:
        from . import predict_cluster

        assert output
        unread = predict_cluster.predict(
            model, files, output, form, skip_bad, threads or 1, workers
        )
    else:
        unread = 0
        with _lines_to(output) as write:
            for answer in said(files, open_model(model, threads), form, skip_bad):
                write(answer.line + "\n")
                unread += not answer.read
    if unread:
        print(f"{unread} of {len(files)} images cannot be read", file=sys.stderr)
    if output:
        print(f"{output}: {len(files)} images")


def list_files(images: Iterable[str]) -> list[str]:
    """Files, and those in folders, in natural order.

    Raises:
        DataError: a URL, or a folder without images.
    """
    from .images import DataError, list_images

    files: list[str] = []
    for given in images:
        if "://" in given and not Path(given).exists():
            raise DataError(f"{given} is a URL; download it, and name the file")
        files += map(str, list_images(given)) if Path(given).is_dir() else [given]
    return files


@contextmanager
def _lines_to(output: Path | None) -> Iterator[Any]:
    """A function that writes, to standard output where no file is given."""
    with replacing(output) if output else nullcontext() as part:
        if part is None:
            yield sys.stdout.write
            return
        with open(part, "w", encoding="utf-8", errors="surrogateescape") as file:
            yield file.write
