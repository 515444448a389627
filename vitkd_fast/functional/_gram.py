"""What the losses of a batch's relations share: Gram matrices, and the gradient through them.

x x^T [batch, batch] holds all that such a loss asks of embeddings [batch, dim]. A few columns are
converted at a time, so that no copy of the embeddings is made, and what is kept for the backward is
the gradient in the student's matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._common import check_batch, check_inputs, differentiable_once, exactly, wide_dtype
from ._features import tile_size


def check_embeddings(name: str, x_s: Any, x_t: Any) -> None:
    given = {"x_s": x_s, "x_t": x_t}
    check_inputs(name, given, "x_t")
    for argument, x in given.items():
        if x.dim() != 2 or x.shape[1] == 0:
            raise ValueError(f"{name}: {argument}: expected [batch, dim], got {list(x.shape)}")
    check_batch(name, x_s, x_t, "x_s", "x_t")


def _columns(x: Tensor, begin: int, end: int, dtype: torch.dtype, centred: bool) -> Tensor:
    part = x[:, begin:end].to(dtype)
    return part - part.mean(0) if centred else part


def _column_tiles(x: Tensor) -> list[tuple[int, int]]:
    """[begin, end) of columns: copies of as many numbers as a Gram matrix has, or 256 columns.

    On a GPU, where it is the kernels that count, of as many as a tile has.
    """
    step = max(256, x.shape[0])
    if x.device.type != "cpu":
        step = max(step, tile_size(x) // max(x.shape[0], 1))
    return [(i, min(i + step, x.shape[1])) for i in range(0, x.shape[1], step)]


def _gram(x: Tensor, dtype: torch.dtype, centred: bool) -> Tensor:
    """x x^T, a few columns at a time."""
    gram = x.new_zeros((x.shape[0], x.shape[0]), dtype=dtype)
    for begin, end in _column_tiles(x):
        part = _columns(x, begin, end, dtype, centred)
        gram = gram.addmm_(part, part.mT)
    return gram


class _OfGrams(torch.autograd.Function):
    """Keeps the gradient in the Gram matrix, [batch, batch]."""

    @staticmethod
    def forward(
        ctx: Any, x_s: Tensor, x_t: Tensor, form: Callable, options: tuple, centred: bool
    ) -> Tensor:
        dtype = wide_dtype(x_s, x_t)
        with exactly(x_s):
            loss, grad = form(_gram(x_s, dtype, centred), _gram(x_t, dtype, centred), *options)
        ctx.save_for_backward(x_s, grad)
        ctx.centred = centred
        return loss

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        x, grad = ctx.saved_tensors
        by = grad * (2 * grad_loss)
        out = torch.empty_like(x)
        with exactly(x):
            for begin, end in _column_tiles(x):
                out[:, begin:end] = by @ _columns(x, begin, end, grad.dtype, ctx.centred)
        return out, None, None, None, None


def of_grams(
    form: Callable, x_s: Tensor, x_t: Tensor, *options: float, centred: bool = False
) -> Tensor:
    """A loss of two Gram matrices, differentiable in the student's embeddings.

    Args:
        form: of (gram_s, gram_t, *options), the loss and its gradient in gram_s, symmetric.
        centred: the embeddings without their mean.
    """
    return _OfGrams.apply(x_s, x_t, form, options, centred)


def symmetric(grad: Tensor) -> Tensor:
    """The gradient in a symmetric matrix of that in a matrix."""
    return (grad + grad.mT).mul_(0.5)


def _inverse(x: Tensor) -> Tensor:
    """1 / x, and 0 for 0."""
    return x.reciprocal().masked_fill(x == 0, 0)


def unit_rows(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of length 1, and the inverse of their lengths; a row of zeros stays one."""
    length = torch.linalg.vector_norm(gram, dim=1, keepdim=True)
    inverse = _inverse(length)
    return gram / length.masked_fill(length == 0, 1), inverse


def through_unit_rows(grad: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """The gradient in the rows of that in the rows of length 1."""
    return torch.addcmul(grad, unit, (unit * grad).sum(1, keepdim=True), value=-1).mul_(inverse)


def cosines(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Of all pairs of embeddings, and the inverse of their lengths; 0 beside an embedding of 0."""
    inverse = _inverse(gram.diagonal().sqrt())
    cosine = gram * inverse.unsqueeze(1) * inverse
    cosine.diagonal().copy_(inverse.sign())  # of itself, which rounding would miss
    return cosine, inverse


def through_cosines(grad: Tensor, cosine: Tensor, inverse: Tensor) -> Tensor:
    """The gradient in the Gram matrix of that in the cosines; both symmetric."""
    own = (grad * cosine).sum(1) * inverse * inverse
    return grad * inverse.unsqueeze(1) * inverse - torch.diag(own)
