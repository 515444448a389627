"""Relational distillation in Triton: pairwise distances and angles of triplets, from Gram matrices.

The numerics are those of csrc/cpu/rkd.cpp. A program owns a tile of pairs (a, b) and lets every
sample m pass: the three angles of the triangle (a, b, m) hold all that the pair's gradient needs.
Each angle is formed for its three pairs, which costs arithmetic but no atomics: sums have a fixed
order. Only tiles on and above the diagonal are computed; memory is the Grams and the gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_SAME_32 = tl.constexpr(8 * 2.0**-23)  # squared distances below it, of the norms, are rounding
_SAME_64 = tl.constexpr(8 * 2.0**-52)
_TINY_32 = tl.constexpr(1.1754943508222875e-38)
_TINY_64 = tl.constexpr(2.2250738585072014e-308)

_ROW = 256  # numbers of a row that a program reads at a time
_BLOCK = 16  # samples on a side of a tile: two pairs a thread, and few samples fill a GPU


@triton.jit
def _divide(x, y):
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def _lengths(gram, norm_a, norm_b):
    # distances and their inverses; 0 for pairs that count as one
    SAME: tl.constexpr = _SAME_64 if gram.dtype == tl.float64 else _SAME_32
    TINY: tl.constexpr = _TINY_64 if gram.dtype == tl.float64 else _TINY_32
    total = norm_a + norm_b
    squared = total - 2 * gram
    same = squared < tl.maximum(total * SAME, TINY)
    if gram.dtype == tl.float64:
        length = tl.sqrt(tl.where(same, 1.0, squared))
    else:
        length = tl.sqrt_rn(tl.where(same, 1.0, squared))
    inverse = _divide(tl.full(length.shape, 1, length.dtype), length)
    return tl.where(same, 0.0, length), tl.where(same, 0.0, inverse)


@triton.jit
def _clamp(x):
    # a NaN stays one
    return tl.where(x > 1, 1.0, tl.where(x < -1, -1.0, x))


@triton.jit
def _total(ptr, n, ROW: tl.constexpr):
    # of n numbers
    part = tl.zeros([ROW], ptr.dtype.element_ty)
    for start in range(0, n, ROW):
        at = start + tl.arange(0, ROW)
        part += tl.load(ptr + at, mask=at < n, other=0)
    return tl.sum(part, 0)


@triton.jit
def _inverse_mean(total, n):
    pairs = n.to(total.dtype) * (n - 1).to(total.dtype)
    return tl.where(total == 0, 0.0, _divide(pairs, total))


@triton.jit
def _row_lengths(gram_ptr, i, at, live, n):
    # of sample i to samples `at`
    gram = tl.load(gram_ptr + i * n + at, mask=live, other=0)
    norms = tl.load(gram_ptr + at * (n + 1), mask=live, other=0)
    length, _ = _lengths(gram, tl.load(gram_ptr + i * (n + 1)), norms)
    return tl.where(live & (at != i), length, 0.0)


@triton.jit(do_not_specialize=["n"])
def _rkd_mean_kernel(sums_ptr, gram_s_ptr, gram_t_ptr, n, ROW: tl.constexpr):
    # sums [4, n]: of a row's distances, of the student and of the teacher
    i = tl.program_id(0).to(tl.int64)
    sum_s = tl.zeros([ROW], sums_ptr.dtype.element_ty)
    sum_t = sum_s
    for start in range(0, n, ROW):
        at = start + tl.arange(0, ROW).to(tl.int64)
        sum_s += _row_lengths(gram_s_ptr, i, at, at < n, n)
        sum_t += _row_lengths(gram_t_ptr, i, at, at < n, n)
    tl.store(sums_ptr + i, tl.sum(sum_s, 0))
    tl.store(sums_ptr + n + i, tl.sum(sum_t, 0))


@triton.jit(do_not_specialize=["n"])
def _rkd_distance_kernel(sums_ptr, gram_s_ptr, gram_t_ptr, n, ROW: tl.constexpr):
    # sums [4, n]: then of h(psi_s - psi_t), and of h' psi_s
    i = tl.program_id(0).to(tl.int64)
    by_s = _inverse_mean(_total(sums_ptr, n, ROW), n)
    by_t = _inverse_mean(_total(sums_ptr + n, n, ROW), n)
    loss = tl.zeros([ROW], sums_ptr.dtype.element_ty)
    slope = loss
    for start in range(0, n, ROW):
        at = start + tl.arange(0, ROW).to(tl.int64)
        psi = _row_lengths(gram_s_ptr, i, at, at < n, n) * by_s
        x = psi - _row_lengths(gram_t_ptr, i, at, at < n, n) * by_t
        h = _clamp(x)
        loss += h * (x - 0.5 * h)
        slope += h * psi
    tl.store(sums_ptr + 2 * n + i, tl.sum(loss, 0))
    tl.store(sums_ptr + 3 * n + i, tl.sum(slope, 0))


@triton.jit
def _cosines(gram, r_ab, norm_a, norm_b, gram_ma, gram_mb, norm_m, r_ma, r_mb):
    # at m, at a and at b, of triangles of pairs [a, b] and one m
    ma, mb = gram_ma[:, None], gram_mb[None, :]
    at_m = r_ma[:, None] * r_mb[None, :] * (gram - ma - mb + norm_m)
    at_a = r_ab * r_ma[:, None] * (mb - gram - ma + norm_a[:, None])
    at_b = r_ab * r_mb[None, :] * (ma - gram - mb + norm_b[None, :])
    return at_m, at_a, at_b


@triton.jit(do_not_specialize=["n"])
def _rkd_pairs_kernel(
    parts_ptr,  # [tiles, tiles]: sums of h over the angles
    grad_ptr,  # [n, n], its diagonal 0
    gram_s_ptr, gram_t_ptr,  # [n, n]
    sums_ptr,  # [4, n]
    n, distance_weight: tl.float64, angle_weight: tl.float64,  # over n^2, over n^3
    HAS_DISTANCE: tl.constexpr, HAS_ANGLE: tl.constexpr,
    BLOCK: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = grad_ptr.dtype.element_ty
    row, column = tl.program_id(0), tl.program_id(1)
    part_ptr = parts_ptr + row * tl.num_programs(1) + column
    if column < row:
        tl.store(part_ptr, tl.zeros([], ACC))
    else:
        # 1. the pairs
        a = row.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        b = column.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        live_a, live_b = a < n, b < n
        live = live_a[:, None] & live_b[None, :]
        at = a[:, None] * n + b[None, :]
        norm_sa = tl.load(gram_s_ptr + a * (n + 1), mask=live_a, other=0)
        norm_sb = tl.load(gram_s_ptr + b * (n + 1), mask=live_b, other=0)
        norm_ta = tl.load(gram_t_ptr + a * (n + 1), mask=live_a, other=0)
        norm_tb = tl.load(gram_t_ptr + b * (n + 1), mask=live_b, other=0)
        gram_s = tl.load(gram_s_ptr + at, mask=live, other=0)
        gram_t = tl.load(gram_t_ptr + at, mask=live, other=0)
        length_s, r_sab = _lengths(gram_s, norm_sa[:, None], norm_sb[None, :])
        length_t, r_tab = _lengths(gram_t, norm_ta[:, None], norm_tb[None, :])
        pull = tl.zeros([BLOCK, BLOCK], ACC)  # dloss / d(squared distance)
        loss = pull

        # 2. the angles of each triangle with a third sample
        if HAS_ANGLE:
            start = tl.zeros([], tl.int64)  # of row m
            for m in range(0, n):
                ma, mb, mm = start + a, start + b, start + m
                start += n
                norm_sm, norm_tm = tl.load(gram_s_ptr + mm), tl.load(gram_t_ptr + mm)
                gram_sma = tl.load(gram_s_ptr + ma, mask=live_a, other=0)
                gram_smb = tl.load(gram_s_ptr + mb, mask=live_b, other=0)
                gram_tma = tl.load(gram_t_ptr + ma, mask=live_a, other=0)
                gram_tmb = tl.load(gram_t_ptr + mb, mask=live_b, other=0)
                _, r_sma = _lengths(gram_sma, norm_sm, norm_sa)
                _, r_smb = _lengths(gram_smb, norm_sm, norm_sb)
                _, r_tma = _lengths(gram_tma, norm_tm, norm_ta)
                _, r_tmb = _lengths(gram_tmb, norm_tm, norm_tb)
                sm, sa, sb = _cosines(
                    gram_s, r_sab, norm_sa, norm_sb, gram_sma, gram_smb, norm_sm, r_sma, r_smb
                )
                tm, ta, tb = _cosines(
                    gram_t, r_tab, norm_ta, norm_tb, gram_tma, gram_tmb, norm_tm, r_tma, r_tmb
                )
                h = _clamp(sm - tm)
                loss += h * (sm - tm - 0.5 * h)
                turn = _clamp(sa - ta) * (r_sma[:, None] - r_sab * sa)
                turn += _clamp(sb - tb) * (r_smb[None, :] - r_sab * sb)
                pull += r_sab * turn - r_sma[:, None] * r_smb[None, :] * h
            pull *= tl.full([], angle_weight, ACC)

        # 3. the distance
        if HAS_DISTANCE:
            by_s = _inverse_mean(_total(sums_ptr, n, ROW), n)
            by_t = _inverse_mean(_total(sums_ptr + n, n, ROW), n)
            pairs = tl.maximum(n.to(ACC) * (n - 1).to(ACC), 1.0)
            mean_slope = _divide(_total(sums_ptr + 3 * n, n, ROW), pairs)
            slope = _clamp(length_s * by_s - length_t * by_t) - mean_slope
            pull += tl.full([], distance_weight, ACC) * by_s * slope * r_sab

        # 4. both halves
        # padded samples are no points, but seem to lie at the origin
        loss = tl.sum(tl.sum(tl.where(live, loss, 0.0), 1), 0)
        tl.store(part_ptr, tl.where(column == row, loss, 2 * loss))
        pull = tl.where(a[:, None] == b[None, :], 0.0, -pull)
        tl.store(grad_ptr + at, pull, mask=live)
        if column != row:  # a tile on the diagonal holds both
            tl.store(grad_ptr + b[None, :] * n + a[:, None], pull, mask=live)


@triton.jit(do_not_specialize=["n", "parts"])
def _rkd_finish_kernel(
    loss_ptr, grad_ptr, parts_ptr, sums_ptr, n, parts,
    distance_weight: tl.float64, angle_weight: tl.float64,
    HAS_DISTANCE: tl.constexpr, HAS_ANGLE: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    # the diagonal, with which rows sum to 0; and the loss
    ACC: tl.constexpr = grad_ptr.dtype.element_ty
    i = tl.program_id(0).to(tl.int64)
    tl.store(grad_ptr + i * (n + 1), -_total(grad_ptr + i * n, n, ROW))
    if i == 0:
        loss = tl.zeros([], ACC)
        if HAS_DISTANCE:
            loss += _total(sums_ptr + 2 * n, n, ROW) * tl.full([], distance_weight, ACC)
        if HAS_ANGLE:
            loss += _total(parts_ptr, parts, ROW) * tl.full([], angle_weight, ACC)
        tl.store(loss_ptr, loss)


def rkd_fwd_grad(
    gram_s: Tensor, gram_t: Tensor, distance_weight: float, angle_weight: float
) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient in the student's Gram matrix: see reference.rkd_fwd_grad."""
    n = gram_s.shape[0]
    loss = gram_s.new_empty(())
    grad = gram_s.new_empty((n, n))
    if n == 0:
        return loss.zero_(), grad
    gram_s, gram_t = gram_s.contiguous(), gram_t.contiguous()
    tiles = -(-n // _BLOCK)
    sums, parts = gram_s.new_empty((4, n)), gram_s.new_empty((tiles, tiles))
    weights = distance_weight / n**2, angle_weight / n**3
    terms = {"HAS_DISTANCE": distance_weight != 0, "HAS_ANGLE": angle_weight != 0, "ROW": _ROW}
    # without a bound, ptxas of some versions would rather spill than take a few registers more
    bound = {"maxnreg": 168 if gram_s.dtype == torch.float64 else 80}
    with torch.cuda.device_of(gram_s):
        if distance_weight != 0:
            options = {"ROW": _ROW, "enable_fp_fusion": False}
            _rkd_mean_kernel[(n,)](sums, gram_s, gram_t, n, **options)
            _rkd_distance_kernel[(n,)](sums, gram_s, gram_t, n, **options, **bound)
        _rkd_pairs_kernel[(tiles, tiles)](
            parts, grad, gram_s, gram_t, sums, n, *weights, **terms, BLOCK=_BLOCK,
            num_warps=4, enable_fp_fusion=False, **bound,
        )  # fmt: skip
        _rkd_finish_kernel[(n,)](
            loss, grad, parts, sums, n, tiles * tiles, *weights, **terms, enable_fp_fusion=False
        )
    return loss, grad
