"""What holds for every loss alike, as a part of torch: the table is support/operations.py."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from support.attention_map_tools import assert_same
from support.cuda_tools import captured, no_synchronisation, on_another_stream
from support.feature_tools import KINDS, LOSSES, assert_near, draw
from support.kd_tools import every_device
from support.operations import (
    BFLOAT,
    CASES,
    DOUBLE,
    EACH_ONCE,
    FLOAT,
    HALF,
    ON_GPU,
    OPERATIONS,
    PATHS,
    Tensors,
    gradients,
)
from support.relation_tools import LOGITS
from vitkd_fast import _ops

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = {*LOSSES, *LOGITS}  # the same bits with and without a gradient
ONE_OF_EACH = [
    "kd", "kd_topk", "dist", "attention_map", "relation", "at", "mse", "nst", "rkd", "sp", "pkt",
    "cc", "mmd", "wkd_feature", "sliced", "mlkd", "wkd_logit", "spearman",
]  # fmt: skip
# compiled every day: an operation of each shape, of which some are written in Python
COMPILED = ["kd", "kd_topk", "dist", "attention_map", "mse"]
FIRST = {name: path for name, *path in reversed(EACH_ONCE)}


def marks(name: str, every_day: Sequence[str] = COMPILED) -> Any:
    return () if name in every_day else pytest.mark.slow


class Case:
    """A loss on one of its paths, with all options or, in one of the forms, those of a case."""

    def __init__(
        self, name: str, dtype: torch.dtype, reduction: str | None, device: str,
        case: str | None = None,
    ) -> None:  # fmt: skip
        self.name, self.dtype, self.reduction = name, dtype, reduction
        of = self.operation = OPERATIONS[name]
        form = of.forms[[*of.cases].index(case) % len(of.forms)] if case else of.draw
        self.draw = partial(form, dtype, device)
        self.draw_options = of.cases[case] if case else of.options
        self.student, self.teacher, self.options = self.drawn()
        self.by_autograd = dtype == DOUBLE and self.operation.float64_by_autograd
        self.reduced = {} if reduction is None else {"reduction": reduction}
        self.loss: Callable[..., Tensor] = partial(self.operation.loss, **self.reduced)

    def drawn(self) -> tuple[Tensors, Tensors, dict[str, Any]]:
        student, teacher = self.draw()
        return student, teacher, self.draw_options(student)

    def compare(self, given: Tensors, want: Tensors, exactly: bool = True) -> None:
        """Bit by bit if exactly, but for torch's own products."""
        if self.name in EXACT:
            for x, y in zip(given, want, strict=True):
                assert_near(x, y.double(), 64)
        else:
            compare = assert_same if exactly and not self.by_autograd else assert_close
            compare(given, want)

    def leaves(self) -> Tensors:
        return [x.clone().requires_grad_() for x in self.student]


def tensors(tree: Any) -> Tensors:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


@pytest.fixture(params=PATHS, ids=lambda path: "-".join(map(str, path)))
def case(request: pytest.FixtureRequest, device: str) -> Case:
    return Case(*request.param, device)


def test_new_memory_is_poisoned() -> None:
    """Else an output that nothing writes could pass by chance."""
    assert torch.empty(100).isnan().all()
    assert torch.empty_like(torch.ones(3, 4, dtype=torch.bfloat16)).isnan().all()


@every_device
@pytest.mark.parametrize(("name", "of"), [path[:2] for path in CASES if path[2] in (None, "mean")])
def test_operations_change_no_input(name: str, of: str, device: str) -> None:
    for dtype, (_, reduction) in product((FLOAT, HALF), OPERATIONS[name].paths):
        case = Case(name, dtype, reduction, device, of)
        held = tensors((case.student, case.teacher, case.options))
        before = [x.clone() for x in held]
        gradients(partial(case.loss, **case.options), case.student, *case.teacher)
        assert_same(held, before)


