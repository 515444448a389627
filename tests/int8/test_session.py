"""Sessions: what they take and refuse, threads, forks, memory, and whose float state counts."""

import ctypes
import os
import re
import subprocess
import sys
import threading
import time
import tracemalloc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support.int8_builder import ISAS, Builder, engine, images_for, mobilenet_v2
from support.int8_graphs import random_graph
from vitkd_fast import _int8, int8
from vitkd_fast.int8 import file, reference
from vitkd_fast.int8.graph import Array, Graph, SqueezeExcite

pytestmark = pytest.mark.usefixtures("one_thread")


def python(code: str, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def graph() -> Graph:
    return random_graph(11, image_size=33)


@pytest.fixture(scope="module")
def images(graph: Graph) -> Array:
    return images_for(graph, 5)


@pytest.fixture(scope="module")
def want(graph: Graph, images: Array) -> bytes:
    return reference.run(graph, images).tobytes()


def test_sources(graph: Graph, images: Array, want: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.int8.safetensors"
    file.save(graph, path)
    for source in (path, str(path), path.read_bytes(), graph):
        assert int8.load(source)(images).tobytes() == want
    with pytest.raises(FileNotFoundError):
        int8.load(tmp_path / "none")
    with pytest.raises(int8.FileError, match="no safetensors"):
        int8.load(b"")


def test_results(graph: Graph, images: Array, want: bytes) -> None:
    session = int8.load(graph, threads=2)
    classes = len(session.classes)
    for _ in range(3):
        assert session(images).tobytes() == want
    out = np.full((5, classes), np.nan, np.float32)
    assert session(images, out=out) is out and out.tobytes() == want
    none = session(images[:0])
    assert none.shape == (0, classes) and none.dtype == np.float32
    assert session(np.asfortranarray(images)).tobytes() == want
    assert (
        session(images[::-1]).tobytes()
        == np.frombuffer(want, np.float32).reshape(5, -1)[::-1].tobytes()
    )
    assert session(images.tolist() and memoryview(images)).tobytes() == want


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (np.zeros((1, 33, 33, 3), np.float32), "float32 [1, 33, 33, 3]"),
        (np.zeros((1, 33, 33, 3), np.int8), "int8 [1, 33, 33, 3]"),
        (np.zeros((1, 3, 33, 33), np.uint8), "uint8 [1, 3, 33, 33]"),
        (np.zeros((33, 33, 3), np.uint8), "uint8 [33, 33, 3]"),
        (np.zeros((1, 33, 32, 3), np.uint8), "uint8 [1, 33, 32, 3]"),
        (np.zeros((1, 33, 33, 1), np.uint8), "uint8 [1, 33, 33, 1]"),
        (np.uint8(0), "uint8 []"),
    ],
)
def test_refused_images(graph: Graph, given: Any, shown: str) -> None:
    with pytest.raises(ValueError, match=re.escape(shown)) as error:
        int8.load(graph)(given)
    assert "[N, 33, 33, 3]" in str(error.value)


def test_refused_out(graph: Graph, images: Array) -> None:
    session = int8.load(graph)
    shape = (5, len(session.classes))
    fixed = np.zeros(shape, np.float32)
    fixed.flags.writeable = False
    every_other = np.zeros((5, 2 * shape[1]), np.float32)[:, ::2]
    for out in (np.zeros(shape), np.zeros((4, shape[1]), np.float32), fixed, every_other, "out"):
        with pytest.raises(ValueError, match=re.escape(f"float32 ndarray {list(shape)}, got ")):
            session(images, out=out)  # type: ignore[arg-type]


def test_close_and_repr(graph: Graph, images: Array) -> None:
    with int8.load(graph, threads=2, isa="scalar") as session:
        text = f"int8.Session({len(session.classes)} classes, 33x33, scalar, 2 threads, "
        assert repr(session).startswith(text)
        session(images)
    assert repr(session) == "int8.Session(closed)"
    for use in (session, session.profile):
        with pytest.raises(ValueError, match="closed"):
            use(images)
    session.close()


def test_options(graph: Graph) -> None:
    for isa in _int8.isa():
        assert int8.load(graph, isa=isa).isa == isa
    assert int8.load(graph).isa == int8.isa()[0]
    with pytest.raises(ValueError, match=r"isa: expected .*scalar, got sse"):
        int8.load(graph, isa="sse")
    for threads in (0, -1, 257, 1.0, "2", None):
        with pytest.raises(ValueError, match=r"threads: expected 1 to 256, got "):
            int8.load(graph, threads=threads)  # type: ignore[arg-type]
    for size in (0, -3, 8193, 1.5):
        with pytest.raises(ValueError, match="image_size"):
            int8.load(graph, image_size=size)  # type: ignore[arg-type]
    for count in (0, -1, 257):
        with pytest.raises(ValueError, match="threads"):
            engine(graph, threads=count)


