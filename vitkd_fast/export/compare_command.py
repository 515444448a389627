"""`vitkd compare`: what runs and draws is imported when it runs."""

from pathlib import Path
from typing import Annotated

import typer

from ..distill.pack_command import SkipBad


def compare(
    student: Annotated[Path, typer.Argument(help="A file of `vitkd quantize`.")],
    model: Annotated[Path, typer.Argument(help="What `vitkd export` made of it.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of images.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="The card, *.html; its figures go to *.json beside it. "
            "The default is MODEL.card.html.",
        ),
    ] = None,
    runtime: Annotated[
        list[str] | None,
        typer.Option(help="onnxruntime, openvino or litert; the default is all that are there."),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, max=256, help="CPU threads of a call.")] = 1,
    count: Annotated[int, typer.Option(min=1, help="Images, evenly spread over DIR.")] = 500,
    skip_bad: SkipBad = False,
) -> None:
    """Run an int8 file and another runtime's model of it in turns, and write a deployment card.

    Example: vitkd compare student.int8.safetensors student.onnx images/val
    """
    from .._extras import require
    from . import compare_card
    from .compare import compare, verdict

    output = output or model.with_name(f"{model.name}.card.html")
    if output.suffix != ".html" or output.is_dir():
        raise typer.BadParameter(f"-o: expected a name in .html, got {output}")
    if not output.parent.is_dir():
        raise typer.BadParameter(f"-o: {output.parent} is no folder")
    require("compare", "compare: the card", ("jinja2",))
    results = compare(
        student, model, folder, runtimes=runtime, threads=threads, count=count, skip_bad=skip_bad
    )
    data = compare_card.write(results, output)
    print(compare_card.table(results))
    print(verdict(results))
    print(f"{output}, {data}")
