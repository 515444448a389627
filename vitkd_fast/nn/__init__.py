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
from .losses import ATLoss as ATLoss
from .losses import AttentionMapLoss as AttentionMapLoss
from .losses import BinaryKDLoss as BinaryKDLoss
from .losses import CCLoss as CCLoss
from .losses import DeiTHardLoss as DeiTHardLoss
from .losses import FeatureLoss as FeatureLoss
from .losses import FusedLinearKDLoss as FusedLinearKDLoss
from .losses import MLKDLoss as MLKDLoss
from .losses import MMDLoss as MMDLoss
from .losses import NSTLoss as NSTLoss
from .losses import OFALoss as OFALoss
from .losses import PKTLoss as PKTLoss
from .losses import RelationLoss as RelationLoss
from .losses import RKDLoss as RKDLoss
from .losses import SlicedWassersteinLoss as SlicedWassersteinLoss
from .losses import SpearmanLoss as SpearmanLoss
from .losses import SPLoss as SPLoss
from .losses import WKDFeatureLoss as WKDFeatureLoss
from .losses import WKDLogitLoss as WKDLogitLoss
from .standardize import PHIStandardize as PHIStandardize
from .temperature import CurriculumTemperature as CurriculumTemperature
from .temperature import LearnableTemperature as LearnableTemperature
from .temperature import entropy_temperature as entropy_temperature
