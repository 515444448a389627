"""Losses of features and embeddings in tests, each by one name beside its usual form."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vitkd_fast import reference
from vitkd_fast.functional import (
    at_loss,
    cc_loss,
    feature_loss,
    mmd_loss,
    nst_loss,
    pkt_loss,
    rkd_loss,
    sliced_wasserstein,
    sliced_wasserstein_loss,
    sp_loss,
    wkd_feature_loss,
)

OPS = torch.ops.vitkd_fast
HALF, BFLOAT, FLOAT, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64

every_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
)
every_dtype = pytest.mark.parametrize("dtype", [FLOAT, HALF, BFLOAT, DOUBLE], ids=str)
KINDS = ["mse", "cosine", "smooth_l1"]


def draw(*shape: int, dtype: torch.dtype = FLOAT, device: str = "cpu") -> Tensor:
    return torch.randn(shape, dtype=DOUBLE).to(device, dtype)


def as_tokens(x: Tensor) -> Tensor:
    return x.flatten(2).mT


# each loss by one name: how it is called here, its usual form, and what it takes


def feature(x: Tensor, t: Tensor, kind: str = "mse", **options: Any) -> Tensor:
    """feature_loss with a projection that depends on the channels alone."""
    if (weight := options.pop("weight", None)) is None:
        generator = torch.Generator().manual_seed(1)
        c_s = x.shape[1] if x.dim() == 4 else x.shape[2]
        c_t = t.shape[1] if t.dim() == 4 else t.shape[2]
        weight = torch.randn(c_t, c_s, generator=generator, dtype=DOUBLE)
        weight = weight.to(x.device, x.dtype)
    return feature_loss(x, t, weight, kind=kind, **options)


def usual_feature(x: Tensor, t: Tensor, kind: str = "mse") -> Tensor:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(t.shape[1], x.shape[1], generator=generator, dtype=DOUBLE)
    return reference.feature_loss(as_tokens(x), as_tokens(t), weight.to(x.device), kind=kind)


def embedded(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A loss of embeddings, of maps."""
    return lambda x, t, **options: loss(x.flatten(1), t.flatten(1), **options)


