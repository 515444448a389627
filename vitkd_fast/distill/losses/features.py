"""Terms of feature maps, tokens and pooled features."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, layer_norm, normalize

from ...functional import (
    at_loss,
    feature_loss,
    mmd_loss,
    nst_loss,
    sliced_wasserstein_loss,
    wkd_feature_loss,
)
from ...functional._features import resize_map
from ...nn import (
    PHIStandardize,
)
from ...taps import TapOutputs, Taps
from .term import (
    StepOutputs,
    TapSpec,
    Term,
    _part,
    _pooled,
)


class MapTerm(Term):
    """A term of a map of the student and patches of the teacher: of a block, or a map."""

    stride: int = Field(16, ge=1)  # of the student's map
    block: int = -1  # of the teacher, whose patch tokens are compared
    teacher_stride: int | None = Field(None, ge=1)  # of a map of the teacher, instead of a block

    def taps(self) -> tuple[TapSpec, TapSpec]:
        if self.teacher_stride is None:
            return {"maps": (self.stride,)}, {"tokens": (self.block,)}
        return {"maps": (self.stride,)}, {"maps": (self.teacher_stride,)}

    def pair(
        self, student: TapOutputs, teacher: TapOutputs
    ) -> tuple[Tensor, Tensor, tuple[int, int] | None]:
        """The student's map, the teacher's map or tokens, and the tokens' grid where it is known.

        [B, C, H, W]; [B, C, H, W] or [B, N, C].
        """
        return student.maps[self.stride], *self.of_teacher(teacher)

    def of_teacher(self, teacher: TapOutputs) -> tuple[Tensor, tuple[int, int] | None]:
        """The second and the third of `pair`."""
        if self.teacher_stride is None:
            return teacher.patches(self.block), teacher.grid
        return teacher.maps[self.teacher_stride], None


class AT(MapTerm):
    """weight * at_loss: where the student's activations are large, and where the teacher's are.

    Attention transfer (Zagoruyko and Komodakis, 2017, arXiv:1612.03928), `functional.at_loss`.
    """

    p: float = Field(2.0, ge=1)  # the power of the activations

    def __call__(self, outputs: StepOutputs, x: float, learned: nn.Module | None) -> Tensor:
        assert outputs.teacher is not None
        f_s, f_t, grid = self.pair(outputs.student, outputs.teacher)
        return self.weight.at(x) * at_loss(f_s, f_t, p=self.p, teacher_grid=grid)


class Feature(MapTerm):
    """weight * feature_loss: the student's features, through a 1x1 layer, are the teacher's.

    FitNet's hint (Romero et al., 2015, arXiv:1412.6550), `functional.feature_loss`. The layer is
    trained with the student and only needed in training.
    """

    # a map and patches, or what both classifiers read
    features: Literal["map", "pooled"] = "map"
    kind: Literal["mse", "cosine", "smooth_l1"] = "mse"  # the error
    beta: float = Field(1.0, ge=0)  # of smooth_l1: where its square turns into its line
    # of each position of the teacher, over its channels
    normalize_teacher: Literal["none", "layer_norm", "l2"] = "none"
    projection: Literal["auto", "always"] = "auto"  # auto: where the widths differ
    # phi_s: the teacher's channels get variance 1, from the first images of training, by a rotation
    # and one scale (Ranzinger et al., 2024, arXiv:2410.01680); auto: where teachers are several
    standardize: Literal["auto", "phi_s", "none"] = "auto"

    def taps(self) -> tuple[TapSpec, TapSpec]:
        if self.features == "map":
            return super().taps()
        return {"pooled": True}, {"pooled": True}

    def pair(
        self, student: TapOutputs, teacher: TapOutputs
    ) -> tuple[Tensor, Tensor, tuple[int, int] | None]:
        if self.features == "map":
            return super().pair(student, teacher)
        return _pooled(student, 1), *self.of_teacher(teacher)

    def of_teacher(self, teacher: TapOutputs) -> tuple[Tensor, tuple[int, int] | None]:
        if self.features == "map":
            return super().of_teacher(teacher)
        return _pooled(teacher, 1), None

    def among_teachers(self) -> Term:
        auto = self.standardize == "auto"
        return self.model_copy(update={"standardize": "phi_s"}) if auto else self

    def learned(self, student: TapOutputs, teacher: TapOutputs, taps: Taps) -> nn.Module | None:
        f_s, f_t, _ = self.pair(student, teacher)
        of_s, of_t = (x.shape[1] if x.dim() == 4 else x.shape[2] for x in (f_s, f_t))
        made = nn.ModuleDict()
        if self.projection == "always" or of_s != of_t:
            made["projection"] = nn.Linear(of_s, of_t)
        if self.standardize == "phi_s":
            made["standardize"] = PHIStandardize(of_t)
        return made if made else None

    def observe(self, teacher: TapOutputs, learned: nn.Module) -> None:
        standardize = _part(learned, "standardize", PHIStandardize)
        if standardize:
            standardize.observe(self.of_teacher(teacher)[0])

    def __call__(self, outputs: StepOutputs, x: float, learned: nn.Module | None) -> Tensor:
        assert outputs.teacher is not None
        f_s, f_t, grid = self.pair(outputs.student, outputs.teacher)
        projection = _part(learned, "projection", nn.Linear)
        if standardize := _part(learned, "standardize", PHIStandardize):
            f_t = standardize(f_t)
        loss = feature_loss(
            f_s,
            f_t,
            *((projection.weight, projection.bias) if projection else ()),
            kind=self.kind,
            beta=self.beta,
            normalize_teacher=None if self.normalize_teacher == "none" else self.normalize_teacher,
            teacher_grid=grid,
        )
        return self.weight.at(x) * loss


class Features(MapTerm):
    """weight * the mean over pooled features and patches of cosine 1 - cos + smooth_l1 L1.

    Of a student, through a linear layer, beside a teacher that may have no classifier: what teaches
    it without labels (as in AM-RADIO: Ranzinger et al., 2023, arXiv:2312.06709),
    `functional.feature_loss`. The layers, one for each, are trained with the student and only
    needed in training. The student's map is resized to the teacher's grid.
    """

    parts: Literal["both", "pooled", "patches"] = "both"  # what classifiers read; map and patches
    cosine: float = Field(0.9, gt=0)  # factor of 1 - cos
    smooth_l1: float = Field(0.1, ge=0)  # factor of the smooth L1
    beta: float = Field(1.0, ge=0)  # where its square turns into its line
    # of each position of the teacher, over its channels: as a ViT's last norm, without its weights
    normalize_teacher: Literal["none", "layer_norm"] = "layer_norm"
    # then, as of `feature`: what all images have in common is no part of the target
    standardize: Literal["phi_s", "none"] = "phi_s"

    def taps(self) -> tuple[TapSpec, TapSpec]:
        student, teacher = super().taps() if self.parts != "pooled" else ({}, {})
        if self.parts == "patches":
            return student, teacher
        return {**student, "pooled": True}, {**teacher, "pooled": True}

    def pairs(
        self, student: TapOutputs, teacher: TapOutputs
    ) -> Iterator[tuple[str, Tensor, Tensor, tuple[int, int] | None]]:
        """Each part's name, and what `pair` gives of it."""
        for part, f_t, grid in self.targets(teacher):
            f_s = _pooled(student, 1) if part == "pooled" else student.maps[self.stride]
            yield part, f_s, f_t, grid

    def targets(self, teacher: TapOutputs) -> Iterator[tuple[str, Tensor, tuple[int, int] | None]]:
        """Each part of the teacher, [B, N, C], with its grid where it is known."""
        if self.parts != "patches":
            yield "pooled", self._normalized(_pooled(teacher, 1)), None
        if self.parts != "pooled":
            f_t, grid = self.of_teacher(teacher)
            if f_t.dim() == 4:
                grid, f_t = (f_t.shape[2], f_t.shape[3]), f_t.flatten(2).mT
            yield "patches", self._normalized(f_t), grid

    def _normalized(self, f_t: Tensor) -> Tensor:
        if self.normalize_teacher == "none":
            return f_t
        return layer_norm(f_t.float(), (f_t.shape[2],))

    def learned(self, student: TapOutputs, teacher: TapOutputs, taps: Taps) -> nn.Module:
        made = nn.ModuleDict()
        for part, f_s, f_t, _ in self.pairs(student, teacher):
            made[part] = nn.Linear(f_s.shape[1 if f_s.dim() == 4 else 2], f_t.shape[2])
            if self.standardize == "phi_s":
                made[f"standardize_{part}"] = PHIStandardize(f_t.shape[2])
        return made

    def observe(self, teacher: TapOutputs, learned: nn.Module) -> None:
        for part, f_t, _ in self.targets(teacher):
            if standardize := _part(learned, f"standardize_{part}", PHIStandardize):
                standardize.observe(f_t)

    def similarity(
        self, student: TapOutputs, teacher: TapOutputs, learned: nn.Module
    ) -> Tensor | None:
        """The cosine of each image's pooled features, through the layer, with the target, [B]."""
        layer = _part(learned, "pooled", nn.Linear)
        if layer is None:
            return None
        target = self._normalized(_pooled(teacher, 1))
        if standardize := _part(learned, "standardize_pooled", PHIStandardize):
            target = standardize(target)
        return cosine_similarity(layer(_pooled(student)).float(), target[:, 0].float())

    def __call__(self, outputs: StepOutputs, x: float, learned: nn.Module | None) -> Tensor:
        assert outputs.teacher is not None
        found = []
        for part, f_s, f_t, grid in self.pairs(outputs.student, outputs.teacher):
            layer = _part(learned, part, nn.Linear)
            assert layer is not None
            if standardize := _part(learned, f"standardize_{part}", PHIStandardize):
                f_t = standardize(f_t)
            errors = [
                factor
                * feature_loss(
                    f_s,
                    f_t,
                    layer.weight,
                    layer.bias,
                    kind=kind,
                    beta=self.beta,
                    teacher_grid=grid,
                )
                for kind, factor in (("cosine", self.cosine), ("smooth_l1", self.smooth_l1))
                if factor
            ]
            found.append(torch.stack(errors).sum())
        return self.weight.at(x) * torch.stack(found).mean()


