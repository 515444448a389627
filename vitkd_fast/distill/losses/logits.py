"""Terms of logits."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ...functional import (
    Labels,
    binary_kd_loss,
    deit_hard_loss,
    dist_loss,
    dkd_loss,
    js_loss,
    kd_loss,
    kd_loss_topk,
    mlkd_loss,
    ofa_loss,
    reverse_kl_loss,
    spearman_loss,
    tv_loss,
    wkd_cost,
    wkd_logit_loss,
)
from ...nn import (
    CurriculumTemperature,
    DistillationHead,
    LearnableTemperature,
    OFABranches,
    entropy_temperature,
)
from ...taps import TapOutputs, Taps
from ..datasets import NO_LABEL
from .features import (
    PooledTerm,
)
from .term import (
    ZERO,
    Schedule,
    StepOutputs,
    TapSpec,
    Temperature,
    Term,
    _pooled,
)


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

    def why_labels(self) -> str:
        weights = self.ce_weight.start, self.ce_weight.end
        return "expected ce_weight 0, with losses.ce instead" if any(weights) else ""

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
        ce_weight = self.ce_weight.at(x)
        # without the cross-entropy, an image without a label counts like the others
        labels = outputs.labels if ce_weight else None
        return {
            "student": student, "teacher": teacher, "temperature": temperature,
            "labels": labels, "kd_weight": self.weight.at(x),
            "ce_weight": ce_weight, "label_smoothing": self.label_smoothing,
        }  # fmt: skip


class KD(RowTerm):
    """weight * T^2 * KL(teacher || student) at temperature T + ce_weight * CE(student, labels).

    Hinton, Vinyals and Dean, 2015, arXiv:1503.02531; one fused pass, `functional.kd_loss`.
    """

    standardize: bool = False  # both logits first (Sun et al., 2024, arXiv:2403.01427)
    # of a cached teacher of which K classes were kept, where the rest of the probability goes
    tail: Literal["smooth", "zero", "renorm", "bin"] = "smooth"

    def why_dense(self, temperatures: Collection[float]) -> str:
        if self.standardize:
            return "needs the logits of all classes for standardize"
        if not isinstance(self.temperature, (int, float)):
            return f"needs the logits of all classes for temperature {self.temperature}"
        if self.temperature in temperatures:
            return ""
        kept = ", ".join(f"{t:g}" for t in temperatures)
        return f"needs log-sum-exps at temperature {self.temperature:g}, not at {kept}"

    def __call__(self, outputs: StepOutputs, x: float, learned: nn.Module | None) -> Tensor:
        options = self.options(outputs, x, learned)
        assert outputs.teacher is not None
        if (top := outputs.teacher.top) is None:
            return kd_loss(**options, standardize=self.standardize)
        del options["teacher"]
        sums = top.log_sum_exp[options["temperature"]]
        return kd_loss_topk(
            **options, indices=top.indices, values=top.values, log_sum_exp=sums, tail=self.tail
        )


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
    both, each with its share. Of an image without a label, the teacher's choice stands for it. The
    paper's warm-up is weight: {start: 0, end: 1, until: ...}.
    """

    temperature: Temperature = 4.0
    alpha: float = Field(1.0, ge=0)  # factor of the label's term
    beta: float = Field(8.0, ge=0)  # factor of the other classes' term
    standardize: bool = False  # both logits first (Sun et al., 2024, arXiv:2403.01427)

    def __call__(self, outputs: StepOutputs, x: float, learned: nn.Module | None) -> Tensor:
        options = self.options(outputs, x, learned)
        options |= {"alpha": self.alpha, "beta": self.beta, "standardize": self.standardize}
        choice = options["teacher"].argmax(1)

        def chosen(ids: Tensor) -> Tensor:
            return torch.where(ids == NO_LABEL, choice, ids)

        if isinstance(outputs.labels, Tensor):
            return dkd_loss(**options | {"labels": chosen(outputs.labels)})
        a, b, lam = outputs.labels
        of_a, of_b = (
            dkd_loss(**options | {"labels": chosen(ids), "reduction": "none"}) for ids in (a, b)
        )
        return (lam * of_a + (1 - lam) * of_b).mean()


class DeitHard(Term):
    """weight * ((1 - alpha) CE(student, labels) + alpha CE(student, the teacher's choice)).

    Hard-label distillation (Touvron et al., 2021, arXiv:2012.12877) of the student's one
    classifier, in one pass, `functional.deit_hard_loss`.
    """

    classifies = True

    alpha: float = Field(0.5, ge=0, le=1)  # the teacher's share
    label_smoothing: float = Field(0.0, ge=0, le=1)  # of the labels' term

    def why_labels(self) -> str:
        return "needs a label of each image"

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

    def why_labels(self) -> str:
        return "needs a label of each image"

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
    strides: list[Annotated[int, Field(ge=1)]] = Field([4, 8, 16, 32])
    temperature: float = Field(1.0, gt=0)  # divides all logits; there is no factor T^2
    eps: float = Field(1.0, gt=0)  # above 1: more weight to a label of which the teacher is sure

    def why_labels(self) -> str:
        return "needs a label of each image"

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

    def why_labels(self) -> str:
        return "needs a label of each image"

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
