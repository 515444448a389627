"""int8.load(..., device="cuda"): the reference's bytes, on a GPU or on the emulated driver.

`test_cuda_emulated.py` runs this file in a process that finds the emulated driver. Maps are
compared node by node, so that a failure names the first node that differs.
"""

import ctypes
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.driver_tools import Capsule, DeviceArray, needs_driver
from support.int8_builder import FIELDS, Builder, images_for, mobilenet_v2
from support.int8_graphs import random_graph
from vitkd_fast import _int8, int8
from vitkd_fast.int8 import file, reference
from vitkd_fast.int8.graph import Array, Classifier, Graph, Pool

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_equal(graph: Graph, images: Array, batches: tuple[int, ...] = (1, 3)) -> None:
    """Every node of the first image, then logits, the first batch size again at last."""
    size, opened = images.shape[1], file.opened(graph)
    maps = reference.outputs(graph, images)
    session = _int8.CudaSession(opened, image_size=size, device=0)
    for index, output in enumerate(session.activations(images[:1])[:-1]):
        wrong = np.argwhere(output != maps[index][0])
        assert len(wrong) == 0, (
            f"node {index} ({graph.nodes[index].op}) is the first to differ, in {len(wrong)} of "
            f"{output.size} bytes, the first at {wrong[0]}"
        )
    student = int8.load(graph, device="cuda", image_size=size)
    for batch in (*batches, batches[0]):
        logits = student(images[:batch])
        assert logits.tobytes() == maps[-1][:batch].tobytes(), f"batch {batch}: logits differ"


# equality


@needs_driver
@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 16))]
)
def test_random_graphs(seed: int) -> None:
    graph = random_graph(seed)
    assert_equal(file.read(file.dump(graph)), images_for(graph, 3))


@needs_driver
def test_a_mobilenet_at_two_sizes() -> None:
    graph = mobilenet_v2(8, 32)
    for size in (32, 37):
        assert_equal(graph, images_for(graph, 3, size))


@needs_driver
@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["mobilenetv1_100", "mobilenetv2_050", "mobilenetv3_small_050", "mobilenetv4_conv_small_050",
     "efficientnet_lite0"],
)  # fmt: skip
def test_families(name: str) -> None:
    """Quantized at 64 pixels, with eight bits and with more, and run at an odd size."""
    pytest.importorskip("timm")
    from support.int8_models import PIXELS, create

    images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)
    model = create(name)
    for mixed in ({}, {"mixed": "auto", "budget": 1.35}):
        graph = int8.quantize(model, images, **PIXELS, **mixed).graph
        assert_equal(graph, images_for(graph, 3, 47))


@needs_driver
@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 4))]
)
def test_fine_maps(seed: int) -> None:
    """Written and read by 1x1 and 3x3 products and as residuals, at all sizes and in the head."""
    b = Builder(seed)
    rng, fine = b.rng, {"fine": True, "zero_point": int(b.rng.integers(40, 200))}
    size = int(rng.integers(20, 35))
    out = [int(c) for c in rng.choice((5, 16, 17, 24, 40, 65), 3)]
    b.conv(out[0], 3, inputs=(-1,), padding="same", **fine)
    start = b.conv(out[1], 3, padding=(1, 1, 1, 1), **fine)
    b.conv(33)
    for more in (fine, {}, fine):  # fine to fine, fine to bytes, bytes to fine
        last = len(b.nodes) - 1
        start = b.conv(out[1], inputs=(last, start), residual_multiplier=0.75, **more)
    b.conv(None, 3, stride=(2, 2), padding="same")  # as a map of twice the channels
    b.conv(out[2], 3, stride=(2, 3), **fine)
    b.conv(160, stride=(1, 2), lo=30, hi=220, **fine)
    b.add(Pool, None, b.channels[-1], ratio=1.0, zero_point=100)
    head = b.conv(24, **fine)
    b.conv(24, inputs=(head, head), residual_multiplier=-0.625, **fine)
    b.conv(7, cls=Classifier)
    graph = Graph(nodes=tuple(b.nodes), image_size=size, **FIELDS)
    assert_equal(graph, images_for(graph, 2), (2,))


