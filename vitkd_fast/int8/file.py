"""A quantised graph as one safetensors file.

    8 bytes: length of the header | header: JSON, padded to 8 | arrays, aligned, nothing between

Array "3.weight" belongs to node 3. All else is JSON under "vitkd_fast.int8" in the metadata, with
the CRC32 of the arrays. The engine reads and checks files (csrc/int8/reader.cpp), and graphs as the
files that they would be. Reading copies no array: they are views of the file's bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from .. import _int8, _preprocessing
from .._files import replacing
from .graph import NODES, Array, Graph, Node

_KEY, _VERSION = "vitkd_fast.int8", 1
_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "I32": np.dtype("<i4"),
    "I8": np.dtype("i1"),
}
_CODES = {"weight": "I8", "bias": "I32", "q1": "I8", "q2": "I8"}  # of arrays; F32 of all others
_MOST_HEADER = 1 << 23
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


class FileError(ValueError):
    """The file, or the graph, is not one that the engine runs; the message says what and where."""


def dump(graph: Graph) -> bytes:
    """The file's bytes; the same graph gives the same bytes.

    Raises:
        FileError: the graph breaks a rule of `validate`.
    """
    return opened(graph).data


def save(graph: Graph, path: str | Path) -> None:
    """Writes the file; a reader finds all of it or what was there before.

    Raises:
        FileError: as `dump`.
    """
    data = dump(graph)
    with replacing(Path(path)) as beside:
        beside.write_bytes(data)


def fingerprint(graph: Graph) -> str:
    """SHA-256 of the file's bytes, in hex: what exported models name the file that they are of by.

    Raises:
        FileError: as `dump`.
    """
    return hashlib.sha256(dump(graph)).hexdigest()


def opened(source: Graph | bytes | str | Path) -> _int8.File:
    """What the engine makes sessions of.

    Raises:
        FileError: the bytes are not such a file, or the graph breaks a rule of `validate`.
        OSError: the file cannot be read.
    """
    where = ""
    if isinstance(source, Graph):
        data = _encode(source)
    elif isinstance(source, bytes):
        data = source
    else:
        data, where = Path(source).read_bytes(), f"{source}: "
    try:
        return _int8.File(data)
    except _int8.GraphError as error:
        raise FileError(f"{where}{error}") from None


def read(source: str | Path | bytes) -> Graph:
    """The graph of a file, or of its bytes; its arrays are read-only views.

    Raises:
        FileError: the bytes are not such a file, or its graph breaks a rule of `validate`.
        OSError: the file cannot be read.
    """
    data = opened(source).data
    # all of it is checked
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    document = json.loads(header.pop("__metadata__")[_KEY])
    del document["format"], document["crc32"]

    def array(name: str) -> Array:
        entry = header[name]
        begin, shape = end + entry["data_offsets"][0], entry["shape"]
        return np.frombuffer(data, _DTYPES[entry["dtype"]], math.prod(shape), begin).reshape(shape)

    nodes: list[Node] = []
    for index, entry in enumerate(document.pop("nodes")):
        cls: Any = NODES[entry.pop("op")]
        own = {name: array(f"{index}.{name}") for name in cls.arrays}
        nodes.append(cls(**_tuples(entry), **own))
    return Graph(nodes=tuple(nodes), **_tuples(document))


def validate(graph: Graph) -> None:
    """Checks all that the engine relies on: types, ranges, edges, shapes, and every sum's size.

    Per output channel |bias| + 255 sum|w| < 2^31, and that times the multiplier < 2^30.

    Raises:
        FileError: names the node and what is wrong, expected and given.
    """
    opened(graph)


def validate_preparation(graph: Graph) -> None:
    """Checks how images are prepared, and the classes' names.

    Raises:
        FileError: names what is wrong.
    """
    for value in _tuple("mean", graph.mean, 3):
        _constant("mean", value)
    for value in _tuple("std", graph.std, 3):
        _constant("std", value)
    _constant("crop_pct", graph.crop_pct)
    try:
        _preprocessing.check(graph.mean, graph.std, graph.crop_pct)
    except ValueError as error:
        raise FileError(str(error)) from None
    if graph.interpolation not in _INTERPOLATIONS:
        _fail("interpolation", ", ".join(_INTERPOLATIONS), graph.interpolation)
    for value in _tuple("classes", graph.classes):
        _string("classes", value)
    if type(graph.multilabel) is not bool:
        _fail("multilabel", "a bool", graph.multilabel)
    _constant("temperature", graph.temperature)


def _encode(graph: Graph) -> bytes:
    """The file's bytes, once all that they cannot show is checked: types that JSON lacks."""
    validate_preparation(graph)
    arrays: dict[str, tuple[str, Array]] = {}
    nodes: list[dict[str, Any]] = []
    for index, node in enumerate(_tuple("nodes", graph.nodes)):
        where = f"node {index} ({_show(getattr(node, 'name', None))}): "
        if (op := getattr(node, "op", None)) not in tuple(NODES):
            _fail(f"{where}op", ", ".join(NODES), op)
        if type(node) is not NODES[node.op]:
            _fail(f"{where}type", NODES[node.op].__name__, type(node).__name__)
        for name in node.arrays:
            code = _CODES.get(name, "F32")
            array = _array(f"{where}{name}", getattr(node, name), _DTYPES[code])
            arrays[f"{index}.{name}"] = code, array
        values = {f.name: getattr(node, f.name) for f in fields(node) if f.name not in node.arrays}
        if values.get("fine") is False:  # which readers before 0.2 refuse as an unknown key
            del values["fine"]
        for name, value in values.items():
            _plain(f"{where}{name}", value)
        nodes.append({"op": node.op} | values)
    # wide elements first, so that all are aligned
    names = sorted(arrays, key=lambda name: -arrays[name][1].itemsize)
    section = b"".join(arrays[name][1].tobytes() for name in names)
    own = {f.name: getattr(graph, f.name) for f in fields(Graph) if f.name != "nodes"}
    # readers before 0.2 refuse these as unknown keys
    for name, default in (("multilabel", False), ("temperature", 1.0)):
        if own[name] == default:
            del own[name]
    for name, value in own.items():
        _plain(name, value)
    document = {"format": _VERSION, "crc32": zlib.crc32(section), **own, "nodes": nodes}
    header: dict[str, Any] = {"__metadata__": {_KEY: json.dumps(document, allow_nan=False)}}
    end = 0
    for name in names:
        code, array = arrays[name]
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": code, "shape": array.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _MOST_HEADER:
        _fail("header", f"up to {_MOST_HEADER} bytes", len(text))
    return len(text).to_bytes(8, "little") + text + section


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


