"""wkd_logit_loss: what it costs to carry the student's probabilities to the teacher's.

Sinkhorn's iterations are products of [rows, classes] with one kernel [classes, classes], for the
label's class has no mass on either side; a kernel per row is never formed. Potentials are
logarithms, of which each row's largest is taken out before the product: no number overflows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import (
    REDUCTIONS,
    check_choice,
    check_derivatives,
    check_device,
    check_floating,
    check_logits,
    check_numbers,
    check_tensors,
    exactly,
    wide_dtype,
)
from ._features import empty_grad, formed_in_forward

ROWS = 64  # of a tile: enough for products of matrices, and few to keep the iterations of


def _product(potential: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp(potential - m) and its product with a kernel, for the row's largest m."""
    largest = potential.amax(1, keepdim=True)
    scaled = (potential - largest).exp_()
    return scaled, (scaled @ kernel).clamp_(min=torch.finfo(scaled.dtype).tiny), largest


def _transport(
    a: Tensor, b: Tensor, kernel: Tensor, costs: Tensor, iterations: int, needed: bool
) -> tuple[Tensor, Tensor | None]:
    """sum of plan * cost of each row, and its gradient in a.

    Args:
        a, b: logarithms of the student's and the teacher's probabilities, [rows, classes].
        kernel: exp(-cost / regularization); costs: kernel * cost.
    """
    kept: list[tuple[Tensor, ...]] = []
    f = torch.zeros_like(a).masked_fill_(a == -torch.inf, -torch.inf)
    for _ in range(iterations):
        e_f, reached, largest = _product(f, kernel)
        g = b - reached.log() - largest
        e_g, sent, largest = _product(g, kernel.mT)
        f = a - sent.log() - largest
        if needed:
            kept.append((e_f, reached, e_g, sent))
    # the plan's rows add up to exp(a)
    mass = a.exp()
    paid = e_g @ costs.mT
    d_a = mass * paid / sent
    loss = d_a.sum(1)
    if not needed:
        return loss, None
    d_sum = mass / sent
    d_g = (d_sum @ costs - (d_a / sent) @ kernel) * e_g
    for k in reversed(range(iterations)):
        e_f, reached, _, _ = kept[k]
        if k == 0:  # what it began with is constant
            break
        d_f = ((d_g / reached) @ kernel.mT).mul_(e_f).neg_()
        d_a = d_a + d_f
        _, _, e_g, sent = kept[k - 1]
        d_g = ((d_f / sent) @ kernel).mul_(e_g).neg_()
    return loss, d_a


def _log_softmax(x: Tensor, labels: Tensor | None, temperature: float) -> Tensor:
    """Of the classes but the label's."""
    x = x / temperature
    if labels is not None:
        x = x.scatter(1, labels.unsqueeze(1), -torch.inf)
    return x.log_softmax(1)


def _form(
    inputs: tuple[Tensor | None, ...], constants: tuple, needed: tuple[bool, ...]
) -> tuple[Tensor, list[Tensor | None]]:
    """The losses of the rows, reduced, and the gradient of x_s [batch, classes]."""
    (student,) = inputs
    teacher, labels, cost, temperature, weights, regularization, iterations, reduction, dtype = (
        constants
    )
    assert student is not None
    target_weight, transport_weight = weights
    batch = student.shape[0]
    d_x = empty_grad(student, needed[0], dtype)
    rows = student.new_empty(batch, dtype=dtype)
    scale = 1 / max(batch, 1) if reduction == "mean" else 1.0
    step = max(batch, 1) if torch.compiler.is_compiling() else ROWS
    with torch.no_grad(), exactly(student):
        cost = cost.to(dtype).clamp(min=0)
        kernel = (cost / -regularization).exp_()
        costs = kernel * cost
        for i in range(0, batch, step):
            s, t = (x[i : i + step].to(dtype) for x in (student, teacher))
            y = None if labels is None else labels[i : i + step]
            a, b = (_log_softmax(x, y, temperature) for x in (s, t))
            loss, d_a = _transport(a, b, kernel, costs, iterations, d_x is not None)
            rows[i : i + step] = transport_weight * loss
            d_s = None
            if d_a is not None:
                d_s = d_a.addcmul_(a.exp(), d_a.sum(1, keepdim=True), value=-1)
                d_s = d_s.mul_(transport_weight / temperature)
            if y is not None:
                log_q, y = s.log_softmax(1), y.unsqueeze(1)
                p = t.log_softmax(1).gather(1, y).exp() * target_weight
                own = log_q.gather(1, y)
                rows[i : i + step] -= torch.where(p == 0, 0, p * own).squeeze(1)
                if d_s is not None:
                    d_s = d_s.addcmul_(log_q.exp_(), p).scatter_add_(1, y, -p)
            if d_x is not None and d_s is not None:
                d_x[i : i + step] = d_s.mul_(scale)
    return (rows if reduction == "none" else rows.sum() * scale), [d_x]


