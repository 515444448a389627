"""at_loss, feature_loss, nst_loss, rkd_loss: features and their relations, one tile at a time.

The spatial losses take the student's feature map and the teacher's map or tokens as they lie in
memory, and form the gradient while a tile of the features is in cache: nothing of the features'
size is made beside it. rkd_loss works on Gram matrices.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import (
    FLOATING,
    REDUCTIONS,
    check_derivatives,
    check_numbers,
    check_tensors,
    differentiable_once,
)

_rkd_fwd_grad = torch.ops.vitkd_fast.rkd_fwd_grad.default
_scale_ = torch.ops.vitkd_fast.kd_scale_.default

_KINDS = ("mse", "cosine", "smooth_l1")
_NORMALIZE = (None, "layer_norm", "l2")
_FORMS = "[batch, channels, height, width] or [batch, tokens, channels]"
_TILE = 2**18  # numbers of a tile: 1 MB of float32, which stays in L2
_COSINE_EPS = 1e-8  # as torch.nn.functional.cosine_similarity
_UNIT_EPS = 1e-12  # as torch.nn.functional.normalize


def _wide(*given: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in given) else torch.float32


def _exact(x: Tensor) -> Any:
    """Arithmetic in the dtypes that are written, inside an autocast region too."""
    return torch.autocast(x.device.type, enabled=False)


def _check(name: str, given: dict[str, Any], teacher: str) -> None:
    """The tensors by themselves; the first is the student's."""
    check_tensors(name, given)
    check_derivatives(name, given, {teacher})
    first, student = next(iter(given.items()))
    for argument, x in given.items():
        if x.dtype not in FLOATING:
            raise TypeError(
                f"{name}: {argument} is {x.dtype}; accepted are float32, float16, bfloat16 and "
                "float64"
            )
        if x.device != student.device:
            raise ValueError(f"{name}: {first} is on {student.device} and {argument} on {x.device}")


def _check_reduction(name: str, reduction: str, accepted: tuple[str, ...]) -> None:
    if reduction not in accepted:
        raise ValueError(
            f"{name}: reduction is {reduction!r}; accepted are {', '.join(accepted[:-1])} and "
            f"{accepted[-1]}"
        )


class _Features(NamedTuple):
    """A feature map or tokens as [batch, channels, positions], in place."""

    x: Tensor
    grid: tuple[int, int] | None  # of a map, or of tokens of which it is known

    @property
    def positions(self) -> int:
        return self.x.shape[2]


def _features(name: str, argument: str, x: Tensor) -> _Features:
    if x.dim() == 4:
        if 0 in x.shape[1:]:
            raise ValueError(f"{name}: {argument} {list(x.shape)} is empty beside its batch")
        grid = (x.shape[2], x.shape[3])
        return _Features(x.flatten(2), grid)
    if x.dim() != 3:
        raise ValueError(f"{name}: {argument} has shape {list(x.shape)}; accepted are {_FORMS}")
    if 0 in x.shape[1:]:
        raise ValueError(f"{name}: {argument} {list(x.shape)} is empty beside its batch")
    return _Features(x.mT, None)


def _teacher_grid(
    name: str, positions: int, grid: tuple[int, int] | None, given: tuple[int, int] | None,
    student: _Features,
) -> tuple[int, int] | None:  # fmt: skip
    """The grid of the teacher's positions; None where it is the student's."""
    if given is not None:
        if grid is not None and tuple(given) != grid:
            raise ValueError(f"{name}: teacher_grid is {tuple(given)}, and f_t has {grid}")
        if given[0] * given[1] != positions:
            raise ValueError(
                f"{name}: teacher_grid is {tuple(given)}, and f_t has {positions} positions"
            )
        grid = (given[0], given[1])
    if grid is None and positions != student.positions:
        side = math.isqrt(positions)
        if side * side != positions:
            raise ValueError(
                f"{name}: f_t has {positions} positions, which are neither the student's "
                f"{student.positions} nor a square grid (CLS and registers are to be sliced off); "
                "accepted is teacher_grid=(height, width)"
            )
        grid = (side, side)
    if grid is None or grid == student.grid:
        return None
    if student.grid is None:
        if positions == student.positions:
            return None
        side = math.isqrt(student.positions)
        if side * side != student.positions:
            raise ValueError(
                f"{name}: f_s has {student.positions} tokens and f_t {positions}; accepted are as "
                "many, or a square grid"
            )
    return grid


