"""Distillation loss in Triton: kd_weight * T^2 * KL(softmax(t/T) || softmax(s/T)) + ce_weight * CE.

The numerics are those of csrc/math/kd.h. A program owns a few rows and all their classes. Where
they fit one tile, the exponentials stay in registers: loss and gradient cost 2 reads and 1 write.
Longer rows run online softmax over tiles, each thread by itself and the next tile on its way, and
are read again (from L2) for the gradient.
Layout: logits are [outer, rows, classes] with any strides, so that dense predictions [B, C, H, W]
need no copy; a tile is [steps, rows, lanes, vec], of which lanes, and rows where those are adjacent
in memory, are spread over threads. The mean's weight is summed in a fixed order on the device.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import _config

_NONE, _MEAN = 0, 1  # values of `reduction`

_INF = tl.constexpr(float("inf"))
_NAN = tl.constexpr(float("nan"))
_LOWEST_32 = tl.constexpr(-3.4028234663852886e38)
_LOWEST_64 = tl.constexpr(-1.7976931348623157e308)
_TINY_32 = tl.constexpr(1.1754943508222875e-38)  # the smallest normal number
_TINY_64 = tl.constexpr(2.2250738585072014e-308)
_TOTAL_BLOCK = tl.constexpr(_config.TOTAL_BLOCK)
_TOTAL_PARTS = tl.constexpr(_config.TOTAL_PARTS)


@triton.jit
def _multiple(x, N: tl.constexpr):
    # tells the compiler what holds anyway: wide loads need it
    return x // N * N


@triton.jit
def _max(x):  # [steps, rows, lanes, vec] -> [rows, lanes]
    return tl.max(tl.max(x, 3), 0)


@triton.jit
def _sum(x):  # [steps, rows, lanes, vec] -> [rows, lanes]
    return tl.sum(tl.sum(x, 3), 0)


@triton.jit
def _wide(x):  # [rows] or [rows, lanes] -> [1, rows, lanes or 1, 1]
    if len(x.shape) == 1:
        return x[None, :, None, None]
    else:
        return x[None, :, :, None]


@triton.jit
def _tile(STEPS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr):
    # class numbers, [steps, 1, lanes, vec]
    step = tl.arange(0, STEPS)[:, None, None, None]
    lane = tl.arange(0, LANES)[None, None, :, None]
    return (step * LANES + lane) * VEC + tl.arange(0, VEC)[None, None, None, :]


@triton.jit
def _weight_total(
    labels_ptr, labels_b_ptr, weights_ptr, ignore_index, first, step, rows, ACC: tl.constexpr
):
    # of the rows that count among _TOTAL_BLOCK ones from `first`, and so on `step` further
    total = tl.zeros([_TOTAL_BLOCK], ACC)
    for start in range(first, rows, step):
        row = start.to(tl.int64) + tl.arange(0, _TOTAL_BLOCK)
        live = row < rows
        weight = live.to(ACC)
        if weights_ptr is not None:
            weight = tl.load(weights_ptr + row, mask=live, other=0).to(ACC)
        if labels_ptr is not None:
            a = tl.load(labels_ptr + row, mask=live, other=0)
            weight = tl.where(a == ignore_index, 0.0, weight)
        if labels_b_ptr is not None:
            b = tl.load(labels_b_ptr + row, mask=live, other=0)
            weight = tl.where(b == ignore_index, 0.0, weight)
        total += weight
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["ignore_index", "rows"])
def _kd_total_kernel(
    totals_ptr,  # [programs]
    labels_ptr, labels_b_ptr, weights_ptr,  # [rows], or None
    ignore_index, rows,
):  # fmt: skip
    part = tl.program_id(0)
    total = _weight_total(
        labels_ptr, labels_b_ptr, weights_ptr, ignore_index,
        part * _TOTAL_BLOCK, tl.num_programs(0) * _TOTAL_BLOCK, rows, totals_ptr.dtype.element_ty,
    )  # fmt: skip
    tl.store(totals_ptr + part, total)


@triton.jit
def _divide(x, y):
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def _per_row(ptr, step, value, row, live, ACC: tl.constexpr):
    # [rows]: loaded, or one number for all
    if ptr is not None:
        return tl.load(ptr + row * step, mask=live, other=1).to(ACC)
    else:
        return tl.full([row.shape[0]], value, ACC)


@triton.jit
def _labels(ptr, row, live, classes, ignore_index):
    # [rows]: the labels, and which are to be ignored, and which are none
    label = tl.load(ptr + row, mask=live, other=0)
    return label, label == ignore_index, (label < 0) | (label >= classes)


@triton.jit
def _rebase(
    max_s, max_t, sum_s, sum_t, dot, sum_1, total, count, top_s, top_t, inv_t,
    HAS_KD: tl.constexpr, HAS_CE: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
):  # fmt: skip
    # the same sums [rows, lanes], relative to larger maxima
    up_s = max_s - top_s  # <= 0
    if HAS_KD:
        up_t = max_t - top_t
        scale_t = tl.exp(up_t * inv_t)
        moved = scale_t * (dot + sum_t * ((up_t - up_s) * inv_t))
        # an infinite dot must survive a scale that underflows
        dot = tl.where((sum_t > 0) & (dot != _INF), moved, dot)
        sum_s *= tl.exp(up_s * inv_t)
        sum_t *= scale_t
    if HAS_CE:
        sum_1 *= tl.exp(up_s)
    if HAS_SMOOTHING:
        total = tl.where(count > 0, total + count * up_s, total)
    return sum_s, sum_t, dot, sum_1, total


@triton.jit
def _add_tile(
    s, t, live,  # [steps, rows, lanes, vec]
    max_s, max_t, sum_s, sum_t, dot, sum_1, total, count,  # [rows, lanes]
    inv_t,  # [rows, 1]
    HAS_KD: tl.constexpr, HAS_CE: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
):  # fmt: skip
    top_s, top_t = tl.maximum(max_s, _max(s)), max_t
    if HAS_KD:
        top_t = tl.maximum(max_t, _max(t))
    if WHOLE_ROW:
        # the row's own maxima at once: the exponentials serve for the gradient
        top_s = tl.broadcast_to(tl.max(top_s, 1)[:, None], max_s.shape)
        top_t = tl.broadcast_to(tl.max(top_t, 1)[:, None], max_s.shape)
    else:
        sum_s, sum_t, dot, sum_1, total = _rebase(
            max_s, max_t, sum_s, sum_t, dot, sum_1, total, count, top_s, top_t, inv_t,
            HAS_KD, HAS_CE, HAS_SMOOTHING,
        )  # fmt: skip
    d = s - _wide(top_s)
    exp_s, exp_t, exp_1 = d, d, d
    if HAS_KD:
        u = d * _wide(inv_t)
        v = (t - _wide(top_t)) * _wide(inv_t)
        exp_s, exp_t = tl.exp(u), tl.exp(v)
        # +inf where only the student is masked, even if exp(v) has underflowed
        tiny = _TINY_64 if s.dtype == tl.float64 else _TINY_32
        term = tl.where(v == -_INF, 0.0, tl.maximum(exp_t, tiny) * (v - u))
        sum_s, sum_t, dot = sum_s + _sum(exp_s), sum_t + _sum(exp_t), dot + _sum(term)
    if HAS_CE:
        exp_1 = tl.exp(d)
        sum_1 += _sum(exp_1)
    if HAS_SMOOTHING:
        total += _sum(tl.where(live, d, 0.0))
        count += _sum(live.to(s.dtype))
    return exp_s, exp_t, exp_1, top_s, top_t, sum_s, sum_t, dot, sum_1, total, count


@triton.jit
def _softmaxes(
    s, t, max_s, max_t, log_s, log_t, log_1, inv_t, HAS_KD: tl.constexpr, HAS_CE: tl.constexpr
):
    # q, p and q1 from the logits and the row's numbers
    d = s - _wide(max_s)
    q, p, q1 = d, d, d
    if HAS_KD:
        q = tl.exp(d * _wide(inv_t) - _wide(log_s))
        p = tl.exp((t - _wide(max_t)) * _wide(inv_t) - _wide(log_t))
    if HAS_CE:
        q1 = tl.exp(d - _wide(log_1))
    return q, p, q1


@triton.jit
def _store_gradient(
    ptrs, live, cols, q, p, q1,  # [steps, rows, lanes, vec]
    by_q, by_p, by_q1,  # [rows]: factors
    scale, ce_weight, smoothing, mix, a, b, classes,
    HAS_KD: tl.constexpr, HAS_CE: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
    HAS_B: tl.constexpr, HAS_ZEROS: tl.constexpr,
):  # fmt: skip
    g = tl.zeros(live.shape, scale.dtype)
    if HAS_KD:
        # two products and a difference: with fma, equal student and teacher would not give 0
        g = _wide(by_q) * q - _wide(by_p) * p
    if HAS_CE:
        ce = scale * ce_weight
        hard = ce - ce * smoothing
        g += _wide(by_q1) * q1
        if HAS_SMOOTHING:
            g -= _wide(ce * smoothing / classes)
        if HAS_B:
            g -= tl.where(cols == _wide(b), _wide(hard - hard * mix), 0.0)
            hard = hard * mix
        g -= tl.where(cols == _wide(a), _wide(hard), 0.0)
    if HAS_ZEROS:
        # an ignored row may hold NaN
        g = tl.where(_wide(scale) == 0, 0.0, g)
    tl.store(ptrs, g.to(ptrs.dtype.element_ty), mask=live)
