"""at_loss: its operation in every layout, ready maps, and arguments that are not accepted."""

from itertools import product

import pytest
import torch

from support.feature_tools import (
    BFLOAT,
    DOUBLE,
    FLOAT,
    HALF,
    OPS,
    Bad,
    assert_near,
    assert_refused,
    assert_strides_promised,
    draw,
    every_device,
    in_every_layout,
    loss_and_grad,
)
from vitkd_fast import reference
from vitkd_fast.functional import at_loss

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.every_isa
@every_device
def test_ready_map_matches(device: str) -> None:
    """The teacher's attention from the CLS token is a map already."""
    x, row = draw(3, 5, 4, 6, device=device), draw(3, 25, device=device).softmax(1)[:, 1:]
    value, grad = loss_and_grad(at_loss, x, row)
    want, want_grad = loss_and_grad(
        lambda a, b: reference.at_loss(a, b).mean(), x.double(), row.double()
    )
    assert_near(value, want, 16)
    assert_near(grad, want_grad, 16)


# below, at and above registers of 8 and 16, and the blocks of 8 channels and 1024 positions
SHAPES = [(3, 5, 1), (2, 1, 7), (3, 8, 16), (2, 17, 33), (2, 70, 8), (1, 9, 1100), (1, 1040, 3)]


@pytest.mark.every_isa
@every_device
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_operation_matches(shape: tuple[int, int, int], p: int, device: str) -> None:
    """Loss and gradient of at_fwd_grad in any layout and dtype, beside autograd in float64."""
    b, c, n = shape
    drawn, teacher = draw(b, c, n, device=device), draw(b, 2 * c + 1, n, device=device)
    for dtype, (form, x) in product((FLOAT, HALF, BFLOAT, DOUBLE), in_every_layout(drawn).items()):
        x, t = x.to(dtype), in_every_layout(teacher)[form].to(dtype)
        leaf = x.double().unsqueeze(-1).requires_grad_()
        rows = reference.at_loss(leaf, t.double().unsqueeze(-1), p)
        for reduction in (reference.NONE, reference.MEAN, reference.SUM):
            want = rows if reduction == reference.NONE else rows.sum()
            want = want / b if reduction == reference.MEAN else want
            (want_grad,) = torch.autograd.grad(want.sum(), leaf, retain_graph=True)
            loss, grad = OPS.at_fwd_grad(x, t, p, reduction, True)
            assert_strides_promised(grad, x)
            assert grad.dtype == (FLOAT if dtype == HALF else dtype)
            assert_near(loss, want.detach(), 16, size=1.0)
            assert_near(grad, want_grad.squeeze(-1), 32, size=largest_slope(leaf, p, reduction))
            alone, none = OPS.at_fwd_grad(x, t, p, reduction, False)
            assert torch.equal(alone, loss)
            assert none.shape == (0,)


def largest_slope(x: torch.Tensor, p: int, reduction: int) -> float:
    """What the gradient would be, were nothing of it along the map: the size that is rounded."""
    lengths = x.detach().abs().pow(p).sum(1).flatten(1).norm(dim=1)
    steepest = x.detach().abs().amax() if p == 2 else 1.0
    mean = len(x) if reduction == reference.MEAN else 1
    return float((2 * p * steepest / lengths).max() / mean)


@pytest.mark.every_isa
def test_threads_change_nothing() -> None:
    x, t = draw(9, 24, 14, 14), draw(9, 196, 48)
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(loss_and_grad(at_loss, x, t))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.every_isa
@every_device
@pytest.mark.parametrize("p", [1.0, 2.0])
def test_zeros_stay_zeros_and_outliers_are_right(p: float, device: str) -> None:
    x, t = draw(3, 5, 4, 6, device=device), draw(3, 24, 7, device=device)
    x[0] = 0
    t[1] = 0
    x[2, 1] *= 1e4
    value, grad = loss_and_grad(lambda a, b: at_loss(a, b, p=p, reduction="sum"), x, t)
    want, want_grad = loss_and_grad(
        lambda a, b: reference.at_loss(a, b, p).sum(), x[1:].double(), t[1:].double()
    )
    assert_near(value - 1, want, 16, size=3.0)  # of the first sample, whose map is 0
    # without a teacher's map, nothing is left of the gradient but rounding
    assert_near(grad[1:], want_grad, 32, size=largest_slope(x[1:], int(p), reference.SUM))
    assert torch.equal(grad[0], torch.zeros_like(grad[0]))


# errors


def test_operation_refuses() -> None:
    x = draw(2, 5, 4)
    for arguments, words in {
        (x[0], x, 2): "f_s: expected [batch, channels, positions], got [5, 4]",
        (x, x[..., :3], 2): "f_t: expected [batch, channels, positions] or [batch, positions] of",
        (x, x.double(), 2): "f_t: expected float64 where f_s is float64, else float32, float16",
        (x, x[:, 0].half(), 2): "float64, else float32, got Half",
        (x, x, 3): "p: expected 1 or 2, got 3",
    }.items():
        with pytest.raises(RuntimeError) as caught:
            torch.ops.vitkd_fast.at_fwd_grad(*arguments, reference.SUM, True)
        assert words in str(caught.value)


X, T, TOKENS = draw(2, 5, 4, 4), draw(2, 7, 4, 4), draw(2, 16, 7)
BAD: dict[str, Bad] = {
    "at_dtype": (lambda: at_loss(X.int(), T), TypeError, "f_s: expected float32, float16"),
    "at_teacher_dtype": (lambda: at_loss(X, T.int()), TypeError, "f_t: expected float32, "),
    "at_form": (lambda: at_loss(X[0, 0], T), ValueError, "f_s: expected [batch, channels"),
    "at_teacher_form": (lambda: at_loss(X, T[0, 0, 0]), ValueError, "f_t: expected [batch, "),
    "at_batch": (lambda: at_loss(X, T[:1]), ValueError, "f_t: expected the batch"),
    "at_p": (lambda: at_loss(X, T, p=0.5), ValueError, "p: expected a number >= 1, got 0.5"),
    "at_tokens": (lambda: at_loss(X, TOKENS[:, 1:]), ValueError, "got 15 positions"),
    "at_grid": (
        lambda: at_loss(X, TOKENS, teacher_grid=(3, 5)), ValueError,
        "teacher_grid: expected one of the 16 positions of f_t, got (3, 5)",
    ),
    "at_map_grid": (
        lambda: at_loss(X, T, teacher_grid=(2, 8)), ValueError,
        "teacher_grid: expected that of f_t, (4, 4), got (2, 8)",
    ),
    "at_empty": (lambda: at_loss(X[:, :, :0], T), ValueError, "but the batch, got [2, 5, 0, 4]"),
    "at_reduction": (
        lambda: at_loss(X, T, reduction="max"), ValueError,
        "reduction: expected mean, sum or none, got 'max'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    assert_refused(name, *BAD[name])
