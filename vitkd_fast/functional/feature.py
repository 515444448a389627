"""feature_loss: features through a 1x1 projection, one tile at a time.

The student's feature map and the teacher's map or tokens are taken as they lie in memory, and the
gradient is formed while a tile is in cache: nothing of the features' size is made beside it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import check_batch, check_choice, check_inputs, check_numbers, exactly, wide_dtype
from ._features import (
    as_features,
    empty_grad,
    formed_in_forward,
    grid_of_teacher,
    resized,
    tiles,
)

_KINDS = ("mse", "cosine", "smooth_l1")
_NORMALIZE = (None, "layer_norm", "l2")
_COSINE_EPS = 1e-8  # as torch.nn.functional.cosine_similarity


def _normalized(t: Tensor, how: str | None) -> Tensor:
    if how == "layer_norm":
        return F.layer_norm(t, t.shape[-1:])
    return F.normalize(t, dim=-1) if how == "l2" else t


def _feature_error(y: Tensor, t: Tensor, kind: str, beta: float) -> tuple[Tensor, Tensor, float]:
    """The sum of the errors of y [.., channels]; their gradient, but for a factor; and the factor.

    y's memory is reused, and the tile is passed as rarely as torch's functions allow.
    """
    if kind == "cosine":
        by_y = torch.linalg.vector_norm(y, dim=-1, keepdim=True).clamp_(min=_COSINE_EPS)
        by_t = torch.linalg.vector_norm(t, dim=-1, keepdim=True).clamp_(min=_COSINE_EPS)
        by_y, by_t = by_y.reciprocal_(), by_t.reciprocal_()
        cosine = (y * t).sum(-1, keepdim=True).mul_(by_y).mul_(by_t)
        loss = (1 - cosine).sum()
        return loss, y.mul_(cosine * by_y * by_y).addcmul_(t, by_t.mul_(by_y), value=-1), 1.0
    y.sub_(t)
    if kind == "mse":
        # of rows first: torch's norm of all adds up one long chain, which loses digits
        rows = torch.linalg.vector_norm(y, dim=-1 if y.stride(-1) == 1 else -2)
        return rows.square().sum(), y, 2.0
    if beta == 0:
        return y.abs().sum(), y.sign_(), 1.0
    slope = y.clamp(-1, 1) if beta == 1 else (y / beta).clamp_(-1, 1)
    y.sub_(slope, alpha=beta / 2)
    return y.mul_(slope).sum(), slope, 1.0


def _form_feature(
    inputs: tuple[Tensor | None, ...], constants: tuple, needed: tuple[bool, ...]
) -> tuple[Tensor, list[Tensor | None]]:
    """The loss and the gradients of x_s [batch, channels, positions], weight and bias."""
    x_s, weight, bias = inputs
    x_t, kind, beta, normalize, reduction, dtype = constants
    assert x_s is not None
    batch, _, positions = x_s.shape
    channels = x_t.shape[1]
    count = batch * positions * (1 if kind == "cosine" else channels)
    scale = 1 / max(count, 1) if reduction == "mean" else 1.0
    w = None if weight is None else weight.detach().to(dtype)
    b = None if bias is None else bias.detach().to(dtype)
    d_x = empty_grad(x_s, needed[0], dtype)
    d_w = torch.zeros_like(w) if w is not None and needed[1] else None
    d_b = torch.zeros_like(b) if b is not None and needed[2] else None
    loss = x_s.new_zeros((), dtype=torch.float64)
    with torch.no_grad(), exactly(x_s):
        for i, j in tiles(x_s, batch, positions, channels):
            x = x_s[i, :, j].mT.to(dtype)  # [samples, positions, channels]
            y = x.clone() if w is None else _projected(x, w, b)
            t = _normalized(x_t[i, :, j].mT.to(dtype), normalize)
            error, d_y, factor = _feature_error(y, t, kind, beta)
            loss = loss + error
            # the scale is applied to what is smaller than a tile
            if d_b is not None:
                d_b.add_(d_y.sum((0, 1)), alpha=factor * scale)
            if d_w is not None:
                d_w.add_(_weight_gradient(d_y, x), alpha=factor * scale)
            if d_x is not None:
                part = d_y * (factor * scale) if w is None else d_y @ (w * (factor * scale))
                d_x[i, :, j].mT.copy_(part)
    return (loss * scale).to(dtype), [d_x, d_w, d_b]


def _projected(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """x w^T + b of x [samples, positions, channels]; one product where rows follow one another."""
    if x.stride(2) == 1:
        y = x.reshape(-1, x.shape[2]) @ w.mT
        y = y.view(x.shape[0], x.shape[1], -1)
    else:
        y = torch.matmul(x, w.mT)
    return y if b is None else y.add_(b)


def _weight_gradient(d_y: Tensor, x: Tensor) -> Tensor:
    """sum over samples and positions of d_y^T x."""
    if x.stride(2) == 1:
        return d_y.flatten(0, 1).mT @ x.reshape(-1, x.shape[2])
    return torch.bmm(d_y.mT, x).sum(0)


def feature_loss(
    f_s: Tensor,
    f_t: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    kind: str = "mse",
    beta: float = 1.0,
    normalize_teacher: str | None = None,
    teacher_grid: tuple[int, int] | None = None,
    reduction: str = "mean",
) -> Tensor:
    """mean of e(weight f_s + bias - f_t) over batch, positions and channels; e: square, Huber's.

    FitNet's hint (Romero et al., 2015, arXiv:1412.6550): the student's features, through a 1x1
    projection, beside the teacher's. Rows are projected one tile at a time; a tile's error and
    gradients are formed while it is in cache, and nothing of the projected size is stored.
    Gradients flow to `f_s`, `weight` and `bias`; the teacher is a constant: one that requires grad
    is an error, unless under torch.no_grad(). It may be an inference-mode tensor, and must keep its
    values until the backward has run. The loss is differentiable once, in reverse mode.

    Args:
        f_s: the student's features, [batch, channels_s, height, width] of any memory format, or
            [batch, tokens, channels_s]; float32, float16, bfloat16 or float64. Gradients have the
            dtypes of their tensors; arithmetic is float32 (float64 where any tensor is float64).
        f_t: the teacher's, in either form, read in place (CLS and register tokens are dropped by
            slicing, f[:, 1:]).
        weight: [channels_t, channels_s], or a 1x1 convolution's [channels_t, channels_s, 1, 1].
            None: channels are equal, and compared as they are.
        bias: [channels_t], with a weight.
        kind: "mse", "smooth_l1", or "cosine": 1 - cos of each position's channels, mean over batch
            and positions.
        beta: of smooth_l1: where its square turns into its line, as torch.nn.functional.
        normalize_teacher: None, "layer_norm" (each position over its channels, without weights) or
            "l2" (to length 1).
        teacher_grid: (height, width) of the teacher's tokens. Unless given, they are the student's
            grid if as many, else a square. Where the grids differ, the student's features are
            resized before they are projected: averaged where they are the larger, else bilinear.
        reduction: "mean" or "sum".

    Returns:
        The loss, 0-dim, float32 (float64 for float64). An empty batch gives 0.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was given; a teacher
            that requires grad.
        RuntimeError: a second derivative, or one in forward mode.
    """
    name = "feature_loss"
    given = {"f_s": f_s, "f_t": f_t} | ({} if weight is None else {"weight": weight})
    given |= {} if bias is None else {"bias": bias}
    check_inputs(name, given, "f_t")
    check_numbers(name, {"beta": beta})
    check_choice(name, "reduction", reduction, ("mean", "sum"))
    check_choice(name, "kind", kind, _KINDS)
    check_choice(name, "normalize_teacher", normalize_teacher, _NORMALIZE)
    if not beta >= 0:
        raise ValueError(f"{name}: beta: expected a number >= 0, got {beta}")
    student, teacher = as_features(name, "f_s", f_s), as_features(name, "f_t", f_t)
    check_batch(name, f_s, f_t)
    wanted = [teacher.x.shape[1], student.x.shape[1]]
    if weight is None:
        if bias is not None:
            raise ValueError(f"{name}: bias: expected a weight beside it, got {list(bias.shape)}")
        if wanted[0] != wanted[1]:
            raise ValueError(
                f"{name}: f_t: expected the channels of f_s {list(f_s.shape)}, or a weight "
                f"{wanted} beside it, got {list(f_t.shape)}"
            )
    elif list(weight.shape) not in (wanted, [*wanted, 1, 1]):
        raise ValueError(
            f"{name}: weight: expected {wanted} or {[*wanted, 1, 1]} for f_s {list(f_s.shape)} and "
            f"f_t {list(f_t.shape)}, got {list(weight.shape)}"
        )
    elif bias is not None and list(bias.shape) != wanted[:1]:
        raise ValueError(f"{name}: bias: expected {wanted[:1]}, got {list(bias.shape)}")
    new = grid_of_teacher(name, teacher.positions, teacher.grid, teacher_grid, student)
    dtype = wide_dtype(*given.values())
    x_s = student.x if new is None else resized(student.x.to(dtype), student.grid, new)
    if weight is not None:
        weight = weight.flatten(1)
    constants = (teacher.x, kind, beta, normalize_teacher, reduction, dtype)
    return formed_in_forward(_form_feature, constants, x_s, weight, bias)
