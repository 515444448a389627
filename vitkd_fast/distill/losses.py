"""The terms of a run's loss: one class each, which is its options in YAML and its computation.

A new loss is a class here and a field of `Losses`, whose name is its key in a configuration.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeAlias, TypeVar

import torch
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, layer_norm, normalize

from ..functional import (
    Labels,
    at_loss,
    binary_kd_loss,
    cc_loss,
    deit_hard_loss,
    dist_loss,
    dkd_loss,
    feature_loss,
    js_loss,
    kd_loss,
    mlkd_loss,
    mmd_loss,
    nst_loss,
    ofa_loss,
    pkt_loss,
    relation_loss,
    reverse_kl_loss,
    rkd_loss,
    sliced_wasserstein_loss,
    sp_loss,
    spearman_loss,
    tv_loss,
    wkd_cost,
    wkd_feature_loss,
    wkd_logit_loss,
)
from ..functional._features import resize_map
from ..nn import (
    AttentionMapProjection,
    CurriculumTemperature,
    DistillationHead,
    LearnableTemperature,
    OFABranches,
    PHIStandardize,
    entropy_temperature,
)
from ..taps import TapOutputs, Taps

TapSpec: TypeAlias = Mapping[str, tuple[int, ...] | bool]  # arguments of Taps


_Part = TypeVar("_Part", bound=nn.Module)


class StepOutputs(NamedTuple):
    """Outputs of student and teacher for a batch, and its labels."""

    student: TapOutputs
    teacher: TapOutputs | None
    labels: Labels


class Section(BaseModel):
    """A part of the configuration: unknown keys and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Ramp(Section):
    """A number that goes from `start` to `end` within the first `until` of a run, then stays."""

    start: float
    end: float
    until: float = Field(1.0, gt=0, le=1)
    shape: Literal["linear", "cosine"] = "linear"

    def at(self, progress: float) -> float:
        """The value after this share of the run, 0 to 1."""
        x = min(progress / self.until, 1.0)
        if self.shape == "cosine":
            x = (1 - math.cos(math.pi * x)) / 2
        return self.start + (self.end - self.start) * x


def _constant(value: Any) -> Any:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return {"start": value, "end": value}
    return value


Schedule = Annotated[Ramp, BeforeValidator(_constant)]


def _temperature(value: float | str) -> float | str:
    names = ("learned", "curriculum", "entropy")
    if value in names or (isinstance(value, float | int) and value > 0):
        return value
    raise ValueError(f"expected a number > 0, {', '.join(names[:-1])} or {names[-1]}")


Temperature = Annotated[float | str, AfterValidator(_temperature)]
ONE, ZERO = Ramp(start=1, end=1), Ramp(start=0, end=0)


class Term(Section):
    """One term of the loss, times its weight."""

    distils: ClassVar[bool] = True  # compares the student with a teacher
    classifies: ClassVar[bool] = False  # trains the student's classifier
    averages: ClassVar[bool] = False  # compares logits alone, of several teachers their average
    independent: ClassVar[bool] = False  # of classes that are not exclusive: several labels

    weight: Schedule = ONE  # factor of the term

    def taps(self) -> tuple[TapSpec, TapSpec]:
        """Arguments of `Taps` for student and teacher; logits are always there."""
        return {}, {}

    def learned(self, student: TapOutputs, teacher: TapOutputs, taps: Taps) -> nn.Module | None:
        """The module that is trained with the student, from one output of the taps, or None."""
        return None

    def learned_alone(self) -> nn.Module | None:
        """The same of a module that depends on no output."""
        return None

    def among_teachers(self) -> Term:
        """The term of one of several teachers."""
        return self

    def observe(self, teacher: TapOutputs, learned: nn.Module) -> None:
        """Adds a teacher's outputs to the statistics of what is learned, before any training."""

    @abstractmethod
    def __call__(self, outputs: StepOutputs, x: float, learned: nn.Module | None) -> Tensor:
        """The term, 0-dim, after the share x of the run."""


class CE(Term):
    """weight * CE(student, labels), the loss of a student without a teacher."""

    distils = False
    classifies = True

    label_smoothing: float = Field(0.0, ge=0, le=1)  # of the cross-entropy

    def __call__(self, outputs: StepOutputs, x: float, learned: nn.Module | None) -> Tensor:
        student = outputs.student.logits
        return kd_loss(
            student,
            student.detach(),  # its own teacher at weight 0, for the pass that takes mixed labels
            labels=outputs.labels,
            kd_weight=0.0,
            ce_weight=self.weight.at(x),
            label_smoothing=self.label_smoothing,
        )


