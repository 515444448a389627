"""Taps: logits, features, maps, tokens, queries and keys of one forward pass of timm's models.

A tap adds no second pass: hooks that exist during one call keep what the model computes. Fused
attention never forms its map, so a tap returns queries and keys, normalised and rotated by the
attention's own modules. The map is

    softmax(scale * q k^T).
"""

from __future__ import annotations

from ._extras import require

require("distill", __name__)

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention, AttentionRope
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models import beit, eva, maxxvit, swin_transformer, swin_transformer_v2, visformer
from torch import Tensor, nn

# those whose forward _queries_and_keys repeats; elsewhere the same names may mean something else
_ATTENTIONS = (Attention, AttentionRope, eva.EvaAttention, beit.Attention,
               swin_transformer.WindowAttention, swin_transformer_v2.WindowAttention,
               visformer.Attention, maxxvit.Attention2d)  # fmt: skip


class TopLogits(NamedTuple):
    """The K largest logits of a teacher that was asked before, of which no more was kept."""

    indices: Tensor  # [B, K] int32
    values: Tensor  # [B, K]
    log_sum_exp: dict[float, Tensor]  # by temperature T: of all logits / T, [B]


@dataclass
class TapOutputs:
    """Outputs of one forward pass, keyed by the strides and blocks given to `Taps`.

    Outside distilled training a DeiT returns the mean of its two heads, and so `logits` is that
    mean. Queries and keys are normalised and rotated but not scaled; keys that heads share are
    repeated; Swin's are per window, [B * windows, heads, N, dim].
    """

    # [B, classes], what the model returns, of a pair the first; [B, 0] where there is `top`
    logits: Tensor
    logits_dist: Tensor | None = None  # [B, classes]
    pooled: Tensor | None = None  # [B, features], read by the classifier (of two, the class head)
    # stride -> [B, C, H, W], the last map of that stride
    maps: dict[int, Tensor] = field(default_factory=dict)
    # block -> [B, N, C], its output, prefix tokens included
    tokens: dict[int, Tensor] = field(default_factory=dict)
    queries: dict[int, Tensor] = field(default_factory=dict)  # block -> [B, heads, N, dim]
    keys: dict[int, Tensor] = field(default_factory=dict)  # block -> [B, heads, N, dim]
    # of every batch norm, with the activation that is a part of it, [B, C, H, W]
    norms: list[Tensor] = field(default_factory=list)
    prefix_tokens: int = 0  # as of the `Taps`
    grid: tuple[int, int] | None = None  # likewise
    top: TopLogits | None = None

    def patches(self, block: int) -> Tensor:
        """[B, patches, C]: the tokens of a block that was tapped, without those in front."""
        return self.tokens[block][:, self.prefix_tokens :]


def _queries_and_keys(
    attn: Any, x: Tensor, rope: Tensor | None, outputs: Mapping[nn.Module, Any]
) -> tuple[Tensor, Tensor]:
    """q and k [B, heads, N, dim] of an attention that has returned from x [B, N, C], or a map.

    `outputs` are its projections': by then with the bias that some attentions add in place.
    """
    qkv = getattr(attn, "qkv", None)
    if qkv is None:
        q, k = outputs[attn.q_proj], outputs[attn.k_proj]
    elif qkv in outputs:
        y = outputs[qkv]
        y = y if y.dim() == 3 else y.flatten(2).transpose(1, 2)  # a hybrid's is a convolution
        if getattr(attn, "head_first", False):  # CoAtNet's: the three of one head, of the next, ...
            y = y.unflatten(-1, (attn.num_heads, 3, -1)).transpose(-2, -3).flatten(-3)
        q, k, _ = y.chunk(3, dim=-1)
    else:  # BEiT, EVA and SwinV2 may use the layer's weight without calling the layer
        bias = torch.cat((attn.q_bias, attn.k_bias))
        q, k = F.linear(x, qkv.weight[: bias.numel()], bias).chunk(2, dim=-1)
    dtype, dim = q.dtype, q.shape[-1] // attn.num_heads
    q, k = (t.unflatten(-1, (-1, dim)).transpose(1, 2) for t in (q, k))
    if hasattr(attn, "q_norm"):
        q, k = attn.q_norm(q), attn.k_norm(k)
    if rope is not None:
        n = attn.num_prefix_tokens
        rotate = partial(apply_rot_embed_cat, emb=rope, half=attn.rotate_half)
        q, k = (torch.cat((t[:, :, :n], rotate(t[:, :, n:])), 2).to(dtype) for t in (q, k))
    if hasattr(attn, "logit_scale"):  # SwinV2: cosines, with one learned scale per head
        scale = attn.logit_scale.clamp(max=math.log(100)).exp()
        q, k = F.normalize(q, dim=-1) * scale, F.normalize(k, dim=-1)
    return q, k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)


def transformer_blocks(model: nn.Module) -> list[Any]:
    """Those with attention, in order; a hybrid's convolutional blocks have none."""
    return [m for m in model.modules() if getattr(m, "attn", None) is not None]


