"""Attention-map loss in Triton: T^2 * D(softmax(q_t k_t^T / T), softmax(q_s k_s^T / T)).

Scores live in registers alone: as in flash attention (Dao et al., 2022, arXiv:2205.14135), keys
stream through tiles beside running maxima and sums, so that memory traffic grows with tokens * dim,
not with tokens^2. Backward forms the scores again from three numbers per row: one launch gives d_q,
by blocks of queries, one d_k, by blocks of keys. No atomics: results are bitwise the same twice.
Layout: queries and keys are [batch, heads, tokens, dim] with any strides but 1 for dim; a program
owns one block of tokens of one head.
"""

from __future__ import annotations

from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from . import _config
from ._kd import _log1p

_KL = tl.constexpr(reference.KL)
_REVERSE_KL = tl.constexpr(reference.REVERSE_KL)
_JS = tl.constexpr(reference.JS)
_LN2 = tl.constexpr(0.6931471805599453)
# a masked score, and the log-sum-exp of a query that is not there: finite, so that their
# differences are 0 rather than NaN, and beyond every score
_MASKED = tl.constexpr(-1e30)
_ABSENT = tl.constexpr(1e30)


def _strides_of(*names: str) -> list[str]:
    return [f"{x}_{dim}" for x in names for dim in ("batch", "head", "token")]


# arguments whose values bring no variant of their own
_FWD_NUMBERS = ["heads", "queries", "keys", "rows", *_strides_of("q_s", "k_s", "q_t", "k_t")]
_BWD_NUMBERS = ["heads", "xs", "ys", "rows", *_strides_of("d_x", "x_s", "y_s", "x_t", "y_t")]


@triton.jit
def _head(ptr, batch, head, batch_stride, head_stride, ALIGN: tl.constexpr):
    # the first token; what holds anyway is told to the compiler: wide loads need it
    batch_stride, head_stride = batch_stride // ALIGN * ALIGN, head_stride // ALIGN * ALIGN
    return ptr + batch * batch_stride + head * head_stride


