"""What holds for every loss: dtypes that mix, derivatives that there are not, and bad arguments."""

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.testing import assert_close

from support.feature_tools import assert_near
from support.process_tools import run_tests
from vitkd_fast.functional import (
    at_loss,
    attention_map_loss,
    deit_hard_loss,
    dino_loss,
    dist_loss,
    feature_loss,
    fused_linear_kd_loss,
    kd_loss,
    nst_loss,
    ofa_loss,
    relation_loss,
    rkd_loss,
)
from vitkd_fast.nn import AttentionMapProjection, CrossAttentionProjector, KDLoss

HALF, BFLOAT, FLOAT, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
Given = dict[str, Tensor]


class Call(NamedTuple):
    """A loss, and the shapes of its tensors; a teacher's names end in _t or are "teacher"."""

    loss: Callable[..., Tensor]
    shapes: dict[str, tuple[int, ...]]

    def given(self, dtype: torch.dtype = FLOAT) -> Given:
        return {name: torch.randn(shape).to(dtype) for name, shape in self.shapes.items()}

    @property
    def constants(self) -> list[str]:
        return [name for name in self.shapes if name == "teacher" or name.endswith("_t")]

    @property
    def students(self) -> list[str]:
        return [name for name in self.shapes if name not in self.constants]


LOGITS = {"student": (6, 10), "teacher": (6, 10)}
MAPS = {"q_s": (2, 2, 5, 8), "k_s": (2, 2, 7, 8), "q_t": (2, 2, 5, 6), "k_t": (2, 2, 7, 6)}
FEATURES = {"f_s": (2, 5, 4, 4), "f_t": (2, 7, 4, 4)}
RESIZED = {"f_s": (2, 5, 6, 6), "f_t": (2, 7, 4, 4)}
PROJECTION = {"weight": (7, 5), "bias": (7,)}
LABELLED = {"labels": torch.arange(6), "ce_weight": 0.5, "temperature": 2.0}
CALLS = {
    "kd": Call(kd_loss, LOGITS),
    "kd_labels": Call(partial(kd_loss, **LABELLED), LOGITS),
    "deit_hard": Call(partial(deit_hard_loss, labels=torch.arange(6)), LOGITS),
    "dino": Call(dino_loss, {"student": (4, 3, 10), "teacher": (2, 3, 10)}),
    "ofa": Call(
        lambda student, teacher: ofa_loss([student], teacher, torch.arange(6), eps=1.5), LOGITS
    ),
    "fused_linear_kd": Call(
        partial(fused_linear_kd_loss, chunk=4, **LABELLED),
        {"features": (6, 5), "weight": (10, 5), "bias": (10,), "teacher": (6, 10)},
    ),
    **{f"attention_map_{k}": Call(partial(attention_map_loss, kind=k), MAPS) for k in ("kl", "js")},
    "relation": Call(relation_loss, {"x_s": (2, 2, 5, 8), "x_t": (2, 2, 5, 6)}),
    "at": Call(at_loss, FEATURES),
    "at_p3": Call(partial(at_loss, p=3.0), FEATURES),
    "at_resized": Call(at_loss, RESIZED),
    "feature": Call(feature_loss, {"f_s": (2, 5, 4, 4), "f_t": (2, 5, 4, 4)}),
    "feature_projected": Call(feature_loss, FEATURES | PROJECTION),
    "feature_resized": Call(partial(feature_loss, kind="cosine"), RESIZED | PROJECTION),
    "nst": Call(nst_loss, FEATURES),
    "nst_resized": Call(nst_loss, RESIZED),
    "dist": Call(dist_loss, {"student": (9, 10), "teacher": (9, 10)}),
    "rkd": Call(rkd_loss, {"x_s": (5, 6), "x_t": (5, 9)}),
}
# where compilers make each call take long: one of each function
ONE_OF_EACH = [
    "kd",
    "attention_map_kl",
    "relation",
    "at",
    "feature_projected",
    "nst",
    "rkd",
    "dist",
]
every_loss = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
every_function = pytest.mark.parametrize("call", [CALLS[k] for k in ONE_OF_EACH], ids=ONE_OF_EACH)


def results(call: Call, given: Given, factor: float = 1.0) -> list[Tensor]:
    """The loss times a factor, and the gradients of all but the teacher's."""
    leaves = {k: x.detach().requires_grad_(k in call.students) for k, x in given.items()}
    loss = factor * call.loss(**leaves)
    return [loss.detach(), *torch.autograd.grad(loss, [leaves[k] for k in call.students])]


