"""Losses as functions of tensors, differentiable in the student; the teacher is a constant."""

from .attention_map import attention_map_loss as attention_map_loss
from .attention_map import relation_loss as relation_loss
from .kd import Labels as Labels
from .kd import kd_loss as kd_loss
