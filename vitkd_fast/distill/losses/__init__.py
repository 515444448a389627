"""The terms of a run's loss: one class each, which is its options in YAML and its computation.

A new loss is a class in a file here and a field of `Losses`, whose name is its key in YAML.
"""

from __future__ import annotations

from collections.abc import Iterator

from .features import AT as AT
from .features import MMD as MMD
from .features import NST as NST
from .features import Feature as Feature
from .features import Features as Features
from .features import MapTerm as MapTerm
from .features import PooledTerm as PooledTerm
from .features import SlicedWasserstein as SlicedWasserstein
from .features import WKDFeature as WKDFeature
from .logits import BCE as BCE
from .logits import CE as CE
from .logits import DIST as DIST
from .logits import DKD as DKD
from .logits import JS as JS
from .logits import KD as KD
from .logits import MLKD as MLKD
from .logits import OFA as OFA
from .logits import TV as TV
from .logits import BinaryKD as BinaryKD
from .logits import ClassCosts as ClassCosts
from .logits import DeitHard as DeitHard
from .logits import ReverseKL as ReverseKL
from .logits import RowTerm as RowTerm
from .logits import Spearman as Spearman
from .logits import Token as Token
from .logits import WKDLogit as WKDLogit
from .quantizable import KURE as KURE
from .relations import CC as CC
from .relations import PKT as PKT
from .relations import RKD as RKD
from .relations import SP as SP
from .relations import Attention as Attention
from .relations import Relation as Relation
from .term import ONE as ONE
from .term import ZERO as ZERO
from .term import Ramp as Ramp
from .term import Schedule as Schedule
from .term import Section as Section
from .term import StepOutputs as StepOutputs
from .term import TapSpec as TapSpec
from .term import Temperature as Temperature
from .term import Term as Term


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
    kure: KURE | None = None

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
        """Without a teacher: the cross-entropy, with the same label smoothing, and kure."""
        if self.independent:
            return Losses(bce=BCE(), kure=self.kure)
        terms = (term for term in (self.kd, self.ce) if term)
        smoothing = max((term.label_smoothing for term in terms), default=0.0)
        return Losses(ce=CE(label_smoothing=smoothing), kure=self.kure)

    def without(self, name: str) -> Losses:
        """All terms but one."""
        return self.model_copy(update={name: None})