@triton.jit
def _at(x, first, DIM: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr):
    # pointers to [tokens, BLOCK_D] from `first` on in dim, and their mask
    ptr, token, live, stride = x
    d = first + tl.arange(0, BLOCK_D)
    ptrs = ptr + token.to(tl.int64)[:, None] * (stride // ALIGN * ALIGN) + d[None, :]
    mask = live[:, None]
    if DIM % BLOCK_D != 0:
        mask = mask & (d < DIM)[None, :]
    return ptrs, mask


@triton.jit
def _tokens(x, first, DIM: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr):
    ptrs, mask = _at(x, first, DIM, BLOCK_D, ALIGN)
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def _whole(x, DIM: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr):
    # all of dim, where one block holds it. else nothing, which Triton 3.6 cannot return as None
    if DIM <= BLOCK_D:
        return _tokens(x, 0, DIM, BLOCK_D, ALIGN)
    else:
        return 0


@triton.jit
def _kept(mask_ptr, key, keys):
    # [keys]: which of them a softmax is over
    keep = key < keys
    if mask_ptr is not None:
        keep = tl.load(mask_ptr + key, mask=keep, other=0) != 0
    return keep


@triton.jit
def _scores(
    x, y, whole_x, whole_y, keep, factor,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # [tokens of x, tokens of y]
    if DIM <= BLOCK_D:
        score = tl.dot(whole_x, tl.trans(whole_y), input_precision=PRECISION)
    else:
        score = tl.zeros([x[1].shape[0], y[1].shape[0]], tl.float32)
        for first in range(0, DIM, BLOCK_D):
            x_d = _tokens(x, first, DIM, BLOCK_D, ALIGN)
            y_d = _tokens(y, first, DIM, BLOCK_D, ALIGN)
            score = tl.dot(x_d, tl.trans(y_d), score, input_precision=PRECISION)
    return tl.where(keep, score * factor, _MASKED)


@triton.jit
def _maps(
    q_s, q_t, whole_q_s, whole_q_t,
    k_s_ptr, k_t_ptr, k_s_token, k_t_token, key, keys, keep, factor_s, factor_t,
    DIM_S: tl.constexpr, DIM_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr,
    ALIGN_S: tl.constexpr, ALIGN_T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # the scores of student and teacher
    k_s, k_t = (k_s_ptr, key, key < keys, k_s_token), (k_t_ptr, key, key < keys, k_t_token)
    whole_k_s = _whole(k_s, DIM_S, BLOCK_S, ALIGN_S)
    whole_k_t = _whole(k_t, DIM_T, BLOCK_T, ALIGN_T)
    s = _scores(
        q_s, k_s, whole_q_s, whole_k_s, keep, factor_s, DIM_S, BLOCK_S, ALIGN_S, PRECISION
    )  # fmt: skip
    t = _scores(
        q_t, k_t, whole_q_t, whole_k_t, keep, factor_t, DIM_T, BLOCK_T, ALIGN_T, PRECISION
    )  # fmt: skip
    return s, t


@triton.jit
def _add_tile(s, t, max_s, max_t, sum_s, sum_t, dot, KIND: tl.constexpr):
    # maxima, and relative to them sums of exponentials; dot: of the divergence's numerator
    top_s, top_t = tl.maximum(max_s, tl.max(s, 1)), tl.maximum(max_t, tl.max(t, 1))
    up_s, up_t = max_s - top_s, max_t - top_t
    scale_s, scale_t = tl.exp(up_s), tl.exp(up_t)
    s, t = s - top_s[:, None], t - top_t[:, None]
    exp_s, exp_t = tl.exp(s), tl.exp(t)
    if KIND == _KL:
        dot = scale_t * (dot + sum_t * (up_t - up_s)) + tl.sum(exp_t * (t - s), 1)
    elif KIND == _REVERSE_KL:
        dot = scale_s * (dot + sum_s * (up_s - up_t)) + tl.sum(exp_s * (s - t), 1)
    sum_s, sum_t = scale_s * sum_s + tl.sum(exp_s, 1), scale_t * sum_t + tl.sum(exp_t, 1)
    return top_s, top_t, sum_s, sum_t, dot


@triton.jit
def _softmax(x):
    # of whole rows: its logarithm, itself, and the rows' log-sum-exp
    top = tl.max(x, 1)
    x = x - top[:, None]
    e = tl.exp(x)
    total = tl.sum(e, 1)
    log_total = tl.log(total)
    return x - log_total[:, None], e * tl.div_rn(1.0, total)[:, None], top + log_total


@triton.jit
def _terms(log_p, log_q, p, q, KIND: tl.constexpr):
    # each key's part of the divergence, and w: see csrc/math/attention_map.h
    if KIND == _KL:
        return p * (log_p - log_q), q - p
    elif KIND == _REVERSE_KL:
        w = q * (log_q - log_p)
        return w, w
    elif KIND == _JS:
        # log(q/m) from p/q, m = (p + q)/2: exactly 0 where p = q. beyond e^87 one is negligible
        d = tl.minimum(tl.maximum(log_p - log_q, -87.0), 87.0)
        of_q = (1.0 - tl.log2(1.0 + tl.exp(d))) * _LN2
        w = 0.5 * q * of_q
        return 0.5 * p * (of_q + d) + w, w
    else:
        d = q - p
        return d * d, 2.0 * q * d


@triton.jit
def _slopes(w, q, centre, KIND: tl.constexpr):
    # the gradient in the student's scores
    if KIND == _KL:
        return w
    else:
        return w - q * centre


@triton.jit
def _divergence(sum_p, sum_q, dot):
    # of p from q
    inverse = tl.div_rn(1.0, sum_p)
    return dot * inverse + _log1p((sum_q - sum_p) * inverse)


@triton.jit(do_not_specialize=_FWD_NUMBERS)
def _attention_map_fwd_kernel(
    loss_ptr,  # [batch, heads, queries]
    stats_ptr,  # [3, batch, heads, queries]
    q_s_ptr, k_s_ptr, q_t_ptr, k_t_ptr,  # [batch, heads, tokens, dim] by their strides
    mask_ptr,  # [batch, keys], or None
    q_s_batch, q_s_head, q_s_token, k_s_batch, k_s_head, k_s_token,
    q_t_batch, q_t_head, q_t_token, k_t_batch, k_t_head, k_t_token,
    heads, queries, keys, rows,
    factor_s, factor_t,  # scale / T
    share,  # T^2 * a row's weight in the loss
    KIND: tl.constexpr, PRECISION: tl.constexpr,
    DIM_S: tl.constexpr, DIM_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr,
    ALIGN_S: tl.constexpr, ALIGN_T: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, ONE_TILE: tl.constexpr,
):  # fmt: skip
    # 1. the program's queries
    blocks = tl.cdiv(queries, BLOCK_Q)
    outer = (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = outer // heads, outer % heads
    query = tl.program_id(0) % blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    live = query < queries
    q_s_ptr = _head(q_s_ptr, batch, head, q_s_batch, q_s_head, ALIGN_S)
    q_t_ptr = _head(q_t_ptr, batch, head, q_t_batch, q_t_head, ALIGN_T)
    k_s_ptr = _head(k_s_ptr, batch, head, k_s_batch, k_s_head, ALIGN_S)
    k_t_ptr = _head(k_t_ptr, batch, head, k_t_batch, k_t_head, ALIGN_T)
    if mask_ptr is not None:
        mask_ptr += batch * keys
    q_s, q_t = (q_s_ptr, query, live, q_s_token), (q_t_ptr, query, live, q_t_token)
    whole_q_s = _whole(q_s, DIM_S, BLOCK_S, ALIGN_S)
    whole_q_t = _whole(q_t, DIM_T, BLOCK_T, ALIGN_T)

    # 2. log-sum-exps, divergence and centre, [queries]
    total = tl.zeros([BLOCK_Q], tl.float32)
    centre = total
    key = tl.arange(0, BLOCK_K)
    any_kept = 0
    if ONE_TILE:
        keep = _kept(mask_ptr, key, keys)
        any_kept = tl.max(keep.to(tl.int32), 0)
        s, t = _maps(
            q_s, q_t, whole_q_s, whole_q_t,
            k_s_ptr, k_t_ptr, k_s_token, k_t_token, key, keys, keep[None, :], factor_s, factor_t,
            DIM_S, DIM_T, BLOCK_S, BLOCK_T, ALIGN_S, ALIGN_T, PRECISION,
        )  # fmt: skip
        log_q, q, lse_s = _softmax(s)
        log_p, p, lse_t = _softmax(t)
        terms, w = _terms(log_p, log_q, p, q, KIND)
        total = tl.sum(terms, 1)
        if KIND != _KL:
            centre = tl.sum(w, 1)
    else:
        max_s = tl.full([BLOCK_Q], _MASKED, tl.float32)
        max_t, sum_s, sum_t, dot = max_s, total, total, total
        for start in range(0, keys, BLOCK_K):
            now = start + key
            keep = _kept(mask_ptr, now, keys)
            any_kept = tl.maximum(any_kept, tl.max(keep.to(tl.int32), 0))
            s, t = _maps(
                q_s, q_t, whole_q_s, whole_q_t,
                k_s_ptr, k_t_ptr, k_s_token, k_t_token, now, keys, keep[None, :],
                factor_s, factor_t, DIM_S, DIM_T, BLOCK_S, BLOCK_T, ALIGN_S, ALIGN_T, PRECISION,
            )  # fmt: skip
            max_s, max_t, sum_s, sum_t, dot = _add_tile(
                s, t, max_s, max_t, sum_s, sum_t, dot, KIND
            )  # fmt: skip
        lse_s, lse_t = max_s + tl.log(sum_s), max_t + tl.log(sum_t)
        if KIND == _KL:
            total = _divergence(sum_t, sum_s, dot)
        elif KIND == _REVERSE_KL:
            total = _divergence(sum_s, sum_t, dot)
            centre = total
        else:
            # these need the log-sum-exps first
            for start in range(0, keys, BLOCK_K):
                now = start + key
                keep = _kept(mask_ptr, now, keys)
                s, t = _maps(
                    q_s, q_t, whole_q_s, whole_q_t,
                    k_s_ptr, k_t_ptr, k_s_token, k_t_token, now, keys, keep[None, :],
                    factor_s, factor_t, DIM_S, DIM_T, BLOCK_S, BLOCK_T, ALIGN_S, ALIGN_T, PRECISION,
                )  # fmt: skip
                log_p, log_q = t - lse_t[:, None], s - lse_s[:, None]
                terms, w = _terms(log_p, log_q, tl.exp(log_p), tl.exp(log_q), KIND)
                total, centre = total + tl.sum(terms, 1), centre + tl.sum(w, 1)

    # 3. rows without keys have equal maps, so their divergence and centre are 0
    if mask_ptr is not None:
        lse_s, lse_t = tl.where(any_kept > 0, lse_s, 0.0), tl.where(any_kept > 0, lse_t, 0.0)
    row = outer * queries + query
    rows = rows.to(tl.int64)
    tl.store(loss_ptr + row, total * share, mask=live)
    tl.store(stats_ptr + row, lse_s, mask=live)
    tl.store(stats_ptr + rows + row, lse_t, mask=live)
    tl.store(stats_ptr + 2 * rows + row, centre, mask=live)


@triton.jit
def _row_stats(stats_ptr, row, rows, live):
    # [queries]: log-sum-exps, and centre
    lse_s = tl.load(stats_ptr + row, mask=live, other=_ABSENT)
    lse_t = tl.load(stats_ptr + rows + row, mask=live, other=_ABSENT)
    centre = tl.load(stats_ptr + 2 * rows + row, mask=live, other=0.0)
    return lse_s, lse_t, centre


@triton.jit
def _add_product(out, slopes, y, grad, GAIN: tl.constexpr, PRECISION: tl.constexpr):
    # out + (slopes * grad) y; grad broadcasts, or is None. rounded to y's dtype, slopes are small
    # numbers: they must not be too small for it
    if grad is not None:
        peak = tl.max(tl.max(tl.abs(grad), 1), 0)
        peak = tl.where(peak > 0, peak, 1.0)
        part = tl.dot((slopes * (grad / peak * GAIN)).to(y.dtype), y, input_precision=PRECISION)
        return out + part * peak
    else:
        if GAIN != 1:
            slopes *= GAIN
        return tl.dot(slopes.to(y.dtype), y, out, input_precision=PRECISION)


# x is what the gradient is of, and y what is summed over: queries and keys, or the reverse
@triton.jit(do_not_specialize=_BWD_NUMBERS)
def _attention_map_bwd_kernel(
    grad_loss_ptr,  # [batch, heads, queries], one number, or None for 1
    stats_ptr,  # [3, batch, heads, queries]
    d_x_ptr, x_s_ptr, y_s_ptr, x_t_ptr, y_t_ptr,  # [batch, heads, tokens, dim] by their strides
    mask_ptr,  # [batch, keys], or None
    d_x_batch, d_x_head, d_x_token,
    x_s_batch, x_s_head, x_s_token, y_s_batch, y_s_head, y_s_token,
    x_t_batch, x_t_head, x_t_token, y_t_batch, y_t_head, y_t_token,
    heads, xs, ys, rows,
    factor_s, factor_t,  # scale / T
    share,  # T * scale_s * a row's weight in the loss
    OF_KEYS: tl.constexpr, PER_ROW: tl.constexpr,
    KIND: tl.constexpr, PRECISION: tl.constexpr, GAIN: tl.constexpr,
    DIM_S: tl.constexpr, DIM_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr,
    ALIGN_S: tl.constexpr, ALIGN_T: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(xs, BLOCK_X)
    outer = (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = outer // heads, outer % heads
    x = tl.program_id(0) % blocks * BLOCK_X + tl.arange(0, BLOCK_X)
    live_x = x < xs
    x_s_ptr = _head(x_s_ptr, batch, head, x_s_batch, x_s_head, ALIGN_S)
    x_t_ptr = _head(x_t_ptr, batch, head, x_t_batch, x_t_head, ALIGN_T)
    y_s_ptr = _head(y_s_ptr, batch, head, y_s_batch, y_s_head, ALIGN_S)
    y_t_ptr = _head(y_t_ptr, batch, head, y_t_batch, y_t_head, ALIGN_T)
    x_s, x_t = (x_s_ptr, x, live_x, x_s_token), (x_t_ptr, x, live_x, x_t_token)
    whole_x_s = _whole(x_s, DIM_S, BLOCK_S, ALIGN_S)
    whole_x_t = _whole(x_t, DIM_T, BLOCK_T, ALIGN_T)
    rows = rows.to(tl.int64)
    if OF_KEYS:
        if mask_ptr is not None:
            mask_ptr += batch * xs
        keep = _kept(mask_ptr, x, xs)[:, None]
        first = outer * ys
    else:
        if mask_ptr is not None:
            mask_ptr += batch * ys
        first = outer * xs
        lse_s, lse_t, centre = _row_stats(stats_ptr, first + x, rows, live_x)
        lse_s, lse_t, centre = lse_s[:, None], lse_t[:, None], centre[:, None]

    first_d = tl.program_id(1) * BLOCK_OUT
    out = tl.zeros([BLOCK_X, BLOCK_OUT], tl.float32)
    for start in range(0, ys, BLOCK_Y):
        y = start + tl.arange(0, BLOCK_Y)
        live_y = y < ys
        grad = None
        if OF_KEYS:
            lse_s, lse_t, centre = _row_stats(stats_ptr, first + y, rows, live_y)
            lse_s, lse_t, centre = lse_s[None, :], lse_t[None, :], centre[None, :]
            if PER_ROW:
                grad = tl.load(grad_loss_ptr + first + y, mask=live_y, other=0.0)[None, :]
        else:
            keep = _kept(mask_ptr, y, ys)[None, :]
        y_s, y_t = (y_s_ptr, y, live_y, y_s_token), (y_t_ptr, y, live_y, y_t_token)
        whole_y_s = _whole(y_s, DIM_S, BLOCK_S, ALIGN_S)
        log_q = _scores(
            x_s, y_s, whole_x_s, whole_y_s, keep, factor_s, DIM_S, BLOCK_S, ALIGN_S, PRECISION
        ) - lse_s  # fmt: skip
        log_p = _scores(
            x_t, y_t, whole_x_t, _whole(y_t, DIM_T, BLOCK_T, ALIGN_T), keep, factor_t,
            DIM_T, BLOCK_T, ALIGN_T, PRECISION,
        ) - lse_t  # fmt: skip
        if DIM_S > BLOCK_S:
            whole_y_s = _tokens(y_s, first_d, DIM_S, BLOCK_OUT, ALIGN_S)
        q = tl.exp(log_q)
        _, w = _terms(log_p, log_q, tl.exp(log_p), q, KIND)
        slopes = _slopes(w, q, centre, KIND)
        out = _add_product(out, slopes, whole_y_s, grad, GAIN, PRECISION)

    factor = share / GAIN
    if PER_ROW and not OF_KEYS:
        out *= tl.load(grad_loss_ptr + first + x, mask=live_x, other=0.0)[:, None]
    elif grad_loss_ptr is not None and not PER_ROW:
        factor *= tl.load(grad_loss_ptr)
    d_x_ptr = _head(d_x_ptr, batch, head, d_x_batch, d_x_head, ALIGN_S)
    d_x = (d_x_ptr, x, live_x, d_x_token)
    ptrs, mask = _at(d_x, first_d, DIM_S, BLOCK_OUT, ALIGN_S)
    tl.store(ptrs, (out * factor).to(ptrs.dtype.element_ty), mask=mask)


def _has_unit(x: Tensor) -> bool:
    return x.stride(3) == 1 or x.shape[3] == 1


def _unit(x: Tensor) -> Tensor:
    """x, or a copy of it whose dim is adjacent in memory."""
    return x if _has_unit(x) else x.contiguous()


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    """(batch, head, token) of each."""
    return tuple(step for x in tensors for step in x.stride()[:3])


def _block(dim: int, most: int) -> int:
    return min(most, max(16, triton.next_power_of_2(dim)))


def _pair(block_d: int, *tensors: Tensor) -> tuple[int, int, int]:
    """The dim, the block it is read by, and what divides all strides of student or teacher."""
    dim = tensors[0].shape[3]
    return dim, _block(dim, block_d), gcd(16, *_strides(*tensors))


def _constants(
    student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], o: reference.AttentionMapOptions,
    tile: _config.MapTile,
) -> dict[str, Any]:  # fmt: skip
    dim_s, block_s, align_s = _pair(tile.block_d, *student)
    dim_t, block_t, align_t = _pair(tile.block_d, *teacher)
    return {
        "KIND": o.kind,
        "PRECISION": "tf32" if o.allow_tf32 else "ieee",
        "DIM_S": dim_s,
        "DIM_T": dim_t,
        "BLOCK_S": block_s,
        "BLOCK_T": block_t,
        "ALIGN_S": align_s,
        "ALIGN_T": align_t,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "maxnreg": tile.registers,
        "enable_fp_fusion": False,
    }


def _call(q_s: Tensor, q_t: Tensor, allow_tf32: bool) -> tuple[int, int, bool]:
    """What `_config` asks of a call: dim, bytes of an element, no tensor cores."""
    itemsize = max(q_s.element_size(), q_t.element_size())
    return max(q_s.shape[3], q_t.shape[3]), itemsize, itemsize == 4 and not allow_tf32


def _gain(student: Tensor, kind: int) -> int:
    """What lifts slopes out of float16's subnormal numbers; reverse_kl's have no bound."""
    return 4096 if student.dtype is torch.float16 and kind != reference.REVERSE_KL else 1


def _gradients(
    grad_loss: Tensor | None, q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, stats: Tensor,
    o: reference.AttentionMapOptions,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Of q_s and k_s; without grad_loss, the gradients of the loss."""
    grads = torch.empty_like(q_s), torch.empty_like(k_s)
    batch, heads, queries, dim = q_s.shape
    rows = batch * heads * queries
    if rows == 0:
        return grads[0].zero_(), grads[1].zero_()
    call = _call(q_s, q_t, o.allow_tf32)
    per_row = o.reduction == reference.NONE and grad_loss is not None
    with torch.cuda.device_of(q_s):
        if per_row:
            grad_loss = grad_loss.contiguous()
        d_q, d_k = (
            x if _has_unit(x) else torch.empty_like(x, memory_format=torch.contiguous_format)
            for x in grads
        )
        q_s, k_s, q_t, k_t = map(_unit, (q_s, k_s, q_t, k_t))
        key_mask = None if o.key_mask is None else o.key_mask.contiguous()
        for of_keys, d_x, x_s, y_s, x_t, y_t in (
            (False, d_q, q_s, k_s, q_t, k_t),
            (True, d_k, k_s, q_s, k_t, q_t),
        ):
            xs, ys = x_s.shape[2], y_s.shape[2]
            tile = _config.attention_map_bwd(ys, *call)
            block_out = _block(dim, tile.block_out)
            blocks = batch * heads * -(-xs // tile.block_x)
            _attention_map_bwd_kernel[(blocks, -(-dim // block_out))](
                grad_loss, stats, d_x, x_s, y_s, x_t, y_t, key_mask,
                *_strides(d_x, x_s, y_s, x_t, y_t), heads, xs, ys, rows,
                o.scale_s / o.temperature, o.scale_t / o.temperature,
                o.temperature * o.scale_s / (rows if o.reduction == reference.MEAN else 1),
                OF_KEYS=of_keys, PER_ROW=per_row, GAIN=_gain(q_s, o.kind),
                BLOCK_X=tile.block_x, BLOCK_Y=tile.block_y, BLOCK_OUT=block_out,
                **_constants((d_x, x_s, y_s), (x_t, y_t), o, tile),
            )  # fmt: skip
        for x, written in zip(grads, (d_q, d_k), strict=True):
            if x is not written:
                x.copy_(written)
    return grads


def attention_map_fwd(
    q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    """The reduced loss, and three numbers per row: see reference.attention_map_fwd."""
    o = reference.AttentionMapOptions(*options)
    batch, heads, queries, _ = q_s.shape
    loss = q_s.new_empty(q_s.shape[:3], dtype=torch.float32)
    stats = loss.new_empty(3, *loss.shape)
    if loss.numel() == 0:
        return loss if o.reduction == reference.NONE else loss.new_zeros(()), stats
    keys, rows = k_s.shape[2], loss.numel()
    tile = _config.attention_map_fwd(
        keys, *_call(q_s, q_t, o.allow_tf32), o.kind in (reference.JS, reference.MSE)
    )
    with torch.cuda.device_of(q_s):
        q_s, k_s, q_t, k_t = map(_unit, (q_s, k_s, q_t, k_t))
        _attention_map_fwd_kernel[(batch * heads * -(-queries // tile.block_x),)](
            loss, stats, q_s, k_s, q_t, k_t,
            None if o.key_mask is None else o.key_mask.contiguous(),
            *_strides(q_s, k_s, q_t, k_t), heads, queries, keys, rows,
            o.scale_s / o.temperature, o.scale_t / o.temperature,
            o.temperature**2 / (rows if o.reduction == reference.MEAN else 1),
            BLOCK_Q=tile.block_x, BLOCK_K=tile.block_y, ONE_TILE=keys <= tile.block_y,
            **_constants((q_s, k_s), (q_t, k_t), o, tile),
        )  # fmt: skip
        # a sum in a fixed order
        return loss if o.reduction == reference.NONE else loss.sum(), stats


def attention_map_bwd(
    grad_loss: Tensor, q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, stats: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of q_s and k_s: see reference.attention_map_bwd."""
    o = reference.AttentionMapOptions(*options)
    return _gradients(grad_loss, q_s, k_s, q_t, k_t, stats, o)


def attention_map_fwd_grad(
    q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and its gradients in q_s and k_s: see reference.attention_map_fwd_grad."""
    o = reference.AttentionMapOptions(*options)
    loss, stats = attention_map_fwd(q_s, k_s, q_t, k_t, *o)
    return loss, *_gradients(None, q_s, k_s, q_t, k_t, stats, o)
