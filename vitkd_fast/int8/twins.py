"""Nine bits where they pay, in an engine of eight: channels of a map that are there twice.

A channel and its twin hold v rounded a quarter of a level below and a quarter above:

    a = rne(v - 1/4), b = rne(v + 1/4), and (a + b) / 2 is v to half a level

so a quarter of the squared error is left. Who reads them has half of each weight for either, q =
ceil(q/2) + floor(q/2): no weight loses a bit, 0 stays exact, and files, engine and instruction sets
know nothing of it. It is the splitting of channels of Zhao et al. (2019, arXiv:1901.09504), done to
maps. What a depthwise convolution or an addition reads twice it writes twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .graph import Array

Twins = dict[int, Array]  # by float node, whose map it is: channels, ascending

SAVED = 0.75  # of a channel's squared error
_SAVED_TIED = 0.5  # of one that is made of twins itself, whose errors are less opposed


def choose(
    steps: Sequence[Any],
    positions: Mapping[int, int],
    costs: Mapping[int, Tensor],
    budget: float,
) -> Twins:
    """The twins that save most of the loss for their multiply-adds, until the budget is spent.

    Args:
        steps: of the whole network, in order: `quantizer.Step`.
        positions: height times width of each map.
        costs: of the rounding of each map, by channel.
        budget: multiply-adds afterwards over those before.
    """
    macs = {step.output: _weights(step) * positions[step.output] for step in steps}
    groups = _groups(steps)
    candidates: list[tuple[float, int, int]] = []  # worth, group, channel
    for number, group in enumerate(groups):
        gain = np.zeros(len(group[0][0].node.weight))
        for step, tied in group:
            gain += costs[step.output].cpu().numpy() * (_SAVED_TIED if tied else SAVED)
        # a row of each that writes them, a column of each dense one that reads them
        price = sum(macs[step.output] / len(step.node.weight) for step, _ in group)
        price += sum(
            macs[step.output] / step.node.weight.shape[1] for step in _readers(steps, group)
        )
        candidates += [(value, number, channel) for channel, value in enumerate(gain / price)]
    rows = {step.output: 1.0 for step in steps}  # with twins, over those without
    columns = dict(rows)
    most, spent = budget * sum(macs.values()), float(sum(macs.values()))
    chosen: dict[int, list[int]] = {}
    for value, number, channel in sorted(candidates, key=lambda found: -found[0]):
        group = groups[number]
        wider = {step.output: 1 / len(step.node.weight) for step, _ in group}
        deeper = {s.output: 1 / s.node.weight.shape[1] for s in _readers(steps, group)}
        more = sum(
            macs[i]
            * (
                (rows[i] + wider.get(i, 0.0)) * (columns[i] + deeper.get(i, 0.0))
                - rows[i] * columns[i]
            )
            for i in wider.keys() | deeper.keys()
        )
        if value > 0 and spent + more <= most:
            spent += more
            for i, share in wider.items():
                rows[i] += share
                chosen.setdefault(i, []).append(channel)
            for i, share in deeper.items():
                columns[i] += share
    return {output: np.array(sorted(channels)) for output, channels in chosen.items()}


def _readers(steps: Sequence[Any], group: list[tuple[Any, bool]]) -> list[Any]:
    """The dense convolutions that multiply what the group writes."""
    made = {step.output for step, _ in group}
    return [step for step in steps if step.inputs[0] in made and step.node.groups == 1]


def _groups(steps: Sequence[Any]) -> list[list[tuple[Any, bool]]]:
    """Steps whose maps have twins of the same channels or none, and whether each reads such.

    A depthwise convolution hands on the channels that it reads, and an addition those that it
    adds. Not of a map that anything but a convolution writes or reads, nor after a hard-swish,
    where an offset of the sums is none of the output.
    """
    group_of: dict[int, int] = {}
    groups: dict[int, list[tuple[Any, bool]]] = {}
    barred = {-1, steps[-1].output}
    for step in steps:
        node, output = step.node, step.output
        group_of[output] = output
        groups[output] = []
        if node.op != "conv":
            barred |= {output, *step.inputs}
            continue
        if step.activation == "hardswish":
            barred.add(output)
        tied = step.inputs if node.groups > 1 else step.inputs[1:]
        groups[output].append((step, bool(tied)))
        for source in tied:
            if source == -1:
                barred.add(output)
                continue
            old, new = group_of[source], group_of[output]
            if old != new:
                groups[new] += groups.pop(old)
                group_of = {key: new if own == old else own for key, own in group_of.items()}
    closed = {group_of.get(output, -1) for output in barred}
    return [group for number, group in groups.items() if number not in closed and group]


def _weights(step: Any) -> int:
    return step.node.weight.numel() if step.node.op == "conv" else 0


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