class RowTerm(Term):
    """A loss of the logits with a cross-entropy beside it, in one pass."""

    classifies = True

    # divides both logits: a number; "learned"; "curriculum", learned against the student (Li et
    # al., 2023, arXiv:2211.16231); "entropy": of each image, 4 where the teacher is sure and 1
    # where it is not
    temperature: Temperature = 1.0
    ce_weight: Schedule = ZERO  # factor of the cross-entropy
    label_smoothing: float = Field(0.0, ge=0, le=1)  # of the cross-entropy

    def learned_alone(self) -> nn.Module | None:
        if self.temperature == "learned":
            return LearnableTemperature()
        return CurriculumTemperature() if self.temperature == "curriculum" else None

    def options(self, outputs: StepOutputs, x: float, learned: nn.Module | None) -> dict[str, Any]:
        """Student, teacher and what the losses have in common."""
        assert outputs.teacher is not None
        student, teacher = outputs.student.logits, outputs.teacher.logits
        temperature: Any = self.temperature
        if isinstance(learned, CurriculumTemperature):
            temperature = learned(student, teacher, x)
        elif learned is not None:
            temperature = learned()
        elif temperature == "entropy":
            temperature = entropy_temperature(teacher)
        return {
            "student": student, "teacher": teacher, "temperature": temperature,
            "labels": outputs.labels, "kd_weight": self.weight.at(x),
            "ce_weight": self.ce_weight.at(x), "label_smoothing": self.label_smoothing,
        }  # fmt: skip


class KD(RowTerm):
    """weight * T^2 * KL(teacher || student) at temperature T + ce_weight * CE(student, labels).

    Hinton, Vinyals and Dean, 2015, arXiv:1503.02531; one fused pass, `functional.kd_loss`.
    """

    standardize: bool = False  # both logits first (Sun et al., 2024, arXiv:2403.01427)

    def __call__(self, outputs: StepOutputs, x: float, learned: nn.Module | None) -> Tensor:
        return kd_loss(**self.options(outputs, x, learned), standardize=self.standardize)


class ReverseKL(RowTerm):
    """weight * T^2 * KL(student || teacher) at temperature T + ce_weight * CE(student, labels).

    Gu et al., 2024, arXiv:2306.08543; `functional.reverse_kl_loss`.
    """

    def __call__(self, outputs: StepOutputs, x: float, learned: nn.Module | None) -> Tensor:
        return reverse_kl_loss(**self.options(outputs, x, learned))


class JS(RowTerm):
    """weight * T^2 * the Jensen-Shannon divergence at temperature T + ce_weight * CE.

    Agarwal et al., 2024, arXiv:2306.13649; `functional.js_loss`.
    """

    beta: float = Field(0.5, gt=0, lt=1)  # of the teacher in the mixture

    def __call__(self, outputs: StepOutputs, x: float, learned: nn.Module | None) -> Tensor:
        return js_loss(**self.options(outputs, x, learned), beta=self.beta)


class TV(RowTerm):
    """weight * T^2 * the total variation distance at temperature T + ce_weight * CE.

    Wen et al., 2023, arXiv:2307.15190; `functional.tv_loss`.
    """

    def __call__(self, outputs: StepOutputs, x: float, learned: nn.Module | None) -> Tensor:
        return tv_loss(**self.options(outputs, x, learned))


class DKD(RowTerm):
    """weight * T^2 * (alpha KL of the label and the rest + beta KL of the rest) + ce_weight * CE.

    Zhao et al., 2022, arXiv:2203.08679; `functional.dkd_loss`. Mixed labels have the losses of
    both, each with its share. The paper's warm-up is weight: {start: 0, end: 1, until: ...}.
    """

    temperature: Temperature = 4.0
    alpha: float = Field(1.0, ge=0)  # factor of the label's term
    beta: float = Field(8.0, ge=0)  # factor of the other classes' term
    standardize: bool = False  # both logits first (Sun et al., 2024, arXiv:2403.01427)

    def __call__(self, outputs: StepOutputs, x: float, learned: nn.Module | None) -> Tensor:
        options = self.options(outputs, x, learned)
        options |= {"alpha": self.alpha, "beta": self.beta, "standardize": self.standardize}
        if isinstance(outputs.labels, Tensor):
            return dkd_loss(**options)
        a, b, lam = outputs.labels
        of_a, of_b = (dkd_loss(**options | {"labels": ids, "reduction": "none"}) for ids in (a, b))
        return (lam * of_a + (1 - lam) * of_b).mean()


