"""Distillation from a teacher's K classes per row, in Triton; the maths is csrc/math/kd_topk.h.

A program owns a row. Its classes pass in tiles (most rows are one), first for online sums, then,
from cache, for the gradient: 1 read and 1 write of memory. Which classes are the teacher's is asked
only where the others are summed by themselves ("smooth", "bin"), by K comparisons per class. The
gradient is written as if no class were the teacher's; behind a barrier, the K are written over it.
Layout: logits [rows, classes], contiguous; the teacher [rows, K], in a tile of TOP.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._kd import _SCAN_BLOCK, _TOTAL_PARTS, _divide, _labels, _per_row, _weight_total

_INF = tl.constexpr(float("inf"))
_LOWEST_32 = tl.constexpr(-3.4028234663852886e38)
_LOWEST_64 = tl.constexpr(-1.7976931348623157e308)
_TINY_32 = tl.constexpr(1.1754943508222875e-38)
_TINY_64 = tl.constexpr(2.2250738585072014e-308)
_SMOOTH, _ZERO, _RENORM, _BIN = (tl.constexpr(i) for i in range(4))  # as in reference

# arguments whose values bring no variant of their own
_NUMBERS = (
    "ignore_index", "rows", "classes", "top", "mean", "parts", "grad_loss_step", "lam_step",
    "temperature_step",
)  # fmt: skip


@triton.jit
def _teacher(
    indices_ptr, values_ptr, lse_ptr, row, top, classes, inv_t,
    TAIL: tl.constexpr, TOP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # of one row, in double as large logits and their log-sum-exp cancel: classes, which there are,
    # log p, p; [1]: their sum, what is left to each other class and to all, whether one is wrong
    k = tl.arange(0, TOP)
    live = k < top
    at = row * top + k
    index = tl.load(indices_ptr + at, mask=live, other=0).to(tl.int64)
    value = tl.load(values_ptr + at, mask=live, other=0).to(tl.float64)
    wrong = tl.max((live & ((index < 0) | (index >= classes))).to(tl.int32), 0) + 0 * row
    others = classes - top
    whole = (others == 0) | (TAIL == _RENORM)
    if lse_ptr is not None:
        log_p = tl.where(live, value * inv_t, -_INF)
        lse = tl.load(lse_ptr + row).to(tl.float64)
        log_p -= tl.where(whole, tl.max(log_p, 0), lse)
    else:
        log_p = tl.where(live, tl.log(value), -_INF)
    log_p = tl.where(live, log_p, -_INF).to(ACC)
    p = tl.exp(log_p)
    mass = tl.sum(p, 0) + tl.zeros([1], ACC)
    over = whole | (mass > 1)
    rest = tl.where(over | (mass == 1) | (TAIL == _ZERO), 0.0, 1 - mass)
    by = tl.where(over, mass, 1.0)
    log_p = tl.where(log_p == -_INF, log_p, log_p - tl.log(by))
    count = tl.maximum(others, 1).to(ACC)
    return index, live, log_p, _divide(p, by), _divide(mass, by), rest, rest / count, wrong


@triton.jit
def _inverse(temperature_ptr, temperature_step, inverse, row):
    # 1/T in double, of exactly the temperature at which the log-sum-exp was taken
    if temperature_ptr is not None:
        t = tl.load(temperature_ptr + row * temperature_step)
        nearly = _divide(tl.full([1], 1, t.dtype), t).to(tl.float64)
        return nearly * (2 - t.to(tl.float64) * nearly)
    else:
        return inverse


@triton.jit
def _is_tops(indices_ptr, row, cols, top):
    # which of a tile's classes are the teacher's
    found = tl.zeros(cols.shape, tl.int32)
    for k in range(0, top):
        found |= (cols == tl.load(indices_ptr + row * top + k).to(tl.int32)).to(tl.int32)
    return found


@triton.jit
def _add(x, of, top, sums, inv_t):
    # sums relative to the maximum `top`, and to a larger one with the numbers x where `of`
    new = tl.maximum(top, tl.max(tl.where(of, x, -_INF), 0))
    e = tl.where(of, tl.exp((x - new) * inv_t), 0.0)
    return new, sums * tl.exp((top - new) * inv_t) + tl.sum(e, 0)


@triton.jit
def _store_row(
    grad_ptr, student_ptr, row, classes, index, live, p,
    scale, scale_kd, scale_ce, smoothing, mix, a, b, mass, rest, uniform,
    max_s, max_o, log_s, log_o, log_1, inv_t,
    TAIL: tl.constexpr, HAS_KD: tl.constexpr, HAS_CE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # the gradient: of all classes as others; then, of the teacher's
    ACC: tl.constexpr = log_s.dtype
    base = row * classes
    hard = scale_ce - scale_ce * smoothing
    spread = scale_ce * smoothing / classes
    of_q = scale_kd
    if TAIL == _ZERO:
        of_q = scale_kd * mass
    for start in range(0, classes, BLOCK):
        cols = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = cols < classes
        s = tl.load(student_ptr + base + cols, mask=inside, other=-_INF).to(ACC)
        g = tl.zeros([BLOCK], ACC)
        if HAS_KD:
            g = of_q * tl.exp((s - max_s) * inv_t - log_s) - scale_kd * uniform
            if TAIL == _BIN:
                among = tl.exp((s - max_o) * inv_t - log_o)
                g -= scale_kd * rest * tl.where(log_o == -_INF, 0.0, among)
        if HAS_CE:
            g += scale_ce * tl.exp(s - max_s - log_1) - spread
            g -= tl.where(cols == a, hard * mix, 0.0) + tl.where(cols == b, hard * (1 - mix), 0.0)
        # an ignored row may hold NaN
        g = tl.where(scale == 0, 0.0, g)
        tl.store(grad_ptr + base + cols, g.to(grad_ptr.dtype.element_ty), mask=inside)
    if HAS_KD:
        s = tl.load(student_ptr + base + index, mask=live, other=-_INF).to(ACC)
        g = of_q * tl.exp((s - max_s) * inv_t - log_s) - scale_kd * p
        if HAS_CE:
            g += scale_ce * tl.exp(s - max_s - log_1) - spread
            g -= tl.where(index == a, hard * mix, 0.0)
            g -= tl.where(index == b, hard * (1 - mix), 0.0)
        g = tl.where(scale == 0, 0.0, g)
        tl.debug_barrier()
        tl.store(grad_ptr + base + index, g.to(grad_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=_NUMBERS)
def _kd_topk_fwd_kernel(
    loss_ptr,  # [rows]
    stats_ptr,  # [6, rows], or None
    grad_ptr,  # [rows, classes], or None
    student_ptr,  # [rows, classes]
    indices_ptr, values_ptr,  # [rows, top]
    lse_ptr, labels_ptr, labels_b_ptr, weights_ptr,  # [rows], or None
    lam_ptr, lam_step, temperature_ptr, temperature_step,  # [rows], [] or None
    totals_ptr,  # [parts]; read where there is a mean to take
    mean, parts, rows, classes, top, ignore_index,
    temperature: tl.float64, lam: tl.float64, kd_weight: tl.float64, ce_weight: tl.float64,
    smoothing: tl.float64, inverse: tl.float64, share: tl.float64,
    TAIL: tl.constexpr, HAS_KD: tl.constexpr, HAS_CE: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
    TOP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = loss_ptr.dtype.element_ty
    LOWEST: tl.constexpr = _LOWEST_64 if ACC == tl.float64 else _LOWEST_32
    TINY: tl.constexpr = _TINY_64 if ACC == tl.float64 else _TINY_32
    HAS_B: tl.constexpr = labels_b_ptr is not None
    OTHERS: tl.constexpr = HAS_KD and (TAIL == _SMOOTH or TAIL == _BIN)
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    live_row = row < rows

    # 1. the row's options, [1]
    exact = _inverse(temperature_ptr, temperature_step, inverse, row)
    temperature = _per_row(temperature_ptr, temperature_step, temperature, row, live_row, ACC)
    temperature = tl.where(temperature > 0, temperature, float("nan"))
    inv_t = _divide(tl.full([1], 1, ACC), temperature)
    mix = _per_row(lam_ptr, lam_step, lam, row, live_row, ACC)
    scale = tl.full([1], share, ACC)
    kd_weight = tl.full([1], kd_weight, ACC)
    ce_weight = tl.full([1], ce_weight, ACC)
    smoothing = tl.full([1], smoothing, ACC)
    if weights_ptr is not None:
        scale = tl.load(weights_ptr + row).to(ACC)
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
            whole = tl.full([1], whole, ACC)
            scale = tl.where(whole == 0, 0.0, _divide(scale, whole))
    a, b = row, row
    if labels_ptr is not None:
        a, ignored, wrong = _labels(labels_ptr, row, live_row, classes, ignore_index)
        b = a
        if HAS_B:
            b, ignored_b, wrong_b = _labels(labels_b_ptr, row, live_row, classes, ignore_index)
            ignored, wrong = ignored | ignored_b, wrong | wrong_b
        scale = tl.where(ignored, 0.0, tl.where(wrong & (scale != 0), float("nan"), scale))

    # 2. the teacher
    index = tl.zeros([TOP], tl.int64)
    live = index < 0
    p = tl.zeros([TOP], ACC)
    mass = tl.zeros([1], ACC)
    rest, uniform = mass, mass
    if HAS_KD:
        index, live, log_p, p, mass, rest, uniform, wrong = _teacher(
            indices_ptr, values_ptr, lse_ptr, row, top, classes, exact, TAIL, TOP, ACC
        )
        live &= (index >= 0) & (index < classes)
        scale = tl.where((wrong > 0) & (scale != 0), float("nan"), scale)

    # 3. one pass over the classes: online sums, [1]
    max_s = tl.full([1], LOWEST, ACC)
    sum_s = tl.zeros([1], ACC)
    max_1, sum_1, total, max_o, sum_o, total_o = max_s, sum_s, sum_s, max_s, sum_s, sum_s
    base = row * classes
    for start in range(0, classes, BLOCK):
        cols = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = cols < classes
        s = tl.load(student_ptr + base + cols, mask=inside, other=-_INF).to(ACC)
        if HAS_SMOOTHING:
            new = tl.maximum(max_s, tl.max(s, 0))
            total += tl.where(start > 0, start * (max_s - new), 0.0)
            total += tl.sum(tl.where(inside, s - new, 0.0), 0)
        if HAS_CE:
            max_1, sum_1 = _add(s, inside, max_1, sum_1, 1.0)
        max_s, sum_s = _add(s, inside, max_s, sum_s, inv_t)
        if OTHERS:
            of = inside & (_is_tops(indices_ptr, row, cols.to(tl.int32), top) == 0)
            before = max_o
            max_o, sum_o = _add(s, of, max_o, sum_o, inv_t)
            if TAIL == _SMOOTH:
                # of the others in tiles before this one, of which there may be none
                moved = tl.where(sum_o > 0, before - max_o, 0.0)
                seen = total_o * 0
                if start > 0:
                    seen = tl.where(before == LOWEST, seen, moved)
                    count = start - tl.sum((live & (index < start)).to(tl.int32), 0)
                    seen = tl.where(count > 0, seen * count, 0.0)
                total_o += seen + tl.sum(tl.where(of, s - max_o, 0.0), 0)

    # 4. the loss, and what backward needs
    loss = tl.zeros([1], ACC)
    log_1, log_o = loss, loss
    log_s = tl.log(sum_s)
    if HAS_KD:
        s = tl.load(student_ptr + base + index, mask=live, other=0).to(ACC)
        log_q = (s - max_s) * inv_t - log_s
        terms = tl.maximum(p, TINY) * (log_p - log_q)
        terms = tl.where(live & (log_p != -_INF), terms, 0.0)
        divergence = tl.sum(terms, 0) + loss
        if OTHERS:
            log_o = tl.log(sum_o)
            log_q = (max_o - max_s) * inv_t - log_s
            if TAIL == _BIN:
                left = tl.log(rest) - (log_o + log_q)
            else:
                count = tl.maximum(classes - top, 1).to(ACC)
                left = tl.log(uniform) - (total_o / count * inv_t + log_q)
            divergence += tl.where(rest == 0, 0.0, rest * left)
        loss = kd_weight * temperature * temperature * divergence
    if HAS_CE:
        log_1 = tl.log(sum_1)
        right = (a >= 0) & (a < classes)
        hard = tl.load(student_ptr + base + a.to(tl.int64), mask=right, other=0).to(ACC)
        if HAS_B:
            right = (b >= 0) & (b < classes)
            hard_b = tl.load(student_ptr + base + b.to(tl.int64), mask=right, other=0).to(ACC)
            # a share of 0 must not meet a logit of -inf
            both = mix * hard + (1 - mix) * hard_b
            hard = tl.where(mix == 1, hard, tl.where(mix == 0, hard_b, both))
        expected = tl.where(smoothing == 1, 0.0, (1 - smoothing) * (hard - max_s))
        if HAS_SMOOTHING:
            expected += smoothing * (total / classes)
        loss += ce_weight * (log_1 - expected)
    tl.store(loss_ptr + row, tl.where(scale == 0, 0.0, scale * loss))
    if stats_ptr is not None:
        stats_ptr += row
        rows = rows.to(tl.int64)
        tl.store(stats_ptr, max_s)
        tl.store(stats_ptr + rows, max_o)
        tl.store(stats_ptr + 2 * rows, log_s)
        tl.store(stats_ptr + 3 * rows, log_o)
        tl.store(stats_ptr + 4 * rows, log_1)
        tl.store(stats_ptr + 5 * rows, scale)

    # 5. the gradient
    if grad_ptr is not None:
        _store_row(
            grad_ptr, student_ptr, row, classes, index, live, p, scale,
            scale * kd_weight * temperature, scale * ce_weight, smoothing, mix, a, b, mass, rest,
            tl.where(TAIL == _SMOOTH, uniform, 0.0), max_s, max_o, log_s, log_o, log_1, inv_t,
            TAIL, HAS_KD, HAS_CE, BLOCK,
        )  # fmt: skip


@triton.jit(do_not_specialize=_NUMBERS)
def _kd_topk_bwd_kernel(
    grad_loss_ptr, grad_loss_step,  # [rows] or []
    stats_ptr,  # [6, rows]
    grad_ptr, student_ptr,  # [rows, classes]
    indices_ptr, values_ptr,  # [rows, top]
    lse_ptr, labels_ptr, labels_b_ptr,  # [rows], or None
    lam_ptr, lam_step, temperature_ptr, temperature_step,  # [rows], [] or None
    rows, classes, top,
    temperature: tl.float64, lam: tl.float64, kd_weight: tl.float64, ce_weight: tl.float64,
    smoothing: tl.float64, inverse: tl.float64,
    TAIL: tl.constexpr, HAS_KD: tl.constexpr, HAS_CE: tl.constexpr,
    TOP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    HAS_B: tl.constexpr = labels_b_ptr is not None
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    live_row = row < rows
    exact = _inverse(temperature_ptr, temperature_step, inverse, row)
    temperature = _per_row(temperature_ptr, temperature_step, temperature, row, live_row, ACC)
    temperature = tl.where(temperature > 0, temperature, float("nan"))
    inv_t = _divide(tl.full([1], 1, ACC), temperature)
    mix = _per_row(lam_ptr, lam_step, lam, row, live_row, ACC)
    kd_weight = tl.full([1], kd_weight, ACC)
    ce_weight = tl.full([1], ce_weight, ACC)
    smoothing = tl.full([1], smoothing, ACC)
    a, b = row, row
    if HAS_CE:
        a = tl.load(labels_ptr + row).to(tl.int32)
        b = a
        if HAS_B:
            b = tl.load(labels_b_ptr + row).to(tl.int32)
    index = tl.zeros([TOP], tl.int64)
    live = index < 0
    p = tl.zeros([TOP], ACC)
    mass = tl.zeros([1], ACC)
    rest, uniform = mass, mass
    if HAS_KD:
        index, live, _, p, mass, rest, uniform, _ = _teacher(
            indices_ptr, values_ptr, lse_ptr, row, top, classes, exact, TAIL, TOP, ACC
        )
        live &= (index >= 0) & (index < classes)
    stats_ptr += row
    rows = rows.to(tl.int64)
    max_s = tl.load(stats_ptr)
    max_o = tl.load(stats_ptr + rows)
    log_s = tl.load(stats_ptr + 2 * rows)
    log_o = tl.load(stats_ptr + 3 * rows)
    log_1 = tl.load(stats_ptr + 4 * rows)
    share = tl.load(stats_ptr + 5 * rows)
    scale = share * tl.load(grad_loss_ptr + row * grad_loss_step).to(ACC)
    scale = tl.where(share == 0, 0.0, scale)
    _store_row(
        grad_ptr, student_ptr, row, classes, index, live, p, scale,
        scale * kd_weight * temperature, scale * ce_weight, smoothing, mix, a, b, mass, rest,
        tl.where(TAIL == _SMOOTH, uniform, 0.0), max_s, max_o, log_s, log_o, log_1, inv_t,
        TAIL, HAS_KD, HAS_CE, BLOCK,
    )  # fmt: skip
