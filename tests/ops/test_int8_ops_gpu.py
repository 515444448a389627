"""The int8 convolutions on a GPU: graphs, streams, sizes, and forms for compute-sanitizer."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from support.cuda_tools import (
    GPU,
    captured,
    needs_gpu_or_emulator,
    no_synchronisation,
    on_another_stream,
)
from support.int8_ops_tools import (
    OPS,
    check,
    dwconv_arguments,
    layers,
    paddings,
    pwconv_arguments,
    random_bytes,
    random_weights,
    samples,
    to,
    two_layers,
)
from vitkd_fast import reference


@pytest.mark.gpu
def test_cuda_graph() -> None:
    """Replayed, while the pixels change."""
    both = layers("cuda")
    x = random_bytes(4, 9, 8, 16).cuda()
    graph, y = captured(lambda: two_layers(x, *both))
    for _ in range(3):
        x.copy_(random_bytes(*x.shape))
        graph.replay()
        assert torch.equal(y, two_layers(x, *both))


@pytest.mark.gpu
def test_no_host_synchronisation() -> None:
    calls = samples("cuda")
    for op, arguments in calls:
        getattr(OPS, op)(*arguments)  # compiles and loads what may synchronise the first time
    with no_synchronisation():
        for op, arguments in calls:
            getattr(OPS, op)(*arguments)


@pytest.mark.gpu
def test_on_a_stream_of_its_own() -> None:
    """The current stream is used, after what is queued there."""
    both = layers("cuda")
    x = random_bytes(64, 30, 30, 16).cuda()
    want = two_layers(x, *both)
    late = torch.zeros_like(x)
    given = on_another_stream(lambda: two_layers(late, *both), [late], [x])
    assert torch.equal(given, want)


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [24, 17])
def test_offsets_beyond_int32(channels: int) -> None:
    """2^31 bytes and a bit: the last images are where they belong."""
    batch, size = 2**31 // (64 * 64 * channels) + 3, 64
    if torch.cuda.mem_get_info()[0] < 4 * batch * size * size * channels:
        pytest.skip("needs 9 GiB of GPU memory")
    x = torch.zeros(batch, size, size, channels, dtype=torch.uint8, device="cuda")
    ends = random_bytes(2, size, size, channels)
    x[:1], x[-1:] = ends[:1].cuda(), ends[1:].cuda()
    weight, dense = random_weights(3, 3, channels), random_weights(channels, channels)
    for op, (_, *rest) in (
        ("int8_dwconv", dwconv_arguments(ends, weight, padding=(1, 1, 1, 1))),
        ("int8_pwconv", pwconv_arguments(ends, dense)),
    ):
        y = getattr(OPS, op)(x, *to("cuda", rest))
        want = getattr(reference, op)(ends, *rest)
        assert torch.equal(torch.cat([y[:1], y[-1:]]).cpu(), want)
        assert (y[1:-1] == y[1]).all()


@pytest.mark.sanitized
@needs_gpu_or_emulator
class TestSanitize:
    """Every way through the kernels once, small enough for compute-sanitizer."""

    @pytest.mark.parametrize("channels", [3, 8, 20, 64, 260])
    def test_dwconv(self, channels: int) -> None:
        for kernel, stride in product((1, 3, 5), (1, 2)):
            x, weight = random_bytes(2, 7, 9, channels), random_weights(kernel, kernel, channels)
            for padding in paddings((7, 9), kernel, stride):
                arguments = dwconv_arguments(x, weight, stride=(stride, stride), padding=padding)
                check("int8_dwconv", *arguments, device=GPU)

    @pytest.mark.parametrize("channels", [3, 4, 8, 16, 33, 96, 1280])
    def test_pwconv(self, channels: int) -> None:
        for out, pixels in product((5, 16, 24, 48, 64, 130), (1, 150)):
            arguments = pwconv_arguments(
                random_bytes(pixels, channels), random_weights(out, channels)
            )
            check("int8_pwconv", *arguments, device=GPU)
