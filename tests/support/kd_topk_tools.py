"""kd_loss_topk in tests: what a teacher's cache holds, and the same loss of a dense teacher."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from support.kd_tools import per_row
from vitkd_fast import reference
from vitkd_fast.functional import kd_loss_topk

TAILS = ["smooth", "zero", "renorm", "bin"]


class TopK(NamedTuple):
    """What is kept of a teacher: its K largest logits at a temperature."""

    indices: Tensor
    values: Tensor
    log_sum_exp: Tensor


def top_of(teacher: Tensor, k: int, temperature: float | Tensor = 1.0) -> TopK:
    wide = torch.float64 if teacher.dtype == torch.float64 else torch.float32
    values, indices = teacher.detach().topk(min(k, teacher.shape[-1]), -1)
    if isinstance(temperature, Tensor):
        temperature = per_row(temperature, -1).to(wide)
    return TopK(indices, values, (teacher.detach().to(wide) / temperature).logsumexp(-1))


def topk_loss(
    student: Tensor, teacher: Tensor, *, k: int = 3, tail: str = "smooth", class_dim: int = -1,
    **options: Any,
) -> Tensor:  # fmt: skip
    """The loss of what is kept of a dense teacher."""
    if teacher.requires_grad:
        return kd_loss_topk(student, teacher.long(), teacher, tail=tail, **options)
    top = top_of(teacher, k, options.get("temperature", 1.0))
    return kd_loss_topk(
        student, top.indices, top.values, log_sum_exp=top.log_sum_exp, tail=tail, **options
    )


def operation_options(
    student: Tensor, log_sum_exp: Tensor | None, *, temperature: float | Tensor = 1.0,
    tail: str = "smooth", labels: Any = None, kd_weight: float = 1.0, ce_weight: float = 0.0,
    label_smoothing: float = 0.0, ignore_index: int = -100, row_weights: Tensor | None = None,
    reduction: str = "mean",
) -> reference.KDTopKOptions:  # fmt: skip
    """kd_loss_topk's options as the operations take them, written apart from functional/."""
    wide = torch.float64 if student.dtype == torch.float64 else torch.float32

    def rows(x: Any) -> Tensor | None:
        return x.to(wide) if isinstance(x, Tensor) else None

    labels, labels_b, lam = labels if isinstance(labels, tuple) else (labels, None, 1.0)
    return reference.KDTopKOptions(
        1.0 if isinstance(temperature, Tensor) else temperature,
        kd_weight, TAILS.index(tail), {"none": 0, "mean": 1, "sum": 2}[reduction],
        rows(log_sum_exp), labels, labels_b, rows(lam), rows(temperature), rows(row_weights),
        1.0 if isinstance(lam, Tensor) else lam, ce_weight, label_smoothing, ignore_index,
    )  # fmt: skip
