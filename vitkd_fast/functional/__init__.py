"""Losses as functions of tensors, differentiable in the student; the teacher is a constant.

A derivative that a loss does not have (the teacher's, a weight's, a second one, one in forward
mode) is an error where it is asked for, never 0. One case is torch's own: a second derivative of
`feature_loss`, `nst_loss` or `rkd_loss` inside torch.compile is dropped, as that of exp is there.
"""

from .._extras import require

require("torch", __name__)

from ._rows import Labels as Labels
from .at import at_loss as at_loss
from .attention_map import attention_map_loss as attention_map_loss
from .dist import dist_loss as dist_loss
from .divergence import js_loss as js_loss
from .divergence import reverse_kl_loss as reverse_kl_loss
from .divergence import tv_loss as tv_loss
from .dkd import dkd_loss as dkd_loss
from .feature import feature_loss as feature_loss
from .kd import kd_loss as kd_loss
from .kd_topk import kd_loss_topk as kd_loss_topk
from .nst import nst_loss as nst_loss
from .relation import relation_loss as relation_loss
from .rkd import rkd_loss as rkd_loss
