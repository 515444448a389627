"""What the benches of at_loss, feature_loss, nst_loss, rkd_loss and relation_loss share.

Forward and backward beside unfused PyTorch, eager and compiled; on the CPU by one thread. The
unfused ones are as most repositories have them: a ViT's tokens are permuted and copied into a map,
and pairs, triplets and kernel matrices are materialised. Memory is the peak of what torch's
allocator holds beyond what was there before (on the CPU, the profiler's events: the extension
allocates there too, up to a few numbers per sample), gradients included. The roof is counted: bytes
beside a copy, else multiply-adds beside torch's own sgemm.
"""

from __future__ import annotations

import pytest
import torch

BATCH, C_S, C_T, SIDE = 32, 96, 384, 14
POSITIONS = SIDE * SIDE
ROWS = BATCH * POSITIONS

every_device = pytest.mark.parametrize(
    "where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
)
every_form = pytest.mark.parametrize("form", ["nchw", "channels_last"])


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def as_map(tokens):
    return tokens.permute(0, 2, 1).reshape(tokens.shape[0], -1, SIDE, SIDE).contiguous()


def features(device, form):
    """A student's map, and a teacher's tokens behind a class token."""
    student = draw(BATCH, C_S, SIDE, SIDE).to(device)
    if form == "channels_last":
        student = student.to(memory_format=torch.channels_last)
    return student, draw(BATCH, POSITIONS + 1, C_T).to(device)[:, 1:]


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


def measure(
    race, capsys, device, ours, public, exact, inputs, constants, *, flops=0, rounds=11, others=None
):
    """Ours, compiled and eager, and `others`; beside a copy, or sgemm where `flops` are counted.

    Args:
        exact: in float64, what loss and gradients of all are compared with.
        inputs: what has a gradient: the student's, then weights.
        constants: the teacher's.
    """
    for x in inputs:
        x.requires_grad_()
    losses = {"vitkd_fast": ours, "torch.compile": compiled(public), "eager": public}
    losses |= others or {}
    contenders = {name: step(loss, inputs, constants) for name, loss in losses.items()}
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
        memory=tuple(losses),
        rounds=rounds,
        **roof,
    )
    mine = table["vitkd_fast"]
    if flops:
        rate = 2 * side**3 / table["sgemm"]["median_us"]
        mine["percent_of_sgemm"] = 100 * flops / mine["median_us"] / rate
    lines = []
    for other in [name for name in losses if name != "vitkd_fast"]:
        row = table[other]
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
