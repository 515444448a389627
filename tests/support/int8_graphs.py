"""Random valid int8 graphs with values well spread over their bytes, for tests of equality."""

from __future__ import annotations

from typing import Any

import numpy as np

from vitkd_fast.int8 import reference
from vitkd_fast.int8.graph import (
    Add,
    Array,
    Classifier,
    Conv,
    Depthwise,
    Graph,
    Node,
    Pool,
    SqueezeExcite,
)

_CHANNELS = (1, 3, 5, 7, 8, 13, 16, 17, 24, 31, 32, 33, 40, 48, 64, 65, 72, 96)
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def random_images(seed: int, shape: tuple[int, ...]) -> Array:
    """uint8 [N, H, W, 3]: slow waves, noise, and some pixels of 0 and 255."""
    rng = np.random.default_rng(seed)
    n, height, width, channels = shape
    rows, columns = np.arange(height)[:, None, None], np.arange(width)[:, None]
    waves = rng.normal(0, 0.3, (2, n, 1, 1, channels))
    pixels = 128 + 70 * np.sin(waves[0] * rows + waves[1] * columns) + rng.normal(0, 40, shape)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def random_graph(
    seed: int,
    *,
    image_size: int | None = None,
    blocks: int = 5,
    channels: tuple[int, ...] = _CHANNELS,
    classes: int | None = None,
) -> Graph:
    """A graph as lowering makes them: stem, blocks, pool, a convolution of 1x1, classifier.

    Together the seeds have every operation, with odd channels, SAME and uneven padding, kernels
    from 1x1 to 5x5 and 2x2, strides 1 and 2, residuals, hard-swish, narrow lo and hi, all-zero
    channels, two readers of one map, a map added to itself, and a second reader of the image.
    """
    builder = _Builder(seed, image_size, channels)
    builder.stem()
    if blocks >= 5:  # each of them at least once
        for block in builder.rng.permutation(5):
            builder.block(int(block))
    else:
        for block in builder.rng.integers(5, size=blocks):
            builder.block(int(block))
    return builder.head(classes)