@needs_driver
@pytest.mark.parametrize("kernel", [7, pytest.param(31, marks=pytest.mark.slow)])
def test_large_kernels(kernel: int) -> None:
    """Wider than the map, uneven, and of strides that no fast kernel has."""
    b = Builder(kernel)
    uneven = (kernel - 1, 0, 3, kernel // 2)
    b.conv(19, kernel, inputs=(-1,), stride=(2, 1), padding=uneven)
    b.conv(None, kernel, padding="same")
    b.conv(None, 3, stride=(2, 1), padding="same", hardswish_scale=3.0, zero_point=7)
    b.conv(20, kernel, stride=(3, 5), padding="same")
    graph = b.graph(24)
    assert_equal(graph, images_for(graph, 2), (2,))


@needs_driver
@pytest.mark.parametrize("size", [1, 2, 5])
def test_extreme_sums_and_small_maps(size: int) -> None:
    """Weights of -127 and 127 on images of 255; maps smaller than a tile, of one pixel."""
    b = Builder(size)
    b.conv(16, 3, inputs=(-1,), weight=127, padding="same", stride=(2, 2))
    b.conv(70, weight=-127)
    b.conv(None, 5, padding="same", weight=127)
    assert_equal(b.graph(size), np.full((3, size, size, 3), 255, np.uint8))


# what goes in and out


@pytest.fixture(scope="module")
def graph() -> Graph:
    return random_graph(2, image_size=11, blocks=1)


@needs_driver
def test_images_and_logits_on_the_host_and_the_gpu(graph: Graph) -> None:
    images = images_for(graph, 5)
    want = int8.load(graph)(images)
    student = int8.load(graph, device="cuda")
    for source in (images, DeviceArray(images), Capsule(images)):
        assert student(source).tobytes() == want.tobytes()
        for target in (np.zeros_like(want), DeviceArray(np.zeros_like(want))):
            assert student(source, out=target) is target
            given = target if isinstance(target, np.ndarray) else target.numpy()
            assert given.tobytes() == want.tobytes()
    assert student(images[:0]).shape == (0, want.shape[1])
    frames = [images[0], np.repeat(images[1], 3, 0)]
    assert np.array_equal(student(frames, prepare=True), int8.load(graph)(frames, prepare=True))


@needs_driver
def test_batch_sizes_share_memory_and_graphs_are_made_again(graph: Graph) -> None:
    images = images_for(graph, 20)
    want = int8.load(graph)(images)
    with int8.load(graph, device="cuda") as student:
        for batch in (3, 1, 20, 3, 1):
            for _ in range(2):  # captured, then replayed
                assert student(images[-batch:]).tobytes() == want[-batch:].tobytes()
    with pytest.raises(ValueError, match="it is closed"):
        student(images)


@needs_driver
def test_a_batch_larger_than_a_graphs() -> None:
    graph = random_graph(2, image_size=2, blocks=0)
    images = np.tile(images_for(graph, 50), (21, 1, 1, 1))
    want = np.tile(int8.load(graph)(images[:50]), (21, 1))
    assert int8.load(graph, device="cuda")(images).tobytes() == want.tobytes()


@needs_driver
def test_threads_and_sessions_take_turns(graph: Graph) -> None:
    images = images_for(graph, 4)
    want = int8.load(graph)(images)
    students = [int8.load(graph, device="cuda") for _ in range(2)]

    def call(i: int) -> bool:
        return students[i % 2](images[i % 3 :]).tobytes() == want[i % 3 :].tobytes()

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(12)))


@needs_driver
def test_profile_has_a_row_for_each_kernel(graph: Graph) -> None:
    student = int8.load(graph, device="cuda")
    profile = student.profile(images_for(graph, 2), rounds=2)
    assert {layer.name for layer in profile.layers} == {node.name for node in graph.nodes}
    assert all(layer.kernel.startswith("vitkd_int8_") for layer in profile.layers)
    assert profile.us > 0
    assert "conv_image" in str(profile)
    assert student.device == "cuda:0"
    assert "cuda:0" in repr(student)


