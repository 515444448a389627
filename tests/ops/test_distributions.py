"""Each loss's contract on numbers as they are met in training, not only on randn of unit scale.

Scores and logits of scale 1 to 20, saturated rows, channels that are 50 times as large as others,
and the activations of trained networks: the error against float64 on the same rounded inputs is at
most twice that of the usual form by torch's own functions in float32 (float64's are scaled), and
one rounding of the output. What depends on the instruction set runs on every one that the host has,
and on emulated AMX.
"""

import zipfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from support import amx_tools, attention_map_tools, kd_tools, row_loss_tools
from support.attention_map_tools import Maps
from support.process_tools import run_in_interpreter, run_tests, sampled
from vitkd_fast import int8, reference
from vitkd_fast.functional import (
    at_loss,
    binary_kd_loss,
    dist_loss,
    feature_loss,
    kd_loss_topk,
    nst_loss,
    relation_loss,
    rkd_loss,
    wkd_feature_loss,
)

HALF, BFLOAT, FLOAT, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
Given = dict[str, Tensor]  # what a loss takes, by name, in float64; a teacher's names end in _t


pytestmark = pytest.mark.usefixtures("one_thread")


# distributions


def near(x: Tensor, by: float = 0.3) -> Tensor:
    """x of a student on its way."""
    return x + by * x.std() * torch.randn_like(x)


def with_outliers(x: Tensor, dim: int) -> Tensor:
    """Two channels of all, 50 times as large."""
    x = x.clone()
    x.narrow(dim, 1, min(2, x.shape[dim] - 1)).mul_(50)
    return x


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=DOUBLE)


def one_hot(rows: int, columns: int) -> Tensor:
    return F.one_hot(torch.randint(columns, (rows,)), columns).double()


class Activations(NamedTuple):
    """Of a trained MobileNetV2 on four photographs and their mirror images, and of a ViT."""

    maps: Tensor  # [8, 96, 16, 16]
    pooled: Tensor  # [8, 1280]
    logits: Tensor  # [8, 1000]
    vit: Given


@cache
def activations(data: Path) -> Activations:
    timm, safetensors = (pytest.importorskip(name) for name in ("timm", "safetensors.torch"))
    images = pytest.importorskip("PIL.Image")
    import numpy as np

    with zipfile.ZipFile(data / "imagenet-sample-a.zip") as archive:
        names = [name for name in archive.namelist() if name.endswith(".JPEG")][::125]
        files = [images.open(archive.open(name)).convert("RGB") for name in names]
        photographs = [np.array(file.resize((256, 256))) for file in files]
    x = torch.tensor(np.stack(photographs)).permute(0, 3, 1, 2) / 127.5 - 1
    file = data / "mobilenetv2_100.tf_in1k.safetensors"
    model = timm.create_model("mobilenetv2_100", pad_type="same", checkpoint_path=str(file)).eval()
    with torch.no_grad():
        features, maps = model.forward_intermediates(torch.cat([x, x.flip(3)]))
        logits = model.forward_head(features)
    vit = safetensors.load_file(data / "vit_small_activations.safetensors")
    pooled = features.mean((2, 3))
    return Activations(
        maps[3].double(), pooled.double(), logits.double(), {k: v.double() for k, v in vit.items()}
    )


def logits(name: str, scale: float, data: Path | None) -> Given:
    teacher = scale * randn(6, 100)
    if name == "saturated":
        rows = [100 * (2 * one_hot(6, 100) - 1) for _ in range(2)]
        rows[0][:3] = rows[1][:3]  # half of them agree
        return {"student": scale * rows[0], "teacher_t": scale * rows[1]}
    if name == "outliers":
        teacher = with_outliers(teacher, 1)
    if data is not None:
        trained = activations(data).logits
        return {"student": trained[4:], "teacher_t": trained[:4]}
    return {"student": near(teacher), "teacher_t": teacher}


