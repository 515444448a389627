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
    # as `draw` for gradcheck, in float64; with each of the options that it tries
    draw_small: Callable[[torch.dtype, str], tuple[Tensors, Tensors]]
    cases: dict[str, Callable[[Tensors], dict[str, Any]]]
    # paths where the forward forms the gradient; None: not said
    formed_in_forward: Callable[[torch.dtype, str | None], bool] | None = None
    # float64 is served by autograd, which has any derivative
    float64_by_autograd: bool = False


def _drawn(*shapes: tuple[int, ...]) -> Callable[[torch.dtype, str], tuple[Tensors, Tensors]]:
    """One tensor of the student's, and one of the teacher's."""

    def draw(dtype: torch.dtype, device: str) -> tuple[Tensors, Tensors]:
        student, teacher = (feature_tools.draw(*x, dtype=dtype, device=device) for x in shapes)
        return [student], [teacher]

    return draw


def _logits(*shape: int) -> Callable[[torch.dtype, str], tuple[Tensors, Tensors]]:
    def draw(dtype: torch.dtype, device: str) -> tuple[Tensors, Tensors]:
        student, teacher = kd_tools.pair(*shape, dtype=dtype, device=device)
        return [student], [teacher]

    return draw


def _maps(*shape: int) -> Callable[[torch.dtype, str], tuple[Tensors, Tensors]]:
    def draw(dtype: torch.dtype, device: str) -> tuple[Tensors, Tensors]:
        x = attention_map_tools.maps(*shape, dtype=dtype, device=device)
        return list(x.student), list(x.teacher)

    return draw


def _logit_options(student: Tensors, name: str = "everything") -> dict[str, Any]:
    return kd_tools.options_for(name, student[0], 1)


def _map_options(student: Tensors, name: str = "everything", **kind: str) -> dict[str, Any]:
    maps = attention_map_tools.Maps(*student, *student)
    return attention_map_tools.OPTIONS[name](maps) | kind


def _none(student: Tensors) -> dict[str, Any]:
    return {}


def _weight(student: Tensors) -> dict[str, Any]:
    (x,) = student
    return {"weight": feature_tools.draw(7, 5, dtype=x.dtype, device=str(x.device))}


KINDS = [{"kind": kind} for kind in attention_map_tools.KINDS]
OPERATIONS = {
    "kd": Operation(
        kd_loss,
        _logits(6, 40),
        _logit_options,
        [{"temperature": 1.0}, {"temperature": 4.0}],
        kd_tools.PATHS,
        _logits(4, 5, 2),
        {name: partial(_logit_options, name=name) for name in kd_tools.OPTIONS},
        lambda dtype, reduction: reduction != "none" and dtype != HALF,
    ),
    "attention_map": Operation(
        attention_map_loss,
        _maps(2, 2, 5, 7, 16, 8),
        _map_options,
        KINDS,
        attention_map_tools.PATHS,
        _maps(2, 1, 3, 4, 3, 2),
        {
            f"{name}-{kind}": partial(_map_options, name=name, kind=kind)
            for name in ("plain", "everything")
            for kind in attention_map_tools.KINDS
        },
        lambda dtype, reduction: reduction != "none" and dtype in (FLOAT, BFLOAT),
        float64_by_autograd=True,
    ),
    "relation": Operation(
        relation_loss,
        _drawn((2, 2, 5, 8), (2, 2, 5, 16)),
        _none,
        KINDS,
        attention_map_tools.PATHS,
        _drawn((2, 3, 4), (2, 3, 4)),
        {of["kind"]: lambda student, of=of: of for of in KINDS},
        float64_by_autograd=True,
    ),
    **{
        name: Operation(
            loss,
            _drawn((6, 5, 4, 4), (6, 7, 4, 4)),
            _weight if name in feature_tools.KINDS else _none,
            [{}, {}],
            [(FLOAT, None)],
            _drawn((3, 4, 2, 3), (3, 5, 2, 3)),
            {"plain": _none},
        )
        for name, loss in feature_tools.LOSSES.items()
    },
}
PATHS = [(name, *path) for name, of in OPERATIONS.items() for path in of.paths]
CASES = [
    (name, case, reduction)
    for name, of in OPERATIONS.items()
    for case in of.cases
    for reduction in sorted({reduction for _, reduction in of.paths}, key=str)
]


def gradients(loss: Callable[..., Tensor], student: Tensors, *teacher: Tensor) -> Tensors:
    """The loss, and the gradients of its sum."""
    leaves = [x.detach().requires_grad_() for x in student]
    value = loss(*leaves, *teacher)
    return [value.detach(), *torch.autograd.grad(value.sum(), leaves)]