# losses of three dimensions, each in one of the forms
@every_device
@pytest.mark.parametrize(("name", "form"), [("kd", 3), ("attention_map", 0), ("relation", 0)])
@pytest.mark.parametrize("dtype", [FLOAT, HALF, DOUBLE], ids=str)
def test_incoming_gradient_of_any_strides(
    dtype: torch.dtype, name: str, form: int, device: str
) -> None:
    of = OPERATIONS[name]
    student, teacher = of.forms[form](dtype, device)
    leaves = [x.requires_grad_() for x in student]
    for options in of.cases.values():
        loss = of.loss(*leaves, *teacher, **options(student), reduction="none")
        back = partial(torch.autograd.grad, loss, leaves, retain_graph=True)
        a, b, c = loss.shape
        new = partial(draw, dtype=loss.dtype, device=device)
        for strided in (
            new(1, 1, 1).expand(a, b, c),
            new(a, 1, c).expand(a, b, c),
            new(a, c, b).transpose(1, 2),
            new(a, b, 2 * c)[..., ::2],
            new(c, b, a).permute(2, 1, 0),
        ):
            assert_same(back(strided), back(strided.contiguous()))
        summed = torch.autograd.grad(loss.sum(), leaves, retain_graph=True)  # which is expanded
        assert_same(summed, back(torch.ones_like(loss)))


@every_device
def test_empty_batch(case: Case) -> None:
    dim = case.operation.batch
    rows = case.student[0].shape[dim]  # a classifier's weight has others

    def emptied(of: Tensors) -> Tensors:
        return [x.narrow(dim, 0, 0) if x.shape[dim] == rows else x for x in of]

    student, teacher = emptied(case.student), emptied(case.teacher)
    loss, *grads = gradients(partial(case.loss, **case.draw_options(student)), student, *teacher)
    of_all = case.loss(*case.student, *case.teacher, **case.options)
    assert loss.shape == (of_all[:0].shape if of_all.dim() else ())
    assert loss.sum() == 0
    assert [x.shape for x in grads] == [x.shape for x in student]


@every_device
def test_inputs_with_gaps(case: Case) -> None:
    """Every other number of a tensor twice as wide."""

    def spread(x: Tensor) -> Tensor:
        wide = x.new_full((*x.shape, 2), torch.nan)
        wide[..., 0] = x
        return wide[..., 0]

    loss = partial(case.loss, **case.options)
    want = gradients(loss, case.student, *case.teacher)
    student, teacher = ([spread(x) for x in of] for of in (case.student, case.teacher))
    case.compare(gradients(loss, student, *teacher), want, exactly=False)


@every_device
def test_bitwise_the_same_twice(case: Case) -> None:
    torch.set_num_threads(2)
    loss = partial(case.loss, **case.options)
    first, second = (gradients(loss, case.student, *case.teacher) for _ in range(2))
    assert_same(first, second)


@every_device
def test_loss_used_twice(case: Case) -> None:
    leaves = case.leaves()
    loss = case.loss(*leaves, *case.teacher)
    (3 * loss + loss).sum().backward()
    want = gradients(lambda *x: 4 * case.loss(*x), case.student, *case.teacher)
    compare = assert_close if case.by_autograd else assert_same  # 3 + 1 in another order
    compare([leaf.grad for leaf in leaves], want[1:])


@every_device
def test_backward_twice(case: Case) -> None:
    """Each gives the same gradients, its own to keep; and none a third time."""
    leaves, given = case.leaves(), partial(case.loss, **case.options)
    loss = given(*leaves, *case.teacher).sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [grad.clone() for grad in first]
    second = torch.autograd.grad(2 * loss, leaves, retain_graph=True)
    assert_same(first, kept)
    assert_same(second, gradients(lambda *x: 2 * given(*x), case.student, *case.teacher)[1:])
    if not case.by_autograd and case.dtype != HALF:  # which rounds what is near 0
        assert_same(second, [2 * grad for grad in kept])
    assert len({grad.data_ptr() for grad in (*first, *second)}) == 2 * len(leaves)

    loss.backward(retain_graph=True)
    loss.backward()
    assert_same([leaf.grad for leaf in leaves], [2 * grad for grad in kept])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
    assert_same([leaf.grad for leaf in leaves], [2 * grad for grad in kept])


@every_device
def test_gradients_accumulate(case: Case) -> None:
    """Into the tensors that are there, over losses and steps."""
    leaves = case.leaves()
    there, wanted = ([torch.ones_like(leaf) for leaf in leaves] for _ in range(2))
    for leaf, grad in zip(leaves, there, strict=True):
        leaf.grad = grad
    for options in case.operation.variants:
        loss = partial(case.loss, **options)
        loss(*leaves, *case.teacher).sum().backward()
        _, *grads = gradients(loss, case.student, *case.teacher)
        wanted = [want + grad for want, grad in zip(wanted, grads, strict=True)]
    assert all(leaf.grad is grad for leaf, grad in zip(leaves, there, strict=True))
    assert_same(there, wanted)

    other = [2 * case.teacher[0], *case.teacher[1:]]
    for leaf in leaves:  # the first gradient may become .grad itself: the next must not spoil it
        leaf.grad = None
    case.loss(*leaves, *case.teacher).sum().backward()
    first = [leaf.grad.clone() for leaf in leaves]
    case.loss(*leaves, *other).sum().backward()
    second = gradients(case.loss, case.student, *other)[1:]
    assert_same([leaf.grad for leaf in leaves], [a + b for a, b in zip(first, second, strict=True)])


