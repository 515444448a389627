"""attention_map_loss: the teacher's attention as the student's target, without an attention map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ._common import (
    REDUCTIONS,
    check_choice,
    check_derivatives,
    check_device,
    check_floating,
    check_numbers,
    check_tensors,
    constant_when_compiled,
    differentiable_once,
)

_fwd = torch.ops.vitkd_fast.attention_map_fwd.default
_fwd_grad = torch.ops.vitkd_fast.attention_map_fwd_grad.default
_bwd = torch.ops.vitkd_fast.attention_map_bwd.default
_scale_ = torch.ops.vitkd_fast.kd_scale_.default

_KINDS = {
    "kl": reference.KL,
    "reverse_kl": reference.REVERSE_KL,
    "js": reference.JS,
    "mse": reference.MSE,
}


@constant_when_compiled
def _tf32() -> bool:
    """Whether products of float32 matrices may be TF32; whichever of torch's two ways says so."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


class _InForward(torch.autograd.Function):
    """Scores are formed once, and both gradients from them in the forward: 4 products, not 6."""

    @staticmethod
    def forward(
        ctx: Any, q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, options: tuple
    ) -> Tensor:
        loss, *ctx.grads = _fwd_grad(q_s, k_s, q_t, k_t, *options)
        ctx.save_for_backward(q_s, k_s)
        ctx.constants = q_t, k_t, options
        return loss

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        # handed over, not shared: they are scaled in place and then belong to the caller
        grads, ctx.grads = ctx.grads, None
        if grads is None:  # a second backward, after retain_graph=True
            q_t, k_t, options = ctx.constants
            _, *grads = _fwd_grad(*ctx.saved_tensors, q_t, k_t, *options)
        for grad in grads:
            _scale_(grad, grad_loss)
        return *grads, None, None, None


class _InBackward(torch.autograd.Function):
    """Gradients from the scores, formed again, and three numbers per row."""

    @staticmethod
    def forward(
        ctx: Any, q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, *options: Any
    ) -> Tensor:
        loss, stats = _fwd(q_s, k_s, q_t, k_t, *options)
        ctx.save_for_backward(q_s, k_s, stats)
        ctx.constants = q_t, k_t, options
        return loss

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        q_s, k_s, stats = ctx.saved_tensors
        q_t, k_t, options = ctx.constants
        grads = _bwd(grad_loss, q_s, k_s, q_t, k_t, stats, *options)
        return *grads, *[None] * (2 + len(options))


def check_maps(name: str, given: dict[str, Tensor]) -> None:
    """Each argument by itself; the first is a student's."""
    wide = any(x.dtype == torch.float64 for x in given.values())
    check_derivatives(name, given, {"q_t", "k_t", "x_t"}, forward_mode=wide)
    check_floating(name, given)
    for argument, x in given.items():
        if x.dim() != 4:
            raise ValueError(
                f"{name}: {argument}: expected [batch, heads, tokens, dim], got {list(x.shape)}"
            )
        if (x.shape[2] == 0 and argument[0] != "q") or x.shape[3] == 0:
            raise ValueError(
                f"{name}: {argument}: expected 1 token and 1 dim at least, got {list(x.shape)}"
            )


def _check_pairs(name: str, q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor) -> None:
    given = {"q_s": q_s, "k_s": k_s, "q_t": q_t, "k_t": k_t}
    check_tensors(name, given)
    check_maps(name, given)
    for a, b, dims in (
        ("q_s", "k_s", {0: "batch", 1: "heads", 3: "dim"}),
        ("q_t", "k_t", {0: "batch", 1: "heads", 3: "dim"}),
        ("q_s", "q_t", {0: "batch", 1: "heads", 2: "tokens"}),
        ("k_s", "k_t", {2: "tokens"}),
    ):
        x, y = given[a], given[b]
        for dim, what in dims.items():
            if x.shape[dim] != y.shape[dim]:
                raise ValueError(
                    f"{name}: {b}: expected the {what} of {a} {list(x.shape)}, got {list(y.shape)}"
                )
        if 3 in dims and x.dtype != y.dtype:
            raise TypeError(f"{name}: {b}: expected the dtype of {a}, {x.dtype}, got {y.dtype}")


