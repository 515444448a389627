"""The command line, `vitkd`. Exit codes: 0 done, 1 failed (one line says why), 2 wrong usage."""

import json
import os
import sys
import warnings
from collections.abc import Iterator
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from ._files import home
from ._opened import Opened, is_int8, open_model
from ._opened import load as load_model
from .audit.command import audit
from .distill.cache.command import cache
from .distill.pack_command import SkipBad, pack
from .export.command import export
from .export.compare_command import compare
from .predict_command import MODEL, MODEL_OR_INT8, Threads, predict
from .search.command import search
from .select.command import select

app = typer.Typer(
    help="Distil vision transformers into MobileNets, and run them in int8.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ImageSize = Annotated[
    int | None, typer.Option(min=1, help="Side of the images; the default is the model's.")
]


class Calibration(str, Enum):
    """How the range of a map is found."""

    mse = "mse"
    percentile = "percentile"
    minmax = "minmax"


def _version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        print(f"vitkd_fast {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show an error's traceback.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    # declared here for the help text; main reads it, which is where errors arrive
    del debug


@app.command()
def distill(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RECIPE|FILE.yaml|KEY=VALUE",
            help="A recipe or a file, and keys to override.",
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the run in run.folder.")] = False,
    student: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="FILE",
            help="A student of `vitkd distill`, to train for int8: int8.aware={start: 0}.",
        ),
    ] = "",
    skip_bad: SkipBad = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check data, models and cost, and train nothing.",
        ),
    ] = False,
) -> None:
    """Train a student with and without its teacher, compare them, and write a report.

    Example: vitkd distill digits run.folder=runs/first losses.kd.temperature=2

    Own images: vitkd distill data.train=images/train data.val=images/val
    teacher.model=vit_small_patch16_224 teacher.checkpoint=teacher.safetensors
    student.model=mobilenetv4_conv_small losses.kd.temperature=4

    A student for int8, in one more epoch: vitkd distill digits run.epochs=1
    run.folder=runs/int8 --from runs/first/distilled-0/last.safetensors

    Several GPUs: torchrun --no-python --nproc-per-node=8 vitkd distill imagenet-mobilenetv2
    data.train=imagenet/train data.val=imagenet/val
    """
    given = [*(arguments or ()), *(["data.skip_bad=true"] if skip_bad else [])]
    _run(_config(given, student), resume, dry_run)


app.command()(cache)


@app.command()
def recipes() -> None:
    """List the recipes that ship with the package: teacher, student, losses and epochs.

    Example: vitkd recipes
    """
    from .distill import config

    names = config.recipes()
    width = max(map(len, names))
    for name in names:
        print(f"{name:{width}}  {config.about(name)}")


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help=MODEL_OR_INT8)],
    folder: Annotated[
        str, typer.Argument(metavar="DIR", help="A folder of class folders, or its packed file.")
    ],
    labels: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Of a model of several labels: the .csv or .json file in DIR with them.",
        ),
    ] = "labels.csv",
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    workers: Annotated[int, typer.Option(min=0)] = 2,
    skip_bad: SkipBad = False,
    threads: Threads = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, with the figures of each class.")
    ] = False,
) -> None:
    """Print the metrics of a model, or of an int8 file, on a folder of images.

    Example: vitkd eval runs/first/distilled-0/best.safetensors images/val
    """
    from ._files import finite
    from .distill import identity, sources

    opened = open_model(model, threads, accelerated=True)
    notes: list[str] = []
    source: Any
    if opened.multilabel:
        source, bad = sources.open_labelled(folder, labels, "DIR", skip_bad, opened.classes)
    else:
        known = identity.class_indices(model, opened.classes, sources.class_folders(folder))
        source, bad, notes, _ = sources.open_folder(folder, known, skip_bad)
    # an int8 file is evaluated on NumPy, with fewer metrics, where there is no `distill` extra
    complete = not is_int8(model) or find_spec("torchmetrics") is not None
    if not complete and opened.multilabel:
        raise ImportError('the metrics of several labels need pip install "vitkd-fast[distill]"')
    if not complete:
        notes.append('pip install "vitkd-fast[distill]" brings more metrics than these')
    for note in notes:
        print(note, file=sys.stderr)
    measure = _evaluate if complete else _evaluate_without_torch
    section = {"batch_size": batch_size, "workers": workers, "skip_bad": skip_bad}
    metrics, confusion, unread = measure(opened, source, section)
    images = int(confusion[0].sum() if opened.multilabel else confusion.sum())
    skipped = len(bad) + unread
    if as_json:
        found = {"model": model, "folder": folder, "images": images, "skipped": skipped}
        found["metrics"] = metrics
        found["classes"] = _per_class(opened)(confusion, opened.classes)
        print(json.dumps(finite(found), allow_nan=False, ensure_ascii=False, indent=2))
        return
    print(f"{images} images, {skipped} skipped")
    for name, value in metrics.items():
        print(f"{name:15} {value:.4f}")


