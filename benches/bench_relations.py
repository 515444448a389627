"""at_loss, feature_loss, nst_loss and rkd_loss beside unfused PyTorch, eager and compiled.

Forward and backward; on the CPU by one thread. The unfused ones are as most repositories have them:
a ViT's tokens are permuted and copied into a map, and pairs, triplets and kernel matrices are
materialised. Memory is the peak of what torch's allocator holds beyond what was there before (on
the CPU, the profiler's events: the extension allocates there too, up to a few numbers per sample),
gradients included. The roof is counted: bytes for at_loss beside a copy, else multiply-adds beside
torch's own sgemm. rkd_loss does 16 vector instructions per register of triplets, n^2 (n - 1) / 2 of
them, and three products [n, n, dim].
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vitkd_fast import functional, reference

BATCH, C_S, C_T, SIDE = 32, 96, 384, 14
POSITIONS = SIDE * SIDE
N, DIM = 256, 1280


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def as_map(tokens):
    return tokens.permute(0, 2, 1).reshape(tokens.shape[0], -1, SIDE, SIDE).contiguous()


def public_at(f_s, tokens):
    def attention(f):
        return F.normalize(f.pow(2).mean(1).flatten(1))

    return (attention(f_s) - attention(as_map(tokens))).pow(2).sum(1).mean()


def public_feature(kind):
    def loss(f_s, tokens, weight):
        y, t = F.conv2d(f_s, weight[:, :, None, None]), as_map(tokens)
        if kind == "cosine":
            return (1 - F.cosine_similarity(y, t, 1)).mean()
        return F.mse_loss(y, t) if kind == "mse" else F.smooth_l1_loss(y, t)

    return loss


def public_nst(f_s, tokens):
    def kernel(a, b):
        return (a.unsqueeze(1) * b.unsqueeze(2)).sum(-1).pow(2).mean((1, 2))

    s = F.normalize(f_s.flatten(2), dim=2)
    t = F.normalize(as_map(tokens).flatten(2), dim=2)
    return (kernel(t, t) + kernel(s, s) - 2 * kernel(s, t)).mean()


def bmm_nst(f_s, tokens):
    """The same kernel matrices as products of matrices, which no repository seems to do."""

    def kernel(a, b):
        return torch.bmm(a, b.mT).pow(2).mean((1, 2))

    s = F.normalize(f_s.flatten(2), dim=2)
    t = F.normalize(as_map(tokens).flatten(2), dim=2)
    return (kernel(t, t) + kernel(s, s) - 2 * kernel(s, t)).mean()


def public_rkd(x_s, x_t):
    def distances(e):
        square = e.pow(2).sum(1)
        d = (square.unsqueeze(1) + square.unsqueeze(0) - 2 * e @ e.t()).clamp(min=1e-12).sqrt()
        d = d * (1 - torch.eye(len(e), device=e.device))
        return d / (d.sum() / (len(e) * (len(e) - 1)))

    def cosines(e):
        unit = F.normalize(e.unsqueeze(0) - e.unsqueeze(1), p=2, dim=2)
        return torch.bmm(unit, unit.transpose(1, 2)).view(-1)

    with torch.no_grad():
        d_t, cos_t = distances(x_t), cosines(x_t)
    distance_loss = F.smooth_l1_loss(distances(x_s), d_t)
    return 25 * distance_loss + 50 * F.smooth_l1_loss(cosines(x_s), cos_t)


def exact_nst(f_s, tokens):
    s = F.normalize(f_s.flatten(2), dim=2)
    t = F.normalize(tokens.mT, dim=2)
    return (torch.bmm(s.mT, s) / C_S - torch.bmm(t.mT, t) / C_T).square().sum((1, 2)).mean()


class ExactRKD(torch.autograd.Function):
    """By the reference of the operation, whose gradient is in the Gram matrix."""

    @staticmethod
    def forward(ctx, x_s, x_t):
        x_s, x_t = (x - x.mean(0) for x in (x_s, x_t))
        loss, grad = reference.rkd_fwd_grad(x_s @ x_s.T, x_t @ x_t.T, 25.0, 50.0)
        ctx.save_for_backward(2 * grad @ x_s)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        return grad_loss * ctx.saved_tensors[0], None


def step(loss, inputs, constants):
    def run():
        value = loss(inputs[0], *constants, *inputs[1:])
        value.backward()
        # the gradients before these are let go only now: these count as memory
        run.grads = [x.grad for x in inputs]
        for x in inputs:
            x.grad = None
        return value

    return run


def checker(exact, inputs, constants, loose):
    """Refuses a contender whose loss or gradient is wrong."""
    wide = [x.detach().double().requires_grad_() for x in inputs]
    want = exact(wide[0], *(x.double() for x in constants), *wide[1:])
    wanted = torch.autograd.grad(want, wide)

    def check(name, contender):
        value = contender()
        if name in ("copy", "sgemm"):
            return
        torch.testing.assert_close(value.double(), want, rtol=loose, atol=0)
        for given, grad in zip(contender.grads, wanted, strict=True):
            error = (given.double() - grad).norm() / grad.norm()
            assert error < loose, f"{name}: gradient is wrong by {error:.1e}"

    return check


def compiled(loss):
    torch.compiler.reset()
    return torch.compile(loss, dynamic=False)


FEATURES = (BATCH, C_S, SIDE, SIDE)
ROWS = BATCH * POSITIONS
CASES = {
    "at": (functional.at_loss, public_at, public_at, 0),
    **{
        kind: (
            lambda s, t, w, kind=kind: functional.feature_loss(s, t, w, kind=kind),
            public_feature(kind),
            public_feature(kind),
            6 * ROWS * C_S * C_T,
        )
        for kind in ("mse", "cosine", "smooth_l1")
    },
    "nst": (functional.nst_loss, public_nst, exact_nst, 2 * ROWS * POSITIONS * (2 * C_S + C_T)),
    "rkd": (
        functional.rkd_loss,
        public_rkd,
        ExactRKD.apply,
        32 * N * N * (N - 1) // 2 + 6 * N * N * DIM,
    ),
}


FORMS = [(name, form) for name in CASES if name != "rkd" for form in ("nchw", "channels_last")]


@pytest.mark.parametrize(("name", "form"), [*FORMS, ("rkd", "embeddings")])
@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def bench_forward_backward(race, capsys, device, where, name, form):
    ours, public, exact, flops = CASES[name]
    if name == "rkd":
        inputs, constants = [draw(N, DIM)], [draw(N, DIM + 1)]
    else:
        inputs, constants = [draw(*FEATURES)], [draw(BATCH, POSITIONS + 1, C_T)]
        if form == "channels_last":
            inputs[0] = inputs[0].to(memory_format=torch.channels_last)
        if name not in ("at", "nst"):
            inputs.append(draw(C_T, C_S) / C_S**0.5)
    inputs, constants = [x.to(device) for x in inputs], [constants[0].to(device)[:, 1:]]
    for x in inputs:
        x.requires_grad_()
    contenders = {
        "vitkd_fast": step(ours, inputs, constants),
        "torch.compile": step(compiled(public), inputs, constants),
        "eager": step(public, inputs, constants),
    }
    if name == "nst":
        contenders["eager, bmm"] = step(bmm_nst, inputs, constants)
    student, teacher = inputs[0].numel() * 4, constants[0].numel() * 4
    side = 1024 if device.type == "cpu" else 8192
    square = draw(side, side).to(device)
    if flops:
        contenders["sgemm"] = lambda: square @ square
        roof = {}
    else:
        # the student twice, the teacher once, the gradient once
        source = constants[0].contiguous()
        out = torch.empty_like(source)
        contenders["copy"] = lambda: out.copy_(source)
        roof = {"moved": 3 * student + teacher, "roof": "copy", "roof_moved": 2 * teacher}
    table = race(
        contenders,
        check=checker(exact, inputs, constants, 1e-4),
        memory=tuple(n for n in contenders if n not in ("copy", "sgemm")),
        rounds=3 if name in ("rkd", "nst") else 11,
        **roof,
    )
    mine = table["vitkd_fast"]
    if flops:
        rate = 2 * side**3 / table["sgemm"]["median_us"]
        mine["percent_of_sgemm"] = 100 * flops / mine["median_us"] / rate
    lines = []
    for other in contenders:
        row = table[other]
        if "peak_mb" in row and other != "vitkd_fast":
            row["times_ours"] = row["median_us"] / mine["median_us"]
            row["memory_times_ours"] = row["peak_mb"] / mine["peak_mb"]
            lines.append(
                f"  {other:22} {row['times_ours']:8.1f} x our time "
                f"{row['memory_times_ours']:8.1f} x our memory"
            )
    if flops:
        lines.append(f"  vitkd_fast: {mine['percent_of_sgemm']:.0f}% of the counted roof")
    with capsys.disabled():
        print("\n".join(lines))
