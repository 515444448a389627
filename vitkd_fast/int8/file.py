"""A quantised graph as one safetensors file, and the checks that make a file safe to run.

    8 bytes: length of the header | header: JSON, padded to 8 | arrays, aligned, nothing between

Array "3.weight" belongs to node 3. All else is JSON under "vitkd_fast.int8" in the metadata, with
the CRC32 of the arrays. Reading copies no array: they are views of the file's bytes, and what a
header claims is never allocated.
"""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np

from .. import _preprocessing
from .._files import replacing
from .graph import (
    NODES,
    Add,
    Array,
    Classifier,
    Conv,
    Depthwise,
    Graph,
    Node,
    Padding,
    Pool,
    Quantized,
    SqueezeExcite,
    padding_of,
)

_KEY, _VERSION = "vitkd_fast.int8", 1
_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "I32": np.dtype("<i4"),
    "I8": np.dtype("i1"),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_MOST_HEADER, _MOST_NODES, _MOST_IMAGE = 1 << 23, 4096, 8192
_MOST_CHANNELS, _MOST_POOLED, _MOST_MAP = 65536, 1 << 22, 1 << 31
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
_Shape = tuple[int, int, int]  # height, width, channels


class FileError(ValueError):
    """The file, or the graph, is not one that the engine runs; the message says what and where."""