def queries_and_keys(name: str, scale: float, data: Path | None) -> Given:
    q, k = (scale**0.5 * randn(1, 2, 40, 64) for _ in range(2))
    if name == "saturated":  # q . k / 8 is 100 for one key and -100 for the others
        one = (2 * torch.eye(40, 63, dtype=DOUBLE)).expand(1, 2, -1, -1)
        rest = torch.ones(1, 2, 40, 1, dtype=DOUBLE)
        root = (800 * scale) ** 0.5
        q, k = root * torch.cat([one / 2**0.5, rest], 3), root * torch.cat([one / 2**0.5, -rest], 3)
        return {"q_s": q, "k_s": k[:, :, torch.randperm(40)], "q_t": q, "k_t": k}
    if name == "outliers":
        q, k = with_outliers(q, 3), with_outliers(k, 3)
    if data is not None:
        vit = activations(data).vit
        q, k = (
            torch.cat([vit[f"block{i}.{of}"][:, 1:3, 1:100] for i in (1, 5, 11)])
            for of in ("queries", "keys")
        )
    return {"q_s": near(q), "k_s": near(k), "q_t": q, "k_t": k}


def tokens(name: str, scale: float, data: Path | None) -> Given:
    """Of which each one's product with itself is a score."""
    x = scale**0.5 * randn(1, 2, 40, 64)
    if name == "saturated":
        x = (800 * scale) ** 0.5 * torch.eye(40, 64, dtype=DOUBLE).expand(1, 2, -1, -1)
    if name == "outliers":
        x = with_outliers(x, 3)
    if data is not None:
        vit = activations(data).vit
        x = torch.stack([vit[f"block{i}.tokens"][:, 1:100] for i in (5, 11)], 1)
    return {"x_s": near(x), "x_t": x}


def features(name: str, scale: float, data: Path | None) -> Given:
    student, teacher = scale * randn(3, 6, 5, 5), scale * randn(3, 9, 5, 5)
    if name == "saturated":  # all of it at one place
        place = one_hot(3, 25).view(3, 1, 5, 5)
        student, teacher = (100 * scale * randn(3, c, 1, 1) * place for c in (6, 9))
    if name == "outliers":
        student, teacher = with_outliers(student, 1), with_outliers(teacher, 1)
    if data is not None:
        trained = activations(data)
        student = trained.maps[:2, :24]
        teacher = torch.cat([trained.vit[f"block{i}.tokens"] for i in (5, 11)])[:, 1:, :32]
        teacher = teacher.mT.unflatten(2, (16, 16))
    return {"f_s": student, "f_t": teacher}


def as_many_channels(name: str, scale: float, data: Path | None) -> Given:
    f_s, f_t = features(name, scale, data).values()
    return {"f_s": f_s, "f_t": f_t[:, : f_s.shape[1]]}


def projected(name: str, scale: float, data: Path | None) -> Given:
    """Features, and a projection's weight and bias, which learn."""
    given = features(name, scale, data)
    c_s, c_t = given["f_s"].shape[1], given["f_t"].shape[1]
    return given | {"weight": randn(c_t, c_s) / c_s**0.5, "bias": randn(c_t)}


def embeddings(name: str, scale: float, data: Path | None) -> Given:
    student, teacher = scale * randn(12, 20), scale * randn(12, 30)
    if name == "saturated":  # one direction for all, but for a little
        student, teacher = (100 * x[:1] + x / scale for x in (student, teacher))
    if name == "outliers":
        student, teacher = with_outliers(student, 1), with_outliers(teacher, 1)
    if data is not None:
        trained = activations(data)
        student, teacher = trained.pooled, trained.logits
    return {"x_s": student, "x_t": teacher}


# losses: what each takes, and its check on that


def rounded(given: Given, dtype: torch.dtype) -> Given:
    return {name: x.to(dtype) for name, x in given.items()}


def check_kd(given: Given, **options: Any) -> None:
    student, teacher = given.values()
    if "ce_weight" in options:
        options["labels"] = torch.randint(student.shape[1], student.shape[:1])
    kd_tools.check(student, teacher, **options)


def check_rows(given: Given, name: str, **options: Any) -> None:
    row_loss_tools.check(name, *given.values(), **options)


def check_attention_map(given: Given, kind: str) -> None:
    attention_map_tools.check(Maps(**given), kind=kind)


