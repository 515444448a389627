"""Losses of relations and distributions beside unfused PyTorch: see features.py.

CPU time, not the wall clock's. The unfused ones are as public repositories have them: each Gram or
kernel matrix, pair, softmax and transport plan is materialised.
"""

from __future__ import annotations

import math
import time
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from features import (
    BATCH,
    C_S,
    C_T,
    POSITIONS,
    SIDE,
    as_map,
    checker,
    compiled,
    draw,
    every_device,
    features,
    step,
)
from vitkd_fast.functional import (
    cc_loss,
    mmd_loss,
    pkt_loss,
    sliced_wasserstein,
    sliced_wasserstein_loss,
    sp_loss,
    wkd_feature_loss,
)

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


def public_mmd(f_s, tokens):
    s = F.normalize(f_s.flatten(2), dim=2)
    t = F.normalize(as_map(tokens).flatten(2), dim=2)

    def kernel(x, y):
        squared = (x.unsqueeze(2) - y.unsqueeze(1)).pow(2).sum(-1)
        return torch.exp(-squared / 2).mean((1, 2))

    return (kernel(t, t) + kernel(s, s) - 2 * kernel(s, t)).mean()


def public_mmd_bmm(f_s, tokens):
    """The same kernel matrices from products of matrices."""
    s = F.normalize(f_s.flatten(2), dim=2)
    t = F.normalize(as_map(tokens).flatten(2), dim=2)

    def kernel(x, y):
        return torch.exp(torch.bmm(x, y.mT) - 1).mean((1, 2))

    return (kernel(t, t) + kernel(s, s) - 2 * kernel(s, t)).mean()


def public_wkd_feature(f_s, f_t):
    def moments(x):
        return x.mean(dim=(-1, -2)), torch.sqrt(x.var(dim=(-1, -2)) + 1e-5)

    (mean_s, std_s), (mean_t, std_t) = moments(f_s), moments(f_t)
    means = F.mse_loss(mean_s, mean_t, reduction="sum") / len(f_s)
    return 2 * means + F.mse_loss(std_s, std_t, reduction="sum") / len(f_s)


def public_sliced_wasserstein(x_s, x_t):
    across = sliced_wasserstein._directions(POSITIONS, 64, 0).to(x_s.dtype).to(x_s.device)
    s, t = (torch.sort(x @ across, dim=1).values for x in (x_s, x_t))
    apart = s.repeat_interleave(C_T // C_S, 1) - t
    return apart.pow(2).mean()


def maps():
    """A few: the unfused form takes 230 MB for each."""
    student, teacher = features("cpu", "nchw")
    return [student[:4].clone()], [teacher[:4]]


def equal_maps():
    return [draw(BATCH, C_T, SIDE, SIDE)], [draw(BATCH, C_T, SIDE + 1, SIDE)[:, :, 1:]]


def channels():
    return [draw(BATCH, C_S, POSITIONS)], [draw(BATCH, C_T, POSITIONS + 1)[..., 1:]]


# loss, the unfused one, the student's tensors and the teacher's, other unfused ones
CASES = {
    "sp": (sp_loss, public_sp, embeddings, {}),
    "pkt": (pkt_loss, public_pkt, embeddings, {}),
    "cc": (cc_loss, public_cc, embeddings, {}),
    "mmd": (partial(mmd_loss, bandwidth=1.0), public_mmd, maps, {"eager, bmm": public_mmd_bmm}),
    "wkd_feature": (wkd_feature_loss, public_wkd_feature, equal_maps, {}),
    "sliced_wasserstein": (sliced_wasserstein_loss, public_sliced_wasserstein, channels, {}),
}


def cpu_seconds(run):
    start = time.process_time()
    run()
    return time.process_time() - start


@pytest.mark.parametrize("name", CASES)
@every_device
def bench_forward_backward(race, capsys, device, where, name):
    ours, public, draw_inputs, others = CASES[name]
    inputs, constants = ([x.to(device) for x in of] for of in draw_inputs())
    for x in inputs:
        x.requires_grad_()
    exact = next(iter(others.values()), public)  # what is quicker, in float64
    losses = {"vitkd_fast": ours, "torch.compile": compiled(public), "eager": public} | others
    contenders = {key: step(of, inputs, constants) for key, of in losses.items()}
    table = race(
        contenders,
        check=checker(exact, inputs, constants, 1e-3),
        memory=tuple(losses),
        rounds=7,
        timed=cpu_seconds if device.type == "cpu" else None,
    )
    mine, lines = table["vitkd_fast"], []
    for other in [*losses][1:]:
        row = table[other]
        row["times_ours"] = row["median_us"] / mine["median_us"]
        row["memory_times_ours"] = row["peak_mb"] / mine["peak_mb"]
        lines.append(
            f"  {other:22} {row['times_ours']:8.2f} x our time "
            f"{row['memory_times_ours']:8.2f} x our memory"
        )
    with capsys.disabled():
        print("\n".join(lines))