class DeitHard(Term):
    """weight * ((1 - alpha) CE(student, labels) + alpha CE(student, the teacher's choice)).

    Hard-label distillation (Touvron et al., 2021, arXiv:2012.12877) of the student's one
    classifier, in one pass, `functional.deit_hard_loss`.
    """

    classifies = True

    alpha: float = Field(0.5, ge=0, le=1)  # the teacher's share
    label_smoothing: float = Field(0.0, ge=0, le=1)  # of the labels' term

    def __call__(self, outputs: StepOutputs, x: float, learned: nn.Module | None) -> Tensor:
        assert outputs.teacher is not None
        return self.weight.at(x) * deit_hard_loss(
            outputs.student.logits,
            outputs.teacher.logits,
            outputs.labels,
            alpha=self.alpha,
            label_smoothing=self.label_smoothing,
        )


class Token(Term):
    """weight * ((1 - alpha) CE(one head, labels) + alpha KD(another head, teacher)).

    DeiT's distillation through a head of its own (Touvron et al., 2021, arXiv:2012.12877). A
    student of one classifier gets the other head by `nn.DistillationHead`, which is only needed in
    training: the classifier is the mean of both, and so what is evaluated, saved and made int8. A
    student of two heads, such as a distilled DeiT, keeps its own.
    """

    classifies = True
    averages = True

    # hard: the cross-entropy of the class that the teacher chooses; soft: T^2 KL
    kind: Literal["hard", "soft"] = "hard"
    alpha: float = Field(0.5, ge=0, le=1)  # the teacher's share
    temperature: float = Field(1.0, gt=0)  # of soft
    label_smoothing: float = Field(0.0, ge=0, le=1)  # of the labels' term

    def taps(self) -> tuple[TapSpec, TapSpec]:
        return {"pooled": True}, {"pooled": True}

    def learned(self, student: TapOutputs, teacher: TapOutputs, taps: Taps) -> nn.Module | None:
        if student.logits_dist is not None:
            return None
        assert student.pooled is not None
        return DistillationHead(student.pooled.flatten(1).shape[1], student.logits.shape[1])

    def __call__(self, outputs: StepOutputs, x: float, learned: nn.Module | None) -> Tensor:
        assert outputs.teacher is not None
        student, teacher, weight = outputs.student, outputs.teacher.logits, self.weight.at(x)
        if learned is not None:
            heads = learned(student.pooled, student.logits)
        else:  # the logits of two heads are their mean
            assert student.logits_dist is not None
            heads = 2 * student.logits - student.logits_dist, student.logits_dist
        if self.kind == "hard":
            return weight * deit_hard_loss(
                heads,
                teacher,
                outputs.labels,
                alpha=self.alpha,
                label_smoothing=self.label_smoothing,
            )
        hard = kd_loss(
            heads[0],
            heads[0].detach(),
            labels=outputs.labels,
            kd_weight=0.0,
            ce_weight=weight * (1 - self.alpha),
            label_smoothing=self.label_smoothing,
        )
        return hard + kd_loss(
            heads[1], teacher, temperature=self.temperature, kd_weight=weight * self.alpha
        )


class OFA(Term):
    """weight * ofa_loss, summed over the student's logits and those of a branch at each stride.

    Distillation between unlike architectures (Hao et al., 2023, arXiv:2310.19444),
    `functional.ofa_loss`. The branches are those of `nn.OFABranches`, which are trained with the
    student and only needed in training.
    """

    classifies = True
    averages = True

    # of the student's maps, from the first to the last
    strides: list[Annotated[int, Field(ge=1)]] = [4, 8, 16, 32]
    temperature: float = Field(1.0, gt=0)  # divides all logits; there is no factor T^2
    eps: float = Field(1.0, gt=0)  # above 1: more weight to a label of which the teacher is sure

    def taps(self) -> tuple[TapSpec, TapSpec]:
        return {"maps": tuple(self.strides), "pooled": True}, {"pooled": True}

    def learned(self, student: TapOutputs, teacher: TapOutputs, taps: Taps) -> nn.Module | None:
        channels = [student.maps[stride].shape[1] for stride in self.strides]
        width = max(_pooled(x).shape[1] for x in (student, teacher))
        return OFABranches(channels, student.logits.shape[1], width)

    def __call__(self, outputs: StepOutputs, x: float, learned: nn.Module | None) -> Tensor:
        assert outputs.teacher is not None and learned is not None
        branches = learned([outputs.student.maps[stride] for stride in self.strides])
        loss = ofa_loss(
            [*branches, outputs.student.logits],
            outputs.teacher.logits,
            outputs.labels,
            temperature=self.temperature,
            eps=self.eps,
        )
        return self.weight.at(x) * loss


