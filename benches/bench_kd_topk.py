"""kd_loss_topk beside a dense teacher made of its K classes, and torch's soft cross-entropy.

The pass reads the student once and writes its gradient once, as a copy does; the exponentials are
what it does on top. CPU time of one thread.
"""

from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F

from features import compiled, every_device
from vitkd_fast.functional import kd_loss_topk

ROWS, CLASSES, K, T = 4096, 1000, 10, 4.0


def densified(student, indices, values, log_sum_exp):
    """What people write: the tail is shared by the other classes."""
    p = (values / T - log_sum_exp.unsqueeze(-1)).exp()
    rest = (1 - p.sum(-1, keepdim=True)) / (CLASSES - K)
    dense = rest.expand(-1, CLASSES).scatter(-1, indices, p)
    entropy = (dense * dense.log()).sum(-1).mean()
    return T * T * (F.cross_entropy(student / T, dense) + entropy)


def timed(run):
    start = time.thread_time()
    run()
    return time.thread_time() - start


@pytest.mark.parametrize("tail", ["smooth", "bin"])
@every_device
def bench_forward_backward(race, device, where, tail):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(2, ROWS, CLASSES, generator=generator)).to(device)
    student.requires_grad_()
    values, indices = teacher.topk(K)
    log_sum_exp = (teacher / T).logsumexp(-1)
    small = indices.short(), values.half()
    dense = compiled(densified)

    def step(loss):
        def run():
            student.grad = None
            value = loss()
            value.backward()
            return value

        return run

    def ours(kind=tail):
        return kd_loss_topk(student, *small, log_sum_exp=log_sum_exp, temperature=T, tail=kind)

    exact = student.detach().double().requires_grad_()
    kept = small[1].double()
    want = densified(exact, indices, kept, log_sum_exp.double())
    (want_grad,) = torch.autograd.grad(want, exact)

    def check(name, contender):
        if name == "copy" or (name == "vitkd_fast" and tail != "smooth"):
            return
        loose = 1e-2 if name != "vitkd_fast" else 1e-4  # which takes float16
        torch.testing.assert_close(contender().double(), want, rtol=loose, atol=0)
        assert (student.grad.double() - want_grad).norm() / want_grad.norm() < loose

    data, out = student.detach(), torch.empty_like(student)
    size = 4 * student.numel()
    race(
        {
            "vitkd_fast": step(ours),
            "torch.compile": step(lambda: dense(student, indices, values, log_sum_exp)),
            "eager": step(lambda: densified(student, indices, values, log_sum_exp)),
            "copy": lambda: out.copy_(data),
        },
        check=check,
        moved=2 * size,
        roof="copy",
        roof_moved=2 * size,
        memory=("vitkd_fast", "torch.compile", "eager"),
        timed=timed if device.type == "cpu" else None,
    )
