"""mlkd_loss, the unfused PyTorch implementation, differentiated by autograd."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .kd import _accumulator


def mlkd_loss(
    student: Tensor,
    teacher: Tensor,
    temperatures: Sequence[float] = (2.0, 3.0, 4.0, 5.0, 6.0),
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> Tensor:
    """Divergences of rows, and squared differences of both Gram matrices; mean over temperatures.

    Args:
        weights: of the rows, of the batch's Gram matrices and of the classes'.
    """
    s, t = (x.to(_accumulator(student)) for x in (student, teacher))
    batch, classes = s.shape
    loss = 0 * s.sum()
    for temperature in temperatures:
        log_p, log_q = ((x / temperature).log_softmax(1) for x in (s, t))
        p, q = log_p.exp(), log_q.exp()
        terms = (q * (log_q - log_p)).masked_fill(q == 0, 0)
        loss = loss + weights[0] * temperature**2 * terms.sum() / max(batch, 1)
        loss = loss + weights[1] * (p @ p.mT - q @ q.mT).square().sum() / max(batch, 1)
        loss = loss + weights[2] * (p.mT @ p - q.mT @ q).square().sum() / classes
    return loss / len(temperatures)
