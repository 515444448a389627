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

_INF = tl.constexpr(float("inf"))
_LOWEST_32 = tl.constexpr(-3.4028234663852886e38)
_LOWEST_64 = tl.constexpr(-1.7976931348623157e308)
_TINY_32 = tl.constexpr(1.1754943508222875e-38)  # the smallest normal number
_TINY_64 = tl.constexpr(2.2250738585072014e-308)
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_SCAN_BLOCK = tl.constexpr(_config.SCAN_BLOCK)
_TOTAL_PARTS = tl.constexpr(_config.TOTAL_PARTS)

# arguments whose values bring no variant of their own; of strides, 1 does
_NUMBERS = (
    "ignore_index", "rows", "inner", "classes", "mean", "parts", "grad_loss_step", "lam_step",
    "temperature_step", "g_outer", "s_outer", "t_outer",
)  # fmt: skip
_STRIDES = ("g_row", "g_class", "s_row", "s_class", "t_row", "t_class")


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
    labels_ptr, labels_b_ptr, weights_ptr, ignore_index, first, step, rows,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # of the rows that count among BLOCK ones from `first`, and so on `step` further
    total = tl.zeros([BLOCK], ACC)
    for start in range(first, rows, step):
        row = start + tl.arange(0, BLOCK).to(tl.int64)
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
    BLOCK: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0).to(tl.int64)
    total = _weight_total(
        labels_ptr, labels_b_ptr, weights_ptr, ignore_index, part * BLOCK,
        tl.num_programs(0) * BLOCK, rows, totals_ptr.dtype.element_ty, BLOCK,
    )  # fmt: skip
    tl.store(totals_ptr + part, total)


@triton.jit
def _divide(x, y):
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def _log1p(x):
    # Kahan's: the rounding of 1 + x cancels in the quotient
    y = 1 + x
    return tl.where(y == 1, x, tl.log(y) * _divide(x, y - 1))


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
    return label.to(tl.int32), label == ignore_index, (label < 0) | (label >= classes)


@triton.jit
def _shares(
    labels_ptr, labels_b_ptr, weights_ptr,  # [rows], or None
    totals_ptr, mean, parts, rows, row, live, classes, ignore_index, share,
    ACC: tl.constexpr,
):  # fmt: skip
    # of each row, [rows]: its share of the loss, 0 where it is ignored, NaN where a label is wrong;
    # and its labels
    BLOCK_ROWS: tl.constexpr = row.shape[0]
    scale = tl.full([BLOCK_ROWS], share, ACC)
    if weights_ptr is not None:
        scale = tl.load(weights_ptr + row, mask=live, other=0).to(ACC)
    if labels_ptr is not None or weights_ptr is not None:
        if mean:
            if parts > 0:
                part = tl.arange(0, _TOTAL_PARTS)
                whole = tl.sum(tl.load(totals_ptr + part, mask=part < parts, other=0), 0)
            else:
                whole = _weight_total(
                    labels_ptr, labels_b_ptr, weights_ptr, ignore_index, 0, _SCAN_BLOCK, rows,
                    ACC, _SCAN_BLOCK,
                )  # fmt: skip
            whole = tl.full([BLOCK_ROWS], whole, ACC)
            scale = tl.where(whole == 0, 0.0, _divide(scale, whole))
    a, b = row, row
    if labels_ptr is not None:
        a, ignored, wrong = _labels(labels_ptr, row, live, classes, ignore_index)
        b = a
        if labels_b_ptr is not None:
            b, ignored_b, wrong_b = _labels(labels_b_ptr, row, live, classes, ignore_index)
            ignored, wrong = ignored | ignored_b, wrong | wrong_b
        scale = tl.where(ignored, 0.0, tl.where(wrong & (scale != 0), float("nan"), scale))
    return scale, a, b


@triton.jit
def _logit_of(rows_ptr, class_stride, label, live, classes, ACC: tl.constexpr):
    # [rows]: of one class each; 0 where there is no such class
    inside = live & (label >= 0) & (label < classes)
    return tl.load(rows_ptr + label.to(tl.int64) * class_stride, mask=inside, other=0).to(ACC)


