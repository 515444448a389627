"""Losses of relations and distributions beside unfused PyTorch: see features.py.

CPU time, not the wall clock's. The unfused ones are as public repositories have them: each Gram or
kernel matrix, pair, softmax and transport plan is materialised.
"""

from __future__ import annotations

import math
import time

import pytest
import torch
import torch.nn.functional as F

from features import checker, compiled, draw, every_device, step
from vitkd_fast.functional import cc_loss, pkt_loss, sp_loss

N, DIM, DIM_T = 256, 1280, 384


def public_sp(x_s, x_t):
    g_s, g_t = F.normalize(x_s @ x_s.t()), F.normalize(x_t @ x_t.t())
    return (g_t - g_s).square().sum() / len(x_s) ** 2


def public_pkt(x_s, x_t):
    near = [(x / x.pow(2).sum(1, keepdim=True).sqrt() for x in (x_s, x_t))]
    s, t = ((x @ x.t() + 1) / 2 for x in near[0])
    s, t = s / s.sum(1, keepdim=True), t / t.sum(1, keepdim=True)
    return ((t + 1e-7) * ((t + 1e-7) / (s + 1e-7)).log()).sum() / len(x_s)


def public_cc(x_s, x_t):
    def kernel(x):
        x = F.normalize(x)
        cosine = x @ x.t()
        return math.exp(-0.8) * sum((0.8 * cosine) ** p / math.factorial(p) for p in range(3))

    return (kernel(x_s) - kernel(x_t)).square().mean()


def embeddings():
    return [draw(N, DIM)], [draw(N, DIM_T)]


# loss, the unfused one, the student's tensors and the teacher's, what else they take
CASES = {
    "sp": (sp_loss, public_sp, embeddings, {}),
    "pkt": (pkt_loss, public_pkt, embeddings, {}),
    "cc": (cc_loss, public_cc, embeddings, {}),
}


def cpu_seconds(run):
    start = time.process_time()
    run()
    return time.process_time() - start


@pytest.mark.parametrize("name", CASES)
@every_device
def bench_forward_backward(race, capsys, device, where, name):
    ours, public, draw_inputs, options = CASES[name]
    inputs, constants = ([x.to(device) for x in of] for of in draw_inputs())
    for x in inputs:
        x.requires_grad_()
    losses = {"vitkd_fast": ours, "torch.compile": compiled(public), "eager": public}
    contenders = {
        key: step(lambda *x, of=of: of(*x, **options), inputs, constants)
        for key, of in losses.items()
    }
    table = race(
        contenders,
        check=checker(lambda *x: public(*x, **options), inputs, constants, 1e-3),
        memory=tuple(losses),
        rounds=7,
        timed=cpu_seconds if device.type == "cpu" else None,
    )
    mine, lines = table["vitkd_fast"], []
    for other in ("torch.compile", "eager"):
        row = table[other]
        row["times_ours"] = row["median_us"] / mine["median_us"]
        row["memory_times_ours"] = row["peak_mb"] / mine["peak_mb"]
        lines.append(
            f"  {other:22} {row['times_ours']:8.2f} x our time "
            f"{row['memory_times_ours']:8.2f} x our memory"
        )
    with capsys.disabled():
        print("\n".join(lines))
