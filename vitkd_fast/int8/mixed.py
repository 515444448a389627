"""Which maps get more than eight bits: those that save most of the loss for their multiply-adds.

Fine maps (fine.py) are read twice, whole; twins (twins.py), channel by channel, are written twice,
too, and save less, but go through an activation and a depthwise convolution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from . import fine, twins


@dataclass(frozen=True)
class _Choice:
    """A map to be fine, or a channel of a group of maps to have a twin."""

    outputs: tuple[int, ...]
    channel: int | None  # None: fine
    gain: float
    rows: Mapping[int, float]  # share of its rows that a step has more, by output
    columns: Mapping[int, float]  # and of its columns


def choose(
    steps: Sequence[Any],
    positions: Mapping[int, int],
    costs: Mapping[int, Tensor],
    able: set[int],
    budget: float,
) -> tuple[set[int], twins.Twins]:
    """Fine maps and twins, the best for their multiply-adds first, until the budget is spent.

    Args:
        steps: of the whole network, in order: `quantizer.Step`.
        positions: height times width of each map.
        costs: of the rounding of each map, by channel.
        able: maps that may be fine, and then have no twins.
        budget: multiply-adds afterwards over those before.
    """
    macs = {step.output: _weights(step) * positions[step.output] for step in steps}
    choices = [*_fine(steps, costs, able), *_twins(steps, costs, able)]
    rows = {step.output: 1.0 for step in steps}  # with what is chosen, over those without
    columns = dict(rows)

    def price(choice: _Choice) -> float:
        return sum(
            macs[i]
            * (
                (rows[i] + choice.rows.get(i, 0.0)) * (columns[i] + choice.columns.get(i, 0.0))
                - rows[i] * columns[i]
            )
            for i in choice.rows.keys() | choice.columns.keys()
        )

    most, spent = budget * sum(macs.values()), float(sum(macs.values()))
    found: set[int] = set()
    copied: dict[int, list[int]] = {}
    for choice in sorted(choices, key=lambda choice: -choice.gain / price(choice)):
        more = price(choice)
        if choice.gain <= 0 or spent + more > most:
            continue
        spent += more
        for shares, more_shares in ((rows, choice.rows), (columns, choice.columns)):
            for i, share in more_shares.items():
                shares[i] += share
        for output in choice.outputs:
            if choice.channel is None:
                found.add(output)
            else:
                copied.setdefault(output, []).append(choice.channel)
    return found, {output: np.array(sorted(channels)) for output, channels in copied.items()}


def _fine(steps: Sequence[Any], costs: Mapping[int, Tensor], able: set[int]) -> list[_Choice]:
    choices = []
    for output in sorted(able):
        twice = {step.output: 1.0 for step in _readers(steps, {output})}
        if twice:
            gain = fine.SAVED * float(costs[output].sum())
            choices.append(_Choice((output,), None, gain, {}, twice))
    return choices


def _twins(steps: Sequence[Any], costs: Mapping[int, Tensor], able: set[int]) -> list[_Choice]:
    choices = []
    for group in _groups(steps, able):
        gain = np.zeros(len(group[0][0].node.weight))
        for step, tied in group:
            gain += costs[step.output].cpu().numpy() * (twins.SAVED_TIED if tied else twins.SAVED)
        outputs = tuple(step.output for step, _ in group)
        # a row of each that writes them, a column of each dense one that reads them
        rows = {step.output: 1 / len(step.node.weight) for step, _ in group}
        columns = {s.output: 1 / s.node.weight.shape[1] for s in _readers(steps, set(outputs))}
        choices += [
            _Choice(outputs, channel, float(value), rows, columns)
            for channel, value in enumerate(gain)
        ]
    return choices


def _readers(steps: Sequence[Any], made: set[int]) -> list[Any]:
    """The dense convolutions that multiply what is made."""
    return [step for step in steps if step.inputs[0] in made and step.node.groups == 1]


def _groups(steps: Sequence[Any], able: set[int]) -> list[list[tuple[Any, bool]]]:
    """Steps whose maps have twins of the same channels or none, and whether each reads such.

    A depthwise convolution hands on the channels that it reads, and an addition those that it
    adds. Not of a map that anything but a convolution writes or reads, nor after a hard-swish,
    where an offset of the sums is none of the output, nor of those that may be fine.
    """
    group_of: dict[int, int] = {}
    groups: dict[int, list[tuple[Any, bool]]] = {}
    barred = {-1, steps[-1].output, *able}
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
