"""Every operation in plain PyTorch: the specification, and the fallback backend.

Each function has the signature of the operation of its name in `_ops.py`. Arithmetic is float32
(float64 for float64); intermediates are materialised; nothing synchronises with a device.
"""

from .at import at_loss as at_loss
from .attention_map import JS as JS
from .attention_map import KL as KL
from .attention_map import MSE as MSE
from .attention_map import REVERSE_KL as REVERSE_KL
from .attention_map import AttentionMapOptions as AttentionMapOptions
from .attention_map import attention_map_bwd as attention_map_bwd
from .attention_map import attention_map_fwd as attention_map_fwd
from .attention_map import attention_map_fwd_grad as attention_map_fwd_grad
from .binary_kd import BinaryKDOptions as BinaryKDOptions
from .binary_kd import binary_kd_bwd as binary_kd_bwd
from .binary_kd import binary_kd_fwd as binary_kd_fwd
from .binary_kd import binary_kd_fwd_grad as binary_kd_fwd_grad
from .binary_kd import binary_kd_loss as binary_kd_loss
from .cc import cc_loss as cc_loss
from .deit import deit_hard_loss as deit_hard_loss
from .dino import dino_loss as dino_loss
from .dist import dist_bwd as dist_bwd
from .dist import dist_loss as dist_loss
from .dist import dist_moments as dist_moments
from .feature import feature_loss as feature_loss
from .fused_linear_kd import fused_linear_kd_loss as fused_linear_kd_loss
from .int8 import int8_dwconv as int8_dwconv
from .int8 import int8_dwconv_shape as int8_dwconv_shape
from .int8 import int8_pwconv as int8_pwconv
from .int8 import int8_pwconv_shape as int8_pwconv_shape
from .kd import MEAN as MEAN
from .kd import NONE as NONE
from .kd import SUM as SUM
from .kd import KDOptions as KDOptions
from .kd import kd_bwd as kd_bwd
from .kd import kd_fwd as kd_fwd
from .kd import kd_fwd_grad as kd_fwd_grad
from .kd import kd_scale_ as kd_scale_
from .kd_topk import TAIL_BIN as TAIL_BIN
from .kd_topk import TAIL_RENORM as TAIL_RENORM
from .kd_topk import TAIL_SMOOTH as TAIL_SMOOTH
from .kd_topk import TAIL_ZERO as TAIL_ZERO
from .kd_topk import KDTopKOptions as KDTopKOptions
from .kd_topk import kd_topk_bwd as kd_topk_bwd
from .kd_topk import kd_topk_fwd as kd_topk_fwd
from .kd_topk import kd_topk_fwd_grad as kd_topk_fwd_grad
from .mlkd import mlkd_loss as mlkd_loss
from .mmd import mmd_loss as mmd_loss
from .nst import nst_loss as nst_loss
from .ofa import ofa_loss as ofa_loss
from .pkt import pkt_loss as pkt_loss
from .rkd import rkd_fwd_grad as rkd_fwd_grad
from .rkd import rkd_loss as rkd_loss
from .row_loss import DIVERGENCES as DIVERGENCES
from .row_loss import RowLossOptions as RowLossOptions
from .row_loss import row_loss_bwd as row_loss_bwd
from .row_loss import row_loss_fwd as row_loss_fwd
from .row_loss import row_loss_fwd_grad as row_loss_fwd_grad
from .sliced_wasserstein import sliced_wasserstein_loss as sliced_wasserstein_loss
from .sp import sp_loss as sp_loss
from .spearman import spearman_loss as spearman_loss
from .wkd_feature import wkd_feature_loss as wkd_feature_loss
from .wkd_logit import wkd_logit_loss as wkd_logit_loss
