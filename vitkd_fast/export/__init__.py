"""The int8 network as other runtimes' models: our scales and biases, no second calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ..int8 import file
from ..int8.graph import Conv, Graph

SUFFIXES = (".onnx", ".tflite", ".pte", ".mlpackage")
Profile = Literal["qdq", "openvino", "qoperator", "tensorrt", "qnn"]
PROFILES: tuple[Profile, ...] = ("qdq", "openvino", "qoperator", "tensorrt", "qnn")


def write(
    source: Graph | str | Path | bytes,
    path: str | Path,
    *,
    exact: bool = False,
    profile: Profile = "qdq",
) -> None:
    """Writes a graph, or a file of `int8.quantize`, as another runtime's model.

    The model takes uint8 images [N, H, W, 3], not normalised, as the engine does, and gives float32
    logits [N, classes]; ExecuTorch takes one image, Core ML an image, and it gives probabilities
    where classes have names. docs/quickstart/export.md says where runtimes round otherwise.

    Args:
        source: the graph, or the file.
        path: what to write; its suffix names the format: .onnx (ONNX), .tflite (LiteRT), .pte
            (ExecuTorch, for XNNPACK) or .mlpackage (Core ML).
        exact: the same network in float32, without rounding: its weights are those of int8, and
            its maps are cut to the ranges that bytes cover.
        profile: for whom an ONNX model is. "qdq": ONNX Runtime; "openvino": not rounded before a
            hard-swish, which is one kernel with its convolution there; "qoperator": ONNX Runtime,
            with its own int8 operators instead of Q/DQ; "tensorrt": int8 maps without zero points,
            so rounded again; "qnn": Qualcomm's HTP, Q/DQ around every operator.

    Raises:
        ValueError: an unknown suffix or profile; a profile of another format, or with `exact`; a
            graph with fine maps, which no other runtime has.
        ImportError: the format's package is missing; names the extra that brings it.
        FileError: as `int8.load`.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        known = ", ".join(SUFFIXES)
        raise ValueError(f"export: path: expected a name in {known}, got {path}")
    if profile not in PROFILES:
        raise ValueError(f"export: profile: expected {', '.join(PROFILES)}, got {profile!r}")
    if profile != "qdq" and (path.suffix != ".onnx" or exact):
        given = "a network without rounding" if exact else path
        raise ValueError(f"export: profile {profile}: expected int8 in a .onnx file, got {given}")
    graph = source if isinstance(source, Graph) else file.read(source)
    for index, node in enumerate(graph.nodes):
        if isinstance(node, Conv) and node.fine:
            raise ValueError(
                "export: source: expected no fine maps, as quantize(..., portable=True) makes it, "
                f"got one from node {index} ({node.name})"
            )
    if path.suffix == ".onnx":
        from . import onnx

        onnx.write(graph, path, exact, profile)
    elif path.suffix == ".tflite":
        from . import litert

        litert.write(graph, path, exact)
    elif path.suffix == ".pte":
        from . import executorch

        executorch.write(graph, path, exact)
    else:
        from . import coreml

        coreml.write(graph, path, exact)