@triton.jit
def _cross_entropy(
    s_rows, s_class, live, top, log_1, total, smoothing, mix, a, b, classes,  # [rows]
    ACC: tl.constexpr, HAS_SMOOTHING: tl.constexpr, HAS_B: tl.constexpr,
):  # fmt: skip
    # of the student at T = 1; total: sum (s - top)
    hard = _logit_of(s_rows, s_class, a, live, classes, ACC)
    if HAS_B:
        hard_b = _logit_of(s_rows, s_class, b, live, classes, ACC)
        # a share of 0 must not meet a logit of -inf
        both = mix * hard + (1 - mix) * hard_b
        hard = tl.where(mix == 1, hard, tl.where(mix == 0, hard_b, both))
    expected = tl.where(smoothing == 1, 0.0, (1 - smoothing) * (hard - top))
    if HAS_SMOOTHING:
        expected += smoothing * (total / classes)
    return log_1 - expected


@triton.jit
def _exponentials(s, t, max_s, max_t, inv_t, HAS_KD: tl.constexpr, HAS_CE: tl.constexpr):
    # relative to the maxima: of s/T, of t/T, of s; and (s - max_s), (t - max_t) as powers of two
    d = s - _wide(max_s)
    u, v, exp_s, exp_t, exp_1 = d, d, d, d, d
    if HAS_KD:
        log2e = _wide(inv_t * _LOG2E)
        u, v = d * log2e, (t - _wide(max_t)) * log2e
        exp_s, exp_t = tl.exp2(u), tl.exp2(v)
    if HAS_CE:
        exp_1 = tl.exp2(d * _LOG2E)
    return exp_s, exp_t, exp_1, d, u, v


@triton.jit
def _rebase(
    max_s, max_t, sum_s, sum_t, dot, sum_1, total, count, top_s, top_t, inv_t,
    HAS_KD: tl.constexpr, HAS_CE: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
):  # fmt: skip
    # the same sums [rows, lanes], relative to larger maxima
    up_s = max_s - top_s  # <= 0
    if HAS_KD:
        up_t = max_t - top_t
        log2e = inv_t * _LOG2E
        scale_t = tl.exp2(up_t * log2e)
        moved = scale_t * (dot + sum_t * ((up_t - up_s) * log2e))
        # an infinite dot must survive a scale that underflows
        dot = tl.where((sum_t > 0) & (dot != _INF), moved, dot)
        sum_s *= tl.exp2(up_s * log2e)
        sum_t *= scale_t
    if HAS_CE:
        sum_1 *= tl.exp2(up_s * _LOG2E)
    if HAS_SMOOTHING:
        total = tl.where(count > 0, total + count * up_s, total)
    return sum_s, sum_t, dot, sum_1, total


@triton.jit
def _add_tile(
    s, t, live,  # [steps, rows, lanes, vec]
    max_s, max_t, sum_s, sum_t, dot, sum_1, total,  # [rows, lanes]
    count,  # classes of a lane so far
    inv_t,  # [rows, 1]
    HAS_KD: tl.constexpr, HAS_CE: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
):  # fmt: skip
    top_s, top_t = tl.maximum(max_s, _max(s)), max_t
    if HAS_KD:
        top_t = tl.maximum(max_t, _max(t))
    if WHOLE_ROW:
        # the row's own maxima at once: the exponentials are reused for the gradient
        top_s = tl.broadcast_to(tl.max(top_s, 1)[:, None], max_s.shape)
        top_t = tl.broadcast_to(tl.max(top_t, 1)[:, None], max_s.shape)
    else:
        sum_s, sum_t, dot, sum_1, total = _rebase(
            max_s, max_t, sum_s, sum_t, dot, sum_1, total, count, top_s, top_t, inv_t,
            HAS_KD, HAS_CE, HAS_SMOOTHING,
        )  # fmt: skip
    exp_s, exp_t, exp_1, d, u, v = _exponentials(s, t, top_s, top_t, inv_t, HAS_KD, HAS_CE)
    if HAS_KD:
        # +inf where only the student is masked, even if exp(v) has underflowed
        tiny = _TINY_64 if s.dtype == tl.float64 else _TINY_32
        term = tl.where(v == -_INF, 0.0, tl.maximum(exp_t, tiny) * (v - u))
        sum_s, sum_t, dot = sum_s + _sum(exp_s), sum_t + _sum(exp_t), dot + _sum(term)
    if HAS_CE:
        sum_1 += _sum(exp_1)
    if HAS_SMOOTHING:
        total += _sum(tl.where(live, d, 0.0))
    return exp_s, exp_t, exp_1, top_s, top_t, sum_s, sum_t, dot, sum_1, total


