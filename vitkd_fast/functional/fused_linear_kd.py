"""fused_linear_kd_loss: a classifier's product and kd_loss on it, a chunk of rows at a time.

    s = x W^T + b,  L = kd_loss(s, t),  G = dL/ds,  dx = G W,  dW = G^T x,  db = sum of G's rows

Logits and their gradient [rows, classes] are never whole in memory: those of a chunk are formed,
read by the loss while they are in cache, and multiplied at once into the three gradients. Weights
that are 16 bits wide are multiplied as float32, and dW is added up in one buffer of float32.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from .. import reference
from ._common import (
    REDUCTIONS,
    check_choice,
    check_derivatives,
    check_floating,
    check_numbers,
    check_tensors,
    wide_dtype,
)
from ._features import empty_grad, formed_in_forward
from ._precision import without_autocast
from ._rows import Labels, row_options

Classifier: TypeAlias = tuple[Tensor, Tensor, Tensor | None]  # features, weight, bias

_NAME = "fused_linear_kd_loss"
_OF_TEACHER = "teacher's features", "teacher's weight", "teacher's bias"
_ROWS, _NUMBERS = 256, 2**18  # of a chunk, at least: 1 MB of logits, a tenth of dW's traffic

_kd_fwd = torch.ops.vitkd_fast.kd_fwd.default
_kd_fwd_grad = torch.ops.vitkd_fast.kd_fwd_grad.default


def _shares(o: reference.KDOptions, x: Tensor, mean: bool, dtype: torch.dtype) -> Tensor:
    """What each row's loss is multiplied by, [rows]: it depends on rows of other chunks."""
    share = x.new_ones(x.shape[0], dtype=dtype) if o.row_weights is None else o.row_weights
    for ids in (o.labels, o.labels_b):
        if ids is not None:
            share = share.masked_fill(ids == o.ignore_index, 0.0)
    if not mean:
        return share
    total = share.sum()
    return torch.where(total == 0, 0.0, share / total)


def _of_rows(o: reference.KDOptions, rows: slice) -> reference.KDOptions:
    """The options of a chunk; numbers that hold for all rows stay as they are."""
    names = ("labels", "labels_b", "lam_rows", "temperature_rows", "row_weights")
    given = {name: x for name in names if (x := getattr(o, name)) is not None and x.dim()}
    return o._replace(**{name: x[rows] for name, x in given.items()})


def _logits(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return x @ w.mT if b is None else torch.addmm(b, x, w.mT)


def _wide(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.detach().to(dtype)


def _form_linear_kd(
    inputs: tuple[Tensor | None, ...], constants: tuple, needed: tuple[bool, ...]
) -> tuple[Tensor, list[Tensor | None]]:
    """The loss and the gradients of features, weight and bias."""
    x, weight, bias = inputs
    teacher, options, mean, chunk, dtype = constants
    assert x is not None and weight is not None
    d_x = empty_grad(x, needed[0], dtype)
    with torch.no_grad(), without_autocast(x):
        w, b = weight.detach().to(dtype), _wide(bias, dtype)
        d_w = torch.zeros_like(w) if needed[1] else None
        d_b = None if b is None or not needed[2] else torch.zeros_like(b)
        x_t, w_t, b_t = teacher if isinstance(teacher, tuple) else (teacher, None, None)
        w_t, b_t = _wide(w_t, dtype), _wide(b_t, dtype)
        options = options._replace(row_weights=_shares(options, x, mean, dtype))
        loss = x.new_zeros((), dtype=torch.float64)
        for i in range(0, x.shape[0], chunk):
            rows = slice(i, i + chunk)
            part, t = x[rows].to(dtype), x_t[rows]
            if w_t is not None:
                t = _logits(t.to(dtype), w_t, b_t)
            elif dtype == torch.float64:
                t = t.to(dtype)
            s, o = _logits(part, w, b), _of_rows(options, rows)
            if not any(needed):
                loss = loss + _kd_fwd(s, t, *o)[0]
                continue
            value, grad = _kd_fwd_grad(s, t, *o)
            loss = loss + value
            if d_x is not None:
                d_x[rows] = grad @ w
            if d_w is not None:
                d_w.addmm_(grad.mT, part)
            if d_b is not None:
                d_b.add_(grad.sum(0))
    return loss.to(dtype), [d_x, d_w, d_b]


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, names: tuple[str, str, str]) -> None:
    for argument, y in zip(names, (x, weight), strict=False):
        if y.dim() != 2 or y.shape[1] == 0:
            form = "[rows, dim]" if argument == names[0] else "[classes, dim]"
            raise ValueError(f"{_NAME}: {argument}: expected {form}, got {list(y.shape)}")
    if weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"{_NAME}: {names[1]}: expected the dim of {names[0]} {list(x.shape)}, got "
            f"{list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{_NAME}: {names[2]}: expected {list(weight.shape[:1])}, got {list(bias.shape)}"
        )


