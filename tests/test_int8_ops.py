"""int8_dwconv and int8_pwconv: the same bytes from every backend and instruction set, by ==.

The specification, reference/int8.py, is compared with loops over numpy's integers; all else with
the specification. Arguments stay within what a file guarantees: sums fit int32, sums times
multipliers stay below 2^30.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from vitkd_fast import _ops, int8, reference

from .cuda_tools import GPU, captured, needs_gpu_or_emulator

ROOT = Path(__file__).parents[1]
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


# the specification, against loops over integers


def requantized(total: int, multiplier: np.float32, finish: Finish) -> int:
    f32 = np.float32
    v = f32(total) * multiplier
    if finish.hardswish_scale is not None:
        v = (v * min(max(v + f32(3), f32(0)), f32(6))) * f32(finish.hardswish_scale)
    rounded = int(np.rint(min(max(v, f32(-32768)), f32(32767))))
    return min(max(rounded + finish.zero_point, finish.lo), finish.hi)


@pytest.mark.parametrize("finish", FINISHES.values(), ids=FINISHES)
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [((3, 3), (1, 1), (1, 1, 1, 1)), ((3, 3), (2, 2), (0, 1, 0, 1)), ((2, 5), (2, 1), (3, 0, 4, 2)),
     ((1, 1), (1, 1), (0, 0, 0, 0))],
    ids=str,
)  # fmt: skip
def test_reference_of_dwconv(
    kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, ...], finish: Finish
) -> None:
    x, weight = random_bytes(2, 5, 6, 3), random_weights(*kernel, 3)
    arguments = dwconv_arguments(x, weight, finish, stride, padding)
    bias, multiplier = arguments[2].numpy(), arguments[3].numpy()
    top, bottom, left, right = padding
    padded = np.full((2, 5 + top + bottom, 6 + left + right, 3), 77, np.int64)
    padded[:, top : top + 5, left : left + 6] = x.numpy()
    height = (padded.shape[1] - kernel[0]) // stride[0] + 1
    width = (padded.shape[2] - kernel[1]) // stride[1] + 1
    want = np.zeros((2, height, width, 3), np.uint8)
    for n, i, j, c in np.ndindex(*want.shape):
        total = int(bias[c])
        for r, q in np.ndindex(*kernel):
            byte = padded[n, i * stride[0] + r, j * stride[1] + q, c]
            total += int(byte) * int(weight[r, q, c])
        want[n, i, j, c] = requantized(total, multiplier[c], finish)
    assert np.array_equal(reference.int8_dwconv(*arguments).numpy(), want)


@pytest.mark.parametrize("finish", FINISHES.values(), ids=FINISHES)
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (7, 1), (5,)], ids=str)
def test_reference_of_pwconv(shape: tuple[int, ...], finish: Finish) -> None:
    x, weight = random_bytes(*shape), random_weights(6, shape[-1])
    arguments = pwconv_arguments(x, weight, finish)
    bias, multiplier = arguments[2].numpy(), arguments[3].numpy()
    want = np.zeros((*shape[:-1], 6), np.uint8)
    for index in np.ndindex(*shape[:-1]):
        for o in range(6):
            products = zip(x[index].tolist(), weight[o].tolist(), strict=True)
            total = int(bias[o]) + sum(a * b for a, b in products)
            want[(*index, o)] = requantized(total, multiplier[o], finish)
    assert np.array_equal(reference.int8_pwconv(*arguments).numpy(), want)


# every backend, against the specification


@every_device
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [2, 3, 5, 7])
@pytest.mark.parametrize("channels", CHANNELS)
def test_dwconv_shapes_match(channels: int, kernel: int, stride: int, device: str) -> None:
    sizes = [(1, 1), (2, 9), (3, 3), (7, 7), (8, 5), (14, 17), (17, 6)]
    finishes = list(FINISHES.values())
    for i, size in enumerate(sizes):
        x, weight = random_bytes(2, *size, channels), random_weights(kernel, kernel, channels)
        for padding in paddings(size, kernel, stride):
            finish = finishes[(i + channels + kernel) % len(finishes)]
            arguments = dwconv_arguments(
                x, weight, finish, (stride, stride), padding, x_zero_point=[0, 128, 255][i % 3]
            )
            check("int8_dwconv", *arguments, device=device)


@every_device
@pytest.mark.parametrize(
    ("shape", "kernel", "stride", "padding"),
    [
        ((1, 12, 11, 20), (1, 1), (1, 1), (0, 0, 0, 0)),
        ((2, 9, 12, 33), (3, 5), (1, 1), (1, 1, 2, 2)),
        ((2, 9, 12, 32), (5, 3), (2, 1), (2, 2, 1, 1)),
        ((1, 9, 12, 16), (3, 3), (1, 2), (1, 1, 1, 1)),
        ((1, 13, 12, 48), (3, 3), (3, 4), (1, 1, 1, 1)),
        ((1, 13, 12, 24), (5, 5), (7, 7), (2, 2, 2, 2)),
        ((1, 4, 4, 16), (3, 3), (1, 1), (5, 4, 3, 6)),
        ((1, 4, 4, 16), (5, 5), (2, 2), (9, 0, 0, 11)),
        ((1, 40, 33, 5), (31, 31), (1, 1), (3, 0, 0, 4)),
        ((1, 33, 40, 65), (31, 30), (2, 3), (15, 15, 15, 15)),
        ((1, 3, 130, 8), (3, 3), (1, 1), (1, 1, 1, 1)),
        ((1, 70, 2, 260), (5, 5), (1, 1), (2, 2, 2, 2)),
        ((5, 1, 1, 1024), (3, 3), (1, 1), (1, 1, 1, 1)),
        ((1, 112, 112, 32), (3, 3), (1, 1), (1, 1, 1, 1)),
        ((1, 112, 112, 96), (3, 3), (2, 2), (0, 1, 0, 1)),
        ((3, 28, 28, 72), (5, 5), (2, 2), (1, 2, 1, 2)),
        ((3, 7, 7, 960), (5, 5), (1, 1), (2, 2, 2, 2)),
    ],
    ids=str,
)
def test_dwconv_forms_match(
    shape: tuple[int, ...], kernel: tuple[int, int], stride: tuple[int, int],
    padding: tuple[int, ...], device: str,
) -> None:  # fmt: skip
    """Kernels and strides of two sizes, padding wider than the kernel, and layers of MobileNets."""
    x, weight = random_bytes(*shape), random_weights(*kernel, shape[3])
    for finish in (FINISHES["plain"], FINISHES["hardswish"]):
        arguments = dwconv_arguments(x, weight, finish, stride, padding)
        values = check("int8_dwconv", *arguments, device=device)
        assert values.unique().numel() > 20


@every_device
@pytest.mark.parametrize("out", CHANNELS)
@pytest.mark.parametrize("channels", [*CHANNELS, 320])
def test_pwconv_shapes_match(channels: int, out: int, device: str) -> None:
    finishes = list(FINISHES.values())
    weight = random_weights(out, channels)
    for i, pixels in enumerate([1, 2, 49, 130]):
        finish = finishes[(i + out + channels) % len(finishes)]
        arguments = pwconv_arguments(random_bytes(pixels, channels), weight, finish)
        check("int8_pwconv", *arguments, device=device)


@every_device
@pytest.mark.parametrize(
    ("shape", "out"),
    [
        ((5,), 3), ((2, 3), 4), ((2, 3, 4, 5, 6), 7), ((3, 7, 7, 960), 160), ((1, 1280), 1000),
        ((2, 28, 28, 24), 144), ((1, 56, 56, 16), 16), ((4500, 20), 40), ((1, 14, 14, 2000), 70),
    ],
    ids=str,
)  # fmt: skip
def test_pwconv_forms_match(shape: tuple[int, ...], out: int, device: str) -> None:
    """Any leading dimensions, more pixels than a thread's share, and layers of MobileNets."""
    x, weight = random_bytes(*shape), random_weights(out, shape[-1])
    for finish in (FINISHES["plain"], FINISHES["hardswish"]):
        check("int8_pwconv", *pwconv_arguments(x, weight, finish), device=device)


