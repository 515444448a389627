"""int8 graphs as files: whole round trips, and a FileError for all that is not one."""

import json
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.file_tools import KEY, assert_same, changed, framed, pack, small_graph, unpack
from support.int8_graphs import random_graph
from vitkd_fast import int8
from vitkd_fast.int8.file import FileError, dump, read, save
from vitkd_fast.int8.graph import (
    NODES,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("seed", [None, *range(8)])
def test_round_trip(seed: int | None) -> None:
    graph = small_graph() if seed is None else random_graph(seed)
    assert {node.op for node in graph.nodes} == set(NODES)
    data = dump(graph)
    assert_same(read(data), graph)
    assert dump(read(data)) == data == dump(graph)


def test_a_temperature_changes_no_logit_and_one_of_1_is_not_written() -> None:
    graph = random_graph(0)
    warm = replace(graph, temperature=1.75)
    assert "temperature" not in unpack(dump(graph))[1]
    assert unpack(dump(warm))[1]["temperature"] == 1.75
    assert_same(read(dump(warm)), warm)
    shape = 3, graph.image_size, graph.image_size, 3
    images = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)
    plain, divided = int8.load(graph), int8.load(dump(warm))
    assert (plain.temperature, divided.temperature) == (1.0, 1.75)
    assert np.array_equal(plain(images), divided(images))