def fused_linear_kd_loss(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Tensor | Classifier,
    *,
    temperature: float | Tensor = 1.0,
    labels: Labels | None = None,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    row_weights: Tensor | None = None,
    chunk: int | None = None,
    reduction: str = "mean",
) -> Tensor:
    """kd_loss(features weight^T + bias, teacher), of logits that are never whole in memory.

    The classifier's product and the loss (Hinton, Vinyals and Dean, 2015, arXiv:1503.02531) of a
    chunk of rows after another, as cut cross-entropy does for labels (Wijmans et al., 2024,
    arXiv:2411.09009). The gradients of features, weight and bias are formed in the forward, from
    logits in float32 (float64 where any tensor is): each is rounded once to its tensor's dtype,
    and the features' once more where a bfloat16 loss is scaled afterwards. The products obey
    torch.set_float32_matmul_precision, as those of torch.nn.Linear do. The teacher is a
    constant: one that requires grad is an error, unless under torch.no_grad(). The loss is
    differentiable once, in reverse mode.

    Args:
        features: what the student's classifier reads, [rows, dim]; float32, float16, bfloat16 or
            float64, as all the other tensors, each of its own dtype.
        weight: the classifier's, [classes, dim], of 2 classes or more.
        bias: the classifier's, [classes], or None.
        teacher: its logits, [rows, classes]; or (features, weight, bias or None) of its own
            classifier, of any dim, so that its logits are formed chunk by chunk, too.
        temperature, labels, kd_weight, ce_weight, label_smoothing, ignore_index, row_weights: as
            in `kd_loss`.
        chunk: rows at a time. Unless given 256, and more of less than 1024 classes: with fewer, the
            products would wait for the weights.
        reduction: "mean" over the rows that are not ignored (by the sum of their weights, where
            `row_weights` is given), or "sum".

    Returns:
        The loss, 0-dim, float32 (float64 where any tensor is).

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was given; a teacher
            that requires grad.
        RuntimeError: a label out of range, on the CPU; a second derivative, or one in forward mode.
    """
    parts: dict[str, Any] = {"teacher": teacher}
    if isinstance(teacher, tuple) and len(teacher) == 3:
        parts = dict(zip(_OF_TEACHER, teacher, strict=True))
    given: dict[str, Any] = {"features": features, "weight": weight, "bias": bias, **parts}
    given = {k: x for k, x in given.items() if x is not None or "bias" not in k}
    check_tensors(_NAME, given)
    numbers = {"kd_weight": kd_weight, "ce_weight": ce_weight, "label_smoothing": label_smoothing}
    check_numbers(_NAME, numbers)
    check_derivatives(_NAME, given, set(parts))
    check_floating(_NAME, given)
    _check(features, weight, bias, ("features", "weight", "bias"))
    rows, classes = features.shape[0], weight.shape[0]
    if classes < 2:
        raise ValueError(f"{_NAME}: weight: expected 2 classes or more, got {list(weight.shape)}")
    if isinstance(teacher, tuple):
        _check(*teacher, _OF_TEACHER)
        of_teacher = torch.Size((teacher[0].shape[0], teacher[1].shape[0]))
    else:
        of_teacher = teacher.shape
    if of_teacher != (rows, classes):
        raise ValueError(
            f"{_NAME}: teacher: expected logits [{rows}, {classes}], as the student's, got "
            f"{list(of_teacher)}"
        )
    check_choice(_NAME, "reduction", reduction, ("mean", "sum"))
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{_NAME}: label_smoothing: expected 0 to 1, got {label_smoothing}")
    if ce_weight != 0 and labels is None:
        raise ValueError(
            f"{_NAME}: labels: expected class ids, as ce_weight is {ce_weight}, got None"
        )
    if chunk is None:
        chunk = max(_ROWS, _NUMBERS // classes)
    elif chunk < 1:
        raise ValueError(f"{_NAME}: chunk: expected 1 row or more, got {chunk}")
    dtype = wide_dtype(*given.values())
    by_row = row_options(
        _NAME, features, torch.Size((rows,)), labels, row_weights, temperature, dtype=dtype
    )
    options = reference.KDOptions(
        kd_weight=kd_weight, class_dim=1, reduction=REDUCTIONS["sum"], ce_weight=ce_weight,
        label_smoothing=label_smoothing, ignore_index=ignore_index, **by_row,
    )  # fmt: skip
    constants = teacher, options, reduction == "mean", chunk, dtype
    return formed_in_forward(_form_linear_kd, constants, features, weight, bias)
