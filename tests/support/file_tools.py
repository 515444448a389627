"""A small graph, and the parts of a file of the int8 engine."""

import json
import struct
from dataclasses import fields, replace
from typing import Any

import numpy as np

from vitkd_fast.int8.graph import Add, Classifier, Conv, Depthwise, Graph, Pool, SqueezeExcite

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
