"""The float graph that a model is lowered to, and its float32 reference.

`forward` runs the nodes; `lower` makes them, and the quantizer reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .graph import Padding, padding_of

Activation = Literal["relu", "relu6", "hardswish"]
Observer = Callable[[int, Tensor, Tensor], None]


@dataclass(frozen=True, kw_only=True)
class BatchNorm:
    """A batch norm, by the names of its tensors in the model."""

    mean: str
    var: str
    weight: str | None
    bias: str | None
    eps: float


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What weights and biases of a node were made of: tensors of the model, by name.

    None where they were computed, and cannot be traced to one.
    """

    weight: str | None
    bias: str | None  # None: there is none
    # what was folded in, in order: batch norms, and x * scale + shift, float64 [1] or [C]
    folds: tuple[BatchNorm | tuple[Tensor, Tensor], ...] = ()


def batch_norm(
    mean: Tensor, var: Tensor, eps: float | Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scale and shift of (x - mean) / sqrt(var + eps) * weight + bias."""
    scale = (var + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias


@dataclass(frozen=True, kw_only=True)
class FloatNode:
    """One operation on float maps; inputs are indices of earlier nodes, -1 is the image.

    x * weight + bias on the image, where the model normalises it itself, is the first node.
    """

    op: Literal["normalize", "conv", "add", "squeeze_excite", "pool"]
    name: str  # of the module that it came from
    inputs: tuple[int, ...]
    modules: tuple[str, ...] = ()  # paths of those whose output it makes
    origins: tuple[Origin, ...] = ()  # of weight and bias; of a squeeze-excite of both pairs
    # conv: linear layers are 1x1 convolutions of a 1x1 map; the last node is the classifier
    # float64 [C_out, C_in / groups, kh, kw], batch norm folded in; of a normalize [3, 1, 1, 1]
    weight: Tensor | None = None
    bias: Tensor | None = None  # float64 [C_out]
    stride: tuple[int, int] = (1, 1)
    padding: Padding = (0, 0, 0, 0)
    groups: int = 1  # 1, or C_in = C_out (depthwise)
    activation: Activation | None = None  # of a conv or an add
    # squeeze_excite: x * hardsigmoid(w2 hidden(w1 mean(x) + b1) + b2)
    hidden: Literal["relu", "hardswish"] = "relu"
    w1: Tensor | None = None  # [J, C]
    b1: Tensor | None = None  # [J]
    w2: Tensor | None = None  # [C, J]
    b2: Tensor | None = None  # [C]


@torch.no_grad()
def forward(nodes: tuple[FloatNode, ...], x: Tensor, observe: Observer | None = None) -> Tensor:
    """The logits [N, classes] of normalised images x [N, 3, H, W], in float32, on x's device.

    observe(index, pre_activation, output) is called for each node with its maps [N, C, H, W]; the
    two are one tensor where the node has no activation. A map is freed after its last use.

    Raises:
        ValueError: x has another shape.
    """
    if x.ndim != 4 or x.shape[1] != 3:
        raise ValueError(f"forward: x: expected [N, 3, H, W], got {list(x.shape)}")
    last_use = {source: index for index, node in enumerate(nodes) for source in node.inputs}
    maps = {-1: x.to(torch.float32, memory_format=torch.channels_last)}
    for index, node in enumerate(nodes):
        y = pre_activation(node, [maps[source] for source in node.inputs])
        for source in set(node.inputs):
            if last_use[source] == index:
                del maps[source]
        maps[index] = activated(y, node.activation, inplace=observe is None)
        if observe:
            observe(index, y, maps[index])
        del y
    return maps[len(nodes) - 1].flatten(1)


def _identity(x: Tensor, inplace: bool) -> Tensor:
    return x


_ACTIVATIONS: dict[Activation | None, Callable[..., Tensor]] = {
    None: _identity,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
}


def activated(x: Tensor, activation: Activation | None, inplace: bool = False) -> Tensor:
    """The values after an activation, or x itself where there is none."""
    return _ACTIVATIONS[activation](x, inplace=inplace)


def pre_activation(node: FloatNode, inputs: list[Tensor]) -> Tensor:
    """The node before its activation."""
    x = inputs[0]

    def constant(value: Tensor | None) -> Tensor:
        assert value is not None
        return value.to(x.device, torch.float32)

    if node.op == "normalize":
        return x * constant(node.weight)[:, 0] + constant(node.bias)[:, None, None]
    if node.op == "add":
        return x + inputs[1]
    if node.op == "pool":
        return x.mean((2, 3), keepdim=True)
    if node.op == "squeeze_excite":
        hidden = F.linear(x.mean((2, 3)), constant(node.w1), constant(node.b1))
        hidden = F.hardswish(hidden) if node.hidden == "hardswish" else F.relu(hidden)
        gate = F.hardsigmoid(F.linear(hidden, constant(node.w2), constant(node.b2)))
        return x * gate[:, :, None, None]
    weight = constant(node.weight).contiguous(memory_format=torch.channels_last)
    (top, bottom), (left, right) = (
        padding_of(x.shape[axis + 2], weight.shape[axis + 2], stride, node.padding, axis)
        for axis, stride in enumerate(node.stride)
    )
    padding = (top, left)
    if (top, left) != (bottom, right):
        x, padding = F.pad(x, (left, right, top, bottom)), (0, 0)
    return F.conv2d(x, weight, constant(node.bias), node.stride, padding, groups=node.groups)