def wkd_cost(classes: Tensor, sharpness: float = 2.0) -> Tensor:
    """1 - exp(-sharpness (1 - cosine)) between classes, [classes, classes]; 0 of one with itself.

    Args:
        classes: an embedding of each, [classes, dim]: the rows of the teacher's classifier, or
            means of its features.
        sharpness: of the costs, > 0. The authors take the centred kernel alignment of the classes'
            features where this takes the cosine.
    """
    unit = F.normalize(classes.detach().to(wide_dtype(classes)), dim=1)
    with exactly(unit):
        cost = 1 - torch.exp(-sharpness * (1 - unit @ unit.mT))
    return cost.clamp_(min=0).fill_diagonal_(0)


def wkd_logit_loss(
    student: Tensor,
    teacher: Tensor,
    cost: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 2.0,
    regularization: float = 0.05,
    iterations: int = 10,
    target_weight: float = 1.0,
    transport_weight: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """w_t <plan, cost> - w_y p_y log q_y: transport between the classes but the label's; its own.

    Wasserstein distillation of logits (WKD-L; Lv et al., 2024, arXiv:2412.08139): the plan, of
    softmax(student / T) to softmax(teacher / T) of the classes other than the label's, is that of
    Sinkhorn's iterations, through which the gradient is taken; p_y and q_y are the label's
    probabilities at T = 1. Equal to the authors' code, but for the 1e-8 that it adds to
    denominators; memory is that of the cost and of 4 * iterations * 64 rows. The teacher is a
    constant: one that requires grad is an error, unless under torch.no_grad(). It may be an
    inference-mode tensor, and must keep its values until the backward has run. The loss is
    differentiable once, in reverse mode.

    Args:
        student: logits, [batch, classes], of 2 classes or more; float32, float16, bfloat16 or
            float64. The gradient has their dtype; arithmetic is float32 (float64 where either side
            is float64).
        teacher: logits of the same shape. Classes may be masked by -inf.
        cost: [classes, classes], >= 0, such as `wkd_cost` gives: of carrying a class of the student
            (row) to one of the teacher. In float32, costs above 80 * regularization count as
            infinite.
        labels: int64 class ids, [batch]. Without them, all classes are carried.
        temperature: T > 0.
        regularization: > 0, of the plan's entropy.
        iterations: of Sinkhorn, >= 1.
        target_weight: w_y.
        transport_weight: w_t.
        reduction: "mean" over the batch, "sum", or "none".

    Returns:
        The loss, float32 (float64 for float64): 0-dim, or [batch] for "none". It is not 0 where the
        student is the teacher, as the entropy blurs the plan. An empty batch gives 0.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was given; a teacher
            or a cost that requires grad.
        RuntimeError: a label out of range; a second derivative, or one in forward mode.
    """
    name = "wkd_logit_loss"
    given = {"student": student, "teacher": teacher, "cost": cost}
    check_tensors(name, given)
    check_derivatives(name, given, {"teacher", "cost"})
    check_floating(name, given)
    check_logits(name, student, teacher, least=2)
    check_choice(name, "reduction", reduction, REDUCTIONS)
    classes = student.shape[1]
    if cost.shape != (classes, classes):
        raise ValueError(
            f"{name}: cost: expected [classes, classes], {[classes] * 2}, got {list(cost.shape)}"
        )
    if labels is not None:
        check_tensors(name, {"labels": labels})
        if labels.dtype != torch.int64 or labels.shape != student.shape[:1]:
            raise ValueError(
                f"{name}: labels: expected int64 class ids {list(student.shape[:1])}, got "
                f"{labels.dtype} {list(labels.shape)}"
            )
        check_device(name, "labels", labels, "student", student)
    positive = {"temperature": temperature, "regularization": regularization}
    weights = {"target_weight": target_weight, "transport_weight": transport_weight}
    check_numbers(name, {**positive, **weights, "iterations": iterations})
    for argument, x in positive.items():
        if not x > 0:
            raise ValueError(f"{name}: {argument}: expected a number > 0, got {x}")
    if not (isinstance(iterations, int) and iterations >= 1):
        raise ValueError(f"{name}: iterations: expected an integer >= 1, got {iterations}")
    constants = (
        teacher, labels, cost, temperature, tuple(weights.values()), regularization, iterations,
        reduction, wide_dtype(student, teacher),
    )  # fmt: skip
    return formed_in_forward(_form, constants, student)
