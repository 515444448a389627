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
from vitkd_fast import reference
from vitkd_fast.functional import (
    cc_loss,
    mlkd_loss,
    mmd_loss,
    pkt_loss,
    sliced_wasserstein,
    sliced_wasserstein_loss,
    sp_loss,
    spearman_loss,
    wkd_cost,
    wkd_feature_loss,
    wkd_logit_loss,
)

N, DIM, DIM_T = 256, 1280, 384
CLASSES = 1000
COSTS = wkd_cost(draw(CLASSES, 64))


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


def public_mlkd(student, teacher):
    loss = 0
    for temperature in (2.0, 3.0, 4.0, 5.0, 6.0):
        p, q = (student / temperature).softmax(1), (teacher / temperature).softmax(1)
        log_p = (student / temperature).log_softmax(1)
        kd = F.kl_div(log_p, q, reduction="none").sum(1).mean() * temperature**2
        batch = (p @ p.t() - q @ q.t()).pow(2).sum() / len(p)
        classes = (p.t() @ p - q.t() @ q).pow(2).sum() / p.shape[1]
        loss = loss + kd + batch + classes
    return loss / 5


def public_spearman(student, teacher):
    z = student / 0.1
    soft = 0.5 + torch.sigmoid(z.unsqueeze(2) - z.unsqueeze(1)).sum(2)
    exact = teacher.argsort(1).argsort(1).to(z.dtype) + 1
    soft, exact = (x - x.mean(1, keepdim=True) for x in (soft, exact))
    return (1 - F.cosine_similarity(soft, exact)).mean()


def labels(x):
    return torch.arange(len(x), device=x.device)


def ours_wkd_logit(student, teacher):
    return wkd_logit_loss(student, teacher, COSTS.to(student.device), labels(student))


def public_wkd_logit(student, teacher):
    cost = COSTS.to(student.device, student.dtype)
    return reference.wkd_logit_loss(student, teacher, cost, labels(student)).mean()


def logits():
    return [draw(64, CLASSES)], [draw(65, CLASSES)[1:]]


def few_logits():
    """As the unfused form has a matrix of costs for each row, several times."""
    return [draw(16, CLASSES)], [draw(17, CLASSES)[1:]]


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
    "mlkd": (mlkd_loss, public_mlkd, logits, {}),
    "wkd_logit": (ours_wkd_logit, public_wkd_logit, few_logits, {}),
    "spearman": (spearman_loss, public_spearman, few_logits, {}),
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
