"""binary_kd_loss: classes that are not exclusive, T^2 KL of Bernoullis + w BCE, in tiles of rows.

Each tile of the logits is read once; loss and gradient are formed while it is in cache, and nothing
of the logits' size but the gradient is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ._common import (
    REDUCTIONS,
    check_choice,
    check_device,
    check_inputs,
    check_numbers,
    check_tensors,
    exactly,
    wide_dtype,
)
from ._features import empty_grad, formed_in_forward, samples_per_tile

_TENSORS = 8  # of a tile, which stay in L2 together


def _log_larger(x: Tensor) -> Tensor:
    """log of the larger of sigmoid(x) and sigmoid(-x): softplus(x) = max(x, 0) - this."""
    return logsigmoid(x.abs())


def _divergence(u: Tensor, v: Tensor, p: Tensor, log_u: Tensor) -> Tensor:
    """KL(Bernoulli(p) || Bernoulli(sigmoid(u))), p = sigmoid(v).

    Of each side's own logarithms, which are small where its probability is near 1: a difference of
    softplus(u) and softplus(v) alone would lose what is smaller than a rounding of the logits.
    """
    u_up, v_up = u.clamp(min=0), v.clamp(min=0)
    loss = _log_larger(v).sub_(log_u)
    loss.addcmul_(v.neg().sigmoid_(), u_up - v_up)
    return loss.addcmul_(p, u_up.sub_(u).sub_(v_up.sub_(v)))


def _form_binary(
    inputs: tuple[Tensor | None, ...], constants: tuple, needed: tuple[bool, ...]
) -> tuple[Tensor, list[Tensor | None]]:
    """The losses of rows [rows, classes], reduced, and the gradient of the student."""
    (student,) = inputs
    teacher, labels, mask, class_weights, options = constants
    temperature, kd_weight, bce_weight, reduction, dtype = options
    assert student is not None
    count, classes = student.shape
    d_s = empty_grad(student, needed[0], dtype)
    rows = student.new_empty(count, dtype=dtype)
    largest = torch.finfo(dtype).max  # in place of infinities, which times 0 are NaN
    step = samples_per_tile(count, _TENSORS * classes)
    with torch.no_grad(), exactly(student):
        weights = None if class_weights is None else class_weights.to(dtype)
        scale: Tensor | float = 1.0
        if reduction == "mean":
            scale = 1 / _size(count, classes, mask, weights)
        for i in range(0, count, step):
            s = student[i : i + step].to(dtype).clamp(-largest, largest)
            v = teacher[i : i + step].to(dtype).clamp(-largest, largest)
            u = s
            if temperature != 1:
                u, v = s / temperature, v / temperature
            q, p, log_u = u.sigmoid(), v.sigmoid(), _log_larger(u)
            loss = _divergence(u, v, p, log_u).mul_(kd_weight * temperature**2)
            grad = torch.sub(q, p).mul_(kd_weight * temperature)
            if bce_weight != 0:
                y = labels[i : i + step].to(dtype)
                if temperature != 1:
                    q, log_u = s.sigmoid(), _log_larger(s)
                # softplus(s) - y s
                loss.sub_(log_u, alpha=bce_weight).add_(s.clamp(min=0), alpha=bce_weight)
                loss.addcmul_(y, s, value=-bce_weight)
                grad.add_(q.sub_(y), alpha=bce_weight)
            if weights is not None:
                loss, grad = loss.mul_(weights), grad.mul_(weights)
            if mask is not None:
                # not a product: what is masked may be NaN
                left_out = ~mask[i : i + step]
                loss, grad = loss.masked_fill_(left_out, 0), grad.masked_fill_(left_out, 0)
            rows[i : i + step] = loss.sum(1)
            if d_s is not None:
                d_s[i : i + step].copy_(grad.mul_(scale))
    if reduction == "none":
        return rows, [d_s]
    return (rows.sum(dtype=torch.float64) * scale).to(dtype), [d_s]


def _size(count: int, classes: int, mask: Tensor | None, weights: Tensor | None) -> Tensor | float:
    """The sum of the weights of what is not masked, or 1 where there is nothing."""
    if mask is None:
        if weights is None:
            return float(max(count * classes, 1))
        total = weights.sum(dtype=torch.float64) * max(count, 1)
    else:
        per_class = mask.sum(0, dtype=torch.float64)
        total = (per_class if weights is None else per_class * weights).sum()
    return torch.where(total > 0, total, 1.0)


def binary_kd_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    bce_weight: float = 0.0,
    mask: Tensor | None = None,
    class_weights: Tensor | None = None,
    class_dim: int = -1,
    reduction: str = "mean",
) -> Tensor:
    """kd_weight * T^2 * KL(Bern(sigmoid(t/T)) || Bern(sigmoid(s/T))) + bce_weight * BCE(s, y).

    Distillation of classes that are not exclusive, such as the labels of an image: each is a
    decision of its own (Hinton, Vinyals and Dean, 2015, arXiv:1503.02531, of two classes each).
    Teacher, labels, mask and weights are constants: one that requires grad is an error, unless
    under torch.no_grad(). The teacher may be an inference-mode tensor; it must keep its values
    until the backward has run. The loss is differentiable once, in reverse mode.

    Args:
        student: logits, any shape with one class or more, float32, float16, bfloat16 or float64.
            The gradient has its dtype; arithmetic is float32 (float64 where either side is).
        teacher: logits of the same shape, of any of these dtypes; -inf and inf are certain.
        labels: y of the same shape, in [0, 1]: multi-hot of any dtype, bool included, or smoothed
            or mixed; needed where bce_weight is not 0.
        temperature: T > 0.
        kd_weight: weight of the distillation term.
        bce_weight: weight of the cross-entropy of labels, at T = 1.
        mask: bool of the same shape; what is False is not looked at, such as an unknown label.
        class_weights: [classes], >= 0, a factor of both terms.
        class_dim: the dimension of the classes: 1 for [B, C, H, W].
        reduction: "mean" over all that is not masked (by the sum of its class weights), "sum", or
            "none": the sum of each row, the shape without class_dim.

    Returns:
        The loss, float32 (float64 for float64). An empty batch, and one that is masked, give 0.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was given; a teacher
            that requires grad.
        RuntimeError: a second derivative, or one in forward mode.
    """
    name = "binary_kd_loss"
    given = {"student": student, "teacher": teacher}
    check_inputs(name, given, "teacher")
    numbers = {"temperature": temperature, "kd_weight": kd_weight, "bce_weight": bce_weight}
    check_numbers(name, numbers)
    check_choice(name, "reduction", reduction, REDUCTIONS)
    shape = student.shape
    dim = len(shape)
    if not -dim <= class_dim < dim:
        raise ValueError(
            f"{name}: class_dim: expected {-dim} to {dim - 1} for student {list(shape)}, got "
            f"{class_dim}"
        )
    classes = shape[class_dim]
    if classes == 0:
        raise ValueError(f"{name}: student: expected one class or more, got {list(shape)}")
    if not temperature > 0:
        raise ValueError(f"{name}: temperature: expected a number > 0, got {temperature}")
    if bce_weight != 0 and labels is None:
        raise ValueError(
            f"{name}: labels: expected numbers in [0, 1] of the shape of student {list(shape)}, as "
            f"bce_weight is {bce_weight}, got None"
        )
    options: dict[str, Any] = {"labels": labels, "mask": mask, "class_weights": class_weights}
    options = {key: x for key, x in options.items() if x is not None}
    check_tensors(name, options)
    for argument, x in {"teacher": teacher, **options}.items():
        wanted = [classes] if argument == "class_weights" else list(shape)
        if list(x.shape) != wanted:
            what = "the shape of student " if argument != "class_weights" else ""
            raise ValueError(f"{name}: {argument}: expected {what}{wanted}, got {list(x.shape)}")
        check_device(name, argument, x, "student", student)
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}: {argument}: expected a constant, as the loss has no derivative there, "
                "got a tensor that requires grad: detach it"
            )
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"{name}: mask: expected bool, got {mask.dtype}")
    rows = [
        None if x is None else x.movedim(class_dim, -1).reshape(-1, classes)
        for x in (student, teacher, labels, mask)
    ]
    dtype = wide_dtype(student, teacher)
    numeric = (temperature, kd_weight, bce_weight, reduction, dtype)
    constants = (rows[1], rows[2], rows[3], class_weights, numeric)
    loss = formed_in_forward(_form_binary, constants, rows[0])
    if reduction != "none":
        return loss
    class_dim %= dim
    return loss.view(shape[:class_dim] + shape[class_dim + 1 :])