# dtypes


@every_loss
def test_any_dtypes_mix(call: Call) -> None:
    """Student, teacher and weights: each gradient is right, and in its tensor's dtype."""
    given = call.given()
    with_weights = "weight" in given
    for dtypes in itertools.product([FLOAT, HALF, BFLOAT, DOUBLE], repeat=2 + with_weights):
        of = dict.fromkeys(given, dtypes[0]) | dict.fromkeys(call.constants, dtypes[1])
        of |= dict.fromkeys(PROJECTION, dtypes[-1]) if with_weights else {}
        mixed = {k: x.to(of[k]) for k, x in given.items()}
        exact = {k: x.double() for k, x in mixed.items()}
        for factor in (1.0, 3.0):
            found, want = results(call, mixed, factor), results(call, exact, factor)
            assert found[0].dtype == (DOUBLE if DOUBLE in dtypes else FLOAT)
            assert [x.dtype for x in found[1:]] == [of[k] for k in call.students]
            for x, y in zip(found, want, strict=True):
                if x.dtype in (HALF, BFLOAT) and call is CALLS["relation"]:
                    continue  # of both roles, each rounded: test_distributions has the sum
                assert_near(x, y, 64)


@every_loss
@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
def test_autocast_changes_nothing(call: Call, dtype: torch.dtype) -> None:
    """Arithmetic is float32 in a region, too, where torch's own log_softmax of bfloat16 is not."""
    given = call.given(dtype)
    want = results(call, given)
    with torch.autocast("cpu", BFLOAT):
        found = results(call, given)
    for x, y in zip(found, want, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


def test_autocast_changes_nothing_in_the_reference_backend(tmp_path: Path) -> None:
    tests = [f"{__file__}::test_autocast_changes_nothing"]
    run_tests(tmp_path, ["-m", "pytest"], *tests, VITKD_FAST_BACKEND="reference")


def test_no_labels_are_the_limit_of_a_cross_entropy_without_weight() -> None:
    """T^2 stays on the soft term whether there are labels or not."""
    student, teacher = torch.randn(6, 10, dtype=DOUBLE), torch.randn(6, 10, dtype=DOUBLE)
    leaf, labels = student.requires_grad_(), torch.arange(6)
    loss = partial(kd_loss, leaf, teacher, temperature=4.0)
    alone = loss()
    none = loss(labels=labels, ce_weight=0.0)
    little = loss(labels=labels, ce_weight=1e-6)
    hard = torch.nn.functional.cross_entropy(leaf, labels)
    assert torch.equal(alone, none)
    assert_close(little, alone + 1e-6 * hard, rtol=1e-14, atol=0)
    grads = [torch.autograd.grad(x, leaf)[0] for x in (alone, none, little, hard)]
    assert torch.equal(grads[0], grads[1])
    assert_close(grads[2], grads[0] + 1e-6 * grads[3], rtol=1e-12, atol=0)


# derivatives that there are not

Function = Callable[[Tensor], Tensor]
REFUSED = (ValueError, RuntimeError)  # Dynamo's, which are RuntimeErrors, hold ours or their own


def aot(function: Callable[..., Any], fullgraph: bool = False) -> Callable[..., Any]:
    torch.compiler.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=fullgraph)


def backward(function: Function, x: Tensor) -> None:
    loss = function(x.clone().requires_grad_())
    assert loss.requires_grad  # else a silent 0
    loss.backward()


def dual(function: Function, x: Tensor) -> None:
    with forward_ad.dual_level():
        function(forward_ad.make_dual(x, torch.ones_like(x)))


def dual_without_graph(function: Function, x: Tensor) -> None:
    with torch.no_grad():
        dual(function, x)


def jvp(function: Function, x: Tensor) -> None:
    torch.func.jvp(function, (x,), (x,))


def twice(function: Function, x: Tensor) -> None:
    """A penalty on the gradient, beside a term through which the input is reached anyway."""
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(function(leaf), leaf, create_graph=True)
    torch.autograd.grad(grad.square().sum() + leaf.sum(), leaf)


def twice_with_a_graph(function: Function, x: Tensor) -> None:
    """The incoming gradient requires grad, too."""
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(function(leaf).square(), leaf, create_graph=True)
    (grad.square().sum() + leaf.sum()).backward()


