"""The engine's arithmetic in NumPy: integer sums, then single float32 operations in order.

The sums are formed in float64, where they are exact; each NumPy call after them rounds once. The
engine gives the same bytes. The docstrings of graph.py state the same formulas.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .graph import (
    FINE,
    Add,
    Array,
    Classifier,
    Conv,
    Depthwise,
    Graph,
    Node,
    Pool,
    Quantized,
    SqueezeExcite,
    padding_of,
)

_f32 = np.float32


def run(graph: Graph, images: Array, observe: Callable[[int, Array], None] | None = None) -> Array:
    """The logits, float32 [N, classes], of images, uint8 [N, H, W, 3].

    The images may be of another size than graph.image_size: padding follows from their own.
    observe(index, output) is called with each node's output, uint8 [N, H, W, C], and at last with
    the logits.

    Raises:
        ValueError: images is of another type or shape, or the map at the classifier is not 1x1.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(
            f"run: images: expected uint8 [N, H, W, 3], got {images.dtype} {list(images.shape)}"
        )
    last_use = {source: index for index, node in enumerate(graph.nodes) for source in node.inputs}
    maps = {-1: images}
    for index, node in enumerate(graph.nodes):
        inputs = [(maps[source], padding_bytes(graph, source)) for source in node.inputs]
        maps[index] = compute(node, inputs)
        if observe:
            observe(index, maps[index])
        for source in {source for source in node.inputs if last_use[source] == index}:
            del maps[source]
    return maps[len(graph.nodes) - 1]


def outputs(graph: Graph, images: Array) -> list[Array]:
    """Each node's output; the last is the logits. Arguments and errors as `run`."""
    maps: list[Array] = []
    run(graph, images, lambda _, output: maps.append(output))
    return maps


def padding_bytes(graph: Graph, source: int) -> Array:
    """What pads a node's output, or the image (-1): uint8, [1] or [3]."""
    if source == -1:
        return np.array(graph.padding_bytes, np.uint8)
    node = graph.nodes[source]
    return np.array([node.zero_point if isinstance(node, Quantized) else 0], np.uint8)


def compute(node: Node, inputs: list[tuple[Array, Array]]) -> Array:
    """One node's output, from its inputs [N, H, W, C] and what pads them, their zero points."""
    (x, pad), *others = inputs
    if isinstance(node, Classifier):
        if x.shape[1:3] != (1, 1):
            raise ValueError(
                f"run: images: expected a size that gives the classifier a map of 1 x 1, got "
                f"{x.shape[1]} x {x.shape[2]}"
            )
        return scale_sums(node, sums(node, x, pad))[:, 0, 0]
    if isinstance(node, Conv | Depthwise):
        v = scale_sums(node, sums(node, x, pad))
        if node.hardswish_scale is not None:
            u = np.minimum(np.maximum(v + _f32(3), _f32(0)), _f32(6))
            v = (v * u) * _f32(node.hardswish_scale)
        if isinstance(node, Conv) and node.residual_multiplier is not None:
            b, multiplier = _centred(*others[0]), _f32(node.residual_multiplier)
            v = v + b[..., : v.shape[3]] * multiplier
            if b.shape[3] > v.shape[3]:
                v = v + b[..., v.shape[3] :] * (multiplier / _f32(FINE))
        y = to_bytes(node, v)
        if isinstance(node, Conv) and node.fine:
            lost = v - (y.astype(np.int32) - node.zero_point).astype(_f32)
            y = np.concatenate([y, to_bytes(node, lost * _f32(FINE))], 3)
        return y
    if isinstance(node, Add):
        m_a, m_b = node.multipliers
        return to_bytes(node, _centred(x, pad) * _f32(m_a) + _centred(*others[0]) * _f32(m_b))
    area = x.shape[1] * x.shape[2]
    total = x.sum((1, 2), dtype=np.int64) - area * pad.astype(np.int64)
    if isinstance(node, Pool):
        return to_bytes(node, (total.astype(_f32) * _f32(node.ratio / area))[:, None, None])
    assert isinstance(node, SqueezeExcite)
    hidden = _linear(total.astype(_f32) * _f32(node.scale / area), node.w1, node.b1)
    if node.hidden_hardswish:
        hidden = (hidden * _relu6(hidden + _f32(3))) * _f32(1 / 6)
    else:
        hidden = np.maximum(hidden, _f32(0))
    gate = _relu6(_linear(hidden, node.w2, node.b2) + _f32(3)) * _f32(1 / 6)
    return to_bytes(node, _centred(x, pad) * (gate * _f32(node.ratio))[:, None, None])


def sums(node: Conv | Depthwise | Classifier, x: Array, pad: Array) -> Array:
    """The int32 sums, the bias in them, as float64 [N, H, W, C_out]; |sum| < 2^31 is exact."""
    weight = node.weight.astype(np.float64)
    if isinstance(node, Classifier):
        return x @ weight.T + node.bias
    if isinstance(node, Conv):
        weight = weight.transpose(1, 2, 3, 0)  # [kh, kw, C_in, C_out]
    (top, bottom), (left, right) = (
        padding_of(x.shape[1 + axis], weight.shape[axis], node.stride[axis], node.padding, axis)
        for axis in (0, 1)
    )
    n, height, width, channels = x.shape
    padded = np.empty((n, height + top + bottom, width + left + right, channels))
    padded[:] = pad
    padded[:, top : top + height, left : left + width] = x
    # [N, H, W, C_in, kh, kw], a view: what each output reads
    windows = np.lib.stride_tricks.sliding_window_view(padded, weight.shape[:2], (1, 2))
    windows = windows[:, :: node.stride[0], :: node.stride[1]]
    total = node.bias.astype(np.float64)
    for i, j in np.ndindex(weight.shape[:2]):
        taps, factor = windows[..., i, j], weight[i, j]
        total = total + (taps @ factor if isinstance(node, Conv) else taps * factor)
    return total


def scale_sums(node: Conv | Depthwise | Classifier, acc: Array) -> Array:
    """float(acc) * multiplier."""
    return acc.astype(_f32) * node.multiplier


def to_bytes(node: Quantized, v: Array) -> Array:
    """clamp(rne(clamp(v, -32768, 32767)) + zero_point, lo, hi)."""
    rounded = np.rint(np.clip(v, _f32(-32768), _f32(32767))).astype(np.int32)
    return np.clip(rounded + node.zero_point, node.lo, node.hi).astype(np.uint8)


def _centred(x: Array, zero_point: Array) -> Array:
    return (x.astype(np.int32) - zero_point.astype(np.int32)).astype(_f32)


def _relu6(x: Array) -> Array:
    return np.minimum(np.maximum(x, _f32(0)), _f32(6))


def _linear(x: Array, weight: Array, bias: Array) -> Array:
    """[N, C] -> [N, J]: b[j] + sum over c, one product and one addition after the other."""
    h = np.repeat(bias[None], len(x), 0)
    for c in range(len(weight)):
        h = h + x[:, c, None] * weight[c]
    return h
