"""Divergences of softmaxes, row by row: KL, reverse KL, Jensen-Shannon, total variation, DKD, OFA.

With u = s/T and v = t/T, standardised or not, q = softmax(u) and p = softmax(v), a row's loss is
T^2 sum_i term_i, and its gradient in u is w_i - q_i sum(w) with w_i = q_i d term/d q_i:

    kind        term                                                w
    kl          p (log p - log q)                                   -p
    reverse_kl  q (log q - log p)                                   q (log q - log p)
    js          b p log(p/m) + (1-b) q log(q/m), m = b p + (1-b) q  (1-b) q log(q/m)
    tv          |q - p| / 2                                         q sign(q - p) / 2
    ofa         -c log q, c = (p + y)^b - y                         -c
    dkd         a KL([p_y, 1-p_y] || [q_y, 1-q_y]) + b KL(p' || q'), p' and q' without class y
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import kd
from .kd import NONE

DIVERGENCES = {"kl": 0, "reverse_kl": 1, "js": 2, "tv": 3, "dkd": 4, "ofa": 5}
_KL, _REVERSE_KL, _JS, _TV, _DKD, _OFA = DIVERGENCES.values()
STANDARDIZE_EPS = 1e-7


class RowLossOptions(NamedTuple):
    """The arguments of the operations behind the tensors, in the schema's order.

    Those of `KDOptions`, and: `divergence`, a value of DIVERGENCES; `alpha` of dkd; `beta` of dkd
    and js, for ofa the exponent; `standardize`: logits become (x - mean) / (std + 1e-7) first;
    `wants_temperature`: the gradients in the rows' temperatures are asked for.
    """

    divergence: int
    temperature: float
    kd_weight: float
    class_dim: int
    reduction: int
    labels: Tensor | None = None
    labels_b: Tensor | None = None
    lam_rows: Tensor | None = None
    temperature_rows: Tensor | None = None
    row_weights: Tensor | None = None
    lam: float = 1.0
    ce_weight: float = 0.0
    label_smoothing: float = 0.0
    ignore_index: int = -100
    alpha: float = 1.0
    beta: float = 1.0
    standardize: bool = False
    wants_temperature: bool = False


class _Scaled(NamedTuple):
    """Logits of rows, [*rows, classes], and what they are divided by, [*rows, 1]."""

    u: Tensor
    by: Tensor
    centred: Tensor  # x - mean where it is standardised
    std: Tensor


def _scaled(x: Tensor, temperature: Tensor, standardize: bool) -> _Scaled:
    if not standardize:
        return _Scaled(x / temperature, temperature, x, torch.ones_like(temperature))
    centred = x - x.mean(-1, keepdim=True)
    std = (centred.square().sum(-1, keepdim=True) / (x.shape[-1] - 1)).sqrt()
    by = temperature * (std + STANDARDIZE_EPS)
    return _Scaled(centred / by, by, centred, std)


def _product(weight: Tensor, factor: Tensor) -> Tensor:
    """weight * factor, 0 where the weight is."""
    return torch.where(weight == 0, torch.zeros_like(weight), weight * factor)


def _kl_terms(log_q: Tensor, log_p: Tensor) -> Tensor:
    """p (log p - log q): 0 where p is masked, inf where only q is, even if p has underflowed."""
    terms = log_p.exp() * (log_p - log_q)
    terms = torch.where(torch.isneginf(log_q), torch.full_like(terms, torch.inf), terms)
    return torch.where(torch.isneginf(log_p), torch.zeros_like(terms), terms)


class _Row(NamedTuple):
    """loss [*rows]; d loss/du and d loss/dv [*rows, classes]."""

    loss: Tensor
    d_u: Tensor
    d_v: Tensor


def _divergence(o: RowLossOptions, u: Tensor, v: Tensor) -> _Row:
    log_q, log_p = u.log_softmax(-1), v.log_softmax(-1)
    q, p = log_q.exp(), log_p.exp()
    if o.divergence == _DKD:
        return _dkd(o, u, v, q, p)
    w_p = torch.zeros_like(p)  # p d term/d p, as w is in q
    if o.divergence == _KL:
        terms, w = _kl_terms(log_q, log_p), -p
        w_p = terms
    elif o.divergence == _REVERSE_KL:
        terms = _kl_terms(log_p, log_q)
        w, w_p = terms, -q
    elif o.divergence == _JS:
        # beside the larger of both, so that equal ones are exactly their mean
        of_p, of_q = (log_q.new_full((), b) for b in (o.beta, 1 - o.beta))
        apart = log_q - log_p
        smaller = torch.where(apart > 0, of_p, of_q)  # its weight
        log_m = torch.log1p(smaller * torch.expm1(-apart.abs()))  # relative to the larger
        w = _product((1 - o.beta) * q, apart.clamp(max=0) - log_m)
        w_p = _product(o.beta * p, (-apart).clamp(max=0) - log_m)
        terms = w + w_p
    elif o.divergence == _TV:
        apart = q - p
        terms = apart.abs() / 2
        sign = torch.where(apart.isnan(), apart, apart.sign())
        w, w_p = q * sign / 2, p * -sign / 2
    else:
        assert o.labels is not None
        y = _one_hot(o.labels, p)
        c = (p + y) ** o.beta - y
        terms, w = _product(c, -log_q), -c
        w_p = _product(o.beta * p * (p + y) ** (o.beta - 1), -log_q)
    # where w sums to -1, the difference: 0 where q and p are equal
    d_u = q - p if o.divergence == _KL else w - q * w.sum(-1, keepdim=True)
    d_v = p - q if o.divergence == _REVERSE_KL else w_p - p * w_p.sum(-1, keepdim=True)
    return _Row(terms.sum(-1), d_u, d_v)


def _one_hot(labels: Tensor, like: Tensor) -> Tensor:
    classes = torch.arange(like.shape[-1], device=like.device)
    return (labels.unsqueeze(-1) == classes).to(like.dtype)


def _dkd(o: RowLossOptions, u: Tensor, v: Tensor, q: Tensor, p: Tensor) -> _Row:
    assert o.labels is not None
    y = _one_hot(o.labels, q)
    others = y == 0
    # logits of the label against all others: q_y = sigmoid(z)
    away_u, away_v = (x.masked_fill(~others, -torch.inf) for x in (u, v))
    z_s = _product(y, u).sum(-1, keepdim=True) - away_u.logsumexp(-1, keepdim=True)
    z_t = _product(y, v).sum(-1, keepdim=True) - away_v.logsumexp(-1, keepdim=True)
    log = torch.nn.functional.logsigmoid
    q_y, p_y = z_s.sigmoid(), z_t.sigmoid()
    target = _product(p_y, log(z_t) - log(z_s)) + _product((-z_t).sigmoid(), log(-z_t) - log(-z_s))
    log_q, log_p = away_u.log_softmax(-1), away_v.log_softmax(-1)
    q_away, p_away = log_q.exp(), log_p.exp()
    terms = _kl_terms(log_q, log_p)
    loss = o.alpha * target + o.beta * terms.sum(-1, keepdim=True)
    d_z_s = o.alpha * (q_y - p_y)
    d_z_t = o.alpha * _product(p_y * (-z_t).sigmoid(), z_t - z_s)
    d_u = y * d_z_s - q_away * d_z_s + o.beta * (q_away - p_away)
    kl = terms.sum(-1, keepdim=True)
    d_v = y * d_z_t - p_away * d_z_t + o.beta * (terms - p_away * kl)
    return _Row(loss.squeeze(-1), d_u, d_v)


def _shares(o: RowLossOptions, like: Tensor) -> Tensor:
    return kd._shares(_kd_options(o), like)


def _kd_options(o: RowLossOptions, **changed: Any) -> kd.KDOptions:
    """The same rows, labels and weights for kd's operations."""
    return kd.KDOptions(**{name: getattr(o, name) for name in kd.KDOptions._fields} | changed)


