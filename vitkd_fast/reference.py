"""The naive maths of every operation: the specification, and the backend of last resort.

Each function has the signature of the operation of its name in `_ops.py`. Arithmetic is float32
(float64 for float64), materialises what it likes, and never synchronises with a device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

MEAN, SUM, NONE = 1, 2, 0  # values of the `reduction` arguments


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _last(x: Tensor, class_dim: int) -> Tensor:
    """[*rows, classes] in the accumulation type."""
    return x.movedim(class_dim, -1).to(_accumulator(x))


def _row_values(x: Tensor | None, value: float, like: Tensor) -> Tensor:
    """One number per row, [*rows]."""
    if x is None:
        return like.new_full(like.shape[:-1], value)
    return x.to(like.dtype).expand(like.shape[:-1])


def _target(
    labels: Tensor | None, labels_b: Tensor | None, lam: Tensor, smoothing: float, like: Tensor
) -> Tensor:
    """(1 - smoothing) (lam onehot(a) + (1 - lam) onehot(b)) + smoothing / V, [*rows, V]."""
    if labels is None:
        return torch.zeros_like(like)
    classes = torch.arange(like.shape[-1], device=like.device)
    hard = (labels.unsqueeze(-1) == classes).to(like.dtype)
    if labels_b is not None:
        other = (labels_b.unsqueeze(-1) == classes).to(like.dtype)
        hard = lam.unsqueeze(-1) * hard + (1 - lam.unsqueeze(-1)) * other
    return (1 - smoothing) * hard + smoothing / like.shape[-1]


def _shares(
    labels: Tensor | None,
    labels_b: Tensor | None,
    row_weights: Tensor | None,
    ignore_index: int,
    reduction: int,
    like: Tensor,
) -> Tensor:
    """What each row's loss is multiplied by before the sum, [*rows]; 0 where it is ignored."""
    share = _row_values(row_weights, 1.0, like)
    for ids in (labels, labels_b):
        if ids is not None:
            share = torch.where(ids == ignore_index, torch.zeros_like(share), share)
    if reduction == MEAN:
        total = share.sum()
        share = torch.where(total == 0, torch.zeros_like(share), share / total)
    return share


def kd_rows(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    labels_b: Tensor | None,
    lam_rows: Tensor | None,
    temperature_rows: Tensor | None,
    temperature: float,
    lam: float,
    kd_weight: float,
    ce_weight: float,
    label_smoothing: float,
    class_dim: int,
) -> Tensor:
    """kd_weight * T^2 * sum p (log p - log q) + ce_weight * -sum y log q1 of each row, [*rows].

    0 * log 0 is 0 for p and y; a student of -inf where the teacher is finite gives +inf.
    """
    s, t = _last(student, class_dim), _last(teacher, class_dim)
    temp = _row_values(temperature_rows, temperature, s)
    loss = s.new_zeros(s.shape[:-1])
    if kd_weight != 0:
        log_q = torch.log_softmax(s / temp.unsqueeze(-1), -1)
        log_p = torch.log_softmax(t / temp.unsqueeze(-1), -1)
        terms = log_p.exp() * (log_p - log_q)
        terms = torch.where(torch.isneginf(s), torch.full_like(terms, torch.inf), terms)
        terms = torch.where(torch.isneginf(t), torch.zeros_like(terms), terms)
        loss = loss + kd_weight * temp * temp * terms.sum(-1)
    if ce_weight != 0:
        mix = _row_values(lam_rows, lam, s)
        y = _target(labels, labels_b, mix, label_smoothing, s)
        terms = torch.where(y == 0, torch.zeros_like(y), -y * torch.log_softmax(s, -1))
        loss = loss + ce_weight * terms.sum(-1)
    return loss