def check_relation(given: Given, kind: str) -> None:
    """That of attention_map_loss for both roles, whose gradients are added."""
    x_s, x_t = given.values()
    check_attention_map({"q_s": x_s, "k_s": x_s, "q_t": x_t, "k_t": x_t}, kind)
    want = attention_map_tools.loss_and_grads(Maps(x_s, x_s, x_t, x_t), kind=kind)
    leaf = x_s.clone().requires_grad_()
    loss = relation_loss(leaf, x_t, kind=kind)
    assert torch.equal(loss, want.loss)
    assert torch.equal(torch.autograd.grad(loss, leaf)[0], want.d_q + want.d_k)


def results_of(loss: Callable[..., Tensor], given: Given) -> list[Tensor]:
    """The loss, and its gradients in all that is not the teacher's."""
    leaves = {k: x.detach().requires_grad_(not k.endswith("_t")) for k, x in given.items()}
    value = loss(**leaves)
    students = [x for x in leaves.values() if x.requires_grad]
    return [value.detach(), *torch.autograd.grad(value, students)]


def worst(x: Tensor) -> Tensor:
    """The largest number of each channel, in the shape of x; channels differ in scale."""
    if x.dim() < 2:
        return x.max()
    return x.amax([i for i in range(x.dim()) if i != 1], keepdim=True)


def check(
    given: Given, ours: Callable[..., Tensor], usual: Callable[..., Tensor],
    exactly: Callable[..., Tensor] | None = None, differences: bool = False,
) -> None:  # fmt: skip
    """Beside the usual form in float64. Its own error in float32 is the largest of some draws.

    The draws are the inputs at hand, scaled by a little more than 1, so that all are rounded
    otherwise. A loss is measured on max(1, |loss|), a gradient on the largest error in its channel.
    Of float64 both are rounded, and sums have orders of their own: ten bits are spared of the 29
    that arithmetic in float32 would lose. Float64's own rounding of the largest number is spared.

    Args:
        exactly: the form for float64, where it is another.
        differences: gradients are those of numbers of 1; the largest error of all measures them.
    """
    wide = DOUBLE if DOUBLE in {x.dtype for x in given.values()} else FLOAT
    most_of = torch.max if differences else worst
    results = results_of(ours, given)
    exactly = exactly or usual
    exact = results_of(exactly, rounded(given, DOUBLE))
    own: list[Tensor] = [torch.zeros(())] * len(exact)
    # a few numbers may all be rounded luckily
    draws = 16 if max(x.numel() for x in given.values()) > 5000 else 32
    for scale in torch.linspace(1, 1 + 2**-12, draws):
        drawn = {k: x.float() * scale for k, x in given.items()}
        pairs = zip(
            results_of(usual, drawn), results_of(exactly, rounded(drawn, DOUBLE)), strict=True
        )
        own = [
            torch.maximum(most, most_of((a - b).abs()) / (b.abs().clamp(min=1) if i == 0 else 1))
            for i, (most, (a, b)) in enumerate(zip(own, pairs, strict=True))
        ]
    precision = 2**-43 if wide == DOUBLE else torch.finfo(FLOAT).eps
    for i, (result, want, error) in enumerate(zip(results, exact, own, strict=True)):
        like = (
            wide if i == 0 else [x for k, x in given.items() if not k.endswith("_t")][i - 1].dtype
        )
        assert result.dtype == like
        size = want.abs().clamp(min=1) if i == 0 else torch.ones(())
        limits = torch.finfo(like)
        allowed = 2 * precision / torch.finfo(FLOAT).eps * error * size
        rounding = want.abs().clamp(min=1 if i == 0 else limits.smallest_normal)
        allowed = allowed + limits.eps / 2 * rounding
        allowed = allowed + 2**-50 * (1 if differences else want.abs().max())
        rounds_to = want.to(like).double()  # which may be Inf
        want = torch.where(rounds_to.isinf(), rounds_to, want)
        attention_map_tools.assert_within(allowed, result, want, f"result {i}")


class Loss(NamedTuple):
    draw: Callable[[str, float, Path | None], Given]
    check: Callable[[Given], None]


def usual_feature(f_s: Tensor, f_t: Tensor, kind: str, **projection: Tensor) -> Tensor:
    return reference.feature_loss(f_s.flatten(2).mT, f_t.flatten(2).mT, **projection, kind=kind)


