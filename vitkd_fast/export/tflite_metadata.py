"""TensorFlow Lite's metadata: what the tensors are, and the classes' names in a file of their own.

A flatbuffer of metadata_schema.fbs 1.1.0 (tensorflow/tflite-support) in the model's TFLITE_METADATA
buffer; files that it names are a zip archive behind the model, which runtimes do not read.
"""

from __future__ import annotations

import io
import zipfile
from typing import Any

from ..int8.graph import Graph

NAME = "TFLITE_METADATA"
LABELS = "labels.txt"
_IDENTIFIER = b"M001"
# of the schema's tables the fields that are used, by position, and values of its enums and unions
_RGB, _IMAGE, _NORMALIZATION, _AXIS_LABELS = 1, 2, 1, 2


def with_labels(model: bytes, graph: Graph) -> bytes:
    """The model, and behind it an archive with a class's name in each line."""
    if not graph.classes:
        return model
    whole = io.BytesIO(model)
    whole.seek(0, io.SEEK_END)
    with zipfile.ZipFile(whole, "a") as archive:
        # a date of its own would give another file each time
        archive.writestr(zipfile.ZipInfo(LABELS), "\n".join(graph.classes) + "\n")
    return whole.getvalue()


def metadata(graph: Graph, zero_point: int) -> bytes:
    """The flatbuffer, for images whose scale is 1.

    Raises:
        ValueError: a class's name is more than one line.
    """
    import flatbuffers  # type: ignore[import-untyped]

    for name in graph.classes:
        if len(name.splitlines()) > 1:
            raise ValueError(f"export: classes: expected names of one line, got {name!r}")
    b = flatbuffers.Builder(1024)

    def table(**fields: Any) -> int:
        """fields: "_<position>" to an offset, or to a type of a scalar and its value."""
        b.StartObject(8)
        for key, value in fields.items():
            slot = int(key[1:])
            if isinstance(value, tuple):
                kind, number = value
                getattr(b, f"Prepend{kind}Slot")(slot, number, 0)
            else:
                b.PrependUOffsetTRelativeSlot(slot, value, 0)
        return int(b.EndObject())

    def floats(*values: float) -> int:
        b.StartVector(4, len(values), 4)
        for value in reversed(values):
            b.PrependFloat32(value)
        return int(b.EndVector())

    def tables(*offsets: int) -> int:
        b.StartVector(4, len(offsets), 4)
        for offset in reversed(offsets):
            b.PrependUOffsetTRelative(offset)
        return int(b.EndVector())

    text, size = b.CreateString, ("Uint32", graph.image_size)
    properties = table(_0=("Int8", _RGB), _1=table(_0=size, _1=size))
    # quantisation adds the zero point that this takes away: bytes stay what they are
    normalisation = table(_0=floats(float(zero_point)), _1=floats(1.0))
    image = table(
        _0=text("images"),
        _1=text("RGB images, as bytes"),
        _3=table(_0=("Uint8", _IMAGE), _1=properties),
        _4=tables(table(_0=("Uint8", _NORMALIZATION), _1=normalisation)),
        _5=table(_0=floats(255.0), _1=floats(0.0)),
    )
    logits = {"_0": text("logits"), "_1": text("before a softmax, or a sigmoid")}
    if graph.classes:
        labels = table(_0=text(LABELS), _1=text("the classes"), _2=("Int8", _AXIS_LABELS))
        logits["_6"] = tables(labels)
    subgraph = table(_2=tables(image), _3=tables(table(**logits)))
    whole = table(
        _0=text("vitkd_fast"),
        _1=text("A MobileNet in int8"),
        _3=tables(subgraph),
        _7=text("1.0.0"),
    )
    b.Finish(whole, _IDENTIFIER)
    return bytes(b.Output())
