"""The losses with weights of their own: shapes, heads, grids, prefix tokens, gradients, errors."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from vitkd_fast.functional import attention_map_loss
from vitkd_fast.nn import AttentionMapProjection, CrossAttentionProjector
from vitkd_fast.nn.attention import _gram_distance

pytestmark = pytest.mark.usefixtures("one_thread")

every_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
)


def tokens(
    batch: int, heads: int, count: int, dim: int, parts: int = 2, device: str = "cpu"
) -> list[Tensor]:
    """Queries, keys (and values), as a transformer's qkv layer leaves them."""
    qkv = torch.randn(batch, count, parts, heads, dim, device=device)
    return list(qkv.permute(2, 0, 3, 1, 4).unbind(0))


def attention(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    return (q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)).softmax(-1)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum(-1).mean()


def student_maps(module: AttentionMapProjection, x: Tensor, side: tuple[int, int]) -> Tensor:
    """The module's attention, written apart from it: [B, heads, N, N]."""
    weight, bias = module.projection.weight, module.projection.bias
    y = F.conv2d(x, weight[:, :, None, None], bias)
    if y.shape[2:] != side:
        smaller = side[0] < y.shape[2] or side[1] < y.shape[3]
        y = F.interpolate(y, side, mode="bilinear", antialias=smaller)
    q, k = y.flatten(2).mT.chunk(2, dim=2)
    q, k = (t.unflatten(2, (module.heads, -1)).transpose(1, 2) for t in (q, k))
    return attention(q, k)


@every_device
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("side", [3, 4, 7], ids=str)
def test_projection_is_its_formula(side: int, layout: torch.memory_format, device: str) -> None:
    """Maps of the teacher's grid, of a coarser and of a finer one."""
    module = AttentionMapProjection(5, 24, 3, prefix_tokens=1).to(device)
    x = torch.randn(2, 5, side, side, device=device).to(memory_format=layout).requires_grad_()
    q, k = tokens(2, 3, 17, 8, device=device)
    loss = module(x, q, k)
    want = divergence(attention(q[:, :, 1:], k[:, :, 1:]), student_maps(module, x, (4, 4)))
    assert_close(loss, want)
    inputs = [x, *module.parameters()]
    got = torch.autograd.grad(loss, inputs)
    for g, w in zip(got, torch.autograd.grad(want, inputs), strict=True):
        assert_close(g, w, atol=1e-5, rtol=1e-4)


def test_prefix_tokens_count_neither_as_queries_nor_as_keys() -> None:
    module = AttentionMapProjection(5, 24, 3, prefix_tokens=5)
    x, (q, k) = torch.randn(2, 5, 4, 4), tokens(2, 3, 21, 8)
    loss = module(x, q, k)
    q[:, :, :5], k[:, :, :5] = torch.nan, torch.inf
    assert_close(module(x, q, k), loss, rtol=0, atol=0)


def test_grid_need_not_be_square() -> None:
    module = AttentionMapProjection(5, 24, 3, grid=(2, 8))
    x, (q, k) = torch.randn(2, 5, 2, 8), tokens(2, 3, 16, 8)
    assert_close(module(x, q, k), divergence(attention(q, k), student_maps(module, x, (2, 8))))


@pytest.mark.parametrize("heads", [1, 2, 6, 12])
def test_relation_heads(heads: int) -> None:
    """The teacher's dim is split anew: head h takes dims [h, h + 1) * dim / heads of all heads."""
    module = AttentionMapProjection(5, 24, heads, head_dim=7)
    x, (q, k) = torch.randn(2, 5, 4, 4), tokens(2, 3, 16, 8)
    q_r, k_r = (
        torch.stack(t.transpose(1, 2).flatten(2).chunk(heads, dim=2), dim=1) for t in (q, k)
    )
    want = divergence(attention(q_r, k_r), student_maps(module, x, (4, 4)))
    assert_close(module(x, q, k), want)


@pytest.mark.parametrize(("kind", "heads"), list(itertools.product(["kl", "mse"], [1, 2])))
def test_mean_of_the_teachers_heads(kind: str, heads: int) -> None:
    """The gradient of the divergence from the mean map; the value is larger by a constant."""
    module = AttentionMapProjection(5, 24, heads, teacher_heads="mean", kind=kind)
    q, k = tokens(2, 3, 16, 8)
    mean = attention(q, k).mean(1, keepdim=True)
    above = []
    for _ in range(2):
        x = torch.randn(2, 5, 4, 4)
        loss, maps = module(x, q, k), student_maps(module, x, (4, 4))
        want = divergence(mean, maps) if kind == "kl" else (mean - maps).square().sum(-1).mean()
        above.append(loss - want)
        grads = (torch.autograd.grad(y, list(module.parameters())) for y in (loss, want))
        for got, wanted in zip(*grads, strict=True):
            assert_close(got, wanted, atol=1e-6, rtol=1e-4)
    assert_close(*above)
    assert above[0] > 0