app.command()(predict)


app.command()(audit)


app.command()(search)
app.command()(select)


app.command()(pack)


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help=MODEL)],
    images: Annotated[Path, typer.Option(metavar="DIR", help="A folder of calibration images.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="What to write: *.safetensors.")
    ],
    calibration: Annotated[
        Calibration, typer.Option(help="How the range of each map is found.")
    ] = Calibration.mse,
    bias_correction: Annotated[
        bool, typer.Option(help="Correct biases by the mean error of each layer.")
    ] = True,
    reconstruct: Annotated[
        bool,
        typer.Option(
            "--reconstruct", help="Fit weights to the rounded maps; takes 2 to 3 times as long."
        ),
    ] = False,
    mixed: Annotated[
        bool,
        typer.Option("--mixed", help="More bits for the maps that cost the logits most."),
    ] = False,
    budget: Annotated[
        float, typer.Option(min=1, help="Multiply-adds with --mixed over those without.")
    ] = 1.1,
    portable: Annotated[
        bool, typer.Option("--portable", help="Round as other runtimes do, for `vitkd export`.")
    ] = False,
    count: Annotated[int, typer.Option(min=1, help="Images, evenly spread over DIR.")] = 500,
    skip_bad: SkipBad = False,
    image_size: ImageSize = None,
) -> None:
    """Make an int8 file of a MobileNet, and print how close each layer is to the float one.

    Example: vitkd quantize runs/first/distilled-0/best.safetensors --images images/train
    -o student.int8.safetensors
    """
    from dataclasses import replace

    import numpy as np

    if output.suffix != ".safetensors" or output.is_dir():
        raise typer.BadParameter(f"-o: expected a name in .safetensors, got {output}")
    if not output.parent.is_dir():
        raise typer.BadParameter(f"-o: {output.parent} is no folder")
    if is_int8(model):
        raise typer.BadParameter(f"MODEL: {model} is int8 already")
    if output.exists() and Path(model).exists() and output.samefile(model):
        raise typer.BadParameter(f"-o: {output} is the model itself")

    from . import int8, models
    from .distill import sources
    from .images import DataError, list_images, read

    files = list_images(images)
    loaded = load_model(model)
    pixels = replace(loaded.pixels, image_size=image_size or loaded.pixels.image_size)
    chosen, bad = [], 0
    for i in sources.spread(len(files), count):
        try:
            chosen.append(read(files[i], pixels))
        except DataError:
            if not skip_bad:
                raise
            bad += 1
    if not chosen:
        raise DataError(f"{images}: not one of {bad} images can be read")
    print(f"{len(chosen)} of {len(files)} images, {bad} skipped", flush=True)
    quantized = int8.quantize(
        loaded.model,
        np.stack(chosen),
        mean=pixels.mean,
        std=pixels.std,
        calibration=calibration.value,
        bias_correction=bias_correction,
        reconstruct=reconstruct,
        mixed="auto" if mixed else None,
        budget=budget,
        portable=portable,
        classes=loaded.classes,
        multilabel=models.Origin.of(loaded.model).multilabel,
        crop_pct=pixels.crop_pct,
        interpolation=pixels.interpolation,
    )
    quantized.save(output)
    print(quantized.report())
    print(f"{output}: {output.stat().st_size / 1e6:.2f} MB")


