"""relation_loss: attention_map_loss of one tensor of each side with itself."""

from __future__ import annotations

from torch import Tensor

from ._common import check_tensors
from .attention_map import check_maps, loss_of_maps


def relation_loss(
    x_s: Tensor,
    x_t: Tensor,
    *,
    scale_s: float | None = None,
    scale_t: float | None = None,
    temperature: float = 1.0,
    kind: str = "kl",
    key_mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """attention_map_loss of x with itself: T^2 * KL(softmax(x_t x_t^T) || softmax(x_s x_s^T)).

    With values, MiniLM's value relations (Wang et al., 2020, arXiv:2002.10957); with any q, k or v
    re-split into relation heads, MiniLMv2's (arXiv:2012.15828); with token features, which of an
    image's tokens are alike (the Gram matrix).

    Args:
        x_s: the student's, [batch, heads, tokens, dim], or [batch, tokens, dim] for one head.
        x_t: the teacher's, likewise; its dim may be another.
        scale_s, scale_t, temperature, kind, key_mask, reduction: as in `attention_map_loss`.

    Returns:
        The loss, as `attention_map_loss` gives it; "none" gives x_s's shape without dim.

    Raises:
        ValueError, TypeError, RuntimeError: as `attention_map_loss`.
    """
    name = "relation_loss"
    check_tensors(name, {"x_s": x_s, "x_t": x_t})
    for argument, x in (("x_s", x_s), ("x_t", x_t)):
        if x.dim() not in (3, 4) or x.dim() != x_s.dim():
            raise ValueError(
                f"{name}: {argument}: expected [batch, heads, tokens, dim] or [batch, tokens, dim] "
                f"for both, got {list(x.shape)}"
            )
    if x_s.shape[:-1] != x_t.shape[:-1]:
        names = ("batch", "heads", "tokens") if x_s.dim() == 4 else ("batch", "tokens")
        what = next(
            n for n, a, b in zip(names, x_s.shape, x_t.shape, strict=False) if a != b
        )  # fmt: skip
        raise ValueError(
            f"{name}: x_t: expected the {what} of x_s {list(x_s.shape)}, got {list(x_t.shape)}"
        )
    one_head = x_s.dim() == 3
    if one_head:
        x_s, x_t = x_s.unsqueeze(1), x_t.unsqueeze(1)
    check_maps(name, {"x_s": x_s, "x_t": x_t})
    loss = loss_of_maps(
        name, x_s, x_s, x_t, x_t, scale_s, scale_t, temperature, kind, key_mask, reduction
    )  # fmt: skip
    return loss.squeeze(1) if one_head and reduction == "none" else loss