def test_safetensors_reads_it(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    graph = small_graph()
    save(graph, tmp_path / "graph.safetensors")
    with safetensors.safe_open(tmp_path / "graph.safetensors", "np") as opened:
        assert json.loads(opened.metadata()[KEY])["format"] == 1
        names = {f"{i}.{name}" for i, node in enumerate(graph.nodes) for name in node.arrays}
        assert set(opened.keys()) == names
        assert np.array_equal(opened.get_tensor("1.weight"), graph.nodes[1].weight)  # type: ignore[attr-defined]


def test_paths(tmp_path: Path) -> None:
    path = tmp_path / "graph.safetensors"
    path.write_text("an older file")
    save(small_graph(), path)
    assert_same(read(path), small_graph())
    assert_same(read(str(path)), small_graph())
    wrong = changed(4, multipliers=(0.1, 0.25))  # 0.1 is no float32
    with pytest.raises(
        FileError, match=r"node 4 \(add\): multipliers: expected a float32, got 0.1"
    ):
        save(wrong, path)
    assert_same(read(path), small_graph())
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none")
    path.write_bytes(b"x" * 100)
    with pytest.raises(FileError, match=r"graph\.safetensors: "):
        read(path)


def test_arrays_are_views() -> None:
    data = dump(random_graph(0))
    whole = np.frombuffer(data, np.uint8)
    for node in read(data).nodes:
        for name in node.arrays:
            array = getattr(node, name)
            assert np.shares_memory(array, whole)
            assert array.flags.aligned and array.flags.c_contiguous and not array.flags.writeable


def test_it_needs_no_torch() -> None:
    code = "import sys, vitkd_fast.int8.file; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_truncated() -> None:
    data = dump(small_graph())
    for length in range(len(data)):
        with pytest.raises(FileError):
            read(data[:length])
    with pytest.raises(FileError):
        read(data + b"\0")


def test_every_flipped_bit_is_noticed_or_harmless() -> None:
    graph = small_graph()
    data = dump(graph)
    begin = 8 + struct.unpack("<Q", data[:8])[0]
    for at in range(len(data)):
        flipped = bytearray(data)
        flipped[at] ^= 1 << at % 8
        if at >= begin:
            with pytest.raises(FileError, match="damaged"):
                read(bytes(flipped))
            continue
        try:  # another name, or a constant that is as good
            read(bytes(flipped))
        except FileError:
            pass


def test_noise() -> None:
    rng = np.random.default_rng(0)
    for length in (0, 1, 7, 8, 9, 16, 100, 1000):
        for _ in range(20):
            with pytest.raises(FileError):
                read(rng.bytes(length))
            with pytest.raises(FileError):
                read(framed(rng.bytes(length)))


def test_other_values_in_every_place() -> None:
    """Whatever stands in a place of the JSON: a graph or a FileError."""
    header, document, section = unpack(dump(small_graph()))
    values = (None, True, -1, 0, 1, 2**70, 1.5, 1e300, "", "x", "\ud800", [], [[]], {}, {"a": 1})

    def places(value: Any) -> list[tuple[Any, Any]]:
        keys = range(len(value)) if isinstance(value, list) else list(value)
        found = [(value, key) for key in keys]
        return found + [
            place
            for key in keys
            if isinstance(value[key], list | dict)
            for place in places(value[key])
        ]

    refused = 0
    for container, key in places(header) + places(document):
        before = container[key]
        for value in values:
            container[key] = value
            try:
                read(pack(header, document, section))
            except FileError:
                refused += 1
        container[key] = before
    assert refused > 1000
    assert_same(read(pack(header, document, section)), small_graph())


def edited(path: str, value: Any) -> Callable[[dict, dict, bytes], bytes]:
    """A change of the document ("nodes.3.lo") or, after "/", of the header."""

    def change(header: dict[str, Any], document: dict[str, Any], section: bytes) -> bytes:
        container: Any = header if path.startswith("/") else document
        *keys, last = path.removeprefix("/").split("|")
        for key in keys:
            container = container[int(key) if isinstance(container, list) else key]
        if value is DELETED:
            del container[last]
        else:
            container[int(last) if isinstance(container, list) else last] = value
        return pack(header, document, section)

    return change


def replaced(old: str, new: str) -> Callable[[dict, dict, bytes], bytes]:
    """A change of the document's text."""
    return lambda header, document, section: pack(
        header, json.dumps(document).replace(old, new), section
    )


DELETED = object()
HOSTILE = {
    "no metadata": (lambda h, d, s: framed(json.dumps(h).encode(), s), "it is a float model"),
    "other metadata": (
        lambda h, d, s: framed(json.dumps({"__metadata__": {"format": "pt"}} | h).encode(), s),
        "it is a float model; make an int8 file of it with `vitkd quantize`",
    ),
    "metadata a list": (
        lambda h, d, s: framed(json.dumps({"__metadata__": []} | h).encode(), s),
        "__metadata__: expected a JSON object",
    ),
    "header is a list": (lambda h, d, s: framed(b"[]"), "the header: expected a JSON object"),
    "header too long": (lambda h, d, s: struct.pack("<Q", 1 << 60) + b"{}      ", "length"),
    "header not UTF-8": (lambda h, d, s: framed(b'{"\xff": 1}'), "cannot be read"),
    "nested deeply": (lambda h, d, s: framed(b"[" * 100_000), "nested too deeply at byte 65"),
    "nested deeply inside": (lambda h, d, s: pack(h, "[" * 100_000, s), "nested too deeply"),
    "NaN": (replaced("0.02", "NaN"), "holds NaN"),
    "Infinity": (replaced("0.02", "-Infinity"), "holds -Infinity"),
    "overflow": (replaced("0.02", "1e999"), "scale: expected a float, got 1e999"),
    "digits": (replaced('"image_size": 4', '"image_size": ' + "9" * 5000), "more than 64 bits"),
    "large number": (edited("image_size", 10**100), "got an integer of more than 64 bits"),
    "key twice": (lambda h, d, s: pack(h, json.dumps(d)[:-1] + ', "nodes": []}', s), "a key twice"),
    "version": (edited("format", 2), "format: expected 1, which this version reads, got 2"),
    "version true": (edited("format", True), "format: expected 1, .* got true"),
    "crc": (edited("crc32", 0), "damaged"),
    "unknown key": (edited("extra", 1), "extra is unknown"),
    "missing key": (edited("mean", DELETED), "mean is missing"),
    "unknown node key": (edited("nodes|0|extra", 1), r"node 0 \(stem\): extra is unknown"),
    "missing node key": (edited("nodes|0|lo", DELETED), r"node 0 \(stem\): lo is missing"),
    "op": (edited("nodes|0|op", "exec"), r"node 0 \(stem\): op: expected conv, .*, got exec"),
    "op no string": (edited("nodes|0|op", ["conv"]), r"op: expected conv, .*, got \[\"conv\"\]"),
    "nodes no list": (edited("nodes", {}), "nodes: expected a list"),
    "too many nodes": (
        lambda h, d, s: pack({}, d | {"nodes": [d["nodes"][4]] * 5000, "crc32": 0}, b""),
        "nodes: expected 1 to 4096, got 5000",
    ),
    "surrogate": (edited("nodes|0|name", "a\ud800"), "name: expected text of"),
    "int8 as int32": (
        edited("/0.weight|dtype", "I32"),
        r"array 0.weight: data_offsets: expected .* of I32",
    ),
    "float64": (edited("/0.weight|dtype", "F64"), "dtype: expected F32, I32, I8, got F64"),
    "large shape": (edited("/0.weight|shape", [1 << 40, 1 << 40]), "shape: .*an integer from 0 to"),
    "shape of many": (edited("/0.weight|shape", [1] * 5), "shape: expected 1 to 4 numbers"),
    "empty shape": (edited("/0.weight|shape", []), "shape: expected 1 to 4 numbers"),
    "negative size": (edited("/0.weight|shape", [-1, -54]), "shape: expected an integer .* got -1"),
    "bool size": (edited("/7.bias|shape", [True]), "shape: expected an integer .* got true"),
    "offset": (
        edited("/0.weight|data_offsets", [0, 1 << 50]),
        "data_offsets: expected an integer from 0 to",
    ),
    "three offsets": (edited("/0.weight|data_offsets", [0, 1, 2]), "data_offsets: .*two numbers"),
    "overlap": (edited("/7.bias|data_offsets", [0, 8]), "leave gaps, overlap"),
    "missing array": (edited("/0.weight", DELETED), "leave gaps"),
    "other array": (
        lambda h, d, s: pack({("8.bias" if k == "7.bias" else k): v for k, v in h.items()}, d, s),
        "array 7.bias is missing",
    ),
    "surplus array": (
        lambda h, d, s: pack(h, d | {"nodes": d["nodes"][:-1]}, s),
        "array 7.bias belongs to no node",
    ),
    "unknown array key": (edited("/0.weight|x", 1), "array 0.weight: x is unknown"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), HOSTILE.values(), ids=HOSTILE)
def test_hostile(change: Callable[..., bytes], message: str) -> None:
    with pytest.raises(FileError, match=message):
        read(change(*unpack(dump(small_graph()))))


def test_what_a_header_claims_is_not_allocated() -> None:
    header, document, section = unpack(dump(random_graph(0, channels=(96,))))
    name = max(header, key=lambda n: header[n]["data_offsets"][1] - header[n]["data_offsets"][0])
    header[name]["shape"] = [1 << 20, 1 << 20]
    data = pack(header, document, section)
    tracemalloc.start()
    with pytest.raises(FileError):
        read(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < len(data) + 1_000_000


def test_the_crc_is_that_of_the_arrays() -> None:
    _, document, section = unpack(dump(small_graph()))
    assert document["crc32"] == zlib.crc32(section)