def _resized(x: Tensor, old: tuple[int, int] | None, new: tuple[int, int]) -> Tensor:
    """[batch, channels, positions] on another grid: averages where it shrinks, else bilinear."""
    side = math.isqrt(x.shape[2])
    x = x.unflatten(2, old or (side, side))
    if x.shape[2] >= new[0] and x.shape[3] >= new[1]:
        x = F.adaptive_avg_pool2d(x, new)
    else:
        x = F.interpolate(x, new, mode="bilinear", align_corners=False)
    return x.flatten(2)


def _same_batch(name: str, f_s: Tensor, f_t: Tensor, s: str = "f_s", t: str = "f_t") -> None:
    if f_s.shape[0] != f_t.shape[0]:
        raise ValueError(f"{name}: {s} {list(f_s.shape)} and {t} {list(f_t.shape)} differ in batch")


def _reduced(rows: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return rows
    return rows.sum() / (max(rows.shape[0], 1) if reduction == "mean" else 1)


def _samples_per_tile(samples: int, numbers: int) -> int:
    """Of `numbers` each; all of them where a compiler makes the tiles."""
    if torch.compiler.is_compiling():
        return max(samples, 1)
    return max(1, _TILE // max(numbers, 1))


# at_loss


def _energy(x: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """sum over channels of |x|^p, [batch, positions], of x [batch, channels, positions]."""
    if torch.compiler.is_compiling():
        x = x.to(dtype)
        return (x * x if p == 2 else x.abs().pow(p)).sum(1)
    # torch's norm over a dimension that is strided is six times slower than a product and a sum,
    # and powers of other roots lose digits
    if p in (1, 2) and x.dtype == dtype and x.stride(1) == 1:
        return torch.linalg.vector_norm(x, p, 1).pow(p)
    out = x.new_empty((x.shape[0], x.shape[2]), dtype=dtype)
    step = _samples_per_tile(x.shape[0], x.shape[1] * x.shape[2])
    for i in range(0, x.shape[0], step):
        part = x[i : i + step].to(dtype)
        part = part * part if p == 2 else part.abs().pow_(p)
        torch.sum(part, 1, out=out[i : i + step])
    return out


class _Energy(torch.autograd.Function):
    """Features are read once; the backward reads them once and writes the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x)
        ctx.p = p
        return _energy(x, p, dtype)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        by = (ctx.p * grad).unsqueeze(1)
        if ctx.p == 2:
            if x.dtype == grad.dtype:
                return x * by, None, None
            out = torch.empty_like(x)
            step = _samples_per_tile(x.shape[0], x.shape[1] * x.shape[2])
            for i in range(0, x.shape[0], step):
                # in float32: a loss scale may have made of grad what float16 cannot hold
                out[i : i + step].copy_(x[i : i + step] * by[i : i + step])
            return out, None, None
        wide = x.to(grad.dtype)
        slope = wide.sign() if ctx.p == 1 else wide.abs().pow_(ctx.p - 1).copysign_(wide)
        return slope.mul_(by).to(x.dtype), None, None


class _MapDistance(torch.autograd.Function):
    """|| q/||q|| - t/||t|| ||^2 of each row, [batch]: few operations, for maps are small."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, t: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(q, dim=1, keepdim=True).clamp_(min=_UNIT_EPS)
        unit = q / length
        apart = unit - F.normalize(t, eps=_UNIT_EPS)
        ctx.save_for_backward(unit, apart, length, q)
        return (apart * apart).sum(1)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        unit, apart, length, _ = ctx.saved_tensors
        # of the length that was divided out, nothing is left
        across = torch.addcmul(apart, unit, (unit * apart).sum(1, keepdim=True), value=-1)
        return across.mul_((2 * grad).unsqueeze(1) / length), None


def at_loss(
    f_s: Tensor,
    f_t: Tensor,
    *,
    p: float = 2.0,
    teacher_grid: tuple[int, int] | None = None,
    reduction: str = "mean",
) -> Tensor:
    """|| q_s/||q_s|| - q_t/||q_t|| ||^2, q = sum over channels of |F|^p; mean over the batch.

    Attention transfer (Zagoruyko and Komodakis, 2017, arXiv:1612.03928): where a network's
    activations are large. Summed over positions, as in the paper; implementations that take the
    mean over positions too (mdistiller's, weight 1000) give this divided by height * width. The
    teacher is a constant: one that requires grad is an error, unless under torch.no_grad(); it may
    be an inference-mode tensor. The loss is differentiable once, in reverse mode.

    Args:
        f_s: the student's features, [batch, channels, height, width] of any memory format, or
            [batch, tokens, channels]; float32, float16, bfloat16 or float64. The gradient has their
            dtype; arithmetic is float32 (float64 where either side is float64).
        f_t: the teacher's, in either form, read in place (CLS and register tokens are dropped by
            slicing, f[:, 1:]), or a ready map [batch, tokens], such as the attention of the CLS
            token to the patches. It may have another number of channels.
        p: the power, >= 1.
        teacher_grid: (height, width) of the teacher's tokens. Unless given, they are the student's
            grid if as many, else a square. Where the grids differ, the student's map q_s is
            resized: averaged where it is the larger, else bilinear.
        reduction: "mean" over the batch, "sum", or "none".

    Returns:
        The loss, float32 (float64 for float64): 0-dim, or [batch] for "none". An empty batch gives
        0; a map of zeros stays one.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what is accepted; a teacher
            that requires grad.
        RuntimeError: a second derivative, or one in forward mode.
    """
    name = "at_loss"
    _check(name, {"f_s": f_s, "f_t": f_t}, "f_t")
    _check_reduction(name, reduction, tuple(REDUCTIONS))
    check_numbers(name, {"p": p})
    if not p >= 1:
        raise ValueError(f"{name}: p is {p}; accepted are numbers >= 1")
    student = _features(name, "f_s", f_s)
    dtype = _wide(f_s, f_t)
    if f_t.dim() == 2:
        if f_t.shape[1] == 0:
            raise ValueError(f"{name}: f_t {list(f_t.shape)} is empty beside its batch")
        positions, grid, q_t = f_t.shape[1], None, f_t.to(dtype)
    else:
        if f_t.dim() not in (3, 4):
            raise ValueError(
                f"{name}: f_t has shape {list(f_t.shape)}; accepted are {_FORMS}, or a map "
                "[batch, tokens]"
            )
        teacher = _features(name, "f_t", f_t)
        positions, grid = teacher.positions, teacher.grid
        q_t = _energy(teacher.x, p, dtype)
    _same_batch(name, f_s, f_t)
    new = _teacher_grid(name, positions, grid, teacher_grid, student)
    with _exact(f_s):
        q_s = _Energy.apply(student.x, p, dtype)
        if new is not None:
            q_s = _resized(q_s.unsqueeze(1), student.grid, new).squeeze(1)
        return _reduced(_MapDistance.apply(q_s, q_t), reduction)


# losses whose gradients are formed in the forward


class _InForward(torch.autograd.Function):
    """Gradients are formed with the loss, while tiles are in cache."""

    @staticmethod
    def forward(ctx: Any, form: Any, constants: tuple, *inputs: Tensor | None) -> Tensor:
        needed = ctx.needs_input_grad[2:]
        loss, grads = form(inputs, constants, needed)
        ctx.form, ctx.constants, ctx.needed = form, constants, needed
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        ctx.compiled = torch.compiler.is_compiling()
        if ctx.compiled:  # which wants saved tensors, and nothing that works in place
            ctx.save_for_backward(*grads)
        else:
            ctx.save_for_backward(*inputs)
            ctx.grads = grads
        return loss

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.compiled:
            grads = [None if x is None else x * _beside(grad_loss, x) for x in ctx.saved_tensors]
        else:
            # handed over, not shared: they are scaled in place and then belong to the caller
            grads, ctx.grads = ctx.grads, None
            if grads is None:  # a second backward, after retain_graph=True
                _, grads = ctx.form(ctx.saved_tensors, ctx.constants, ctx.needed)
            for grad in grads:
                if grad is not None and grad_loss.dim() == 0:
                    _scale_(grad, grad_loss)
                elif grad is not None:
                    grad.mul_(_beside(grad_loss, grad))
        return None, None, *(
            None if x is None else x.to(dtype) for x, dtype in zip(grads, ctx.dtypes, strict=True)
        )  # fmt: skip


def _beside(grad_loss: Tensor, grad: Tensor) -> Tensor:
    """grad_loss, 0-dim or [batch], to multiply grad with."""
    return grad_loss if grad_loss.dim() == 0 else grad_loss.view(-1, *[1] * (grad.dim() - 1))


def _empty_grad(x: Tensor, needed: bool, dtype: torch.dtype) -> Tensor | None:
    """In x's layout. Float16 waits for the loss scale in float32, and all for a float64 one."""
    if not needed:
        return None
    narrow = x.dtype is torch.bfloat16 and dtype is torch.float32
    return torch.empty_like(x, dtype=torch.bfloat16 if narrow else dtype)


def _formed(form: Any, constants: tuple, *inputs: Tensor | None) -> Tensor:
    if torch.is_grad_enabled():
        return _InForward.apply(form, constants, *inputs)
    return form(inputs, constants, [False] * len(inputs))[0]


# feature_loss


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
    d_x = _empty_grad(x_s, needed[0], dtype)
    d_w = torch.zeros_like(w) if w is not None and needed[1] else None
    d_b = torch.zeros_like(b) if b is not None and needed[2] else None
    loss = x_s.new_zeros((), dtype=torch.float64)
    with torch.no_grad(), _exact(x_s):
        for i, j in _tiles(batch, positions, channels):
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


def _tiles(batch: int, positions: int, channels: int) -> list[tuple[slice, slice]]:
    """Samples and positions of each tile: whole samples, or a part of a large one."""
    some = _samples_per_tile(batch, positions * channels)
    part = max(1, _TILE // channels)
    if torch.compiler.is_compiling() or positions * channels <= 2 * _TILE:
        part = positions
    return [
        (slice(i, i + some), slice(j, j + part))
        for i in range(0, batch, some)
        for j in range(0, positions, part)
    ]


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
        ValueError, TypeError: naming the argument, what was given and what is accepted; a teacher
            that requires grad.
        RuntimeError: a second derivative, or one in forward mode.
    """
    name = "feature_loss"
    given = {"f_s": f_s, "f_t": f_t} | ({} if weight is None else {"weight": weight})
    given |= {} if bias is None else {"bias": bias}
    _check(name, given, "f_t")
    check_numbers(name, {"beta": beta})
    _check_reduction(name, reduction, ("mean", "sum"))
    if kind not in _KINDS:
        raise ValueError(f"{name}: kind is {kind!r}; accepted are {', '.join(_KINDS)}")
    if not beta >= 0:
        raise ValueError(f"{name}: beta is {beta}; accepted are numbers >= 0")
    if normalize_teacher not in _NORMALIZE:
        raise ValueError(
            f"{name}: normalize_teacher is {normalize_teacher!r}; accepted are None, 'layer_norm' "
            "and 'l2'"
        )
    student, teacher = _features(name, "f_s", f_s), _features(name, "f_t", f_t)
    _same_batch(name, f_s, f_t)
    wanted = [teacher.x.shape[1], student.x.shape[1]]
    if weight is None:
        if bias is not None:
            raise ValueError(f"{name}: bias {list(bias.shape)} is given without weight")
        if wanted[0] != wanted[1]:
            raise ValueError(
                f"{name}: f_s {list(f_s.shape)} and f_t {list(f_t.shape)} differ in channels; "
                f"accepted is a weight {wanted}"
            )
    elif list(weight.shape) not in (wanted, [*wanted, 1, 1]):
        raise ValueError(
            f"{name}: weight has shape {list(weight.shape)}; accepted for f_s {list(f_s.shape)} "
            f"and f_t {list(f_t.shape)} are {wanted} and {[*wanted, 1, 1]}"
        )
    elif bias is not None and list(bias.shape) != wanted[:1]:
        raise ValueError(f"{name}: bias has shape {list(bias.shape)}; accepted is {wanted[:1]}")
    new = _teacher_grid(name, teacher.positions, teacher.grid, teacher_grid, student)
    dtype = _wide(*given.values())
    x_s = student.x if new is None else _resized(student.x.to(dtype), student.grid, new)
    if weight is not None:
        weight = weight.flatten(1)
    constants = (teacher.x, kind, beta, normalize_teacher, reduction, dtype)
    return _formed(_form_feature, constants, x_s, weight, bias)


# nst_loss


def _channel_lengths(x: Tensor) -> Tensor:
    """Of x [batch, channels, positions], [batch, channels, 1]."""
    # torch's norm over a dimension that is strided is several times slower
    return (x * x).sum(2, keepdim=True).sqrt_().clamp_(min=_UNIT_EPS)


def _form_nst(
    inputs: tuple[Tensor | None, ...], constants: tuple, needed: tuple[bool, ...]
) -> tuple[Tensor, list[Tensor | None]]:
    """The losses of the samples, reduced, and the gradient of x_s [batch, channels, positions]."""
    (x_s,) = inputs
    x_t, reduction, dtype = constants
    assert x_s is not None
    batch, channels, positions = x_s.shape
    d_x = _empty_grad(x_s, needed[0], dtype)
    rows = x_s.new_empty(batch, dtype=dtype)
    scale = 1 / max(batch, 1) if reduction == "mean" else 1.0
    step = _samples_per_tile(batch, positions * max(positions, channels, x_t.shape[1]))
    with torch.no_grad(), _exact(x_s):
        for i in range(0, batch, step):
            s, t = (x[i : i + step].to(dtype) for x in (x_s, x_t))
            length = _channel_lengths(s)
            s, t = s / length, t / _channel_lengths(t)
            gram = torch.bmm(t.mT, t).div_(-x_t.shape[1])
            gram.baddbmm_(s.mT, s, alpha=1 / channels)  # student - teacher
            rows[i : i + step] = gram.square().sum((1, 2))
            if d_x is None:
                continue
            grad = torch.bmm(s, gram).mul_(4 * scale / channels)
            # of the length that was divided out, nothing is left
            grad.addcmul_(s, (s * grad).sum(2, keepdim=True), value=-1).div_(length)
            d_x[i : i + step] = grad
    return (rows if reduction == "none" else rows.sum() * scale), [d_x]


def nst_loss(
    f_s: Tensor,
    f_t: Tensor,
    *,
    teacher_grid: tuple[int, int] | None = None,
    reduction: str = "mean",
) -> Tensor:
    """|| S^T S / C_s - T^T T / C_t ||_F^2 of channels of length 1; mean over the batch.

    Neuron selectivity transfer (Huang and Wang, 2017, arXiv:1707.01219): the squared maximum mean
    discrepancy between the two sets of channels, each normalised over its positions, under the
    polynomial kernel (x . y)^2, mean k(s, s) + mean k(t, t) - 2 mean k(s, t), by its Gram matrices
    [positions, positions], a few samples at a time, in place of [batch, C_s, C_t, positions]. The
    teacher is a constant: one that requires grad is an error, unless under torch.no_grad(). It may
    be an inference-mode tensor, and must keep its values until the backward has run. The loss is
    differentiable once, in reverse mode.

    Args:
        f_s: the student's features, [batch, C_s, height, width] of any memory format, or
            [batch, tokens, C_s]; float32, float16, bfloat16 or float64. The gradient has their
            dtype; arithmetic is float32 (float64 where either side is float64).
        f_t: the teacher's, in either form, read in place (CLS and register tokens are dropped by
            slicing, f[:, 1:]).
        teacher_grid: (height, width) of the teacher's tokens. Unless given, they are the student's
            grid if as many, else a square. Where the grids differ, the student's features are
            resized: averaged where they are the larger, else bilinear.
        reduction: "mean" over the batch, "sum", or "none".

    Returns:
        The loss, float32 (float64 for float64): 0-dim, or [batch] for "none". An empty batch gives
        0; a channel of zeros stays one.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what is accepted; a teacher
            that requires grad.
        RuntimeError: a second derivative, or one in forward mode.
    """
    name = "nst_loss"
    _check(name, {"f_s": f_s, "f_t": f_t}, "f_t")
    _check_reduction(name, reduction, tuple(REDUCTIONS))
    student, teacher = _features(name, "f_s", f_s), _features(name, "f_t", f_t)
    _same_batch(name, f_s, f_t)
    new = _teacher_grid(name, teacher.positions, teacher.grid, teacher_grid, student)
    dtype = _wide(f_s, f_t)
    x_s = student.x if new is None else _resized(student.x.to(dtype), student.grid, new)
    return _formed(_form_nst, (teacher.x, reduction, dtype), x_s)


# rkd_loss


def _centred(x: Tensor, begin: int, end: int, dtype: torch.dtype) -> Tensor:
    """Columns of x without their mean, whose square would swamp the distances."""
    part = x[:, begin:end].to(dtype)
    return part - part.mean(0)


def _column_tiles(x: Tensor) -> list[tuple[int, int]]:
    """[begin, end) of columns: copies of as many numbers as a Gram matrix has, or 256 columns."""
    step = max(256, x.shape[0])
    return [(i, min(i + step, x.shape[1])) for i in range(0, x.shape[1], step)]


def _gram(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x x^T of the centred embeddings, a few columns at a time."""
    gram = x.new_zeros((x.shape[0], x.shape[0]), dtype=dtype)
    for begin, end in _column_tiles(x):
        part = _centred(x, begin, end, dtype)
        gram = gram.addmm_(part, part.mT)
    return gram


class _RKD(torch.autograd.Function):
    """Keeps the gradient in the Gram matrix, [batch, batch]."""

    @staticmethod
    def forward(
        ctx: Any, x_s: Tensor, x_t: Tensor, distance_weight: float, angle_weight: float
    ) -> Tensor:
        dtype = _wide(x_s, x_t)
        with _exact(x_s):
            grams = _gram(x_s, dtype), _gram(x_t, dtype)
        loss, grad = _rkd_fwd_grad(*grams, distance_weight, angle_weight)
        ctx.save_for_backward(x_s, grad)
        return loss

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        x, grad = ctx.saved_tensors
        by = grad * (2 * grad_loss)
        out = torch.empty_like(x)
        with _exact(x):
            for begin, end in _column_tiles(x):
                out[:, begin:end] = by @ _centred(x, begin, end, grad.dtype)
        return out, None, None, None


def rkd_loss(
    x_s: Tensor, x_t: Tensor, *, distance_weight: float = 25.0, angle_weight: float = 50.0
) -> Tensor:
    """w_d mean h(d_s/mu_s - d_t/mu_t) + w_a mean h(cos_s - cos_t), h: smooth-L1.

    Relational distillation (Park et al., 2019, arXiv:1904.05068): distances of all pairs of
    embeddings, over their mean mu, and the cosines of the angles of all triplets. Both are taken
    from Gram matrices, cos_ijk = (G_jk - G_ij - G_ik + G_ii) / (d_ij d_ik): memory is a few
    [batch, batch] in place of [batch, batch, dim] and [batch, batch, batch]. Means are over
    batch^2 and batch^3, as in the public code. The teacher is a constant: one that requires
    grad is an error, unless under torch.no_grad(); it may be an inference-mode tensor. The loss is
    differentiable once, in reverse mode.

    Args:
        x_s: the student's embeddings, [batch, dim_s], float32, float16, bfloat16 or float64. The
            gradient has their dtype; arithmetic is float32 (float64 where either is float64).
        x_t: the teacher's, [batch, dim_t].
        distance_weight: w_d; 0 switches the term off. The defaults are those of the paper for
            classification and of the public code; for metric learning, 1 and 2.
        angle_weight: w_a.

    Returns:
        The loss, 0-dim, float32 (float64 for float64). A pair of identical embeddings has the
        distance 0, cosines of 0 and no gradient; so has one whose squared distance is below 1e-6
        (float64: 2e-15) of its two squared lengths around the batch's mean, which float32 cannot
        tell from it. One embedding, and an empty batch, give 0.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what is accepted; a teacher
            that requires grad.
        RuntimeError: a second derivative, or one in forward mode.
    """
    name = "rkd_loss"
    given = {"x_s": x_s, "x_t": x_t}
    _check(name, given, "x_t")
    check_numbers(name, {"distance_weight": distance_weight, "angle_weight": angle_weight})
    for argument, x in given.items():
        if x.dim() != 2 or x.shape[1] == 0:
            raise ValueError(
                f"{name}: {argument} has shape {list(x.shape)}; accepted is [batch, dim]"
            )
    _same_batch(name, x_s, x_t, "x_s", "x_t")
    return _RKD.apply(x_s, x_t, distance_weight, angle_weight)
