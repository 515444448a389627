"""Pointwise int8 convolution in Triton: y = requantise(bias + x . weight^T), u8 [pixels, C_out].

Tensor cores multiply s8 by s8 here, so x - 128 stands in for x: sum w x = sum w (x - 128) + 128
sum w, exactly, in int32. What follows is float32, each operation rounded once (no fused ones): see
reference.int8_dwconv. A program owns BLOCK_M pixels and BLOCK_N outputs; x is read from memory once
where BLOCK_N covers C_out, and the sums never leave the registers.
"""

from __future__ import annotations

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import int8_pwconv_shape

_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves no fraction, to nearest even


@triton.jit
def requantize(v, y_zero_point, lo, hi, hardswish_scale, HARDSWISH: tl.constexpr):
    """uint8 of float32 sums times multipliers."""
    if HARDSWISH:
        v = (v * tl.minimum(tl.maximum(v + 3.0, 0.0), 6.0)) * hardswish_scale
    v = tl.minimum(tl.maximum(v, -32768.0), 32767.0)
    y = ((v + _ROUND) - _ROUND).to(tl.int32) + y_zero_point
    return tl.minimum(tl.maximum(y, lo), hi).to(tl.uint8)


@triton.jit(do_not_specialize=["pixels", "y_zero_point", "lo", "hi"])
def _int8_pwconv_kernel(
    y_ptr, x_ptr, weight_ptr,  # [pixels, N], [pixels, K], [N, K]
    bias_ptr, multiplier_ptr,  # [N]
    pixels, N, K,
    y_zero_point, lo, hi, hardswish_scale,
    HARDSWISH: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # tells the compiler what holds anyway: wide loads need it
    K = K // ALIGN * ALIGN
    x_ptrs = x_ptr + m[:, None] * K + k[None, :]
    w_ptrs = weight_ptr + n[None, :].to(tl.int64) * K + k[:, None]
    live_m, live_n = m < pixels, n < N
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    of_weights = tl.zeros([BLOCK_N], tl.int32)
    for start in range(0, K, BLOCK_K):
        live_k = start + k < K
        x = tl.load(x_ptrs + start, mask=live_m[:, None] & live_k[None, :], other=128)
        w = tl.load(w_ptrs + start, mask=live_k[:, None] & live_n[None, :], other=0)
        total = tl.dot((x ^ 128).to(tl.int8, bitcast=True), w, total, out_dtype=tl.int32)
        of_weights += tl.sum(w.to(tl.int32), 0)
    total += (tl.load(bias_ptr + n, mask=live_n, other=0) + 128 * of_weights)[None, :]
    v = total.to(tl.float32) * tl.load(multiplier_ptr + n, mask=live_n, other=0.0)[None, :]
    y = requantize(v, y_zero_point, lo, hi, hardswish_scale, HARDSWISH)
    y_ptrs = y_ptr + m[:, None] * N + n[None, :]
    tl.store(y_ptrs, y, mask=live_m[:, None] & live_n[None, :])


def int8_pwconv(
    x: Tensor, weight: Tensor, bias: Tensor, multiplier: Tensor, y_zero_point: int, lo: int,
    hi: int, hardswish_scale: float | None = None,
) -> Tensor:  # fmt: skip
    """uint8 [..., C_out]: see reference.int8_pwconv."""
    shape = int8_pwconv_shape(x, weight, bias, multiplier, y_zero_point, lo, hi, hardswish_scale)
    y = x.new_empty(shape)
    if y.numel() == 0:
        return y
    outputs, channels = weight.shape
    pixels = y.numel() // outputs
    align = gcd(16, channels)
    # 64 sums a thread, 32 where inputs come byte by byte: more would spill
    block_n = min(128 if align >= 4 else 64, max(16, triton.next_power_of_2(outputs)))
    block_m = 32 if pixels <= 32 else 64 if block_n >= 64 or pixels <= 8192 else 128
    block_k = 32 if channels <= 32 else 64
    with torch.cuda.device_of(x):
        _int8_pwconv_kernel[(triton.cdiv(pixels, block_m), triton.cdiv(outputs, block_n))](
            y, x.contiguous(), weight.contiguous(), bias.contiguous(), multiplier.contiguous(),
            pixels, outputs, channels, y_zero_point, lo, hi, hardswish_scale or 0.0,
            HARDSWISH=hardswish_scale is not None, ALIGN=align,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
            num_warps=4, num_stages=3, enable_fp_fusion=False,
        )  # fmt: skip
    return y