def _rows(
    student: Tensor, teacher: Tensor, o: RowLossOptions
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each row: loss [*rows], gradient [*rows, classes], d loss/dT [*rows], share [*rows]."""
    s, t = kd._last(student, o.class_dim), kd._last(teacher, o.class_dim)
    temperature = kd._row_values(o.temperature_rows, o.temperature, s).unsqueeze(-1)
    scaled, target = (_scaled(x, temperature, o.standardize) for x in (s, t))
    loss, grad = s.new_zeros(s.shape[:-1]), torch.zeros_like(s)
    d_temperature = torch.zeros_like(loss)
    if o.kd_weight != 0:
        row = _divergence(o, scaled.u, target.u)
        square = temperature * temperature
        weight = o.kd_weight * square
        loss = weight.squeeze(-1) * row.loss
        grad = weight * row.d_u / scaled.by
        if o.standardize:
            along = (row.d_u * scaled.centred).sum(-1, keepdim=True)
            slope = weight * along / (scaled.by * (scaled.std + STANDARDIZE_EPS))
            grad = grad - _product(scaled.centred, slope / ((s.shape[-1] - 1) * scaled.std))
        if o.wants_temperature:
            moved = _product(row.d_u, scaled.u) + _product(row.d_v, target.u)
            d_temperature = 2 * loss / temperature.squeeze(-1) - o.kd_weight * (
                temperature.squeeze(-1) * moved.sum(-1)
            )
    if o.ce_weight != 0:
        y = kd._target(_kd_options(o), s)
        terms = _product(y, -s.log_softmax(-1))
        loss = loss + o.ce_weight * terms.sum(-1)
        grad = grad + o.ce_weight * (s.softmax(-1) - y)
    return loss, grad, d_temperature, _shares(o, s)


def _weighted(share: Tensor, x: Tensor) -> Tensor:
    return torch.where(share == 0, torch.zeros_like(x), share * x)


def row_loss_fwd(student: Tensor, teacher: Tensor, *options: Any) -> Tensor:
    """The reduced loss."""
    o = RowLossOptions(*options)
    loss, _, _, share = _rows(student, teacher, o)
    rows = _weighted(share, loss)
    return rows if o.reduction == NONE else rows.sum()


def row_loss_bwd(
    grad_loss: Tensor, student: Tensor, teacher: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    """The gradient, like the student, and the one in each row's temperature, [*rows] or [0]."""
    o = RowLossOptions(*options)
    _, grad, d_temperature, share = _rows(student, teacher, o)
    by = grad_loss.to(share.dtype).expand(share.shape)
    grad = _weighted((share * by).unsqueeze(-1), grad)
    grad = torch.empty_like(student).copy_(grad.movedim(-1, o.class_dim))
    if not o.wants_temperature:
        return grad, share.new_empty(0)
    return grad, _weighted(share * by, d_temperature)


def row_loss_fwd_grad(
    student: Tensor, teacher: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The reduced loss, and the gradients of its sum: see row_loss_bwd."""
    loss = row_loss_fwd(student, teacher, *options)
    return loss, *row_loss_bwd(torch.ones_like(loss), student, teacher, *options)
