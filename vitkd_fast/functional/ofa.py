"""ofa_loss: one teacher for all of a student's branches.

    -sum w log q,  w = p^e but for the label's class, (p + 1)^e - 1;  p, q = softmax(t / T), (s / T)

With m = sum w, it is m (KL(w / m || q) + H(w / m)): the teacher's weights are formed once for all
branches, and each branch is read once and its gradient (m q - w) / T written once, by kd_loss's
kernels. At e = 1, w = p.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ._common import check_numbers, entropy, exactly, wide_dtype
from ._features import formed_in_forward
from ._rows import Labels, checked

_NAME = "ofa_loss"
_kd_fwd = torch.ops.vitkd_fast.kd_fwd.default
_kd_fwd_grad = torch.ops.vitkd_fast.kd_fwd_grad.default


def _log_weights(
    t: Tensor, labels: Tensor, labels_b: Tensor | None, lam: Tensor | float, eps: float
) -> Tensor:
    """log w of t / T [rows, classes]; of mixed labels, w is lam w(a) + (1 - lam) w(b)."""
    log_p = torch.log_softmax(t, -1)
    log_w = log_p * eps
    if eps == 1:
        return log_w
    pair = [labels] if labels_b is None else [labels, labels_b]
    for ids in pair:
        share: Tensor | float = 1.0
        if labels_b is not None:
            share = lam * (ids == labels) + (1 - lam) * (ids == labels_b)
        at = ids.unsqueeze(1)
        of_label = log_p.gather(1, at).squeeze(1)
        w = share * torch.expm1(eps * of_label.exp().log1p())
        w = w + (1 - share) * (eps * of_label).exp()
        log_w = log_w.scatter(1, at, w.log().unsqueeze(1))
    return log_w


def _form_ofa(
    inputs: tuple[Tensor | None, ...], constants: tuple, needed: tuple[bool, ...]
) -> tuple[Tensor, list[Tensor | None]]:
    """The loss, summed over branches, and the gradient of each branch's logits."""
    teacher, o, eps, dtype = constants
    ids = o.labels, o.labels_b
    ignored = sum((x == o.ignore_index).int() for x in ids if x is not None) > 0
    share = torch.where(ignored, 0.0, 1.0).to(dtype)
    if o.reduction == reference.MEAN:
        share = share / share.sum().clamp(min=1)
    a, b = (x if x is None else x.masked_fill(ignored, 0) for x in ids)
    assert a is not None
    lam = o.lam if o.lam_rows is None else o.lam_rows.to(dtype)
    grads: list[Tensor | None] = []
    with torch.no_grad(), exactly(teacher):
        log_w = _log_weights(teacher.to(dtype) / o.temperature, a, b, lam, eps)
        log_m = log_w.logsumexp(-1)
        weight = torch.where(ignored, 0.0, log_m.exp() * share)
        loss = entropy(log_w - log_m.unsqueeze(1)) * weight * len(inputs)
        log_w *= o.temperature  # the kernels divide by it
        options = o._replace(
            kd_weight=o.temperature**-2, row_weights=weight, reduction=reference.NONE,
            labels=None, labels_b=None, lam_rows=None,
        )  # fmt: skip
        for x, wanted in zip(inputs, needed, strict=True):
            assert x is not None
            # float16 would round before the loss scale is applied
            s = x if x.dtype == torch.bfloat16 and dtype == torch.float32 else x.to(dtype)
            if wanted:
                value, grad = _kd_fwd_grad(s, log_w, *options)
            else:
                value, grad = _kd_fwd(s, log_w, *options)[0], None
            loss = loss + value
            grads.append(grad)
        loss = torch.where(ignored, 0.0, loss)
    return (loss if o.reduction == reference.NONE else loss.sum()), grads


def ofa_loss(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor,
    labels: Labels,
    *,
    temperature: float = 1.0,
    eps: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """-sum_i ((p_i + [i = y])^eps - [i = y]) log softmax(student/T)_i, p = softmax(teacher/T).

    Distillation between unlike architectures (OFA-KD: Hao et al., 2023, arXiv:2310.19444): eps > 1
    gives more weight to the label's class where the teacher is sure of it. The losses of several
    branches (`nn.OFABranches`) and of the classifier are added up, and the teacher is read once for
    all. As in the authors' code there is no factor T^2. The teacher is a constant: one that
    requires grad is an error, unless under torch.no_grad(). The loss is differentiable once, in
    reverse mode.

    Args:
        student: logits [batch, classes] of 2 classes or more, or a list of them; float32, float16,
            bfloat16 or float64. Gradients have their dtype; arithmetic is float32 (float64 where
            any tensor is).
        teacher: logits [batch, classes].
        labels: int64 class ids, or mixup's (labels_a, labels_b, lam), as in `kd_loss`: the loss is
            then lam of the one's and 1 - lam of the other's.
        temperature: T > 0.
        eps: > 0; at 1 the labels have no part in it.
        ignore_index: a label whose rows are left out.
        reduction: "mean" over the rows that are not ignored, "sum", or "none".

    Returns:
        The loss, float32 (float64 where any tensor is): 0-dim, or [batch] for "none".

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was given; a teacher
            that requires grad.
        RuntimeError: a label out of range; a second derivative, or one in forward mode.
    """
    # an empty list is refused as what it is
    several = isinstance(student, (list, tuple)) and len(student) > 0
    students: Sequence[Any] = student if several else [student]  # type: ignore[assignment]
    check_numbers(_NAME, {"temperature": temperature, "eps": eps})
    if not eps > 0:
        raise ValueError(f"{_NAME}: eps: expected a number > 0, got {eps}")
    options: dict[str, Any] = {}
    for x in students:
        options = checked(
            _NAME, x, teacher, temperature=temperature, labels=labels, kd_weight=1.0,
            ce_weight=1.0, label_smoothing=0.0, ignore_index=ignore_index, row_weights=None,
            class_dim=-1, reduction=reduction,
        )[2]  # fmt: skip
        if x.dim() != 2:
            raise ValueError(f"{_NAME}: student: expected [batch, classes], got {list(x.shape)}")
    o = reference.KDOptions(**options)._replace(ce_weight=0.0)
    dtype = wide_dtype(*students, teacher)
    return formed_in_forward(_form_ofa, (teacher, o, eps, dtype), *students)
