"""sliced_wasserstein_loss: sorted projections of two sets of points, of a few samples at a time."""

from __future__ import annotations

from itertools import zip_longest

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import (
    REDUCTIONS,
    check_batch,
    check_choice,
    check_inputs,
    check_numbers,
    constant_when_compiled,
    exactly,
    wide_dtype,
)
from ._features import check_not_empty, empty_grad, formed_in_forward, samples_per_tile


@constant_when_compiled
def _directions(dim: int, projections: int, seed: int) -> Tensor:
    """Of length 1, [dim, projections], float64: the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((dim, projections), generator=generator, dtype=torch.float64, device="cpu")
    return x / x.norm(dim=0)


def _steps(n: int, m: int) -> tuple[list[int], list[int], list[tuple[int, ...]], list[float]]:
    """The steps of two quantile functions, of n and of m points.

    Returns:
        For each part of [0, 1] on which both are constant, the point of the first and that of the
        second; the first parts of all points of the first, the second ones and so on, with one
        behind the last where a point has no more; and the parts' widths.
    """
    edges = sorted({*range(0, n * m, m), *range(0, n * m, n)})
    widths = [(b - a) / (n * m) for a, b in zip(edges, [*edges[1:], n * m], strict=True)]
    first, second = [e // m for e in edges], [e // n for e in edges]
    parts: list[list[int]] = [[] for _ in range(n)]
    for k, i in enumerate(first):
        parts[i].append(k)
    columns = [*zip_longest(*parts, fillvalue=len(edges))]
    return first, second, columns, widths


def _sort(x: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers along the last dimension, sorted, and where each was.

    numpy sorts integers with vector instructions: keys of a float32's bits and its place take a
    sixth of torch.sort's time on a CPU.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.compiler.is_compiling():
        values, order = x.sort(-1)
        return values, order
    keys = _ordered(x.numpy().view(np.int32)).astype(np.int64) << 32 | np.arange(x.shape[-1])
    keys.sort(-1)
    values = torch.from_numpy(_ordered((keys >> 32).astype(np.int32)).view(np.float32))
    return values, torch.from_numpy(keys & 0xFFFFFFFF)


def _ordered(bits: np.ndarray) -> np.ndarray:
    """Of float32 numbers to integers in the same order, and back."""
    return bits ^ (bits >> 31 & 0x7FFFFFFF)


def _form(
    inputs: tuple[Tensor | None, ...], constants: tuple, needed: tuple[bool, ...]
) -> tuple[Tensor, list[Tensor | None]]:
    """The losses of the samples, reduced, and the gradient of x_s [batch, points, dim]."""
    (x_s,) = inputs
    x_t, projections, p, seed, reduction, dtype = constants
    assert x_s is not None
    batch, n, dim = x_s.shape
    m = x_t.shape[1]
    d_x = empty_grad(x_s, needed[0], dtype)
    rows = x_s.new_empty(batch, dtype=dtype)
    scale = 1 / max(batch, 1) if reduction == "mean" else 1.0
    step = samples_per_tile(x_s, batch, projections * (n + m))
    # a compiler of sizes that change makes a number of one that is counted
    across = _directions(len([*range(dim)]), projections, seed).to(x_s.device, dtype)
    pairs = None
    width: float | Tensor = 1 / n
    if n != m:
        *pairs, widths = _steps(n, m)
        first, second, parts = (torch.tensor(of, device=x_s.device) for of in pairs)
        width = torch.tensor(widths, device=x_s.device, dtype=dtype)

    with torch.no_grad(), exactly(x_s):
        for i in range(0, batch, step):
            # [batch, projections, points]
            sorted_s, order = _sort(torch.matmul(across.mT, x_s[i : i + step].to(dtype).mT))
            sorted_t, _ = _sort(torch.matmul(across.mT, x_t[i : i + step].to(dtype).mT))
            if pairs:
                sorted_s = sorted_s.index_select(2, first)
                sorted_t = sorted_t.index_select(2, second)
            apart = sorted_s - sorted_t
            slope = apart if p == 2 else apart.abs().pow_(p - 1).copysign_(apart)
            if p == 1:
                slope = apart.sign()
            slope = slope * width
            rows[i : i + step] = (slope * apart).sum((1, 2)) / projections
            if d_x is None:
                continue
            grad = slope.mul_(p * scale / projections)
            if pairs:
                padded = F.pad(grad, (0, 1))
                grad = torch.stack([padded.index_select(2, of) for of in parts]).sum(0)
            grad = torch.empty_like(grad).scatter_(2, order, grad)
            d_x[i : i + step] = torch.matmul(grad.mT, across.mT)
    return (rows if reduction == "none" else rows.sum() * scale), [d_x]


def sliced_wasserstein_loss(
    x_s: Tensor,
    x_t: Tensor,
    *,
    projections: int = 64,
    p: float = 2.0,
    seed: int = 0,
    reduction: str = "mean",
) -> Tensor:
    """mean over directions a of W_p(a . x_s, a . x_t)^p, of two sets of points; over the batch.

    The sliced Wasserstein distance (Bonneel et al., 2015; of features Heitz et al., 2021,
    arXiv:2006.07229): in one dimension, transport pairs sorted numbers. Sets of as many points are
    paired one by one; else the two quantile functions are, exactly. Points are tokens, or a map's
    channels over its positions (`f.flatten(2)`), whose numbers may then differ. The teacher is a
    constant: one that requires grad is an error, unless under torch.no_grad(). It may be an
    inference-mode tensor, and must keep its values until the backward has run. The loss is
    differentiable once, in reverse mode.

    Args:
        x_s: the student's points, [batch, points, dim]; float32, float16, bfloat16 or float64. The
            gradient has their dtype; arithmetic is float32 (float64 where either side is float64).
        x_t: the teacher's, [batch, points_t, dim].
        projections: directions, drawn uniformly from the sphere.
        p: the power, >= 1.
        seed: of the directions, which are the same on every device.
        reduction: "mean" over the batch, "sum", or "none".

    Returns:
        The loss, float32 (float64 for float64): 0-dim, or [batch] for "none". An empty batch gives
        0.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was given; a teacher
            that requires grad.
        RuntimeError: a second derivative, or one in forward mode.
    """
    name = "sliced_wasserstein_loss"
    given = {"x_s": x_s, "x_t": x_t}
    check_inputs(name, given, "x_t")
    check_choice(name, "reduction", reduction, REDUCTIONS)
    check_numbers(name, {"projections": projections, "p": p, "seed": seed})
    for argument, x in given.items():
        if x.dim() != 3:
            raise ValueError(
                f"{name}: {argument}: expected [batch, points, dim], got {list(x.shape)}"
            )
        check_not_empty(name, argument, x)
    check_batch(name, x_s, x_t, "x_s", "x_t")
    if x_s.shape[2] != x_t.shape[2]:
        raise ValueError(
            f"{name}: x_t: expected the {x_s.shape[2]} dimensions of x_s, got {x_t.shape[2]}"
        )
    if not (isinstance(projections, int) and projections >= 1):
        raise ValueError(f"{name}: projections: expected an integer >= 1, got {projections}")
    if not p >= 1:
        raise ValueError(f"{name}: p: expected a number >= 1, got {p}")
    constants = x_t, projections, p, seed, reduction, wide_dtype(x_s, x_t)
    return formed_in_forward(_form, constants, x_s)
