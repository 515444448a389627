"""dino_loss: self-distillation between views, a few images at a time.

    mean over pairs i != j of -sum P_i log Q_j,  P = softmax((t - c) / T_t),  Q = softmax(s / T)

A view of the student meets all its teachers at once: with n of them and their mean M, its pairs
are n (KL(M || Q) + H(M)), so that each view is read once and its gradient n (Q - M) / T written
once, by kd_loss's kernels, in place of a log_softmax and a product for each pair.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ._common import (
    check_derivatives,
    check_floating,
    check_numbers,
    check_tensors,
    entropy,
    exactly,
    wide_dtype,
)
from ._features import empty_grad, formed_in_forward, samples_per_tile

_NAME = "dino_loss"
_kd_fwd = torch.ops.vitkd_fast.kd_fwd.default
_kd_fwd_grad = torch.ops.vitkd_fast.kd_fwd_grad.default


def _log_mean(log_p: list[Tensor]) -> Tensor:
    """Of distributions."""
    total = functools.reduce(torch.logaddexp, log_p)
    return total if len(log_p) == 1 else total - math.log(len(log_p))


def _form_dino(
    inputs: tuple[Tensor | None, ...], constants: tuple, needed: tuple[bool, ...]
) -> tuple[Tensor, list[Tensor | None]]:
    """The loss, and the gradient of student [views, batch, classes]."""
    (student,) = inputs
    teacher, centre, temperature, teacher_temperature, sums, dtype = constants
    assert student is not None
    views, batch, classes = student.shape
    teachers = teacher.shape[0]
    share = 1 / (teachers * (views - 1) * max(batch, 1))  # of each pair of views of an image
    d_s = empty_grad(student, needed[0], dtype)
    # the student's views from `first` on, and the teachers' that they meet
    groups = [(j, j + 1, [i for i in range(teachers) if i != j]) for j in range(teachers)]
    groups.append((teachers, views, list(range(teachers))))
    if d_s is not None and teachers == 1:
        d_s[0] = 0  # the only teacher's own view meets none
    loss = student.new_zeros((), dtype=torch.float64)
    narrow = student.dtype == torch.bfloat16 and dtype == torch.float32
    step = samples_per_tile(student, batch, classes)
    with torch.no_grad(), exactly(student):
        for k in range(0, batch, step):
            rows = slice(k, k + step)
            t = teacher[:, rows].to(dtype)
            if sums is not None:
                sums.add_(t.sum((0, 1)))
            t = t if centre is None else t - centre
            log_p = torch.log_softmax(t / teacher_temperature, -1).unbind(0)
            for first, end, met in groups:
                if first == end or not met:
                    continue
                log_m = _log_mean([log_p[i] for i in met])
                loss = loss + entropy(log_m).sum() * ((end - first) * len(met) * share)
                options = reference.KDOptions(
                    temperature=temperature,
                    kd_weight=len(met) * share / temperature**2,
                    class_dim=1,
                    reduction=reference.SUM,
                )
                of_teachers = log_m * temperature
                for j in range(first, end):
                    # float16 would round before the loss scale is applied
                    s = student[j, rows] if narrow else student[j, rows].to(dtype)
                    if d_s is None:
                        value = _kd_fwd(s, of_teachers, *options)[0]
                    else:
                        value, d_s[j, rows] = _kd_fwd_grad(s, of_teachers, *options)
                    loss = loss + value
    return loss.to(dtype), [d_s]


def dino_loss(
    student: Tensor,
    teacher: Tensor,
    centre: Tensor | None = None,
    *,
    temperature: float = 0.1,
    teacher_temperature: float = 0.04,
) -> Tensor:
    """mean over pairs i != j, and the batch, of -sum softmax((t_i - c)/T_t) log softmax(s_j/T).

    Self-distillation with no labels (Caron et al., 2021, arXiv:2104.14294): every view of the
    student learns what the teacher, an average of the student, says of the other views. The
    teacher's softmax is sharpened by its lower temperature and centred; `nn.DINOLoss` keeps the
    centre. Teacher and centre are constants: one that requires grad is an error, unless under
    torch.no_grad(). The loss is differentiable once, in reverse mode.

    Args:
        student: logits of its views, [views, batch, classes], 2 views or more; float32, float16,
            bfloat16 or float64. The gradient has their dtype; arithmetic is float32 (float64 where
            any tensor is).
        teacher: logits of its views (of the global crops: two), [teacher's views, batch, classes],
            which are the student's first.
        centre: [classes], which is subtracted from the teacher's logits, or None.
        temperature: T > 0.
        teacher_temperature: T_t > 0.

    Returns:
        The loss, 0-dim, float32 (float64 where any tensor is). An empty batch gives 0.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was given; a teacher
            that requires grad.
        RuntimeError: a second derivative, or one in forward mode.
    """
    return dino(student, teacher, centre, temperature, teacher_temperature, None)


def dino(
    student: Tensor,
    teacher: Tensor,
    centre: Tensor | None,
    temperature: float,
    teacher_temperature: float,
    sums: Tensor | None,
) -> Tensor:
    """dino_loss; to `sums`, [classes], it adds the teacher's logits of all views and images."""
    given: dict[str, Any] = {"student": student, "teacher": teacher}
    given |= {} if centre is None else {"centre": centre}
    check_tensors(_NAME, given)
    temperatures = {"temperature": temperature, "teacher_temperature": teacher_temperature}
    check_numbers(_NAME, temperatures)
    check_derivatives(_NAME, given, {"teacher", "centre"})
    check_floating(_NAME, given)
    for argument, x in (("student", student), ("teacher", teacher)):
        if x.dim() != 3 or x.shape[2] < 2:
            raise ValueError(
                f"{_NAME}: {argument}: expected [views, batch, classes] of 2 classes or more, got "
                f"{list(x.shape)}"
            )
    views, *of_view = student.shape
    if views < 2:
        raise ValueError(f"{_NAME}: student: expected 2 views or more, got {list(student.shape)}")
    if not 0 < teacher.shape[0] <= views or list(teacher.shape[1:]) != of_view:
        raise ValueError(
            f"{_NAME}: teacher: expected the first of the student's views {list(student.shape)}, "
            f"got {list(teacher.shape)}"
        )
    if centre is not None and list(centre.shape) != of_view[1:]:
        raise ValueError(f"{_NAME}: centre: expected {of_view[1:]}, got {list(centre.shape)}")
    for argument, value in temperatures.items():
        if not value > 0:
            raise ValueError(f"{_NAME}: {argument}: expected a number > 0, got {value}")
    constants = (
        teacher, centre, temperature, teacher_temperature, sums, wide_dtype(*given.values())
    )  # fmt: skip
    return formed_in_forward(_form_dino, constants, student)