@needs_driver
@pytest.mark.parametrize(
    ("shape", "dtype", "error"),
    [
        ((2, 11, 12, 3), np.uint8, r"expected uint8 \[2, 11, 11, 3\], got uint8 \[2, 11, 12, 3\]"),
        ((2, 11, 11, 3), np.float32, "images: expected uint8 .*, got float32"),
    ],
)
def test_arrays_on_the_gpu_are_checked(graph: Graph, shape: Any, dtype: Any, error: str) -> None:
    student = int8.load(graph, device="cuda")
    for kind in (DeviceArray, Capsule):
        with pytest.raises(ValueError, match=error):
            student(kind(np.zeros(shape, dtype)))


@needs_driver
def test_arrays_that_are_not_contiguous_or_of_no_gpu(graph: Graph) -> None:
    student = int8.load(graph, device="cuda")
    images = images_for(graph, 2)
    array, capsule = DeviceArray(images), Capsule(images, strides=(363, 1, 33, 3))
    array.__cuda_array_interface__["strides"] = (363, 33, 3, 2)
    for strided in (array, capsule):
        with pytest.raises(ValueError, match="images: expected a contiguous array on the GPU"):
            student(strided)
    array.__cuda_array_interface__ |= {"strides": None, "data": (images.ctypes.data, False)}
    with pytest.raises(RuntimeError, match="images: "):
        student(array)


@pytest.mark.gpu
def test_tensors_of_torch_whose_values_come_late() -> None:
    torch = pytest.importorskip("torch")
    graph = mobilenet_v2(4, 64)
    images = images_for(graph, 8)
    want = int8.load(graph)(images)
    student = int8.load(graph, device="cuda")
    pinned = torch.from_numpy(images).pin_memory()
    stream = torch.cuda.Stream()
    for _ in range(3):
        x = torch.zeros(images.shape, dtype=torch.uint8, device="cuda")
        out = torch.empty(want.shape, device="cuda")
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            x.copy_(pinned, non_blocking=True)
            student(x, out=out)
        assert out.cpu().numpy().tobytes() == want.tobytes()


# errors


@needs_driver
def test_no_such_gpu() -> None:
    with pytest.raises(RuntimeError, match="device='cuda:999': no CUDA device 999: there "):
        int8.load(random_graph(0), device="cuda:999")


def test_an_error_without_a_driver() -> None:
    why = "no NVIDIA driver" if _int8.cuda_kernels() else "this package was built without CUDA"
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        with pytest.raises(RuntimeError, match=f"int8.load: device='cuda': {why}"):
            int8.load(random_graph(0), device="cuda")
    else:
        pytest.skip("there is a driver")


def test_the_profile_of_a_gpu_that_is_not_there(tmp_path: Path, vitkd) -> None:
    (tmp_path / "x.int8.safetensors").write_bytes(file.dump(random_graph(0)))
    for arguments, error in (
        (("cuda:999",), r"RuntimeError: int8\.load: device='cuda:999': "),
        (("cuda", "--threads", 2), r"ValueError: int8\.load: device='cuda': threads and isa are "),
        (
            ("gpu",),
            r"ValueError: int8\.load: device: expected 'cpu', 'cuda' or 'cuda:N', got 'gpu'",
        ),
    ):
        result = vitkd("profile", tmp_path / "x.int8.safetensors", "--device", *arguments)
        assert result.code == 1 and re.fullmatch(rf"vitkd: {error}.*\n", result.err)


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "CUDA", 0, None])
def test_devices_without_such_a_name(device: Any) -> None:
    with pytest.raises(ValueError, match="device: expected 'cpu', 'cuda' or 'cuda:N', got"):
        int8.load(random_graph(0), device=device)


@pytest.mark.parametrize("options", [{"threads": 2}, {"isa": "scalar"}])
def test_options_of_the_cpu_without_a_use(options: Any) -> None:
    with pytest.raises(ValueError, match="threads and isa are of the CPU alone"):
        int8.load(random_graph(0), device="cuda", **options)
