"""int8_dwconv and int8_pwconv: the integer sums, then float32 operations that round once each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def int8_dwconv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    multiplier: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    x_zero_point: int,
    y_zero_point: int,
    lo: int,
    hi: int,
    hardswish_scale: float | None = None,
) -> Tensor:
    """requantise(bias + sum over taps of weight * x), each channel on its own, u8 [N, H', W', C].

    With v = float32(sum) * multiplier, or the hard-swish of that, (v * min(max(v + 3, 0), 6)) *
    hardswish_scale, the byte is clamp(rne(v) + y_zero_point, lo, hi). Each float32 operation rounds
    once. Sums must fit int32 and v must stay below 2^31, which `vitkd_fast.int8` files guarantee.

    Args:
        x: uint8 [N, H, W, C].
        weight: int8 [kh, kw, C].
        bias: int32 [C], with -zero point * (sum of the weights) in it.
        multiplier: float32 [C].
        stride: of rows and columns.
        padding: top, bottom, left, right, with the byte x_zero_point.

    Raises:
        ValueError: what `int8_dwconv_shape` raises.
    """
    _, height, width, _ = int8_dwconv_shape(
        x, weight, bias, multiplier, stride, padding, x_zero_point, y_zero_point, lo, hi,
        hardswish_scale,
    )  # fmt: skip
    top, bottom, left, right = padding
    padded = F.pad(x, (0, 0, left, right, top, bottom), value=x_zero_point).to(torch.int32)
    total = bias
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            rows = slice(i, i + (height - 1) * stride[0] + 1, stride[0])
            columns = slice(j, j + (width - 1) * stride[1] + 1, stride[1])
            total = total + padded[:, rows, columns] * weight[i, j]
    return _requantize(total, multiplier, y_zero_point, lo, hi, hardswish_scale)


def int8_pwconv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    multiplier: Tensor,
    y_zero_point: int,
    lo: int,
    hi: int,
    hardswish_scale: float | None = None,
) -> Tensor:
    """requantise(bias + x . weight^T) as int8_dwconv does it, uint8 [..., C_out].

    Args:
        x: uint8 [..., C_in].
        weight: int8 [C_out, C_in].
        bias: int32 [C_out], with -zero point * (sum of the weights) in it.
        multiplier: float32 [C_out].

    Raises:
        ValueError: what `int8_pwconv_shape` raises.
    """
    int8_pwconv_shape(x, weight, bias, multiplier, y_zero_point, lo, hi, hardswish_scale)
    # float64 holds the sums exactly, whatever their order
    total = x.double() @ weight.double().T + bias
    return _requantize(total, multiplier, y_zero_point, lo, hi, hardswish_scale)


def _requantize(
    total: Tensor, multiplier: Tensor, zero_point: int, lo: int, hi: int, k: float | None
) -> Tensor:
    v = total.float() * multiplier
    if k is not None:
        v = (v * (v + 3).clamp(0, 6)) * k
    return (v.clamp(-32768, 32767).round() + zero_point).clamp(lo, hi).to(torch.uint8)


def int8_dwconv_shape(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    multiplier: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    x_zero_point: int,
    y_zero_point: int,
    lo: int,
    hi: int,
    hardswish_scale: float | None = None,
) -> list[int]:
    """[N, H', W', C] of the result; H' = floor((H + top + bottom - kh) / stride) + 1.

    Raises:
        ValueError: an argument's dtype, shape, device or value is not as expected.
    """
    name = "int8_dwconv"
    _expect(name, "x", x, torch.uint8, "N, H, W, C")
    _expect(name, "weight", weight, torch.int8, "kh, kw, C")
    _expect_channels(name, x, weight, -1, bias, multiplier)
    _expect_range(name, y_zero_point, lo, hi, hardswish_scale)
    _expect_within(name, "x_zero_point", [x_zero_point], 0, 255)
    _expect_within(name, "map of x", x.shape[1:3], 1, 2**30)
    _expect_within(name, "kernel of weight", weight.shape[:2], 1, 31)
    _expect_within(name, "stride", stride, 1, 65535)
    _expect_within(name, "padding", padding, 0, 65535)
    top, bottom, left, right = padding
    rows = x.shape[1] + top + bottom - weight.shape[0]
    columns = x.shape[2] + left + right - weight.shape[1]
    if rows < 0 or columns < 0:
        raise ValueError(
            f"{name}: x: expected at least the kernel of weight {_shape(weight)}, got {_shape(x)} "
            f"with padding {list(padding)}"
        )
    return [x.shape[0], rows // stride[0] + 1, columns // stride[1] + 1, x.shape[3]]


def int8_pwconv_shape(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    multiplier: Tensor,
    y_zero_point: int,
    lo: int,
    hi: int,
    hardswish_scale: float | None = None,
) -> list[int]:
    """[..., C_out] of the result.

    Raises:
        ValueError: an argument's dtype, shape, device or value is not as expected.
    """
    name = "int8_pwconv"
    _expect(name, "x", x, torch.uint8, "..., C_in")
    _expect(name, "weight", weight, torch.int8, "C_out, C_in")
    _expect_channels(name, x, weight, 0, bias, multiplier)
    _expect_range(name, y_zero_point, lo, hi, hardswish_scale)
    return [*x.shape[:-1], weight.shape[0]]


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)


def _expect(name: str, argument: str, x: Tensor, dtype: torch.dtype, form: str) -> None:
    rank = form.count(",") + 1
    if x.dtype != dtype or (x.dim() < 1 if form.startswith("...") else x.dim() != rank):
        raise ValueError(
            f"{name}: {argument}: expected {str(dtype)[6:]} [{form}], got "
            f"{str(x.dtype)[6:]} {_shape(x)}"
        )


def _expect_channels(
    name: str, x: Tensor, weight: Tensor, out_dim: int, bias: Tensor, multiplier: Tensor
) -> None:
    _expect(name, "bias", bias, torch.int32, "C")
    _expect(name, "multiplier", multiplier, torch.float32, "C")
    if x.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"{name}: weight: expected the channels of x {_shape(x)}, got {_shape(weight)}"
        )
    if 0 in weight.shape:
        raise ValueError(f"{name}: weight: expected no empty dimension, got {_shape(weight)}")
    for argument, per_channel in (("bias", bias), ("multiplier", multiplier)):
        if per_channel.shape[0] != weight.shape[out_dim]:
            raise ValueError(
                f"{name}: {argument}: expected the channels of weight {_shape(weight)}, got "
                f"{_shape(per_channel)}"
            )
    for argument, other in (("weight", weight), ("bias", bias), ("multiplier", multiplier)):
        if other.device != x.device:
            raise ValueError(
                f"{name}: {argument}: expected the device of x, {x.device}, got {other.device}"
            )


def _expect_range(name: str, y_zero_point: int, lo: int, hi: int, k: float | None) -> None:
    _expect_within(name, "y_zero_point", [y_zero_point], 0, 255)
    if not 0 <= lo <= hi <= 255:
        raise ValueError(f"{name}: lo, hi: expected 0 <= lo <= hi <= 255, got {lo}, {hi}")
    if k is not None and not 1.17549435e-38 <= k <= 3.4028234e38:
        raise ValueError(
            f"{name}: hardswish_scale: expected none or a normal positive float32 number, got {k}"
        )


def _expect_within(name: str, what: str, values: Sequence[int], low: int, high: int) -> None:
    if not all(low <= value <= high for value in values):
        given = values[0] if len(values) == 1 else list(values)
        raise ValueError(f"{name}: {what}: expected {low} to {high}, got {given}")
