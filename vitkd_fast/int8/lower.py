"""From a model to a small float graph: torch.export, batch norms folded, padding made explicit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from .graph import Padding

Activation = Literal["relu", "relu6", "hardswish"]


@dataclass(frozen=True, kw_only=True)
class FloatNode:
    """One operation on float maps; inputs are indices of earlier nodes, -1 is the picture."""

    op: Literal["conv", "add", "squeeze_excite", "pool"]
    name: str  # of the module that it came from
    inputs: tuple[int, ...]
    # conv: linear layers are 1x1 convolutions of a 1x1 map; the last node is the classifier
    weight: Tensor | None = None  # float64 [C_out, C_in / groups, kh, kw], batch norm folded in
    bias: Tensor | None = None  # float64 [C_out]
    stride: tuple[int, int] = (1, 1)
    padding: Padding = (0, 0, 0, 0)
    groups: int = 1  # 1, or C_in = C_out (depthwise)
    activation: Activation | None = None  # of a conv or an add
    # squeeze_excite: x * hardsigmoid(w2 relu(w1 mean(x) + b1) + b2); the node's input is x
    w1: Tensor | None = None  # [J, C]
    b1: Tensor | None = None  # [J]
    w2: Tensor | None = None  # [C, J]
    b2: Tensor | None = None  # [C]
