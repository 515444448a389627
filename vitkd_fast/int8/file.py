"""A quantised graph as one safetensors file.

    8 bytes: length of the header | header: JSON, padded to 8 | arrays, aligned, nothing between

Array "3.weight" belongs to node 3. All else is JSON under "vitkd_fast.int8" in the metadata, with
the CRC32 of the arrays. Reading copies no array: they are views of the file's bytes, and what a
header claims is never allocated. What is checked here is the file and how images are prepared; the
engine checks the graph (csrc/int8/graph.cpp).
"""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, cast

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
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_MOST_HEADER = 1 << 23
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


class FileError(ValueError):
    """The file, or the graph, is not one that the engine runs; the message says what and where."""


def dump(graph: Graph) -> bytes:
    """The file's bytes; the same graph gives the same bytes.

    Raises:
        FileError: the graph breaks a rule of `validate`.
    """
    validate(graph)
    arrays = {
        f"{index}.{name}": getattr(node, name)
        for index, node in enumerate(graph.nodes)
        for name in node.arrays
    }
    # wide elements first, so that all are aligned
    names = sorted(arrays, key=lambda name: -arrays[name].itemsize)
    section = b"".join(arrays[name].tobytes() for name in names)
    document = {
        "format": _VERSION,
        "crc32": zlib.crc32(section),
        **{f.name: getattr(graph, f.name) for f in fields(Graph) if f.name != "nodes"},
        "nodes": [
            {"op": node.op} | {k: getattr(node, k) for k in _keys(node)} for node in graph.nodes
        ],
    }
    header: dict[str, Any] = {"__metadata__": {_KEY: json.dumps(document, allow_nan=False)}}
    end = 0
    for name in names:
        array = arrays[name]
        begin, end = end, end + array.nbytes
        code = _CODES[array.dtype]
        header[name] = {"dtype": code, "shape": array.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _MOST_HEADER:
        _fail("header", f"up to {_MOST_HEADER} bytes", len(text))
    return len(text).to_bytes(8, "little") + text + section


def save(graph: Graph, path: str | Path) -> None:
    """Writes the file; a reader finds all of it or what was there before.

    Raises:
        FileError: as `dump`.
    """
    data = dump(graph)
    with replacing(Path(path)) as beside:
        beside.write_bytes(data)


def read(source: str | Path | bytes) -> Graph:
    """The graph of a file, or of its bytes; its arrays are read-only views.

    Raises:
        FileError: the bytes are not such a file, or its graph breaks a rule of `validate`.
        OSError: the file cannot be read.
    """
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    try:
        # RecursionError: JSON nested too deeply
        document, arrays = _parse(data)
        graph = _build(document, arrays)
        validate(graph)
    except (FileError, RecursionError) as error:
        where = "" if isinstance(source, bytes) else f"{source}: "
        raise FileError(f"{where}{error}") from None
    return graph


def validate(graph: Graph) -> None:
    """Checks all that the engine relies on: types, ranges, edges, shapes, and every sum's size.

    Per output channel |bias| + 255 sum|w| < 2^31, and that times the multiplier < 2^30.

    Raises:
        FileError: names the node and what is wrong, expected and given.
    """
    validate_preparation(graph)
    try:
        logits = _int8.check(graph)
    except _int8.GraphError as error:
        raise FileError(str(error)) from None
    for index, node in enumerate(graph.nodes):
        if type(node) is not NODES[node.op]:
            _fail(f"node {index}: type", NODES[node.op].__name__, type(node).__name__)
    if graph.classes and len(graph.classes) != logits:
        _fail("classes", f"one for each of {logits} logits", len(graph.classes))


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


def _keys(node: Node | type[Node]) -> list[str]:
    """The fields that go into the JSON."""
    return [f.name for f in fields(node) if f.name not in node.arrays]


# from bytes to a graph: every step checks the types that it relies on, `validate` the rest


def _parse(data: bytes) -> tuple[dict[str, Any], dict[str, Array]]:
    """The JSON document and the arrays, their offsets and the CRC checked."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 0 < length <= min(_MOST_HEADER, len(data) - 8) or length % 8:
        raise FileError(
            "this is no safetensors file of an int8 graph: its header's length is wrong"
        )
    header = _object("the header", _json(data[8 : 8 + length]))
    metadata = header.pop("__metadata__", {})
    if isinstance(metadata, dict) and _KEY not in metadata:
        raise FileError("it is a float model; make an int8 file of it with `vitkd quantize`")
    metadata = _object("__metadata__", metadata, {_KEY})
    if not isinstance(metadata[_KEY], str):
        _fail(_KEY, "a string", metadata[_KEY])
    document = _object(_KEY, _json(metadata[_KEY].encode(errors="surrogatepass")))
    if (version := document.pop("format", None)) != _VERSION or type(version) is not int:
        _fail("format", f"{_VERSION}, which this version reads", version)
    section = memoryview(data)[8 + length :]
    if document.pop("crc32", None) != zlib.crc32(section):
        raise FileError("it is damaged: the CRC32 of its arrays differs")
    return document, _arrays(header, section)


def _arrays(header: dict[str, Any], section: memoryview) -> dict[str, Array]:
    """The header's arrays, which must tile the section."""
    spans: list[tuple[int, int]] = []
    arrays: dict[str, Array] = {}
    for name, entry in header.items():
        what = f"array {_show(name)}"
        entry = _object(what, entry, {"dtype", "shape", "data_offsets"})
        shape, offsets = entry["shape"], entry["data_offsets"]
        if not isinstance(entry["dtype"], str) or entry["dtype"] not in _DTYPES:
            _fail(f"{what}: dtype", ", ".join(_DTYPES), entry["dtype"])
        dtype = _DTYPES[entry["dtype"]]
        if not isinstance(shape, list) or not 1 <= len(shape) <= 4:
            _fail(f"{what}: shape", "1 to 4 numbers", shape)
        for size in shape:
            _integer(f"{what}: shape", size, 1, len(section))
        if not isinstance(offsets, list) or len(offsets) != 2:
            _fail(f"{what}: data_offsets", "two numbers", offsets)
        for offset in offsets:
            _integer(f"{what}: data_offsets", offset, 0, len(section))
        begin, end = offsets
        count = math.prod(shape)
        if end - begin != count * dtype.itemsize or begin % dtype.itemsize:
            _fail(f"{what}: data_offsets", f"{_show(shape)} of {entry['dtype']}, aligned", offsets)
        spans.append((begin, end))
        arrays[name] = np.frombuffer(section, dtype, count, begin).reshape(shape)
    spans.sort()
    if [0, *(end for _, end in spans)] != [*(begin for begin, _ in spans), len(section)]:
        raise FileError("its arrays leave gaps, overlap, or do not end with the file")
    return arrays


def _build(document: dict[str, Any], arrays: dict[str, Array]) -> Graph:
    names = {f.name for f in fields(Graph)}
    values = {k: _tuples(v) for k, v in _object(_KEY, document, names).items() if k != "nodes"}
    if not isinstance(document["nodes"], list):
        _fail("nodes", "a list", document["nodes"])
    nodes: list[Node] = []
    for index, entry in enumerate(document["nodes"]):
        op = entry.pop("op", None) if isinstance(entry, dict) else None
        if not isinstance(op, str) or op not in NODES:
            _fail(f"node {index}: op", ", ".join(NODES), op)
        cls: Any = NODES[op]
        entry = _object(f"node {index}", entry, set(_keys(cls)))
        if missing := [name for name in cls.arrays if f"{index}.{name}" not in arrays]:
            raise FileError(f"node {index}: array {index}.{missing[0]} is missing")
        own = {name: arrays.pop(f"{index}.{name}") for name in cls.arrays}
        nodes.append(cls(**{k: _tuples(v) for k, v in entry.items()}, **own))
    if arrays:
        raise FileError(f"array {_show(next(iter(arrays)))} belongs to no node")
    return Graph(nodes=tuple(nodes), **values)


def _json(text: bytes) -> Any:
    def no_constant(name: str) -> NoReturn:
        raise FileError(f"its JSON holds {name}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            raise FileError("its JSON holds a key twice")
        return values

    try:
        return json.loads(text.decode(), parse_constant=no_constant, object_pairs_hook=unique)
    except FileError:
        raise
    except ValueError as error:  # not UTF-8, not JSON, or a number of too many digits
        raise FileError(f"its JSON cannot be read: {error}") from None


def _object(what: str, value: Any, keys: set[str] | None = None) -> dict[str, Any]:
    if not isinstance(value, dict):
        _fail(what, "a JSON object", value)
    if keys is not None and (wrong := keys ^ value.keys()):
        key = min(wrong)
        raise FileError(f"{what}: {_show(key)} is {'missing' if key in keys else 'unknown'}")
    return cast("dict[str, Any]", value)


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


# checks of single values


def _integer(name: str, value: Any, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        _fail(name, f"an integer from {least} to {most}", value)


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
