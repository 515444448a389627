"""Divergences of rows beside eager torch, torch.compile and a copy (2 reads and 1 write: the roof).

reverse_kl_loss, js_loss, tv_loss, dkd_loss, and standardised logits; forward and backward, as most
repositories write them. `percent_of_copy` counts three passes.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from bench_kd import training_step
from vitkd_fast import functional

T = 4.0
SHAPES = [
    pytest.param("cpu", (4096, 1000), id="cpu-4096x1000"),
    pytest.param("cuda", (4096, 1000), id="cuda-4096x1000", marks=pytest.mark.gpu),
    pytest.param("cuda", (4096, 21841), id="cuda-4096x21841", marks=pytest.mark.gpu),
]


def reverse_kl(s, t, y):
    log_q, log_p = F.log_softmax(s / T, -1), F.log_softmax(t / T, -1)
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True) * T * T


def js(s, t, y):
    log_q, log_p = F.log_softmax(s / T, -1), F.log_softmax(t / T, -1)
    log_m = torch.logaddexp(log_q, log_p) - math.log(2)
    both = [F.kl_div(log_m, x, reduction="batchmean", log_target=True) for x in (log_p, log_q)]
    return sum(both) / 2 * T * T


def tv(s, t, y):
    return (F.softmax(s / T, -1) - F.softmax(t / T, -1)).abs().sum(-1).mean() / 2 * T * T


def dkd(s, t, y):
    label = F.one_hot(y, s.shape[1]).bool()
    q, p = F.softmax(s / T, -1), F.softmax(t / T, -1)
    q_y, p_y = (x.masked_fill(~label, 0).sum(-1) for x in (q, p))
    target = F.kl_div(
        torch.stack([q_y, 1 - q_y], 1).log(), torch.stack([p_y, 1 - p_y], 1), reduction="batchmean"
    )
    log_q, log_p = (F.log_softmax(x / T - 1000.0 * label, -1) for x in (s, t))
    others = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    return (target + 8 * others) * T * T


def standardized(x):
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-7)


def kd(s, t, y):
    log_q, log_p = F.log_softmax(s / T, -1), F.log_softmax(t / T, -1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * T * T


LOSSES = {
    "reverse_kl": (reverse_kl, lambda s, t, y: functional.reverse_kl_loss(s, t, temperature=T)),
    "js": (js, lambda s, t, y: functional.js_loss(s, t, temperature=T)),
    "tv": (tv, lambda s, t, y: functional.tv_loss(s, t, temperature=T)),
    "dkd": (dkd, lambda s, t, y: functional.dkd_loss(s, t, y, temperature=T)),
    "kd_standardized": (
        lambda s, t, y: kd(standardized(s), standardized(t), y),
        lambda s, t, y: functional.kd_loss(s, t, temperature=T, standardize=True),
    ),
    "dkd_standardized": (
        lambda s, t, y: dkd(standardized(s), standardized(t), y),
        lambda s, t, y: functional.dkd_loss(s, t, y, temperature=T, standardize=True),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("where", "shape"), SHAPES)
def bench_forward_backward(race, capsys, device, where, shape, name):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(shape, generator=generator).to(device) for _ in range(2))
    labels = torch.randint(shape[1], shape[:1], generator=generator).to(device)
    naive, ours = LOSSES[name]
    torch.compiler.reset()
    compiled = torch.compile(naive, dynamic=False)
    data, out = student, torch.empty_like(student)
    student = student.clone().requires_grad_()
    exact = student.detach().double().requires_grad_()
    want = naive(exact, teacher.double(), labels)
    (want_grad,) = torch.autograd.grad(want, exact)

    def check(contender_name, contender):
        student.grad = None
        value = contender()
        if contender_name == "copy":
            return
        torch.testing.assert_close(value.double(), want, rtol=1e-3, atol=0)
        error = (student.grad.double() - want_grad).norm() / want_grad.norm()
        assert error < 1e-3, f"{contender_name}: gradient is wrong by {error:.1e}"

    size = student.numel() * student.element_size()
    contenders = {"vitkd_fast": ours, "torch.compile": compiled, "eager": naive}
    table = race(
        {
            **{x: training_step(loss, student, teacher, labels) for x, loss in contenders.items()},
            "copy": lambda: out.copy_(data),
        },
        check=check,
        moved=3 * size,
        roof="copy",
        roof_moved=2 * size,
        memory=tuple(contenders),
    )
    times = {x: row["median_us"] / table["vitkd_fast"]["median_us"] for x, row in table.items()}
    with capsys.disabled():
        print(
            f"  torch.compile {times['torch.compile']:.1f}x, eager {times['eager']:.1f}x of our "
            f"time; ours {1 / (1.5 * times['copy']):.2f}x of a copy of its bytes"
        )
