"""kd_loss_topk: a teacher of K classes per row, made dense."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .kd import NONE, KDOptions, _accumulator, _row_values, _shares, _target

TAIL_SMOOTH, TAIL_ZERO, TAIL_RENORM, TAIL_BIN = 0, 1, 2, 3  # values of `tail`


class KDTopKOptions(NamedTuple):
    """The arguments of the operations behind the tensors, in the schema's order.

    Classes are the student's last dimension. `temperature` and `lam` hold for all rows, unless a
    tensor brings one per row.
    """

    temperature: float
    kd_weight: float
    tail: int
    reduction: int
    log_sum_exp: Tensor | None = None
    labels: Tensor | None = None
    labels_b: Tensor | None = None
    lam_rows: Tensor | None = None
    temperature_rows: Tensor | None = None
    row_weights: Tensor | None = None
    lam: float = 1.0
    ce_weight: float = 0.0
    label_smoothing: float = 0.0
    ignore_index: int = -100

    def of_rows(self) -> KDOptions:
        """kd_loss's, of which there are only those of the rows."""
        given = self._asdict()
        return KDOptions(class_dim=-1, **{k: given[k] for k in KDOptions._fields if k in given})


class _Teacher(NamedTuple):
    """What a row's teacher is."""

    log_p: Tensor  # [*rows, K]
    p: Tensor
    rest: Tensor  # [*rows, 1]: of the other classes, together
    others: Tensor  # [*rows, V]: which these are


def _teacher(student: Tensor, indices: Tensor, values: Tensor, o: KDTopKOptions) -> _Teacher:
    """log p = values / T - log_sum_exp, or log values; 1 - sum p is the others'.

    All is divided by sum p where that is more than 1, of the teacher's rounding, and where nothing
    is left to others: for "renorm", and K = V.
    """
    wide = torch.float64  # large logits and their log-sum-exp cancel
    indices = indices.long()
    others = torch.ones_like(student, dtype=torch.bool).scatter(-1, indices, False)
    whole = o.tail == TAIL_RENORM or indices.shape[-1] == student.shape[-1]
    if o.log_sum_exp is None:
        log_p = values.to(wide).log()
    else:
        temp = _row_values(o.temperature_rows, o.temperature, student.to(wide)).unsqueeze(-1)
        log_p = values.to(wide) / temp - o.log_sum_exp.to(wide).unsqueeze(-1)
    log_sum = log_p.logsumexp(-1, keepdim=True)
    log_p = log_p - (log_sum if whole else log_sum.clamp(min=0))
    p = log_p.exp()
    rest = 1 - p.sum(-1, keepdim=True)
    rest = torch.zeros_like(rest) if whole or o.tail == TAIL_ZERO else rest.clamp(min=0)
    return _Teacher(log_p.to(student), p.to(student), rest.to(student), others)


