"""mlkd_loss: the authors' form, both sides of its Gram matrices, arguments that are refused."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from support.feature_tools import DOUBLE, Bad, Largest, assert_refused, draw, loss_and_grad
from vitkd_fast.functional import kd_loss, mlkd_loss

TEMPERATURES = (4.0, 3.0, 5.0, 2.0, 6.0)


@pytest.mark.parametrize("shape", [(6, 11), (11, 6)], ids=str)
def test_is_the_public_form(shape: tuple[int, int]) -> None:
    """The authors', without their masks: a sum over temperatures."""
    x, t = draw(*shape, dtype=DOUBLE), draw(*shape, dtype=DOUBLE)
    batch, classes = shape
    total = [0.0, 0.0, 0.0]
    for temperature in TEMPERATURES:
        log_p, q = F.log_softmax(x / temperature, dim=1), F.softmax(t / temperature, dim=1)
        p = log_p.exp()
        kd = F.kl_div(log_p, q, reduction="none").sum(1).mean() * temperature**2
        bc = ((torch.mm(p, p.mT) - torch.mm(q, q.mT)) ** 2).sum() / batch
        cc = ((torch.mm(p.mT, p) - torch.mm(q.mT, q)) ** 2).sum() / classes
        total = [a + b.item() for a, b in zip(total, (kd, bc, cc), strict=True)]
    for which in range(3):
        weights = [float(i == which) for i in range(3)]
        names = ("kd_weight", "batch_weight", "class_weight")
        loss = partial(
            mlkd_loss, temperatures=TEMPERATURES, **dict(zip(names, weights, strict=True))
        )
        assert abs(5 * loss(x, t).item() - total[which]) < 1e-12
        leaf = x.clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda a, loss=loss: loss(a, t), leaf)


def test_of_rows_alone_is_the_mean_of_kd_losses() -> None:
    x, t = draw(5, 9), draw(5, 9)
    want = sum(kd_loss(x, t, temperature=temperature) for temperature in TEMPERATURES) / 5
    given = mlkd_loss(x, t, temperatures=TEMPERATURES, batch_weight=0, class_weight=0)
    torch.testing.assert_close(given, want)


def test_near_the_teacher_no_digits_are_lost() -> None:
    """Where the difference of Gram matrices' norms would be all rounding."""
    t = draw(6, 40)
    x = t + 1e-4 * draw(6, 40)
    loss = partial(mlkd_loss, kd_weight=0)
    value, grad = loss_and_grad(loss, x, t)
    want, want_grad = loss_and_grad(loss, x.double(), t.double())
    assert abs(value / want - 1) < 1e-2
    assert (grad - want_grad).norm() / want_grad.norm() < 1e-2
    value, grad = loss_and_grad(mlkd_loss, t, t.clone())
    assert value == 0
    assert (grad == 0).all()


@pytest.mark.parametrize("shape", [(4, 500), (500, 4)], ids=str)
def test_the_larger_gram_matrix_is_never_formed(shape: tuple[int, int]) -> None:
    x, t = draw(*shape), draw(*shape)
    with Largest() as largest:
        loss_and_grad(mlkd_loss, x, t)
    assert largest.numel <= 2 * x.numel()


X = draw(2, 5)
BAD: dict[str, Bad] = {
    "mlkd_form": (
        lambda: mlkd_loss(draw(2, 5, 3), X), ValueError, "student: expected [batch, classes] of 2",
    ),
    "mlkd_class": (
        lambda: mlkd_loss(X[:, :1], X[:, :1]), ValueError, "student: expected [batch, classes] of",
    ),
    "mlkd_shape": (
        lambda: mlkd_loss(X, draw(2, 4)), ValueError, "teacher: expected the shape of student [2, ",
    ),
    "mlkd_temperatures": (
        lambda: mlkd_loss(X, X, temperatures=()), ValueError, "temperatures: expected numbers > 0",
    ),
    "mlkd_temperature": (
        lambda: mlkd_loss(X, X, temperatures=(1, 0)), ValueError, "temperatures: expected numbers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    assert_refused(name, *BAD[name])
