"""int8_dwconv and int8_pwconv in tests: what to call them with, and the check of their bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from vitkd_fast import reference

OPS = torch.ops.vitkd_fast
every_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
)
CHANNELS = [1, 3, 8, 16, 17, 24, 40, 64, 72, 100, 144]


class Finish(NamedTuple):
    """What follows the sums. The defaults clamp so that memory left unwritten (255) shows."""

    zero_point: int = 9
    lo: int = 3
    hi: int = 250
    hardswish_scale: float | None = None


PLAIN = Finish()
FINISHES = {
    "plain": PLAIN,
    "relu": Finish(0, 0, 255),
    "relu6": Finish(0, 0, 214),
    "zero_point": Finish(128, 0, 255),
    "top": Finish(255, 0, 255),
    "narrow": Finish(100, 99, 101),
    "hardswish": Finish(20, 0, 255, 13.7),
}


def random_bytes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def random_weights(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def constants(weight: Tensor, out_dim: int, finish: Finish) -> tuple[Tensor, Tensor]:
    """Bias and multiplier that centre the sums of random bytes and spread them over a byte."""
    others = [i for i in range(weight.dim()) if i != out_dim]
    sums = weight.long().sum(others)
    deviation = (weight.double() ** 2).sum(others).sqrt().clamp(min=1) * 74
    bias = -128 * sums + torch.randint(-999, 1000, sums.shape)
    spread = 60 if finish.hardswish_scale is None else 2
    return bias.int(), (spread / deviation * (0.5 + torch.rand(sums.shape))).float()


def dwconv_arguments(
    x: Tensor, weight: Tensor, finish: Finish = PLAIN, stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0), x_zero_point: int = 77,
) -> tuple[Any, ...]:  # fmt: skip
    bias, multiplier = constants(weight, 2, finish)
    return (x, weight, bias, multiplier, stride, padding, x_zero_point, *finish)


def pwconv_arguments(x: Tensor, weight: Tensor, finish: Finish = PLAIN) -> tuple[Any, ...]:
    return (x, weight, *constants(weight, 0, finish), *finish)


def paddings(size: Sequence[int], kernel: int, stride: int) -> list[tuple[int, int, int, int]]:
    """None, symmetric, and TensorFlow's SAME: top, bottom, left, right."""
    same = [max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in size]
    halves = [half for total in same for half in (total // 2, total - total // 2)]
    every = [(0, 0, 0, 0), (kernel // 2,) * 4, (halves[0], halves[1], halves[2], halves[3])]
    fits = [p for p in every if size[0] + p[0] + p[1] >= kernel and size[1] + p[2] + p[3] >= kernel]
    return sorted(set(fits))


def to(device: str, arguments: Sequence[Any]) -> list[Any]:
    return [a.to(device) if isinstance(a, Tensor) else a for a in arguments]


def check(op: str, *arguments: Any, device: str) -> Tensor:
    """The operation on `device` against the specification; returns its bytes."""
    want = getattr(reference, op)(*arguments)
    given = getattr(OPS, op)(*to(device, arguments))
    assert (given.dtype, given.shape) == (torch.uint8, want.shape)
    assert given.is_contiguous()
    assert given.device.type == device
    given = given.cpu()
    off = given != want
    assert not off.any(), (
        f"{off.sum()} of {off.numel()} bytes differ, the first at {off.nonzero()[0].tolist()}: "
        f"{given[off][:5].tolist()}, not {want[off][:5].tolist()}; {arguments[4:]}"
    )
    return want


# what more than one file takes


def samples(device: str) -> list[tuple[str, list[Any]]]:
    x = random_bytes(2, 7, 6, 24)
    weight, dense = random_weights(3, 3, 24), random_weights(9, 24)
    return [
        (op, to(device, arguments))
        for finish in (FINISHES["plain"], FINISHES["hardswish"])
        for op, arguments in (
            ("int8_dwconv", dwconv_arguments(x, weight, finish, [2, 1], [0, 1, 2, 1])),
            ("int8_pwconv", pwconv_arguments(x, dense, finish)),
            ("int8_pwconv", pwconv_arguments(x[0, 0, ::2], dense, finish)),
        )
    ]


def two_layers(x: Tensor, dwconv: Sequence[Any], pwconv: Sequence[Any]) -> Tensor:
    return OPS.int8_pwconv(OPS.int8_dwconv(x, *dwconv), *pwconv)


def layers(device: str) -> tuple[Sequence[Any], Sequence[Any]]:
    x = random_bytes(1, 9, 9, 16)
    first = dwconv_arguments(x, random_weights(3, 3, 16), stride=(2, 2), padding=(1, 1, 1, 1))
    second = pwconv_arguments(x, random_weights(24, 16), FINISHES["hardswish"])
    return to(device, first)[1:], to(device, second)[1:]
