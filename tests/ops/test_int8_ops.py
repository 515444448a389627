"""int8_dwconv and int8_pwconv: the same bytes from every backend and instruction set, by ==.

The specification, reference/int8.py, is compared with loops over numpy's integers; all else with
the specification. Arguments stay within what a file guarantees: sums fit int32, sums times
multipliers stay below 2^30.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from support.int8_ops_tools import (
    CHANNELS,
    FINISHES,
    OPS,
    Finish,
    check,
    dwconv_arguments,
    every_device,
    layers,
    paddings,
    pwconv_arguments,
    random_bytes,
    random_weights,
    samples,
    to,
    two_layers,
)
from vitkd_fast import reference

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


@pytest.mark.every_isa
@pytest.mark.emulated(channels=[24, 40])
@pytest.mark.interpreted(channels=[17, 24], kernel=[2, 3], stride=[2])
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


SMALL_FORMS = [  # of dwconv: shape, kernel, stride, padding
    ((1, 12, 11, 20), (1, 1), (1, 1), (0, 0, 0, 0)),
    ((2, 9, 12, 33), (3, 5), (1, 1), (1, 1, 2, 2)),
    ((2, 9, 12, 32), (5, 3), (2, 1), (2, 2, 1, 1)),
    ((1, 9, 12, 16), (3, 3), (1, 2), (1, 1, 1, 1)),
    ((1, 13, 12, 48), (3, 3), (3, 4), (1, 1, 1, 1)),
    ((1, 13, 12, 24), (5, 5), (7, 7), (2, 2, 2, 2)),
    ((1, 4, 4, 16), (3, 3), (1, 1), (5, 4, 3, 6)),
    ((1, 4, 4, 16), (5, 5), (2, 2), (9, 0, 0, 11)),
    ((1, 3, 130, 8), (3, 3), (1, 1), (1, 1, 1, 1)),
]
FORMS = [
    *SMALL_FORMS,
    ((1, 40, 33, 5), (31, 31), (1, 1), (3, 0, 0, 4)),
    ((1, 33, 40, 65), (31, 30), (2, 3), (15, 15, 15, 15)),
    ((1, 70, 2, 260), (5, 5), (1, 1), (2, 2, 2, 2)),
    ((5, 1, 1, 1024), (3, 3), (1, 1), (1, 1, 1, 1)),
    ((1, 112, 112, 32), (3, 3), (1, 1), (1, 1, 1, 1)),
    ((1, 112, 112, 96), (3, 3), (2, 2), (0, 1, 0, 1)),
    ((3, 28, 28, 72), (5, 5), (2, 2), (1, 2, 1, 2)),
    ((3, 7, 7, 960), (5, 5), (1, 1), (2, 2, 2, 2)),
]


@pytest.mark.every_isa
@pytest.mark.emulated
@pytest.mark.interpreted(shape=[form[0] for form in SMALL_FORMS])
@every_device
@pytest.mark.parametrize(("shape", "kernel", "stride", "padding"), FORMS, ids=str)
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


@pytest.mark.every_isa
@pytest.mark.emulated
@pytest.mark.interpreted(channels=[17, 24], out=[40, 72])
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


@pytest.mark.every_isa
@pytest.mark.emulated
@pytest.mark.interpreted(out=[3, 4, 7])
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


@pytest.mark.every_isa
@pytest.mark.interpreted(channels=[19])
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


@pytest.mark.every_isa
@pytest.mark.emulated
@pytest.mark.interpreted(channels=[17])
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


@pytest.mark.every_isa
@pytest.mark.emulated
@pytest.mark.interpreted
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


@pytest.mark.every_isa
@pytest.mark.interpreted
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


@pytest.mark.every_isa
@pytest.mark.interpreted
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


@pytest.mark.every_isa
@pytest.mark.interpreted
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


# torch.library and torch.compile


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


@pytest.mark.emulated(dynamic=[False])
@every_device
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool, device: str, compiled: Callable) -> None:
    function = compiled(two_layers, dynamic=dynamic)
    both = layers(device)
    for shape in ((2, 9, 8, 16), (3, 14, 14, 16)):
        x = random_bytes(*shape).to(device)
        assert torch.equal(function(x, *both), two_layers(x, *both))


@every_device
def test_compile_once_for_all_shapes(device: str, compiled: Callable) -> None:
    function = compiled(two_layers)
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
    assert torch.equal(compiled(function, backend="inductor")(x), function(x))