class NST(MapTerm):
    """weight * nst_loss: the student's channels answer to the same positions as the teacher's.

    Neuron selectivity transfer (Huang and Wang, 2017, arXiv:1707.01219), `functional.nst_loss`.
    """

    def __call__(self, outputs: StepOutputs, x: float, learned: nn.Module | None) -> Tensor:
        assert outputs.teacher is not None
        f_s, f_t, grid = self.pair(outputs.student, outputs.teacher)
        return self.weight.at(x) * nst_loss(f_s, f_t, teacher_grid=grid)


class PooledTerm(Term):
    """A term of what both classifiers read."""

    def taps(self) -> tuple[TapSpec, TapSpec]:
        return {"pooled": True}, {"pooled": True}


class MMD(MapTerm):
    """weight * mmd_loss: the student's channels are distributed as the teacher's, over positions.

    Maximum mean discrepancy, Gaussian kernel (Huang and Wang, 2017, arXiv:1707.01219),
    `functional.mmd_loss`.
    """

    # of the kernel: a number, or that of the distances between student and teacher
    bandwidth: Literal["mean", "median"] | Annotated[float, Field(gt=0)] = "mean"

    def __call__(self, outputs: StepOutputs, x: float, learned: nn.Module | None) -> Tensor:
        assert outputs.teacher is not None
        f_s, f_t, grid = self.pair(outputs.student, outputs.teacher)
        loss = mmd_loss(f_s, f_t, bandwidth=self.bandwidth, teacher_grid=grid)
        return self.weight.at(x) * loss


