"""Features of several teachers on one scale."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    pass


class PHIStandardize(nn.Module):
    """alpha H U^T (x - mean), covariance U L U^T: channels of variance 1, by rotation and scale.

    PHI-S of PHI Standardization (Ranzinger et al., 2024, arXiv:2410.01680), for teachers whose
    features have scales of their own: H is a Hadamard matrix over sqrt(channels), which gives every
    channel the mean of all variances, and alpha that one's inverse root. Unlike whitening it keeps
    angles, and distances up to alpha. Statistics are those of `observe`, then `fit`.

    Args:
        channels: 1, 2, or a multiple of 4 of which a Hadamard matrix is found.

    Raises:
        ValueError: naming the argument, what was expected and what was given.
    """

    mean: Tensor  # [channels]
    matrix: Tensor  # [channels, channels]

    def __init__(self, channels: int) -> None:
        super().__init__()
        if _hadamard(channels) is None:
            raise ValueError(
                f"{type(self).__name__}: channels: expected 1, 2 or a multiple of 4 with a known "
                f"Hadamard matrix, got {channels}"
            )
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("matrix", torch.eye(channels))
        self._sums: list[Tensor] = []  # of ones, x, and x x^T

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Adds features [B, C, H, W] or [.., C] to the statistics."""
        x = self._rows(x).double()
        sums = [x.new_full((), len(x)), x.sum(0), x.mT @ x]
        before = self._sums or [torch.zeros_like(x) for x in sums]
        self._sums = [a + b for a, b in zip(before, sums, strict=True)]

    @torch.no_grad()
    def fit(self) -> None:
        """Takes the statistics of what was observed, on all ranks of torch.distributed.

        Raises:
            ValueError: nothing was observed, or features that do not vary or are not finite.
        """
        name = type(self).__name__
        if not self._sums:
            raise ValueError(f"{name}: expected features to be observed first, got none")
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for x in self._sums:
                torch.distributed.all_reduce(x)
        count, total, products = self._sums
        mean = total / count
        covariance = products / count - mean.outer(mean)
        variance = covariance.trace() / len(mean)
        if not 0 < float(variance) < math.inf:
            raise ValueError(
                f"{name}: expected features with a finite variance, got one of {float(variance)}"
            )
        _, directions = torch.linalg.eigh(covariance)
        hadamard = _hadamard(len(mean))
        assert hadamard is not None
        rotation = hadamard.to(mean) / len(mean) ** 0.5 @ directions.mT
        self.mean.copy_(mean)
        self.matrix.copy_(rotation / variance.sqrt())
        self._sums = []

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, C, H, W] or [.., C], standardised, float32 and of the same shape."""
        with torch.autocast(x.device.type, enabled=False):
            rows = x.movedim(1, -1) if x.dim() == 4 else x
            rows = (rows.to(self.mean.dtype) - self.mean) @ self.matrix.mT
            return rows.movedim(-1, 1) if x.dim() == 4 else rows

    def _rows(self, x: Tensor) -> Tensor:
        channels, rows = len(self.mean), x.movedim(1, -1) if x.dim() == 4 else x
        if rows.shape[-1] != channels:
            raise ValueError(
                f"{type(self).__name__}: x: expected [batch, {channels}, height, width] or "
                f"[.., {channels}], got {list(x.shape)}"
            )
        return rows.reshape(-1, channels)


def _hadamard(order: int) -> Tensor | None:
    """Of entries +-1, H H^T = order * I: Sylvester's doubling of one of Paley's, or of [1]."""
    base = order
    while base:
        if (found := _paley(base)) is not None:
            while len(found) < order:
                found = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), found)
            return found
        base = base // 2 if base % 2 == 0 else 0
    return None


def _paley(order: int) -> Tensor | None:
    """[1]; of order q + 1 for primes q = 3 mod 4; of order 2 (q + 1) for q = 1 mod 4."""
    if order == 1:
        return torch.ones(1, 1)
    for q, second in ((order - 1, False), (order // 2 - 1, True)):
        prime = q > 2 and all(q % i for i in range(2, math.isqrt(q) + 1))
        if order % 4 or not prime or (q % 4 == 1) != second:
            continue
        squares = {i * i % q for i in range(1, q)}
        symbol = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)])
        i = torch.arange(q)
        s = torch.zeros(q + 1, q + 1)  # of 0 on the diagonal, s s^T = q I
        s[0, 1:], s[1:, 0] = 1, 1 if second else -1
        s[1:, 1:] = symbol[(i[:, None] - i) % q]
        if not second:
            return s + torch.eye(q + 1)
        one, other = torch.tensor([[[1.0, 1.0], [1.0, -1.0]], [[1.0, -1.0], [-1.0, -1.0]]])
        return torch.kron(s, one) + torch.kron(torch.eye(q + 1), other)
    return None