class DIST(Term):
    """weight * T^2 * (beta (1 - rho of rows) + gamma (1 - rho of classes)), rho: Pearson's.

    Huang et al., 2022, arXiv:2205.10536; `functional.dist_loss`, over all processes of a run.
    """

    temperature: float = Field(1.0, gt=0)  # divides both logits
    beta: float = Field(1.0, ge=0)  # factor of the rows' correlations, over their classes
    gamma: float = Field(1.0, ge=0)  # factor of the classes' correlations, over the batch

    def __call__(self, outputs: StepOutputs, x: float, learned: nn.Module | None) -> Tensor:
        assert outputs.teacher is not None
        loss = dist_loss(
            outputs.student.logits,
            outputs.teacher.logits,
            temperature=self.temperature,
            beta=self.beta,
            gamma=self.gamma,
            sync=True,
        )
        return self.weight.at(x) * loss


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


class BCE(Term):
    """weight * BCE(student, labels), of images with several labels, without a teacher."""

    distils = False
    classifies = True
    independent = True

    def __call__(self, outputs: StepOutputs, x: float, learned: nn.Module | None) -> Tensor:
        student = outputs.student.logits
        return binary_kd_loss(
            student,
            student.detach(),
            _mixed(outputs.labels),
            kd_weight=0.0,
            bce_weight=self.weight.at(x),
        )


class BinaryKD(Term):
    """weight * T^2 * KL of each class's sigmoid at T + bce_weight * BCE(student, labels).

    Of images with several labels, or none (`data.labels`); `functional.binary_kd_loss`.
    """

    classifies = True
    independent = True

    temperature: float = Field(1.0, gt=0)  # divides both logits
    bce_weight: Schedule = ZERO  # factor of the cross-entropy

    def __call__(self, outputs: StepOutputs, x: float, learned: nn.Module | None) -> Tensor:
        assert outputs.teacher is not None
        return binary_kd_loss(
            outputs.student.logits,
            outputs.teacher.logits,
            _mixed(outputs.labels),
            temperature=self.temperature,
            kd_weight=self.weight.at(x),
            bce_weight=self.bce_weight.at(x),
        )


def _mixed(labels: Labels) -> Tensor:
    """Multi-hot labels [B, classes], of mixed images the mixture."""
    if isinstance(labels, Tensor):
        return labels
    a, b, share = labels
    if isinstance(share, Tensor) and share.dim():
        share = share.unsqueeze(1)
    return a * share + b * (1 - share)


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


def _pooled(outputs: TapOutputs, *tokens: int) -> Tensor:
    """What a classifier reads, [B, features], or with so many tokens in between."""
    x = outputs.pooled
    assert x is not None
    return x.reshape(len(x), *tokens, -1)


def _part(learned: nn.Module | None, name: str, kind: type[_Part]) -> _Part | None:
    """One of the modules that a term learns."""
    part = learned[name] if isinstance(learned, nn.ModuleDict) and name in learned else None
    return part if isinstance(part, kind) else None


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


class MLKD(Term):
    """weight * mlkd_loss: rows, and which of them and of the classes are alike, at temperatures.

    Multi-level logit distillation (Jin, Wang and Lin, CVPR 2023), `functional.mlkd_loss`.
    """

    classifies = True

    # each divides both logits
    temperatures: list[Annotated[float, Field(gt=0)]] = Field([2, 3, 4, 5, 6], min_length=1)
    kd_weight: float = Field(1.0, ge=0)  # of the rows
    batch_weight: float = Field(1.0, ge=0)  # of the Gram matrices of rows
    class_weight: float = Field(1.0, ge=0)  # of those of classes

    def __call__(self, outputs: StepOutputs, x: float, learned: nn.Module | None) -> Tensor:
        assert outputs.teacher is not None
        loss = mlkd_loss(
            outputs.student.logits,
            outputs.teacher.logits,
            temperatures=self.temperatures,
            kd_weight=self.kd_weight,
            batch_weight=self.batch_weight,
            class_weight=self.class_weight,
        )
        return self.weight.at(x) * loss


class Spearman(Term):
    """weight * spearman_loss: the student's classes in the teacher's order.

    The correlation of ranks, `functional.spearman_loss`.
    """

    classifies = True

    softness: float = Field(0.1, gt=0)  # of the student's ranks, in units of its logits

    def __call__(self, outputs: StepOutputs, x: float, learned: nn.Module | None) -> Tensor:
        assert outputs.teacher is not None
        loss = spearman_loss(outputs.student.logits, outputs.teacher.logits, softness=self.softness)
        return self.weight.at(x) * loss