def test_isa_of_the_environment() -> None:
    code = "from vitkd_fast import int8; print(*int8.isa())"
    for isa in _int8.isa():
        assert python(code, VITKD_FAST_ISA=isa).stdout.split()[0] == isa
    result = python(code, VITKD_FAST_ISA="sse")
    assert (
        result.returncode != 0
        and "VITKD_FAST_ISA: expected" in result.stderr
        and "got sse" in result.stderr
    )


def test_profile(graph: Graph, images: Array) -> None:
    profile = int8.load(graph).profile(images[:2], rounds=2)
    assert [layer.name for layer in profile.layers] == [node.name for node in graph.nodes]
    assert 0 < sum(layer.us for layer in profile.layers) == profile.us < 1e6
    assert len(str(profile).splitlines()) == len(graph.nodes) + 2


_KERNELS = {
    "scalar": ["gemm 1x16", *["depthwise 1x1x16"] * 4, *["gemm 1x16"] * 2, "depthwise 1x1x16",
               "gemm 1x16", "pool", "gemm 1x16"],
    "sse41": ["gemm 3x16", *["depthwise 1x1x16"] * 4, *["gemm 3x16"] * 2, "depthwise 1x1x16",
              "gemm 3x16", "pool", "gemm 1x16"],
    "avx2": ["gemm 6x16", *["depthwise 3x3 sliding 2x1x16"] * 2, "depthwise 3x3 sliding 1x1x16",
             "depthwise 2x4x16", *["gemm 6x16"] * 2, "depthwise 3x3 sliding 2x1x16", "gemm 6x16",
             "pool", "gemm 1x16"],
    "avxvnni": ["gemm 6x16", *["depthwise 2x4x32"] * 2, "depthwise 1x4x32", "depthwise 2x4x32",
                *["gemm 6x16"] * 2, "depthwise 2x8x16", "gemm 6x16", "pool", "gemm 1x16"],
    "avx512vnni": ["gemm 6x64", "depthwise w3 sliding 2x3x32", "depthwise w3 2x1x64",
                   "depthwise w3 1x1x64", "depthwise 2x4x64", "gemm 6x64", "gemm 16x16",
                   "depthwise w3 2x4x16", "gemm 12x32", "pool", "gemm 1x16"],
}  # fmt: skip


@pytest.mark.parametrize("isa", ISAS)
def test_profile_names_the_kernels_that_ran(isa: str) -> None:
    b = Builder()
    ones = (1, 1, 1, 1)
    b.conv(64, 3, inputs=(-1,), stride=(2, 2), padding=ones)
    b.conv(None, 3, padding=ones, multiplier=2.0**-9)  # its sums are floats: kMagicBits
    b.conv(None, 3, padding=ones)
    b.conv(None, 3, stride=(2, 2), padding=ones)
    b.conv(None, 5, padding=(2, 2, 2, 2))
    b.conv(96)  # panels of 64 and 32
    b.conv(16)
    b.conv(None, 3, padding=ones)
    b.conv(32)  # too short a sum for tiles
    graph = b.graph(64)
    names = [n.kernel for n in int8.load(graph, isa=isa).profile(images_for(graph, 1)).layers]
    set_of = [{"amx": "avx512vnni", "avx512": "avx2"}.get(isa, isa)] * len(names)
    want = list(_KERNELS[set_of[0]])
    if isa == "amx":
        for i, kernel in ((5, "gemm 16x64"), (6, "gemm 16x16")):
            want[i], set_of[i] = kernel, "amx"
    elif isa == "avx512":
        for i, kernel in enumerate(want):
            if "gemm" in kernel:
                want[i], set_of[i] = kernel.replace("6x16", "16x16"), "avx512"
    gemm = [x.replace("gemm", "gemm u8s8").replace(" ", "_") for x in want]
    assert names == [x if x == "pool" else f"{x}_{y}" for x, y in zip(gemm, set_of, strict=True)]


def test_many_callers_at_once(graph: Graph, images: Array, want: bytes) -> None:
    sessions = [int8.load(graph, threads=threads) for threads in (1, 2)]
    wrong: list[Any] = []

    def work(first: int) -> None:
        try:
            for i in range(12):
                if sessions[(first + i) % 2](images).tobytes() != want:
                    wrong.append((first, i))
        except BaseException as error:
            wrong.append(error)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_others_run_during_a_call(graph: Graph, images: Array) -> None:
    session = int8.load(graph, isa="scalar")
    start = time.perf_counter()
    session(images)
    batch = np.repeat(images, 1 + int(0.6 / (time.perf_counter() - start)), 0)
    spans: list[float] = []

    def call() -> None:
        spans.append(time.perf_counter())
        session(batch)
        spans.append(time.perf_counter())

    caller, moments = threading.Thread(target=call), []
    caller.start()
    while caller.is_alive():
        moments.append(time.perf_counter())
        time.sleep(0.001)
    begin, end = spans
    third = (end - begin) / 3
    assert sum(begin + third < moment < end - third for moment in moments) >= 3