@triton.jit
def _ce_gradient(
    cols, exp_1,  # [steps, rows, lanes, vec]
    by_1, ce, smoothing, mix, a, b, classes,  # [rows]
    HAS_SMOOTHING: tl.constexpr, HAS_B: tl.constexpr,
):  # fmt: skip
    hard = ce - ce * smoothing
    g = _wide(by_1) * exp_1
    if HAS_SMOOTHING:
        g -= _wide(ce * smoothing / classes)
    if HAS_B:
        g -= tl.where(cols == _wide(b), _wide(hard * (1 - mix)), 0.0)
        hard *= mix
    return g - tl.where(cols == _wide(a), _wide(hard), 0.0)


@triton.jit
def _store_gradient(
    ptrs, live, cols, exp_s, exp_t, exp_1,  # [steps, rows, lanes, vec]
    by_s, by_t, by_1,  # [rows]: weights over the sums of the exponentials
    scale, ce_weight, smoothing, mix, a, b, classes,
    HAS_KD: tl.constexpr, HAS_CE: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
    HAS_B: tl.constexpr, HAS_ZEROS: tl.constexpr,
):  # fmt: skip
    g = tl.zeros(live.shape, scale.dtype)
    if HAS_KD:
        # two products and a difference: with fma, equal student and teacher would not give 0
        g = _wide(by_s) * exp_s - _wide(by_t) * exp_t
    if HAS_CE:
        g += _ce_gradient(
            cols, exp_1, by_1, scale * ce_weight, smoothing, mix, a, b, classes, HAS_SMOOTHING,
            HAS_B,
        )  # fmt: skip
    if HAS_ZEROS:
        # an ignored row may hold NaN
        g = tl.where(_wide(scale) == 0, 0.0, g)
    tl.store(ptrs, g.to(ptrs.dtype.element_ty), mask=live)


