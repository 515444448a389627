"""Graphs of chosen geometry with random weights: for tests of the engine and its fuzzing."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from support.int8_graphs import random_images
from vitkd_fast import _int8
from vitkd_fast.int8 import file
from vitkd_fast.int8.graph import Array, Classifier, Conv, Depthwise, Graph, Node, Pool

ISAS = _int8.isa()
FIELDS: dict[str, Any] = {
    "padding_bytes": (124, 116, 104),
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
}


class Builder:
    """Nodes one after another, with random weights unless they are given."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[Node] = []
        self.channels = [3]  # [-1] first

    def add(self, cls: Any, inputs: Sequence[int] | None, channels: int, **fields: Any) -> int:
        index = len(self.nodes)
        at = tuple(index - 1 if i is None else i for i in inputs or [None])
        self.nodes.append(cls(name=f"node{index}", inputs=at, **fields))
        self.channels.append(channels * (2 if fields.get("fine") else 1))
        return index

    def conv(
        self,
        out: int | None = None,
        kernel: int = 1,
        *,
        inputs: Sequence[int] | None = None,
        weight: Any = None,
        cls: Any = Conv,
        **fields: Any,
    ) -> int:
        """Depthwise without `out`; constants so that sums spread over the bytes."""
        channels = self.channels[inputs[0] + 1 if inputs else -1]
        if out is None:
            cls, out = Depthwise, channels
        shape = {
            Conv: (out, kernel, kernel, channels),
            Depthwise: (kernel, kernel, out),
            Classifier: (out, channels),
        }[cls]
        given = self.rng.normal(0, 45, shape).round() if weight is None else weight
        w = np.broadcast_to(np.clip(given, -127, 127), shape).astype(np.int8)
        sums = w.reshape(-1, out).sum(0) if cls is Depthwise else w.reshape(out, -1).sum(1)
        spread = 45 * 60 * np.sqrt(w.size / out)
        fields.setdefault("bias", -128 * sums.astype(np.int64))
        fields.setdefault("multiplier", self.rng.uniform(30, 90, out) / spread)
        fields |= {"bias": np.broadcast_to(fields["bias"], out).astype(np.int32)}
        fields |= {"multiplier": np.broadcast_to(fields["multiplier"], out).astype(np.float32)}
        if cls is not Classifier and "hardswish_scale" not in fields:
            fields.setdefault("zero_point", 128)
        return self.add(cls, inputs, out, weight=w, **fields)

    def graph(self, image_size: int, classes: int = 7) -> Graph:
        """With pool and classifier."""
        self.add(Pool, None, self.channels[-1], ratio=1.0, zero_point=100)
        self.conv(classes, cls=Classifier)
        return Graph(nodes=tuple(self.nodes), image_size=image_size, **FIELDS)


def mobilenet_v2(divisor: int = 1, image_size: int = 224) -> Graph:
    """The shape of the real one, or of one with fewer channels."""
    b = Builder()
    relu: dict[str, Any] = {"zero_point": 0}
    b.conv(32 // divisor, 3, inputs=(-1,), stride=(2, 2), padding=(1, 1, 1, 1), **relu)
    settings = "1 16 1 1, 6 24 2 2, 6 32 3 2, 6 64 4 2, 6 96 3 1, 6 160 3 2, 6 320 1 1"
    for expand, out, repeats, stride in (map(int, s.split()) for s in settings.split(", ")):
        for i in range(repeats):
            x, channels, step = len(b.nodes) - 1, b.channels[-1], stride if i == 0 else 1
            if expand > 1:
                b.conv(expand * channels, **relu)
            b.conv(None, 3, stride=(step, step), padding=(1, 1, 1, 1), **relu)
            residual = i > 0
            b.conv(
                out // divisor,
                inputs=(len(b.nodes) - 1, *([x] if residual else [])),
                residual_multiplier=0.5 if residual else None,
            )
    b.conv(1280 // divisor, **relu)
    return b.graph(image_size, classes=1000)


def engine(graph: Graph, **options: Any) -> Any:
    options = {"image_size": graph.image_size, "poison": True} | options
    return _int8.Session(file.opened(graph), **options)


def images_for(graph: Graph, count: int, size: int | None = None, seed: int = 0) -> Array:
    size = size or graph.image_size
    return random_images(seed + 100, (count, size, size, 3))
