"""The engine's roundings as torch functions with gradients, for quantisation-aware training.

    y = clamp(rne(v), lo, hi), dy/dv = 1 between lo and hi, else 0   (straight-through)

Maps are integers in float32, less their zero point: padding is zeros, sums are exact below 2^24,
and the gradient of a scale is that of the multipliers it is in. One autograd node per node of the
graph, which works in place where it can: on a CPU fresh memory costs more than the arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

_PRODUCTS = 32  # channels whose products are formed at a time


class _Replace(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def replaced(x: Tensor, value: Tensor) -> Tensor:
    """The value, with x's gradient: what x was rounded to."""
    result: Tensor = _Replace.apply(x, value)
    return result


class _ScaleGradient(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def scale_gradient(x: Tensor, factor: Tensor) -> Tensor:
    """x, with its gradient times a factor."""
    result: Tensor = _ScaleGradient.apply(x, factor)
    return result


def significant(x: Tensor, bits: int) -> Tensor:
    """float64 x rounded to so many significant bits, to nearest even."""
    drop = 53 - bits
    i = x.view(torch.int64)
    i = i + ((1 << (drop - 1)) - 1) + ((i >> drop) & 1)
    return (i & -(1 << drop)).view(torch.float64)


class RoundedWeight(Function):
    """clamp(rne(w * factor), -127, 127) as float32, w [C, ...] of any type, factor [C] float64.

    Weights that round to the largest level are inside of the range.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(weight, factor)
        q = _round_(weight * _per_row(factor, weight)).clamp_(-127, 127).float()
        return q.contiguous(memory_format=torch.channels_last) if q.ndim == 4 else q

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        weight, factor = ctx.saved_tensors
        factor = _per_row(factor, weight).to(weight.dtype)
        inside = torch.ops.aten.hardtanh_backward(
            grad.to(weight.dtype), weight * factor, -127.5, 127.5
        )
        axes = tuple(range(1, weight.ndim))
        of_factor = (inside * weight).sum(axes).double() if ctx.needs_input_grad[1] else None
        return inside.mul_(factor) if ctx.needs_input_grad[0] else None, of_factor


@dataclass(frozen=True)
class Range:
    """Of a map's levels less their zero point; what is outside is cut off."""

    lo: float
    hi: float

    def round(self, v: Tensor, inplace: bool) -> Tensor:
        """The levels of v; the engine's clamp to int16 before is part of the one here."""
        y = _round_(v) if inplace else v.round()
        return y.clamp_(self.lo, self.hi)

    def backward(self, grad: Tensor, v: Tensor) -> Tensor:
        """The gradient of v."""
        return torch.ops.aten.hardtanh_backward(grad, v, self.lo, self.hi)


@dataclass(frozen=True)
class Shape:
    """Of a convolution; `exact`: its sums may be 2^24 or more, and are formed in float64."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    groups: int = 1
    exact: bool = False

    def sums(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The integer sums as float32, rounded once at most."""
        args = (self.stride, self.padding, 1, self.groups)
        if not self.exact:
            return F.conv2d(x, weight, bias, *args)
        wide = None if bias is None else bias.double()
        return F.conv2d(x.double(), weight.double(), wide, *args).float()


class Convolution(Function):
    """A convolution, then a multiplier and a bias for each channel, and the rest of its node.

        p = (sums + bias) * multiplier, or of a batch norm over the batch's statistics, with `eps`,
        p = (sums - mean) / sqrt(var + eps) * multiplier + bias
        v = p, (p * relu6(p + 3)) * k (hard-swish) or p + other * ratio
        y = clamp(rne(v), lo, hi)

    Returns y, and mean and variance of the sums, [C], or nothing for them. The zero point has the
    gradient of what is cut off.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [N, C_in, H, W]
        weight: Tensor,  # [C, C_in / groups, kh, kw]
        multiplier: Tensor,  # float32 [C], positive
        bias: Tensor,  # float32 [C]; without eps integers
        k: Tensor | None,  # float32 []
        other: Tensor | None,  # as y
        ratio: Tensor | None,  # float32 []
        ratio_value: float,  # the same
        zero_point: Tensor,  # float64 []
        span: Range,
        shape: Shape,
        eps: Tensor | None = None,  # float32 [C]
    ) -> tuple[Tensor, Tensor, Tensor]:
        factor, mean, var = multiplier, x.new_empty(0), x.new_empty(0)
        if eps is None:
            p = shape.sums(x, weight, bias).mul_(_per_channel(multiplier))
        else:
            p = shape.sums(x, weight, None)
            mean, var = torch.ops.aten.batch_norm_update_stats(p, None, None, 0.0)
            factor = multiplier * (var + eps).rsqrt()
            p.mul_(_per_channel(factor)).add_(_per_channel(bias - mean * factor))
        v = p
        if k is not None:
            v = (p + 3).clamp_(0, 6).mul_(p).mul_(k)
        elif other is not None:
            # the product is exact, so that one rounding or two are the same
            v.add_(other, alpha=ratio_value)
        learns = any(ctx.needs_input_grad)
        if learns:
            parts = (x, weight, multiplier, bias, factor, v)
            more = (p if k is not None else None, k, other, ratio)
            ctx.save_for_backward(*parts, *more)
            ctx.span, ctx.shape, ctx.live = span, shape, eps is not None
        ctx.mark_non_differentiable(mean, var)
        return span.round(v, inplace=not learns), mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, multiplier, bias, factor, v, p, k, other, ratio = ctx.saved_tensors
        needs, shape = ctx.needs_input_grad, ctx.shape
        grad = _like(grad, v)
        inner = ctx.span.backward(grad, v)
        of_zero = (inner.sum() - grad.sum()).double() if needs[8] else None
        of_k = of_other = of_ratio = None
        if k is not None:
            of_k = _dot(inner, v) / k
            torch.ops.aten.hardswish_backward.out(inner, p, out=inner)
            inner.mul_(6 * k)
        else:
            p = v
        products, total = _channel_sums(inner, p)
        if other is not None:
            of_other = inner * ratio if needs[5] else None
            others = _channel_sums(inner, other)[0]
            of_ratio, products = others.sum(), products - ratio * others
        if ctx.live:
            # the gradient of a batch norm, (p - bias) / multiplier being what it normalised
            count = inner.numel() / len(total)
            of_multiplier, of_bias = (products - bias * total) / multiplier, total
            # of a channel that is all but constant nothing is left of the difference
            alive = multiplier > bias.abs() * 2.0**-12
            of_multiplier = of_multiplier.where(alive, 0)
            slope = -factor * of_multiplier / (count * multiplier)
            inner.mul_(_per_channel(factor))
            inner.add_(_per_channel(-factor * total / count - slope * bias))
            inner.addcmul_(p, _per_channel(slope))
            if other is not None:
                inner.addcmul_(other, _per_channel(-slope * ratio))
        else:
            of_multiplier, of_bias = products / multiplier, total * multiplier
            inner.mul_(_per_channel(multiplier))
        of_x, of_weight, _ = torch.ops.aten.convolution_backward(
            inner, x, weight, None, shape.stride, shape.padding, (1, 1), False, (0, 0),
            shape.groups, (needs[0], needs[1], False),
        )  # fmt: skip
        grads = (of_x, of_weight, of_multiplier, of_bias, of_k, of_other, of_ratio, None, of_zero)
        return (*grads, None, None, None)


class Rounded(Function):
    """clamp(rne(v), lo, hi); the zero point has the gradient of what is cut off."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, zero_point: Tensor, span: Range) -> Tensor:
        ctx.save_for_backward(v)
        ctx.span = span
        return span.round(v, inplace=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (v,) = ctx.saved_tensors
        inner = ctx.span.backward(grad, v)
        of_zero = (inner.sum() - grad.sum()).double() if ctx.needs_input_grad[1] else None
        return inner, of_zero, None


class Gated(Function):
    """clamp(rne(x * gate), lo, hi), x [N, C, H, W], gate [N, C]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, zero_point: Tensor, span: Range) -> Tensor:
        v = x * gate[:, :, None, None]
        ctx.save_for_backward(x, gate, v)
        ctx.span = span
        return span.round(v, inplace=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, v = ctx.saved_tensors
        inner = ctx.span.backward(_like(grad, v), v)
        of_zero = (inner.sum() - grad.sum()).double() if ctx.needs_input_grad[2] else None
        of_gate = (inner * x).sum((2, 3))
        return inner.mul_(gate[:, :, None, None]), of_gate, of_zero, None


class OrderedLinear(Function):
    """bias + x weight, [N, C] x [C, J], one product and one addition after the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        h = bias.repeat(len(x)).view(1, -1)
        means = x.T.contiguous()
        for part, rows in zip(means.split(_PRODUCTS), weight.split(_PRODUCTS), strict=True):
            products = (part[:, :, None] * rows[:, None]).view(len(rows), -1)
            # adds one row after the other
            h.index_add_(0, torch.zeros(len(rows), dtype=torch.int64, device=h.device), products)
        return h.view(len(x), -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad @ weight.T, x.T @ grad, grad.sum(0)


def _round_(x: Tensor) -> Tensor:
    return x.round_()


def _per_row(factor: Tensor, weight: Tensor) -> Tensor:
    return factor.view(-1, *[1] * (weight.ndim - 1))


def _per_channel(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1)


def _like(grad: Tensor, v: Tensor) -> Tensor:
    """The gradient in v's memory format, in which all passes are linear."""
    if grad.stride() == v.stride():
        return grad
    return torch.empty_like(v).copy_(grad)


def _flat(x: Tensor) -> Tensor:
    """A view of all elements in the order of memory."""
    return x.view(-1) if x.is_contiguous() else x.permute(0, 2, 3, 1).reshape(-1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(_flat(a), _flat(b))


def _channel_sums(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of grad * x and of grad, [C]: those of a batch norm's weight and bias, in one pass."""
    one, zero = grad.new_ones(grad.shape[1]), grad.new_zeros(grad.shape[1])
    _, products, total = torch.ops.aten.native_batch_norm_backward(
        grad, x, one, zero, one, zero, one, False, 0.0, (False, True, True)
    )
    return products, total
