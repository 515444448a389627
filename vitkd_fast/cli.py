"""The command line, `vitkd`. Exit codes: 0 done, 1 failed (one line says why), 2 wrong usage."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Distil vision transformers into MobileNets, and run them in int8.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

MODEL = "A .safetensors file of `vitkd distill`, or the name of a timm model."
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Leave out files that are no pictures, and count them.")
]


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show an error's traceback.")] = False,
) -> None:
    # declared here for the help text; main reads it, which is where errors arrive
    del debug


@app.command()
def distill(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RECIPE|FILE.yaml|KEY=VALUE",
            help="A shipped recipe or a file, and what to change in it.",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in run.folder.")
    ] = False,
    skip_bad: SkipBad = False,
) -> None:
    """Train a student with and without its teacher, compare them, and write a report.

    Example: vitkd distill digits run.folder=runs/first losses.kd.temperature=2

    Own pictures: vitkd distill data.train=pictures/train data.val=pictures/val
    teacher.model=vit_small_patch16_224 teacher.checkpoint=teacher.safetensors
    student.model=mobilenetv4_conv_small losses.kd.temperature=4

    Several GPUs: torchrun --no-python --nproc-per-node=8 vitkd distill imagenet-mobilenetv2
    data.train=imagenet/train data.val=imagenet/val
    """
    from .distill import config

    overrides = list(arguments or ())
    source = overrides.pop(0) if overrides and "=" not in overrides[0] else None
    if skip_bad:
        overrides.append("data.skip_bad=true")
    _run(config.load(source, overrides), resume)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help=MODEL)],
    folder: Annotated[str, typer.Argument(help="A folder with a folder for each class.")],
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    workers: Annotated[int, typer.Option(min=0)] = 2,
    skip_bad: SkipBad = False,
) -> None:
    """Print a model's metrics on a folder of pictures.

    Example: vitkd eval runs/first/distilled-0/best.safetensors pictures/val
    """
    import torch

    from . import models
    from .distill import config, data, evaluate, sources

    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = models.load(model)
    pixels = loaded.pixels
    source, bad = sources.open_folder(folder, models.class_names(loaded), skip_bad)
    transform = data.eval_transform(pixels.image_size, pixels.crop_pct, pixels.interpolation)
    section = config.Data(batch_size=batch_size, workers=workers, skip_bad=skip_bad)
    loader = data.Loader(source, transform, section, seed=None)
    result = evaluate.evaluate(
        models.predictor(loaded.model, pixels).to(device),
        ((batch.images, batch.labels) for batch in loader.epoch()),
        classes=len(loaded.classes),
        device=device,
    )
    print(f"{len(result.labels)} pictures, {len(bad) + len(loader.skipped)} skipped")
    for name, value in result.metrics.items():
        print(f"{name:15} {value:.4f}")


@app.command()
def predict(
    model: Annotated[str, typer.Argument(help=MODEL)],
    images: Annotated[list[Path], typer.Argument(help="Picture files.")],
    top: Annotated[int, typer.Option(min=1, help="Answers per picture.")] = 3,
) -> None:
    """Print the classes a model sees in pictures, and their probabilities.

    Example: vitkd predict runs/first/distilled-0/best.safetensors cat.jpg dog.jpg
    """
    import torch
    from PIL import Image

    from . import models
    from .distill import data, sources

    loaded = models.load(model)
    pixels, names = loaded.pixels, loaded.classes
    transform = data.eval_transform(pixels.image_size, pixels.crop_pct, pixels.interpolation)
    predictor = models.predictor(loaded.model, pixels)
    for file in images:
        try:
            with Image.open(file) as image:
                picture = torch.as_tensor(transform(image.convert("RGB")))
        except sources.UNREADABLE as error:
            raise sources.DataError(f"{file} cannot be read: {error}") from error
        with torch.inference_mode():
            answers = predictor(picture[None]).float().softmax(1)[0].topk(min(top, len(names)))
        pairs = zip(answers.indices.tolist(), answers.values.tolist(), strict=True)
        print(f"{file}: " + ", ".join(f"{names[i]} {100 * p:.1f}%" for i, p in pairs))


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


@app.command()
def show() -> None:
    """Print versions, instruction sets, and the backend that serves each operation.

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


def _run(config, resume: bool) -> None:  # type: ignore[no-untyped-def]
    from .distill import report
    from .distill.experiment import distill

    results = distill(config, resume=resume)
    if os.environ.get("RANK", "0") != "0":  # torchrun's: the first process speaks
        return
    print(report.table(results))
    print(results["verdict"])
    print(f"report: {config.run.folder}/report.html")


def main() -> None:
    """Runs the command line; an error becomes one line on stderr and exit code 1."""
    try:
        app()
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        why = next(iter(str(error).splitlines()), "no message")
        if isinstance(error, ModuleNotFoundError):
            why += '; pip install "vitkd-fast[distill]" brings what training needs'
        print(f"vitkd: {type(error).__name__}: {why} (traceback: vitkd --debug)", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 1))