@every_device
@pytest.mark.parametrize("name", FINISHES)
@pytest.mark.parametrize("channels", [16, 19, 64])
def test_finishes_match(channels: int, name: str, device: str) -> None:
    x = random_bytes(2, 9, 8, channels)
    weight = random_weights(3, 3, channels)
    arguments = dwconv_arguments(x, weight, FINISHES[name], padding=(1, 1, 1, 1))
    check("int8_dwconv", *arguments, device=device)
    arguments = pwconv_arguments(x, random_weights(48, channels), FINISHES[name])
    check("int8_pwconv", *arguments, device=device)


@every_device
@pytest.mark.parametrize("channels", [8, 17, 64, 144])
def test_extreme_sums_match(channels: int, device: str) -> None:
    """255 by +-127 and the widest bias: nothing saturates on the way to int32."""
    shape = (1, 6, 5, channels)
    weight = torch.full((3, 3, channels), 127, dtype=torch.int8)
    dense = torch.full((24, channels), 127, dtype=torch.int8)
    weight[..., 1::2] = -127
    dense[1::2] = -127
    dense[5::4, ::2] = 127
    for x in (torch.full(shape, 255, dtype=torch.uint8), random_bytes(*shape) // 128 * 255):
        for bias, m in ((0, 0.0009), (2**30, 1e-7), (-(2**30), 1e-7), (12345, 3e-9)):
            for scale in (None, 40.0):
                finish = (128, 1, 254, scale)
                arguments = (torch.full((channels,), bias).int(), torch.full((channels,), m))
                check(
                    "int8_dwconv", x, weight, *arguments, (1, 1), (1, 1, 1, 1), 255, *finish,
                    device=device,
                )  # fmt: skip
                arguments = (torch.full((24,), bias).int(), torch.full((24,), m))
                check("int8_pwconv", x, dense, *arguments, *finish, device=device)


@every_device
@pytest.mark.parametrize("zero_point", [0, 1, 128, 255])
def test_ties_match(zero_point: int, device: str) -> None:
    """Halves round to the even neighbour, before the zero point is added."""
    channels = 40
    x = torch.arange(256, dtype=torch.uint8).repeat(channels, 1).T.reshape(1, 16, 16, channels)
    one = torch.ones(1, 1, channels, dtype=torch.int8)
    dense = torch.eye(channels, dtype=torch.int8)
    bias = torch.arange(channels, dtype=torch.int32) * 13 - 380
    for m in (0.5, 1.5, 0.25, 0.75, 2.5):
        finish = (zero_point, 0, 255)
        constants = (bias, torch.full((channels,), m))
        arguments = (x, one, *constants, (1, 1), (0, 0, 0, 0), 0, *finish)
        first = check("int8_dwconv", *arguments, device=device)
        second = check("int8_pwconv", x, dense, *constants, *finish, device=device)
        assert torch.equal(first, second)


@every_device
@pytest.mark.parametrize("scale", [None, 1.0], ids=["plain", "hardswish"])
def test_any_multiplier_matches(scale: float | None, device: str) -> None:
    """From the smallest normal number to where the largest sum comes to just under 2^30."""
    channels = 16
    x, weight = random_bytes(1, 5, 5, channels), random_weights(3, 3, channels)
    dense = random_weights(channels, channels)
    exponents = torch.linspace(-126, 7 if scale is None else 0, channels)
    multiplier = 2.0**exponents
    multiplier[0] = torch.finfo(torch.float32).smallest_normal
    bias = torch.randint(-500_000, 500_000, (channels,), dtype=torch.int32)
    finish = (100, 0, 255, scale)
    arguments = (x, weight, bias, multiplier, (1, 1), (1, 1, 1, 1), 3, *finish)
    check("int8_dwconv", *arguments, device=device)
    check("int8_pwconv", x, dense, bias, multiplier, *finish, device=device)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {  # of [2, 7, 6, 24]
    "channels_last": lambda x: x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
    "every_other_pixel": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    "some_channels": lambda x: torch.cat([x, x, x], -1)[..., 24:48],
    "cropped": lambda x: torch.cat([x, x], 1)[:, 3:10],
    "expanded": lambda x: x[:1].expand(2, -1, -1, -1),
    "offset_by_1": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "offset_by_4": lambda x: torch.cat([x.new_zeros(4), x.flatten()])[4:].view(x.shape),
    "offset_by_8": lambda x: torch.cat([x.new_zeros(8), x.flatten()])[8:].view(x.shape),
}


@every_device
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_match(layout: str, device: str) -> None:
    """Of x, and of the weights alike."""
    x = LAYOUTS[layout](random_bytes(2, 7, 6, 24).to(device))
    plain = x.cpu().contiguous()
    for weights in (False, True):
        weight, dense = random_weights(3, 3, 24), random_weights(31, 24)
        arguments = dwconv_arguments(plain, weight, padding=(1, 1, 1, 1))
        dense_arguments = pwconv_arguments(plain, dense)
        given, dense_given = to(device, arguments), to(device, dense_arguments)
        given[0] = dense_given[0] = x
        if weights:
            offset = torch.cat([weight.new_zeros(3), weight.flatten()])[3:].view(3, 3, 24)
            given[1], dense_given[1] = offset.to(device), dense.T.contiguous().T.to(device)
            given[2:4] = [c.repeat_interleave(2)[::2] for c in given[2:4]]
        got = OPS.int8_dwconv(*given).cpu()
        assert torch.equal(got, reference.int8_dwconv(*arguments))
        got = OPS.int8_pwconv(*dense_given).cpu()
        assert torch.equal(got, reference.int8_pwconv(*dense_arguments))


@every_device
def test_empty_batch_matches(device: str) -> None:
    weight, dense = random_weights(3, 3, 8), random_weights(5, 8)
    arguments = dwconv_arguments(random_bytes(0, 6, 7, 8), weight, stride=(2, 2))
    assert check("int8_dwconv", *arguments, device=device).shape == (0, 2, 3, 8)
    for shape in ((0, 6, 7, 8), (3, 0, 8), (0, 8)):
        arguments = pwconv_arguments(random_bytes(*shape), dense)
        assert check("int8_pwconv", *arguments, device=device).shape == (*shape[:-1], 5)


@every_device
def test_same_bytes_for_any_threads(device: str) -> None:
    x, weight, dense = random_bytes(9, 30, 31, 40), random_weights(3, 3, 40), random_weights(72, 40)
    calls = [
        (OPS.int8_dwconv, to(device, dwconv_arguments(x, weight, padding=(1, 1, 1, 1)))),
        (OPS.int8_pwconv, to(device, pwconv_arguments(x, dense))),
    ]
    before = torch.get_num_threads()
    try:
        for op, arguments in calls:
            results = []
            for count in (1, 2, 2, 3):
                torch.set_num_threads(count)
                results.append(op(*arguments))
            assert all(torch.equal(results[0], other) for other in results[1:])
    finally:
        torch.set_num_threads(before)


def test_depthwise_of_one_tap_is_a_diagonal_pointwise() -> None:
    x, weight = random_bytes(2, 5, 4, 33), random_weights(1, 1, 33)
    _, _, *constants = dwconv_arguments(x, weight)
    bias, multiplier, _, _, _, *finish = constants
    dense = torch.diag(weight.flatten())
    want = OPS.int8_pwconv(x, dense, bias, multiplier, *finish)
    assert torch.equal(OPS.int8_dwconv(x, weight, *constants), want)


# errors


X, WEIGHT = torch.zeros(2, 5, 6, 8, dtype=torch.uint8), torch.zeros(3, 3, 8, dtype=torch.int8)
DENSE = torch.zeros(4, 8, dtype=torch.int8)
GOOD: dict[str, Any] = {
    "x": X, "weight": WEIGHT, "bias": torch.zeros(8, dtype=torch.int32),
    "multiplier": torch.ones(8), "stride": [1, 1], "padding": [1, 1, 1, 1], "x_zero_point": 0,
    "y_zero_point": 0, "lo": 0, "hi": 255, "hardswish_scale": None,
}  # fmt: skip
GOOD_DENSE = {k: v for k, v in GOOD.items() if k not in ("stride", "padding", "x_zero_point")} | {
    "weight": DENSE, "bias": torch.zeros(4, dtype=torch.int32), "multiplier": torch.ones(4),
}  # fmt: skip
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"x": X.float()}, r"x is \w+ \[2, 5, 6, 8\]; accepted: \w+ \["),
    ({"weight": WEIGHT.int()}, r"weight is \w+ \[3, 3, 8\]; accepted: \w+ \[kh, kw, C\]"),
    ({"weight": DENSE}, r"weight is \w+ \[4, 8\]; accepted: \w+ \[kh, kw, C\]"),
    ({"x": X[0]}, r"x is \w+ \[5, 6, 8\]; accepted: \w+ \[N, H, W, C\]"),
    ({"bias": torch.zeros(8)}, r"bias is \w+ \[8\]; accepted: \w+ \[C\]"),
    ({"multiplier": torch.zeros(8).double()}, r"multiplier is \w+ \[8\]; accepted: \w+ \[C\]"),
    ({"multiplier": torch.ones(())}, r"multiplier is \w+ \[\]; accepted: \w+ \[C\]"),
    (
        {"weight": WEIGHT[..., :7]},
        r"x \[2, 5, 6, 8\] and weight \[3, 3, 7\] differ in channels",
    ),
    (
        {"bias": torch.zeros(7, dtype=torch.int32)},
        r"bias \[7\] and weight \[3, 3, 8\] differ in channels",
    ),
    (
        {"multiplier": torch.zeros(9)},
        r"multiplier \[9\] and weight \[3, 3, 8\] differ in channels",
    ),
    ({"weight": WEIGHT[:0]}, r"weight \[0, 3, 8\] is empty"),
    ({"x": X[:, :0]}, r"the map of x is \[0, 6\]; accepted: 1 to"),
    ({"weight": torch.zeros(32, 3, 8).char()}, r"the kernel of weight is .*; accepted: 1 to 31"),
    ({"stride": [0, 1]}, r"stride is \[0, 1\]; accepted: 1 to"),
    ({"padding": [1, 1, -1, 1]}, r"padding is \[1, 1, -1, 1\]; accepted: 0 to"),
    (
        {"padding": [0, 0, 0, 0], "weight": torch.zeros(6, 3, 8).char()},
        r"x \[2, 5, 6, 8\] with padding \[0, 0, 0, 0\] is smaller than the kernel of weight \[6,",
    ),
    ({"x_zero_point": 256}, r"x_zero_point is \[?256\]?; accepted: 0 to 255"),
    ({"y_zero_point": -1}, r"y_zero_point is \[?-1\]?; accepted: 0 to 255"),
    ({"lo": 9, "hi": 8}, r"lo is 9 and hi is 8; accepted: 0 <= lo <= hi <= 255"),
    ({"hi": 256}, r"lo is 0 and hi is 256; accepted"),
    ({"lo": -1}, r"lo is -1 and hi is 255; accepted"),
    *(
        ({"hardswish_scale": k}, r"hardswish_scale is .*; accepted: none, or a normal positive")
        for k in (0.0, -1.0, float("inf"), float("nan"), 1e-40, 1e39)
    ),
]
WRONG_DENSE: list[tuple[dict[str, Any], str]] = [
    ({"weight": WEIGHT}, r"weight is \w+ \[3, 3, 8\]; accepted: \w+ \[C_out, C_in\]"),
    ({"x": torch.zeros((), dtype=torch.uint8)}, r"x is \w+ \[\]; accepted: \w+ \[\.\.\., C_in\]"),
    ({"weight": DENSE[:, :7]}, r"x \[2, 5, 6, 8\] and weight \[4, 7\] differ in channels"),
    ({"bias": torch.zeros(8).int()}, r"bias \[8\] and weight \[4, 8\] differ in channels"),
    ({"weight": DENSE[:0]}, r"weight \[0, 8\] is empty"),
    ({"lo": 9, "hi": 8}, r"lo is 9 and hi is 8; accepted: 0 <= lo <= hi <= 255"),
    ({"hardswish_scale": -1.0}, r"hardswish_scale is .*; accepted: none, or a normal positive"),
]
EVERY_ERROR = [
    *(("int8_dwconv", GOOD | wrong, message) for wrong, message in WRONG),
    *(("int8_pwconv", GOOD_DENSE | wrong, message) for wrong, message in WRONG_DENSE),
]