class _Builder:
    def __init__(self, seed: int, image_size: int | None, channels: tuple[int, ...]) -> None:
        self.rng = rng = np.random.default_rng(seed)
        self.image_size = int(image_size or rng.integers(9, 41))
        self.channels = channels
        self.exact = rng.random() < 0.5  # multipliers as quantize() makes them
        self.nodes: list[Node] = []
        shape = (3, self.image_size, self.image_size, 3)
        padding = tuple(round(255 * m) for m in _MEAN)
        self.maps = [(random_images(seed, shape), np.array(padding, np.uint8))]  # [-1] first

    def graph(self) -> Graph:
        return Graph(
            nodes=tuple(self.nodes),
            image_size=self.image_size,
            padding_bytes=(124, 116, 104),
            mean=_MEAN,
            std=_STD,
            crop_pct=0.875,
            interpolation="bicubic",
        )

    @property
    def last(self) -> int:
        return len(self.nodes) - 1

    def map(self, index: int) -> Array:
        return self.maps[index + 1][0]

    def add_node(self, node: Node) -> int:
        output = reference.compute(node, [self.maps[source + 1] for source in node.inputs])
        self.nodes.append(node)
        zero_point = np.array([getattr(node, "zero_point", 0)], np.uint8)
        self.maps.append((output, zero_point))
        return self.last

    def f32(self, value: Any) -> Any:
        """Rounded to float32, perhaps to 22 bits; an array for an array."""
        single = np.asarray(value, np.float32)
        if self.exact:
            single = (single.view(np.uint32) & np.uint32(0xFFFFFFFC)).view(np.float32)
        return single if single.ndim else float(single)

    def output(self, relu: bool = False) -> dict[str, int]:
        """zero_point, lo and hi."""
        rng = self.rng
        zero_point = int(rng.choice([0, int(rng.integers(0, 60))] if relu else range(60, 200)))
        if relu:
            hi = 255 if rng.random() < 0.6 else int(rng.integers(zero_point + 60, 256))
            return {"zero_point": zero_point, "lo": zero_point, "hi": hi}
        if rng.random() < 0.1:
            return {"zero_point": zero_point, "lo": int(rng.integers(0, 30)), "hi": 230}
        return {"zero_point": zero_point, "lo": 0, "hi": 255}

    def window(self, source: int, kernel: int, stride: int) -> dict[str, Any]:
        """Stride and a padding that suits the kernel."""
        rng, sizes = self.rng, self.map(source).shape[1:3]
        half = (kernel - 1) // 2
        uneven = tuple(int(p) for p in rng.integers(0, kernel, 4))
        padding: Any = ["same", (half,) * 4, uneven][rng.choice(3, p=[0.4, 0.4, 0.2])]
        if padding != "same" and any(
            size + padding[axis] + padding[axis + 2] < kernel for axis, size in enumerate(sizes)
        ):
            padding = "same"
        strides = (stride, stride) if rng.random() < 0.9 else (stride, 1)
        return {"stride": strides, "padding": padding}

    def conv(
        self,
        source: int,
        out: int,
        kernel: int = 1,
        stride: int = 1,
        *,
        act: str = "",
        residual: int | None = None,
        depthwise: bool = False,
    ) -> int:
        """Weights, then bias and multiplier such that the sums spread over the bytes."""
        rng, channels = self.rng, self.map(source).shape[3]
        shape = (kernel, kernel, out) if depthwise else (out, kernel, kernel, channels)
        weight = np.clip(rng.normal(0, 45, shape).round(), -127, 127).astype(np.int8)
        dead = int(rng.integers(out)) if out > 3 and rng.random() < 0.3 else -1
        if dead >= 0:
            weight[(..., dead) if depthwise else dead] = 0
        cls: Any = Depthwise if depthwise else Conv
        fields: dict[str, Any] = {
            "name": f"node{len(self.nodes)}",
            "weight": weight,
            **(self.window(source, kernel, stride) if kernel > 1 else {"stride": (stride, stride)}),
        }
        probe = cls(
            inputs=(source,),
            bias=np.zeros(out, np.int32),
            multiplier=np.ones(out, np.float32),
            **fields,
        )
        acc = reference.sums(probe, *self.maps[source + 1])
        mean, std = acc.mean((0, 1, 2)), np.maximum(acc.std((0, 1, 2)), 50)
        fields["bias"] = (-mean + std * rng.normal(0, 0.4, out)).round().astype(np.int32)
        wanted = 3 if act == "hardswish" else rng.uniform(30, 90, out)
        fields["multiplier"] = self.f32(wanted / std)
        if self.exact and act != "hardswish":
            fields["multiplier"] = self.f32(np.ceil(wanted / std * 2**16) / 2**16)
        if act == "hardswish":
            k = rng.uniform(2, 6)
            zero_point = int(2.25 * k) + 1
            fields |= {"hardswish_scale": self.f32(k), "zero_point": zero_point}
        else:
            fields |= self.output(relu=act == "relu")
        inputs = (source,) if residual is None else (source, residual)
        if residual is not None:
            fields["residual_multiplier"] = self.f32(rng.uniform(0.4, 1.2))
        return self.add_node(cls(inputs=inputs, **fields))

    def depthwise(self, source: int, kernel: int, stride: int, act: str) -> int:
        channels = self.map(source).shape[3]
        return self.conv(source, channels, kernel, stride, act=act, depthwise=True)

    def sum_of(self, a: int, b: int, relu: bool) -> int:
        multipliers = tuple(self.f32(m) for m in self.rng.uniform(0.3, 0.9, 2))
        name = f"node{len(self.nodes)}"
        return self.add_node(
            Add(name=name, inputs=(a, b), multipliers=multipliers, **self.output(relu))
        )

    def squeeze_excite(self, source: int) -> int:
        rng, x = self.rng, self.map(source)
        channels, middle = x.shape[3], int(rng.choice([1, 4, 7, 8, 16, 24]))
        scale = float(rng.uniform(0.01, 0.05))
        spread = max(float(x.mean((1, 2)).std()) * scale, 0.05)
        q1, s1 = SqueezeExcite.rounded(
            rng.normal(0, 1 / spread / channels**0.5, (channels, middle))
        )
        q2, s2 = SqueezeExcite.rounded(rng.normal(0, 1.5 / middle**0.5, (middle, channels)))
        return self.add_node(
            SqueezeExcite(
                name=f"node{len(self.nodes)}",
                inputs=(source,),
                q1=q1,
                s1=s1,
                b1=rng.normal(0, 0.5, middle).astype(np.float32),
                q2=q2,
                s2=s2,
                hidden_hardswish=bool(rng.integers(2)),
                b2=rng.normal(0, 1, channels).astype(np.float32),
                scale=scale,
                ratio=self.f32(rng.uniform(1, 2)),
                **self.output(),
            )
        )

    def pick(self) -> int:
        return int(self.rng.choice(self.channels))

    def act(self) -> str:
        return str(self.rng.choice(["", "relu", "hardswish"]))

    def stem(self) -> None:
        rng, out = self.rng, self.pick()
        first = self.conv(-1, out, int(rng.choice([1, 3, 3])), 2, act=self.act())
        if rng.random() < 0.3:  # the image once more, with the first one's geometry
            window = self.nodes[first]
            assert isinstance(window, Conv)
            second = self.conv(-1, out, window.weight.shape[1], 2, act=self.act())
            if self.map(second).shape == self.map(first).shape:
                self.sum_of(first, second, relu=rng.random() < 0.5)

    def block(self, kind: int) -> None:
        rng, x = self.rng, self.last
        channels = self.map(x).shape[3]
        stride = 2 if rng.random() < 0.4 and min(self.map(x).shape[1:3]) > 2 else 1
        if kind == 0:  # inverted residual
            wide = self.conv(x, self.pick(), act=self.act())
            middle = self.depthwise(wide, int(rng.choice([2, 3, 5])), stride, self.act())
            same = self.map(middle).shape[1:3] == self.map(x).shape[1:3]
            self.conv(middle, channels if same else self.pick(), residual=x if same else None)
        elif kind == 1:  # with squeeze-excite
            wide = self.conv(x, self.pick(), act="hardswish")
            middle = self.depthwise(wide, int(rng.choice([3, 5])), stride, "hardswish")
            self.conv(self.squeeze_excite(middle), self.pick())
        elif kind == 2:  # dense
            y = self.conv(x, self.pick(), int(rng.choice([2, 3])), stride, act=self.act())
            self.conv(y, self.pick(), int(rng.choice([1, 3])), act=self.act())
        elif kind == 3:  # depthwise first, as in MobileNetV4, and a sum of two branches
            y = self.depthwise(x, int(rng.choice([3, 5])), stride, "")
            a = self.conv(y, self.pick(), act="relu")
            b = self.conv(y, self.map(a).shape[3], act=self.act())
            self.sum_of(a, b, relu=rng.random() < 0.5)
        else:  # a map with itself
            self.conv(self.sum_of(x, x, relu=rng.random() < 0.5), self.pick(), act="relu")

    def head(self, classes: int | None) -> Graph:
        rng, x = self.rng, self.last
        if rng.random() < 0.5:
            x = self.conv(x, self.pick(), act=self.act())
        data, zero_point = self.maps[x + 1]
        spread = max(float((data.mean((1, 2)) - float(zero_point[0])).std()), 1.0)
        ratio = float(rng.uniform(30, 70) / spread)
        pool = self.add_node(
            Pool(name=f"node{len(self.nodes)}", inputs=(x,), ratio=ratio, **self.output())
        )
        if rng.random() < 0.7:
            pool = self.conv(pool, self.pick(), act="hardswish")
        features = self.map(pool).shape[3]
        count = classes or int(rng.choice([1, 2, 10, 31, 100]))
        self.add_node(
            Classifier(
                name="classifier",
                inputs=(pool,),
                weight=np.clip(rng.normal(0, 45, (count, features)), -127, 127).astype(np.int8),
                bias=rng.integers(-20000, 20000, count).astype(np.int32),
                multiplier=self.f32(rng.uniform(1e-4, 1e-3, count)),
            )
        )
        return self.graph()
