"""Losses as modules: the functions of `vitkd_fast.functional` with their options kept."""

from .._extras import require

require("torch", __name__)

from .attention import AttentionMapProjection as AttentionMapProjection
from .attention import CrossAttentionProjector as CrossAttentionProjector
from .heads import DistillationHead as DistillationHead
from .heads import OFABranches as OFABranches
from .logits import DINOLoss as DINOLoss
from .logits import DISTLoss as DISTLoss
from .logits import DKDLoss as DKDLoss
from .logits import JSLoss as JSLoss
from .logits import KDLoss as KDLoss
from .logits import KDLossTopK as KDLossTopK
from .logits import ReverseKLLoss as ReverseKLLoss
from .logits import TVLoss as TVLoss
from .standardize import PHIStandardize as PHIStandardize
from .temperature import CurriculumTemperature as CurriculumTemperature
from .temperature import LearnableTemperature as LearnableTemperature
from .temperature import entropy_temperature as entropy_temperature