app.command()(export)


app.command()(compare)


@app.command()
def profile(
    file: Annotated[Path, typer.Argument(help="A file of `vitkd quantize`.")],
    image_size: ImageSize = None,
    threads: Annotated[int, typer.Option(min=1, max=256, help="Threads of the engine.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Images per call.")] = 1,
    device: Annotated[
        str, typer.Option(help="cpu, or cuda or cuda:N for an NVIDIA GPU, without --threads.")
    ] = "cpu",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, which `vitkd search --device` takes.")
    ] = False,
) -> None:
    """Print the time of each layer of an int8 file on one thread or a GPU, and of a call.

    Example: vitkd profile student.int8.safetensors --threads 2 --batch 8
    """
    import numpy as np

    from . import int8
    from ._timing import measure

    session = int8.load(file, threads=threads, image_size=image_size, device=device)
    size = session.image_size
    pixels = np.random.default_rng(0).integers(256, size=(batch, size, size, 3), dtype=np.uint8)
    layers = session.profile(pixels)
    if as_json:
        print(
            json.dumps({"version": 1, "session": str(session), "layers": layers.json()}, indent=1)
        )
        return
    print(layers)
    timing = measure(lambda: session(pixels))
    p99 = "n/a" if timing.p99 is None else f"{1e3 * timing.p99:.3g} ms"
    print(
        f"{session}, batch {batch}, {timing.calls:,} calls: p50 {1e3 * timing.p50:.3g} ms, "
        f"p90 {1e3 * timing.p90:.3g} ms, p99 {p99}, CPU {1e3 * timing.cpu:.3g} ms, "
        f"{batch / timing.p50:,.0f} images/s"
    )


@app.command()
def replay(
    file: Annotated[
        Path, typer.Argument(help="nonfinite.safetensors, of a run that a loss stopped.")
    ],
    device: Annotated[str, typer.Option(help="cpu or cuda; the default is the GPU if any.")] = "",
) -> None:
    """Take the step that made a loss NaN or Inf again, and print its term, layer and gradients.

    Example: vitkd replay runs/first/distilled-0/nonfinite.safetensors
    """
    from .distill import nonfinite

    print(nonfinite.replay(file, device))


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="The folder of a run, with its report.json.")],
) -> None:
    """Write report.html again from a run's report.json, and print its table.

    Example: vitkd report runs/first
    """
    from .distill import report

    results = report.read(folder)
    print(report.table(results))
    print(report.write(results, folder))


