"""Losses as modules: the functions of `vitkd_fast.functional` with their options kept."""

from __future__ import annotations

from ._extras import require

require("torch", __name__)

import inspect
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional
from .functional._common import check_derivatives, check_tensors
from .functional._features import resize_map
from .functional.dino import dino

if TYPE_CHECKING:
    from .taps import Taps


class KDLoss(nn.Module):
    """kd_weight * T^2 * KL(softmax(teacher/T) || softmax(student/T)) + ce_weight * CE(student, y).

    The arguments are those of `vitkd_fast.functional.kd_loss`, which says what they mean and what
    is raised.
    """

    def __init__(
        self,
        temperature: float | Tensor = 1.0,
        kd_weight: float = 1.0,
        ce_weight: float | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        class_dim: int = -1,
        reduction: str = "mean",
        compat: str | None = None,
        standardize: bool = False,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.kd_weight = kd_weight
        self.ce_weight = ce_weight
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.class_dim = class_dim
        self.reduction = reduction
        self.compat = compat
        self.standardize = standardize

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: functional.Labels | None = None,
        row_weights: Tensor | None = None,
    ) -> Tensor:
        """The loss of student and teacher logits; see `vitkd_fast.functional.kd_loss`."""
        return functional.kd_loss(
            student,
            teacher,
            temperature=self.temperature,
            labels=labels,
            kd_weight=self.kd_weight,
            ce_weight=self.ce_weight,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            row_weights=row_weights,
            class_dim=self.class_dim,
            reduction=self.reduction,
            compat=self.compat,
            standardize=self.standardize,
        )

    def extra_repr(self) -> str:
        compat = f", compat={self.compat!r}" if self.compat else ""
        compat += ", standardize=True" if self.standardize else ""
        return (
            f"temperature={self.temperature}, kd_weight={self.kd_weight}, "
            f"ce_weight={self.ce_weight}, label_smoothing={self.label_smoothing}, "
            f"reduction={self.reduction!r}{compat}"
        )


