"""The losses in one table: inputs, options, paths. ops/test_contract.py has what holds for all."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from support import attention_map_tools, feature_tools, kd_tools
from vitkd_fast.functional import attention_map_loss, kd_loss, relation_loss

HALF, BFLOAT, FLOAT, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
Tensors = list[Tensor]
Path = tuple[torch.dtype, str | None]  # of the inputs, and a reduction


class Operation(NamedTuple):
    """A loss of the student's tensors and the teacher's."""

    loss: Callable[..., Tensor]
    # by dtype and device: the student's and the teacher's
    draw: Callable[[torch.dtype, str], tuple[Tensors, Tensors]]
    # as many as there are at once, for the student's tensors; without the reduction
    options: Callable[[Tensors], dict[str, Any]]
    # some, each with another loss
    variants: list[dict[str, Any]]
    paths: list[Path]
    # paths where the forward forms the gradient; None: not said
    formed_in_forward: Callable[[torch.dtype, str | None], bool] | None
    # float64 is served by autograd, which has any derivative
    float64_by_autograd: bool = False


def _logits(dtype: torch.dtype, device: str) -> tuple[Tensors, Tensors]:
    student, teacher = kd_tools.pair(6, 40, dtype=dtype, device=device)
    return [student], [teacher]


def _maps(dtype: torch.dtype, device: str) -> tuple[Tensors, Tensors]:
    x = attention_map_tools.maps(2, 2, 5, 7, 16, 8, dtype=dtype, device=device)
    return list(x.student), list(x.teacher)


def _map_options(student: Tensors) -> dict[str, Any]:
    return attention_map_tools.OPTIONS["everything"](attention_map_tools.Maps(*student, *student))


def _features(*shape: int) -> Callable[[torch.dtype, str], tuple[Tensors, Tensors]]:
    def draw(dtype: torch.dtype, device: str) -> tuple[Tensors, Tensors]:
        new = partial(feature_tools.draw, dtype=dtype, device=device)
        return [new(*shape)], [new(shape[0], shape[1] + 2, *shape[2:])]

    return draw


def _relations(dtype: torch.dtype, device: str) -> tuple[Tensors, Tensors]:
    new = partial(feature_tools.draw, dtype=dtype, device=device)
    return [new(2, 2, 5, 8)], [new(2, 2, 5, 16)]


def _none(student: Tensors) -> dict[str, Any]:
    return {}


KINDS = [{"kind": kind} for kind in attention_map_tools.KINDS]
OPERATIONS = {
    "kd": Operation(
        kd_loss,
        _logits,
        lambda student: kd_tools.options_for("everything", student[0]),
        [{"temperature": 1.0}, {"temperature": 4.0}],
        kd_tools.PATHS,
        lambda dtype, reduction: reduction != "none" and dtype != HALF,
    ),
    "attention_map": Operation(
        attention_map_loss,
        _maps,
        _map_options,
        KINDS,
        attention_map_tools.PATHS,
        lambda dtype, reduction: reduction != "none" and dtype in (FLOAT, BFLOAT),
        float64_by_autograd=True,
    ),
    "relation": Operation(
        relation_loss,
        _relations,
        _none,
        KINDS,
        attention_map_tools.PATHS,
        None,
        float64_by_autograd=True,
    ),
    **{
        name: Operation(loss, _features(6, 5, 4, 4), _none, [{}, {}], [(FLOAT, None)], None)
        for name, loss in feature_tools.LOSSES.items()
    },
}
PATHS = [(name, *path) for name, of in OPERATIONS.items() for path in of.paths]


def gradients(loss: Callable[..., Tensor], student: Tensors, *teacher: Tensor) -> Tensors:
    """The loss, and the gradients of its sum."""
    leaves = [x.detach().requires_grad_() for x in student]
    value = loss(*leaves, *teacher)
    return [value.detach(), *torch.autograd.grad(value.sum(), leaves)]
