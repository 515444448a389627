"""dist_loss: correlations of rows and of columns of probabilities, from one pass of sums."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ._common import (
    check_inputs,
    check_numbers,
    differentiable_once,
    wide_dtype,
)

_dist_moments = torch.ops.vitkd_fast.dist_moments.default
_dist_bwd = torch.ops.vitkd_fast.dist_bwd.default

EPS = 1e-8  # of the authors' code, beside the product of norms
CONSTANT = 1e-12  # a variance below this share of the squares is rounding


def _correlation(c: Tensor, v_q: Tensor, v_p: Tensor, total: Tensor) -> tuple[Tensor, ...]:
    """rho, and its derivative's factors: drho/dq = by_p (p - mean) - by_q (q - mean).

    0, all three, where q or p is constant. `total`: sums of q^2 and p^2, [2, n].
    """
    constant = (v_q <= CONSTANT * total[0]) | (v_p <= CONSTANT * total[1])
    norms = (v_q.clamp(min=0) * v_p.clamp(min=0)).sqrt()
    by_p = (1 / (norms + EPS)).masked_fill(constant, 0)
    rho = c * by_p
    by_q = rho * by_p * (v_p / norms).masked_fill(constant, 0)
    return rho, by_q, by_p


def _terms(
    stats: Tensor, columns: Tensor, rows: int, group: Any, temperature: float, beta: float,
    gamma: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss, and what dist_bwd takes of rows and columns, in float64 and O(rows + classes)."""
    classes = columns.shape[1]
    v_q, v_p, c = stats[4:].double()
    u = 1 / classes
    rho, row_q, row_p = _correlation(c, v_q, v_p, torch.stack([v_q + u, v_p + u]))
    total, processes = rho.sum(), 1
    n: float | Tensor = rows
    if group is not None:
        processes = dist.get_world_size(group)
        more = torch.stack([total, total.new_tensor(float(rows))])
        every = torch.cat([columns.flatten(), more])
        dist.all_reduce(every, group=group)
        columns, total, n = every[:-2].view(5, classes), every[-2], every[-1]
    s_q, s_p, s_qq, s_pp, s_qp = columns
    of_columns, by_q, by_p = _correlation(
        s_qp - s_q * s_p / n, s_qq - s_q * s_q / n, s_pp - s_p * s_p / n, columns[2:4]
    )
    square = temperature * temperature
    loss = square * (beta * (1 - total / n) + gamma * (1 - of_columns.mean()))
    # the mean of the processes' gradients, which is what they use, is the whole batch's
    of_row, of_column = -square * beta * processes / n, -square * gamma * processes / classes
    row_factors = torch.stack([row_q, row_p]) * of_row
    means = torch.stack([s_q, s_p]) / n
    column_factors = torch.cat([means, torch.stack([by_q, by_p]) * of_column])
    dtype = stats.dtype
    return loss.to(dtype), row_factors.to(dtype), column_factors.to(dtype)


class _DIST(torch.autograd.Function):
    """Keeps seven numbers per row and nine per class; the gradient reads the logits again."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, group: Any, temperature: float, beta: float,
        gamma: float,
    ) -> Tensor:  # fmt: skip
        flat = student.flatten(0, -2)
        stats, columns = _dist_moments(flat, teacher, temperature)
        loss, *factors = _terms(stats, columns, flat.shape[0], group, temperature, beta, gamma)
        ctx.save_for_backward(student, stats, *factors)
        ctx.constants = teacher, temperature
        return loss

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        student, *given = ctx.saved_tensors
        teacher, temperature = ctx.constants
        grad = _dist_bwd(grad_loss, student.flatten(0, -2), teacher, *given, temperature)
        return grad.view(student.shape), *[None] * 5


def dist_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
    sync: bool = False,
    group: Any = None,
) -> Tensor:
    """T^2 (beta mean_b (1 - rho(q_b, p_b)) + gamma mean_c (1 - rho(q_:c, p_:c))), rho: Pearson's.

    Distillation from a stronger teacher (Huang et al., 2022, arXiv:2205.10536): the probabilities q
    and p of student and teacher are to be correlated in each row over its classes, and in each
    class over the rows. T^2 is the authors' code's; their paper has none. Both correlations come
    from one pass of sums over the logits, and the gradient from a second one: 4 reads and 1 write,
    with arithmetic in float32 and sums over rows that are added up in float64. The teacher is a
    constant: one that requires grad is an error, unless under torch.no_grad(); it may be an
    inference-mode tensor. The loss is differentiable once, in reverse mode.

    Args:
        student: logits, [*rows, classes], float32, float16, bfloat16 or float64, of 2 classes or
            more; of a dense prediction [B, C, H, W], movedim(1, -1). The gradient has its dtype.
        teacher: logits of the same shape, of any of these dtypes.
        temperature: T > 0.
        beta: weight of the rows' term (inter-class).
        gamma: weight of the columns' term (intra-class), which depends on the batch.
        sync: over the processes of torch.distributed, where it is initialised: the loss is that of
            all rows together, and so is the mean of the processes' gradients, which
            DistributedDataParallel takes: neither depends on the number of processes. 5 * classes +
            2 numbers are all-reduced. Not inside torch.compile.
        group: of processes; the default one unless given.

    Returns:
        The loss, 0-dim, float32 (float64 where either side is float64). A constant row or column
        (of one row, every column is) has the correlation 0, and no gradient. An empty batch: 0.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was given; a teacher
            that requires grad.
        RuntimeError: a second derivative, or one in forward mode.
    """
    name = "dist_loss"
    check_inputs(name, {"student": student, "teacher": teacher}, "teacher")
    check_numbers(name, {"temperature": temperature, "beta": beta, "gamma": gamma})
    if not temperature > 0:
        raise ValueError(f"{name}: temperature: expected a number > 0, got {temperature}")
    if student.dim() < 2 or student.shape[-1] < 2:
        raise ValueError(
            f"{name}: student: expected [*rows, classes] with 2 classes or more, got "
            f"{list(student.shape)}"
        )
    if teacher.shape != student.shape:
        raise ValueError(
            f"{name}: teacher: expected the shape of student {list(student.shape)}, got "
            f"{list(teacher.shape)}"
        )
    of_processes = None
    if sync and dist.is_available() and dist.is_initialized():
        of_processes = group if group is not None else dist.group.WORLD
    if wide_dtype(student, teacher) == torch.float64:
        student, teacher = student.double(), teacher.double()
    if student.numel() == 0 and of_processes is None:
        return student.sum().to(wide_dtype(student))
    return _DIST.apply(student, teacher.flatten(0, -2), of_processes, temperature, beta, gamma)