class ClassCosts(nn.Module):
    """What it costs to take a class for another: nothing that is learned."""

    cost: Tensor  # [classes, classes]

    def __init__(self, classes: Tensor, sharpness: float) -> None:
        super().__init__()
        self.register_buffer("cost", wkd_cost(classes, sharpness))


class WKDLogit(PooledTerm):
    """weight * wkd_logit_loss: transport of the probabilities of the classes but the label's.

    WKD-L (Lv et al., 2024, arXiv:2412.08139), `functional.wkd_logit_loss`. Classes are as far apart
    as their rows of the teacher's classifier; of mixed labels, the one of the larger share counts.
    """

    classifies = True

    temperature: float = Field(2.0, gt=0)  # divides both logits
    regularization: float = Field(0.05, gt=0)  # of the plan's entropy
    iterations: int = Field(10, ge=1)  # of Sinkhorn
    sharpness: float = Field(2.0, gt=0)  # of the costs
    target_weight: float = Field(1.0, ge=0)  # of the label's own probability
    transport_weight: float = Field(1.0, ge=0)  # of the other classes

    def learned(self, student: TapOutputs, teacher: TapOutputs, taps: Taps) -> nn.Module | None:
        weight = getattr(taps.classifier, "weight", None)
        if not isinstance(weight, Tensor) or len(weight) != teacher.logits.shape[1]:
            raise ValueError(
                "wkd_logit: teacher: expected a classifier with a row of weights for each class, "
                f"got {taps.classifier}"
            )
        return ClassCosts(weight.float().flatten(1), self.sharpness)

    def __call__(self, outputs: StepOutputs, x: float, learned: nn.Module | None) -> Tensor:
        assert outputs.teacher is not None and isinstance(learned, ClassCosts)
        labels = outputs.labels
        if not isinstance(labels, Tensor):
            first, second, share = labels
            if not isinstance(share, Tensor):
                labels = first if share >= 0.5 else second
            else:
                labels = torch.where(share >= 0.5, first, second)
        loss = wkd_logit_loss(
            outputs.student.logits,
            outputs.teacher.logits,
            learned.cost,
            labels,
            temperature=self.temperature,
            regularization=self.regularization,
            iterations=self.iterations,
            target_weight=self.target_weight,
            transport_weight=self.transport_weight,
        )
        return self.weight.at(x) * loss


def _heads(side: str, x: Tensor, heads: int) -> Tensor:
    """[B, N, C] as [B, heads, N, C / heads]."""
    if x.shape[2] % heads:
        raise ValueError(
            f"relation: heads: expected a divisor of the {side}'s {x.shape[2]} channels, "
            f"got {heads}"
        )
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


class Losses(Section):
    """The terms that are added up; each is left out until it is named."""

    kd: KD | None = None
    ce: CE | None = None
    reverse_kl: ReverseKL | None = None
    js: JS | None = None
    tv: TV | None = None
    dkd: DKD | None = None
    deit_hard: DeitHard | None = None
    token: Token | None = None
    ofa: OFA | None = None
    dist: DIST | None = None
    attention: Attention | None = None
    at: AT | None = None
    feature: Feature | None = None
    features: Features | None = None
    nst: NST | None = None
    rkd: RKD | None = None
    relation: Relation | None = None
    sp: SP | None = None
    pkt: PKT | None = None
    cc: CC | None = None
    mmd: MMD | None = None
    wkd_feature: WKDFeature | None = None
    sliced_wasserstein: SlicedWasserstein | None = None
    mlkd: MLKD | None = None
    spearman: Spearman | None = None
    wkd_logit: WKDLogit | None = None
    binary_kd: BinaryKD | None = None
    bce: BCE | None = None

    def terms(self) -> Iterator[tuple[str, Term]]:
        """The terms that were named, with their names."""
        for name in type(self).model_fields:
            if (term := getattr(self, name)) is not None:
                yield name, term

    @property
    def independent(self) -> bool:
        """Whether classes are not exclusive."""
        return any(term.independent for _, term in self.terms())

    def baseline(self) -> Losses:
        """Without a teacher: the cross-entropy, with the same label smoothing."""
        if self.independent:
            return Losses(bce=BCE())
        terms = (term for term in (self.kd, self.ce) if term)
        smoothing = max((term.label_smoothing for term in terms), default=0.0)
        return Losses(ce=CE(label_smoothing=smoothing))
