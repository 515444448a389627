"""The losses in one table: inputs, options, paths. ops/test_contract.py has what holds for all."""

from collections.abc import Callable
from functools import partial
from itertools import cycle
from typing import Any, NamedTuple

import torch
from torch import Tensor

from support import attention_map_tools, feature_tools, kd_tools, kd_topk_tools
from vitkd_fast.functional import (
    attention_map_loss,
    dist_loss,
    dkd_loss,
    js_loss,
    kd_loss,
    relation_loss,
    reverse_kl_loss,
    tv_loss,
)

HALF, BFLOAT, FLOAT, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
Tensors = list[Tensor]
Draw = Callable[[torch.dtype, str], tuple[Tensors, Tensors]]
Path = tuple[torch.dtype, str | None]  # of the inputs, and a reduction


class Operation(NamedTuple):
    """A loss of the student's tensors and the teacher's."""

    loss: Callable[..., Tensor]
    # by dtype and device: the student's and the teacher's
    draw: Draw
    # as many as there are at once, for the student's tensors; without the reduction
    options: Callable[[Tensors], dict[str, Any]]
    # some, each with another loss
    variants: list[dict[str, Any]]
    paths: list[Path]
    # as `draw`, each with another way through the kernels
    forms: list[Draw]
    # as `draw`, with other sizes of what is dynamic when it is compiled
    sizes: list[Draw]
    # as `draw` for gradcheck, in float64
    draw_small: Draw
    # options for the student's tensors, one case after another
    cases: dict[str, Callable[[Tensors], dict[str, Any]]]
    # paths where the forward forms the gradient; None: not said
    formed_in_forward: Callable[[torch.dtype, str | None], bool] | None = None
    # float64 is served by autograd, which has any derivative
    float64_by_autograd: bool = False
    # compiled once for all sizes
    once: bool = True


def _drawn(*shapes: tuple[int, ...]) -> Draw:
    """One tensor of the student's, and one of the teacher's."""

    def draw(dtype: torch.dtype, device: str) -> tuple[Tensors, Tensors]:
        student, teacher = (feature_tools.draw(*x, dtype=dtype, device=device) for x in shapes)
        return [student], [teacher]

    return draw


def _tokens(dtype: torch.dtype, device: str) -> tuple[Tensors, Tensors]:
    """A map of the student's, and the teacher's tokens behind another."""
    new = partial(feature_tools.draw, dtype=dtype, device=device)
    return [new(6, 12, 4, 4)], [new(6, 17, 17)[:, 1:]]


def _logits(*shape: int) -> Draw:
    def draw(dtype: torch.dtype, device: str) -> tuple[Tensors, Tensors]:
        student, teacher = kd_tools.pair(*shape, dtype=dtype, device=device)
        return [student], [teacher]

    return draw


def _maps(*shape: int) -> Draw:
    def draw(dtype: torch.dtype, device: str) -> tuple[Tensors, Tensors]:
        x = attention_map_tools.maps(*shape, dtype=dtype, device=device)
        return list(x.student), list(x.teacher)

    return draw


def _strided_logits(dtype: torch.dtype, device: str) -> tuple[Tensors, Tensors]:
    new = partial(kd_tools.draw, dtype=dtype, device=device)
    return [new(2, 5, 3, 4).to(memory_format=torch.channels_last)], [new(4, 5, 3, 4)[::2].float()]


def _transposed_logits(dtype: torch.dtype, device: str) -> tuple[Tensors, Tensors]:
    new = partial(kd_tools.draw, dtype=dtype, device=device)
    return [new(10, 4).t()], [new(4, 20)[:, ::2]]


def _last_strided(dtype: torch.dtype, device: str) -> tuple[Tensors, Tensors]:
    new = partial(kd_tools.draw, dtype=dtype, device=device)
    return [new(9, 4, 3).permute(1, 2, 0)], [new(4, 3, 18)[..., ::2]]


def _strided_maps(dtype: torch.dtype, device: str) -> tuple[Tensors, Tensors]:
    new = partial(attention_map_tools.draw, dtype=dtype, device=device)
    q_s, k_s, _ = new(2, 5, 3, 3, 8).permute(2, 0, 3, 1, 4).unbind(0)
    return [q_s, k_s], [new(2, 3, 4, 5).mT.float(), new(2, 1, 5, 4).float().expand(-1, 3, -1, -1)]


def _transposed_maps(dtype: torch.dtype, device: str) -> tuple[Tensors, Tensors]:
    new = partial(attention_map_tools.draw, dtype=dtype, device=device)
    student = [new(2, 3, 4, 5).mT, new(2, 3, 4, 10).mT[:, :, ::2]]
    return student, [new(2, 3, 5, 4), new(2, 3, 5, 8)[..., ::2]]


def _logit_options(student: Tensors, name: str = "everything") -> dict[str, Any]:
    return kd_tools.options_for(name, student[0], min(1, student[0].dim() - 1))


