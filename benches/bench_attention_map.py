"""attention_map_loss beside its unfused PyTorch implementation, eager and compiled.

Forward and backward, and memory. The unfused implementation stores each map several times: two
score products, two softmaxes, F.kl_div. The roof is counted in multiply-adds (four products of
[tokens, tokens, dim] per head) beside a loop of FMAs on the CPU and a product of bf16 matrices on
the GPU, measured in the same run. `bench_memory` holds peaks of what torch allocates beyond its
inputs; benches/attention_memory.svg, which README shows, is drawn from its results by `python
benches/bench_attention_map.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from vitkd_fast import _int8, functional, reference

FOLDER = Path(__file__).parent
KINDS = ("kl", "reverse_kl", "js", "mse")  # in the order of the operations' `kind`
CPU = (8, 6, 196, 64)
GPU = (256, 12, 196, 64)


def draw(shape, dtype, device):
    """Queries and keys of student and teacher; the student's want gradients."""
    generator = torch.Generator().manual_seed(0)
    q_s, k_s, q_t, k_t = (
        torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4)
    )
    return q_s.requires_grad_(), k_s.requires_grad_(), q_t, k_t


def public(q_s, k_s, q_t, k_t, kind="kl"):
    scale = q_s.shape[-1] ** -0.5
    log_q = ((q_s @ k_s.mT) * scale).log_softmax(-1)
    log_p = ((q_t @ k_t.mT) * scale).log_softmax(-1)
    rows = log_q[..., 0].numel()
    if kind == "reverse_kl":
        log_q, log_p = log_p, log_q
    if kind == "js":
        log_m = torch.logaddexp(log_q, log_p) - 0.6931471805599453
        halves = (F.kl_div(log_m, x, log_target=True, reduction="sum") for x in (log_p, log_q))
        return sum(halves) / (2 * rows)
    if kind == "mse":
        return (log_p.exp() - log_q.exp()).square().sum() / rows
    return F.kl_div(log_q, log_p, log_target=True, reduction="sum") / rows


def ours(*tensors, kind="kl"):
    return functional.attention_map_loss(*tensors, kind=kind)


def step(loss, tensors, **options):
    """Forward and backward; the gradients are kept for whoever looks at them."""

    def run():
        value = loss(*tensors, **options)
        value.backward()
        run.grads = [x.grad for x in tensors[:2]]
        for x in tensors[:2]:
            x.grad = None
        return value

    return run


def checker(tensors, loose, **options):
    """Refuses a contender whose loss or gradients are wrong, by the unfused one in float64."""
    few = [x.detach()[:2].double() for x in tensors]
    few[0].requires_grad_(), few[1].requires_grad_()
    want = public(*few, **options)
    wanted = torch.autograd.grad(want, few[:2])
    batch = len(tensors[0])

    def check(name, contender):
        if name == "sgemm" or name.endswith("matmul"):
            return
        value = contender()
        if not hasattr(contender, "grads"):
            return
        assert torch.isfinite(value)
        for given, grad in zip(contender.grads, wanted, strict=True):
            # each image's gradient is its own, but for the size of the batch
            error = (given[:2].double() * batch / 2 - grad).norm() / grad.norm()
            assert error < loose, f"{name}: gradient is wrong by {error:.1e}"

    return check


def compiled(loss):
    torch.compiler.reset()
    return torch.compile(loss, dynamic=False)


def products(shape, count):
    batch, heads, tokens, dim = shape
    return 2 * count * batch * heads * tokens * tokens * dim


FORMS = [*((kind, torch.float32) for kind in KINDS), ("kl", torch.bfloat16)]


