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
