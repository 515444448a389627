"""dkd_loss: the target class and all others, each with a weight of its own."""

from __future__ import annotations

from torch import Tensor

from ._rows import row_loss


def dkd_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    row_weights: Tensor | None = None,
    class_dim: int = -1,
    reduction: str = "mean",
    standardize: bool = False,
) -> Tensor:
    """kd_weight * T^2 * (alpha KL(b_t || b_s) + beta KL(p' || q')) + ce_weight * CE(student, y).

    Decoupled distillation (Zhao et al., 2022, arXiv:2203.08679): b = [p_y, 1 - p_y] are the
    probabilities of the label and of all other classes, p' and q' the softmaxes without the label.
    With two classes the second term is 0. The authors let kd_weight grow from 0 to 1 over the
    first 20 epochs: in a configuration, `weight: {start: 0, end: 1, until: ...}`.

    Args:
        labels: int64 class ids of the rows' shape; mixed labels have no target class, and are an
            error.
        alpha: weight of the target's term.
        beta: weight of the other classes' term.

    Other args, returns and raises are those of `kd_loss`, and so are the derivatives.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(
            "dkd_loss: labels: expected an int64 tensor of class ids, got "
            f"{type(labels).__name__}; of mixed labels, add the losses of both, each with its share"
        )
    return row_loss(
        "dkd_loss", "dkd", student, teacher, alpha=alpha, beta=beta, standardize=standardize,
        temperature=temperature, labels=labels, kd_weight=kd_weight, ce_weight=ce_weight,
        label_smoothing=label_smoothing, ignore_index=ignore_index, row_weights=row_weights,
        class_dim=class_dim, reduction=reduction,
    )  # fmt: skip
