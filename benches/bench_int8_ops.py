"""int8_dwconv and int8_pwconv on MobileNetV2's and V4-Conv-Small's layers, NHWC.

Batch 256 on a GPU, 8 on a CPU. Beside them the same layer as PyTorch runs it: float (float16 on a
GPU) in channels_last, by cuDNN or oneDNN, eager and compiled with its bias and clamp, and, for the
pointwise one on a GPU, torch._int_mm with a compiled epilogue. The roof is a copy, counted on x
and y; where a layer has many channels in, arithmetic is above it (csrc/cuda says by how much).
Ours must give the bytes of the CPU's kernel, and all of them what float arithmetic gives, nearly.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vitkd_fast import functional  # noqa: F401  registers the operations

OPS = torch.ops.vitkd_fast
# side of x, channels, kernel, stride
DEPTHWISE = [
    (112, 32, 3, 1), (112, 96, 3, 2), (56, 144, 3, 1), (56, 144, 3, 2), (28, 192, 3, 1),
    (28, 192, 3, 2), (14, 384, 3, 1), (14, 576, 3, 1), (14, 576, 3, 2), (7, 960, 3, 1),
    (28, 64, 5, 1), (28, 192, 5, 2), (14, 192, 3, 1), (7, 512, 5, 1), (7, 512, 3, 1),
]  # fmt: skip
# side, channels in and out
POINTWISE = [
    (112, 32, 16), (112, 16, 96), (56, 96, 24), (56, 24, 144), (28, 144, 32), (28, 32, 192),
    (14, 64, 384), (14, 384, 64), (14, 576, 96), (7, 160, 960), (7, 960, 160), (7, 320, 1280),
    (28, 96, 64), (14, 192, 96), (7, 512, 128),
]  # fmt: skip
DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
X_ZERO = 128  # y has none: its range is a ReLU6's
CHECKED = 4  # images whose bytes the CPU forms, too


def draw(low, high, *shape, dtype, device):
    generator = torch.Generator(device).manual_seed(sum(shape))
    return torch.randint(low, high, shape, generator=generator, dtype=dtype, device=device)


def contest(race, triton_launcher, device, op, x, weight, options, floats, others=()):
    """Races int8 `op` and `floats`, the layer on floats; their channels are the last dimension."""
    taps, channels = ((0, 1), weight.shape[-1]) if op == "int8_dwconv" else (1, weight.shape[0])
    bias = draw(-1000, 1000, channels, dtype=torch.int32, device=device)
    spread = 74 * 73 * (weight.numel() / channels) ** 0.5  # of the sums
    multiplier = torch.full((channels,), 64 / spread, device=device)
    # x's zero point is in the bias, as a quantiser leaves it
    given = x, weight, bias - X_ZERO * weight.sum(taps, dtype=torch.int32), multiplier

    contenders = {"vitkd_fast": lambda: getattr(OPS, op)(*given, *options)}
    if launch := triton_launcher(op, op):
        contenders["Triton"] = lambda: launch(*given, *options)
    contenders |= {name: make(*given) for name, make in others}

    def layer(x, weight, bias):
        return floats(x, weight, bias).clamp(0, 255)

    # y in steps of its bytes: the multiplier is in the weight and in the bias
    values = x.float() - X_ZERO, weight.float() * multiplier[0], bias.float() * multiplier
    want = layer(*values)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    narrow = [v.to(dtype) for v in values]
    del values
    torch.compiler.reset()
    compiled = torch.compile(layer, dynamic=False)
    name = str(dtype).removeprefix("torch.")
    contenders[f"torch.compile {name}"] = lambda: compiled(*narrow)
    contenders[f"eager {name}"] = lambda: layer(*narrow)
    out = torch.empty_like(x)
    contenders["copy"] = lambda: out.copy_(x)

    first = CHECKED * (1 if op == "int8_dwconv" else x.shape[0] // CHECKED)
    on_cpu = [t.cpu() for t in (x[:first], *given[1:])]
    exact = getattr(OPS, op)(*on_cpu, *options)

    def check(name, contender):
        y = contender()
        if name == "copy":
            return
        assert (y.float() - want).abs().max() < 5, f"{name}: wrong"
        if y.dtype == torch.uint8:
            assert torch.equal(y[:first].cpu(), exact), f"{name}: other bytes than the CPU's"

    moved = x.numel() + want.numel()
    race(contenders, check=check, moved=moved, roof="copy", roof_moved=2 * x.numel())


def batch_of(device):
    return 256 if device.type == "cuda" else 8


@pytest.mark.parametrize("layer", DEPTHWISE, ids="{0[0]}x{0[1]} {0[2]}x{0[2]} s{0[3]}".format)
@pytest.mark.parametrize("where", DEVICES)
def bench_dwconv(race, triton_launcher, device, where, layer):
    side, channels, kernel, stride = layer
    x = draw(0, 256, batch_of(device), side, side, channels, dtype=torch.uint8, device=device)
    weight = draw(-127, 128, kernel, kernel, channels, dtype=torch.int8, device=device)
    pad = kernel // 2

    def floats(x, weight, bias):
        x, weight = x.permute(0, 3, 1, 2), weight.permute(2, 0, 1).unsqueeze(1)
        return F.conv2d(x, weight, bias, stride, pad, groups=channels).permute(0, 2, 3, 1)

    options = ((stride, stride), (pad,) * 4, X_ZERO, 0, 0, 255)
    contest(race, triton_launcher, device, "int8_dwconv", x, weight, options, floats)


@pytest.mark.parametrize("layer", POINTWISE, ids="{0[0]}x{0[1]} to {0[2]}".format)
@pytest.mark.parametrize("where", DEVICES)
def bench_pwconv(race, triton_launcher, device, where, layer):
    side, channels, out_channels = layer
    pixels = batch_of(device) * side * side
    x = draw(0, 256, pixels, channels, dtype=torch.uint8, device=device)
    weight = draw(-127, 128, out_channels, channels, dtype=torch.int8, device=device)
    others = [("torch._int_mm", int_mm)] if device.type == "cuda" else []
    contest(race, triton_launcher, device, "int8_pwconv", x, weight, (0, 0, 255), F.linear, others)


def int_mm(x, weight, bias, multiplier):
    """s8 by s8: the bytes are 128 less, and the bias has 128 sums of weights more."""
    signed = (x.int() - 128).to(torch.int8)
    bias = bias + 128 * weight.sum(1, dtype=torch.int32)

    @torch.compile(dynamic=False)
    def epilogue(acc):
        return ((acc + bias).float() * multiplier).round().clamp(0, 255).to(torch.uint8)

    return lambda: epilogue(torch._int_mm(signed, weight.T))
