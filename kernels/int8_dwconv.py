"""Depthwise int8 convolution in Triton: y = requantise(bias + sum over taps of weight * x), NHWC.

A program owns BLOCK_W neighbouring pixels of one output row and BLOCK_C channels; lanes run over
channels, so that loads are wide. Of the kh * kw reads of a byte, all but one find it in L1 or L2.
Sums are int32; what follows is float32, each operation rounded once (no fused ones): see
reference.int8_dwconv.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import int8_dwconv_shape
from .int8_pwconv import requantize


@triton.jit(
    do_not_specialize=[
        "height", "width", "out_height", "out_width", "stride_h", "stride_w", "top", "left",
        "x_zero_point", "y_zero_point", "lo", "hi",
    ]
)  # fmt: skip
def _int8_dwconv_kernel(
    y_ptr, x_ptr,  # [batch, out_height, out_width, C], [batch, height, width, C]
    weight_ptr, bias_ptr, multiplier_ptr,  # [KH, KW, C], [C], [C]
    height, width, out_height, out_width, C, stride_h, stride_w, top, left,
    x_zero_point, y_zero_point, lo, hi, hardswish_scale,
    HARDSWISH: tl.constexpr, ALIGN: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # tells the compiler what holds anyway: wide loads need it
    C = C // ALIGN * ALIGN
    out_row = tl.program_id(0).to(tl.int64)  # of all images
    blocks_c = tl.cdiv(C, BLOCK_C)
    c = tl.program_id(1) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    out_column = tl.program_id(1) // blocks_c * BLOCK_W + tl.arange(0, BLOCK_W)
    live_c = c < C
    first_row = (out_row % out_height).to(tl.int32) * stride_h - top
    x_ptr += (out_row // out_height) * height * width * C
    total = tl.zeros([BLOCK_W, BLOCK_C], tl.int32)
    for i in range(KH):
        row = first_row + i
        # a row outside has no columns
        reach = tl.where((row >= 0) & (row < height), width, 0)
        row_ptr = x_ptr + row.to(tl.int64) * width * C
        for j in tl.static_range(KW):
            column = out_column * stride_w - left + j
            inside = (column >= 0) & (column < reach)
            x = tl.load(
                row_ptr + column[:, None].to(tl.int64) * C + c[None, :],
                mask=inside[:, None] & live_c[None, :], other=0,
            )  # fmt: skip
            x = tl.where(inside[:, None], x.to(tl.int32), x_zero_point)
            w = tl.load(weight_ptr + (i * KW + j) * C + c, mask=live_c, other=0)
            total += x * w[None, :].to(tl.int32)
    total += tl.load(bias_ptr + c, mask=live_c, other=0)[None, :]
    v = total.to(tl.float32) * tl.load(multiplier_ptr + c, mask=live_c, other=0.0)[None, :]
    y = requantize(v, y_zero_point, lo, hi, hardswish_scale, HARDSWISH)
    y_ptrs = y_ptr + (out_row * out_width + out_column)[:, None] * C + c[None, :]
    tl.store(y_ptrs, y, mask=(out_column < out_width)[:, None] & live_c[None, :])


def int8_dwconv(
    x: Tensor, weight: Tensor, bias: Tensor, multiplier: Tensor, stride: Sequence[int],
    padding: Sequence[int], x_zero_point: int, y_zero_point: int, lo: int, hi: int,
    hardswish_scale: float | None = None,
) -> Tensor:  # fmt: skip
    """uint8 [N, H', W', C]: see reference.int8_dwconv."""
    shape = int8_dwconv_shape(
        x, weight, bias, multiplier, stride, padding, x_zero_point, y_zero_point, lo, hi,
        hardswish_scale,
    )  # fmt: skip
    y = x.new_empty(shape)
    if y.numel() == 0:
        return y
    batch, out_height, out_width, channels = shape
    kernel_h, kernel_w, _ = weight.shape
    block_c = min(128, triton.next_power_of_2(channels))
    block_w = min(max(1, 2048 // block_c), triton.next_power_of_2(out_width))
    grid = (
        batch * out_height,
        triton.cdiv(out_width, block_w) * triton.cdiv(channels, block_c),
    )
    with torch.cuda.device_of(x):
        _int8_dwconv_kernel[grid](
            y, x.contiguous(), weight.contiguous(), bias.contiguous(), multiplier.contiguous(),
            x.shape[1], x.shape[2], out_height, out_width, channels, stride[0], stride[1],
            padding[0], padding[2], x_zero_point, y_zero_point, lo, hi, hardswish_scale or 0.0,
            HARDSWISH=hardswish_scale is not None, ALIGN=gcd(16, channels),
            KH=kernel_h, KW=kernel_w, BLOCK_W=block_w, BLOCK_C=block_c,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return y
