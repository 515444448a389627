"""spearman_loss: the order of the classes, by soft ranks of a few rows and classes at a time.

A pair of classes takes one sigmoid in the forward and one in the gradient: tiles [rows, classes,
classes] stay in cache, and [batch, classes, classes] is never stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import (
    REDUCTIONS,
    check_choice,
    check_inputs,
    check_logits,
    check_numbers,
    exactly,
    wide_dtype,
)
from ._features import empty_grad, formed_in_forward, tile_size


def _ranks(x: Tensor) -> Tensor:
    """Of each number in its row, less the mean of ranks; ties share the mean of theirs."""
    ordered = x.sort(1).values
    below = torch.searchsorted(ordered, x)
    up_to = torch.searchsorted(ordered, x, right=True)
    ranks = (below + up_to - x.shape[1]).to(x.dtype) / 2
    return ranks.masked_fill(x.isnan(), torch.nan)


def _tiles(x: Tensor, rows: int, classes: int) -> list[tuple[slice, slice]]:
    """Rows and classes of each tile: whole rows, or a part of one."""
    size = tile_size(x)
    some = max(1, size // (classes * classes))
    part = min(classes, max(1, size // classes))
    if torch.compiler.is_compiling():
        some, part = max(1, -(-rows // 16)), classes
    return [
        (slice(i, i + some), slice(j, j + part))
        for i in range(0, rows, some)
        for j in range(0, classes, part)
    ]


def _inverse_root(x: Tensor) -> Tensor:
    return x.rsqrt().masked_fill(x == 0, 0)


def _form(
    inputs: tuple[Tensor | None, ...], constants: tuple, needed: tuple[bool, ...]
) -> tuple[Tensor, list[Tensor | None]]:
    """The losses of the rows, reduced, and the gradient of x_s [batch, classes]."""
    (student,) = inputs
    teacher, softness, reduction, dtype = constants
    assert student is not None
    batch, classes = student.shape
    scale = 1 / max(batch, 1) if reduction == "mean" else 1.0
    with torch.no_grad(), exactly(student):
        z = student.to(dtype) / softness
        exact = _ranks(teacher.to(dtype).contiguous())
        soft = torch.empty_like(z, memory_format=torch.contiguous_format)
        tiles = _tiles(student, batch, classes)
        for rows, part in tiles:
            above = z[rows, part].unsqueeze(2) - z[rows].unsqueeze(1)
            soft[rows, part] = above.sigmoid_().sum(2)
        soft -= classes / 2
        by = _inverse_root((soft * soft).sum(1, keepdim=True))
        by_exact = _inverse_root((exact * exact).sum(1, keepdim=True))
        soft, exact = soft * by, exact * by_exact
        rho = (soft * exact).sum(1, keepdim=True)
        loss = 1 - rho.squeeze(1)
        d_x = empty_grad(student, needed[0], dtype)
        if d_x is not None:
            slope = torch.addcmul(exact, soft, rho, value=-1) * (by * (-scale / softness))
            for rows, part in tiles:
                near = (z[rows, part].unsqueeze(2) - z[rows].unsqueeze(1)).sigmoid_()
                near = torch.addcmul(near, near, near, value=-1)  # of the sigmoid, the derivative
                pair = torch.stack([torch.ones_like(slope[rows]), slope[rows]], 2)
                total, of_others = torch.bmm(near, pair).unbind(2)
                d_x[rows, part] = slope[rows, part] * total - of_others
    return (loss if reduction == "none" else loss.sum() * scale), [d_x]


def spearman_loss(
    student: Tensor, teacher: Tensor, *, softness: float = 0.1, reduction: str = "mean"
) -> Tensor:
    """1 - Pearson correlation of soft ranks of the student and ranks of the teacher; mean of rows.

    Spearman's rank correlation, of which the order of the teacher's classes is all that counts. The
    student's ranks are r_i = 1/2 + sum_j sigmoid((z_i - z_j) / softness) (Qin, Liu and Li, 2010,
    doi:10.1007/s10791-009-9124-x), the teacher's are exact; ties share the mean of theirs. The
    teacher is a constant: one that requires grad is an error, unless under torch.no_grad(). It may
    be an inference-mode tensor, and must keep its values until the backward has run. The loss is
    differentiable once, in reverse mode.

    Args:
        student: logits, [batch, classes]; float32, float16, bfloat16 or float64. The gradient has
            their dtype; arithmetic is float32 (float64 where either side is float64).
        teacher: logits of the same shape. Classes masked by -inf share the last rank.
        softness: > 0, in units of the logits: ranks are those of the student as it goes to 0.
        reduction: "mean" over the batch, "sum", or "none".

    Returns:
        The loss, from 0 to 2, float32 (float64 for float64): 0-dim, or [batch] for "none". A row of
        one side that is constant has the correlation 0, and no gradient. An empty batch gives 0.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was given; a teacher
            that requires grad.
        RuntimeError: a second derivative, or one in forward mode.
    """
    name = "spearman_loss"
    check_inputs(name, {"student": student, "teacher": teacher}, "teacher")
    check_choice(name, "reduction", reduction, REDUCTIONS)
    check_numbers(name, {"softness": softness})
    check_logits(name, student, teacher)
    if not softness > 0:
        raise ValueError(f"{name}: softness: expected a number > 0, got {softness}")
    constants = teacher, softness, reduction, wide_dtype(student, teacher)
    return formed_in_forward(_form, constants, student)