FIRST: dict[str, Callable[[Function, Tensor], Any]] = {
    "backward": backward,
    "func.grad": lambda f, x: torch.func.grad(f)(x),
    "func.vjp": lambda f, x: torch.func.vjp(f, x),
    "func.jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "compiled": lambda f, x: backward(aot(f), x),
    "compiled whole": lambda f, x: backward(aot(f, fullgraph=True), x),
    "compiled func.grad": lambda f, x: aot(torch.func.grad(f))(x),
    "compiled whole func.grad": lambda f, x: aot(torch.func.grad(f), fullgraph=True)(x),
}
FORWARD: dict[str, Callable[[Function, Tensor], Any]] = {
    "dual": dual,
    "dual without graph": dual_without_graph,
    "func.jvp": jvp,
    "compiled dual": lambda f, x: dual(aot(f), x),
    "compiled func.jvp": lambda f, x: aot(lambda a: jvp(f, a))(x),
}
SECOND: dict[str, Callable[[Function, Tensor], Any]] = {
    "twice": twice,
    "twice with a graph": twice_with_a_graph,
    "compiled twice": lambda f, x: twice(aot(f), x),
    "func.hessian": lambda f, x: torch.func.hessian(f)(x),
}


def of_one(call: Call, argument: str, given: Given) -> Function:
    """The loss as a function of one of its tensors."""
    return lambda x: call.loss(**(given | {argument: x}))


@every_function
@pytest.mark.parametrize("mode", FIRST | FORWARD)
def test_a_teacher_has_no_derivative(call: Call, mode: str) -> None:
    given = call.given()
    for argument in call.constants:
        with pytest.raises(
            REFUSED, match=f"{argument}: .* requires grad|tangent|torch.func|exception"
        ):
            (FIRST | FORWARD)[mode](of_one(call, argument, given), given[argument])


@every_function
@pytest.mark.parametrize("mode", FORWARD | SECOND)
def test_a_student_has_one_derivative_in_reverse_mode(call: Call, mode: str) -> None:
    given = call.given()
    if mode == "compiled twice" and call.loss in (at_loss, feature_loss, nst_loss, rkd_loss):
        pytest.skip("torch.compile drops it where a backward needs no input: that of exp, too")
    for argument in call.students:
        with pytest.raises(REFUSED):
            (FORWARD | SECOND)[mode](of_one(call, argument, given), given[argument])


@every_loss
@pytest.mark.parametrize("mode", [twice, twice_with_a_graph])
def test_a_second_derivative_is_refused(call: Call, mode: Callable[..., None]) -> None:
    given = call.given()
    for argument in call.students:
        with pytest.raises(RuntimeError, match="a loss is differentiable once"):
            mode(of_one(call, argument, given), given[argument])


@every_function
@pytest.mark.parametrize("mode", [mode for mode in FIRST if "func" in mode])
def test_a_student_in_torch_func_is_right_or_refused(call: Call, mode: str) -> None:
    given = call.given()
    _, *want = results(call, given)
    for argument, grad in zip(call.students, want, strict=True):
        try:
            found = FIRST[mode](of_one(call, argument, given), given[argument])
        except REFUSED:
            continue
        assert_close(found, grad)