@pytest.mark.parametrize("threads", [1, 2])
def test_fork(graph: Graph, images: Array, want: bytes, tmp_path: Path, threads: int) -> None:
    """After loading, after a call, and during another thread's call; the parent goes on."""
    file.save(graph, tmp_path / "model")
    np.save(tmp_path / "images.npy", images)
    (tmp_path / "want").write_bytes(want)
    code = """
import os, sys, threading, numpy as np
from vitkd_fast import int8
folder, threads = sys.argv[1:]
images, want = np.load(folder + "/images.npy"), open(folder + "/want", "rb").read()
session = int8.load(folder + "/model", threads=int(threads))
right = lambda: session(images).tobytes() == want
def fork():
    child = os.fork()
    if child == 0:
        good = right() and right()
        session.close()
        os._exit(0 if good and int8.load(folder + "/model")(images).tobytes() == want else 3)
    assert os.waitpid(child, 0)[1] == 0
fork()
assert right()
fork()
assert right()
wrong, done = [], threading.Event()
def call():
    while not done.is_set():
        wrong.extend([] if right() else [1])
other = threading.Thread(target=call)
other.start()
for _ in range(10):
    fork()
done.set()
other.join()
assert right() and not wrong
"""
    result = python(code, str(tmp_path), str(threads))
    assert result.returncode == 0, result.stderr


def test_tensors_without_importing_torch(graph: Graph, images: Array, tmp_path: Path) -> None:
    assert (
        int8.load(graph)(torch.from_numpy(images)).tobytes() == int8.load(graph)(images).tobytes()
    )
    file.save(graph, tmp_path / "model")
    code = """
import sys, numpy as np
import vitkd_fast.int8
session = vitkd_fast.int8.load(sys.argv[1])
session(np.zeros((1, 33, 33, 3), np.uint8))
session.profile(np.zeros((1, 33, 33, 3), np.uint8))
assert "torch" not in sys.modules
"""
    assert python(code, str(tmp_path / "model")).returncode == 0


def test_a_call_keeps_nothing(graph: Graph, images: Array) -> None:
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("needs glibc's mallinfo2")

    class Info(ctypes.Structure):
        _fields_ = [(name, ctypes.c_size_t) for name in "abcdefg"] + [
            ("used", ctypes.c_size_t),
            ("free", ctypes.c_size_t),
            ("top", ctypes.c_size_t),
        ]

    libc.mallinfo2.restype = Info
    for threads in (1, 2):
        session = int8.load(graph, threads=threads)
        out = session(images)
        calls = [None] * 100
        session(images, out=out)
        before = libc.mallinfo2()
        for _ in calls:
            session(images, out=out)
        after = libc.mallinfo2()
        assert (after.used, after.d) == (before.used, before.d)  # d: bytes in mmaps
        tracemalloc.start()
        session(images, out=out)
        tracemalloc.reset_peak()
        level = tracemalloc.get_traced_memory()[0]
        session(images, out=out)
        assert tracemalloc.get_traced_memory()[1] - level < 2000  # of Python's own
        result = session(images)
        assert tracemalloc.get_traced_memory()[1] - level < 2000 + result.nbytes
        tracemalloc.stop()


@contextmanager
def floats(flush: bool, rounding: int) -> Iterator[None]:
    """This thread's SSE state: flush and denormals-are-zero, and rounding 0 to 3."""
    libm = ctypes.CDLL("libm.so.6")
    saved, changed = (ctypes.c_uint32 * 8)(), (ctypes.c_uint32 * 8)()
    libm.fegetenv(saved)
    libm.fegetenv(changed)
    changed[7] = (saved[7] & ~0xE040) | flush * 0x8040 | rounding << 13
    libm.fesetenv(changed)
    try:
        yield
        now = (ctypes.c_uint32 * 8)()
        libm.fegetenv(now)
    finally:
        libm.fesetenv(saved)
    assert now[7] & ~0x3F == changed[7] & ~0x3F  # but for the flags of what happened


