"""Where teacher and student look, as maps [B, h, w], and how far the maps overlap.

Of a vision transformer attention rollout (Abnar & Zuidema, "Quantifying attention flow in
transformers", 2020): the product over the blocks of (A + I) / 2, A the mean over the heads of
softmax(scale * q k^T); its row of the class token, or without one the mean of the patches' rows.
Of a convnet Grad-CAM (Selvaraju et al., 2017), by captum, of the answer that it gives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.stats  # type: ignore[import-untyped]
import torch
import torch.nn.functional as F
from captum.attr import LayerGradCam
from timm.layers.attention import Attention, AttentionRope
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from .. import models
from .._preprocessing import Array
from ..taps import Taps, transformer_blocks

GRID = 28  # rows and columns on which maps are compared
_FINEST = 4  # rows and columns that a map must have to say where
_BATCH = 8
_TOP = 0.25  # of the grid, that is called looked at
# whose maps are softmax(scale q k^T) with nothing added
_PLAIN = (Attention, AttentionRope, EvaAttention)


class NoMap(ValueError):
    """There is no map of where a model looks; the message says why."""


def method(model: nn.Module) -> str:
    """Attention rollout, or Grad-CAM.

    Raises:
        NoMap: a transformer of windows or with a bias, or a hybrid.
    """
    blocks = transformer_blocks(model)
    if not blocks:
        if not getattr(model, "feature_info", None):
            raise NoMap(f"{type(model).__name__}: its maps are not known to timm")
        return "Grad-CAM"
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if grid is None or any(type(block.attn) not in _PLAIN for block in blocks):
        raise NoMap(
            f"{type(model).__name__}: expected a plain vision transformer or a convnet: rollout "
            "has no meaning across windows, biases or stages"
        )
    return "attention rollout"


@torch.inference_mode()
def rollout(model: nn.Module, x: Tensor) -> Tensor:
    """[B, rows, columns] of patches, of normalised images [B, 3, H, W]; each sums to 1 at most."""
    any_model: Any = model
    every = range(len(transformer_blocks(model)))
    taps = Taps(model, attention=every)
    found = taps(x)
    flow: Tensor | None = None
    for i in every:
        scores = taps.scales[i] * found.queries[i] @ found.keys[i].transpose(-2, -1)
        step = scores.float().softmax(-1).mean(1)
        step = (step + torch.eye(step.shape[-1], device=step.device)) / 2
        flow = step if flow is None else step @ flow
    assert flow is not None and taps.grid is not None
    first = taps.prefix_tokens
    by_class_token = first > 0 and getattr(any_model, "global_pool", "token") == "token"
    row = flow[:, 0] if by_class_token else flow[:, first:].mean(1)
    return row[:, first:].unflatten(1, taps.grid)


def last_map(model: nn.Module, size: int) -> nn.Module:
    """The layer with the last map of 4 x 4 or more, of images of this side; a smaller one shows
    nothing."""
    any_model: Any = model
    entries = any_model.feature_info
    fine = [x for x in entries if size // x["reduction"] >= _FINEST] or entries[:1]
    return model.get_submodule(fine[-1]["module"])


def grad_cam(model: nn.Module, x: Tensor) -> Tensor:
    """[B, h, w] of `last_map`, of normalised images [B, 3, H, W]; 0 where nothing speaks for the
    answer."""
    layer = last_map(model, x.shape[-1])
    with torch.enable_grad():
        x = x.clone().requires_grad_()  # a graph, whether or not the weights want gradients
        target = model(x).argmax(1)
        found = LayerGradCam(model, layer).attribute(x, target, relu_attributions=True)
    return found.detach()[:, 0]


def look(loaded: models.Loaded, images: Array) -> Tensor:
    """Where a model looks: maps [N, GRID, GRID] that sum to 1, or are 0, on the CPU.

    Args:
        loaded: by `models.load`.
        images: uint8 [N, H, W, 3], prepared for it.

    Raises:
        NoMap: as `method`.
    """
    of = rollout if method(loaded.model) == "attention rollout" else grad_cam
    normalize = models.predictor(loaded.model, loaded.pixels)[0]
    parts = []
    for part in torch.as_tensor(images).permute(0, 3, 1, 2).split(_BATCH):
        maps = of(loaded.model, normalize(part)).float()
        parts.append(F.interpolate(maps[:, None], (GRID, GRID), mode="bilinear")[:, 0])
    found = torch.cat(parts)
    return found / found.sum((1, 2), keepdim=True).clamp_min(1e-12)


@dataclass(frozen=True)
class Overlap:
    """Of two maps of each image. Chance is of the student's with another image's of the teacher.

    What both models do with any image, such as looking at its middle, is in chance, too.
    """

    top: np.ndarray  # [N] intersection over union of the quarters that they look at most
    rank: np.ndarray  # [N] Spearman's correlation of the two maps
    top_by_chance: float
    rank_by_chance: float
    blind: int  # images without a map of both, which are left out


def overlap(teacher: Tensor, student: Tensor) -> Overlap:
    """Of maps [N, GRID, GRID]."""
    seen = (teacher.sum((1, 2)) > 0) & (student.sum((1, 2)) > 0)
    t, s = (x[seen].flatten(1).double().numpy() for x in (teacher, student))
    others = np.roll(t, 1, axis=0)
    return Overlap(
        _top(t, s),
        _rank(t, s),
        float(_top(others, s).mean()) if len(s) > 1 else float("nan"),
        float(_rank(others, s).mean()) if len(s) > 1 else float("nan"),
        int((~seen).sum()),
    )


def _top(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of the quarters with the largest values, of each row."""
    size = round(_TOP * a.shape[1])
    sets = []
    for x in (a, b):
        kept = np.zeros(x.shape, bool)
        np.put_along_axis(kept, np.argsort(-x, axis=1, kind="stable")[:, :size], True, axis=1)
        sets.append(kept)
    return (sets[0] & sets[1]).sum(1) / (sets[0] | sets[1]).sum(1)


def _rank(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's correlation of each pair of rows; 0 of a constant one."""
    ranks = [scipy.stats.rankdata(x, axis=1) for x in (a, b)]
    a, b = (x - x.mean(1, keepdims=True) for x in ranks)
    size = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return (a * b).sum(1) / np.where(size > 0, size, 1)