def test_projection_hands_its_options_on() -> None:
    options = {"temperature": 2.0, "kind": "js"}
    module = AttentionMapProjection(5, 24, 3, scale_t=0.7, **options)
    x, (q, k) = torch.randn(2, 5, 4, 4), tokens(2, 3, 16, 8)
    q_s, k_s = (
        t.unflatten(2, (3, -1)).transpose(1, 2)
        for t in module.projection(x.flatten(2).mT).chunk(2, dim=2)
    )
    assert_close(module(x, q, k), attention_map_loss(q_s, k_s, q, k, scale_t=0.7, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    """Finer maps too, which torch makes coarser in float32 alone."""
    projection = AttentionMapProjection(5, 24, 3)
    projector = CrossAttentionProjector(5, 24, 3, groups=2, replace=0.0)
    x, (q, k, v) = torch.randn(2, 5, 8, 8), tokens(2, 3, 16, 8, 3)
    h = torch.randn(2, 16, 24)
    want = projection(x, q, k), projector(x, q, k, v, h)
    with torch.autocast("cpu", dtype):
        got = projection(x, q, k), projector(x, q, k, v, h)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == torch.float32
        assert_close(g, w, rtol=0.05, atol=0.01)


def test_compile() -> None:
    projection = AttentionMapProjection(5, 24, 3)
    projector = CrossAttentionProjector(5, 24, 3, groups=2).eval()
    x, (q, k, v) = torch.randn(2, 5, 7, 7), tokens(2, 3, 16, 8, 3)
    h = torch.randn(2, 16, 24)
    torch._dynamo.reset()
    for module, inputs in ((projection, (x, q, k)), (projector, (x, q, k, v, h))):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        assert_close(compiled(*inputs), module(*inputs))


def cross_attention(
    module: CrossAttentionProjector, x: Tensor, q: Tensor, k: Tensor, v: Tensor, h: Tensor
) -> Tensor:
    """The loss without replaced elements, with every matrix stored."""
    q_s, k_s, v_s = (
        t.flatten(2).unflatten(1, (module.heads, -1)).mT for t in module.qkv(x).chunk(3, dim=1)
    )
    dim = q.shape[-1]
    attended = F.mse_loss(attention(q_s, k_s) @ v_s, attention(q, k) @ v)
    values = F.mse_loss(v_s @ v_s.mT / dim**0.5, v @ v.mT / dim**0.5)
    g, side = module.groups, x.shape[3]
    projected = torch.empty_like(h)
    for i in range(x.shape[2]):
        for j in range(side):
            layer = (i % g) * g + j % g
            projected[:, i * side + j] = x[:, :, i, j] @ module.weight[layer] + module.bias[layer]
    return attended + values + F.mse_loss(projected, h)


@every_device
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_cross_attention_is_its_formula(groups: int, training: bool, device: str) -> None:
    module = CrossAttentionProjector(5, 24, 3, groups=groups, replace=0.0).to(device)
    module.train(training)
    nn.init.normal_(module.bias)
    x, (q, k, v) = torch.randn(2, 5, 4, 8, device=device), tokens(2, 3, 32, 8, 3, device)
    h = torch.randn(2, 32, 24, device=device)
    module.grid = (4, 8)
    loss, want = module(x, q, k, v, h), cross_attention(module, x, q, k, v, h)
    assert_close(loss, want, rtol=1e-5, atol=1e-5)
    inputs = list(module.parameters())
    got = torch.autograd.grad(loss, inputs)
    for g, w in zip(got, torch.autograd.grad(want, inputs), strict=True):
        assert_close(g, w, rtol=1e-4, atol=1e-5)


def test_partially_replaced_queries_keys_and_values() -> None:
    """Nearly all of them are the teacher's own: its attention comes out."""
    x, (q, k, v) = torch.randn(2, 5, 4, 4), tokens(2, 3, 17, 8, 3)
    h = torch.randn(2, 17, 24)
    module = CrossAttentionProjector(5, 24, 3, replace=1 - 1e-6, prefix_tokens=1)
    kept = module(x, q, k, v, h), module.eval()(x, q, k, v, h)
    module.replace = 0.0
    others = module(x, q, k, v, h)
    assert kept[1] == others
    patches = (t[:, :, 1:] for t in (q, k, v))
    assert_close(others, cross_attention(module, x, *patches, h[:, 1:]), rtol=1e-5, atol=1e-5)
    q_s, k_s, v_s = module.qkv(x).flatten(2).unflatten(1, (3, 3, -1)).mT.unbind(1)
    apart = F.mse_loss(attention(q_s, k_s) @ v_s, attention(q[:, :, 1:], k[:, :, 1:]) @ v[:, :, 1:])
    assert_close(others - kept[0], apart, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_teachers_made_in_inference_mode(training: bool) -> None:
    x = torch.randn(2, 5, 4, 4, requires_grad=True)
    with torch.inference_mode():
        q, k, v = tokens(2, 3, 16, 8, 3)
        h = torch.randn(2, 16, 24)
    (AttentionMapProjection(5, 24, 3)(x, q, k)).backward()
    CrossAttentionProjector(5, 24, 3).train(training)(x, q, k, v, h).backward()
    assert x.grad is not None


@pytest.mark.parametrize("noise", [1e-3, 0.03, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_distance_of_values_that_are_alike(dtype: torch.dtype, noise: float) -> None:
    """Under autocast too: a difference of large sums would have lost it."""
    x = 20 * torch.randn(2, 4, 50, 64)
    y = x + noise * torch.randn_like(x)
    want = ((x.double() @ x.double().mT - y.double() @ y.double().mT) / 8).square().mean()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        assert_close(_gram_distance(x, y).double(), want, rtol=1e-3, atol=0)


def projection(**options: object) -> AttentionMapProjection:
    return AttentionMapProjection(
        **({"student_channels": 5, "teacher_dim": 24, "heads": 3} | options)
    )  # type: ignore[arg-type]


def projector(**options: object) -> CrossAttentionProjector:
    return CrossAttentionProjector(
        **({"student_channels": 5, "teacher_dim": 24, "heads": 3} | options)
    )  # type: ignore[arg-type]


X, (Q, K, V), H = torch.randn(2, 5, 4, 4), tokens(2, 3, 16, 8, 3), torch.randn(2, 16, 24)
BAD = {
    "heads": (lambda: projection(heads=5), "heads: expected a divisor of teacher_dim 24, got 5"),
    "teacher_heads": (
        lambda: projection(teacher_heads="first"),
        "teacher_heads: expected 'split' or 'mean', got 'first'",
    ),
    "mean of js": (
        lambda: projection(teacher_heads="mean", kind="js"),
        "kind: expected 'kl' or 'mse' with teacher_heads 'mean', got 'js'",
    ),
    "dim": (
        lambda: projection()(X, Q[..., :7], K[..., :7]),
        r"expected \[batch, heads, tokens, dim\] with heads \* dim = 24, got \[2, 3, 16, 7\]",
    ),
    "grid": (
        lambda: projection(prefix_tokens=1)(X, Q, K),
        "grid: expected rows and columns of 15 patches, got 3 x 3",
    ),
    "batch": (lambda: projection()(X[:1], Q, K), r"q_t: .* batch of q_s \[1, 3, 16, 8\]"),
    "projector's heads": (lambda: projector(heads=5), "heads: expected a divisor of .*, got 5"),
    "replace": (lambda: projector(replace=1.0), "replace: expected 0 <= replace < 1, got 1.0"),
    "groups": (
        lambda: projector(groups=3)(X, Q, K, V, H),
        r"groups: expected a divisor of the grid \(4, 4\), got 3",
    ),
    "values": (
        lambda: projector()(X, Q, K, V[:, :2], H),
        r"expected \[batch, 3, tokens, 8\], got \[2, 2, 16, 8\]",
    ),
    "dim of values": (
        lambda: projector()(X, Q[..., :7], K[..., :7], V[..., :7], H),
        r"expected \[batch, 3, tokens, 8\], got \[2, 3, 16, 7\]",
    ),
    "tokens": (
        lambda: projector()(X, Q, K, V, H[..., :1]),
        r"tokens_t: expected \[2, 16, 24\], got \[2, 16, 1\]",
    ),
    "batch of features": (
        lambda: projector()(X[:1], Q, K, V, H),
        r"features: expected \[2, channels, height, width\], got \[1, 5, 4, 4\]",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()
