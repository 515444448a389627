"""`vitkd export`."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Runtime(str, Enum):
    """For whom an ONNX model is."""

    qdq = "qdq"
    openvino = "openvino"
    qoperator = "qoperator"
    tensorrt = "tensorrt"
    qnn = "qnn"


def export(
    file: Annotated[Path, typer.Argument(help="A file of `vitkd quantize`.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="What to write: *.onnx, *.tflite, *.pte or *.mlpackage.",
        ),
    ],
    exact: Annotated[
        bool, typer.Option("--float", help="In float32, without rounding, of the same weights.")
    ] = False,
    profile: Annotated[
        Runtime,
        typer.Option(
            help="Of *.onnx: Q/DQ for ONNX Runtime, or as OpenVINO, TensorRT or Qualcomm's QNN "
            "take it; ONNX Runtime's own int8 operators."
        ),
    ] = Runtime.qdq,
) -> None:
    """Write an int8 file as another runtime's model, which takes the same uint8 images.

    Example: vitkd export student.int8.safetensors -o student.onnx
    """
    from . import SUFFIXES, write

    if output.suffix not in SUFFIXES or (output.is_dir() and output.suffix != ".mlpackage"):
        raise typer.BadParameter(f"-o: expected a name in {', '.join(SUFFIXES)}, got {output}")
    if profile is not Runtime.qdq and (exact or output.suffix != ".onnx"):
        raise typer.BadParameter(f"--profile {profile.value}: expected -o *.onnx, in int8")
    if not output.parent.is_dir():
        raise typer.BadParameter(f"-o: {output.parent} is no folder")
    write(file, output, exact=exact, profile=profile.value)
    parts = [path for path in (output, *output.rglob("*")) if path.is_file()]
    print(f"{output}: {sum(path.stat().st_size for path in parts) / 1e6:.2f} MB")