@pytest.mark.parametrize("kind, dtype", FORMS, ids=[*KINDS, "kl-bf16"])
def bench_forward_backward(race, benchmark, capsys, kind, dtype):
    tensors = draw(CPU, dtype, "cpu")
    square = torch.randn(1024, 1024)
    contenders = {
        "vitkd_fast": step(ours, tensors, kind=kind),
        "torch.compile": step(compiled(public), tensors, kind=kind),
        "eager": step(public, tensors, kind=kind),
        "forward alone": lambda: ours(*(x.detach() for x in tensors), kind=kind),
        "sgemm": lambda: square @ square,
    }
    memory = ("vitkd_fast", "torch.compile", "eager")
    check = checker(tensors, 0.03 if dtype == torch.bfloat16 else 1e-4, kind=kind)
    table = race(contenders, check=check, memory=memory, rounds=21)
    row, peak = table["vitkd_fast"], 2 * _int8.fma_peak(0.3)
    rate = products(CPU, 4) / row["median_us"] * 1e6
    row["gflop_per_s"] = rate / 1e9
    row["compile_over_ours"] = table["torch.compile"]["median_us"] / row["median_us"]
    if peak and dtype == torch.float32:
        row |= {"fma_gflop_per_s": peak / 1e9, "percent_of_fma": 100 * rate / peak}
    report(capsys, row)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*((kind, torch.bfloat16) for kind in KINDS), ("kl", torch.float32)],
    ids=[*KINDS, "kl-fp32"],
)
def bench_gpu(race, triton_launcher, capsys, device, kind, dtype):
    tensors = draw(GPU, dtype, device)
    detached = [x.detach() for x in tensors]
    square = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    forward, naive = compiled(public), compiled(public)
    contenders = {
        "vitkd_fast": step(ours, tensors, kind=kind),
        "torch.compile": step(naive, tensors, kind=kind),
        "eager": step(public, tensors, kind=kind),
        "forward": lambda: ours(*detached, kind=kind),
        "torch.compile forward": lambda: forward(*detached, kind=kind),
        "bf16 matmul": lambda: square @ square,
    }
    if launch := triton_launcher("attention_map", "attention_map_fwd_grad"):
        scale, options = GPU[-1] ** -0.5, (1.0, KINDS.index(kind), reference.MEAN)

        def triton():
            loss, *triton.grads = launch(*detached, scale, scale, *options)
            return loss

        contenders["Triton"] = triton
    memory = ("vitkd_fast", "torch.compile", "eager")
    check = checker(tensors, 0.03 if dtype == torch.bfloat16 else 1e-3, kind=kind)
    table = race(contenders, check=check, memory=memory)
    peak = 2 * 8192**3 / table["bf16 matmul"]["median_us"]
    for name, count in (("vitkd_fast", 4), ("forward", 2)):
        rate = products(GPU, count) / table[name]["median_us"]
        table[name] |= {"tflop_per_s": rate / 1e6, "percent_of_matmul": 100 * rate / peak}
        report(capsys, table[name])


@pytest.mark.parametrize("tokens", [49, 196, 576, 1024])
def bench_memory(benchmark, capsys, device, peak, tokens):
    """12 heads, dim 64, batch 64 (4 above 196 tokens, where the unfused form takes 16 GB).

    What forward and backward hold at once, gradients included; and, without them, ours in percent
    of the unfused one's. The C++ kernel's scratch is torch's memory, and counted.
    """
    batch = 64 if tokens <= 196 else 4
    tensors = draw((batch, 12, tokens, 64), torch.float32, device)
    gradients = sum(x.numel() * x.element_size() for x in tensors[:2])
    peaks = {
        name: peak(step(loss, tensors))
        for name, loss in (
            ("vitkd_fast", ours),
            ("torch.compile", compiled(public)),
            ("eager", public),
        )
    }
    extra = {name: peak - gradients for name, peak in peaks.items()}
    row = {"batch": batch, "tokens": tokens, "peak_bytes": peaks, "gradient_bytes": gradients}
    row["extra_percent_of_eager"] = 100 * extra["vitkd_fast"] / extra["eager"]
    benchmark.extra_info |= row
    report(capsys, row)
    benchmark.pedantic(step(ours, tensors), rounds=1)


def report(capsys, row):
    with capsys.disabled():
        cells = (f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
        print("\n  " + "; ".join(cells))


def plot() -> None:
    """Memory per image by tokens, from the committed results."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    results = json.loads((FOLDER / "results" / "cpu-attention_map.json").read_text())
    rows = [b["extra_info"] for b in results["benchmarks"] if b["name"].startswith("bench_memory")]
    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    for name, style in (("eager", "s--"), ("torch.compile", "^-."), ("vitkd_fast", "o-")):
        held = [row["peak_bytes"][name] / row["batch"] / 1e6 for row in rows]
        axes.loglog([row["tokens"] for row in rows], held, style, label=name)
    axes.set(xlabel="tokens", ylabel="MB per image, gradients included")
    axes.set_xticks(
        [row["tokens"] for row in rows], [str(row["tokens"]) for row in rows], minor=False
    )
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    pyplot.rcParams["svg.hashsalt"] = "vitkd_fast"
    figure.savefig(FOLDER / "attention_memory.svg", metadata={"Date": None})


if __name__ == "__main__":
    plot()
