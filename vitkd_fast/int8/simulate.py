"""What the engine computes, in float32 torch: for calibration, on any device, many images.

The same bytes as the reference's but for sums over 2^24 and for the squeeze-excite's order of
addition. Maps are [N, C, H, W]; x is centred where it is less its zero point, in floats: then
padding is zeros.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .graph import (
    FINE,
    Add,
    Array,
    Classifier,
    Conv,
    Depthwise,
    Node,
    Pool,
    Quantized,
    SqueezeExcite,
    padding_of,
)


def compute(node: Node, inputs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Bytes, or the classifier's logits, from bytes and what pads them, each [1 or C, 1, 1]."""
    x, *others = (data - pad for data, pad in inputs)
    if isinstance(node, Conv | Depthwise | Classifier):
        bias = node.bias + folded(node, inputs[0][1].double().cpu().numpy())
        v = (sums(node, x) + _vector(bias, x)).mul_(_vector(node.multiplier, x))
        if isinstance(node, Classifier):
            return v
        if node.hardswish_scale is not None:
            v *= (v + 3).clamp_(0, 6)
            v *= node.hardswish_scale
        if isinstance(node, Conv) and node.residual_multiplier is not None:
            b, multiplier = others[0], node.residual_multiplier
            v += b[:, : v.shape[1]] * multiplier
            if b.shape[1] > v.shape[1]:
                v += b[:, v.shape[1] :] * (multiplier / FINE)
    elif isinstance(node, Add):
        v = x * node.multipliers[0] + others[0] * node.multipliers[1]
    elif isinstance(node, Pool):
        v = x.mean((2, 3), keepdim=True) * node.ratio
    else:
        assert isinstance(node, SqueezeExcite)
        w1, w2 = (torch.from_numpy(w).to(x.device).T for w in (node.w1, node.w2))
        hidden = F.linear(x.mean((2, 3)) * node.scale, w1) + _vector(node.b1, x).flatten()
        hidden = F.hardswish(hidden) if node.hidden_hardswish else hidden.relu_()
        gate = F.hardsigmoid(F.linear(hidden, w2) + _vector(node.b2, x).flatten())
        v = x * (gate * node.ratio)[:, :, None, None]
    assert isinstance(node, Quantized)
    if isinstance(node, Conv) and node.fine:
        y = _bytes(node, v.clone())
        lost = v.sub_(y.float() - node.zero_point).mul_(FINE)
        return torch.cat([y, _bytes(node, lost)], 1)
    return _bytes(node, v)


def _bytes(node: Quantized, v: Tensor) -> Tensor:
    """Of values, which are overwritten."""
    v = v.clamp_(-32768, 32767).round_().add_(node.zero_point)
    return v.clamp_(node.lo, node.hi).to(torch.uint8)


def sums(node: Conv | Depthwise | Classifier, x: Tensor) -> Tensor:
    """The sums of centred x without bias, in x's dtype."""
    if isinstance(node, Conv):
        weight = node.weight.transpose(0, 3, 1, 2)
    elif isinstance(node, Depthwise):
        weight = node.weight.transpose(2, 0, 1)[:, None]
    else:
        weight = node.weight[:, :, None, None]
    w = torch.from_numpy(np.ascontiguousarray(weight)).to(x)
    if isinstance(node, Classifier):
        return F.conv2d(x, w)
    (top, bottom), (left, right) = (
        padding_of(x.shape[axis + 2], w.shape[axis + 2], stride, node.padding, axis)
        for axis, stride in enumerate(node.stride)
    )
    padding = (top, left)
    if (top, left) != (bottom, right):
        x, padding = F.pad(x, (left, right, top, bottom)), (0, 0)
    groups = len(w) if isinstance(node, Depthwise) else 1
    w = w.contiguous(memory_format=torch.channels_last)
    return F.conv2d(x, w, None, node.stride, padding, groups=groups)


def folded(node: Conv | Depthwise | Classifier, pad: Array) -> Array:
    """What the sums of a map of nothing but padding are, [C_out]; pad is [1 or C, 1, 1]."""
    if isinstance(node, Depthwise):
        return node.weight.sum((0, 1), dtype=np.int64) * pad.reshape(-1)
    return (node.weight * pad.reshape(-1)).sum(tuple(range(1, node.weight.ndim)))


def largest(node: Conv | Depthwise | Classifier) -> Array:
    """255 sum|w|, [C_out]: no sum without bias is larger."""
    axes = (0, 1) if isinstance(node, Depthwise) else tuple(range(1, node.weight.ndim))
    return 255 * np.abs(node.weight).sum(axes, dtype=np.int64)


def _vector(value: Array, like: Tensor) -> Tensor:
    return torch.from_numpy(value.astype(np.float32)).to(like.device).view(-1, 1, 1)
