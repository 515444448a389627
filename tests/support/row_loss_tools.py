"""The losses behind row_loss in tests: each by one name, its usual form, its allowed error."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from support.kd_tools import DOUBLE, FLOAT, assert_within, is_tensor, per_row
from vitkd_fast.functional import dkd_loss, js_loss, kd_loss, reverse_kl_loss, tv_loss
from vitkd_fast.functional._rows import row_loss


def labels_of(student: Tensor, options: dict[str, Any]) -> Tensor:
    """Those of the options, the first of mixed ones; else some."""
    labels = options.get("labels")
    if labels is None:
        return student.detach().double().nan_to_num().argmin(options.get("class_dim", -1))
    return labels[0] if isinstance(labels, tuple) else labels


def dkd(student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
    options["labels"] = labels_of(student, options)
    return dkd_loss(student, teacher, **options)


def ofa(student: Tensor, teacher: Tensor, beta: float, **options: Any) -> Tensor:
    defaults = {"temperature": 1.0, "kd_weight": 1.0, "ce_weight": 0.0, "label_smoothing": 0.0,
                "ignore_index": -100, "row_weights": None, "class_dim": -1,
                "reduction": "mean"}  # fmt: skip
    options = defaults | options | {"labels": labels_of(student, options)}
    return row_loss("ofa", "ofa", student, teacher, beta=beta, **options)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "kl": partial(kd_loss, standardize=False),
    "reverse_kl": reverse_kl_loss,
    "js": js_loss,
    "js_0.1": partial(js_loss, beta=0.1),
    "tv": tv_loss,
    "dkd": dkd,
    "ofa": partial(ofa, beta=1.0),
    "ofa_1.5": partial(ofa, beta=1.5),
    "kl_standardized": partial(kd_loss, standardize=True),
    "dkd_standardized": partial(dkd, standardize=True),
}
NEW = [name for name in LOSSES if name != "kl"]


def usual_rows(
    name: str, student: Tensor, teacher: Tensor, *, temperature: float | Tensor = 1.0,
    labels: Any = None, kd_weight: float = 1.0, ce_weight: float = 0.0,
    label_smoothing: float = 0.0, ignore_index: int = -100, class_dim: int = -1,
    alpha: float = 1.0, beta: float = 8.0, **_: Any,
) -> Tensor:  # fmt: skip
    """Each row's loss by torch's own functions, in the logits' dtype."""
    s, t = (x.movedim(class_dim, -1) for x in (student, teacher))
    divisor = per_row(temperature, -1) if is_tensor(temperature) else temperature
    u, v = s, t
    if name.endswith("standardized"):
        u, v = ((x - x.mean(-1, True)) / (x.std(-1, keepdim=True) + 1e-7) for x in (u, v))
    u, v = u / divisor, v / divisor
    log_q, log_p = u.log_softmax(-1), v.log_softmax(-1)
    kl = partial(F.kl_div, reduction="none", log_target=True)
    y = labels_of(student, {"labels": labels, "class_dim": class_dim}).clamp(0, s.shape[-1] - 1)
    if name.startswith("kl"):
        rows = kl(log_q, log_p).sum(-1)
    elif name == "reverse_kl":
        rows = kl(log_p, log_q).sum(-1)
    elif name.startswith("js"):
        b = torch.tensor(0.1 if "0.1" in name else 0.5, dtype=DOUBLE)
        log_m = torch.logaddexp(log_p + b.log().item(), log_q + (1 - b).log().item())
        rows = (b * kl(log_m, log_p) + (1 - b) * kl(log_m, log_q)).sum(-1)
    elif name == "tv":
        rows = (log_q.exp() - log_p.exp()).abs().sum(-1) / 2
    elif name.startswith("ofa"):
        hot = F.one_hot(y, s.shape[-1]).to(s.dtype)
        c = (log_p.exp() + hot) ** (1.5 if "1.5" in name else 1.0) - hot
        rows = -(c * log_q).sum(-1)
    else:
        others = torch.arange(s.shape[-1], device=s.device) != y.unsqueeze(-1)
        away = [x[others].view(*y.shape, -1) for x in (u, v)]
        of_y = [x.gather(-1, y.unsqueeze(-1)).squeeze(-1) for x in (u, v)]
        z_s, z_t = (a - x.logsumexp(-1) for a, x in zip(of_y, away, strict=True))
        target = sum(kl(F.logsigmoid(x * z_s), F.logsigmoid(x * z_t)) for x in (1, -1))
        rows = alpha * target + beta * kl(*(x.log_softmax(-1) for x in away)).sum(-1)
    rows = kd_weight * temperature**2 * rows
    if ce_weight != 0:
        a, b, lam = labels if isinstance(labels, tuple) else (labels, labels, 1.0)
        entropy = partial(
            F.cross_entropy, s.movedim(-1, 1) if s.dim() > 1 else s, reduction="none",
            ignore_index=ignore_index, label_smoothing=label_smoothing,
        )  # fmt: skip
        rows = rows + ce_weight * (lam * entropy(a) + (1 - lam) * entropy(b))
    return rows


def shares(like: Tensor, options: dict[str, Any]) -> Tensor:
    """What each row's loss is multiplied by before the sum."""
    share = torch.ones_like(like)
    if (weights := options.get("row_weights")) is not None:
        share = weights.to(like.dtype)
    labels = options.get("labels")
    for ids in labels[:2] if isinstance(labels, tuple) else [labels]:
        if ids is not None:
            share = torch.where(ids == options.get("ignore_index", -100), 0.0, share)
    if options.get("reduction", "mean") == "mean":
        share = share / torch.where(share.sum() == 0, 1.0, share.sum())
    return share