class KDLossTopK(nn.Module):
    """kd_weight * T^2 * KL(p || softmax(student/T)) + ce_weight * CE(student, y), p of K classes.

    The arguments are those of `vitkd_fast.functional.kd_loss_topk`, which says what they mean and
    what is raised.
    """

    def __init__(
        self,
        temperature: float | Tensor = 1.0,
        tail: str = "smooth",
        kd_weight: float = 1.0,
        ce_weight: float = 0.0,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.tail = tail
        self.kd_weight = kd_weight
        self.ce_weight = ce_weight
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.reduction = reduction

    def forward(
        self,
        student: Tensor,
        indices: Tensor,
        values: Tensor,
        log_sum_exp: Tensor | None = None,
        labels: functional.Labels | None = None,
        row_weights: Tensor | None = None,
    ) -> Tensor:
        """The loss of student logits and a teacher's K classes; see `functional.kd_loss_topk`."""
        return functional.kd_loss_topk(
            student,
            indices,
            values,
            log_sum_exp=log_sum_exp,
            temperature=self.temperature,
            tail=self.tail,
            labels=labels,
            kd_weight=self.kd_weight,
            ce_weight=self.ce_weight,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            row_weights=row_weights,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, tail={self.tail!r}, ce_weight={self.ce_weight}"


class DISTLoss(nn.Module):
    """T^2 (beta mean_b (1 - rho(q_b, p_b)) + gamma mean_c (1 - rho(q_:c, p_:c))), rho: Pearson's.

    The arguments are those of `vitkd_fast.functional.dist_loss`, which says what they mean and what
    is raised.
    """

    def __init__(
        self, temperature: float = 1.0, beta: float = 1.0, gamma: float = 1.0, sync: bool = False
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.beta = beta
        self.gamma = gamma
        self.sync = sync

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of student and teacher logits; see `vitkd_fast.functional.dist_loss`."""
        return functional.dist_loss(
            student,
            teacher,
            temperature=self.temperature,
            beta=self.beta,
            gamma=self.gamma,
            sync=self.sync,
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, beta={self.beta}, gamma={self.gamma}"


class _RowLoss(nn.Module):
    """A function of `functional` with its options kept."""

    loss: ClassVar[Callable[..., Tensor]]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        unknown = options.keys() - inspect.signature(self.loss).parameters.keys()
        if unknown or options.keys() & {"student", "teacher", "labels", "row_weights"}:
            raise TypeError(
                f"{type(self).__name__}: expected options of {self.loss.__name__}, got "
                f"{sorted(options)}"
            )
        self.options = options

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: functional.Labels | None = None,
        row_weights: Tensor | None = None,
    ) -> Tensor:
        """The loss of student and teacher logits."""
        options = {**self.options, "labels": labels, "row_weights": row_weights}
        return type(self).loss(student, teacher, **options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class ReverseKLLoss(_RowLoss):
    """kd_weight * T^2 * KL(softmax(student/T) || softmax(teacher/T)) + ce_weight * CE(student, y).

    The arguments are those of `vitkd_fast.functional.reverse_kl_loss`, by name.
    """

    loss = staticmethod(functional.reverse_kl_loss)


class JSLoss(_RowLoss):
    """kd_weight * T^2 * (b KL(p || m) + (1 - b) KL(q || m)) + ce_weight * CE, m = b p + (1 - b) q.

    The arguments are those of `vitkd_fast.functional.js_loss`, by name.
    """

    loss = staticmethod(functional.js_loss)


class TVLoss(_RowLoss):
    """kd_weight * T^2 * sum |q - p| / 2 + ce_weight * CE(student, y).

    The arguments are those of `vitkd_fast.functional.tv_loss`, by name.
    """

    loss = staticmethod(functional.tv_loss)


class DKDLoss(_RowLoss):
    """kd_weight * T^2 * (alpha KL(b_t || b_s) + beta KL(p' || q')) + ce_weight * CE(student, y).

    The arguments are those of `vitkd_fast.functional.dkd_loss`, by name.
    """

    loss = staticmethod(functional.dkd_loss)


class LearnableTemperature(nn.Module):
    """T = low + softplus(theta), one number that is learned with the student.

    Called without arguments, it gives the temperature for any loss that takes one as a tensor; the
    losses form its gradient in the same pass. A temperature that descends with the loss grows where
    that makes the loss smaller: give it a schedule, or see `CurriculumTemperature`.

    Args:
        start: T at first; more than `low`.
        low: what T stays above; 0 or more.

    Raises:
        ValueError: naming the argument, what was expected and what was given.
    """

    def __init__(self, start: float = 4.0, low: float = 0.1) -> None:
        super().__init__()
        if not 0 <= low < start:
            raise ValueError(
                f"LearnableTemperature: start: expected more than low >= 0, got {start} and {low}"
            )
        self.low = low
        self.theta = nn.Parameter(torch.tensor(start - low).expm1().log())

    def forward(self) -> Tensor:
        return self.low + F.softplus(self.theta)


class _ScaleGradient(torch.autograd.Function):
    """x, whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.factor * grad, None


class CurriculumTemperature(nn.Module):
    """T = start + span * sigmoid(theta), learned against the student: CTKD.

    Its gradient is multiplied by a factor that goes from 0 to -1 by a cosine: the temperature makes
    the loss larger, and the task harder, the further a run is (Li et al., 2023, arXiv:2211.16231).

    Args:
        start, span: T is between start and start + span; the paper's are 1 and 20.
        classes: where given, T is one number for each instance, theta a network of two layers on
            both logits of `classes` classes; else theta is one parameter.
        hidden: width of that network.

    Raises:
        ValueError: naming the argument, what was expected and what was given.
    """

    def __init__(
        self, start: float = 1.0, span: float = 20.0, classes: int | None = None, hidden: int = 128
    ) -> None:
        super().__init__()
        for name, value in (("start", start), ("span", span)):
            if not value > 0:
                raise ValueError(
                    f"CurriculumTemperature: {name}: expected a number > 0, got {value}"
                )
        self.start, self.span = start, span
        if classes is None:
            self.theta = nn.Parameter(torch.ones(()))
        else:
            self.network = nn.Sequential(
                nn.Linear(2 * classes, hidden), nn.ReLU(), nn.Linear(hidden, 1)
            )

    @staticmethod
    def factor(progress: float) -> float:
        """That of the gradient, after this share of the curriculum, 0 to 1."""
        return (math.cos(math.pi * min(max(progress, 0.0), 1.0)) - 1) / 2

    def forward(self, student: Tensor, teacher: Tensor, progress: float) -> Tensor:
        """T: 0-dim or [*rows].

        Args:
            student, teacher: logits with the classes last, which get no gradient from here.
            progress: the share of the curriculum that is done, 0 to 1.
        """
        if hasattr(self, "network"):
            x = torch.cat([student.detach(), teacher.detach()], -1)
            dtype = next(self.network.parameters()).dtype
            theta = self.network(x.to(dtype)).squeeze(-1)
        else:
            theta = self.theta
        theta = _ScaleGradient.apply(theta, self.factor(progress))
        return self.start + self.span * theta.float().sigmoid()


def entropy_temperature(teacher: Tensor, low: float = 1.0, high: float = 4.0) -> Tensor:
    """T = high - (high - low) * H(softmax(teacher)) / log V, for each row of classes.

    A teacher that is sure of a row is softened there by up to `high`, one that is not is left as it
    is, at `low`. This form is our own, and has no gradient; [*rows], float32 or float64.

    Raises:
        ValueError: naming the argument, what was expected and what was given.
    """
    if not 0 < low <= high:
        raise ValueError(
            f"entropy_temperature: low: expected 0 < low <= high, got {low} and {high}"
        )
    wide = torch.float64 if teacher.dtype == torch.float64 else torch.float32
    with torch.no_grad():
        log_p = teacher.to(wide).log_softmax(-1)
        entropy = -(log_p.exp() * log_p.clamp(min=torch.finfo(wide).min)).sum(-1)
        return high - (high - low) * (entropy / math.log(teacher.shape[-1])).clamp(0, 1)


class AttentionMapProjection(nn.Module):
    """attention_map_loss of a feature map: mean KL(softmax(q_t k_t^T) || softmax(q_s k_s^T)).

    A linear layer gives each pixel of a convnet's map a query and a key per head; the loss makes
    their attention that of a transformer's block on the same image (MiniLMv2: Wang et al., 2021,
    arXiv:2012.15828, for heads that differ in number; to a convnet: Liu et al., 2022,
    arXiv:2207.05273). No attention map is ever stored. Maps of another size than the teacher's grid
    are resized as queries and keys. The module is only needed in training.

    Args:
        student_channels: C of the student's map.
        teacher_dim: of the teacher's queries, all heads together.
        heads: in which the two are compared. Where the teacher has another number, its dim is split
            into as many relation heads; see `teacher_heads`.
        head_dim: of the student's queries and keys; teacher_dim // heads unless given.
        prefix_tokens: class, distillation and register tokens in front of the teacher's patches;
            they are left out of queries and keys, and so out of the softmax.
        grid: rows and columns of the teacher's patches; a square unless given.
        teacher_heads: "split" compares head by head; "mean" compares each of the student's heads
            with the mean of all the teacher's maps, only for "kl" and "mse": their mean over the
            teacher's heads is formed, which has the same gradient and is larger by a constant.
        scale_t: multiplies the teacher's scores; dim ** -0.5 of its heads unless given.
        temperature, kind: as in `vitkd_fast.functional.attention_map_loss`.

    Raises:
        ValueError: naming the argument, what was expected and what was given.
    """

    def __init__(
        self,
        student_channels: int,
        teacher_dim: int,
        heads: int,
        *,
        head_dim: int | None = None,
        prefix_tokens: int = 0,
        grid: tuple[int, int] | None = None,
        teacher_heads: Literal["split", "mean"] = "split",
        scale_t: float | None = None,
        temperature: float = 1.0,
        kind: str = "kl",
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if teacher_heads not in ("split", "mean"):
            raise ValueError(
                f"{name}: teacher_heads: expected 'split' or 'mean', got {teacher_heads!r}"
            )
        if teacher_heads == "mean" and kind not in ("kl", "mse"):
            raise ValueError(
                f"{name}: kind: expected 'kl' or 'mse' with teacher_heads 'mean', got {kind!r}"
            )
        free = teacher_heads == "mean" and head_dim is not None
        if teacher_dim % heads and not free:
            raise ValueError(
                f"{name}: heads: expected a divisor of teacher_dim {teacher_dim}, got {heads}"
            )
        self.teacher_dim, self.heads, self.prefix_tokens = teacher_dim, heads, prefix_tokens
        self.grid, self.teacher_heads, self.scale_t = grid, teacher_heads, scale_t
        self.temperature, self.kind = temperature, kind
        head_dim = teacher_dim // heads if head_dim is None else head_dim
        self.projection = nn.Linear(student_channels, 2 * heads * head_dim)

    @classmethod
    def between(
        cls,
        features: Tensor,
        queries: Tensor,
        taps: Taps,
        block: int,
        *,
        heads: int | None = None,
        **options: Any,
    ) -> AttentionMapProjection:
        """The module for the tapped outputs of student and teacher.

        Args:
            features: the student's map [B, C, H, W].
            queries: the teacher's of `block`, [B, heads, N, dim].
            taps: the teacher's.
            block: of the teacher.
            heads: the teacher's, unless given.
            options: of the module, but for what `taps` says.
        """
        if taps.grid is None:
            raise ValueError("attention: the teacher's patches have no grid of their own")
        _, own, _, dim = queries.shape
        split = heads not in (None, own) and options.get("teacher_heads", "split") == "split"
        return cls(
            features.shape[1],
            own * dim,
            heads or own,
            prefix_tokens=taps.prefix_tokens,
            grid=taps.grid,
            # other heads have another dim, and with it another scale
            scale_t=None if split else taps.scales[block],
            **options,
        )

    def forward(self, features: Tensor, q_t: Tensor, k_t: Tensor) -> Tensor:
        """The loss of a student's map [B, C, H, W] for q_t, k_t [B, teacher heads, tokens, dim].

        Raises:
            ValueError: shapes that do not fit each other or the module; a teacher's tensor that
                requires grad.
            TypeError: what is no tensor.
        """
        check_tensors(type(self).__name__, {"features": features, "q_t": q_t, "k_t": k_t})
        q_t, k_t = (self._patches(x) for x in (q_t, k_t))
        grid = _grid(type(self).__name__, self.grid, q_t)
        qk = self.projection(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        # [B, tokens, 2, heads, dim], of which each head's queries and keys are read in place
        tokens = resize_map(qk, grid, shrink="antialias").permute(0, 2, 3, 1).flatten(1, 2)
        q_s, k_s = tokens.unflatten(2, (2, self.heads, -1)).transpose(1, 3).unbind(2)
        if self.teacher_heads == "split":
            q_t, k_t = (_split(x, self.heads) for x in (q_t, k_t))
        else:
            shape = (-1, self.heads, q_t.shape[1], -1, -1)
            q_s, k_s = (x.unsqueeze(2).expand(shape).flatten(1, 2) for x in (q_s, k_s))
            q_t, k_t = (x.repeat(1, self.heads, 1, 1) for x in (q_t, k_t))
        return functional.attention_map_loss(
            q_s,
            k_s,
            q_t,
            k_t,
            scale_t=self.scale_t,
            temperature=self.temperature,
            kind=self.kind,
        )

    def _patches(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] * x.shape[3] != self.teacher_dim:
            raise ValueError(
                f"{type(self).__name__}: queries and keys: expected [batch, heads, tokens, dim] "
                f"with heads * dim = {self.teacher_dim}, got {list(x.shape)}"
            )
        return x[:, :, self.prefix_tokens :]

    def extra_repr(self) -> str:
        return (
            f"heads={self.heads}, prefix_tokens={self.prefix_tokens}, "
            f"teacher_heads={self.teacher_heads!r}, temperature={self.temperature}, "
            f"kind={self.kind!r}"
        )


class CrossAttentionProjector(nn.Module):
    """|Attn_t - PCAttn_s|^2 + |V_t V_t^T - V_s V_s^T|^2 / dim + |h_t - h_s|^2, each a mean.

    Partially cross attention and the group-wise linear projector of cross-architecture distillation
    (Liu et al., 2022, arXiv:2207.05273). 3x3 convolutions give the student queries, keys and
    values; each of their elements is replaced by the teacher's with probability `replace`, and the
    attention that results, softmax(q k^T / sqrt(dim)) v, is to be the teacher's. The group-wise
    linear projector maps the student's features to the teacher's by `groups` ** 2 linear layers,
    which the pixels of a neighbourhood of `groups` x `groups` share in the same order everywhere.
    Neither attention maps nor Gram matrices of tokens are stored. (The paper's discriminator and
    its views of an image belong to a training loop and are not included.)

    Args:
        student_channels: C of the student's map.
        teacher_dim: of the teacher's tokens, all heads together.
        heads: the teacher's.
        groups: the side of a neighbourhood; divides both sides of the teacher's grid.
        replace: the share of elements that come from the teacher, in [0, 1); 0 in eval mode.
        dropout: of the group-wise projector's output.
        prefix_tokens: tokens in front of the teacher's patches, which are left out.
        grid: rows and columns of the teacher's patches; a square unless given.

    Raises:
        ValueError: naming the argument, what was expected and what was given.
    """

    def __init__(
        self,
        student_channels: int,
        teacher_dim: int,
        heads: int,
        *,
        groups: int = 4,
        replace: float = 0.5,
        dropout: float = 0.0,
        prefix_tokens: int = 0,
        grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if teacher_dim % heads:
            raise ValueError(
                f"{name}: heads: expected a divisor of teacher_dim {teacher_dim}, got {heads}"
            )
        if not 0 <= replace < 1:
            raise ValueError(f"{name}: replace: expected 0 <= replace < 1, got {replace}")
        self.teacher_dim, self.heads = teacher_dim, heads
        self.groups, self.replace = groups, replace
        self.prefix_tokens, self.grid = prefix_tokens, grid
        self.qkv = nn.Conv2d(student_channels, 3 * teacher_dim, 3, padding=1)
        bound = student_channels**-0.5  # as nn.Linear begins
        shape = (groups * groups, student_channels, teacher_dim)
        self.weight = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(groups * groups, teacher_dim))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, features: Tensor, q_t: Tensor, k_t: Tensor, v_t: Tensor, tokens_t: Tensor
    ) -> Tensor:
        """The three terms, added up, 0-dim.

        Args:
            features: the student's map, [B, C, H, W].
            q_t, k_t, v_t: the teacher's, [B, heads, tokens, dim].
            tokens_t: the output of the teacher's block, [B, tokens, teacher_dim].

        Raises:
            ValueError: shapes that do not fit each other or the module; a teacher's tensor that
                requires grad.
            TypeError: what is no tensor.
        """
        name = type(self).__name__
        given = {"features": features, "q_t": q_t, "k_t": k_t, "v_t": v_t, "tokens_t": tokens_t}
        check_tensors(name, given)
        check_derivatives(name, given, given.keys() - {"features"}, forward_mode=True)
        dim = self.teacher_dim // self.heads
        for x in (q_t, k_t, v_t):
            if x.dim() != 4 or x.shape[1::2] != (self.heads, dim) or x.shape != q_t.shape:
                raise ValueError(
                    f"{name}: queries, keys and values: expected [batch, {self.heads}, tokens, "
                    f"{dim}], got {list(x.shape)}"
                )
        wanted = [q_t.shape[0], q_t.shape[2], self.teacher_dim]
        if list(tokens_t.shape) != wanted:
            raise ValueError(f"{name}: tokens_t: expected {wanted}, got {list(tokens_t.shape)}")
        if features.dim() != 4 or features.shape[0] != wanted[0]:
            raise ValueError(
                f"{name}: features: expected [{wanted[0]}, channels, height, width], got "
                f"{list(features.shape)}"
            )
        q_t, k_t, v_t, tokens_t = (_constant(x) for x in (q_t, k_t, v_t, tokens_t))
        first = self.prefix_tokens
        teacher = tuple(x[:, :, first:] for x in (q_t, k_t, v_t))
        h_t = tokens_t[:, first:]
        grid = _grid(name, self.grid, teacher[0])
        if grid[0] % self.groups or grid[1] % self.groups:
            raise ValueError(
                f"{name}: groups: expected a divisor of the grid {grid}, got {self.groups}"
            )
        features = resize_map(features, grid, shrink="antialias")
        qkv = self.qkv(features).flatten(2).unflatten(1, (3, self.heads, -1))
        q, k, v_s = qkv.transpose(-1, -2).unbind(1)
        q, k, v = (self._mixed(s, t) for s, t in zip((q, k, v_s), teacher, strict=True))
        attended_s = F.scaled_dot_product_attention(q, k, v)
        q, k, v = teacher
        attended_t = F.scaled_dot_product_attention(q, k, v)
        loss = F.mse_loss(attended_s.float(), attended_t.float())
        loss = loss + _gram_distance(v_s, v)
        return loss + F.mse_loss(self._project(features).float(), h_t.float())

    def _mixed(self, student: Tensor, teacher: Tensor) -> Tensor:
        if not self.training or self.replace == 0:
            return student
        return torch.where(torch.rand_like(student) < self.replace, teacher.to(student), student)

    def _project(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, H * W, teacher_dim], pixel (i, j) by layer (i, j) mod groups."""
        batch, channels, height, width = x.shape
        g = self.groups
        x = x.reshape(batch, channels, height // g, g, width // g, g)
        places = x.permute(3, 5, 0, 2, 4, 1).reshape(g * g, -1, channels)
        y = torch.baddbmm(self.bias.unsqueeze(1).to(x.dtype), places, self.weight.to(x.dtype))
        y = y.reshape(g, g, batch, height // g, width // g, -1).permute(2, 3, 0, 4, 1, 5)
        return self.dropout(y.reshape(batch, height * width, -1))


class DistillationHead(nn.Module):
    """Two classifiers on the same features, whose mean is the student's own: logits +- d(x).

    Distillation through a head of its own (Touvron et al., 2021, arXiv:2012.12877) for a student
    of one classifier, such as a MobileNet of timm: a linear layer d on what the classifier reads
    stands for half the difference of two heads, one for the labels and one for the teacher. Their
    mean, which DeiT predicts with, is the classifier as it is: it is evaluated, exported and
    quantised alone, and nothing is to be folded. Gradients of both heads reach it. The module is
    only needed in training.

    Args:
        features: that the classifier reads.
        classes: of the classifier.
    """

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.difference = nn.Linear(features, classes)
        # both heads begin as the classifier, which may be trained
        nn.init.zeros_(self.difference.weight)
        nn.init.zeros_(self.difference.bias)

    def forward(self, pooled: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The heads' logits, [batch, classes] each: of the labels, and of the teacher.

        Args:
            pooled: what the classifier read, [batch, features].
            logits: what it gave, [batch, classes].
        """
        check_tensors(type(self).__name__, {"pooled": pooled, "logits": logits})
        half = self.difference(pooled.flatten(1))
        if half.shape != logits.shape:
            raise ValueError(
                f"{type(self).__name__}: logits: expected {list(half.shape)}, got "
                f"{list(logits.shape)}"
            )
        return logits + half, logits - half


def _separable(channels: int, width: int) -> list[nn.Module]:
    """Two separable 3x3 convolutions, of which the first halves the map."""
    layers: list[nn.Module] = []
    for stride, out in ((2, channels), (1, width)):
        layers += [
            nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False),
            nn.Conv2d(channels, out, 1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
        ]
    return layers


class OFABranches(nn.Module):
    """Logits from the maps of a convnet's stages: separable convolutions, mean, linear layer.

    The branches of OFA-KD (Hao et al., 2023, arXiv:2310.19444) bring features that cannot be
    compared with another architecture's into the space of logits, where `functional.ofa_loss`
    does. A stage's map is halved once for each stage behind it; the last one's goes through a 1x1
    convolution. The module is only needed in training.

    Args:
        channels: of the maps, from the first stage to the last: of timm's `features_only` with
            out_indices (1, 2, 3, 4), or of `Taps` at strides 4, 8, 16 and 32.
        classes: of the logits.
        width: of what a branch's linear layer reads: the larger of what student's and teacher's
            classifiers read, in the authors' code.
    """

    def __init__(self, channels: Sequence[int], classes: int, width: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList()
        for stage, first in enumerate(channels):
            halvings = len(channels) - 1 - stage
            layers: list[nn.Module] = [] if halvings else [nn.Conv2d(first, width, 1)]
            for i in range(halvings):
                out = width if i == halvings - 1 else first * 2 ** (i + 1)
                layers += _separable(first * 2**i, out)
            layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)]
            self.branches.append(nn.Sequential(*layers))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Logits [batch, classes] of each map [batch, channels, height, width]."""
        if len(maps) != len(self.branches):
            raise ValueError(
                f"{type(self).__name__}: maps: expected {len(self.branches)}, got {len(maps)}"
            )
        return [branch(x) for branch, x in zip(self.branches, maps, strict=True)]


class DINOLoss(nn.Module):
    """dino_loss, with the centre that follows the teacher's logits: c <- m c + (1 - m) mean(t).

    Self-distillation with no labels (Caron et al., 2021, arXiv:2104.14294). In training mode each
    call moves the centre after the loss, by the mean over all views and images, which is formed
    while the teacher's logits are read. It is the mean over all processes where torch.distributed
    is initialised.

    Args:
        classes: of the heads.
        temperature: of the student.
        teacher_temperature: may be changed, or given to a call: DINO warms it up to 0.07.
        momentum: m of the centre.

    Attributes:
        centre: [classes], a buffer, float32.
    """

    centre: Tensor

    def __init__(
        self,
        classes: int,
        temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        momentum: float = 0.9,
    ) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise ValueError(f"DINOLoss: momentum: expected 0 to 1, got {momentum}")
        self.temperature, self.teacher_temperature = temperature, teacher_temperature
        self.momentum = momentum
        self.register_buffer("centre", torch.zeros(classes))

    def forward(
        self, student: Tensor, teacher: Tensor, teacher_temperature: float | None = None
    ) -> Tensor:
        """The loss, 0-dim; arguments are those of `vitkd_fast.functional.dino_loss`."""
        if teacher_temperature is None:
            teacher_temperature = self.teacher_temperature
        centre = self.centre.clone()  # the graph's own: the next call must not change it
        if not self.training:
            return functional.dino_loss(
                student, teacher, centre, temperature=self.temperature,
                teacher_temperature=teacher_temperature,
            )  # fmt: skip
        sums = torch.zeros_like(centre, dtype=torch.promote_types(centre.dtype, teacher.dtype))
        loss = dino(student, teacher, centre, self.temperature, teacher_temperature, sums)
        with torch.no_grad():
            mean = sums / max(teacher.shape[0] * teacher.shape[1], 1)
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(mean)
                mean /= dist.get_world_size()
            if teacher.shape[1]:
                self.centre.lerp_(mean.to(self.centre.dtype), 1 - self.momentum)
        return loss

    def extra_repr(self) -> str:
        return (
            f"classes={self.centre.numel()}, temperature={self.temperature}, "
            f"teacher_temperature={self.teacher_temperature}, momentum={self.momentum}"
        )


class PHIStandardize(nn.Module):
    """alpha H U^T (x - mean), covariance U L U^T: channels of variance 1, by rotation and scale.

    PHI-S of PHI Standardization (Ranzinger et al., 2024, arXiv:2410.01680), for teachers whose
    features have scales of their own: H is a Hadamard matrix over sqrt(channels), which gives every
    channel the mean of all variances, and alpha that one's inverse root. Unlike whitening it keeps
    angles, and distances up to alpha. Statistics are those of `observe`, then `fit`.

    Args:
        channels: 1, 2, or a multiple of 4 of which a Hadamard matrix is found.

    Raises:
        ValueError: naming the argument, what was expected and what was given.
    """

    mean: Tensor  # [channels]
    matrix: Tensor  # [channels, channels]

    def __init__(self, channels: int) -> None:
        super().__init__()
        if _hadamard(channels) is None:
            raise ValueError(
                f"{type(self).__name__}: channels: expected 1, 2 or a multiple of 4 with a known "
                f"Hadamard matrix, got {channels}"
            )
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("matrix", torch.eye(channels))
        self._sums: list[Tensor] = []  # of ones, x, and x x^T

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Adds features [B, C, H, W] or [.., C] to the statistics."""
        x = self._rows(x).double()
        sums = [x.new_full((), len(x)), x.sum(0), x.mT @ x]
        before = self._sums or [torch.zeros_like(x) for x in sums]
        self._sums = [a + b for a, b in zip(before, sums, strict=True)]

    @torch.no_grad()
    def fit(self) -> None:
        """Takes the statistics of what was observed, on all ranks of torch.distributed.

        Raises:
            ValueError: nothing was observed, or features that do not vary or are not finite.
        """
        name = type(self).__name__
        if not self._sums:
            raise ValueError(f"{name}: expected features to be observed first, got none")
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for x in self._sums:
                torch.distributed.all_reduce(x)
        count, total, products = self._sums
        mean = total / count
        covariance = products / count - mean.outer(mean)
        variance = covariance.trace() / len(mean)
        if not 0 < float(variance) < math.inf:
            raise ValueError(
                f"{name}: expected features with a finite variance, got one of {float(variance)}"
            )
        _, directions = torch.linalg.eigh(covariance)
        hadamard = _hadamard(len(mean))
        assert hadamard is not None
        rotation = hadamard.to(mean) / len(mean) ** 0.5 @ directions.mT
        self.mean.copy_(mean)
        self.matrix.copy_(rotation / variance.sqrt())
        self._sums = []

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, C, H, W] or [.., C], standardised, float32 and of the same shape."""
        with torch.autocast(x.device.type, enabled=False):
            rows = x.movedim(1, -1) if x.dim() == 4 else x
            rows = (rows.to(self.mean.dtype) - self.mean) @ self.matrix.mT
            return rows.movedim(-1, 1) if x.dim() == 4 else rows

    def _rows(self, x: Tensor) -> Tensor:
        channels, rows = len(self.mean), x.movedim(1, -1) if x.dim() == 4 else x
        if rows.shape[-1] != channels:
            raise ValueError(
                f"{type(self).__name__}: x: expected [batch, {channels}, height, width] or "
                f"[.., {channels}], got {list(x.shape)}"
            )
        return rows.reshape(-1, channels)


def _hadamard(order: int) -> Tensor | None:
    """Of entries +-1, H H^T = order * I: Sylvester's doubling of one of Paley's, or of [1]."""
    base = order
    while base:
        if (found := _paley(base)) is not None:
            while len(found) < order:
                found = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), found)
            return found
        base = base // 2 if base % 2 == 0 else 0
    return None


def _paley(order: int) -> Tensor | None:
    """[1]; of order q + 1 for primes q = 3 mod 4; of order 2 (q + 1) for q = 1 mod 4."""
    if order == 1:
        return torch.ones(1, 1)
    for q, second in ((order - 1, False), (order // 2 - 1, True)):
        prime = q > 2 and all(q % i for i in range(2, math.isqrt(q) + 1))
        if order % 4 or not prime or (q % 4 == 1) != second:
            continue
        squares = {i * i % q for i in range(1, q)}
        symbol = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)])
        i = torch.arange(q)
        s = torch.zeros(q + 1, q + 1)  # of 0 on the diagonal, s s^T = q I
        s[0, 1:], s[1:, 0] = 1, 1 if second else -1
        s[1:, 1:] = symbol[(i[:, None] - i) % q]
        if not second:
            return s + torch.eye(q + 1)
        one, other = torch.tensor([[[1.0, 1.0], [1.0, -1.0]], [[1.0, -1.0], [-1.0, -1.0]]])
        return torch.kron(s, one) + torch.kron(torch.eye(q + 1), other)
    return None


def _constant(x: Tensor) -> Tensor:
    """Detached; a copy of what was made in inference mode, which autograd could not keep."""
    if not torch.compiler.is_compiling() and x.is_inference():
        return x.clone()
    return x.detach()


def _gram_distance(x: Tensor, y: Tensor) -> Tensor:
    """Mean of ((x x^T - y y^T) / sqrt(dim))^2 over pairs of tokens, from products dim x dim.

    With d = x - y, x x^T - y y^T = x d^T + d y^T: no difference of large sums, and in float32.
    """
    with torch.autocast(x.device.type, enabled=False):
        x, y = x.float(), y.float()
        d = x - y
        dd = d.mT @ d
        square = ((x.mT @ x + y.mT @ y) * dd).sum() + 2 * ((x.mT @ d) * (d.mT @ y)).sum()
    return square / (x.shape[0] * x.shape[1] * x.shape[2] ** 2 * x.shape[3])


def _split(x: Tensor, heads: int) -> Tensor:
    """[B, any heads, N, dim] as [B, heads, N, dim'], the dims of all heads taken as one."""
    if x.shape[1] == heads:
        return x
    return x.transpose(1, 2).flatten(2).unflatten(2, (heads, -1)).transpose(1, 2)


def _grid(name: str, grid: tuple[int, int] | None, x: Tensor) -> tuple[int, int]:
    """Rows and columns of the patches of x [B, heads, N, dim]."""
    side = math.isqrt(x.shape[2])
    rows, columns = grid or (side, side)
    if rows * columns != x.shape[2]:
        raise ValueError(
            f"{name}: grid: expected rows and columns of {x.shape[2]} patches, got {rows} x "
            f"{columns}; prefix_tokens and grid must be the teacher's"
        )
    return rows, columns
