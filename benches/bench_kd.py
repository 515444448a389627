"""kd_loss beside eager torch, torch.compile, and torch.add (2 reads and 1 write: the roof).

The fused pass must read student and teacher once and write the gradient once, as torch.add does;
the exponentials are what it does on top. `torch.add` allocates its result, as a gradient must be;
`torch.add, out=` and `copy` are the same traffic into memory that is already there.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.nn.functional as F

from vitkd_fast import functional, reference

T = 4.0
ON_CPU = [(256, 1000), (4096, 1000), (1024, 21841), (640, 65536), (8, 150, 128, 128)]
ON_GPU = [
    (4096, 21841), (4096, 1000), (256, 1000), (4, 21, 512, 512), (1 << 20, 21), (8, 150, 128, 128),
]  # fmt: skip
SHAPES = [
    pytest.param(where, shape, id=f"{where}-" + "x".join(map(str, shape)), marks=marks)
    for where, shapes, marks in (("cpu", ON_CPU, ()), ("cuda", ON_GPU, pytest.mark.gpu))
    for shape in shapes
]
DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16]


def eager_kd(student, teacher, labels=None, ce_weight=0.0, dim=1):
    """What people write."""
    log_q = F.log_softmax(student / T, dim)
    log_p = F.log_softmax(teacher / T, dim)
    rows = student.numel() // student.shape[dim]
    loss = F.kl_div(log_q, log_p, reduction="sum", log_target=True) * (T * T / rows)
    return loss + ce_weight * F.cross_entropy(student, labels) if ce_weight else loss


def liger_kd():
    """Liger's fused KL needs log-probabilities, which the caller computes."""
    if not importlib.util.find_spec("liger_kernel"):
        return None
    from liger_kernel.transformers import LigerKLDIVLoss

    divergence = LigerKLDIVLoss(reduction="batchmean", log_target=True)

    def loss(student, teacher):
        log_q, log_p = (F.log_softmax(x / T, -1) for x in (student, teacher))
        return divergence(log_q, log_p) * T * T

    return loss


def compiled_kd():
    """Compiled for this shape alone; without the reset, the ninth shape would run eagerly."""
    torch.compiler.reset()
    return torch.compile(eager_kd, dynamic=False)


def logits(shape, dtype, device):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        (torch.randn(shape, generator=generator) * 3).to(device, dtype) for _ in range(2)
    )
    rows = (shape[0], *shape[2:])
    labels = torch.randint(shape[1], rows, generator=generator).to(device)
    return student.requires_grad_(), teacher, labels


def training_step(loss, student, *args):
    def step():
        student.grad = step.grads = None
        value = loss(student, *args)
        value.backward()
        step.grads = [student.grad]
        return value

    return step


def checker(student, teacher, labels, ce_weight):
    """Refuses a contender whose loss or gradient is wrong."""
    exact = student.detach().double().requires_grad_()
    want = eager_kd(exact, teacher.double(), labels, ce_weight)
    (want_grad,) = torch.autograd.grad(want, exact)

    def check(name, contender):
        student.grad = None
        value = contender()
        if name in ("copy", "torch.add", "torch.add, out="):
            return
        loose = 5e-2 if student.dtype == torch.bfloat16 else 1e-4  # eager bf16 itself is 2% off
        torch.testing.assert_close(value.double(), want, rtol=loose, atol=0)
        if student.grad is not None:
            error = (student.grad.double() - want_grad).norm() / want_grad.norm()
            assert error < loose, f"{name}: gradient is wrong by {error:.1e}"

    return check


@pytest.mark.parametrize("ce_weight", [0.0, 0.5], ids=["kd", "kd+ce"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize(("where", "shape"), SHAPES)
def bench_forward_backward(race, triton_launcher, device, where, shape, dtype, ce_weight):
    student, teacher, labels = logits(shape, dtype, device)
    compiled = compiled_kd()
    data, out = student.detach(), torch.empty_like(student)
    step = training_step
    contenders = {
        "vitkd_fast": step(
            lambda s, t: functional.kd_loss(
                s, t, temperature=T, labels=labels, ce_weight=ce_weight, class_dim=1
            ),
            student,
            teacher,
        ),
        "torch.compile": step(compiled, student, teacher, labels, ce_weight),
        "eager": step(eager_kd, student, teacher, labels, ce_weight),
        "torch.add": lambda: torch.add(data, teacher),
        "torch.add, out=": lambda: torch.add(data, teacher, out=out),
        "copy": lambda: out.copy_(data),
    }
    if launch := triton_launcher("kd", "kd_fwd_grad"):

        def triton():
            mean = reference.MEAN
            loss, student.grad = launch(data, teacher, T, 1.0, 1, mean, labels, ce_weight=ce_weight)
            return loss

        contenders["Triton"] = triton
    if device.type == "cuda" and not ce_weight and len(shape) == 2 and (liger := liger_kd()):
        contenders["liger"] = step(liger, student, teacher)
    if device.type == "cuda" and shape[0] == 256:
        contenders["vitkd_fast, CUDA graph"] = graphed(contenders["vitkd_fast"])
    size = student.numel() * student.element_size()
    race(
        contenders,
        check=checker(student, teacher, labels, ce_weight),
        moved=3 * size,
        roof="copy",
        roof_moved=2 * size,
        memory=("vitkd_fast", "torch.compile", "eager"),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize(("where", "shape"), SHAPES)
def bench_forward(race, device, where, shape, dtype):
    student, teacher, labels = logits(shape, dtype, device)
    student.requires_grad_(False)
    compiled = compiled_kd()
    out = torch.empty_like(student)
    size = student.numel() * student.element_size()
    race(
        {
            "vitkd_fast": lambda: functional.kd_loss(student, teacher, temperature=T, class_dim=1),
            "torch.compile": lambda: compiled(student, teacher),
            "eager": lambda: eager_kd(student, teacher),
            "copy": lambda: out.copy_(student),
        },
        check=checker(student, teacher, labels, 0.0),
        moved=2 * size,
        roof="copy",
        roof_moved=2 * size,
        memory=("vitkd_fast", "torch.compile", "eager"),
    )


def graphed(step):
    """The step as a CUDA graph: what remains without launch overhead."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = step()

    def replay():
        graph.replay()
        return value

    return replay


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("where", DEVICES)
def bench_call_overhead(race, device, where, backward):
    """64 rows of 10 classes: what a call costs before there is anything to compute."""
    student, teacher, labels = logits((64, 10), torch.float32, device)
    losses = {
        "vitkd_fast": lambda s: functional.kd_loss(s, teacher, temperature=T),
        "F.cross_entropy": lambda s: F.cross_entropy(s, labels),
        "eager": lambda s: (
            F.kl_div(
                F.log_softmax(s / T, -1),
                F.log_softmax(teacher / T, -1),
                reduction="batchmean",
                log_target=True,
            )
            * T**2
        ),
    }
    check_kd = checker(student, teacher, labels, 0.0)

    def check(name, contender):
        if name != "F.cross_entropy":
            check_kd(name, contender)

    race(
        {
            name: training_step(loss, student) if backward else lambda loss=loss: loss(student)
            for name, loss in losses.items()
        },
        check=check,
        rounds=40,
        calls=100,
    )