def _dkd(student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
    """With labels, and none that are mixed."""
    labels = options.pop("labels", None)
    if labels is None:
        class_dim = options.get("class_dim", -1)
        labels = teacher.detach().nan_to_num().argmin(class_dim)
    elif isinstance(labels, tuple):
        labels, *_ = labels
    return dkd_loss(student, teacher, labels, **options)


def _topk_options(student: Tensors, name: str, tail: str) -> dict[str, Any]:
    return kd_tools.options_for(name, student[0], -1) | {"tail": tail}


def _map_options(student: Tensors, name: str = "everything", **kind: str) -> dict[str, Any]:
    maps = attention_map_tools.Maps(*student, *student)
    return attention_map_tools.OPTIONS[name](maps) | kind


def _none(student: Tensors) -> dict[str, Any]:
    return {}


def _weight(student: Tensors) -> dict[str, Any]:
    (x,) = student
    return {"weight": feature_tools.draw(17, 12, dtype=x.dtype, device=str(x.device))}


KINDS = [{"kind": kind} for kind in attention_map_tools.KINDS]
OPERATIONS = {
    "kd": Operation(
        kd_loss,
        _logits(6, 40),
        _logit_options,
        [{"temperature": 1.0}, {"temperature": 4.0}],
        kd_tools.PATHS,
        [
            *(_logits(*shape) for shape, _ in kd_tools.FORMS.values()),
            *(_logits(5), _strided_logits, _transposed_logits),
        ],
        [_logits(9, 33), _logits(31, 1001)],
        _logits(4, 5, 2),
        {name: partial(_logit_options, name=name) for name in kd_tools.OPTIONS},
        lambda dtype, reduction: reduction != "none" and dtype != HALF,
    ),
    **{
        name: Operation(
            loss,
            _logits(6, 40),
            _logit_options,
            [{"temperature": 1.0}, {"temperature": 4.0}],
            kd_tools.PATHS,
            [
                *(_logits(*shape) for shape, _ in kd_tools.FORMS.values()),
                *(_logits(5), _strided_logits, _transposed_logits),
            ],
            [_logits(9, 33), _logits(31, 1001)],
            _logits(4, 5, 2) if name != "tv" else _logits(4, 5, 3),
            {case: partial(_logit_options, name=case) for case in kd_tools.MAIN_OPTIONS},
            lambda dtype, reduction: reduction != "none" and dtype != HALF,
        )
        for name, loss in {
            "reverse_kl": reverse_kl_loss,
            "js": partial(js_loss, beta=0.3),
            "tv": tv_loss,
            "dkd": _dkd,
            "kd_standardized": partial(kd_loss, standardize=True),
            "dkd_standardized": partial(_dkd, standardize=True),
        }.items()
    },
    "kd_topk": Operation(
        kd_topk_tools.topk_loss,
        _logits(6, 40),
        _logit_options,
        [{"temperature": 1.0}, {"temperature": 4.0}, {"tail": "bin"}],
        kd_tools.PATHS,
        [_logits(12, 10), _logits(3, 1001), _logits(2, 5000), _last_strided],
        [_logits(9, 33), _logits(31, 1001)],
        _logits(4, 7),
        {
            f"{name}-{tail}": partial(_topk_options, name=name, tail=tail)
            for name in ("plain", "everything")
            for tail in kd_topk_tools.TAILS
        },
        lambda dtype, reduction: reduction != "none" and dtype != HALF,
    ),
    "dist": Operation(
        dist_loss,
        _logits(16, 40),
        lambda student: {"temperature": 2.0, "beta": 0.5},
        [{"temperature": 1.0}, {"gamma": 2.0}],
        [(FLOAT, None), (HALF, None), (BFLOAT, None), (DOUBLE, None)],
        [_logits(12, 10), _logits(5, 1001), _last_strided],
        [_logits(9, 33), _logits(31, 101)],
        _logits(5, 7),
        {"plain": _none, "hot": lambda student: {"temperature": 4.0, "gamma": 0.5}},
    ),
    "attention_map": Operation(
        attention_map_loss,
        _maps(2, 3, 5, 7, 16, 8),
        _map_options,
        KINDS,
        attention_map_tools.PATHS,
        [_maps(2, 3, 49, 65, 24, 16), _strided_maps, _transposed_maps],
        [_maps(3, 4, 9, 8, 16, 8), _maps(4, 3, 33, 40, 16, 8)],
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
        _drawn((2, 3, 5, 8), (2, 3, 5, 16)),
        _none,
        KINDS,
        attention_map_tools.PATHS,
        [_drawn((2, 3, 49, 24), (2, 3, 49, 16)), _drawn((2, 9, 16), (2, 9, 24))],
        [_drawn((3, 4, 9, 8), (3, 4, 9, 16)), _drawn((4, 3, 33, 8), (4, 3, 33, 16))],
        _drawn((2, 3, 4), (2, 3, 4)),
        {of["kind"]: lambda student, of=of: of for of in KINDS},
        float64_by_autograd=True,
    ),
    **{
        name: Operation(
            loss,
            _drawn((6, 12, 4, 3), (6, 17, 4, 3)),
            options := _weight if name in feature_tools.KINDS else _none,
            [{}, {}],
            [(FLOAT, None), (BFLOAT, None), (DOUBLE, None)],
            [_drawn((16, 12, 7, 7), (16, 17, 7, 7)), _tokens],
            [_drawn((7, 12, 5, 8), (7, 17, 5, 8))],
            _drawn((3, 12, 2, 3), (3, 17, 2, 3)),
            {"plain": options},
            once=name.startswith("at"),
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

ON_GPU = [
    (name, case, *path) for name, of in OPERATIONS.items() for case in of.cases for path in of.paths
]

# each case and each path, not all of their pairs
EACH_ONCE = [
    (name, case, *path)
    for name, of in OPERATIONS.items()
    for _, case, path in zip(
        range(max(len(of.cases), len(of.paths))), cycle(of.cases), cycle(of.paths), strict=False
    )
]


def gradients(loss: Callable[..., Tensor], student: Tensors, *teacher: Tensor) -> Tensors:
    """The loss, and the gradients of its sum."""
    leaves = [x.detach().requires_grad_() for x in student]
    value = loss(*leaves, *teacher)
    return [value.detach(), *torch.autograd.grad(value.sum(), leaves)]