@every_device
def test_loss_is_differentiable_once(case: Case) -> None:
    """A penalty on the gradient is an error, and never left out silently."""
    leaves = case.leaves()
    if case.by_autograd:  # which has the second derivative
        assert torch.autograd.gradgradcheck(lambda *x: case.loss(*x, *case.teacher), leaves)
        return
    # the incoming gradient does not require grad, and does
    for function in (lambda loss: loss.sum(), lambda loss: loss.square().sum()):
        loss = function(case.loss(*leaves, *case.teacher))
        for grad in torch.autograd.grad(loss, leaves, create_graph=True):
            with pytest.raises(RuntimeError, match="differentiable once"):
                (loss + grad.float().square().sum()).backward(retain_graph=True)


@every_device
def test_constants_made_in_inference_mode(case: Case) -> None:
    """Teacher, labels, masks as a teacher run under torch.inference_mode leaves them."""
    options = {k: v for k, v in case.options.items() if k != "weight"}  # which learns
    want = gradients(partial(case.loss, **options), case.student, *case.teacher)
    with torch.inference_mode():
        teacher, options = tree_map_only(Tensor, torch.clone, (case.teacher, options))
    assert_same(gradients(partial(case.loss, **options), case.student, *teacher), want)


@every_device
def test_without_gradient(case: Case) -> None:
    """The same loss, as good as the one with a gradient, and no graph."""
    leaves, loss = case.leaves(), partial(case.loss, **case.options)
    want, *_ = gradients(loss, case.student, *case.teacher)
    with torch.no_grad():
        losses = [loss(*leaves, *case.teacher)]
    with torch.inference_mode():
        losses.append(loss(*leaves, *case.teacher))
    losses.append(loss(*case.student, *case.teacher))
    for given in losses:
        assert not given.requires_grad
        if case.name in EXACT:
            assert torch.equal(given, want)
        else:
            assert_close(given, want)


@every_device
def test_student_changed_in_place_gives_no_wrong_gradient(case: Case) -> None:
    """Either the gradients at the tensors of the forward, or an error."""
    if not (formed := case.operation.formed_in_forward):
        return
    want = gradients(case.loss, case.student, *case.teacher)[1:]
    for which in range(len(case.student)):
        leaves = case.leaves()
        student = [leaf * 1 for leaf in leaves]
        loss = case.loss(*student, *case.teacher).sum()
        with torch.no_grad():
            student[which].add_(1)
        if formed(case.dtype, case.reduction):
            assert_same(torch.autograd.grad(loss, leaves, retain_graph=True), want)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@every_device
@pytest.mark.parametrize(("name", "case", "reduction"), CASES)
def test_gradcheck(name: str, case: str, reduction: str | None, device: str) -> None:
    """The gradient is formed in the forward for "mean" and "sum", in the backward for "none"."""
    of = OPERATIONS[name]
    student, teacher = of.draw_small(DOUBLE, device)
    options = of.cases[case](student) | ({"reduction": reduction} if reduction else {})
    leaves = [x.requires_grad_() for x in student]
    assert torch.autograd.gradcheck(lambda *x: of.loss(*x, *teacher, **options), leaves)


class Calls(TorchDispatchMode):
    """The package's own operations that are called, and with what."""

    def __init__(self) -> None:
        super().__init__()
        self.of: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "vitkd_fast":
            self.of.append((func, tree_map_only(Tensor, Tensor.detach, args)))
        return func(*args, **(kwargs or {}))


