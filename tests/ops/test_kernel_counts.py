"""How many kernels a loss and its gradient start on a GPU, counted where there is none.

Tensors of the meta device have shapes alone, and the losses cut them into a GPU's tiles. Whatever
torch dispatches there and is neither a view nor an allocation is at least one kernel. What one
takes to start, some 5 us, is more than most of them run.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from support.feature_tools import LOSSES
from vitkd_fast.functional import kd_loss, mlkd_loss, relation_loss, spearman_loss

ALLOCATIONS = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach"}


class Kernels(TorchDispatchMode):
    """The operations that a GPU would run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if not func.is_view and name not in ALLOCATIONS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def kernels(loss: Callable[..., Tensor], *shapes: tuple[int, ...]) -> int:
    student, teacher = (torch.empty(shape, device="meta") for shape in shapes)
    student.requires_grad_()
    with Kernels() as counted:
        loss(student, teacher).sum().backward()
    return len(counted.names)


# of forward and backward, where a batch is one tile
OF_MAPS = {
    "at": 4, "at_p1": 4, "at_p3": 31, "mse": 19, "cosine": 32, "smooth_l1": 20, "nst": 28,
    "mmd": 52, "wkd_feature": 4, "sliced": 35, "rkd": 17, "sp": 35, "pkt": 67, "cc": 53,
}  # fmt: skip


@pytest.mark.parametrize("name", OF_MAPS)
def test_losses_of_features(name: str) -> None:
    """Of a DeiT-S and a MobileNet at 14x14; a batch of 256 is up to three tiles."""
    counts = [
        kernels(LOSSES[name], (batch, 96, 14, 14), (batch, 384, 14, 14)) for batch in (16, 64, 256)
    ]
    assert 2 < counts[0] <= OF_MAPS[name], counts
    assert counts[1] == counts[0], counts
    assert counts[2] <= 3 * OF_MAPS[name], counts


OF_LOGITS = {kd_loss: 4, mlkd_loss: 211, spearman_loss: 47}


@pytest.mark.parametrize("loss", OF_LOGITS, ids=lambda loss: loss.__name__)
def test_losses_of_logits(loss: Callable[..., Tensor]) -> None:
    for batch in (16, 256):
        assert 2 < kernels(loss, (batch, 100), (batch, 100)) <= OF_LOGITS[loss]


def test_relations_of_tokens() -> None:
    assert 2 < kernels(relation_loss, (64, 50, 96), (64, 50, 384)) <= 6
