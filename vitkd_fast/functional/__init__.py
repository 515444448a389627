"""Losses as functions of tensors, differentiable in the student; the teacher is a constant.

A derivative that a loss does not have (the teacher's, a weight's, a second one, one in forward
mode) is an error where it is asked for, never 0. One case is torch's own: a second derivative of
`rkd_loss`, or of a loss without an operation of its own, inside torch.compile is dropped, as that
of exp is there.
"""

from .._extras import require

require("torch", __name__)

from ._rows import Labels as Labels
from .at import at_loss as at_loss
from .attention_map import attention_map_loss as attention_map_loss
from .average import average_logits as average_logits
from .binary_kd import binary_kd_loss as binary_kd_loss
from .cc import cc_loss as cc_loss
from .deit import deit_hard_loss as deit_hard_loss
from .dino import dino_loss as dino_loss
from .dist import dist_loss as dist_loss
from .divergence import js_loss as js_loss
from .divergence import reverse_kl_loss as reverse_kl_loss
from .divergence import tv_loss as tv_loss
from .dkd import dkd_loss as dkd_loss
from .feature import feature_loss as feature_loss
from .fused_linear_kd import fused_linear_kd_loss as fused_linear_kd_loss
from .kd import kd_loss as kd_loss
from .kd_topk import kd_loss_topk as kd_loss_topk
from .mlkd import mlkd_loss as mlkd_loss
from .mmd import mmd_loss as mmd_loss
from .nst import nst_loss as nst_loss
from .ofa import ofa_loss as ofa_loss
from .pkt import pkt_loss as pkt_loss
from .relation import relation_loss as relation_loss
from .rkd import rkd_loss as rkd_loss
from .sliced_wasserstein import sliced_wasserstein_loss as sliced_wasserstein_loss
from .sp import sp_loss as sp_loss
from .spearman import spearman_loss as spearman_loss
from .wkd_feature import wkd_feature_loss as wkd_feature_loss
from .wkd_logit import wkd_cost as wkd_cost
from .wkd_logit import wkd_logit_loss as wkd_logit_loss