@pytest.mark.parametrize(("op", "arguments", "message"), EVERY_ERROR)
def test_errors_name_the_argument(op: str, arguments: dict[str, Any], message: str) -> None:
    """In the same words from the reference, the operation and its fake."""
    getattr(OPS, op)(**(GOOD if op == "int8_dwconv" else GOOD_DENSE))
    with pytest.raises(ValueError, match=f"^{op}: {message}"):
        getattr(reference, op)(**arguments)
    with pytest.raises((ValueError, RuntimeError), match=f"{op}: {message}"):
        getattr(OPS, op)(**arguments)
    meta = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match=f"^{op}: {message}"):
        getattr(OPS, op)(**meta)


@every_device
@pytest.mark.parametrize(
    ("op", "wrong", "message"),
    [("int8_dwconv", *WRONG[i]) for i in (0, 2, 7, 9, 13, 15, 16, 18, 21)]
    + [("int8_pwconv", *x) for x in WRONG_DENSE],
)
def test_errors_on_every_device(op: str, wrong: dict[str, Any], message: str, device: str) -> None:
    arguments = (GOOD if op == "int8_dwconv" else GOOD_DENSE) | wrong
    arguments = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    with pytest.raises((ValueError, RuntimeError), match=message):
        getattr(OPS, op)(**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["weight", "bias", "multiplier"])
