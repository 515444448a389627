"""relation_loss: attention_map_loss whose queries and keys are one; values, gradients, errors."""

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from support.attention_map_tools import (
    DOUBLE,
    DTYPES,
    FLOAT,
    HALF,
    OPTIONS,
    Maps,
    draw,
    every_device,
    every_kind,
    every_reduction,
    key_mask,
    loss_and_grads,
    maps,
    sized,
    torch_rows,
)
from vitkd_fast import _ops
from vitkd_fast.functional import relation_loss

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.every_isa
@every_device
@every_kind
@every_reduction
@pytest.mark.parametrize("dtype", [FLOAT, HALF, DOUBLE], ids=str)
def test_relations_match(dtype: torch.dtype, reduction: str, kind: str, device: str) -> None:
    """attention_map_loss of a tensor with itself; its gradient is that of both roles."""
    x = maps(2, 3, 9, dtype=dtype, device=device, dim_t=24)
    x_s, x_t = x.q_s, x.q_t
    options = OPTIONS["everything"](x) | {"kind": kind, "reduction": reduction}
    leaf = x_s.clone().requires_grad_()
    loss = relation_loss(leaf, x_t, **options)
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    want = loss_and_grads(Maps(x_s, x_s, x_t, x_t), **options)
    assert torch.equal(loss, want.loss)
    assert torch.equal(grad, want.d_q + want.d_k)
    if dtype == DOUBLE:
        options = options | {"reduction": "none"}
        rows, autograd = torch_rows(x_s, x_s, x_t, x_t, **options), x_s.clone().requires_grad_()
        summed = torch_rows(autograd, autograd, x_t, x_t, **options)
        assert_close(want.loss.sum(), rows.mean() if reduction == "mean" else rows.sum())
        share = 1 / rows.numel() if reduction == "mean" else 1
        assert_close(grad, torch.autograd.grad(summed.sum() * share, autograd)[0])


@pytest.mark.every_isa
@every_device
@every_reduction
def test_relations_of_three_dimensions_match(reduction: str, device: str) -> None:
    """One head, which the result does not show."""
    x_s, x_t = draw(2, 9, 16, device=device), draw(2, 9, 24, device=device)
    options = {"reduction": reduction, "key_mask": key_mask(2, 9, device), "temperature": 2.0}
    results = []
    for of in (lambda y: y, lambda y: y.unsqueeze(1)):
        leaf = x_s.clone().requires_grad_()
        loss = relation_loss(of(leaf), of(x_t), **options)
        results.append((loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]))
    (loss, grad), (want, want_grad) = results
    assert loss.shape == ((2, 9) if reduction == "none" else ())
    assert torch.equal(loss, want.squeeze(1) if reduction == "none" else want)
    assert torch.equal(grad, want_grad)


def test_relations_of_a_batch_of_one_keep_their_shape() -> None:
    """Only the head that was put in is taken out."""
    for shape in ((1, 1, 1, 8), (1, 1, 8), (2, 1, 3, 8), (1, 3, 8)):
        loss = relation_loss(draw(*shape), draw(*shape), reduction="none")
        assert loss.shape == shape[:-1]


# bad input

RELATIONS = {"x_s": torch.zeros(2, 3, 5, 4), "x_t": torch.zeros(2, 3, 5, 6)}
RANKS = "[batch, heads, tokens, dim] or [batch, tokens, dim]"
BAD_RELATIONS: dict[str, tuple[dict[str, Any], type[Exception], str, str]] = {
    "ranks": ({"x_t": sized(2, 5, 6)}, ValueError, "x_t: [2, 5, 6]", RANKS),
    "x_s 2-D": ({"x_s": sized(5, 4), "x_t": sized(5, 4)}, ValueError,
                "x_s: [5, 4]", RANKS),
    "x_s 5-D": ({"x_s": sized(1, 2, 3, 5, 4)}, ValueError, "x_s: [1, 2, 3, 5, 4]", RANKS),
    "batch": ({"x_t": sized(1, 3, 5, 6)}, ValueError,
              "x_t: [1, 3, 5, 6]", "the batch of x_s [2, 3, 5, 4]"),
    "heads": ({"x_t": sized(2, 1, 5, 6)}, ValueError,
              "x_t: [2, 1, 5, 6]", "the heads of x_s [2, 3, 5, 4]"),
    "tokens": ({"x_t": sized(2, 3, 6, 6)}, ValueError,
               "x_t: [2, 3, 6, 6]", "the tokens of x_s [2, 3, 5, 4]"),
    "tokens of one head": ({"x_s": sized(2, 5, 4), "x_t": sized(2, 6, 6)}, ValueError,
                           "x_t: [2, 6, 6]", "the tokens of x_s [2, 5, 4]"),
    "x_s int": ({"x_s": sized(2, 3, 5, 4).int()}, TypeError, "x_s: torch.int32", DTYPES),
    "x_t int": ({"x_t": sized(2, 3, 5, 6).long()}, TypeError, "x_t: torch.int64", DTYPES),
    "device": ({"x_t": sized(2, 3, 5, 6, device="meta")}, ValueError, "x_t: meta",
               "the device of x_s, cpu"),
    "no tokens": ({"x_s": sized(2, 3, 0, 4), "x_t": sized(2, 3, 0, 6)}, ValueError,
                  "x_s: [2, 3, 0, 4]", "1 token"),
    "no dim": ({"x_t": sized(2, 3, 5, 0)}, ValueError, "x_t: [2, 3, 5, 0]", "1 dim"),
    "kind": ({"kind": "l2"}, ValueError, "kind: 'l2'", "expected kl, reverse_kl, js or mse"),
    "mask": ({"key_mask": sized(2, 4).bool()}, ValueError, "key_mask: torch.bool [2, 4]",
             "one per key, [2, 5]"),
    "mask device": ({"key_mask": sized(2, 5, dtype=torch.bool, device="meta")}, ValueError,
                    "key_mask: meta", "the device of the student, cpu"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_RELATIONS)
def test_bad_relations(name: str) -> None:
    """Errors speak of the arguments that relation_loss has."""
    options, error, given, accepted = BAD_RELATIONS[name]
    with pytest.raises(error) as caught:
        relation_loss(**RELATIONS | options)
    argument, got = given.split(": ")
    said = str(caught.value)
    assert f"relation_loss: {argument}: expected " in said
    assert f"got {got}" in said
    assert accepted in said
    for other in (*Maps._fields, "attention_map_loss"):
        assert other not in said


def test_a_row_of_relations_without_keys() -> None:
    if _ops.backends()["attention_map_fwd"]["CPU"] == "reference":
        pytest.skip("the reference gives 0 on any device")
    mask = torch.tensor([[True] * 5, [False] * 5])
    with pytest.raises(RuntimeError, match="key_mask keeps no key of batch element 1"):
        relation_loss(draw(2, 5, 4), draw(2, 5, 4), key_mask=mask)
