"""Attention of a convnet's map, and the projections that it takes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from ..functional._common import check_derivatives, check_tensors
from ..functional._features import resize_map

if TYPE_CHECKING:
    from ..taps import Taps


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
        if taps.grids[block] is None:
            raise ValueError("attention: the teacher's patches have no grid of their own")
        _, own, _, dim = queries.shape
        split = heads not in (None, own) and options.get("teacher_heads", "split") == "split"
        return cls(
            features.shape[1],
            own * dim,
            heads or own,
            prefix_tokens=taps.prefix_tokens,
            grid=taps.grids[block],
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
