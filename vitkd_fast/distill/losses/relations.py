"""Terms of relations: between tokens, and between images."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize

from ...functional import (
    cc_loss,
    pkt_loss,
    relation_loss,
    rkd_loss,
    sp_loss,
)
from ...functional._features import resize_map
from ...nn import (
    AttentionMapProjection,
)
from ...taps import TapOutputs, Taps
from .features import (
    MapTerm,
    PooledTerm,
)
from .term import (
    StepOutputs,
    TapSpec,
    Term,
    _pooled,
)


class Attention(Term):
    """weight * attention_map_loss of a map of the student, for a block of the teacher.

    The student's queries and keys are those of `nn.AttentionMapProjection`, which is trained with
    it and documents the options.
    """

    block: int = -1  # of the teacher
    stride: int = Field(16, ge=1)  # of the student's map
    heads: int | None = Field(None, ge=1)  # the teacher's, unless given
    head_dim: int | None = Field(None, ge=1)  # of the student's heads
    teacher_heads: Literal["split", "mean"] = "split"  # where the numbers of heads differ
    temperature: float = Field(1.0, gt=0)  # divides both scores
    kind: Literal["kl", "reverse_kl", "js", "mse"] = "kl"  # the divergence

    def taps(self) -> tuple[TapSpec, TapSpec]:
        return {"maps": (self.stride,)}, {"attention": (self.block,)}

    def learned(self, student: TapOutputs, teacher: TapOutputs, taps: Taps) -> nn.Module:
        return AttentionMapProjection.between(
            student.maps[self.stride],
            teacher.queries[self.block],
            taps,
            self.block,
            heads=self.heads,
            head_dim=self.head_dim,
            teacher_heads=self.teacher_heads,
            temperature=self.temperature,
            kind=self.kind,
        )

    def __call__(self, outputs: StepOutputs, x: float, learned: nn.Module | None) -> Tensor:
        assert outputs.teacher is not None and learned is not None
        block = self.block
        features = outputs.student.maps[self.stride]
        loss = learned(features, outputs.teacher.queries[block], outputs.teacher.keys[block])
        return self.weight.at(x) * loss


class RKD(PooledTerm):
    """weight * rkd_loss: distances and angles between a batch's images, in what classifiers read.

    Relational distillation (Park et al., 2019, arXiv:1904.05068), `functional.rkd_loss`.
    """

    distance_weight: float = Field(25.0, ge=0)  # of distances of pairs
    angle_weight: float = Field(50.0, ge=0)  # of angles of triplets

    def __call__(self, outputs: StepOutputs, x: float, learned: nn.Module | None) -> Tensor:
        assert outputs.teacher is not None
        loss = rkd_loss(
            _pooled(outputs.student),
            _pooled(outputs.teacher),
            distance_weight=self.distance_weight,
            angle_weight=self.angle_weight,
        )
        return self.weight.at(x) * loss


class Relation(MapTerm):
    """weight * relation_loss: which of an image's patches are alike, T^2 KL of softmax(x x^T / T).

    Of the student's map, resized to the teacher's grid (MiniLMv2: Wang et al., 2021,
    arXiv:2012.15828), `functional.relation_loss`. The widths may differ.
    """

    heads: int = Field(1, ge=1)  # into which both widths are split
    # dot: x x^T / sqrt(dim); cosine: of x of length 1
    similarity: Literal["dot", "cosine"] = "dot"
    temperature: float = Field(1.0, gt=0)  # divides both similarities
    kind: Literal["kl", "reverse_kl", "js", "mse"] = "kl"  # the divergence

    def __call__(self, outputs: StepOutputs, x: float, learned: nn.Module | None) -> Tensor:
        assert outputs.teacher is not None
        f_s, f_t, grid = self.pair(outputs.student, outputs.teacher)
        if f_t.dim() == 4:
            grid, f_t = (f_t.shape[2], f_t.shape[3]), f_t.flatten(2).mT
        side = math.isqrt(f_t.shape[1])
        f_s = resize_map(f_s, grid or (side, side)).flatten(2).mT
        scale = None
        if self.similarity == "cosine":
            f_s, f_t, scale = normalize(f_s.float(), dim=-1), normalize(f_t.float(), dim=-1), 1.0
        loss = relation_loss(
            _heads("student", f_s, self.heads),
            _heads("teacher", f_t, self.heads),
            scale_s=scale,
            scale_t=scale,
            temperature=self.temperature,
            kind=self.kind,
        )
        return self.weight.at(x) * loss


class SP(MapTerm):
    """weight * sp_loss: pairs of images that excite the teacher alike excite the student alike.

    Similarity-preserving distillation (Tung and Mori, 2019, arXiv:1907.09682),
    `functional.sp_loss`.
    """

    # a map and patches, or what both classifiers read
    features: Literal["map", "pooled"] = "map"

    def taps(self) -> tuple[TapSpec, TapSpec]:
        if self.features == "map":
            return super().taps()
        return {"pooled": True}, {"pooled": True}

    def __call__(self, outputs: StepOutputs, x: float, learned: nn.Module | None) -> Tensor:
        assert outputs.teacher is not None
        if self.features == "map":
            f_s, f_t, _ = self.pair(outputs.student, outputs.teacher)
        else:
            f_s, f_t = _pooled(outputs.student), _pooled(outputs.teacher)
        return self.weight.at(x) * sp_loss(f_s.flatten(1), f_t.flatten(1))


class PKT(PooledTerm):
    """weight * pkt_loss: each image's neighbours in the batch, in what classifiers read.

    Probabilistic knowledge transfer (Passalis and Tefas, 2018, arXiv:1803.10837),
    `functional.pkt_loss`.
    """

    def __call__(self, outputs: StepOutputs, x: float, learned: nn.Module | None) -> Tensor:
        assert outputs.teacher is not None
        return self.weight.at(x) * pkt_loss(_pooled(outputs.student), _pooled(outputs.teacher))


class CC(PooledTerm):
    """weight * cc_loss: correlations between a batch's images, in what classifiers read.

    Correlation congruence (Peng et al., 2019, arXiv:1904.01802), `functional.cc_loss`.
    """

    gamma: float = Field(0.4, gt=0)  # of the Gaussian kernel
    order: int = Field(2, ge=1)  # of its Taylor polynomial

    def __call__(self, outputs: StepOutputs, x: float, learned: nn.Module | None) -> Tensor:
        assert outputs.teacher is not None
        pair = _pooled(outputs.student), _pooled(outputs.teacher)
        return self.weight.at(x) * cc_loss(*pair, gamma=self.gamma, order=self.order)


def _heads(side: str, x: Tensor, heads: int) -> Tensor:
    """[B, N, C] as [B, heads, N, C / heads]."""
    if x.shape[2] % heads:
        raise ValueError(
            f"relation: heads: expected a divisor of the {side}'s {x.shape[2]} channels, "
            f"got {heads}"
        )
    return x.unflatten(2, (heads, -1)).transpose(1, 2)
