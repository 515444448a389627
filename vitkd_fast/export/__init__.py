"""The int8 network as other runtimes' models: our scales and biases, no second calibration."""

from __future__ import annotations

from pathlib import Path

from ..int8 import file
from ..int8.graph import Conv, Graph

SUFFIXES = (".onnx", ".tflite")


def write(source: Graph | str | Path | bytes, path: str | Path, *, exact: bool = False) -> None:
    """Writes a graph, or a file of `int8.quantize`, as another runtime's model.

    The model takes uint8 images [N, H, W, 3], not normalised, as the engine does, and gives float32
    logits [N, classes]. docs/quickstart/export.md says where runtimes round otherwise.

    Args:
        source: the graph, or the file.
        path: what to write; its suffix names the format: .onnx or .tflite.
        exact: the same network in float32, without rounding: its weights are those of int8, and
            its maps are cut to the ranges that bytes cover.

    Raises:
        ValueError: an unknown suffix; a graph with fine maps, which no other runtime has.
        ImportError: the format's package is missing; names the extra that brings it.
        FileError: as `int8.load`.
    """
    graph = source if isinstance(source, Graph) else file.read(source)
    for index, node in enumerate(graph.nodes):
        if isinstance(node, Conv) and node.fine:
            raise ValueError(
                "export: source: expected no fine maps, as quantize(..., portable=True) makes it, "
                f"got one from node {index} ({node.name})"
            )
    path = Path(path)
    if path.suffix not in SUFFIXES:
        known = ", ".join(SUFFIXES)
        raise ValueError(f"export: path: expected a name in {known}, got {path}")
    if path.suffix == ".onnx":
        from .onnx import write as writer
    else:
        from .litert import write as writer
    writer(graph, path, exact)