@triton.jit
def _program_rows(block, inner, BLOCK_ROWS: tl.constexpr):
    # adjacent rows of one slice: its number, and [rows]: place in the slice, row number, in range
    blocks = tl.cdiv(inner, BLOCK_ROWS)
    outer = (block // blocks).to(tl.int64)
    at = (block % blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    return outer, at, outer * inner + at, at < inner


@triton.jit
def _row_starts(ptr, outer, at, outer_stride, row_stride, VEC: tl.constexpr):
    # pointers to each row's first class, [rows]
    return ptr + outer * _multiple(outer_stride, VEC) + at * _multiple(row_stride, VEC)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_STRIDES)
def _kd_fwd_kernel(
    loss_ptr,  # [rows]
    stats_ptr,  # [6, rows], or None
    grad_ptr, student_ptr, teacher_ptr,  # [outer, rows, classes] by their strides; grad or None
    g_outer, g_row, g_class, s_outer, s_row, s_class, t_outer, t_row, t_class,
    labels_ptr, labels_b_ptr, weights_ptr,  # [rows], or None
    lam_ptr, lam_step, temperature_ptr, temperature_step,  # [rows], [] or None
    totals_ptr,  # [parts]; read where there is a mean to take
    mean, parts, rows, inner, classes, ignore_index,
    temperature: tl.float64, lam: tl.float64, kd_weight: tl.float64, ce_weight: tl.float64,
    smoothing: tl.float64, share: tl.float64,
    HAS_KD: tl.constexpr, HAS_CE: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
    STEPS: tl.constexpr, BLOCK_ROWS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = loss_ptr.dtype.element_ty
    TILE: tl.constexpr = STEPS * LANES * VEC
    LOWEST: tl.constexpr = _LOWEST_64 if ACC == tl.float64 else _LOWEST_32
    HAS_B: tl.constexpr = labels_b_ptr is not None
    HAS_ZEROS: tl.constexpr = labels_ptr is not None or weights_ptr is not None

    # 1. the first tile is on its way while the row's options are read
    outer, at, row, live = _program_rows(tl.program_id(0), inner, BLOCK_ROWS)
    s_rows = _row_starts(student_ptr, outer, at, s_outer, s_row, VEC)
    t_rows = _row_starts(teacher_ptr, outer, at, t_outer, t_row, VEC)
    s_ptrs, t_ptrs = _wide(s_rows), _wide(t_rows)
    bound = _multiple(classes, VEC)
    cols = _tile(STEPS, LANES, VEC)
    mask = _wide(live) & (cols < bound)
    s = tl.load(s_ptrs + cols.to(tl.int64) * s_class, mask=mask, other=-_INF)
    t = s
    if HAS_KD:
        t = tl.load(t_ptrs + cols.to(tl.int64) * t_class, mask=mask, other=-_INF)

    # 2. the rows' options, [rows]
    temperature = _per_row(temperature_ptr, temperature_step, temperature, row, live, ACC)
    temperature = tl.where(temperature > 0, temperature, float("nan"))
    inv_t = _divide(tl.full([BLOCK_ROWS], 1, ACC), temperature)
    mix = _per_row(lam_ptr, lam_step, lam, row, live, ACC)
    kd_weight = tl.full([BLOCK_ROWS], kd_weight, ACC)
    ce_weight = tl.full([BLOCK_ROWS], ce_weight, ACC)
    smoothing = tl.full([BLOCK_ROWS], smoothing, ACC)
    scale, a, b = _shares(
        labels_ptr, labels_b_ptr, weights_ptr, totals_ptr, mean, parts, rows, row, live, classes,
        ignore_index, share, ACC,
    )  # fmt: skip

    # 3. one pass over the classes: sums relative to the maxima, [rows, lanes]
    max_s = tl.full([BLOCK_ROWS, LANES], LOWEST, ACC)
    max_t = max_s
    sum_s = tl.zeros([BLOCK_ROWS, LANES], ACC)
    sum_t, dot, sum_1, total = sum_s, sum_s, sum_s, sum_s
    if WHOLE_ROW:
        exp_s, exp_t, exp_1, max_s, max_t, sum_s, sum_t, dot, sum_1, total = _add_tile(
            s.to(ACC), t.to(ACC), mask, max_s, max_t, sum_s, sum_t, dot, sum_1, total, 0,
            inv_t[:, None], HAS_KD, HAS_CE, HAS_SMOOTHING, True,
        )  # fmt: skip
        top_s, top_t = tl.max(max_s, 1), tl.max(max_t, 1)
    else:
        for start in range(0, classes, TILE):
            s_now, t_now, mask_now = s.to(ACC), t.to(ACC), mask
            next_cols = start + TILE + cols
            mask = _wide(live) & (next_cols < bound)
            s = tl.load(s_ptrs + next_cols.to(tl.int64) * s_class, mask=mask, other=-_INF)
            if HAS_KD:
                t = tl.load(t_ptrs + next_cols.to(tl.int64) * t_class, mask=mask, other=-_INF)
            _, _, _, max_s, max_t, sum_s, sum_t, dot, sum_1, total = _add_tile(
                s_now, t_now, mask_now, max_s, max_t, sum_s, sum_t, dot, sum_1, total,
                start // LANES, inv_t[:, None], HAS_KD, HAS_CE, HAS_SMOOTHING, False,
            )  # fmt: skip
        top_s, top_t = tl.max(max_s, 1), tl.max(max_t, 1)
        full = classes // TILE * TILE
        count = full // LANES + _sum((_wide(live) & (full + cols < bound)).to(tl.int32))
        sum_s, sum_t, dot, sum_1, total = _rebase(
            max_s, max_t, sum_s, sum_t, dot, sum_1, total, count, top_s[:, None], top_t[:, None],
            inv_t[:, None], HAS_KD, HAS_CE, HAS_SMOOTHING,
        )  # fmt: skip
    sum_s, sum_t, sum_1 = tl.sum(sum_s, 1), tl.sum(sum_t, 1), tl.sum(sum_1, 1)

    # 4. the rows' losses and what backward needs of them, [rows]
    loss = tl.zeros([BLOCK_ROWS], ACC)
    log_s, log_t, log_1 = loss, loss, loss
    if HAS_KD:
        log_s, log_t = tl.log(sum_s), tl.log(sum_t)
        dot = tl.sum(dot, 1)
        inverse = _divide(tl.full([BLOCK_ROWS], 1, ACC), sum_t)
        divergence = dot * inverse * _LN2 + _log1p((sum_s - sum_t) * inverse)
        # where all of the student is masked, too
        divergence = tl.where(dot == _INF, _INF, divergence)
        loss = kd_weight * temperature * temperature * divergence
    if HAS_CE:
        log_1 = tl.log(sum_1)
        cross_entropy = _cross_entropy(
            s_rows, s_class, live, top_s, log_1, tl.sum(total, 1), smoothing, mix, a, b, classes,
            ACC, HAS_SMOOTHING, HAS_B,
        )  # fmt: skip
        loss += ce_weight * cross_entropy
    tl.store(loss_ptr + row, tl.where(scale == 0, 0.0, scale * loss), mask=live)
    if stats_ptr is not None:
        stats_ptr += row
        rows = rows.to(tl.int64)
        tl.store(stats_ptr, top_s, mask=live)
        tl.store(stats_ptr + rows, top_t, mask=live)
        tl.store(stats_ptr + 2 * rows, log_s, mask=live)
        tl.store(stats_ptr + 3 * rows, log_t, mask=live)
        tl.store(stats_ptr + 4 * rows, log_1, mask=live)
        tl.store(stats_ptr + 5 * rows, scale, mask=live)

    # 5. the gradient, from what is in registers or by reading again
    if grad_ptr is not None:
        g_ptrs = _wide(_row_starts(grad_ptr, outer, at, g_outer, g_row, VEC))
        by_kd = scale * kd_weight * temperature
        by_s, by_t, by_1 = by_kd / sum_s, by_kd / sum_t, scale * ce_weight / sum_1
        if WHOLE_ROW:
            _store_gradient(
                g_ptrs + cols.to(tl.int64) * g_class, mask, cols, exp_s, exp_t, exp_1,
                by_s, by_t, by_1, scale, ce_weight, smoothing, mix, a, b, classes,
                HAS_KD, HAS_CE, HAS_SMOOTHING, HAS_B, HAS_ZEROS,
            )  # fmt: skip
        else:
            for start in range(0, classes, TILE):
                now = start + cols
                mask = _wide(live) & (now < bound)
                s = tl.load(s_ptrs + now.to(tl.int64) * s_class, mask=mask, other=-_INF)
                if HAS_KD:
                    t = tl.load(t_ptrs + now.to(tl.int64) * t_class, mask=mask, other=-_INF)
                exp_s, exp_t, exp_1, _, _, _ = _exponentials(
                    s.to(ACC), t.to(ACC), top_s, top_t, inv_t, HAS_KD, HAS_CE
                )
                _store_gradient(
                    g_ptrs + now.to(tl.int64) * g_class, mask, now, exp_s, exp_t, exp_1,
                    by_s, by_t, by_1, scale, ce_weight, smoothing, mix, a, b, classes,
                    HAS_KD, HAS_CE, HAS_SMOOTHING, HAS_B, HAS_ZEROS,
                )  # fmt: skip


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_STRIDES)
def _kd_bwd_kernel(
    grad_loss_ptr, grad_loss_step,  # [rows] or []
    stats_ptr,  # [6, rows]
    grad_ptr, student_ptr, teacher_ptr,  # [outer, rows, classes] by their strides
    g_outer, g_row, g_class, s_outer, s_row, s_class, t_outer, t_row, t_class,
    labels_ptr, labels_b_ptr, weights_ptr,  # [rows], or None
    lam_ptr, lam_step, temperature_ptr, temperature_step,  # [rows], [] or None
    rows, inner, classes,
    temperature: tl.float64, lam: tl.float64, kd_weight: tl.float64, ce_weight: tl.float64,
    smoothing: tl.float64,
    HAS_KD: tl.constexpr, HAS_CE: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
    STEPS: tl.constexpr, BLOCK_ROWS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    HAS_B: tl.constexpr = labels_b_ptr is not None
    HAS_ZEROS: tl.constexpr = labels_ptr is not None or weights_ptr is not None
    outer, at, row, live = _program_rows(tl.program_id(0), inner, BLOCK_ROWS)
    s_ptrs = _wide(_row_starts(student_ptr, outer, at, s_outer, s_row, VEC))
    t_ptrs = _wide(_row_starts(teacher_ptr, outer, at, t_outer, t_row, VEC))
    g_ptrs = _wide(_row_starts(grad_ptr, outer, at, g_outer, g_row, VEC))
    cols = tl.program_id(1) * (STEPS * LANES * VEC) + _tile(STEPS, LANES, VEC)
    mask = _wide(live) & (cols < _multiple(classes, VEC))
    wide_cols = cols.to(tl.int64)
    s = tl.load(s_ptrs + wide_cols * s_class, mask=mask, other=-_INF)
    t = s
    if HAS_KD:
        t = tl.load(t_ptrs + wide_cols * t_class, mask=mask, other=-_INF)

    temperature = _per_row(temperature_ptr, temperature_step, temperature, row, live, ACC)
    temperature = tl.where(temperature > 0, temperature, float("nan"))
    mix = _per_row(lam_ptr, lam_step, lam, row, live, ACC)
    kd_weight = tl.full([BLOCK_ROWS], kd_weight, ACC)
    ce_weight = tl.full([BLOCK_ROWS], ce_weight, ACC)
    smoothing = tl.full([BLOCK_ROWS], smoothing, ACC)
    a, b = row, row
    if HAS_CE:
        a = tl.load(labels_ptr + row, mask=live, other=0).to(tl.int32)
        if HAS_B:
            b = tl.load(labels_b_ptr + row, mask=live, other=0).to(tl.int32)
    stats_ptr += row
    rows = rows.to(tl.int64)
    max_s = tl.load(stats_ptr, mask=live, other=0)
    max_t = tl.load(stats_ptr + rows, mask=live, other=0)
    log_s = tl.load(stats_ptr + 2 * rows, mask=live, other=0)
    log_t = tl.load(stats_ptr + 3 * rows, mask=live, other=0)
    log_1 = tl.load(stats_ptr + 4 * rows, mask=live, other=0)
    share = tl.load(stats_ptr + 5 * rows, mask=live, other=0)
    scale = share * tl.load(grad_loss_ptr + row * grad_loss_step, mask=live, other=0).to(ACC)
    scale = tl.where(share == 0, 0.0, scale)
    inv_t = _divide(tl.full([BLOCK_ROWS], 1, ACC), temperature)
    exp_s, exp_t, exp_1, _, _, _ = _exponentials(
        s.to(ACC), t.to(ACC), max_s, max_t, inv_t, HAS_KD, HAS_CE
    )
    by_kd = scale * kd_weight * temperature
    _store_gradient(
        g_ptrs + wide_cols * g_class, mask, cols, exp_s, exp_t, exp_1,
        by_kd * tl.exp(-log_s), by_kd * tl.exp(-log_t), scale * ce_weight * tl.exp(-log_1),
        scale, ce_weight, smoothing, mix, a, b, classes,
        HAS_KD, HAS_CE, HAS_SMOOTHING, HAS_B, HAS_ZEROS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["numel"])
def _kd_scale_kernel(
    grad_ptr,  # [numel], in storage order
    factor_ptr,  # []
    numel,
    BLOCK: tl.constexpr,
):
    factor = tl.load(factor_ptr)
    # mostly a plain loss.backward(): memory is left untouched
    if factor != 1:
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, numel, step):
            at = start + tl.arange(0, BLOCK)
            g = tl.load(grad_ptr + at, mask=at < numel).to(factor.dtype)
            tl.store(grad_ptr + at, (g * factor).to(grad_ptr.dtype.element_ty), mask=at < numel)