@pytest.mark.skipif("avx2" not in ISAS, reason="MXCSR is x86's")
def test_state_of_the_callers_floats(graph: Graph, images: Array) -> None:
    """Rounding and flushing of the calling thread change nothing, and stay as they were."""
    b = Builder()
    b.conv(16, inputs=(-1,), zero_point=0)
    # the factor of a mean is denormal; the sum, grown again, moves q / 2 off a tie
    gates = {"q1": np.full((16, 4096), 127, np.int8), "q2": np.full((4096, 16), 127, np.int8)}
    gates |= {f"s{i}": np.full(n, 4e9, np.float32) for i, n in ((1, 4096), (2, 16))}
    gates |= {f"b{i}": np.zeros(n, np.float32) for i, n in ((1, 4096), (2, 16))}
    b.add(SqueezeExcite, None, 16, scale=1e-36, ratio=1.0, **gates)
    b.conv(None, inputs=(1,), weight=64, bias=0, multiplier=1 / 64)
    denormal = b.graph(12)
    for given, pixels in ((graph, images), (denormal, images_for(denormal, 2))):
        right = reference.run(given, pixels)
        sessions = [int8.load(given, isa=isa, threads=t) for isa in ISAS for t in (1, 2)]
        for flush, rounding in ((True, 0), (False, 1), (False, 2), (True, 3)):
            with floats(flush, rounding):
                made_here = int8.load(given)
                results = [s(pixels) for s in (*sessions, made_here)]
                altered = reference.run(given, pixels)
            for result, session in zip(results, (*sessions, made_here), strict=True):
                assert result.tobytes() == right.tobytes(), f"{session}: {flush=}, {rounding=}"
            # the test would see it
            assert given is graph or altered.tobytes() != right.tobytes(), f"{flush=}, {rounding=}"


def test_memory_of_a_process(tmp_path: Path) -> None:
    graph = mobilenet_v2()
    assert sum(node.weight.size for node in graph.nodes if hasattr(node, "weight")) > 3.4e6
    file.save(graph, tmp_path / "model")
    code = """
import sys, numpy as np
from vitkd_fast import int8
session = int8.load(sys.argv[1])
out = session(np.zeros((1, 224, 224, 3), np.uint8))
status = dict(line.split(":") for line in open("/proc/self/status").read().splitlines())
print(status["VmRSS"].split()[0], status["VmHWM"].split()[0])
"""
    result = python(code, str(tmp_path / "model"))
    resident, peak = (int(kilobytes) / 1024 for kilobytes in result.stdout.split())
    print(f"{resident:.1f} MB resident, {peak:.1f} MB at most")
    assert resident < 60, result.stdout


def test_nothing_beside_the_images_is_read() -> None:
    """Images and logits between pages that nobody may touch, in a process that may die of it."""
    code = """
import ctypes, mmap, sys
import numpy as np
sys.path.insert(0, sys.argv[1])
from support.int8_builder import ISAS, Builder, engine
from vitkd_fast.int8 import reference
libc, page = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE
def guarded(size):
    memory = mmap.mmap(-1, (size // page + 3) * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    last = (size // page + 2) * page
    for guard in (start, start + last):
        assert libc.mprotect(ctypes.c_void_p(guard), page, 0) == 0
    return np.frombuffer(memory, np.uint8, size, last - size)
for kernel, stride, out in [(1, 1, 16), (3, 2, 33), (5, 2, 64), (7, 4, 20), (9, 1, 8), (31, 8, 16)]:
    for padding in ["same", (0, 0, 0, 0)]:
        b = Builder(kernel)
        b.conv(out, kernel, inputs=(-1,), stride=(stride, stride), padding=padding)
        graph = b.graph(53, classes=out + 3)
        images = guarded(2 * 53 * 53 * 3).reshape(2, 53, 53, 3)
        images[:] = np.random.default_rng(0).integers(0, 256, images.shape)
        logits = guarded(2 * (out + 3) * 4).view(np.float32).reshape(2, out + 3)
        want = reference.run(graph, images)
        for isa in ISAS:
            print(kernel, stride, padding, isa, flush=True)
            engine(graph, isa=isa).run(images, logits)
            assert logits.tobytes() == want.tobytes()
"""
    result = python(code, str(Path(__file__).parents[1]))
    assert result.returncode == 0, f"{result.returncode} at {result.stdout[-60:]}{result.stderr}"


def test_damaged_files_and_graphs() -> None:
    """A short run, without sanitizers, of what `make fuzz` does."""
    driver = Path(__file__).with_name("fuzz.py")
    command = [sys.executable, driver, "--files", "300", "--seed", "1"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "150 files" in result.stdout and "no finding" in result.stdout


def test_more_threads_than_cpus_are_warned_of(graph: Graph) -> None:
    allowed = len(os.sched_getaffinity(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        int8.load(graph, threads=allowed)
    with pytest.warns(UserWarning, match=f"threads: {allowed + 1} given, and .* {allowed} CPUs"):
        int8.load(graph, threads=allowed + 1)