class Taps:
    """Logits, pooled features, maps, tokens, queries and keys of one forward pass.

    The model stays as it is: the hooks are there during a call only, also if it raises. A call
    calls the attribute `model`, which may be set to the DistributedDataParallel around it.

    Args:
        model: from timm.
        pooled: tap what the classifier reads.
        maps: strides to tap. A ViT gives the patch tokens of its last block.
        tokens: blocks to tap; negative numbers count from the end.
        attention: blocks whose queries and keys to tap.
        norms: tap the output of every batch norm.

    Attributes:
        classifier: of the model; of two heads, the class head.
        prefix_tokens: class, distillation and register tokens, in front of the patches.
        grid: rows and columns of patches; None for convnets, Swin and hybrids.
        grids: by tapped block, those that its attention saw: `grid`, or of a hybrid's stage, known
            after a call.
        scales: by tapped block, the factor of q k^T in the softmax; 1 for SwinV2, whose scales
            per head are in the queries. The bias that BEiT, CoAtNet and Swin add is not tapped.

    Raises:
        ValueError: there is no such stride, block or batch norm, or its attention is of an unknown
            kind.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        pooled: bool = False,
        maps: Sequence[int] = (),
        tokens: Sequence[int] = (),
        attention: Sequence[int] = (),
        norms: bool = False,
    ) -> None:
        self.model = cast(Any, model)
        self.prefix_tokens: int = getattr(model, "num_prefix_tokens", 0)
        # Swin's stages, in `layers`, have a grid each
        embed = getattr(model, "patch_embed", None) if hasattr(model, "blocks") else None
        self.grid: tuple[int, int] | None = getattr(embed, "grid_size", None)
        self._nhwc = getattr(model, "output_fmt", "NCHW") == "NHWC"
        heads = self.model.get_classifier()
        head, self._head_dist = heads if isinstance(heads, tuple) else (heads, None)
        self.classifier: nn.Module = head
        self._head = head if pooled else None
        # in the order of the network, so that the last of a stride stays
        strides = {entry["reduction"]: entry["module"] for entry in self.model.feature_info}
        blocks = transformer_blocks(model)
        all_ = range(-len(blocks), len(blocks))
        given = ("maps", maps, strides), ("tokens", tokens, all_), ("attention", attention, all_)
        for name, indices, known in given:
            if missing := [i for i in indices if i not in known]:
                raise ValueError(
                    f"Taps: {name}: expected {list(known) or 'none'} of {type(model).__name__}, "
                    f"got {missing[0]}"
                )
        self._maps = {stride: model.get_submodule(strides[stride]) for stride in maps}
        self._tokens = {i: blocks[i] for i in tokens}
        self._attention: dict[int, Any] = {i: blocks[i].attn for i in attention}
        for i, attn in self._attention.items():
            if type(attn) not in _ATTENTIONS:
                kinds = ", ".join(f"{c.__module__}.{c.__name__}" for c in _ATTENTIONS)
                raise ValueError(f"Taps: attention {i}: expected one of {kinds}, got {type(attn)}")
        self.grids = dict.fromkeys(attention, self.grid)
        self.scales = {i: float(getattr(a, "scale", 1)) for i, a in self._attention.items()}
        kinds_of_norms = nn.modules.batchnorm._BatchNorm
        self._norms = [m for m in model.modules() if norms and isinstance(m, kinds_of_norms)]
        if norms and not self._norms:
            raise ValueError(f"Taps: norms: expected batch norms, {type(model).__name__} has none")
        taps = (*self._maps.values(), *self._tokens.values(), *self._attention.values())
        parts = [getattr(a, p, None) for a in taps for p in ("qkv", "q_proj", "k_proj")]
        self._watched = {*taps, *parts, *self._norms, self._head, self._head_dist} - {None}

    def compile(self, **options: Any) -> None:
        """Compiles what a call runs, by torch.compile with these options."""
        model = self.model

        # torch.compile guards no hooks: what was compiled with them must never run without, and so
        # has a frame of its own
        def tapped(x: Tensor) -> Any:
            return model(x)

        self.model = torch.compile(tapped, **options)

    def _as_map(self, y: Tensor) -> Tensor:
        if y.dim() == 3:
            return y[:, self.prefix_tokens :].transpose(1, 2).unflatten(2, self.grid)
        return y.permute(0, 3, 1, 2) if self._nhwc else y

    def _as_tokens(self, y: Tensor) -> Tensor:
        return y if y.dim() == 3 else self._as_map(y).flatten(2).transpose(1, 2)

    def __call__(self, x: Tensor) -> TapOutputs:
        """Runs the model on x [B, C, H, W], with gradients or without, as the caller has it."""
        inputs: dict[nn.Module, tuple[Tensor, Tensor | None]] = {}
        outputs: dict[nn.Module, Any] = {}

        def keep(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            inputs[module], outputs[module] = (args[0], kwargs.get("rope")), output

        with ExitStack() as hooks:
            for module in self._watched:
                hooks.enter_context(module.register_forward_hook(keep, with_kwargs=True))
            logits = self.model(x)
        pairs = {i: _queries_and_keys(a, *inputs[a], outputs) for i, a in self._attention.items()}
        for i, attn in self._attention.items():
            seen = inputs[attn][0]
            if seen.dim() == 4 and len(seen) == len(x):  # and no window of MaxViT
                self.grids[i] = seen.shape[2], seen.shape[3]
        return TapOutputs(
            logits=logits[0] if isinstance(logits, (tuple, list)) else logits,
            logits_dist=None if self._head_dist is None else outputs[self._head_dist],
            pooled=None if self._head is None else inputs[self._head][0],
            maps={stride: self._as_map(outputs[m]) for stride, m in self._maps.items()},
            tokens={i: self._as_tokens(outputs[m]) for i, m in self._tokens.items()},
            queries={i: q for i, (q, _) in pairs.items()},
            keys={i: k for i, (_, k) in pairs.items()},
            norms=[outputs[m] for m in self._norms],
            prefix_tokens=self.prefix_tokens,
            grid=self.grid,
        )