@pytest.mark.parametrize("name", ["attention_map_js", "relation"])
def test_float64_attention_has_any_derivative_but_a_teachers(name: str) -> None:
    """By autograd of the naive form."""
    call = CALLS[name]
    given = call.given(DOUBLE)
    for argument in call.students:
        function = of_one(call, argument, given)
        leaf = given[argument].clone().requires_grad_()
        assert torch.autograd.gradcheck(function, leaf, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(function, leaf)
    for argument, mode in itertools.product(call.constants, (backward, dual, jvp)):
        with pytest.raises(REFUSED):
            mode(of_one(call, argument, given), given[argument])


CONSTANTS: dict[str, Callable[[Tensor], dict[str, Any]]] = {
    "row_weights": lambda x: {"row_weights": x},
    "lam": lambda x: {"labels": (torch.arange(6), torch.arange(6), x), "ce_weight": 0.5},
}


@pytest.mark.parametrize("mode", FIRST | FORWARD)
@pytest.mark.parametrize("name", CONSTANTS)
def test_weights_of_rows_have_no_derivative(name: str, mode: str) -> None:
    student, teacher = CALLS["kd"].given().values()
    function = lambda x: kd_loss(student, teacher, **CONSTANTS[name](x))  # noqa: E731
    with pytest.raises(REFUSED, match=f"{name}: .* requires grad|tangent|torch.func|exception"):
        (FIRST | FORWARD)[mode](function, torch.full((6,), 0.5))


@pytest.mark.parametrize("mode", FORWARD)
def test_a_temperature_has_no_derivative_in_forward_mode(mode: str) -> None:
    student, teacher = CALLS["kd"].given().values()
    function = lambda x: kd_loss(student, teacher, temperature=x)  # noqa: E731
    with pytest.raises(REFUSED, match=r"temperature: .* tangent|exception"):
        FORWARD[mode](function, torch.full((6,), 0.5))


NUMBERS = {
    "kd": ["kd_weight", "ce_weight", "label_smoothing"],
    "attention_map_kl": ["scale_s", "scale_t", "temperature"],
    "relation": ["scale_s", "scale_t", "temperature"],
    "at": ["p"], "feature": ["beta"], "rkd": ["distance_weight", "angle_weight"],
}  # fmt: skip


@pytest.mark.parametrize(("name", "option"), [(k, x) for k, of in NUMBERS.items() for x in of])
def test_a_number_is_no_parameter_that_learns(name: str, option: str) -> None:
    call = CALLS[name]
    learns = torch.nn.Parameter(torch.ones(()))
    with pytest.raises(TypeError, match=f"_loss: {option}: expected a number"):
        call.loss(**call.given(), **{option: learns})


@every_loss
def test_a_teacher_without_graph_is_welcome(call: Call) -> None:
    """Under no_grad, detached, from inference mode; or where no gradient is asked for."""
    given = call.given()
    want = results(call, given)
    learns = torch.ones((), requires_grad=True)
    with torch.no_grad():
        made = {k: x * learns if k in call.constants else x for k, x in given.items()}
    with torch.inference_mode():
        inferred = {k: x.clone() if k in call.constants else x for k, x in given.items()}
    detached = {k: (x * learns).detach() if k in call.constants else x for k, x in given.items()}
    for each in (made, inferred, detached):
        for x, y in zip(results(call, each), want, strict=True):
            assert torch.equal(x, y)
    attached = {k: x * learns for k, x in given.items()}
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert_close(call.loss(**attached), want[0])


def test_modules_refuse_a_teacher_that_learns() -> None:
    x = torch.randn(2, 5, 4, 4)
    q, k, v = torch.randn(3, 2, 2, 16, 4).unbind(0)
    tokens, logits = torch.randn(2, 16, 8), torch.randn(4, 10)
    calls: list[tuple[torch.nn.Module, list[Tensor]]] = [
        (KDLoss(), [logits, logits]),
        (AttentionMapProjection(5, 8, 2), [x, q, k]),
        (CrossAttentionProjector(5, 8, 2), [x, q, k, v, tokens]),
    ]
    for module, inputs in calls:
        module(*inputs)
        for i in range(1, len(inputs)):
            given = [y.clone().requires_grad_() if j == i else y for j, y in enumerate(inputs)]
            with pytest.raises(ValueError, match=r"expected a constant.* requires grad"):
                module(*given)
            with pytest.raises(TypeError, match=r"expected one tensor.*, got a list of 1"):
                module(*[[y] if j == i else y for j, y in enumerate(inputs)])


# what is no tensor


class Output:
    """As models of transformers give one."""

    logits = torch.zeros(6, 10)


@every_loss
def test_what_is_no_tensor(call: Call) -> None:
    """Named, with what a model gives instead of one."""
    given = call.given()
    for argument, x in given.items():
        for wrong, words in (
            ((), "one tensor.*, got a tuple of 0 .*attn_implementation='eager'"),
            ([], "one tensor.*, got a list of 0 .*attn_implementation='eager'"),
            ([x, x], "one tensor, so that the loss is called for each pair, got a list of 2"),
            (Output(), "one tensor, such as its logits, got a Output"),
            (x.numpy(), "one tensor, got a ndarray"),
            (3.0, "one tensor, got a float"),
        ):
            with pytest.raises(TypeError, match=rf"^\w+_loss: {argument}: expected {words}"):
                call.loss(**(given | {argument: wrong}))
    if "weight" not in given:
        with pytest.raises(TypeError, match="expected one tensor, got a NoneType"):
            call.loss(**(given | {call.constants[0]: None}))


def test_a_head_of_one_logit() -> None:
    """Whose softmax is always 1, whatever it learns."""
    for shape, class_dim in (((4, 1), -1), ((4, 1, 3, 3), 1), ((1,), 0)):
        x = torch.randn(shape, requires_grad=True)
        with pytest.raises(
            ValueError, match=r"expected 2 classes or more.*binary_cross_entropy_with_logits"
        ):
            kd_loss(x, x.detach(), class_dim=class_dim)