def attention_map_loss(
    q_s: Tensor,
    k_s: Tensor,
    q_t: Tensor,
    k_t: Tensor,
    *,
    scale_s: float | None = None,
    scale_t: float | None = None,
    temperature: float = 1.0,
    kind: str = "kl",
    key_mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """T^2 * KL(softmax(q_t k_t^T scale_t / T) || softmax(q_s k_s^T scale_s / T)), mean over rows.

    Makes a student attend where its teacher does (MiniLM: Wang et al., 2020, arXiv:2002.10957; from
    a transformer to a CNN: Liu et al., 2022, arXiv:2207.05273). Scores are formed tile by tile and
    never stored (but in float64): memory grows with tokens * dim, not with tokens^2. The teacher's
    tensors are constants: one that requires grad is an error, unless under torch.no_grad(). They
    may be inference-mode tensors, and must keep their values until the backward has run. The loss
    is differentiable once, in reverse mode (in float64, as often as wanted, and in forward mode).

    Args:
        q_s: the student's queries, [batch, heads, tokens, dim], float32, float16, bfloat16 or
            float64. Their gradient has their dtype; arithmetic is float32 (float64 for float64,
            computed by the unfused reference).
        k_s: the student's keys, [batch, heads, keys, dim], usually as many as queries.
        q_t: the teacher's queries; their dim may be another than the student's.
        k_t: the teacher's keys.
        scale_s: multiplies the student's scores; dim_s ** -0.5 unless given.
        scale_t: multiplies the teacher's scores; dim_t ** -0.5 unless given.
        temperature: T > 0, divides the scores of both.
        kind: "kl" (teacher || student), "reverse_kl" (student || teacher), "js" (Jensen-Shannon:
            half of each one's divergence from their mean), or "mse" (the squared difference of the
            two maps, summed over keys).
        key_mask: bool [batch, keys], True = keep. Other keys are left out of both softmaxes; they
            must be numbers all the same, as 0 times NaN is NaN.
        reduction: "mean" over batch * heads * queries, "sum", or "none".

    Returns:
        The loss, float32 (float64 for float64): 0-dim, or [batch, heads, queries] for "none". An
        empty batch gives 0. A row that the mask leaves without keys gives 0 on the GPU.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was given; a teacher
            that requires grad.
        RuntimeError: a row that the mask leaves without keys, on the CPU; a second derivative, or
            one in forward mode.
    """
    _check_pairs("attention_map_loss", q_s, k_s, q_t, k_t)
    return loss_of_maps(
        "attention_map_loss", q_s, k_s, q_t, k_t, scale_s, scale_t, temperature, kind, key_mask,
        reduction,
    )  # fmt: skip


def _expect_keys(name: str, key_mask: Tensor) -> None:
    """What the CPU's kernel finds out for itself."""
    for i in (~key_mask.any(-1)).nonzero().flatten().tolist():
        raise RuntimeError(f"{name}: key_mask keeps no key of batch element {i}")


def loss_of_maps(
    name: str,
    q_s: Tensor,
    k_s: Tensor,
    q_t: Tensor,
    k_t: Tensor,
    scale_s: float | None,
    scale_t: float | None,
    temperature: float,
    kind: str,
    key_mask: Tensor | None,
    reduction: str,
) -> Tensor:
    check_numbers(name, {"scale_s": scale_s, "scale_t": scale_t, "temperature": temperature})
    if key_mask is not None:
        check_tensors(name, {"key_mask": key_mask})
    check_choice(name, "kind", kind, _KINDS)
    check_choice(name, "reduction", reduction, REDUCTIONS)
    if not 0 < temperature < float("inf"):
        raise ValueError(f"{name}: temperature: expected a number > 0, got {temperature}")
    if key_mask is not None:
        shape = [k_s.shape[0], k_s.shape[2]]
        if key_mask.dtype != torch.bool or list(key_mask.shape) != shape:
            raise ValueError(
                f"{name}: key_mask: expected torch.bool, one per key, {shape}, got "
                f"{key_mask.dtype} {list(key_mask.shape)}"
            )
        check_device(name, "key_mask", key_mask, "the student", q_s)
    scale_s = q_s.shape[3] ** -0.5 if scale_s is None else scale_s
    scale_t = q_t.shape[3] ** -0.5 if scale_t is None else scale_t
    options = reference.AttentionMapOptions(
        scale_s, scale_t, temperature, _KINDS[kind], REDUCTIONS[reduction], key_mask,
        q_s.is_cuda and _tf32(),
    )  # fmt: skip
    # torch.compile allows no argument twice
    k_s = k_s.view_as(k_s) if k_s is q_s else k_s
    k_t = k_t.view_as(k_t) if k_t is q_t else k_t
    if torch.float64 in (q_s.dtype, q_t.dtype):
        if key_mask is not None and key_mask.is_cpu and not torch.compiler.is_compiling():
            _expect_keys(name, key_mask)
        q_s, k_s, q_t, k_t = (x.double() for x in (q_s, k_s, q_t, k_t))
        return reference.attention_map_fwd(q_s, k_s, q_t, k_t, *options)[0]
    if not ((q_s.requires_grad or k_s.requires_grad) and torch.is_grad_enabled()):
        return _fwd(q_s, k_s, q_t, k_t, *options)[0]
    # float16: the incoming gradient, with its loss scale, is applied before the rounding.
    # a compiled graph keeps its inputs anyway, and allows no in-place operation
    late = q_s.dtype is torch.float16 or reduction == "none" or torch.compiler.is_compiling()
    if late:
        return _InBackward.apply(q_s, k_s, q_t, k_t, *options)
    return _InForward.apply(q_s, k_s, q_t, k_t, options)