def test_tensors_on_different_devices(name: str) -> None:
    for op, good in (("int8_dwconv", GOOD), ("int8_pwconv", GOOD_DENSE)):
        on_gpu = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in good.items()}
        with pytest.raises((ValueError, RuntimeError), match=f"{op}: {name} is on .*accepted"):
            getattr(OPS, op)(**on_gpu | {name: good[name]})


# torch.library and torch.compile


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


@every_device
def test_opcheck(device: str) -> None:
    """Schema, fake, autograd registration and AOT dispatch, by torch's own checks."""
    for op, arguments in samples(device):
        results = torch.library.opcheck(getattr(OPS, op).default, tuple(arguments))
        assert set(results.values()) == {"SUCCESS"}
        assert len(results) == 4


def test_one_number_stands_for_each_direction() -> None:
    arguments = dwconv_arguments(random_bytes(1, 6, 6, 8), random_weights(3, 3, 8))
    want = OPS.int8_dwconv(*arguments[:4], [2, 2], [1, 1, 1, 1], *arguments[6:])
    assert torch.equal(OPS.int8_dwconv(*arguments[:4], 2, 1, *arguments[6:]), want)


@pytest.fixture
def compiled() -> Iterator[Callable[..., Callable[..., Tensor]]]:
    torch._dynamo.reset()
    yield partial(torch.compile, fullgraph=True)
    torch._dynamo.reset()


