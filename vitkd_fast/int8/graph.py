"""The quantised graph: what a file holds, the engine runs and the reference defines.

A node makes one u8 tensor [N, H, W, C] from earlier nodes; the last makes float32 logits. Every
constant is stored as it is used, already rounded. Index -1 is the image: u8, scale 1, padded
with `Graph.padding_bytes`. Arrays are contiguous. The types are exactly those of the fields;
csrc/int8/graph.cpp checks the rest. Nothing in this module needs torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np

FINE = 8  # parts of a level that the second half of a fine map counts

Array = np.ndarray
Padding = tuple[int, int, int, int] | Literal["same"]  # top, left, bottom, right


@dataclass(frozen=True, kw_only=True)
class Node:
    """What all nodes have. y = clamp(rne(v) + zero_point, lo, hi), v clamped to int16 before."""

    op: ClassVar[str]
    arrays: ClassVar[tuple[str, ...]] = ()

    name: str  # of the module that it came from
    inputs: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Quantized(Node):
    zero_point: int = 0  # of the output; convolutions that read it pad with it
    lo: int = 0
    hi: int = 255


@dataclass(frozen=True, kw_only=True)
class Conv(Quantized):
    """v = float(acc) * multiplier, acc the int32 sum with the bias in it; dense.

    hardswish_scale k: t = v; u = min(max(t + 3, 0), 6); v = (t * u) * k.
    residual_multiplier: v = v + float(q_b - z_b) * residual_multiplier, b the second input. If b
    is fine and has twice the channels, its second half l_b is added, too:
    v = v + float(l_b - z_b) * fp32(residual_multiplier / 8).
    fine: twice C_out channels, in the second half what the first one lacks, in eighths of a level:
    y[C_out + c] = clamp(rne((v - float(y[c] - zero_point)) * 8) + zero_point, lo, hi), what is
    rounded clamped to int16 before.
    """

    op = "conv"
    arrays = ("weight", "bias", "multiplier")

    weight: Array  # int8 [C_out, kh, kw, C_in]
    bias: Array  # int32 [C_out], the input's zero point folded in
    multiplier: Array  # float32 [C_out]
    stride: tuple[int, int] = (1, 1)
    padding: Padding = (0, 0, 0, 0)
    hardswish_scale: float | None = None  # a float32
    residual_multiplier: float | None = None  # a float32; never with hardswish_scale
    fine: bool = False  # never with hardswish_scale


@dataclass(frozen=True, kw_only=True)
class Depthwise(Quantized):
    """As Conv, each channel on its own."""

    op = "depthwise"
    arrays = ("weight", "bias", "multiplier")

    weight: Array  # int8 [kh, kw, C]
    bias: Array  # int32 [C]
    multiplier: Array  # float32 [C]
    stride: tuple[int, int] = (1, 1)
    padding: Padding = (0, 0, 0, 0)
    hardswish_scale: float | None = None


@dataclass(frozen=True, kw_only=True)
class Add(Quantized):
    """v = float(q_a - z_a) * multipliers[0] + float(q_b - z_b) * multipliers[1]."""

    op = "add"

    multipliers: tuple[float, float]  # float32s


@dataclass(frozen=True, kw_only=True)
class SqueezeExcite(Quantized):
    """x times a gate per channel: hard-sigmoid(FC2(relu(FC1(mean of x)))).

    mean[c] = float(S_c - HW * z) * fp32(scale / HW); h[j] = b1[j], then for c ascending
    h[j] = h[j] + w1[c][j] * mean[c], w1[c][j] = float(q1[c][j]) * s1[j]; h = max(h, 0), or with
    `hidden_hardswish` h = (h * min(max(h + 3, 0), 6)) * fp32(1/6); the same with w2, b2;
    g = min(max(h + 3, 0), 6) * fp32(1/6); v = float(q - z) * (g * ratio).

    Eight bits a weight, because these are read once per image, from far away.
    """

    op = "squeeze_excite"
    arrays = ("q1", "s1", "b1", "q2", "s2", "b2")

    q1: Array  # int8 [C, J]
    s1: Array  # float32 [J]
    b1: Array  # float32 [J]
    q2: Array  # int8 [J, C]
    s2: Array  # float32 [C]
    b2: Array  # float32 [C]
    scale: float  # of the input, a double
    ratio: float  # float32: scale of the input / scale of the output
    hidden_hardswish: bool = False

    @property
    def w1(self) -> Array:
        """float32 [C, J]."""
        return self.q1.astype(np.float32) * self.s1

    @property
    def w2(self) -> Array:
        """float32 [J, C]."""
        return self.q2.astype(np.float32) * self.s2

    @staticmethod
    def rounded(weight: Array) -> tuple[Array, Array]:
        """q and s of float weights [in, out], symmetric per output."""
        scale = np.maximum(np.abs(weight).max(0) / 127, 2.0**-100).astype(np.float32)
        return np.rint(weight / scale).clip(-127, 127).astype(np.int8), scale


@dataclass(frozen=True, kw_only=True)
class Pool(Quantized):
    """The mean over the map, [N, 1, 1, C]: v = float(S - HW * z) * m, m = fp32(ratio / HW)."""

    op = "pool"

    ratio: float  # scale of the input / scale of the output, a double


@dataclass(frozen=True, kw_only=True)
class Classifier(Node):
    """logit = float(acc) * multiplier, of a [N, 1, 1, C] tensor; the last node."""

    op = "classifier"
    arrays = ("weight", "bias", "multiplier")

    weight: Array  # int8 [classes, C]
    bias: Array  # int32 [classes]
    multiplier: Array  # float32 [classes]


NODES: dict[str, type[Node]] = {
    cls.op: cls for cls in (Conv, Depthwise, Add, SqueezeExcite, Pool, Classifier)
}


@dataclass(frozen=True, kw_only=True)
class Graph:
    """Nodes in an order in which they can be computed, and what prepares an image for them."""

    nodes: tuple[Node, ...]
    image_size: int  # the side of a square
    padding_bytes: tuple[int, int, int]  # of the image: rne(255 * mean)
    mean: tuple[float, float, float]  # of pixels in [0, 1]
    std: tuple[float, float, float]
    crop_pct: float = 1.0  # evaluation resizes to image_size / crop_pct and keeps the centre
    interpolation: str = "bilinear"
    classes: tuple[str, ...] = field(default=())
    multilabel: bool = False  # classes are not exclusive: a sigmoid of each logit
    temperature: float = 1.0  # what logits are divided by before they become probabilities


def padding_of(size: int, kernel: int, stride: int, padding: Padding, axis: int) -> tuple[int, int]:
    """Padding before and after along an axis (0: rows, 1: columns) of `size`."""
    if padding == "same":
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        return total // 2, total - total // 2
    return padding[axis], padding[axis + 2]