def _terms(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """p (log p - log q): 0 where p is masked, +inf where only q is."""
    terms = p * (log_p - log_q)
    terms = torch.where(torch.isneginf(log_q), torch.full_like(terms, torch.inf), terms)
    return torch.where(torch.isneginf(log_p), torch.zeros_like(terms), terms)


def _log_rest(u: Tensor, others: Tensor) -> Tensor:
    """The log-sum-exp of the other classes, [*rows, 1]."""
    return u.masked_fill(~others, -torch.inf).logsumexp(-1, keepdim=True)


def _rows(student: Tensor, indices: Tensor, values: Tensor, o: KDTopKOptions) -> Tensor:
    """kd_weight * T^2 * KL(p || q) + ce_weight * -sum y log q1 of each row, [*rows]."""
    s = student.to(_accumulator(student))
    temp = _row_values(o.temperature_rows, o.temperature, s)
    loss = s.new_zeros(s.shape[:-1])
    if o.kd_weight != 0:
        t = _teacher(s, indices, values, o)
        u = s / temp.unsqueeze(-1)
        log_q = torch.log_softmax(u, -1)
        kl = _terms(t.p, t.log_p, log_q.gather(-1, indices.long())).sum(-1)
        if o.tail == TAIL_BIN:
            log_r = _log_rest(u, t.others) - torch.logsumexp(u, -1, keepdim=True)
            kl = kl + _terms(t.rest, t.rest.log(), log_r).squeeze(-1)
        else:
            share = t.rest / t.others.sum(-1, keepdim=True).clamp(min=1)
            share = torch.where(t.others, share, torch.zeros_like(share))
            kl = kl + _terms(share, share.log(), log_q).sum(-1)
        loss = loss + o.kd_weight * temp * temp * kl
    if o.ce_weight != 0:
        y = _target(o.of_rows(), s)
        terms = torch.where(y == 0, torch.zeros_like(y), -y * torch.log_softmax(s, -1))
        loss = loss + o.ce_weight * terms.sum(-1)
    return loss


def kd_topk_fwd(
    student: Tensor, indices: Tensor, values: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    """The reduced loss, and the [6, rows] numbers from which backward forms the gradient.

    These are max s, the others' max s, log sum exp((s - max s)/T), that of the others with their
    own maximum, the first again at T = 1, and the row's share of the loss.
    """
    o = KDTopKOptions(*options)
    s = student.to(_accumulator(student))
    share = _shares(o.of_rows(), s)
    rows = _rows(student, indices, values, o)
    rows = torch.where(share == 0, torch.zeros_like(rows), share * rows)
    temp = _row_values(o.temperature_rows, o.temperature, s).unsqueeze(-1)
    others = torch.ones_like(s, dtype=torch.bool).scatter(-1, indices.long(), False)
    rest = s.masked_fill(~others, -torch.inf)
    max_s = s.amax(-1, keepdim=True)
    max_rest = rest.amax(-1, keepdim=True).clamp(min=torch.finfo(s.dtype).min)
    stats = torch.stack([
        max_s.flatten(),
        max_rest.flatten(),
        ((s - max_s) / temp).logsumexp(-1).flatten(),
        ((rest - max_rest) / temp).logsumexp(-1).flatten(),
        (s - max_s).logsumexp(-1).flatten(),
        share.flatten(),
    ])  # fmt: skip
    return (rows.clone() if o.reduction == NONE else rows.sum()), stats


def kd_topk_bwd(
    grad_loss: Tensor, student: Tensor, indices: Tensor, values: Tensor, stats: Tensor,
    *options: Any,
) -> Tensor:  # fmt: skip
    """grad_loss * share * (kd_weight * T * (q sum p - p) + ce_weight * (q1 - y)).

    The others' p is rest / (V - K), or, for "bin", rest * softmax(s/T) among them.
    """
    o = KDTopKOptions(*options)
    s = student.to(_accumulator(student))
    temp = _row_values(o.temperature_rows, o.temperature, s).unsqueeze(-1)
    grad = torch.zeros_like(s)
    if o.kd_weight != 0:
        t = _teacher(s, indices, values, o)
        u = s / temp
        if o.tail == TAIL_BIN:
            among = (u - _log_rest(u, t.others)).exp()
            among = among.nan_to_num(0.0)  # of nothing but masked classes
        else:
            among = 1 / t.others.sum(-1, keepdim=True).clamp(min=1).to(s.dtype)
        p = torch.where(t.others, t.rest * among, torch.zeros_like(s))
        p = p.scatter(-1, indices.long(), t.p)
        total = t.p.sum(-1, keepdim=True) if o.tail == TAIL_ZERO else 1
        grad = o.kd_weight * temp * (total * torch.softmax(u, -1) - p)
    if o.ce_weight != 0:
        grad = grad + o.ce_weight * (torch.softmax(s, -1) - _target(o.of_rows(), s))
    share = stats[5].view(s.shape[:-1]).unsqueeze(-1)
    scale = share * grad_loss.to(s.dtype).expand(s.shape[:-1]).unsqueeze(-1)
    grad = torch.where(share == 0, torch.zeros_like(grad), scale * grad)
    return torch.empty_like(student).copy_(grad)


def kd_topk_fwd_grad(
    student: Tensor, indices: Tensor, values: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    """The reduced loss, and the gradient of its sum, formed while the logits are at hand."""
    loss, stats = kd_topk_fwd(student, indices, values, *options)
    grad = kd_topk_bwd(torch.ones_like(loss), student, indices, values, stats, *options)
    return loss, grad