def two_layers(x: Tensor, dwconv: Sequence[Any], pwconv: Sequence[Any]) -> Tensor:
    return OPS.int8_pwconv(OPS.int8_dwconv(x, *dwconv), *pwconv)


def layers(device: str) -> tuple[Sequence[Any], Sequence[Any]]:
    x = random_bytes(1, 9, 9, 16)
    first = dwconv_arguments(x, random_weights(3, 3, 16), stride=(2, 2), padding=(1, 1, 1, 1))
    second = pwconv_arguments(x, random_weights(24, 16), FINISHES["hardswish"])
    return to(device, first)[1:], to(device, second)[1:]


@every_device
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool, device: str, compiled: Callable) -> None:
    function = compiled(two_layers, backend="aot_eager", dynamic=dynamic)
    both = layers(device)
    for shape in ((2, 9, 8, 16), (3, 14, 14, 16)):
        x = random_bytes(*shape).to(device)
        assert torch.equal(function(x, *both), two_layers(x, *both))


@every_device
def test_compile_once_for_all_shapes(device: str, compiled: Callable) -> None:
    function = compiled(two_layers, backend="aot_eager")
    both = layers(device)
    for shape in ((2, 9, 8, 16), (3, 14, 15, 16), (5, 4, 33, 16)):
        x = random_bytes(*shape).to(device)
        for dim in range(3):
            torch._dynamo.mark_dynamic(x, dim)
        with torch.compiler.set_stance("default" if shape[0] == 2 else "fail_on_recompile"):
            given = function(x, *both)
        assert torch.equal(given, two_layers(x, *both))