class WKDFeature(MapTerm):
    """weight * wkd_feature_loss: means and deviations of channels, by Wasserstein distance.

    WKD-F (Lv et al., 2024, arXiv:2412.08139), `functional.wkd_feature_loss`. Where the widths
    differ, the student's map goes through a 1x1 convolution that is trained with it and only needed
    in training.
    """

    cells: int = Field(1, ge=1)  # of each side of the grid, with moments of their own
    mean_weight: float = Field(2.0, ge=0)  # of the means, beside that of deviations of 1

    def learned(self, student: TapOutputs, teacher: TapOutputs, taps: Taps) -> nn.Module | None:
        f_s, f_t, _ = self.pair(student, teacher)
        of_t = f_t.shape[1] if f_t.dim() == 4 else f_t.shape[2]
        return nn.Conv2d(f_s.shape[1], of_t, 1) if f_s.shape[1] != of_t else None

    def __call__(self, outputs: StepOutputs, x: float, learned: nn.Module | None) -> Tensor:
        assert outputs.teacher is not None
        f_s, f_t, grid = self.pair(outputs.student, outputs.teacher)
        loss = wkd_feature_loss(
            learned(f_s) if learned else f_s,
            f_t,
            cells=self.cells,
            mean_weight=self.mean_weight,
            teacher_grid=grid,
        )
        return self.weight.at(x) * loss


class SlicedWasserstein(MapTerm):
    """weight * sliced_wasserstein_loss: channels as points, each of length 1 over its positions.

    Transport in one dimension along directions (of features Heitz et al., 2021, arXiv:2006.07229),
    `functional.sliced_wasserstein_loss`. The student's map is resized to the teacher's grid; the
    widths may differ.
    """

    projections: int = Field(64, ge=1)  # directions
    p: float = Field(2.0, ge=1)  # the power of the distance
    seed: int = 0  # of the directions

    def __call__(self, outputs: StepOutputs, x: float, learned: nn.Module | None) -> Tensor:
        assert outputs.teacher is not None
        f_s, f_t, grid = self.pair(outputs.student, outputs.teacher)
        if f_t.dim() == 4:
            grid, f_t = (f_t.shape[2], f_t.shape[3]), f_t.flatten(2).mT
        side = math.isqrt(f_t.shape[1])
        points = resize_map(f_s, grid or (side, side)).flatten(2), f_t.mT
        loss = sliced_wasserstein_loss(
            *(normalize(x.float(), dim=2) for x in points),
            projections=self.projections,
            p=self.p,
            seed=self.seed,
        )
        return self.weight.at(x) * loss