def usual(name: str, student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
    """The mean over the rows that are not ignored, or what else the reduction asks for."""
    rows = usual_rows(name, student, teacher, **options)
    share = shares(rows.detach(), options)
    rows = torch.where(share == 0, 0.0, share * rows)
    return rows if options.get("reduction") == "none" else rows.sum()


def with_gradients(
    loss: Callable[..., Tensor], student: Tensor, teacher: Tensor, options: dict[str, Any],
    incoming: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """The loss, its gradient in the student and, where it requires grad, in the temperature."""
    leaves = [student.detach().requires_grad_()]
    temperature = options.get("temperature")
    if is_tensor(temperature) and temperature.requires_grad:
        temperature = temperature.detach().requires_grad_()
        options = options | {"temperature": temperature}
        leaves.append(temperature)
    value = loss(leaves[0], teacher, **options)
    by = torch.ones_like(value) if incoming is None else incoming.to(value.dtype)
    return [value.detach(), *torch.autograd.grad(value, leaves, by)]


class Error(NamedTuple):
    loss: float  # of a row's loss, on max(1, |loss|)
    grad: float  # of a row's gradient, absolute
    temperature: float  # of a row's gradient in its temperature, absolute


def torch_error(name: str, student: Tensor, teacher: Tensor, options: dict[str, Any]) -> Error:
    """torch's own error in float32, the largest of many draws: one alone may be rounded luckily.

    The draws are the logits at hand, scaled by 1 to 1.1, as in kd_tools.
    """
    class_dim = options.get("class_dim", -1) % student.dim() - student.dim()
    rows = list(student.shape)
    classes = rows.pop(class_dim)
    draws = min(256, max(1, 100_000 // student.numel()))
    scales = torch.linspace(1, 1.1, draws, device=student.device).view(-1, *[1] * student.dim())
    logits = [scales * x.detach().float() for x in (student, teacher)]

    def repeated(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(repeated, x))
        return x.detach().expand(draws, *rows) if is_tensor(x) else x

    options = {key: repeated(x) for key, x in options.items()} | {"class_dim": class_dim}
    temperature = torch.as_tensor(options["temperature"]).expand(draws, *rows).to(student.device)
    results = []
    for dtype in (FLOAT, DOUBLE):
        s, t = (x.to(dtype) for x in logits)
        leaves = [s.requires_grad_(), temperature.to(dtype).clone().requires_grad_()]
        values = usual_rows(name, s, t, **options | {"temperature": leaves[1]})
        grads = torch.autograd.grad(values.sum(), leaves, materialize_grads=True)
        results.append([x.double() for x in (values.detach(), *grads)])
    (loss, *grads), (want, *want_grads) = results
    kept = shares(want, options | {"reduction": "none"}) != 0
    off = (loss - want).abs() / want.abs().clamp(min=1)
    worst = [torch.where(kept, off, 0.0).max()]
    worst += [(a - b).abs().max() for a, b in zip(grads, want_grads, strict=True)]
    # of numbers that are 1 / classes in the mean, at least one rounding counts
    rounding = torch.finfo(FLOAT).eps / 2 / classes
    return Error(worst[0].item(), max(rounding, worst[1].item()), max(rounding, worst[2].item()))


def _cast(options: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Numbers of the rows in another precision."""

    def cast(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(cast, x))
        if is_tensor(x) and x.is_floating_point():
            return x.detach().to(dtype).requires_grad_(x.requires_grad)
        return x

    return {name: cast(x) for name, x in options.items()}


def check(name: str, student: Tensor, teacher: Tensor, **options: Any) -> None:
    """The errors against float64 are at most twice torch's own in float32, and a rounding.

    Three times with standardised logits, where rows differ by more. As kd_tools.check measures
    them. For float64 they are scaled, and ten bits are spared: what it is compared with is in
    float64, too.
    """
    options.setdefault("temperature", 1.0)
    if name.startswith(("dkd", "ofa")):  # which take no mixed labels
        options["labels"] = labels_of(student, options)
    class_dim = options.get("class_dim", -1)
    wide = DOUBLE if DOUBLE in (student.dtype, teacher.dtype) else FLOAT
    incoming = None
    if options.get("reduction") == "none":
        rows = list(student.shape)
        rows.pop(class_dim)
        incoming = torch.randn(rows, device=student.device)
    given = with_gradients(LOSSES[name], student, teacher, options, incoming)
    form, exact = partial(usual, name), _cast(options, DOUBLE)
    wanted = with_gradients(form, student.double(), teacher.double(), exact, incoming)

    precision = torch.finfo(wide).eps
    times = 3 if name.endswith("standardized") else 2
    scale = times * (2**-43 if wide == DOUBLE else precision) / torch.finfo(FLOAT).eps
    own = Error(*(scale * x for x in torch_error(name, student, teacher, options)))
    every = usual_rows(name, student.double(), teacher.double(), **_cast(options, DOUBLE)).detach()
    share = shares(every, options)
    size = torch.where(share == 0, 0.0, (share * every).abs().maximum(share.abs()))
    factor = (share * (1 if incoming is None else incoming)).abs()
    if options.get("reduction") != "none":
        size = size.sum()
    assert given[0].dtype == wide
    assert_within((own.loss + 2 * precision) * size, given[0], wanted[0], "loss")
    limits = torch.finfo(student.dtype)
    rounding = limits.eps / 2 * wanted[1].abs().clamp(min=limits.smallest_normal)
    assert given[1].dtype == student.dtype
    allowed = own.grad * per_row(factor, class_dim) + rounding
    assert_within(allowed, given[1], wanted[1], "gradient")
    if len(given) > 2:
        factor = factor if given[2].dim() else factor.sum()
        rounding = 2 * precision * wanted[2].abs()
        assert_within(own.temperature * factor + rounding, given[2], wanted[2], "temperature's")
