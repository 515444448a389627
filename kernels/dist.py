"""DIST in Triton: correlations of rows and of columns of probabilities; see csrc/math/dist.h.

Moments are two kernels: a program per row finds its maxima, sums and moments, then a program
per tile of classes and chunk of rows adds up the columns, relative to the chunk's first row.
Chunks are added in float64, in a fixed order. The gradient is a program per row. Each sweep over a
row but the first finds it in cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _config
from ._kd import _divide

_INF = tl.constexpr(float("inf"))
_COLUMNS = 64  # classes of a tile of columns
_ROWS = 16  # rows of it at a time
_CHUNK = 256  # rows whose columns are summed in float32


@triton.jit
def _online(x, top, total, inv_t):
    new = tl.maximum(top, tl.max(x, 0))
    scaled = total * tl.exp((top - new) * inv_t)
    return new, tl.where(total == 0, 0.0, scaled) + tl.sum(tl.exp((x - new) * inv_t), 0)


@triton.jit(do_not_specialize=["rows", "classes"])
def _dist_rows_kernel(
    stats_ptr,  # [7, rows]
    student_ptr, teacher_ptr,  # [rows, classes]
    rows, classes, inv_t: tl.float64, BLOCK: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    LOWEST: tl.constexpr = -1.7976931348623157e308 if ACC == tl.float64 else -3.4028234663852886e38
    row = tl.program_id(0).to(tl.int64)
    inv_t = tl.full([], inv_t, ACC)
    max_s, sum_s = tl.full([], LOWEST, ACC), tl.zeros([], ACC)
    max_t, sum_t = max_s, sum_s
    base = row * classes
    for start in range(0, classes, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        live = cols < classes
        s = tl.load(student_ptr + base + cols, mask=live, other=-_INF).to(ACC)
        t = tl.load(teacher_ptr + base + cols, mask=live, other=-_INF).to(ACC)
        max_s, sum_s = _online(s, max_s, sum_s, inv_t)
        max_t, sum_t = _online(t, max_t, sum_t, inv_t)
    one = tl.full([], 1, ACC)
    by_s, by_t = _divide(one, sum_s), _divide(one, sum_t)
    v_q = tl.zeros([BLOCK], ACC)
    v_p, c = v_q, v_q
    uniform = 1 / classes.to(ACC)
    for start in range(0, classes, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        live = cols < classes
        s = tl.load(student_ptr + base + cols, mask=live, other=-_INF).to(ACC)
        t = tl.load(teacher_ptr + base + cols, mask=live, other=-_INF).to(ACC)
        q = tl.where(live, tl.exp((s - max_s) * inv_t) * by_s - uniform, 0.0)
        p = tl.where(live, tl.exp((t - max_t) * inv_t) * by_t - uniform, 0.0)
        v_q += q * q
        v_p += p * p
        c += q * p
    stats_ptr += row
    rows = rows.to(tl.int64)
    tl.store(stats_ptr, max_s)
    tl.store(stats_ptr + rows, by_s)
    tl.store(stats_ptr + 2 * rows, max_t)
    tl.store(stats_ptr + 3 * rows, by_t)
    tl.store(stats_ptr + 4 * rows, tl.sum(v_q, 0))
    tl.store(stats_ptr + 5 * rows, tl.sum(v_p, 0))
    tl.store(stats_ptr + 6 * rows, tl.sum(c, 0))


@triton.jit
def _probabilities(ptr, stats_ptr, row, cols, live_row, live, rows, classes, inv_t):
    # [ROWS, COLUMNS], of the student or of the teacher
    top = tl.load(stats_ptr + row, mask=live_row, other=0)
    by = tl.load(stats_ptr + rows + row, mask=live_row, other=0)
    at = row[:, None] * classes + cols[None, :]
    x = tl.load(ptr + at, mask=live, other=-_INF).to(top.dtype)
    return tl.exp((x - top[:, None]) * inv_t) * by[:, None]


@triton.jit(do_not_specialize=["rows", "classes"])
def _dist_columns_kernel(
    parts_ptr,  # [chunks, 5, classes], float64
    stats_ptr,  # [7, rows]
    student_ptr, teacher_ptr,  # [rows, classes]
    rows, classes, inv_t: tl.float64,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    cols = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    chunk = tl.program_id(1).to(tl.int64)
    inv_t = tl.full([], inv_t, ACC)
    rows = rows.to(tl.int64)
    inside = cols < classes
    # 1. the first row is the pivot
    first = chunk * CHUNK + tl.arange(0, 1)
    there = inside[None, :] & (first < rows)[:, None]
    of_t = stats_ptr + 2 * rows
    a = _probabilities(
        student_ptr, stats_ptr, first, cols, first < rows, there, rows, classes, inv_t
    )
    b = _probabilities(teacher_ptr, of_t, first, cols, first < rows, there, rows, classes, inv_t)
    # 2. sums of what rows differ by
    q_sum = tl.zeros([ROWS, COLUMNS], ACC)
    p_sum, qq, pp, qp = q_sum, q_sum, q_sum, q_sum
    for start in range(0, CHUNK, ROWS):
        row = chunk * CHUNK + start + tl.arange(0, ROWS).to(tl.int64)
        live_row = row < rows
        live = inside[None, :] & live_row[:, None]
        q = _probabilities(student_ptr, stats_ptr, row, cols, live_row, live, rows, classes, inv_t)
        p = _probabilities(teacher_ptr, of_t, row, cols, live_row, live, rows, classes, inv_t)
        q, p = tl.where(live, q - a, 0.0), tl.where(live, p - b, 0.0)
        q_sum += q
        p_sum += p
        qq += q * q
        pp += p * p
        qp += q * p
    # 3. of the numbers themselves, in float64
    n = tl.minimum(rows - chunk * CHUNK, CHUNK).to(tl.float64)
    a, b = tl.sum(a, 0).to(tl.float64), tl.sum(b, 0).to(tl.float64)
    q_sum, p_sum = tl.sum(q_sum, 0).to(tl.float64), tl.sum(p_sum, 0).to(tl.float64)
    qq, pp, qp = (
        tl.sum(qq, 0).to(tl.float64),
        tl.sum(pp, 0).to(tl.float64),
        tl.sum(qp, 0).to(tl.float64),
    )
    parts_ptr += chunk * 5 * classes + cols
    tl.store(parts_ptr, q_sum + n * a, mask=inside)
    tl.store(parts_ptr + classes, p_sum + n * b, mask=inside)
    tl.store(parts_ptr + 2 * classes, qq + 2 * a * q_sum + n * a * a, mask=inside)
    tl.store(parts_ptr + 3 * classes, pp + 2 * b * p_sum + n * b * b, mask=inside)
    tl.store(parts_ptr + 4 * classes, qp + a * p_sum + b * q_sum + n * a * b, mask=inside)


@triton.jit
def _slopes(
    student_ptr, teacher_ptr, column_ptr, base, cols, live, classes,
    max_s, by_s, max_t, by_t, row_q, row_p, uniform, inv_t,
):  # fmt: skip
    # q and dloss/dq of a tile, up to what is constant in the row
    s = tl.load(student_ptr + base + cols, mask=live, other=-_INF).to(max_s.dtype)
    t = tl.load(teacher_ptr + base + cols, mask=live, other=-_INF).to(max_s.dtype)
    q = tl.exp((s - max_s) * inv_t) * by_s
    p = tl.exp((t - max_t) * inv_t) * by_t
    mean_q = tl.load(column_ptr + cols, mask=live, other=0)
    mean_p = tl.load(column_ptr + classes + cols, mask=live, other=0)
    by_q = tl.load(column_ptr + 2 * classes + cols, mask=live, other=0)
    by_p = tl.load(column_ptr + 3 * classes + cols, mask=live, other=0)
    of_row = row_p * (p - uniform) - row_q * (q - uniform)
    return q, of_row + (by_p * (p - mean_p) - by_q * (q - mean_q))


@triton.jit(do_not_specialize=["rows", "classes"])
def _dist_bwd_kernel(
    grad_ptr, student_ptr, teacher_ptr,  # [rows, classes]
    grad_loss_ptr,  # []
    stats_ptr,  # [7, rows]
    row_ptr,  # [2, rows]
    column_ptr,  # [4, classes]
    rows, classes, inv_t: tl.float64, BLOCK: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    rows = rows.to(tl.int64)
    inv_t = tl.full([], inv_t, ACC)
    uniform = 1 / classes.to(ACC)
    max_s, by_s = tl.load(stats_ptr + row), tl.load(stats_ptr + rows + row)
    max_t, by_t = tl.load(stats_ptr + 2 * rows + row), tl.load(stats_ptr + 3 * rows + row)
    row_q, row_p = tl.load(row_ptr + row), tl.load(row_ptr + rows + row)
    base = row * classes
    dot = tl.zeros([BLOCK], ACC)
    for start in range(0, classes, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        q, g = _slopes(
            student_ptr, teacher_ptr, column_ptr, base, cols, cols < classes, classes,
            max_s, by_s, max_t, by_t, row_q, row_p, uniform, inv_t,
        )  # fmt: skip
        dot += q * g
    mean = tl.sum(dot, 0)
    by = tl.load(grad_loss_ptr) * inv_t
    for start in range(0, classes, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        live = cols < classes
        q, g = _slopes(
            student_ptr, teacher_ptr, column_ptr, base, cols, live, classes,
            max_s, by_s, max_t, by_t, row_q, row_p, uniform, inv_t,
        )  # fmt: skip
        grad = by * q * (g - mean)
        tl.store(grad_ptr + base + cols, grad.to(grad_ptr.dtype.element_ty), mask=live)


def dist_moments(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Row stats and column sums: see reference.dist_moments."""
    rows, classes = student.shape
    wide = torch.float64 if student.dtype == torch.float64 else torch.float32
    stats = student.new_empty((7, rows), dtype=wide)
    if rows == 0:
        return stats, student.new_zeros((5, classes), dtype=torch.float64)
    student, teacher = student.contiguous(), teacher.contiguous()
    chunks = -(-rows // _CHUNK)
    parts = student.new_empty((chunks, 5, classes), dtype=torch.float64)
    block, num_warps = _config.kd_topk(classes, max(student.element_size(), 4))
    with torch.cuda.device_of(student):
        given = (student, teacher, rows, classes, 1 / temperature)
        options = {"enable_fp_fusion": False}
        _dist_rows_kernel[(rows,)](stats, *given, BLOCK=block, num_warps=num_warps, **options)
        _dist_columns_kernel[(-(-classes // _COLUMNS), chunks)](
            parts, stats, *given, COLUMNS=_COLUMNS, ROWS=_ROWS, CHUNK=_CHUNK, num_warps=4, **options
        )
        return stats, parts.sum(0)


def dist_bwd(
    grad_loss: Tensor, student: Tensor, teacher: Tensor, stats: Tensor, row_factors: Tensor,
    column_factors: Tensor, temperature: float,
) -> Tensor:  # fmt: skip
    """The gradient from stats and factors: see reference.dist_bwd."""
    rows, classes = student.shape
    grad = student.new_empty(student.shape)
    if rows == 0:
        return grad
    block, num_warps = _config.kd_topk(classes, max(student.element_size(), 4))
    with torch.cuda.device_of(student):
        _dist_bwd_kernel[(rows,)](
            grad, student.contiguous(), teacher.contiguous(), grad_loss, stats.contiguous(),
            row_factors.contiguous(), column_factors.contiguous(), rows, classes, 1 / temperature,
            BLOCK=block, num_warps=num_warps, enable_fp_fusion=False,
        )  # fmt: skip
    return grad
