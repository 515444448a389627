"""Nine bits where they pay, in an engine of eight: channels of a map that are there twice.

A channel and its twin hold v rounded a quarter of a level below and a quarter above:

    a = rne(v - 1/4), b = rne(v + 1/4), and (a + b) / 2 is v to half a level

so a quarter of the squared error is left. Who reads them has half of each weight for either, q =
ceil(q/2) + floor(q/2): no weight loses a bit, 0 stays exact, and files, engine and instruction sets
know nothing of it. It is the splitting of channels of Zhao et al. (2019, arXiv:1901.09504), done to
maps. What a depthwise convolution or an addition reads twice it writes twice.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .graph import Array

Twins = dict[int, Array]  # by float node, whose map it is: channels, ascending

SAVED = 0.75  # of a channel's squared error
SAVED_TIED = 0.5  # of one that is made of twins itself, whose errors are less opposed


def with_twins(values: Array, twins: Array | None) -> Array:
    """[C, ...] -> [C + T, ...]: the channels that are there twice once more, at the end."""
    return values if twins is None else np.concatenate([values, values[twins]])


def split(q: Array, twins: Array | None) -> Array:
    """Integers [O, C, ...] -> [O, C + T, ...], halved between a channel and its twin."""
    if twins is None:
        return q
    half = np.floor(q[:, twins] / 2)
    first = q.copy()
    first[:, twins] -= half
    return np.concatenate([first, half], 1)


def offsets(channels: int, twins: Array | None) -> Array:
    """[C + T], in levels: what is added before the rounding."""
    if twins is None:
        return np.zeros(channels)
    result = np.zeros(channels + len(twins))
    result[twins], result[channels:] = -0.25, 0.25
    return result


def merged(values: Tensor, twins: Array | None, axis: int) -> Tensor:
    """A channel and its twin as their mean, in floats: C + T along the axis become C."""
    if twins is None:
        return values
    index = torch.from_numpy(twins).to(values.device)
    sizes = values.shape[axis] - len(twins), len(twins)
    first, second = values.to(torch.promote_types(values.dtype, torch.float32)).split(sizes, axis)
    return first.index_add(axis, index, (second - first.index_select(axis, index)) / 2)
