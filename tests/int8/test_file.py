"""int8 graphs as files: whole round trips, and a FileError for all that is not one."""

import json
import re
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.int8_graphs import random_graph
from vitkd_fast import int8
from vitkd_fast.int8.file import FileError, dump, read, save
from vitkd_fast.int8.graph import (
    NODES,
    Add,
    Classifier,
    Conv,
    Depthwise,
    Graph,
    Node,
    Pool,
    SqueezeExcite,
)

pytestmark = pytest.mark.usefixtures("one_thread")

KEY = "vitkd_fast.int8"


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def small_graph() -> Graph:
    """One node of every operation on a 4x4 image; two channels."""
    rng = np.random.default_rng(0)
    s8 = lambda *shape: rng.integers(-127, 128, shape).astype(np.int8)  # noqa: E731
    sums: Any = {"bias": np.array([5, -7], np.int32), "multiplier": f32(0.01, 0.02)}
    nodes = (
        Conv(name="stem", inputs=(-1,), weight=s8(2, 3, 3, 3), padding="same", **sums),
        Depthwise(name="dw", inputs=(0,), weight=s8(3, 3, 2), padding=(1, 1, 1, 1), **sums),
        SqueezeExcite(
            name="se",
            inputs=(1,),
            q1=s8(2, 1),
            s1=f32(0.1),
            b1=f32(0.3),
            q2=s8(1, 2),
            s2=f32(0.4, 0.5),
            b2=f32(0.6, 0.7),
            scale=0.02,
            ratio=1.5,
        ),
        Conv(
            name="project",
            inputs=(2, 0),
            weight=s8(2, 1, 1, 2),
            residual_multiplier=0.5,
            zero_point=3,
            lo=3,
            hi=200,
            **sums,
        ),
        Add(name="add", inputs=(3, 1), multipliers=(0.5, 0.25)),
        Pool(name="pool", inputs=(4,), ratio=1.1),
        Conv(
            name="head",
            inputs=(5,),
            weight=s8(2, 1, 1, 2),
            hardswish_scale=2.0,
            zero_point=5,
            **sums,
        ),
        Classifier(name="fc", inputs=(6,), weight=s8(2, 2), **sums),
    )
    return Graph(
        nodes=nodes,
        image_size=4,
        padding_bytes=(124, 116, 104),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        classes=("cat", "dög"),
    )


def changed(index: int, **values: Any) -> Graph:
    """The small graph with fields of a node replaced."""
    graph = small_graph()
    nodes = list(graph.nodes)
    nodes[index] = replace(nodes[index], **values)
    return replace(graph, nodes=tuple(nodes))