@every_device
def test_compile_with_inductor(device: str, compiled: Callable) -> None:
    """Among other operations, which inductor fuses and ours does not disturb."""
    both = layers(device)

    def function(x: Tensor) -> Tensor:
        return two_layers(255 - x, *both).float() * 0.5 + 1

    x = random_bytes(2, 9, 8, 16).to(device)
    assert torch.equal(compiled(function)(x), function(x))


# instruction sets and backends, each in a process of its own


def python(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code outside the checkout."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("VITKD_FAST_")}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd, env=kept | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def assert_matches_again(cwd: Path, marked: str, **environment: str) -> None:
    arguments = [__file__, "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-q"]
    arguments += ["--tb=line", "-p", "no:cacheprovider", "-k", "match", "-m", marked]
    code = f"import sys, pytest; sys.exit(pytest.main({arguments!r}))"
    result = python(code, cwd, **environment)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert " passed" in result.stdout


@pytest.mark.parametrize("isa", int8.isa()[1:])
def test_every_instruction_set(isa: str, tmp_path: Path) -> None:
    """The best one ran the tests above."""
    assert_matches_again(tmp_path, "not gpu", VITKD_FAST_ISA=isa)


@pytest.mark.parametrize(
    "backend", ["reference", pytest.param("triton", marks=pytest.mark.triton), "cuda"]
)
@pytest.mark.gpu
def test_backends_on_a_gpu(backend: str, tmp_path: Path) -> None:
    """Each that this build has, also those that another one usually stands in for."""
    name = {"reference": "reference", "triton": "Triton", "cuda": "CUDA C++"}[backend]
    if name == _ops.backends()["int8_dwconv"]["CUDA"]:
        pytest.skip(f"the tests above ran on {name}")
    code = "from vitkd_fast import _ops; print({on['CUDA'] for on in _ops.backends().values()})"
    served = python(code, tmp_path, VITKD_FAST_BACKEND=backend)
    if backend == "cuda" and "has no CUDA C++ kernel in this build" in served.stderr:
        pytest.skip("the extension was built without CUDA")
    if backend == "triton":
        pytest.importorskip("triton")
    assert served.stdout == f"{{{name!r}}}\n", served.stderr
    assert_matches_again(tmp_path, "gpu", VITKD_FAST_BACKEND=backend)


# what only a GPU has


@pytest.mark.gpu
def test_cuda_graph() -> None:
    """Replayed, while the pixels change."""
    both = layers("cuda")
    x = random_bytes(4, 9, 8, 16).cuda()
    graph, y = captured(lambda: two_layers(x, *both))
    for _ in range(3):
        x.copy_(random_bytes(*x.shape))
        graph.replay()
        assert torch.equal(y, two_layers(x, *both))


@pytest.mark.gpu
def test_no_host_synchronisation() -> None:
    calls = samples("cuda")
    for op, arguments in calls:
        getattr(OPS, op)(*arguments)  # compiles and loads what may synchronise the first time
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for op, arguments in calls:
            getattr(OPS, op)(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.gpu
def test_on_a_stream_of_its_own() -> None:
    """The current stream is used, after what is queued there."""
    both = layers("cuda")
    x = random_bytes(64, 30, 30, 16).cuda()
    want = two_layers(x, *both)
    late = torch.zeros_like(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        given = two_layers(late, *both)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(given, want)


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [24, 17])
def test_offsets_beyond_int32(channels: int) -> None:
    """2^31 bytes and a bit: the last images are where they belong."""
    batch, size = 2**31 // (64 * 64 * channels) + 3, 64
    if torch.cuda.mem_get_info()[0] < 4 * batch * size * size * channels:
        pytest.skip("needs 9 GiB of GPU memory")
    x = torch.zeros(batch, size, size, channels, dtype=torch.uint8, device="cuda")
    ends = random_bytes(2, size, size, channels)
    x[:1], x[-1:] = ends[:1].cuda(), ends[1:].cuda()
    weight, dense = random_weights(3, 3, channels), random_weights(channels, channels)
    for op, (_, *rest) in (
        ("int8_dwconv", dwconv_arguments(ends, weight, padding=(1, 1, 1, 1))),
        ("int8_pwconv", pwconv_arguments(ends, dense)),
    ):
        y = getattr(OPS, op)(x, *to("cuda", rest))
        want = getattr(reference, op)(ends, *rest)
        assert torch.equal(torch.cat([y[:1], y[-1:]]).cpu(), want)
        assert (y[1:-1] == y[1]).all()


@needs_gpu_or_emulator
class TestSanitize:
    """Every way through the kernels once, small enough for compute-sanitizer."""

    @pytest.mark.parametrize("channels", [3, 8, 20, 64, 260])
    def test_dwconv(self, channels: int) -> None:
        for kernel, stride in product((1, 3, 5), (1, 2)):
            x, weight = random_bytes(2, 7, 9, channels), random_weights(kernel, kernel, channels)
            for padding in paddings((7, 9), kernel, stride):
                arguments = dwconv_arguments(x, weight, stride=(stride, stride), padding=padding)
                check("int8_dwconv", *arguments, device=GPU)

    @pytest.mark.parametrize("channels", [3, 4, 8, 16, 33, 96, 1280])
    def test_pwconv(self, channels: int) -> None:
        for out, pixels in product((5, 16, 24, 48, 64, 130), (1, 150)):
            arguments = pwconv_arguments(
                random_bytes(pixels, channels), random_weights(out, channels)
            )
            check("int8_pwconv", *arguments, device=GPU)
