"""wkd_logit_loss: the authors' form, transport, costs, arguments that are not accepted."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from support.feature_tools import DOUBLE, Bad, Largest, assert_refused, draw, loss_and_grad
from support.relation_tools import line_of, seeded
from vitkd_fast import reference
from vitkd_fast.functional import wkd_cost, wkd_logit_loss

LABELS = torch.tensor([3, 0, 6, 6])


def test_is_the_public_form() -> None:
    """The authors', whose 1e-8 in denominators is what differs."""
    x, t = draw(4, 7, dtype=DOUBLE), draw(4, 7, dtype=DOUBLE)
    cost = wkd_cost(draw(7, 5).double()) / 4  # so that 1e-8 is little beside the kernel
    mask = torch.ones_like(x).scatter_(1, LABELS[:, None], 0).bool()
    each = cost.repeat(4, 1, 1)[mask.unsqueeze(1) * mask.unsqueeze(2)].reshape(4, 6, 6)
    p, q = (F.softmax(a[mask].reshape(4, -1) / 2, dim=-1).unsqueeze(-1) for a in (x, t))
    u = 1 / 6 * torch.ones_like(p)
    kernel = torch.exp(-each / 0.05)
    for _ in range(10):
        v = q / (torch.bmm(kernel.transpose(2, 1), u) + 1e-8)
        u = p / (torch.bmm(kernel, v) + 1e-8)
    flow = u.reshape(4, -1, 1) * kernel * v.reshape(4, 1, -1)
    want = (flow * each).sum(-1).sum(-1).mean()
    label = LABELS[:, None]
    own = F.softmax(t, 1).gather(1, label) * F.log_softmax(x, 1).gather(1, label)
    loss = partial(wkd_logit_loss, x, t, cost, LABELS)
    torch.testing.assert_close(loss(target_weight=0), want, rtol=1e-4, atol=0)
    torch.testing.assert_close(loss(transport_weight=0), -own.mean())
    torch.testing.assert_close(
        loss(target_weight=3, transport_weight=2), 2 * loss(target_weight=0) - 3 * own.mean()
    )


@pytest.mark.parametrize("with_labels", [True, False])
@pytest.mark.parametrize("iterations", [1, 2, 30])
def test_iterations_match(iterations: int, with_labels: bool) -> None:
    x, t, cost = draw(4, 7), draw(4, 7), wkd_cost(draw(7, 5))
    labels = LABELS if with_labels else None
    given = loss_and_grad(
        lambda a, b: wkd_logit_loss(a, b, cost, labels, iterations=iterations), x, t
    )
    want = loss_and_grad(
        lambda a, b: reference.wkd_logit_loss(
            a, b, cost.double(), labels, iterations=iterations
        ).mean(),
        x.double(),
        t.double(),
    )
    for a, b in zip(given, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


def test_little_entropy_is_transport() -> None:
    """On a line it is the sum of differences of distribution functions; float32 is enough."""
    x, t = draw(3, 8), draw(3, 8)
    cost = line_of(8, x).float()
    p, q = (x / 2).softmax(1), (t / 2).softmax(1)
    want = (p.cumsum(1) - q.cumsum(1)).abs().sum(1) / 8
    given = wkd_logit_loss(x, t, cost, regularization=0.02, iterations=500, reduction="none")
    torch.testing.assert_close(given, want, rtol=0.05, atol=5e-3)


@given(seed=st.integers(0, 2**31))
def test_orders_of_classes_change_nothing(seed: int) -> None:
    new = seeded(seed)
    x, t, cost = new(4, 7), new(4, 7), wkd_cost(new(7, 3))
    order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    want = wkd_logit_loss(x, t, cost, LABELS)
    labels = order.argsort()[LABELS]
    given = wkd_logit_loss(x[:, order], t[:, order], cost[order][:, order], labels)
    assert torch.allclose(given, want, rtol=1e-9)
    # the label's logits and costs count for its own term alone
    other, far = x.clone(), cost.clone()
    other[torch.arange(4), LABELS] += 3
    far[3] = far[:, 3] = 9
    alone = partial(wkd_logit_loss, target_weight=0)
    assert torch.allclose(alone(other, t, cost, LABELS), alone(x, t, cost, LABELS), rtol=1e-9)
    of_one = slice(0, 1), torch.tensor([3])
    a, b = (alone(x[:1], t[:1], c, of_one[1]) for c in (cost, far))
    assert torch.allclose(a, b, rtol=1e-9)


@pytest.mark.parametrize("size", [1.0, 100.0, 1e4])
def test_extreme_logits_are_float64s(size: float) -> None:
    """Mass that goes from one class to another, far or near: 1e-9 and less of the kernel."""
    x, t, cost = size * draw(6, 9), size * draw(6, 9), line_of(9, draw(1)).float()
    labels = torch.arange(6)
    given = loss_and_grad(lambda a, b: wkd_logit_loss(a, b, cost, labels), x, t)
    want = loss_and_grad(
        lambda a, b: wkd_logit_loss(a, b, cost.double(), labels), x.double(), t.double()
    )
    for a, b in zip(given, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def test_no_kernel_per_row() -> None:
    x, t, cost = draw(64, 50), draw(64, 50), wkd_cost(draw(50, 8))
    with Largest() as largest:
        loss_and_grad(lambda a, b: wkd_logit_loss(a, b, cost, torch.arange(64) % 50), x, t)
    assert largest.numel <= x.numel()


def test_costs() -> None:
    cost = wkd_cost(torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [-1.0, 0.0]]))
    assert (cost.diagonal() == 0).all()
    want = torch.tensor([0, 0, 1, 2])
    torch.testing.assert_close(cost[0], 1 - torch.exp(-2.0 * want))
    assert torch.equal(cost, cost.mT)


X, C = draw(4, 7), wkd_cost(draw(7, 5))
BAD: dict[str, Bad] = {
    "wkd_form": (
        lambda: wkd_logit_loss(X[0], X[0], C), ValueError, "student: expected [batch, classes] of",
    ),
    "wkd_shape": (
        lambda: wkd_logit_loss(X, X[:2], C), ValueError, "teacher: expected the shape of student",
    ),
    "wkd_cost": (
        lambda: wkd_logit_loss(X, X, C[:5]), ValueError, "cost: expected [classes, classes], [7,",
    ),
    "wkd_learned": (
        lambda: wkd_logit_loss(X, X, C.clone().requires_grad_()), ValueError, "cost: expected a co",
    ),
    "wkd_labels": (
        lambda: wkd_logit_loss(X, X, C, LABELS[:2]), ValueError, "labels: expected int64 class ids",
    ),
    "wkd_temperature": (
        lambda: wkd_logit_loss(X, X, C, temperature=0), ValueError, "temperature: expected a num",
    ),
    "wkd_iterations": (
        lambda: wkd_logit_loss(X, X, C, iterations=0), ValueError, "iterations: expected an int",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    assert_refused(name, *BAD[name])


def test_a_label_out_of_range_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="out of bounds"):
        wkd_logit_loss(X, X, C, torch.tensor([0, 1, 2, 7]))