# checks of single values


def _array(name: str, value: Any, dtype: np.dtype[Any]) -> Array:
    if not isinstance(value, np.ndarray):
        _fail(name, f"an array of {dtype}", type(value).__name__)
    if value.dtype != dtype:
        _fail(name, str(dtype), str(value.dtype))
    if not (value.flags.c_contiguous and value.flags.aligned):
        _fail(name, "a contiguous, aligned array", "one that is not")
    return value


def _plain(name: str, value: Any) -> None:
    """Refuses what would come back from JSON as something else."""
    if isinstance(value, tuple):
        for element in value:
            _plain(name, element)
    elif isinstance(value, float):
        if not math.isfinite(value):
            _fail(name, "a finite float", value)
    elif value is not None and type(value) not in (bool, int, str):
        _fail(name, "numbers, text, None or a tuple of them", value)
    elif isinstance(value, int) and value.bit_length() > 64:
        _fail(name, "an integer of up to 64 bits", value)


def _constant(name: str, value: Any) -> None:
    if not isinstance(value, float) or not math.isfinite(value):
        _fail(name, "a finite float", value)


def _tuple(name: str, value: Any, length: int | None = None) -> tuple[Any, ...]:
    if not isinstance(value, tuple) or (length is not None and len(value) != length):
        _fail(name, f"a tuple of {length or 'any length'}", value)
    return value


def _string(name: str, value: Any) -> None:
    if (
        not isinstance(value, str)
        or len(value) > 1024
        or any("\ud800" <= c <= "\udfff" for c in value)
    ):
        _fail(name, "text of up to 1024 characters", value)


def _show(value: Any) -> str:
    """Short and printable, whatever it is."""
    if isinstance(value, int) and value.bit_length() > 64:
        return "an integer of more than 64 bits"
    text = value if isinstance(value, str) and value.isprintable() else ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _fail(name: str, expected: str, given: Any) -> NoReturn:
    raise FileError(f"{name}: expected {expected}, got {_show(given)}")
