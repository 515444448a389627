"""dist_loss beside the authors' form, eager and compiled, and a copy of the bytes of 5 passes.

4 reads and 1 write, with an exponential of each logit in both passes. CPU time of one thread.
"""

from __future__ import annotations

import time

import torch

from features import compiled, every_device
from vitkd_fast import reference
from vitkd_fast.functional import dist_loss

ROWS, CLASSES = 4096, 1000


def public(student, teacher):
    def cosine(a, b, eps=1e-8):
        return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + eps)

    def pearson(a, b):
        return cosine(a - a.mean(1).unsqueeze(1), b - b.mean(1).unsqueeze(1))

    q, p = student.softmax(1), teacher.softmax(1)
    return 1 - pearson(q, p).mean() + 1 - pearson(q.transpose(0, 1), p.transpose(0, 1)).mean()


def timed(run):
    start = time.thread_time()
    run()
    return time.thread_time() - start


@every_device
def bench_forward_backward(race, device, where):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(2, ROWS, CLASSES, generator=generator)).to(device)
    student.requires_grad_()

    def step(loss):
        def run():
            student.grad = None
            value = loss(student, teacher)
            value.backward()
            return value

        return run

    exact = student.detach().double().requires_grad_()
    want = reference.dist_loss(exact, teacher.double())
    (want_grad,) = torch.autograd.grad(want, exact)

    def check(name, contender):
        if name != "copy":
            torch.testing.assert_close(contender().double(), want, rtol=1e-4, atol=0)
            assert (student.grad.double() - want_grad).norm() / want_grad.norm() < 1e-4

    data, out = student.detach(), torch.empty_like(student)
    size = 4 * student.numel()
    race(
        {
            "vitkd_fast": step(dist_loss),
            "torch.compile": step(compiled(public)),
            "eager": step(public),
            "copy": lambda: out.copy_(data),
        },
        check=check,
        moved=5 * size,
        roof="copy",
        roof_moved=2 * size,
        memory=("vitkd_fast", "torch.compile", "eager"),
        timed=timed if device.type == "cpu" else None,
    )