def unpack(data: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """Header, document and section."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    document = json.loads(header.pop("__metadata__")[KEY])
    return header, document, data[8 + length :]


def pack(header: dict[str, Any], document: Any, section: bytes) -> bytes:
    text = document if isinstance(document, str) else json.dumps(document)
    return framed(json.dumps({"__metadata__": {KEY: text}} | header).encode(), section)


def framed(text: bytes, section: bytes = b"") -> bytes:
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + section


def assert_same(a: Graph, b: Graph) -> None:
    assert replace(a, nodes=()) == replace(b, nodes=())
    assert len(a.nodes) == len(b.nodes)
    for left, right in zip(a.nodes, b.nodes, strict=True):
        assert type(left) is type(right)
        for field in fields(left):
            mine, other = getattr(left, field.name), getattr(right, field.name)
            if field.name in left.arrays:
                assert mine.dtype == other.dtype and np.array_equal(mine, other), field.name
            else:
                assert mine == other and type(mine) is type(other), field.name


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


class OtherPool(Pool):
    """Whoever reads the file would make a Pool of it."""


SUMS: dict[str, Any] = {"bias": np.array([0, 0], np.int32), "multiplier": f32(1, 1)}
FIELDS: dict[str, tuple[Callable[[], Graph], str]] = {
    "image_size": (lambda: replace(small_graph(), image_size=0), "image_size: .*1 to 8192, got 0"),
    "image_size bool": (
        lambda: replace(small_graph(), image_size=True),
        "image_size: expected an integer, got true",
    ),
    "image_size large": (
        lambda: replace(small_graph(), image_size=8193),
        "expected 1 to 8192, got 8193",
    ),
    "padding_bytes": (
        lambda: replace(small_graph(), padding_bytes=(0, 0, 256)),
        "expected 0 to 255, got 256",
    ),
    "padding_bytes two": (lambda: replace(small_graph(), padding_bytes=(0, 0)), "a list of 3"),
    "mean": (
        lambda: replace(small_graph(), mean=(0.5, 0.5, float("nan"))),
        "mean: expected a finite float, got nan",
    ),
    "mean int": (
        lambda: replace(small_graph(), mean=(0, 0.5, 0.5)),
        "mean: expected a finite float, got 0",
    ),
    "std": (lambda: replace(small_graph(), std=(1.0, 1.0, 0.0)), r"std: .*, got \(1.0, 1.0, 0.0\)"),
    "mean in 0..255": (
        lambda: replace(small_graph(), mean=(127.5, 127.5, 127.5)),
        "mean: .*divide by 255 what is for",
    ),
    "mean negative": (lambda: replace(small_graph(), mean=(-0.5, 0.5, 0.5)), r"mean: .*\[0, 1\]"),
    "std in 0..255": (
        lambda: replace(small_graph(), std=(58.4, 57.1, 57.4)),
        "std: .*divide by 255 what is for",
    ),
    "crop_pct in percent": (
        lambda: replace(small_graph(), crop_pct=87.5),
        "crop_pct: expected 0.1 to 2, got 87.5; divide a percentage by 100",
    ),
    "crop_pct tiny": (lambda: replace(small_graph(), crop_pct=1e-9), "crop_pct: .*, got 1e-09"),
    "crop_pct": (lambda: replace(small_graph(), crop_pct=-1.0), "crop_pct: .*, got -1.0"),
    "interpolation": (
        lambda: replace(small_graph(), interpolation="cubic"),
        "interpolation: expected nearest",
    ),
    "classes": (
        lambda: replace(small_graph(), classes=("a",)),
        "classes: expected one for each of 2 logits, got 1",
    ),
    "class": (lambda: replace(small_graph(), classes=("a", 1)), "classes: expected text .* got 1"),
    "long class": (lambda: replace(small_graph(), classes=("a", "b" * 2000)), "1024 characters"),
    "temperature": (
        lambda: replace(small_graph(), temperature=0.0),
        "temperature: expected 0.01 to 100, got 0.0",
    ),
    "temperature large": (
        lambda: replace(small_graph(), temperature=101.0),
        "temperature: expected 0.01 to 100, got 101.0",
    ),
    "temperature int": (
        lambda: replace(small_graph(), temperature=2),
        "temperature: expected a finite float, got 2",
    ),
    "no nodes": (lambda: replace(small_graph(), nodes=()), "nodes: expected 1 to 4096, got 0"),
    "no classifier": (
        lambda: replace(small_graph(), nodes=small_graph().nodes[:-1]),
        r"node 6 \(head\): op: expected classifier for the last node, and no other, got conv",
    ),
    "a plain node": (
        lambda: replace(small_graph(), nodes=(Node(name="x", inputs=(-1,)),)),
        r"node 0 \(x\): op: expected conv, .*, got None",
    ),
    "name": (lambda: changed(0, name=None), "node 0: name: expected text .*, got null"),
    "inputs": (lambda: changed(3, inputs=(2,)), r"node 3 \(project\): inputs: expected 2, got 1"),
    "later input": (lambda: changed(1, inputs=(1,)), r"inputs: .*earlier nodes, got 1"),
    "not contiguous": (
        lambda: changed(7, weight=np.ones((2, 2), np.int8).T[::-1]),
        "weight: expected a contiguous, aligned array",
    ),
    "a class of another's": (
        lambda: replace(small_graph(), nodes=(
            *small_graph().nodes[:5], OtherPool(name="pool", inputs=(4,), ratio=1.1),
            *small_graph().nodes[6:])),
        r"node 5 \(pool\): type: expected Pool, got OtherPool",
    ),
    "image": (lambda: changed(5, inputs=(-1,)), r"inputs: .*earlier nodes, got -1"),
    "image as residual": (lambda: changed(3, inputs=(2, -1)), "inputs: .*earlier nodes, got -1"),
    "input bool": (lambda: changed(1, inputs=(False,)), "inputs: expected an integer, got false"),
    "zero_point": (lambda: changed(0, zero_point=256), "zero_point: expected 0 to 255, got 256"),
    "zero_point bool": (lambda: changed(0, zero_point=True), "zero_point: .* integer, got true"),
    "lo": (lambda: changed(0, lo=201, hi=200), "lo: expected 0 to 200, got 201"),
    "hi": (lambda: changed(0, hi=-1), "hi: expected 0 to 255, got -1"),
    "stride": (lambda: changed(0, stride=(1, 9)), "stride: expected 1 to 8, got 9"),
    "stride one": (lambda: changed(0, stride=(1,)), "stride: expected a list of 2, got"),
    "padding": (lambda: changed(1, padding=(0, 3, 0, 0)), "padding: expected 0 to 2, got 3"),
    "padding word": (
        lambda: changed(1, padding="valid"),
        'padding: expected "same" or a list of 4, got valid',
    ),
    "kernel": (
        lambda: changed(0, weight=np.ones((2, 32, 1, 3), np.int8)),
        "kernel size: expected 1 to 31, got 32",
    ),
    "kernel over map": (
        lambda: changed(0, weight=np.ones((2, 7, 7, 3), np.int8), padding=(1, 1, 1, 1)),
        "kernel size: expected up to the padded input's size, 6, got 7",
    ),
    "weight dtype": (
        lambda: changed(0, weight=np.ones((2, 3, 3, 3), np.uint8)),
        "weight: expected int8, got uint8",
    ),
    "weight rank": (
        lambda: changed(0, weight=np.ones((2, 3, 3), np.int8)),
        r"weight: expected \[any, any, any, 3\], got \[2, 3, 3\]",
    ),
    "weight channels": (
        lambda: changed(0, weight=np.ones((2, 3, 3, 4), np.int8)),
        r"expected \[any, any, any, 3\], got \[2, 3, 3, 4\]",
    ),
    "no channels": (
        lambda: changed(0, weight=np.ones((0, 3, 3, 3), np.int8)),
        "output channels: expected 1 to 65536, got 0",
    ),
    "many channels": (
        lambda: changed(0, weight=np.ones((65537, 1, 1, 3), np.int8)),
        "output channels: expected 1 to 65536, got 65537",
    ),
    "no array": (lambda: changed(0, weight=None), "weight: .* int8, got NoneType"),
    "-128": (
        lambda: changed(7, weight=np.full((2, 2), -128, np.int8)),
        r"node 7 \(fc\): weight: expected -127 to 127, got -128 in channel 0",
    ),
    "bias length": (lambda: changed(0, bias=np.zeros(3, np.int32)), r"bias: .*\[2\], got \[3\]"),
    "bias dtype": (lambda: changed(0, bias=np.zeros(2, np.int64)), "bias: .*int32, got int64"),
    "bias large": (
        lambda: changed(7, bias=np.array([0, -(2**31)], np.int32)),
        r"bias: expected \|bias\| \+ 255 sum\|weight\| under 2\^31, got .* in channel 1",
    ),
    "multiplier dtype": (
        lambda: changed(0, multiplier=np.ones(2)),
        "multiplier: expected float32, got float64",
    ),
    "multiplier large": (
        lambda: changed(7, multiplier=f32(1, 2**20)),
        "multiplier: expected .* under 2\\^30, got .* in channel 1",
    ),
    **{
        f"multiplier {v}": (lambda v=v: changed(0, multiplier=f32(1, v)), "normal, .* in channel 1")
        for v in (0, -1, 1e-40, float("nan"), float("inf"))
    },
    "hardswish_scale": (
        lambda: changed(6, hardswish_scale=0.0),
        "hardswish_scale: expected a positive .* got 0",
    ),
    "hardswish_scale double": (
        lambda: changed(6, hardswish_scale=0.1),
        "hardswish_scale: expected a float32, got 0.1",
    ),
    "hardswish and residual": (
        lambda: changed(3, hardswish_scale=1.0),
        "residual_multiplier: expected no hardswish_scale beside it, got both",
    ),
    "residual_multiplier": (
        lambda: changed(3, residual_multiplier=2.0**20),
        "under 2\\^20, got 1048576",
    ),
    "fine": (lambda: changed(3, fine=1), "fine: expected true or false, got 1"),
    "fine and hardswish": (
        lambda: changed(6, fine=True), "fine: expected no hardswish_scale beside it, got both",
    ),
    "fine's readers": (
        lambda: changed(0, fine=True), r"weight: expected \[.*4\], got \[.*2\]",
    ),
    "residual's shape": (
        lambda: changed(3, weight=np.ones((1, 1, 1, 2), np.int8), bias=SUMS["bias"][:1],
                        multiplier=SUMS["multiplier"][:1]),
        r"inputs: expected two of one shape, got \[4, 4, 2\] and \[4, 4, 1\]",
    ),
    "add's shape": (lambda: changed(1, stride=(2, 2)), "inputs: expected two of one shape"),
    "multipliers": (
        lambda: changed(4, multipliers=(0.5, float("inf"))),
        "multipliers: expected .* got inf",
    ),
    "one multiplier": (lambda: changed(4, multipliers=(0.5,)), "multipliers: .*a list of 2, got"),
    "q1's shape": (
        lambda: changed(2, q1=np.ones((1, 2), np.int8)), r"q1: expected \[2, 1\], got \[1, 2\]",
    ),
    "hidden_hardswish": (
        lambda: changed(2, hidden_hardswish=1),
        "hidden_hardswish: expected true or false, got 1",
    ),
    "b1's rank": (lambda: changed(2, b1=f32(1)[None]), r"b1: expected \[any\], got \[1, 1\]"),
    "s2 not finite": (lambda: changed(2, s2=f32(np.nan, 1)), "s2: expected finite .* got nan"),
    "b2 large": (
        lambda: changed(2, b2=f32(1, 2**32)),
        "b2: expected finite numbers under 2\\^32, got 4.29",
    ),
    "squeeze-excite's sums": (
        lambda: changed(2, q1=np.full((2, 1), 127, np.int8), s1=f32(2**31), s2=f32(2**31, 1),
                        q2=np.full((1, 2), 127, np.int8), scale=2.0**19),
        r"sums under 2\^100",
    ),
    "scale": (lambda: changed(2, scale=-1.0), "scale: expected a positive .* got -1"),
    "ratio": (lambda: changed(2, ratio=0.0), "ratio: expected a positive .* got 0"),
    "ratio double": (lambda: changed(2, ratio=0.1), "ratio: expected a float32, got 0.1"),
    "pool's ratio": (lambda: changed(5, ratio=1), "ratio: expected a float, got 1"),
    "classifier's map": (lambda: changed(7, inputs=(4,)), r"input: .*1 pixel, got \[4, 4, 2\]"),
    "long rows": (
        lambda: replace(small_graph(), image_size=8192, nodes=(
            replace(small_graph().nodes[0], stride=(8, 1)),  # type: ignore[call-arg]
            *(Depthwise(name="dw", inputs=(i,), weight=np.ones((1, 1, 2), np.int8), **SUMS)
              for i in range(500)), *small_graph().nodes[5:])),
        r"node \d+ \(dw\): input: expected rows of up to 67108864 bytes in all, got 67\d{6}",
    ),
    "large pool": (
        lambda: replace(small_graph(), image_size=8192),
        "expected up to 2147483648 bytes|expected 1 to 4194304, got 67108864",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), FIELDS.values(), ids=FIELDS)
def test_rules(make: Callable[[], Graph], message: str) -> None:
    with pytest.raises(FileError, match=message) as error:
        dump(make())
    assert re.search(r": expected .+, got .|; accepted: ", str(error.value))


@pytest.mark.parametrize(("key", "value"), [("lo", 300), ("name", 3), ("stride", [0, 1])])
def test_rules_hold_for_files_too(key: str, value: Any) -> None:
    header, document, section = unpack(dump(small_graph()))
    document["nodes"][1][key] = value
    with pytest.raises(FileError, match=f"node 1.*: {key}: expected"):
        read(pack(header, document, section))


def test_sums_at_the_limit() -> None:
    """2^31 - 1 is accepted, 2^31 is not; 2^30 as a float neither."""
    weight = np.array([[127, -127], [0, 0]], np.int8)
    room = 2**31 - 1 - 255 * 254
    fit = changed(
        7, weight=weight, bias=np.array([-room, 2**30], np.int32), multiplier=f32(0.25, 0.5)
    )
    assert_same(read(dump(fit)), fit)
    for bias, multiplier in (([-room - 1, 0], (0.25, 1)), ([0, 2**30], (1, 1))):
        wrong = changed(
            7, weight=weight, bias=np.array(bias, np.int32), multiplier=f32(*multiplier)
        )
        with pytest.raises(FileError, match="in channel"):
            dump(wrong)


def test_the_crc_is_that_of_the_arrays() -> None:
    _, document, section = unpack(dump(small_graph()))
    assert document["crc32"] == zlib.crc32(section)