def dump(graph: Graph) -> bytes:
    """The file's bytes; the same graph gives the same bytes.

    Raises:
        FileError: the graph breaks a rule of `validate`.
    """
    validate(graph)
    arrays = {
        f"{index}.{name}": np.ascontiguousarray(getattr(node, name))
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
        raise FileError(f"the header would be {len(text)} bytes; accepted: up to {_MOST_HEADER}")
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
        FileError: names what is wrong and the node.
    """
    validate_preparation(graph)
    _tuple("nodes", graph.nodes)
    if not 1 <= len(graph.nodes) <= _MOST_NODES:
        _fail(f"there are {len(graph.nodes)} nodes; accepted: 1 to {_MOST_NODES}")
    shapes: list[_Shape] = []
    for index, node in enumerate(graph.nodes):
        try:
            shapes.append(_shape(node, index, graph, shapes))
        except FileError as error:
            raise FileError(f"node {index} ({_show(getattr(node, 'name', ''))}): {error}") from None
    if graph.classes and len(graph.classes) != shapes[-1][2]:
        _fail(f"there are {len(graph.classes)} classes and {shapes[-1][2]} logits")


def validate_preparation(graph: Graph) -> None:
    """Checks what prepares an image, and the classes' names: all but the nodes.

    Raises:
        FileError: names what is wrong.
    """
    _integer("image_size", graph.image_size, 1, _MOST_IMAGE)
    for value in _tuple("padding_bytes", graph.padding_bytes, 3):
        _integer("padding_bytes", value, 0, 255)
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
        accepted = ", ".join(_INTERPOLATIONS)
        _fail(f"interpolation is {_show(graph.interpolation)}; accepted: {accepted}")
    for value in _tuple("classes", graph.classes):
        _string("a class", value)


def _keys(node: Node | type[Node]) -> list[str]:
    """The fields that go into the JSON."""
    return [f.name for f in fields(node) if f.name not in node.arrays]


# from bytes to a graph: every step checks the types that it relies on, `validate` the rest


def _parse(data: bytes) -> tuple[dict[str, Any], dict[str, Array]]:
    """The JSON document and the arrays, their offsets and the CRC checked."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 0 < length <= min(_MOST_HEADER, len(data) - 8) or length % 8:
        _fail("this is no safetensors file of an int8 graph: its header's length is wrong")
    header = _object("the header", _json(data[8 : 8 + length]))
    metadata = header.pop("__metadata__", {})
    if isinstance(metadata, dict) and _KEY not in metadata:
        _fail("it is a float model; make an int8 file of it with `vitkd quantize`")
    metadata = _object("__metadata__", metadata, {_KEY})
    if not isinstance(metadata[_KEY], str):
        _fail(f"{_KEY} is no string")
    document = _object(_KEY, _json(metadata[_KEY].encode(errors="surrogatepass")))
    if (version := document.pop("format", None)) != _VERSION or type(version) is not int:
        _fail(f"its format is {_show(version)}; accepted by this version: {_VERSION}")
    section = memoryview(data)[8 + length :]
    if document.pop("crc32", None) != zlib.crc32(section):
        _fail("it is damaged: the CRC32 of its arrays differs")
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
            _fail(f"{what}: dtype is {_show(entry['dtype'])}; accepted: {', '.join(_DTYPES)}")
        dtype = _DTYPES[entry["dtype"]]
        if not isinstance(shape, list) or not 1 <= len(shape) <= 4:
            _fail(f"{what}: shape is {_show(shape)}; accepted: 1 to 4 numbers")
        for size in shape:
            _integer(f"{what}: a size", size, 1, len(section))
        if not isinstance(offsets, list) or len(offsets) != 2:
            _fail(f"{what}: data_offsets is {_show(offsets)}; accepted: two numbers")
        for offset in offsets:
            _integer(f"{what}: an offset", offset, 0, len(section))
        begin, end = offsets
        count = math.prod(shape)
        if end - begin != count * dtype.itemsize or begin % dtype.itemsize:
            _fail(f"{what}: bytes {begin} to {end} do not hold {_show(shape)} of {entry['dtype']}")
        spans.append((begin, end))
        arrays[name] = np.frombuffer(section, dtype, count, begin).reshape(shape)
    spans.sort()
    if [0, *(end for _, end in spans)] != [*(begin for begin, _ in spans), len(section)]:
        _fail("its arrays leave gaps, overlap, or do not end with the file")
    return arrays


def _build(document: dict[str, Any], arrays: dict[str, Array]) -> Graph:
    names = {f.name for f in fields(Graph)}
    values = {k: _tuples(v) for k, v in _object(_KEY, document, names).items() if k != "nodes"}
    if not isinstance(document["nodes"], list) or len(document["nodes"]) > _MOST_NODES:
        _fail(f"nodes is no list of up to {_MOST_NODES}")
    nodes: list[Node] = []
    for index, entry in enumerate(document["nodes"]):
        op = entry.pop("op", None) if isinstance(entry, dict) else None
        if not isinstance(op, str) or op not in NODES:
            _fail(f"node {index}: op is {_show(op)}; accepted: {', '.join(NODES)}")
        cls: Any = NODES[op]
        entry = _object(f"node {index}", entry, set(_keys(cls)))
        if missing := [name for name in cls.arrays if f"{index}.{name}" not in arrays]:
            _fail(f"node {index}: array {index}.{missing[0]} is missing")
        own = {name: arrays.pop(f"{index}.{name}") for name in cls.arrays}
        nodes.append(cls(**{k: _tuples(v) for k, v in entry.items()}, **own))
    if arrays:
        _fail(f"array {_show(next(iter(arrays)))} belongs to no node")
    return Graph(nodes=tuple(nodes), **values)


def _json(text: bytes) -> Any:
    def no_constant(name: str) -> NoReturn:
        _fail(f"its JSON holds {name}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            _fail("its JSON holds a key twice")
        return values

    try:
        return json.loads(text.decode(), parse_constant=no_constant, object_pairs_hook=unique)
    except FileError:
        raise
    except ValueError as error:  # not UTF-8, not JSON, or a number of too many digits
        raise FileError(f"its JSON cannot be read: {error}") from None


def _object(what: str, value: Any, keys: set[str] | None = None) -> dict[str, Any]:
    if not isinstance(value, dict):
        _fail(f"{what} is missing or no JSON object")
    if keys is not None and (wrong := keys ^ value.keys()):
        key = min(wrong)
        _fail(f"{what}: {_show(key)} is {'missing' if key in keys else 'unknown'}")
    return cast("dict[str, Any]", value)


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


# the checks of a graph


def _shape(node: Node, index: int, graph: Graph, shapes: list[_Shape]) -> _Shape:
    """The shape of a node's output, once all in it is checked."""
    _string("name", node.name)
    if NODES.get(getattr(node, "op", "")) is not type(node):
        _fail(f"op is of type {type(node).__name__}; accepted: {', '.join(NODES)}")
    if isinstance(node, Classifier) != (index == len(graph.nodes) - 1):
        _fail("the last node, and no other, is the classifier")
    two = isinstance(node, Add) or getattr(node, "residual_multiplier", None) is not None
    first, *others = _tuple("inputs", node.inputs, 2 if two else 1)
    _integer("an input", first, -1 if isinstance(node, Conv) else 0, index - 1)
    shape = (graph.image_size, graph.image_size, 3) if first == -1 else shapes[first]
    result = _output(node, shape)
    for other in others:
        _integer("an input", other, 0, index - 1)
        if shapes[other] != result:
            _fail(f"its inputs' shapes do not agree: {list(shapes[other])} and {list(result)}")
    if result[0] * result[1] * (result[2] + 15) > _MOST_MAP:
        _fail(f"its map of {list(result)} is larger than {_MOST_MAP} bytes")
    return result


def _output(node: Node, shape: _Shape) -> _Shape:
    height, width, channels = shape
    if isinstance(node, Quantized):
        for name in ("zero_point", "lo", "hi"):
            _integer(name, getattr(node, name), 0, 255)
        if node.lo > node.hi:
            _fail(f"lo is {node.lo} and hi is {node.hi}")
    if isinstance(node, Conv | Depthwise):
        return _convolution(node, shape)
    if isinstance(node, Classifier):
        _array(node, "weight", np.int8, (None, channels))
        if (height, width) != (1, 1):
            _fail(f"its input is a map of {height} x {width}; accepted: 1 x 1")
        _sums(node, node.weight)
        return 1, 1, len(node.weight)
    if isinstance(node, Add):
        for value in _tuple("multipliers", node.multipliers, 2):
            _constant("multipliers", value, single=True)
        return shape
    assert isinstance(node, Pool | SqueezeExcite)
    if height * width > _MOST_POOLED:
        _fail(f"its map is {height} x {width}; accepted: up to {_MOST_POOLED} pixels")
    _constant("ratio", node.ratio, positive=True, single=isinstance(node, SqueezeExcite))
    if isinstance(node, Pool):
        return 1, 1, channels
    _constant("scale", node.scale, positive=True)
    middle = len(node.b1) if isinstance(node.b1, np.ndarray) and node.b1.ndim == 1 else None
    _array(node, "q1", np.int8, (channels, middle))
    _array(node, "q2", np.int8, (middle, channels))
    for name, size in {"s1": middle, "b1": middle, "s2": channels, "b2": channels}.items():
        _array(node, name, np.float32, (size,))
        if not np.all(np.abs(getattr(node, name)) < 2.0**32):
            _fail(f"{name} holds a number that is not finite or not under 2^32")
    if not isinstance(node.hidden_hardswish, bool):
        _fail(f"hidden_hardswish is {_show(node.hidden_hardswish)}; accepted: true or false")
    # nothing may overflow: infinity minus infinity is not the same everywhere
    hidden = np.abs(node.b1) + 256 * node.scale * np.abs(node.w1).sum(0, dtype=np.float64)
    hidden = hidden * 6 if node.hidden_hardswish else hidden
    if np.max(np.abs(node.b2) + hidden @ np.abs(node.w2)) >= 2.0**100:
        _fail("its sums may reach 2^100")
    return shape


def _convolution(node: Conv | Depthwise, shape: _Shape) -> _Shape:
    weight, channels = node.weight, shape[2]
    if isinstance(node, Conv):
        _array(node, "weight", np.int8, (None, None, None, channels))
        kernel = weight.shape[1:3]
    else:
        _array(node, "weight", np.int8, (None, None, channels))
        kernel, weight = weight.shape[:2], weight.reshape(-1, channels).T
    if node.hardswish_scale is not None:
        _constant("hardswish_scale", node.hardswish_scale, positive=True, single=True)
    if isinstance(node, Conv) and node.residual_multiplier is not None:
        _constant("residual_multiplier", node.residual_multiplier, single=True)
        if node.hardswish_scale is not None:
            _fail("residual_multiplier and hardswish_scale are both given")
    if node.padding != "same":
        _tuple("padding", node.padding, 4)
    sizes = []
    for axis, stride in enumerate(_tuple("stride", node.stride, 2)):
        _integer("stride", stride, 1, 8)
        _integer("the kernel's size", kernel[axis], 1, 31)
        if node.padding != "same":
            for side in (node.padding[axis], node.padding[axis + 2]):
                _integer("padding", side, 0, kernel[axis] - 1)
        sizes.append(_size(shape[axis], kernel[axis], stride, node.padding, axis))
    _sums(node, weight)
    return sizes[0], sizes[1], len(weight)


def _size(size: int, kernel: int, stride: int, padding: Padding, axis: int) -> int:
    room = size + sum(padding_of(size, kernel, stride, padding, axis)) - kernel
    if room < 0:
        _fail(f"its map of {size} is smaller than its kernel of {kernel}")
    return room // stride + 1


def _sums(node: Conv | Depthwise | Classifier, weight: Array) -> None:
    """Checks bias, multiplier and weight [channels, ...] so that no sum or value leaves int32."""
    channels = len(weight)
    _integer("the number of output channels", channels, 1, _MOST_CHANNELS)
    _array(node, "bias", np.int32, (channels,))
    _array(node, "multiplier", np.float32, (channels,))
    if weight.min() < -127:
        _fail("weight holds -128; accepted: -127 to 127")
    m = node.multiplier
    hardswish = getattr(node, "hardswish_scale", None)
    if not np.all((m >= np.finfo(np.float32).tiny) & (m < np.inf)):
        _fail("multiplier holds a number that is not normal, finite and positive")
    reach = m.astype(np.float64) * (1.0 if hardswish is None else max(1.0, 6 * hardswish))
    bias = np.abs(node.bias.astype(np.int64))
    # the sum of |w| is needed only where its bound is too large
    most = bias + 255 * 127 * (weight.size // channels)
    if np.all(most < 2**31) and np.all(most * reach < 2**30):
        return
    most = bias + 255 * np.abs(weight).reshape(channels, -1).sum(1, dtype=np.int64)
    for wrong in np.flatnonzero((most >= 2**31) | (most * reach >= 2**30))[:1]:
        _fail(
            f"channel {wrong}: |bias| + 255 sum|w| is {most[wrong]} and the multiplier {m[wrong]}; "
            "accepted: under 2^31, and their product, of a hard-swish 6 hardswish_scale times it, "
            "under 2^30"
        )


def _array(node: Node, name: str, dtype: type, sizes: tuple[int | None, ...]) -> None:
    """Checks type and shape; None: any size."""
    array = getattr(node, name)
    if not isinstance(array, np.ndarray) or array.dtype != dtype:
        given = getattr(array, "dtype", type(array).__name__)
        _fail(f"{name} is of {given}; accepted: {np.dtype(dtype)}")
    agree = len(sizes) == array.ndim and all(
        wanted in (None, size) for wanted, size in zip(sizes, array.shape, strict=True)
    )
    if not agree or array.size == 0:
        wanted = ", ".join("any" if size is None else str(size) for size in sizes)
        _fail(f"{name} is of shape {list(array.shape)}; accepted: [{wanted}]")


def _integer(what: str, value: Any, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        _fail(f"{what} is {_show(value)}; accepted: an integer from {least} to {most}")


def _constant(what: str, value: Any, positive: bool = False, single: bool = False) -> None:
    """Checks a float: under 2^20, and as asked for positive and exact in float32."""
    if not isinstance(value, float) or not abs(value) < 2.0**20 or (positive and value <= 0):
        _fail(f"{what} is {_show(value)}; accepted: a {'positive ' * positive}float under 2^20")
    if single and float(np.float32(value)) != value:
        _fail(f"{what} is {value}, which is no float32")


def _tuple(what: str, value: Any, length: int | None = None) -> tuple[Any, ...]:
    if not isinstance(value, tuple) or (length is not None and len(value) != length):
        _fail(f"{what} is {_show(value)}; accepted: a tuple of {length or 'any length'}")
    return value


def _string(what: str, value: Any) -> None:
    if (
        not isinstance(value, str)
        or len(value) > 1024
        or any("\ud800" <= c <= "\udfff" for c in value)
    ):
        _fail(f"{what} is {_show(value)}; accepted: text of up to 1024 characters")


def _show(value: Any) -> str:
    """Short and printable, whatever it is."""
    if isinstance(value, int) and value.bit_length() > 64:
        return "an integer of more than 64 bits"
    text = value if isinstance(value, str) and value.isprintable() else ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _fail(what: str) -> NoReturn:
    raise FileError(what)