def usual_rkd(x_s: Tensor, x_t: Tensor) -> Tensor:
    """From Gram matrices, as public code forms distances, and as memory allows of angles."""
    distances, cosines = [], []
    for x in (x_s, x_t):
        x = x - x.mean(0)
        gram = x @ x.mT
        norms = gram.diagonal()
        same = (x.unsqueeze(0) == x.unsqueeze(1)).all(2)
        squared = (norms.unsqueeze(1) + norms - 2 * gram).masked_fill(same, 1)
        distance = squared.sqrt()
        inverse = (1 / distance).masked_fill(same, 0)
        distance = distance.masked_fill(same, 0)
        distances.append(distance / (distance.sum() / (len(x) * (len(x) - 1))))
        # of i, [j, k]: (x_j - x_i) . (x_k - x_i)
        apart = norms.view(-1, 1, 1) + gram - gram.unsqueeze(2) - gram.unsqueeze(1)
        cosines.append(apart * inverse.unsqueeze(2) * inverse.unsqueeze(1))
    losses = (F.smooth_l1_loss(*pair) for pair in (distances, cosines))
    return sum(weight * loss for weight, loss in zip((25.0, 50.0), losses, strict=True))


def kept(teacher: Tensor, k: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    """Of a teacher: its K largest, the first ones of equal ones in every dtype; log-sum-exps."""
    wide = teacher.to(DOUBLE if teacher.dtype == DOUBLE else FLOAT)
    indices = teacher.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return indices, teacher.gather(-1, indices), wide.logsumexp(-1)


def topk(student: Tensor, teacher_t: Tensor, tail: str) -> Tensor:
    indices, values, log_sum_exp = kept(teacher_t)
    return kd_loss_topk(student, indices, values, log_sum_exp=log_sum_exp, tail=tail)


def usual_topk(student: Tensor, teacher_t: Tensor, tail: str) -> Tensor:
    """Densified, but for the bin of all others."""
    indices, values, log_sum_exp = kept(teacher_t)
    p = (values.to(log_sum_exp) - log_sum_exp.unsqueeze(1)).exp()
    rest = (1 - p.sum(1, keepdim=True)).clamp(min=0)
    log_q = student.log_softmax(1)
    if tail == "smooth":
        others = student.shape[1] - indices.shape[1]
        p = (rest / others).expand_as(student).scatter(1, indices, p)
    else:
        left = log_q.scatter(1, indices, -torch.inf).logsumexp(1, keepdim=True)
        log_q, p = torch.cat([log_q.gather(1, indices), left], 1), torch.cat([p, rest], 1)
    return F.kl_div(log_q, p, reduction="batchmean")


def usual_binary(student: Tensor, teacher_t: Tensor) -> Tensor:
    """By torch's functions: the cross-entropy, less the teacher's entropy."""
    p = teacher_t.sigmoid()
    cross, own = (F.binary_cross_entropy_with_logits(x, p) for x in (student, teacher_t))
    return cross - own


KINDS = ("kl", "reverse_kl", "js", "mse")
LOSSES = {
    "kd": Loss(logits, check_kd),
    "kd_T_4_and_labels": Loss(
        logits, partial(check_kd, temperature=4.0, ce_weight=0.5, label_smoothing=0.1)
    ),
    **{
        name: Loss(logits, partial(check_rows, name=name))
        for name in ("reverse_kl", "js", "tv", "dkd", "kl_standardized")
    },
    **{
        f"dist_T_{T}": Loss(
            logits,
            partial(
                check,
                ours=lambda student, teacher_t, T=T: dist_loss(student, teacher_t, temperature=T),
                usual=lambda student, teacher_t, T=T: reference.dist_loss(student, teacher_t, T),
                differences=True,
            ),
        )
        for T in (1.0, 4.0)
    },
    **{
        f"kd_topk_{tail}": Loss(
            logits,
            partial(
                check,
                ours=partial(topk, tail=tail),
                usual=partial(usual_topk, tail=tail),
                differences=True,
            ),
        )
        for tail in ("smooth", "bin")
    },
    "binary_kd": Loss(
        logits,
        partial(
            check,
            ours=lambda student, teacher_t: binary_kd_loss(student, teacher_t),
            usual=usual_binary,
            exactly=lambda student, teacher_t: reference.binary_kd_loss(student, teacher_t).mean(),
        ),
    ),
    "wkd_feature": Loss(
        as_many_channels,
        partial(
            check,
            ours=partial(wkd_feature_loss, cells=2),
            usual=lambda f_s, f_t: reference.wkd_feature_loss(f_s, f_t, 2).mean(),
        ),
    ),
    **{
        f"attention_map_{kind}": Loss(queries_and_keys, partial(check_attention_map, kind=kind))
        for kind in KINDS
    },
    **{f"relation_{kind}": Loss(tokens, partial(check_relation, kind=kind)) for kind in KINDS},
    **{
        f"at_p{p}": Loss(
            features,
            partial(
                check,
                ours=partial(at_loss, p=float(p)),
                usual=lambda f_s, f_t, p=p: reference.at_loss(f_s, f_t, float(p)).mean(),
            ),
        )
        for p in (1, 2, 3)
    },
    **{
        f"feature_{kind}": Loss(
            projected,
            partial(
                check,
                ours=partial(feature_loss, kind=kind),
                usual=partial(usual_feature, kind=kind),
            ),
        )
        for kind in ("mse", "cosine", "smooth_l1")
    },
    "nst": Loss(
        features,
        partial(check, ours=nst_loss, usual=lambda f_s, f_t: reference.nst_loss(f_s, f_t).mean()),
    ),
    "rkd": Loss(
        embeddings,
        partial(check, ours=rkd_loss, usual=usual_rkd, exactly=reference.rkd_loss),
    ),
}
DISTRIBUTIONS = {
    "scale_1": ("randn", 1.0), "scale_4": ("randn", 4.0), "scale_20": ("randn", 20.0),
    "saturated": ("saturated", 1.0), "saturated_1e4": ("saturated", 100.0),
    "outliers": ("outliers", 1.0), "trained": ("trained", 1.0),
}  # fmt: skip


# losses with kernels for GPUs, on what their interpreter and emulator have the time for
ATTENTION = [x for x in LOSSES if x.startswith("attention")]
OF_ROWS = [x for x in LOSSES if x.startswith(("kd", "dist", "rkd", *row_loss_tools.NEW))]
GPU_FORMS: list[dict[str, Any]] = [
    {"loss": OF_ROWS, "distribution": ["saturated", "outliers", "trained"]},
    {"loss": ATTENTION, "distribution": ["outliers", "trained"], "dtype": [HALF, BFLOAT]},
]


def of_gpus(test: Callable[..., None]) -> Callable[..., None]:
    for values in GPU_FORMS:
        test = pytest.mark.interpreted(**values)(pytest.mark.emulated(**values)(test))
    return test


@of_gpus
@pytest.mark.every_isa(loss=[x for x in LOSSES if not x.startswith(("at_", "feature", "nst"))])
@pytest.mark.parametrize("dtype", [FLOAT, HALF, BFLOAT, DOUBLE], ids=str)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_contract(
    loss: str, distribution: str, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    data = request.getfixturevalue("data") if distribution == "trained" else None
    given = LOSSES[loss].draw(*DISTRIBUTIONS[distribution], data)
    LOSSES[loss].check(rounded(given, dtype))


# instruction sets, each in a process of its own


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "amx"])
def test_every_instruction_set(isa: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """AMX, where the host has none, emulated."""
    best = int8.isa()[0]
    if isa == best or (isa == "avx512" and best == "avx512vnni"):
        pytest.skip(f"the tests above ran on the kernels of {isa}")
    tests = [__file__, "-m", "every_isa and not gpu"]
    if isa == "amx":
        library = request.getfixturevalue("emulated_amx")
        run_tests(tmp_path, [amx_tools.__file__], *tests, VITKD_EMULATED_AMX=str(library))
    elif isa in int8.isa():
        run_tests(tmp_path, ["-m", "pytest"], *tests, **sampled(VITKD_FAST_ISA=isa))
    else:
        pytest.skip(f"{isa} is not among what this CPU has: {', '.join(int8.isa())}")


@pytest.mark.triton
def test_triton_in_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    run_in_interpreter(tmp_path, __file__, "-m", "interpreted")