@app.command("bench-loop")
def bench_loop(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RECIPE|FILE.yaml|KEY=VALUE", help="As of `vitkd distill`: the run to measure."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps to measure.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print where a training step's time goes: data, teacher, student, loss, backward, optimiser.

    Example: vitkd bench-loop digits data.batch_size=64
    """
    from .distill import bench_loop

    found = bench_loop.bench_loop(_config(arguments), steps)
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(found.json(), indent=2) if as_json else found)


@app.command()
def show() -> None:
    """Print versions, instruction sets, and the backend that implements each operation.

    Example: vitkd show
    """
    from ._show import show

    show()


@app.command()
def demo() -> None:
    """Distil a small vision transformer on scikit-learn's digits; the report is in runs/demo.

    Example: vitkd demo
    """
    import shutil

    from .distill import config

    shutil.rmtree("runs/demo", ignore_errors=True)
    _run(config.load("digits", ["run.folder=runs/demo"]), resume=False)


def _per_class(opened: Opened) -> Any:
    """What makes a table of each class of a confusion."""
    from ._metrics import per_class

    if opened.multilabel:
        from .distill import multilabel

        return multilabel.per_class
    return per_class


def _evaluate(opened: Opened, source: Any, section: Any) -> tuple[dict[str, float], Any, int]:
    """Every metric, the confusion of classes, and how many images could not be read."""
    from .distill import config, data, evaluate, multilabel

    pixels = opened.pixels
    transform = data.eval_transform(pixels.image_size, pixels.crop_pct, pixels.interpolation)
    loader = data.Loader(source, transform, config.Data(**section), seed=None)
    judge = multilabel.evaluate if opened.multilabel else evaluate.evaluate
    result = judge(
        lambda images: opened.logits(images.permute(0, 2, 3, 1)),
        ((batch.images, batch.labels) for batch in loader.epoch()),
        classes=len(opened.classes),
        device=opened.device,
    )
    return result.metrics, result.confusion, len(loader.skipped)


def _evaluate_without_torch(
    opened: Opened, source: Any, section: Any
) -> tuple[dict[str, float], Any, int]:
    """`_evaluate` with top1, top5 and nll alone, and one worker."""
    from ._metrics import evaluate
    from .images import UNREADABLE, DataError, prepare, unreadable

    unread = 0

    def images() -> Iterator[tuple[Any, int]]:
        nonlocal unread
        for i in range(len(source)):
            try:
                pixels, label = source.read(i)
            except UNREADABLE as error:
                if not section["skip_bad"]:
                    raise unreadable(source.name(i), error) from error
                unread += 1
            else:
                yield prepare(pixels, opened.pixels), label
        if unread == len(source):
            raise DataError(f"not one of {unread} images can be read")

    size, classes = section["batch_size"], len(opened.classes)
    metrics, confusion = evaluate(opened.logits, images(), classes=classes, batch_size=size)
    return metrics, confusion, unread


def _config(arguments: list[str] | None, student: str = "") -> Any:
    """Of a recipe or a file, where the first argument names one, and keys that override.

    A student's file says what it is and which images it takes; the run trains it for int8.
    """
    from .distill import config

    overrides = list(arguments or ())
    source = overrides.pop(0) if overrides and "=" not in overrides[0] else None
    if student:
        from . import models

        name, options = models.saved_as(student)
        pixels = models.load(student).pixels
        keys = ("image_size", "crop_pct", "interpolation")
        of_file = [f"data.{key}={getattr(pixels, key)}" for key in keys]
        section = json.dumps({"model": name, "options": options, "checkpoint": student})
        begins = any(x.startswith("int8.aware") and "start" in x for x in overrides)
        start = [] if begins else ["int8.aware.start=0"]
        overrides = [*of_file, *overrides, f"student={section}", *start]
    return config.load(source, overrides)


def _run(config, resume: bool, dry_run: bool = False) -> None:  # type: ignore[no-untyped-def]
    from .distill import report
    from .distill.experiment import distill

    results = distill(config, resume=resume, dry_run=dry_run)
    if dry_run or os.environ.get("RANK", "0") != "0":  # of torchrun's processes the first prints
        return
    print(report.table(results))
    print(results["verdict"])
    print(f"report: {config.run.folder}/report.html")


def _at_home(argument: str) -> str:
    option, equals, value = argument.partition("=")
    if argument.startswith("-") and equals:
        return f"{option}={home(value)}"
    return home(argument)


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"vitkd: warning: {message}", file=sys.stderr)


def main() -> None:
    """Runs the command line; an error becomes one line on stderr and exit code 1."""
    try:
        # the shell leaves ~ alone behind --option=
        sys.argv[1:] = map(_at_home, sys.argv[1:])
        with warnings.catch_warnings():
            warnings.showwarning = _warn  # type: ignore[assignment]
            app()
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        why = next(iter(str(error).splitlines()), "no message")
        if isinstance(error, ModuleNotFoundError):
            why += '; pip install "vitkd-fast[distill]" brings what training needs'
        print(f"vitkd: {type(error).__name__}: {why} (traceback: vitkd --debug)", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 1))


if __name__ == "__main__":
    main()
