"""Eleven bits in two bytes: a map and, in as many channels more, the eighths of a level it lacks.

    v = (y - z) + (l - z) / 8, to a sixteenth of a level

so that 1/64 of the squared error is left. A convolution reads both halves with the same weights,
those of the second divided by 8 and rounded, in the kernels of any other map, for twice the
multiply-adds. Who writes such a map has none more. It is for outputs without an activation which
dense convolutions alone multiply: the bottlenecks of MobileNets and their sums, where half of the
error arises if weights fit 8 bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from .calibrate import Scale
from .graph import FINE, Array

SAVED = 0.97  # of a map's squared error: the weights of the second half are rounded
_ROOM = FINE  # levels on either side of the zero point


def candidates(steps: Sequence[Any], scales: Mapping[int, Scale]) -> set[int]:
    """Outputs that may be fine, of `quantizer.Step`s."""
    found = {
        step.output
        for step in steps[:-1]
        if (step.node.op, step.node.groups, step.activation) == ("conv", 1, None)
        and _ROOM <= scales[step.output].zero_point <= 255 - _ROOM
    }
    for step in steps:
        if step.node.op != "conv":
            found -= set(step.inputs)
        elif step.node.groups > 1:
            found.discard(step.inputs[0])
    return found


def split(q: Array) -> Array:
    """Integers [O, C, ...] -> [O, 2 C, ...]: weights of either half."""
    return np.concatenate([q, np.rint(q / FINE)], 1)


def merged(values: Tensor, zero_point: int, axis: int) -> Tensor:
    """Both halves as one, in levels and floats: 2 C along the axis become C."""
    first, second = values.float().chunk(2, axis)
    return first + (second - zero_point) / FINE
