"""attention_map_loss in autograd, where it has more than test_contract.py says of every loss."""

import itertools

import pytest
import torch

from support.attention_map_tools import (
    BFLOAT,
    HALF,
    KINDS,
    MAIN_OPTIONS,
    OPTIONS,
    PATHS,
    REDUCTIONS,
    Maps,
    assert_same,
    check,
    every_device,
    every_kind,
    loss_and_grads,
    maps,
)
from vitkd_fast import _ops
from vitkd_fast.functional import attention_map_loss

pytestmark = pytest.mark.usefixtures("one_thread")


# autograd

every_path = pytest.mark.parametrize(("dtype", "reduction"), PATHS, ids=str)
SMALL = (2, 2, 5, 7, 16, 8)


@pytest.mark.every_isa
@every_device
@every_path
def test_loss_times_a_factor(dtype: torch.dtype, reduction: str, device: str) -> None:
    """The incoming gradient is any number, and 0 for what has no share in the result.

    In bfloat16 a gradient that was formed in the forward is rounded again by a factor that is no
    power of 2.
    """
    x = maps(*SMALL, dtype=dtype, device=device)
    for factor in (3.0, -0.7, 0.0, 65536.0, 2.0**-10):
        for kind, name in zip(KINDS, itertools.cycle(MAIN_OPTIONS), strict=False):
            check(
                x, kind=kind, reductions=[reduction], grad_loss=factor,
                roundings=2 if dtype == BFLOAT and factor in (3.0, -0.7) else 1,
                **OPTIONS[name](x),
            )  # fmt: skip


@every_device
def test_gradient_scale_reaches_float16_before_it_is_rounded(device: str) -> None:
    """Scaled by 65536, gradients that float16 would have lost: many of them are lost without."""
    x = maps(16, 8, 49, dtype=HALF, device=device)
    near = (x.q_s.float() * (1 + 2e-3)).half()
    x = Maps(*x.student, near, x.k_s)
    for kind in KINDS:
        lost = loss_and_grads(x, kind=kind)
        assert min((y == 0).float().mean() for y in lost[1:]) > 0.3
        incoming = torch.tensor(65536.0, device=device)
        kept = loss_and_grads(x, incoming=incoming, kind=kind)
        assert max((y == 0).float().mean() for y in kept[1:]) < 0.001
        check(x, kind=kind, reductions=["mean"], grad_loss=65536.0)


@every_device
@every_path
@pytest.mark.parametrize("of", [(True, False), (False, True)], ids=["q_s", "k_s"])
def test_gradient_of_one_alone(
    of: tuple[bool, bool], dtype: torch.dtype, reduction: str, device: str
) -> None:
    x = maps(*SMALL, dtype=dtype, device=device)
    want = loss_and_grads(x, reduction=reduction)
    leaves = [
        y.detach().requires_grad_(required) for y, required in zip(x.student, of, strict=True)
    ]
    attention_map_loss(*leaves, *x.teacher, reduction=reduction).sum().backward()
    for leaf, required, grad in zip(leaves, of, want[1:], strict=True):
        if required:
            assert torch.equal(leaf.grad, grad)
        else:
            assert leaf.grad is None


# the same bits


@pytest.mark.every_isa
@pytest.mark.emulated(shape=[(1, 1, 20, 150, 16)])
@every_device
@every_kind
@pytest.mark.parametrize(
    "shape", [(3, 2, 49, 49, 24), (1, 5, 100, 197, 16), (1, 1, 20, 150, 16)], ids=str
)
def test_bitwise_the_same(shape: tuple[int, ...], kind: str, device: str) -> None:
    """Twice, and for any number of threads."""
    x = maps(*shape, device=device)
    options = OPTIONS["mask"](x) | {"kind": kind}
    for reduction in REDUCTIONS:
        results = []
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            results.append(loss_and_grads(x, reduction=reduction, **options))
        for result in results[1:]:
            assert_same(result, results[0])


@every_kind
def test_head_is_the_same_alone(kind: str) -> None:
    """Wherever it stands in a batch, and whoever stands beside it: threads share the heads out."""
    if _ops.backends()["attention_map_fwd"]["CPU"] == "reference":
        pytest.skip("torch's products may depend on the batch")
    x = maps(3, 2, 20, 33, 24)
    for reduction in ("sum", "none"):
        _, *grads = loss_and_grads(x, kind=kind, reduction=reduction)
        for i, j in itertools.product(range(3), range(2)):
            alone = Maps(*(y[i : i + 1, j : j + 1] for y in x))
            given = loss_and_grads(alone, kind=kind, reduction=reduction)[1:]
            assert_same(given, [grad[i : i + 1, j : j + 1] for grad in grads])
