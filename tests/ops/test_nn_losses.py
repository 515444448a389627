"""Losses as modules: each function has one, which is the function with its options kept."""

import inspect
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from vitkd_fast import functional, nn
from vitkd_fast.nn.losses import Loss

MODULES = {
    cls.function.__name__: cls
    for cls in vars(nn).values()
    if inspect.isclass(cls) and issubclass(cls, Loss)
}
OWN = {  # which keep more than options
    "kd_loss": nn.KDLoss, "kd_loss_topk": nn.KDLossTopK, "dist_loss": nn.DISTLoss,
    "dino_loss": nn.DINOLoss,
}  # fmt: skip


def x(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    return x(*shape), x(*shape, seed=1)


LABELS = torch.tensor([1, 4, 0, 3])
MASK = torch.tensor([[True, True, True, False, True]])
# inputs, options that are kept, and what each call is given by name
CASES: dict[str, tuple[Sequence[Any], dict[str, Any], dict[str, Any]]] = {
    "at_loss": (pair(2, 3, 4, 4), {"p": 1.0}, {}),
    "attention_map_loss": ([x(1, 2, 5, 4, seed=i) for i in range(4)], {"kind": "js"}, {}),
    "binary_kd_loss": (
        pair(4, 5), {"temperature": 2.0, "bce_weight": 0.5},
        {"labels": (x(4, 5) > 0).float(), "mask": x(4, 5) > -1},
    ),
    "cc_loss": (pair(4, 6), {"gamma": 0.2}, {}),
    "deit_hard_loss": ((*pair(4, 5), LABELS), {"alpha": 0.3}, {}),
    "dkd_loss": (pair(4, 5), {"beta": 2.0}, {"labels": LABELS}),
    "feature_loss": ((x(2, 3, 4, 4), x(2, 6, 4, 4), x(6, 3)), {"kind": "smooth_l1"}, {}),
    "fused_linear_kd_loss": (
        (x(4, 6), x(5, 6), x(5), x(4, 5)), {"temperature": 2.0, "ce_weight": 1.0},
        {"labels": LABELS},
    ),
    "js_loss": (pair(4, 5), {"beta": 0.3}, {}),
    "mlkd_loss": (pair(4, 5), {"temperatures": (1.0, 3.0)}, {}),
    "mmd_loss": (pair(2, 3, 4, 4), {"bandwidth": 0.5}, {}),
    "nst_loss": (pair(2, 3, 4, 4), {"reduction": "sum"}, {}),
    "ofa_loss": ((*pair(4, 5), LABELS), {"eps": 1.5}, {}),
    "pkt_loss": (pair(4, 6), {"epsilon": 1e-3}, {}),
    "relation_loss": (pair(2, 5, 4), {"temperature": 2.0}, {"key_mask": MASK.expand(2, 5)}),
    "reverse_kl_loss": (pair(4, 5), {"temperature": 3.0}, {"row_weights": x(4).abs()}),
    "rkd_loss": (pair(4, 6), {"angle_weight": 1.0}, {}),
    "sliced_wasserstein_loss": (pair(2, 5, 4), {"projections": 3, "p": 1.0}, {}),
    "sp_loss": (pair(4, 6), {}, {}),
    "spearman_loss": (pair(4, 5), {"softness": 0.5}, {}),
    "tv_loss": (pair(4, 5), {"temperature": 3.0}, {"labels": LABELS}),
    "wkd_feature_loss": (pair(2, 3, 4, 4), {"cells": 2}, {}),
    "wkd_logit_loss": ((*pair(4, 5), x(5, 5).abs()), {"iterations": 3}, {"labels": LABELS}),
}  # fmt: skip


def test_every_loss_has_a_module() -> None:
    names = {name for name in vars(functional) if name.endswith("_loss")} | {"kd_loss_topk"}
    assert names == MODULES.keys() | OWN.keys()
    assert CASES.keys() == MODULES.keys()


@pytest.mark.parametrize("name", CASES)
def test_a_module_is_its_function(name: str) -> None:
    inputs, options, given = CASES[name]
    module = MODULES[name](**options)
    function = getattr(functional, name)
    assert_close(module(*inputs, **given), function(*inputs, **options, **given), rtol=0, atol=0)
    again = pickle.loads(pickle.dumps(module))
    assert_close(again(*inputs, **given), module(*inputs, **given), rtol=0, atol=0)
    assert all(f"{key}={value!r}" in repr(module) for key, value in options.items())
    if options:  # which are not the function's own
        assert not torch.equal(module(*inputs, **given), function(*inputs, **given))


@pytest.mark.parametrize("name", CASES)
def test_options_are_the_functions(name: str) -> None:
    module = MODULES[name]
    known = inspect.signature(module).parameters
    of_function = inspect.signature(getattr(functional, name)).parameters
    assert all(known[key].default == of_function[key].default for key in known)
    for wrong in ({"temprature": 2.0}, {"labels": LABELS}, {"key_mask": MASK}):
        with pytest.raises(TypeError, match=f"{module.__name__}: expected options among"):
            module(**wrong)
