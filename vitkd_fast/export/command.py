"""`vitkd export`."""

from pathlib import Path
from typing import Annotated

import typer


def export(
    file: Annotated[Path, typer.Argument(help="A file of `vitkd quantize`.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="What to write: *.onnx.")
    ],
    exact: Annotated[
        bool, typer.Option("--float", help="In float32, without rounding, of the same weights.")
    ] = False,
) -> None:
    """Write an int8 file as another runtime's model, which takes the same uint8 images.

    Example: vitkd export student.int8.safetensors -o student.onnx
    """
    from . import SUFFIXES, write

    if output.suffix not in SUFFIXES or output.is_dir():
        raise typer.BadParameter(f"-o: expected a name in {', '.join(SUFFIXES)}, got {output}")
    if not output.parent.is_dir():
        raise typer.BadParameter(f"-o: {output.parent} is no folder")
    write(file, output, exact=exact)
    print(f"{output}: {output.stat().st_size / 1e6:.2f} MB")
