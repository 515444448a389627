"""at_loss: ready maps, and what is said of arguments that are not accepted."""

import pytest

from support.feature_tools import (
    Bad,
    assert_near,
    assert_refused,
    draw,
    every_device,
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


# errors

X, T, TOKENS = draw(2, 5, 4, 4), draw(2, 7, 4, 4), draw(2, 16, 7)
BAD: dict[str, Bad] = {
    "at_dtype": (lambda: at_loss(X.int(), T), TypeError, "f_s is torch.int32; accepted are float"),
    "at_teacher_dtype": (lambda: at_loss(X, T.int()), TypeError, "f_t is torch.int32; accepted"),
    "at_form": (lambda: at_loss(X[0, 0], T), ValueError, "f_s has shape [4, 4]; accepted are"),
    "at_teacher_form": (lambda: at_loss(X, T[0, 0, 0]), ValueError, "f_t has shape [4]; accepted"),
    "at_batch": (lambda: at_loss(X, T[:1]), ValueError, "differ in batch"),
    "at_p": (lambda: at_loss(X, T, p=0.5), ValueError, "p is 0.5; accepted are numbers >= 1"),
    "at_tokens": (lambda: at_loss(X, TOKENS[:, 1:]), ValueError, "f_t has 15 positions"),
    "at_grid": (
        lambda: at_loss(X, TOKENS, teacher_grid=(3, 5)), ValueError,
        "teacher_grid is (3, 5), and f_t has 16 positions",
    ),
    "at_map_grid": (
        lambda: at_loss(X, T, teacher_grid=(2, 8)), ValueError,
        "teacher_grid is (2, 8), and f_t has (4, 4)",
    ),
    "at_empty": (lambda: at_loss(X[:, :, :0], T), ValueError, "f_s [2, 5, 0, 4] is empty"),
    "at_reduction": (
        lambda: at_loss(X, T, reduction="max"), ValueError,
        "reduction is 'max'; accepted are mean, sum and none",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    assert_refused(name, *BAD[name])
