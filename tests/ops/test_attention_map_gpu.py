"""attention_map_loss on a GPU: graphs, streams, memory, and small forms for compute-sanitizer."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from support.attention_map_tools import (
    BFLOAT,
    FLOAT,
    HALF,
    LAYOUTS,
    OPTIONS,
    Maps,
    check,
    draw,
    every_kind,
    loss_and_grads,
    maps,
    torch_rows,
)
from support.cuda_tools import GPU, needs_gpu_or_emulator
from vitkd_fast import _ops
from vitkd_fast.functional import attention_map_loss

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
@every_kind
def test_memory_beside_the_naive_form(kind: str, dtype: torch.dtype, reduction: str) -> None:
    """Under 2% of what it takes, the gradients apart, which both have to give."""
    if _ops.backends()["attention_map_fwd"]["CUDA"] == "reference":
        pytest.skip("the reference materialises what it likes")
    x = maps(64, 12, 196, dim=64, dtype=dtype, device="cuda")
    grads = sum(y.numel() * y.element_size() for y in x.student)
    torch.cuda.synchronize()

    def peak(function: Callable[..., Tensor]) -> int:
        run = partial(loss_and_grads, x, function, kind=kind, reduction=reduction)
        run()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before - grads

    assert peak(attention_map_loss) < 0.02 * peak(torch_rows)


@pytest.mark.gpu
@every_kind
def test_tf32_where_torch_allows_it(kind: str) -> None:
    """Read when the loss is called: the error is then that of torch's own products in tf32."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has no tf32")
    x = maps(2, 2, 256, dim=64, device="cuda")
    results = []
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for allowed in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            results.append(loss_and_grads(x, kind=kind))
            check(x, kind=kind, reductions=["mean", "none"])
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert not any(torch.equal(y, z) for y, z in zip(*results, strict=True))


@pytest.mark.gpu
@every_kind
def test_offsets_beyond_int32(kind: str) -> None:
    """2^31 elements and a bit: the last heads are where they belong."""
    batch, heads, tokens, dim = 2**31 // (64 * 256 * 64) + 2, 64, 256, 64
    if torch.cuda.mem_get_info()[0] < 5 * 4 * batch * heads * tokens * dim:
        pytest.skip("needs 42 GiB of GPU memory")
    q, k = (torch.zeros(batch, heads, tokens, dim, dtype=BFLOAT, device="cuda") for _ in range(2))
    ends = maps(2, heads, tokens, dim=dim, dtype=BFLOAT, device="cuda")
    for x, end in ((q, ends.q_s), (k, ends.k_s)):
        x[:1], x[-1:] = end[:1], end[1:]
    given = loss_and_grads(Maps(q, k, k, q), kind=kind, reduction="none")
    want = loss_and_grads(Maps(*ends.student, ends.k_s, ends.q_s), kind=kind, reduction="none")
    for x, y in zip(given, want, strict=True):
        assert_close(torch.cat([x[:1], x[-1:]]), y)
        assert_close(x[1:-1].abs().max().float(), torch.zeros((), device="cuda"))


slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.sanitized
@needs_gpu_or_emulator
class TestSanitize:
    """Every way through the kernels once, small enough for compute-sanitizer."""

    @pytest.mark.parametrize("kind", ["kl", "reverse_kl", *map(slow, ["js", "mse"])])
    @pytest.mark.parametrize(
        "shape",
        [(1, 1, 1, 1, 1, 1), (1, 2, 5, 7, 16, 24), (1, 1, 49, 49, 64, 64), (1, 1, 65, 33, 80, 128),
         (1, 1, 100, 197, 32, 16), (1, 1, 20, 150, 96, 64), (1, 1, 70, 5, 300, 3)],
        ids=str,
    )  # fmt: skip
    @pytest.mark.parametrize(
        ("dtype", "teacher"), [(FLOAT, FLOAT), (BFLOAT, BFLOAT), (FLOAT, HALF), (HALF, FLOAT)]
    )
    def test_values(
        self, dtype: torch.dtype, teacher: torch.dtype, shape: tuple[int, ...], kind: str
    ) -> None:
        x = maps(*shape, dtype=dtype, teacher=teacher, device=GPU)
        for name, reduction in (("plain", "mean"), ("everything", "none"), ("mask", "sum")):
            options = OPTIONS[name](x) | {"kind": kind, "reduction": reduction}
            assert all(y.isfinite().all() for y in loss_and_grads(x, **options))

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dim", [16, 20])
    def test_layouts(self, dim: int, layout: str) -> None:
        """Strided and unaligned tensors, whose ends no load may pass."""
        new = partial(draw, dtype=HALF, device=GPU)
        of = [LAYOUTS[layout](new, dim), LAYOUTS["contiguous"](new, dim)]
        for x in (Maps(*of, *of), Maps(*of[::-1], *of[::-1])):
            for reduction in ("mean", "none"):
                results = loss_and_grads(x, reduction=reduction)
                assert all(y.isfinite().all() for y in results)

    @every_kind
    def test_empty(self, kind: str) -> None:
        for shape in ((0, 2, 5), (2, 2, 0)):
            x = Maps(*(draw(*shape[:2], n, 16, device=GPU) for n in (shape[2], 5) * 2))
            loss, *grads = loss_and_grads(x, kind=kind)
            assert loss == 0
            assert all((grad == 0).all() for grad in grads)

    @every_kind
    def test_without_keys(self, kind: str) -> None:
        x = maps(2, 2, 33, 65, device=GPU)
        mask = torch.zeros(2, 65, dtype=torch.bool, device=GPU)
        assert all((y == 0).all() for y in loss_and_grads(x, kind=kind, key_mask=mask))