def as_wide(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A loss of as many channels of both sides: those that both have."""

    def cut(x: Tensor, channels: int) -> Tensor:
        if x.shape[dim := 1 if x.dim() == 4 else 2] == channels:
            return x
        return x.narrow(dim, 0, channels)

    def run(x: Tensor, t: Tensor, **options: Any) -> Tensor:
        channels = min(a.shape[1 if a.dim() == 4 else 2] for a in (x, t))
        return loss(cut(x, channels), cut(t, channels), **options)

    return run


def sliced(x: Tensor, t: Tensor, **options: Any) -> Tensor:
    """sliced_wasserstein_loss of channels, over positions."""
    return sliced_wasserstein_loss(x.flatten(2), t.flatten(2), projections=5, **options)


def usual_sliced(x: Tensor, t: Tensor) -> Tensor:
    across = sliced_wasserstein._directions(x[0, 0].numel(), 5, 0).to(x.device)
    return reference.sliced_wasserstein_loss(x.flatten(2), t.flatten(2), across).mean()


EMBEDDED = ["rkd", "sp", "pkt", "cc"]
LOSSES: dict[str, Callable[..., Tensor]] = {
    "at": at_loss,
    "at_p1": partial(at_loss, p=1.0),
    "at_p3": partial(at_loss, p=3.0),
    "mse": partial(feature, kind="mse"),
    "cosine": partial(feature, kind="cosine"),
    "smooth_l1": partial(feature, kind="smooth_l1"),
    "nst": nst_loss,
    "mmd": partial(mmd_loss, bandwidth=0.8),
    "wkd_feature": as_wide(wkd_feature_loss),
    "wkd_cells": as_wide(partial(wkd_feature_loss, cells=2)),
    "sliced": sliced,
    "rkd": embedded(rkd_loss),
    "sp": embedded(sp_loss),
    "pkt": embedded(pkt_loss),
    "cc": embedded(cc_loss),
}
USUAL: dict[str, Callable[..., Tensor]] = {
    "at": lambda x, t: reference.at_loss(x, t).mean(),
    "at_p1": lambda x, t: reference.at_loss(x, t, 1.0).mean(),
    "at_p3": lambda x, t: reference.at_loss(x, t, 3.0).mean(),
    "mse": partial(usual_feature, kind="mse"),
    "cosine": partial(usual_feature, kind="cosine"),
    "smooth_l1": partial(usual_feature, kind="smooth_l1"),
    "nst": lambda x, t: reference.nst_loss(x, t).mean(),
    "mmd": lambda x, t: reference.mmd_loss(x, t, 0.8).mean(),
    "wkd_feature": as_wide(lambda x, t: reference.wkd_feature_loss(x, t).mean()),
    "wkd_cells": as_wide(lambda x, t: reference.wkd_feature_loss(x, t, 2).mean()),
    "sliced": usual_sliced,
    "rkd": embedded(reference.rkd_loss),
    "sp": embedded(reference.sp_loss),
    "pkt": embedded(reference.pkt_loss),
    "cc": embedded(reference.cc_loss),
}
every_loss = pytest.mark.parametrize("name", LOSSES)
SPATIAL = [name for name in LOSSES if name not in (*EMBEDDED, "sliced")]
every_spatial = pytest.mark.parametrize("name", SPATIAL)


def loss_and_grad(loss: Callable[..., Tensor], x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    value = loss(leaf, t)
    (grad,) = torch.autograd.grad(value, leaf)
    return value.detach(), grad


def assert_near(given: Tensor, want: Tensor, roundings: int = 8, size: float = 0.0) -> None:
    """Off by a few float32 (float64) roundings of the largest number, and one of given's dtype.

    Args:
        size: of the numbers of which the result is a difference, where they are larger.
    """
    wide = FLOAT if given.dtype != DOUBLE else DOUBLE
    largest = max(size, want.abs().max().item() if want.numel() else 0.0)
    allowed = roundings * torch.finfo(wide).eps * largest + torch.finfo(given.dtype).tiny
    if given.dtype in (HALF, BFLOAT):  # formed in the forward, and scaled after it
        allowed = allowed + torch.finfo(given.dtype).eps * want.abs()
        allowed = allowed + (2**-25 if given.dtype == HALF else 0)
    assert given.shape == want.shape
    error = (given.double() - want).abs()
    assert (error <= allowed).all(), f"{(error / allowed).max():.3g} times what is allowed"


# rounding errors of each loss in float32, on the largest number of the result: a sum over channels
# or triplets, whose order torch chooses
ROUNDINGS = {"nst": 64, "mmd": 64, "rkd": 32, "pkt": 128, "sliced": 64}


def check(name: str, x: Tensor, t: Tensor, t_form: Tensor | None = None) -> None:
    """Loss and gradient beside the usual form's in float64; t_form: the same teacher as given."""
    value, grad = loss_and_grad(LOSSES[name], x, t if t_form is None else t_form)
    want, want_grad = loss_and_grad(USUAL[name], x.double(), t.double())
    wide = DOUBLE if DOUBLE in (x.dtype, t.dtype) else FLOAT
    assert value.dtype == wide
    assert grad.dtype == x.dtype
    roundings = ROUNDINGS.get(name, 16)
    if x.dtype != DOUBLE and t.dtype != DOUBLE and name in ("mse", "cosine", "smooth_l1"):
        roundings = 32  # the projection's weight is rounded to the student's dtype
        if x.dtype != FLOAT:
            pytest.skip("test_weights_in_low_precision_match has the rounded weight")
    assert_near(value, want, roundings)
    assert_near(grad, want_grad, roundings)


class Largest(TorchDispatchMode):
    """The most numbers in a tensor that any operation gave back as its own memory."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor) and not func.is_view:
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return out


Bad = tuple[Callable[[], Tensor], type[Exception], str]  # a call, its error, and words of that


def assert_refused(
    name: str, call: Callable[[], Tensor], error: type[Exception], words: str
) -> None:
    """The error begins with the loss's name, as `name` does."""
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value).startswith(name.split("_")[0])
    assert words in str(caught.value)
