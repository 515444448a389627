"""attention_map_loss: divergences of softmax(q_s k_s^T) from softmax(q_t k_t^T), row by row."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .kd import MEAN, NONE, _accumulator

KL, REVERSE_KL, JS, MSE = 0, 1, 2, 3  # values of the `kind` option


class AttentionMapOptions(NamedTuple):
    """The arguments of the operations behind the tensors, in the schema's order."""

    scale_s: float
    scale_t: float
    temperature: float
    kind: int
    reduction: int
    key_mask: Tensor | None = None  # bool [batch, keys], True = keep
    allow_tf32: bool = False


def _softmaxed(
    q: Tensor, k: Tensor, factor: float, key_mask: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """log softmax of the scores, [batch, heads, queries, keys], and its log-sum-exp.

    Masked keys have 0, so that it can be multiplied by a probability of 0; a row without keys too.
    """
    scores = (q.to(dtype) @ k.to(dtype).mT) * factor
    if key_mask is None:
        return scores.log_softmax(-1), scores.logsumexp(-1)
    keep = key_mask[:, None, None, :]
    scores = scores.masked_fill(~keep, -torch.inf)
    lse = scores.logsumexp(-1)
    lse = torch.where(key_mask.any(-1)[:, None, None], lse, torch.zeros_like(lse))
    return scores.log_softmax(-1).masked_fill(~keep, 0), lse


def _terms(log_p: Tensor, log_q: Tensor, keep: Tensor | float, kind: int) -> tuple[Tensor, Tensor]:
    """Each key's part of the divergence, and w: its gradient in the score is w - q * sum(w)."""
    p, q = log_p.exp() * keep, log_q.exp() * keep
    if kind == KL:
        return p * (log_p - log_q), q - p
    if kind == REVERSE_KL:
        terms = q * (log_q - log_p)
        return terms, terms
    if kind == JS:
        # log(q / m) with m = (p + q) / 2, and log(p / m), exactly 0 where they are equal
        apart, none = log_p - log_q, torch.zeros_like(p)
        log_2 = torch.logaddexp(none, none)
        w = 0.5 * q * (log_2 - torch.logaddexp(none, apart))
        return 0.5 * p * (log_2 - torch.logaddexp(none, -apart)) + w, w
    return (p - q).square(), 2 * q * (q - p)


def attention_map_fwd(
    q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    """T^2 * the divergence of the attentions, reduced, and [3, batch, heads, queries] statistics.

    Attention is softmax(q k^T * scale / T) over the keys that the mask keeps. A row without keys
    gives 0, and so does a mean over no rows. The statistics, from which backward works, are the
    log-sum-exps of the student's and of the teacher's scores, and sum(w) of `_terms`, 0 for kl.
    """
    o = AttentionMapOptions(*options)
    dtype = _accumulator(q_s)
    log_q, lse_s = _softmaxed(q_s, k_s, o.scale_s / o.temperature, o.key_mask, dtype)
    log_p, lse_t = _softmaxed(q_t, k_t, o.scale_t / o.temperature, o.key_mask, dtype)
    keep = 1.0 if o.key_mask is None else o.key_mask[:, None, None, :].to(dtype)
    terms, w = _terms(log_p, log_q, keep, o.kind)
    rows = o.temperature**2 * terms.sum(-1)
    centre = torch.zeros_like(lse_s) if o.kind == KL else w.sum(-1)
    stats = torch.stack([lse_s, lse_t, centre])
    if o.reduction == NONE:
        return rows, stats
    return rows.sum() / (max(rows.numel(), 1) if o.reduction == MEAN else 1), stats


def attention_map_bwd(
    grad_loss: Tensor, q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, stats: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of q_s and k_s; grad_loss is 0-dim, or [batch, heads, queries] for "none"."""
    o = AttentionMapOptions(*options)
    dtype = _accumulator(q_s)
    log_q, _ = _softmaxed(q_s, k_s, o.scale_s / o.temperature, o.key_mask, dtype)
    log_p, _ = _softmaxed(q_t, k_t, o.scale_t / o.temperature, o.key_mask, dtype)
    keep = 1.0 if o.key_mask is None else o.key_mask[:, None, None, :].to(dtype)
    _, w = _terms(log_p, log_q, keep, o.kind)
    # d score / d (q . k) = scale / T, which takes one T of T^2
    share = grad_loss.to(dtype) * (o.temperature * o.scale_s)
    if o.reduction == MEAN:
        share = share / max(stats[0].numel(), 1)
    d_scores = (w - log_q.exp() * keep * stats[2].unsqueeze(-1)) * share.unsqueeze(-1)
    d_q, d_k = torch.empty_like(q_s), torch.empty_like(k_s)  # with the strides they promise
    d_q.copy_(d_scores @ k_s.to(dtype))
    d_k.copy_(d_scores.mT @ q_s.to(dtype))
    return d_q, d_k


def attention_map_fwd_grad(
    q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, reduced to one number, and its gradients in q_s and k_s."""
    loss, stats = attention_map_fwd(q_s, k_s, q_t, k_t, *options)
    d_q, d_k = attention_map_bwd(torch.ones_like(loss), q_s, k_s, q_t, k_t, stats, *options)
    return loss, d_q, d_k