@every_device
@pytest.mark.parametrize(
    ("of_student", "of_teacher"),
    [(BFLOAT, DOUBLE), (HALF, DOUBLE), (HALF, BFLOAT), (FLOAT, HALF), (DOUBLE, BFLOAT)],
    ids=str,
)
@pytest.mark.parametrize("name", OPERATIONS)
def test_dtypes_that_differ(
    name: str, of_student: torch.dtype, of_teacher: torch.dtype, device: str
) -> None:
    """Each tensor keeps its own: as good as both in float64, scaled after the forward or not."""
    case = Case(name, of_student, OPERATIONS[name].paths[0][1], device)
    teacher = [x.to(of_teacher) if x.is_floating_point() else x for x in case.teacher]
    wide = [
        [x.double() if x.is_floating_point() else x for x in y] for y in (case.student, teacher)
    ]
    loss = case.loss
    if name in KINDS:  # whose weight is drawn in the student's dtype
        (x,), (y,) = case.student, teacher
        channels = y.shape[1 if y.dim() == 4 else 2], x.shape[1]
        loss = partial(loss, weight=draw(*channels, dtype=of_student, device=device))
    for factor in (1.0, 3.0):
        given = gradients(lambda *x, by=factor: by * loss(*x), case.student, *teacher)
        want = gradients(lambda *x, by=factor: by * loss(*x), wide[0], *wide[1])
        assert [x.dtype for x in given[1:]] == [x.dtype for x in case.student]
        for x, y in zip(given, want, strict=True):
            close = 8 * torch.finfo(x.dtype).eps if x.dtype != DOUBLE else 1e-5
            assert_close(x.double(), y.double(), rtol=close, atol=close * y.abs().max().item())


class TF32(TorchDispatchMode):
    """Products of float32 matrices as by the tensor cores of a GPU: of numbers of 10 bits."""

    PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "mv", "dot")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = func._schema.name.removeprefix("aten::").rstrip("_") in self.PRODUCTS
        if named and torch.backends.cuda.matmul.fp32_precision == "tf32":
            first = 0 if len([x for x in args if isinstance(x, Tensor)]) == 2 else 1
            rounded = [
                (x.view(torch.int32) + 4096 & -8192).view(FLOAT) if x.dtype == FLOAT else x
                for x in args[first:]
            ]
            args = (*args[:first], *rounded)
        return func(*args, **(kwargs or {}))


@every_device
@pytest.mark.parametrize("name", OPERATIONS)
def test_products_are_of_float32_where_torch_allows_tf32(name: str, device: str) -> None:
    case = Case(name, FLOAT, OPERATIONS[name].paths[0][1], device)
    step = partial(gradients, partial(case.loss, **case.options), case.student, *case.teacher)
    want = step()
    of_torch = case.student[0].flatten(1), torch.ones_like(case.student[0].flatten(1)).mT / 3
    product = torch.mm(*of_torch)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with TF32():
            assert not torch.equal(torch.mm(*of_torch), product)
            given = step()
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    if name != "fused_linear_kd":  # which says that it does as torch.nn.Linear
        case.compare(given, want)


@every_device
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_opcheck(name: str, device: str) -> None:
    """Schema, fake, autograd registration and AOT dispatch, by torch's own checks."""
    with Calls() as calls:
        for _, of, dtype, reduction in (path for path in EACH_ONCE if path[0] == name):
            case = Case(name, dtype, reduction, device, of)
            loss = partial(case.loss, **case.options)
            gradients(loss, case.student, *case.teacher)
            loss(*case.student, *case.teacher)
    for op, arguments in calls.of:
        results = torch.library.opcheck(op, arguments)
        assert set(results.values()) == {"SUCCESS"}
        assert len(results) == 4
    called = {op._schema.name for op, _ in calls.of}
    assert called >= {f"vitkd_fast::{op.name}" for op in _ops.OPERATIONS if op.stem == name}


@every_device
@pytest.mark.parametrize(
    ("name", "of", "dtype", "reduction"),
    [
        pytest.param(name, *path, marks=() if path == FIRST[name] else pytest.mark.slow)
        for name, *path in EACH_ONCE
    ],
)
def test_compile(
    name: str, of: str, dtype: torch.dtype, reduction: str | None, device: str, compiled: Callable
) -> None:
    """One graph, as good as eager in value and gradient."""
    case = Case(name, dtype, reduction, device, of)
    results = [
        gradients(partial(loss, **case.options), case.student, *case.teacher)
        for loss in (compiled(case.loss, dynamic=False), case.loss)
    ]
    case.compare(*results, exactly=False)


