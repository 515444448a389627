"""average_logits: several teachers as one, log sum_i w_i softmax(t_i / T) in tiles of rows.

A tile of each teacher's logits is read once and added while the sum is in cache: no stack of all
teachers' logits is made. There is no derivative: teachers are constants.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid

from ._common import (
    check_choice,
    check_derivatives,
    check_floating,
    check_numbers,
    check_tensors,
    exactly,
    wide_dtype,
)
from ._features import samples_per_tile

_SPACES = ("probability", "log")


def average_logits(
    logits: Sequence[Tensor],
    weights: Sequence[float] | None = None,
    space: str = "probability",
    *,
    temperature: float = 1.0,
    independent: bool = False,
) -> Tensor:
    """T log sum_i w_i softmax(t_i / T), or T sum_i w_i log softmax(t_i / T): logits of the average.

    The arithmetic and the geometric mean of several teachers' distributions at temperature T
    (Hinton, Vinyals and Dean, 2015, arXiv:1503.02531), as logits whose softmax at T it is (the
    geometric mean is normalised there). Arithmetic is float32 (float64 where any logits are
    float64), in logarithms: what underflows as a probability is not lost.

    Args:
        logits: of each teacher, one shape, classes last; float32, float16, bfloat16 or float64.
            Classes may be masked by -inf.
        weights: w > 0 of each teacher, which are divided by their sum; alike, unless given.
        space: "probability" for the arithmetic mean, "log" for the geometric one.
        temperature: T > 0, at which the student is compared with them.
        independent: classes are not exclusive, as of several labels: the mean of
            sigmoid(t_i / T) and of 1 - sigmoid(t_i / T), as the logit of their ratio.

    Returns:
        The logits, float32 or float64, of their shape.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was given; logits
            that require grad.
    """
    name = "average_logits"
    if isinstance(logits, Tensor) or not len(logits):
        got = "one tensor" if isinstance(logits, Tensor) else "none"
        raise ValueError(f"{name}: logits: expected a list of one tensor or more, got {got}")
    given = {f"logits[{i}]": x for i, x in enumerate(logits)}
    check_tensors(name, given)
    check_derivatives(name, given, given)
    check_floating(name, given)
    check_numbers(name, {"temperature": temperature})
    check_choice(name, "space", space, _SPACES)
    shape = logits[0].shape
    for argument, x in given.items():
        if x.shape != shape or not shape:
            raise ValueError(
                f"{name}: {argument}: expected the shape of logits[0] {list(shape)}, classes last, "
                f"got {list(x.shape)}"
            )
    if not temperature > 0:
        raise ValueError(f"{name}: temperature: expected a number > 0, got {temperature}")
    shares = [1.0] * len(logits) if weights is None else [float(w) for w in weights]
    if len(shares) != len(logits) or not all(0 < w < float("inf") for w in shares):
        raise ValueError(
            f"{name}: weights: expected {len(logits)} finite numbers > 0, got {weights}"
        )
    shares = [w / sum(shares) for w in shares]
    dtype = wide_dtype(*logits)
    classes = shape[-1]
    rows = [x.detach().reshape(-1, classes) for x in logits]
    count = rows[0].shape[0]
    step = samples_per_tile(rows[0], count, classes)
    out = rows[0].new_empty((count, classes), dtype=dtype)
    with torch.no_grad(), exactly(logits[0]):
        for i in range(0, count, step):
            tile = [x[i : i + step].to(dtype) / temperature for x in rows]
            if not independent:
                mean = _mean([log_softmax(x, -1) for x in tile], shares, space)
            elif space == "log":
                mean = _mean(tile, shares, space)
            else:
                mean = _mean([logsigmoid(x) for x in tile], shares, space)
                mean = mean - _mean([logsigmoid(-x) for x in tile], shares, space)
            out[i : i + step] = mean.mul_(temperature)
    return out.view(shape)


def _mean(logarithms: Sequence[Tensor], shares: Sequence[float], space: str) -> Tensor:
    """Of a tile of each teacher: log sum_i w_i exp(x_i), or sum_i w_i x_i."""
    if space == "log":
        total = logarithms[0] * shares[0]
        for x, w in zip(logarithms[1:], shares[1:], strict=True):
            total.add_(x, alpha=w)
        return total
    total = logarithms[0] + math.log(shares[0])
    for x, w in zip(logarithms[1:], shares[1:], strict=True):
        total = torch.logaddexp(total, x + math.log(w))
    return total
