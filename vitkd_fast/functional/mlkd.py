"""mlkd_loss: distillation at several temperatures, of rows, of the batch's and the classes' Grams.

The smaller of the batch's and the classes' Gram matrices serves both: for D = P - Q, M = (P + Q)/2,
|P^T P - Q^T Q|^2 = 2 <D D^T, M M^T> + 2 <M D^T, D M^T>: no difference of large numbers. Softmaxes
live for one temperature.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ._common import check_inputs, check_logits, check_numbers, exactly, wide_dtype
from ._features import empty_grad, formed_in_forward

_kd_fwd = torch.ops.vitkd_fast.kd_fwd.default


def _consistency(
    apart: Tensor, mean: Tensor, of_rows: float, of_columns: float
) -> tuple[Tensor, Tensor]:
    """of_rows |P P^T - Q Q^T|^2 + of_columns |P^T P - Q^T Q|^2, and its gradient in P.

    By Gram matrices of rows; P = mean + apart / 2, Q = mean - apart / 2.
    """
    cross, of_apart, of_mean = mean @ apart.mT, apart @ apart.mT, mean @ mean.mT
    change = cross + cross.mT  # P P^T - Q Q^T
    columns = (of_apart * of_mean).sum() + (cross * cross.mT).sum()
    loss = of_rows * (change * change).sum() + 2 * of_columns * columns
    by_mean = (4 * of_columns) * (cross + of_apart / 2) + (4 * of_rows) * change
    by_apart = (4 * of_columns) * (of_mean + cross.mT / 2) + (2 * of_rows) * change
    return loss, torch.addmm(by_mean @ mean, by_apart, apart)


def _form(
    inputs: tuple[Tensor | None, ...], constants: tuple, needed: tuple[bool, ...]
) -> tuple[Tensor, list[Tensor | None]]:
    """The loss, and the gradient of the student's logits [batch, classes]."""
    (student,) = inputs
    teacher, temperatures, kd_weight, batch_weight, class_weight, dtype = constants
    assert student is not None
    batch, classes = student.shape
    share = 1 / len(temperatures)
    of_batch, of_classes = batch_weight * share / max(batch, 1), class_weight * share / classes
    with torch.no_grad(), exactly(student):
        s, t = student.to(dtype), teacher.to(dtype)
        loss = s.new_zeros(())
        grad = torch.zeros_like(s) if needed[0] else None
        for temperature in temperatures:
            if kd_weight != 0:
                loss = loss + _kd_fwd(
                    s, t, *reference.KDOptions(temperature, kd_weight * share, 1, reference.MEAN)
                )[0]  # fmt: skip
            p, q = ((x / temperature).softmax(1) for x in (s, t))
            apart, mean = p - q, torch.add(p, q).mul_(0.5)
            if grad is not None and kd_weight != 0:
                grad.add_(apart, alpha=kd_weight * share * temperature / max(batch, 1))
            if batch_weight == 0 == class_weight:
                continue
            if batch <= classes:
                more, d_p = _consistency(apart, mean, of_batch, of_classes)
            else:
                more, d_p = _consistency(apart.mT, mean.mT, of_classes, of_batch)
                d_p = d_p.mT
            loss = loss + more
            if grad is not None:
                d_p = d_p * p
                grad.add_(
                    d_p.addcmul_(p, d_p.sum(1, keepdim=True), value=-1), alpha=1 / temperature
                )
    d_x = empty_grad(student, needed[0], dtype)
    if d_x is not None and grad is not None:
        d_x.copy_(grad)
    return loss, [d_x]


def mlkd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperatures: Sequence[float] = (2.0, 3.0, 4.0, 5.0, 6.0),
    kd_weight: float = 1.0,
    batch_weight: float = 1.0,
    class_weight: float = 1.0,
) -> Tensor:
    """mean over T of T^2 KL(Q || P) + |P P^T - Q Q^T|^2 / batch + |P^T P - Q^T Q|^2 / classes.

    Multi-level logit distillation (Jin, Wang and Lin, CVPR 2023): P = softmax(student / T) and Q =
    softmax(teacher / T), [batch, classes], are compared row by row, by which rows are alike and by
    which classes are. The authors' code takes the sum over temperatures. No matrix of the larger of
    [batch, batch] and [classes, classes] is formed. The teacher is a constant: one that requires
    grad is an error, unless under torch.no_grad(). It may be an inference-mode tensor, and must
    keep its values until the backward has run. The loss is differentiable once, in reverse mode.

    Args:
        student: logits, [batch, classes], of 2 classes or more; float32, float16, bfloat16 or
            float64. The gradient has their dtype; arithmetic is float32 (float64 where either side
            is float64).
        teacher: logits of the same shape. Classes may be masked by -inf.
        temperatures: each T > 0.
        kd_weight: of the rows' divergence, mean over the batch.
        batch_weight: of the rows' Gram matrices.
        class_weight: of the classes'.

    Returns:
        The loss, 0-dim, float32 (float64 for float64). An empty batch gives 0.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was given; a teacher
            that requires grad.
        RuntimeError: a second derivative, or one in forward mode.
    """
    name = "mlkd_loss"
    check_inputs(name, {"student": student, "teacher": teacher}, "teacher")
    check_logits(name, student, teacher, least=2)
    weights = {
        "kd_weight": kd_weight, "batch_weight": batch_weight, "class_weight": class_weight,
    }  # fmt: skip
    check_numbers(name, {**weights, "temperatures": temperatures})
    given = tuple(float(x) for x in temperatures)
    if not given or not all(x > 0 for x in given):
        raise ValueError(f"{name}: temperatures: expected numbers > 0, got {temperatures}")
    dtype = wide_dtype(student, teacher)
    return formed_in_forward(_form, (teacher, given, *weights.values(), dtype), student)