def kd_fwd(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    kd_weight: float,
    class_dim: int,
    reduction: int,
    labels: Tensor | None = None,
    labels_b: Tensor | None = None,
    lam_rows: Tensor | None = None,
    temperature_rows: Tensor | None = None,
    row_weights: Tensor | None = None,
    lam: float = 1.0,
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """The reduced loss, and the [6, rows] numbers from which backward forms the gradient.

    These are max s, max t, log sum exp((s - max s)/T), the same of t, the same of s at T = 1, and
    the row's share of the loss (0 where it is ignored).
    """
    s, t = _last(student, class_dim), _last(teacher, class_dim)
    share = _shares(labels, labels_b, row_weights, ignore_index, reduction, s)
    rows = kd_rows(
        student, teacher, labels, labels_b, lam_rows, temperature_rows,
        temperature, lam, kd_weight, ce_weight, label_smoothing, class_dim,
    )  # fmt: skip
    rows = torch.where(share == 0, torch.zeros_like(rows), share * rows)
    temp = _row_values(temperature_rows, temperature, s).unsqueeze(-1)
    max_s, max_t = s.amax(-1, keepdim=True), t.amax(-1, keepdim=True)
    stats = torch.stack([
        max_s.flatten(),
        max_t.flatten(),
        ((s - max_s) / temp).logsumexp(-1).flatten(),
        ((t - max_t) / temp).logsumexp(-1).flatten(),
        (s - max_s).logsumexp(-1).flatten(),
        share.flatten(),
    ])  # fmt: skip
    return (rows.clone() if reduction == NONE else rows.sum()), stats


def kd_bwd(
    grad_loss: Tensor,
    student: Tensor,
    teacher: Tensor,
    stats: Tensor,
    temperature: float,
    kd_weight: float,
    class_dim: int,
    reduction: int,
    labels: Tensor | None = None,
    labels_b: Tensor | None = None,
    lam_rows: Tensor | None = None,
    temperature_rows: Tensor | None = None,
    row_weights: Tensor | None = None,
    lam: float = 1.0,
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> Tensor:
    """grad_loss * share * (kd_weight * T * (q - p) + ce_weight * (q1 - y)), like the student."""
    s, t = _last(student, class_dim), _last(teacher, class_dim)
    temp = _row_values(temperature_rows, temperature, s).unsqueeze(-1)
    grad = torch.zeros_like(s)
    if kd_weight != 0:
        grad = kd_weight * temp * (torch.softmax(s / temp, -1) - torch.softmax(t / temp, -1))
    if ce_weight != 0:
        mix = _row_values(lam_rows, lam, s)
        y = _target(labels, labels_b, mix, label_smoothing, s)
        grad = grad + ce_weight * (torch.softmax(s, -1) - y)
    share = stats[5].view(s.shape[:-1]).unsqueeze(-1)
    scale = share * grad_loss.to(s.dtype).expand(s.shape[:-1]).unsqueeze(-1)
    grad = torch.where(share == 0, torch.zeros_like(grad), scale * grad)
    return torch.empty_like(student).copy_(grad.movedim(-1, class_dim))


def kd_fwd_grad(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    kd_weight: float,
    class_dim: int,
    reduction: int,
    labels: Tensor | None = None,
    labels_b: Tensor | None = None,
    lam_rows: Tensor | None = None,
    temperature_rows: Tensor | None = None,
    row_weights: Tensor | None = None,
    lam: float = 1.0,
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """The reduced loss, and the gradient of its sum, formed while the logits are at hand."""
    options = (
        temperature, kd_weight, class_dim, reduction, labels, labels_b, lam_rows,
        temperature_rows, row_weights, lam, ce_weight, label_smoothing, ignore_index,
    )  # fmt: skip
    loss, stats = kd_fwd(student, teacher, *options)
    return loss, kd_bwd(torch.ones_like(loss), student, teacher, stats, *options)


def kd_scale_(grad: Tensor, factor: Tensor) -> None:
    """grad *= factor, in place; factor is 0-dim and in the accumulation type."""
    grad.mul_(factor)


def int8_dwconv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    multiplier: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    x_zero_point: int,
    y_zero_point: int,
    lo: int,
    hi: int,
    hardswish_scale: float | None = None,
) -> Tensor:
    """requantise(bias + sum over taps of weight * x), each channel on its own, u8 [N, H', W', C].

    With v = float32(sum) * multiplier, or the hard-swish of that, (v * min(max(v + 3, 0), 6)) *
    hardswish_scale, the byte is clamp(rne(v) + y_zero_point, lo, hi). Each float32 operation rounds
    once. Sums must fit int32 and v must stay below 2^31, which `vitkd_fast.int8` files guarantee.

    Args:
        x: uint8 [N, H, W, C].
        weight: int8 [kh, kw, C].
        bias: int32 [C], with -zero point * (sum of the weights) in it.
        multiplier: float32 [C].
        stride: of rows and columns.
        padding: top, bottom, left, right, with the byte x_zero_point.

    Raises:
        ValueError: what `int8_dwconv_shape` raises.
    """
    _, height, width, _ = int8_dwconv_shape(
        x, weight, bias, multiplier, stride, padding, x_zero_point, y_zero_point, lo, hi,
        hardswish_scale,
    )  # fmt: skip
    top, bottom, left, right = padding
    padded = F.pad(x, (0, 0, left, right, top, bottom), value=x_zero_point).to(torch.int32)
    total = bias
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            rows = slice(i, i + (height - 1) * stride[0] + 1, stride[0])
            columns = slice(j, j + (width - 1) * stride[1] + 1, stride[1])
            total = total + padded[:, rows, columns] * weight[i, j]
    return _requantize(total, multiplier, y_zero_point, lo, hi, hardswish_scale)


def int8_pwconv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    multiplier: Tensor,
    y_zero_point: int,
    lo: int,
    hi: int,
    hardswish_scale: float | None = None,
) -> Tensor:
    """requantise(bias + x . weight^T) as int8_dwconv does it, uint8 [..., C_out].

    Args:
        x: uint8 [..., C_in].
        weight: int8 [C_out, C_in].
        bias: int32 [C_out], with -zero point * (sum of the weights) in it.
        multiplier: float32 [C_out].

    Raises:
        ValueError: what `int8_pwconv_shape` raises.
    """
    int8_pwconv_shape(x, weight, bias, multiplier, y_zero_point, lo, hi, hardswish_scale)
    # float64 holds the sums exactly, whatever their order
    total = x.double() @ weight.double().T + bias
    return _requantize(total, multiplier, y_zero_point, lo, hi, hardswish_scale)


def _requantize(
    total: Tensor, multiplier: Tensor, zero_point: int, lo: int, hi: int, k: float | None
) -> Tensor:
    v = total.float() * multiplier
    if k is not None:
        v = (v * (v + 3).clamp(0, 6)) * k
    return (v.clamp(-32768, 32767).round() + zero_point).clamp(lo, hi).to(torch.uint8)


def int8_dwconv_shape(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    multiplier: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    x_zero_point: int,
    y_zero_point: int,
    lo: int,
    hi: int,
    hardswish_scale: float | None = None,
) -> list[int]:
    """[N, H', W', C] of the result; H' = floor((H + top + bottom - kh) / stride) + 1.

    Raises:
        ValueError: an argument's dtype, shape, device or value is none of those accepted.
    """
    name = "int8_dwconv"
    _expect(name, "x", x, torch.uint8, "N, H, W, C")
    _expect(name, "weight", weight, torch.int8, "kh, kw, C")
    _expect_channels(name, x, weight, -1, bias, multiplier)
    _expect_range(name, y_zero_point, lo, hi, hardswish_scale)
    _expect_within(name, "x_zero_point", [x_zero_point], 0, 255)
    _expect_within(name, "the map of x", x.shape[1:3], 1, 2**30)
    _expect_within(name, "the kernel of weight", weight.shape[:2], 1, 31)
    _expect_within(name, "stride", stride, 1, 65535)
    _expect_within(name, "padding", padding, 0, 65535)
    top, bottom, left, right = padding
    rows = x.shape[1] + top + bottom - weight.shape[0]
    columns = x.shape[2] + left + right - weight.shape[1]
    if rows < 0 or columns < 0:
        raise ValueError(
            f"{name}: x {_shape(x)} with padding {list(padding)} is smaller than the kernel of "
            f"weight {_shape(weight)}"
        )
    return [x.shape[0], rows // stride[0] + 1, columns // stride[1] + 1, x.shape[3]]


def int8_pwconv_shape(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    multiplier: Tensor,
    y_zero_point: int,
    lo: int,
    hi: int,
    hardswish_scale: float | None = None,
) -> list[int]:
    """[..., C_out] of the result.

    Raises:
        ValueError: an argument's dtype, shape, device or value is none of those accepted.
    """
    name = "int8_pwconv"
    _expect(name, "x", x, torch.uint8, "..., C_in")
    _expect(name, "weight", weight, torch.int8, "C_out, C_in")
    _expect_channels(name, x, weight, 0, bias, multiplier)
    _expect_range(name, y_zero_point, lo, hi, hardswish_scale)
    return [*x.shape[:-1], weight.shape[0]]


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)


def _expect(name: str, argument: str, x: Tensor, dtype: torch.dtype, form: str) -> None:
    rank = form.count(",") + 1
    if x.dtype != dtype or (x.dim() < 1 if form.startswith("...") else x.dim() != rank):
        raise ValueError(
            f"{name}: {argument} is {str(x.dtype)[6:]} {_shape(x)}; "
            f"accepted: {str(dtype)[6:]} [{form}]"
        )


def _expect_channels(
    name: str, x: Tensor, weight: Tensor, out_dim: int, bias: Tensor, multiplier: Tensor
) -> None:
    _expect(name, "bias", bias, torch.int32, "C")
    _expect(name, "multiplier", multiplier, torch.float32, "C")
    if x.shape[-1] != weight.shape[-1]:
        raise ValueError(f"{name}: x {_shape(x)} and weight {_shape(weight)} differ in channels")
    if 0 in weight.shape:
        raise ValueError(f"{name}: weight {_shape(weight)} is empty; accepted: at least 1 of each")
    for argument, per_channel in (("bias", bias), ("multiplier", multiplier)):
        if per_channel.shape[0] != weight.shape[out_dim]:
            raise ValueError(
                f"{name}: {argument} {_shape(per_channel)} and weight {_shape(weight)} differ in "
                "channels"
            )
    for argument, other in (("weight", weight), ("bias", bias), ("multiplier", multiplier)):
        if other.device != x.device:
            raise ValueError(
                f"{name}: {argument} is on {other.device}; accepted: {x.device}, as x is"
            )


def _expect_range(name: str, y_zero_point: int, lo: int, hi: int, k: float | None) -> None:
    _expect_within(name, "y_zero_point", [y_zero_point], 0, 255)
    if not 0 <= lo <= hi <= 255:
        raise ValueError(f"{name}: lo is {lo} and hi is {hi}; accepted: 0 <= lo <= hi <= 255")
    if k is not None and not 1.17549435e-38 <= k <= 3.4028234e38:
        raise ValueError(
            f"{name}: hardswish_scale is {k}; accepted: none, or a normal positive float32 number"
        )


def _expect_within(name: str, what: str, values: Sequence[int], low: int, high: int) -> None:
    if not all(low <= value <= high for value in values):
        given = values[0] if len(values) == 1 else list(values)
        raise ValueError(f"{name}: {what} is {given}; accepted: {low} to {high}")
