"""Divergences of softmaxes in Triton, row by row: those of reference/row_loss.py, with CE.

With u = s/T and v = t/T, standardised or not, q = softmax(u) and p = softmax(v), a row's loss is
T^2 * sum term_i, and its gradient in u is w_i - q_i * sum(w); the numerics are those of
csrc/math/row_loss.h. A program owns a few rows and all their classes, and goes over them three
times: for maxima and sums of exponentials, for terms, and for the gradient; where logits are
standardised, twice before, for mean and variance. Where they fit one tile, all of it happens in
registers: 2 reads and 1 write. Longer rows run online softmax, and are read again from L2.
Layout: that of _kd.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..reference.row_loss import DIVERGENCES, STANDARDIZE_EPS
from ._kd import (
    _INF,
    _LOWEST_32,
    _LOWEST_64,
    _NUMBERS,
    _STRIDES,
    _TINY_32,
    _TINY_64,
    _ce_gradient,
    _cross_entropy,
    _divide,
    _log1p,
    _logit_of,
    _max,
    _multiple,
    _per_row,
    _program_rows,
    _row_starts,
    _shares,
    _sum,
    _tile,
    _wide,
)

_KL = tl.constexpr(DIVERGENCES["kl"])
_REVERSE_KL = tl.constexpr(DIVERGENCES["reverse_kl"])
_JS = tl.constexpr(DIVERGENCES["js"])
_TV = tl.constexpr(DIVERGENCES["tv"])
_DKD = tl.constexpr(DIVERGENCES["dkd"])
_OFA = tl.constexpr(DIVERGENCES["ofa"])
_STANDARDIZE_EPS = tl.constexpr(STANDARDIZE_EPS)


@triton.jit
def _product(weight, factor):
    # 0 where the weight is, whatever the factor
    return tl.where(weight == 0, 0.0, weight * factor)


@triton.jit
def _read(
    s, t, start, cols, s_ptrs, t_ptrs, s_class, t_class, live, bound,
    HAS_KD: tl.constexpr, WHOLE_ROW: tl.constexpr,
):  # fmt: skip
    # the tile from class `start` on: class numbers, which there are, and logits; a whole row is
    # at hand
    now = start + cols
    mask = _wide(live) & (now < bound)
    if not WHOLE_ROW:
        wide = now.to(tl.int64)
        s = tl.load(s_ptrs + wide * s_class, mask=mask, other=-_INF).to(s.dtype)
        if HAS_KD:
            t = tl.load(t_ptrs + wide * t_class, mask=mask, other=-_INF).to(s.dtype)
    return now, mask, s, t


@triton.jit
def _add_exponentials(x, top, total, inv, WHOLE_ROW: tl.constexpr):
    # the largest x and the sum of exp((x - top) * inv), [rows, lanes]: online softmax of each lane,
    # or the row's maximum at once
    now = tl.maximum(top, _max(x))
    if WHOLE_ROW:
        now = tl.broadcast_to(tl.max(now, 1)[:, None], now.shape)
        return now, _sum(tl.exp((x - _wide(now)) * _wide(inv)))
    else:
        total *= tl.exp((top - now) * inv[:, None])
        return now, total + _sum(tl.exp((x - _wide(now)) * _wide(inv)))


@triton.jit
def _over_lanes(top, total, inv, WHOLE_ROW: tl.constexpr):
    # the same of rows, [rows]
    now = tl.max(top, 1)
    if not WHOLE_ROW:
        total *= tl.exp((top - now[:, None]) * inv[:, None])
    return now, tl.sum(total, 1)


@triton.jit
def _away(x, cols, a, DIVERGENCE: tl.constexpr):
    # dkd's softmaxes are those of the other classes
    if DIVERGENCE == _DKD:
        return tl.where(cols == _wide(a), -_INF, x)
    else:
        return x


@triton.jit
def _probabilities(x, top, inv, by):
    # x relative to its maximum, over the temperature; and its softmax
    u = (x - _wide(top)) * _wide(inv)
    return u, tl.exp(u) * _wide(by)


@triton.jit
def _kl_term(p, u, v, shift):
    # p * (log p - log q): 0 where p is masked, +inf where only q is, even if p has underflowed
    tiny = _TINY_64 if p.dtype == tl.float64 else _TINY_32
    return tl.where(v == -_INF, 0.0, tl.maximum(p, tiny) * (v - u + shift))


@triton.jit
def _terms(
    u, v, q, p, cols,  # [steps, rows, lanes, vec]
    a, shift, log_s, log_t, c_label, w_t_label, beta,  # [rows]
    DIVERGENCE: tl.constexpr,
):  # fmt: skip
    # a class's term, and w and w_t: the gradient in u is w - q * sum(w), that in v alike, so that
    # any multiple of q may be part of w. log p - log q is v - u + shift. Equal logits give 0
    if DIVERGENCE == _KL or DIVERGENCE == _DKD:
        term = _kl_term(p, u, v, _wide(shift))
        return term, q - p, term
    elif DIVERGENCE == _REVERSE_KL:
        term = _kl_term(q, v, u, _wide(-shift))
        return term, term, p - q
    elif DIVERGENCE == _JS:
        # m is the larger of q and p times 1 + weight of the smaller * (e^-|log p - log q| - 1);
        # near p = q first-order terms cancel, which takes all digits of that
        beta = _wide(beta)
        d = v - u + _wide(shift)
        down = -tl.abs(d)
        low = tl.where(d > 0, 1 - beta, beta)
        above = -_log1p(low * _expm1(down))
        below = down + above
        w = _product((1 - beta) * q, tl.where(d > 0, below, above))
        w_t = _product(beta * p, tl.where(d > 0, above, below))
        return w + w_t, w, w_t
    elif DIVERGENCE == _TV:
        sign = tl.where(q > p, 0.5, tl.where(q < p, -0.5, (q - p) * 0.5))
        return tl.abs((q - p) * 0.5), q * sign, -p * sign
    else:
        c = tl.where(_wide(beta) == 1, p, tl.exp(_wide(beta) * (v - _wide(log_t))))
        label = cols == _wide(a)
        c = tl.where(label, _wide(c_label), c)
        term = _product(c, _wide(log_s) - u)
        return term, -c, tl.where(label, _wide(w_t_label), _wide(beta) * term)


@triton.jit
def _expm1(x):
    # of x <= 0; Kahan's: the rounding of e^x cancels in the quotient
    y = tl.exp(x)
    return tl.where(y == 1, x, tl.where(x < -1, y - 1, (y - 1) * _divide(x, tl.log(y))))


@triton.jit
def _log_sigmoid(z):
    return tl.minimum(z, 0.0) - _log1p(tl.exp(-tl.abs(z)))


@triton.jit
def _sigmoid(z):
    e = tl.exp(-tl.abs(z))
    return tl.where(z >= 0, 1.0, e) / (1 + e)


@triton.jit
def _squares(x, mean, mask):
    # [rows, lanes]
    centred = x - _wide(mean)
    return _sum(tl.where(mask, centred * centred, 0.0))


@triton.jit
def _deviation(squares, others):
    # [rows]; others: classes - 1
    variance = tl.sum(squares, 1) / others
    if variance.dtype == tl.float64:
        return tl.sqrt(variance)
    else:
        return tl.sqrt_rn(variance)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_STRIDES)
def _row_loss_kernel(
    loss_ptr, d_temperature_ptr,  # [rows], or None
    grad_loss_ptr, grad_loss_step,  # [rows] or []; None: ones
    grad_ptr, student_ptr, teacher_ptr,  # [outer, rows, classes] by their strides; grad or None
    g_outer, g_row, g_class, s_outer, s_row, s_class, t_outer, t_row, t_class,
    labels_ptr, labels_b_ptr, weights_ptr,  # [rows], or None
    lam_ptr, lam_step, temperature_ptr, temperature_step,  # [rows], [] or None
    totals_ptr,  # [parts]; read where there is a mean to take; in the accumulation type
    mean, parts, rows, inner, classes, ignore_index,
    temperature: tl.float64, lam: tl.float64, kd_weight: tl.float64, ce_weight: tl.float64,
    smoothing: tl.float64, alpha: tl.float64, beta: tl.float64, share: tl.float64,
    DIVERGENCE: tl.constexpr, STANDARDIZE: tl.constexpr, HAS_KD: tl.constexpr,
    HAS_CE: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
    STEPS: tl.constexpr, BLOCK_ROWS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = totals_ptr.dtype.element_ty
    TILE: tl.constexpr = STEPS * LANES * VEC
    LOWEST: tl.constexpr = _LOWEST_64 if ACC == tl.float64 else _LOWEST_32
    HAS_B: tl.constexpr = labels_b_ptr is not None
    HAS_ZEROS: tl.constexpr = labels_ptr is not None or weights_ptr is not None
    HAS_LABEL: tl.constexpr = DIVERGENCE == _DKD or DIVERGENCE == _OFA
    HAS_ALONG: tl.constexpr = STANDARDIZE or d_temperature_ptr is not None
    HAS_MOVED: tl.constexpr = d_temperature_ptr is not None

    # 1. a row that fits is on its way while its options are read
    outer, at, row, live = _program_rows(tl.program_id(0), inner, BLOCK_ROWS)
    s_rows = _row_starts(student_ptr, outer, at, s_outer, s_row, VEC)
    t_rows = _row_starts(teacher_ptr, outer, at, t_outer, t_row, VEC)
    s_ptrs, t_ptrs = _wide(s_rows), _wide(t_rows)
    bound = _multiple(classes, VEC)
    cols = _tile(STEPS, LANES, VEC)
    end = TILE if WHOLE_ROW else classes
    s = tl.zeros([STEPS, BLOCK_ROWS, LANES, VEC], ACC)
    t = s
    if WHOLE_ROW:
        now, mask, s, t = _read(
            s, t, 0, cols, s_ptrs, t_ptrs, s_class, t_class, live, bound, HAS_KD, False
        )

    # 2. the rows' options, [rows]
    one = tl.full([BLOCK_ROWS], 1, ACC)
    zero = tl.zeros([BLOCK_ROWS], ACC)
    temperature = _per_row(temperature_ptr, temperature_step, temperature, row, live, ACC)
    temperature = tl.where(temperature > 0, temperature, float("nan"))
    mix = _per_row(lam_ptr, lam_step, lam, row, live, ACC)
    kd_weight = tl.full([BLOCK_ROWS], kd_weight, ACC)
    ce_weight = tl.full([BLOCK_ROWS], ce_weight, ACC)
    smoothing = tl.full([BLOCK_ROWS], smoothing, ACC)
    alpha = tl.full([BLOCK_ROWS], alpha, ACC)
    beta = tl.full([BLOCK_ROWS], beta, ACC)
    scale, a, b = _shares(
        labels_ptr, labels_b_ptr, weights_ptr, totals_ptr, mean, parts, rows, row, live, classes,
        ignore_index, share, ACC,
    )  # fmt: skip

    # 3. what the logits are divided by
    nothing = tl.zeros([BLOCK_ROWS, LANES], ACC)
    mean_s, std = zero, one
    inv_s = _divide(one, temperature)
    inv_t = inv_s
    others = tl.full([BLOCK_ROWS], classes - 1, ACC)
    if HAS_KD and STANDARDIZE:
        sum_s, sum_t = nothing, nothing
        for start in range(0, end, TILE):
            now, mask, s, t = _read(
                s, t, start, cols, s_ptrs, t_ptrs, s_class, t_class, live, bound, HAS_KD, WHOLE_ROW
            )
            sum_s += _sum(tl.where(mask, s, 0.0))
            sum_t += _sum(tl.where(mask, t, 0.0))
        mean_s = tl.sum(sum_s, 1) / (others + 1)
        mean_t = tl.sum(sum_t, 1) / (others + 1)
        sum_s, sum_t = nothing, nothing
        for start in range(0, end, TILE):
            now, mask, s, t = _read(
                s, t, start, cols, s_ptrs, t_ptrs, s_class, t_class, live, bound, HAS_KD, WHOLE_ROW
            )
            sum_s += _squares(s, mean_s, mask)
            sum_t += _squares(t, mean_t, mask)
        std = _deviation(sum_s, others)
        inv_s = _divide(one, temperature * (std + _STANDARDIZE_EPS))
        inv_t = _divide(one, temperature * (_deviation(sum_t, others) + _STANDARDIZE_EPS))

    # 4. maxima, and sums relative to them, [rows]; of the student at T = 1, too
    lowest = tl.full([BLOCK_ROWS, LANES], LOWEST, ACC)
    top_s, top_t, top_1 = lowest, lowest, lowest
    sum_s, sum_t, sum_1 = nothing, nothing, nothing
    for start in range(0, end, TILE):
        now, mask, s, t = _read(
            s, t, start, cols, s_ptrs, t_ptrs, s_class, t_class, live, bound, HAS_KD, WHOLE_ROW
        )
        if HAS_KD:
            top_s, sum_s = _add_exponentials(
                _away(s, now, a, DIVERGENCE), top_s, sum_s, inv_s, WHOLE_ROW
            )
            top_t, sum_t = _add_exponentials(
                _away(t, now, a, DIVERGENCE), top_t, sum_t, inv_t, WHOLE_ROW
            )
        if HAS_CE:
            top_1, sum_1 = _add_exponentials(s, top_1, sum_1, one, WHOLE_ROW)
    top_s, sum_s = _over_lanes(top_s, sum_s, inv_s, WHOLE_ROW)
    top_t, sum_t = _over_lanes(top_t, sum_t, inv_t, WHOLE_ROW)
    top_1, sum_1 = _over_lanes(top_1, sum_1, one, WHOLE_ROW)
    log_s, log_t = tl.log(sum_s), tl.log(sum_t)
    by_s, by_t = 1 / sum_s, 1 / sum_t
    shift = _log1p((sum_s - sum_t) * by_t)

    # 5. of the label's class alone
    s_label, t_label, c_label, w_t_label = zero, zero, zero, zero
    if HAS_KD and HAS_LABEL:
        s_label = (_logit_of(s_rows, s_class, a, live, classes, ACC) - top_s) * inv_s
        t_label = (_logit_of(t_rows, t_class, a, live, classes, ACC) - top_t) * inv_t
    if HAS_KD and DIVERGENCE == _OFA:
        p_y = tl.exp(t_label) * by_t
        power = tl.exp(beta * _log1p(p_y))
        c_label = tl.where(beta == 1, p_y, power - 1)
        w_t_label = _product(beta * p_y * power / (1 + p_y), log_s - s_label)

    # 6. terms, and what the gradients need of their derivatives
    terms, sum_w, sum_w_t, total = nothing, nothing, nothing, nothing
    w_u, q_u, w_v, p_v = nothing, nothing, nothing, nothing
    for start in range(0, end, TILE):
        now, mask, s, t = _read(
            s, t, start, cols, s_ptrs, t_ptrs, s_class, t_class, live, bound, HAS_KD, WHOLE_ROW
        )
        if HAS_KD:
            u, q = _probabilities(_away(s, now, a, DIVERGENCE), top_s, inv_s, by_s)
            v, p = _probabilities(_away(t, now, a, DIVERGENCE), top_t, inv_t, by_t)
            term, w, w_t = _terms(
                u, v, q, p, now, a, shift, log_s, log_t, c_label, w_t_label, beta, DIVERGENCE
            )
            terms += _sum(term)
            sum_w += _sum(w)
            if HAS_ALONG:
                w_u += _sum(_product(w, u))
                q_u += _sum(_product(q, u))
            if HAS_MOVED:
                sum_w_t += _sum(w_t)
                w_v += _sum(_product(w_t, v))
                p_v += _sum(_product(p, v))
        if HAS_SMOOTHING:
            total += _sum(tl.where(mask, s - _wide(top_1), 0.0))

    # 7. the row's divergence, [rows]; its gradient in u: by_w * w - by_q * q, at dkd's label d_z_s;
    # along and moved: of the gradient in u times u, and of that and the teacher's
    divergence, by_w, by_q, d_z_s = tl.sum(terms, 1), one, tl.sum(sum_w, 1), zero
    q_u, p_v = tl.sum(q_u, 1), tl.sum(p_v, 1)
    along = tl.sum(w_u, 1) - by_q * q_u
    along_t = tl.sum(w_v, 1) - tl.sum(sum_w_t, 1) * p_v
    if DIVERGENCE == _DKD:
        # the label's class against all others, from its odds
        z_s, z_t = s_label - log_s, t_label - log_t
        p_y, p_not_y = _sigmoid(z_t), _sigmoid(-z_t)
        of_label = _product(p_y, _log_sigmoid(z_t) - _log_sigmoid(z_s))
        of_label += _product(p_not_y, _log_sigmoid(-z_t) - _log_sigmoid(-z_s))
        d_z_s = alpha * (_sigmoid(z_s) - p_y)
        d_z_t = alpha * _product(p_y * p_not_y, z_t - z_s)
        divergence = alpha * of_label + beta * divergence
        by_w, by_q = beta, beta * by_q + d_z_s
        along = beta * along + (_product(d_z_s, s_label) - d_z_s * q_u)
        along_t = beta * along_t + (_product(d_z_t, t_label) - d_z_t * p_v)
    if loss_ptr is not None:
        loss = zero
        if HAS_KD:
            loss = kd_weight * temperature * temperature * divergence
        if HAS_CE:
            cross_entropy = _cross_entropy(
                s_rows, s_class, live, top_1, tl.log(sum_1), tl.sum(total, 1), smoothing, mix, a,
                b, classes, ACC, HAS_SMOOTHING, HAS_B,
            )  # fmt: skip
            loss += ce_weight * cross_entropy
        tl.store(loss_ptr + row, _product(scale, loss), mask=live)

    if grad_ptr is not None:
        if grad_loss_ptr is not None:
            incoming = tl.load(grad_loss_ptr + row * grad_loss_step, mask=live, other=0).to(ACC)
            scale = _product(scale, incoming)

        if HAS_MOVED:
            by_temperature = zero
            if HAS_KD:
                by_temperature = 2 * divergence - (along + along_t)
                by_temperature *= kd_weight * temperature
            tl.store(d_temperature_ptr + row, _product(scale, by_temperature), mask=live)

        # 8. the gradient
        by_kd, slope = scale * kd_weight * temperature, zero
        if STANDARDIZE:
            by_kd /= std + _STANDARDIZE_EPS
            slope = by_kd * along * temperature / (others * std)
        by_1 = scale * ce_weight / sum_1
        g_ptrs = _wide(_row_starts(grad_ptr, outer, at, g_outer, g_row, VEC))
        for start in range(0, end, TILE):
            now, mask, s, t = _read(
                s, t, start, cols, s_ptrs, t_ptrs, s_class, t_class, live, bound, HAS_KD, WHOLE_ROW
            )
            g = tl.zeros([STEPS, BLOCK_ROWS, LANES, VEC], ACC)
            if HAS_KD:
                u, q = _probabilities(_away(s, now, a, DIVERGENCE), top_s, inv_s, by_s)
                v, p = _probabilities(_away(t, now, a, DIVERGENCE), top_t, inv_t, by_t)
                _term, w, _w_t = _terms(
                    u, v, q, p, now, a, shift, log_s, log_t, c_label, w_t_label, beta, DIVERGENCE
                )
                d_u = w - _wide(by_q) * q
                if DIVERGENCE == _DKD:
                    d_u = _wide(by_w) * w - _wide(by_q) * q
                    d_u = tl.where(now == _wide(a), _wide(d_z_s), d_u)
                g = _wide(by_kd) * d_u
                if STANDARDIZE:
                    g -= _product(s - _wide(mean_s), _wide(slope))
            if HAS_CE:
                g += _ce_gradient(
                    now, tl.exp(s - _wide(top_1)), by_1, scale * ce_weight, smoothing, mix, a, b,
                    classes, HAS_SMOOTHING, HAS_B,
                )  # fmt: skip
            if HAS_ZEROS:
                # an ignored row may hold NaN
                g = tl.where(_wide(scale) == 0, 0.0, g)
            at_classes = g_ptrs + now.to(tl.int64) * g_class
            tl.store(at_classes, g.to(grad_ptr.dtype.element_ty), mask=mask)