@pytest.mark.emulated(
    name=["kd", "kd_topk", "dist", "attention_map", "rkd"], dtype=[FLOAT], reduction=["mean", None]
)
@every_device
@pytest.mark.parametrize(
    ("name", "dtype", "reduction"),
    [
        pytest.param(*path, marks=marks(path[0]))
        for path in PATHS
        if path[0] in ONE_OF_EACH and (path[2] or path[1] == FLOAT)
    ],
)
def test_compile_with_dynamic_shapes(
    name: str, dtype: torch.dtype, reduction: str | None, device: str, compiled: Callable
) -> None:
    """One graph for all, where no tiles are counted in Python."""
    case = Case(name, dtype, reduction, device)
    of, function = case.operation, compiled(case.loss, dynamic=True)
    plain = [*of.cases.values()][: dtype == FLOAT]
    for options_of in (of.options, *plain):
        for i, sized in enumerate((of.draw, *of.sizes)):
            student, teacher = sized(dtype, device)
            options = options_of(student)
            with torch.compiler.set_stance("fail_on_recompile" if i and of.once else "default"):
                given = gradients(partial(function, **options), student, *teacher)
            want = gradients(partial(case.loss, **options), student, *teacher)
            case.compare(given, want, exactly=False)


@every_device
@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=marks(x, ["kd", "attention_map"])) for x in ONE_OF_EACH]
)
def test_compile_with_inductor(name: str, device: str, compiled: Callable) -> None:
    """Among other operations, which inductor fuses and ours does not disturb."""
    case = Case(name, FLOAT, None, device)

    def step(*x: Tensor) -> Tensor:
        student, teacher = x[: len(case.student)], x[len(case.student) :]
        given = (2 * y + 1 for y in student), (y.sigmoid() for y in teacher)
        return 3 * case.loss(*given[0], *given[1], **case.options)

    function = compiled(step, backend="inductor")
    results = [gradients(of, case.student, *case.teacher) for of in (function, step)]
    for x, y in zip(*results, strict=True):
        largest = {"rtol": 1e-4, "atol": 1e-4 * y.abs().max().item()}  # of what is moved by fusion
        assert_close(x, y, **largest if name in EXACT else {})


@every_device
@pytest.mark.parametrize("name", [pytest.param(x, marks=marks(x)) for x in OPERATIONS])
def test_compile_without_gradient(name: str, device: str, compiled: Callable) -> None:
    of = OPERATIONS[name]
    student, teacher = of.draw(torch.float32, device)
    loss = partial(of.loss, **of.options(student))
    want, function = loss(*student, *teacher), compiled(loss)
    assert_close(function(*student, *teacher), want)
    with torch.no_grad():
        given = function(*(x.clone().requires_grad_() for x in student), *teacher)
    assert not given.requires_grad
    assert_close(given, want)


# what only a GPU has


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "of", "dtype", "reduction"), ON_GPU)
def test_cuda_graph(name: str, of: str, dtype: torch.dtype, reduction: str | None) -> None:
    """Forward and backward replayed, while student, teacher and the options' tensors change."""
    case = Case(name, dtype, reduction, "cuda", of)
    loss = partial(case.loss, **case.options)
    step = partial(gradients, loss, case.student, *case.teacher)
    graph, results = captured(step)
    for _ in range(3):
        held = tensors((case.student, case.teacher, case.options))
        for x, new in zip(held, tensors(case.drawn()), strict=True):
            once = tuple(slice(None if stride else 1) for stride in x.stride())  # if expanded
            x[once].copy_(new[once] if x.dim() or not x.is_floating_point() else x / 2)
        graph.replay()
        given = [x.clone() for x in results]
        assert all(x.isfinite().all() for x in given)
        case.compare(given, step())


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "of", "dtype", "reduction"), ON_GPU)
def test_no_host_synchronisation(
    name: str, of: str, dtype: torch.dtype, reduction: str | None
) -> None:
    case = Case(name, dtype, reduction, "cuda", of)
    loss, factor = partial(case.loss, **case.options), torch.tensor(3.0, device="cuda")
    step = partial(gradients, lambda *x: factor * loss(*x), case.student, *case.teacher)
    step()  # compiles, loads and allocates what may synchronise the first time
    with no_synchronisation():
        step()


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPERATIONS)
def test_on_a_stream_of_its_own(name: str) -> None:
    """The current stream is used, after what is queued there."""
    case = Case(name, FLOAT, None, "cuda", [*OPERATIONS[name].cases][-1])
    loss = partial(case.loss, **case.options)
    there = [*case.student, *case.teacher]
    late = [torch.full_like(x, torch.nan) for x in there]
    student, teacher = late[: len(case.student)], late[len(case.student) :]
    given = on_another_stream(partial(gradients, loss, student, *teacher), late, there)
    case.compare(given, gradients(loss, case.student, *case.teacher))
