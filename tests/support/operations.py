"""The losses in one table: inputs, options, paths. ops/test_contract.py has what holds for all."""

from collections.abc import Callable
from functools import partial
from itertools import cycle
from typing import Any, NamedTuple

import torch
from torch import Tensor

from support import attention_map_tools, feature_tools, kd_tools, kd_topk_tools, relation_tools
from vitkd_fast.functional import (
    attention_map_loss,
    binary_kd_loss,
    deit_hard_loss,
    dino_loss,
    dist_loss,
    dkd_loss,
    fused_linear_kd_loss,
    js_loss,
    kd_loss,
    ofa_loss,
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
    # the dimension of what a mean is over
    batch: int = 0


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


def _binary(student: Tensors, name: str = "everything") -> dict[str, Any]:
    """Of several labels per row, some of them unknown."""
    (x,) = student
    generator = torch.Generator().manual_seed(2)
    random = torch.rand((2, *x.shape), generator=generator, dtype=DOUBLE).to(x.device)
    weights = torch.rand(x.shape[-1], generator=generator, dtype=DOUBLE).to(x.device)
    labels = {"labels": (random[0] < 0.3).float(), "bce_weight": 0.7}
    return {
        "plain": {"temperature": 4.0},
        "labels": labels,
        "everything": labels
        | {"temperature": 2.0, "kd_weight": 0.8}
        | {"mask": random[1] < 0.8, "class_weights": weights},
    }[name]


def _classifier(rows: int, dim: int, classes: int) -> Draw:
    """Features, weight and bias of the student's; the teacher's logits."""

    def draw(dtype: torch.dtype, device: str) -> tuple[Tensors, Tensors]:
        new = partial(kd_tools.draw, dtype=dtype, device=device, scale=1.0)
        return [new(rows, dim), new(classes, dim), new(classes)], [new(rows, classes)]

    return draw


def _row_options_of(student: Tensors, name: str = "everything") -> dict[str, Any]:
    """kd_loss's, of the logits that features and weight give."""
    x, weight, _ = student
    return kd_tools.OPTIONS[name](kd_tools.Rows([x.shape[0]], weight.shape[0], str(x.device)))


def _views(views: int, batch: int, classes: int) -> Draw:
    """The student's views of images, and the teacher's of two of them."""

    def draw(dtype: torch.dtype, device: str) -> tuple[Tensors, Tensors]:
        new = partial(kd_tools.draw, dtype=dtype, device=device, scale=0.3)
        return [new(views, batch, classes)], [new(2, batch, classes)]

    return draw


def _deit(student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
    """With labels of its own, where the options have none."""
    labels = torch.arange(len(student), device=student.device) % student.shape[1]
    return deit_hard_loss(student, teacher, **{"labels": labels} | options)


def _branches(student: Tensor, other: Tensor, teacher: Tensor, **options: Any) -> Tensor:
    """ofa_loss of two, with labels of its own, where the options have none."""
    labels = torch.arange(len(student), device=student.device) % student.shape[1]
    return ofa_loss([student, other], teacher, **{"labels": labels, "eps": 1.5} | options)


def _two_logits(*shape: int) -> Draw:
    def draw(dtype: torch.dtype, device: str) -> tuple[Tensors, Tensors]:
        (student,), teacher = _logits(*shape)(dtype, device)
        return [student, kd_tools.draw(*shape, dtype=dtype, device=device)], teacher

    return draw


def _branch_options(student: Tensors) -> dict[str, Any]:
    x = student[0]
    a, b = torch.randint(x.shape[1], (2, len(x))).to(x.device)
    a[1::3] = -7
    lam = torch.rand(len(x)).to(x.device)
    return {"labels": (a, b, lam), "ignore_index": -7, "eps": 0.7, "temperature": 2.0}


def _hard_options(student: Tensors) -> dict[str, Any]:
    x = student[0]
    labels = torch.randint(x.shape[1], (len(x),)).to(x.device)
    labels[1::3] = -7
    return {"alpha": 0.3, "label_smoothing": 0.2, "ignore_index": -7, "labels": labels}


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
    "deit_hard": Operation(
        _deit,
        _logits(6, 40),
        _hard_options,
        [{"alpha": 0.3}, {"alpha": 0.6}],
        kd_tools.PATHS,
        [_logits(12, 10), _logits(3, 1001), _transposed_logits],
        [_logits(9, 33)],
        _logits(4, 5),
        {"plain": _none, "everything": _hard_options},
        lambda dtype, reduction: reduction != "none" and dtype != HALF,
        once=False,
    ),
    "dino": Operation(
        dino_loss,
        _views(4, 3, 17),
        _none,
        [{"temperature": 0.1}, {"temperature": 0.5}],
        [(FLOAT, None), (HALF, None), (BFLOAT, None), (DOUBLE, None)],
        [_views(2, 5, 40), _views(6, 2, 1001)],
        [_views(5, 4, 33)],
        _views(3, 2, 4),
        {
            "plain": _none,
            "centred": lambda student: {
                "centre": kd_tools.draw(student[0].shape[2], device=str(student[0].device))
            },
        },
        once=False,
        batch=1,
    ),
    "ofa": Operation(
        _branches,
        _two_logits(6, 40),
        _branch_options,
        [{"temperature": 1.0}, {"temperature": 4.0}],
        kd_tools.PATHS,
        [_two_logits(12, 10), _two_logits(3, 1001)],
        [_two_logits(9, 33)],
        _two_logits(4, 5),
        {"plain": _none, "everything": _branch_options},
        once=False,
    ),
    "fused_linear_kd": Operation(
        partial(fused_linear_kd_loss, chunk=4),
        _classifier(6, 7, 9),
        _row_options_of,
        [{"temperature": 1.0}, {"temperature": 4.0}],
        [(FLOAT, "mean"), (FLOAT, "sum"), (HALF, "mean"), (BFLOAT, "mean"), (DOUBLE, "mean")],
        [_classifier(5, 16, 33)],
        [_classifier(9, 5, 12)],
        _classifier(3, 2, 4),
        {name: partial(_row_options_of, name=name) for name in kd_tools.MAIN_OPTIONS},
        once=False,
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
    "binary_kd": Operation(
        binary_kd_loss,
        _logits(6, 40),
        _binary,
        [{"temperature": 1.0}, {"temperature": 4.0}],
        kd_tools.PATHS,
        [_logits(5), _logits(2, 5, 3, 4), _strided_logits, _transposed_logits],
        [_logits(9, 33), _logits(31, 1001)],
        _logits(4, 5, 3),
        {name: partial(_binary, name=name) for name in ("plain", "labels", "everything")},
        lambda dtype, reduction: reduction != "none" and dtype != HALF,
    ),
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
    **{
        name: Operation(
            loss,
            _drawn((6, 9), (6, 9)),
            _none,
            [{}, {}],
            [(FLOAT, None), (BFLOAT, None), (DOUBLE, None)],
            [_drawn((33, 12), (33, 12))],
            [_drawn((7, 12), (7, 12))],
            _drawn((3, 5), (3, 5)),
            {"plain": _none},
            once=False,
        )
        for name, loss in relation_tools.LOGITS.items()
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
