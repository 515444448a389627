"""The C API: its library as it is built, installed and used, beside Python's answers."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator
from ctypes import byref
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from support.int8_builder import ISAS, images_for, mobilenet_v2
from support.int8_graphs import random_graph, random_images
from vitkd_fast import int8
from vitkd_fast.int8 import file
from vitkd_fast.int8.graph import Array, Graph

# of the system, or of the environment
_PATH = os.pathsep.join([os.environ.get("PATH", ""), sysconfig.get_path("scripts")])
TOOLS = {name: shutil.which(name, path=_PATH) for name in ("cmake", "ctest", "ninja")}

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(TOOLS["cmake"] is None, reason="needs cmake"),
]

ROOT = Path(__file__).resolve().parents[2]
CROSS = [f"aarch64-linux-gnu-g++{suffix}" for suffix in ("", "-12")]


def sh(*command: object, **options: Any) -> str:
    options = {"capture_output": True, "text": True} | options
    result = subprocess.run([*map(str, command)], check=False, **options)
    assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
    return str(result.stdout)


def build(folder: Path, *options: str) -> None:
    ninja = TOOLS["ninja"]
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    sh(TOOLS["cmake"], "-S", ROOT, "-B", folder, *generator, *options)
    sh(TOOLS["cmake"], "--build", folder, "--parallel", os.cpu_count())


class Built(NamedTuple):
    folder: Path
    small: Path  # the library with the kernels of AVX2 and the scalar ones alone


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Both libraries, the example and the tests in C++; kept between runs."""
    folder, small = ROOT / "build/c", tmp_path_factory.mktemp("small") / "libvitkd_int8.so"
    build(folder, "-DVITKD_INT8_WITHOUT=avx512;avxvnni")
    shutil.copy(folder / "libvitkd_int8.so", small)
    build(folder, "-DVITKD_INT8_WITHOUT=")
    return Built(folder, small)


class Options(ctypes.Structure):
    _fields_ = [("threads", ctypes.c_int), ("image_size", ctypes.c_int), ("isa", ctypes.c_char_p)]


OK, ARGUMENT, IO, FORMAT = range(4)


class Library:
    """vitkd_int8.h by ctypes."""

    def __init__(self, path: Path) -> None:
        self.dll = ctypes.CDLL(str(path))
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        for name, result, arguments in (
            ("open", ctypes.c_int, [ctypes.c_char_p, pointer, pointer]),
            ("open_memory", ctypes.c_int, [pointer, size, pointer, pointer]),
            ("close", None, [pointer]),
            ("prepare", ctypes.c_int, [pointer, pointer, size, size, ctypes.c_ssize_t, pointer]),
            ("run", ctypes.c_int, [pointer, pointer, size, pointer]),
            ("last_error", ctypes.c_char_p, []),
            *((name, ctypes.c_int, [pointer]) for name in ("image_size", "classes", "threads")),
            *((name, ctypes.c_char_p, [pointer]) for name in ("input_layout", "isa")),
            ("class_name", ctypes.c_char_p, [pointer, ctypes.c_int]),
            *((name, size, [pointer]) for name in ("weight_bytes", "run_bytes")),
            ("isa_at", ctypes.c_char_p, [ctypes.c_int]),
            ("version", ctypes.c_char_p, []),
        ):
            function = getattr(self.dll, f"vitkd_int8_{name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def error(self) -> str:
        return self.last_error().decode()

    def session(self, data: bytes, **options: Any) -> ctypes.c_void_p:
        session = ctypes.c_void_p()
        status = self.open_memory(data, len(data), byref(Options(**options)), byref(session))
        assert status == OK, self.error()
        return session

    def logits(self, session: ctypes.c_void_p, images: Array) -> bytes:
        out = np.full((len(images), self.classes(session)), np.nan, np.float32)
        assert self.run(session, images.ctypes.data, len(images), out.ctypes.data) == OK
        return out.tobytes()


@pytest.fixture(scope="module")
def library(built: Built) -> Library:
    return Library(built.folder / "libvitkd_int8.so")


@pytest.fixture(scope="module")
def graph() -> Graph:
    return random_graph(11, image_size=33, classes=7)


@pytest.fixture
def session(library: Library, graph: Graph) -> Iterator[ctypes.c_void_p]:
    opened = library.session(file.dump(graph))
    yield opened
    library.close(opened)


def test_the_library_needs_libc_alone(built: Built, tmp_path: Path) -> None:
    for path in (built.folder / "libvitkd_int8.so", built.small):
        stripped = tmp_path / "stripped.so"
        sh("strip", "-o", stripped, path)
        print(f"{path}: {stripped.stat().st_size} bytes stripped")
        if path == built.small:
            assert stripped.stat().st_size < 400_000
        symbols = [line.split() for line in sh("nm", "-D", stripped).splitlines()]
        exported = {line[2] for line in symbols if len(line) == 3}
        header = (ROOT / "csrc/int8/include/vitkd_int8.h").read_text()
        assert exported == set(re.findall(r"\b(vitkd_int8_\w+)\(", header))
        others = [line[1] for line in symbols if len(line) == 2 and line[0] != "w"]
        assert others and all("@GLIBC_" in name for name in others), others
        needed = re.findall(r"NEEDED.*\[(.*)\]", sh("readelf", "-d", stripped))
        assert {name.split(".")[0] for name in needed} <= {"libc", "libm", "ld-linux-x86-64"}


def test_the_header_is_c99_and_cpp(tmp_path: Path) -> None:
    (tmp_path / "x.c").write_text('#include "vitkd_int8.h"\n')
    flags = ["-fsyntax-only", "-pedantic", "-Wall", "-Wextra", "-Werror"]
    include = f"-I{ROOT / 'csrc/int8/include'}"
    for language in (["gcc", "-std=c99"], ["g++", "-std=c++11", "-xc++"]):
        sh(*language, *flags, include, tmp_path / "x.c")


def test_versions_agree(library: Library) -> None:
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert version and library.version().decode() == version[1]


def test_what_a_session_is(library: Library, graph: Graph, session: ctypes.c_void_p) -> None:
    assert library.image_size(session) == 33 and library.classes(session) == 7
    assert library.threads(session) == 1
    assert library.input_layout(session) == b"u8 NHWC RGB"
    assert library.isa(session).decode() == int8.load(graph).isa
    assert library.class_name(session, 0) is None
    assert library.weight_bytes(session) > 0 and library.run_bytes(session) > 0
    isas = [library.isa_at(i) for i in range(len(int8.isa()) + 1)]
    assert isas == [*(isa.encode() for isa in int8.isa()), None]
    assert library.isa_at(-1) is None


def test_names_of_classes(library: Library) -> None:
    names = ("cat", "dög", '\U0001f408\\"\n/', "é" * 1024, "", "x", "y")
    graph = random_graph(3, image_size=20, classes=7)
    data = file.dump(replace(graph, classes=names))
    assert file.read(data).classes == names
    opened = library.session(data)
    assert [library.class_name(opened, i).decode() for i in range(7)] == list(names)
    assert library.class_name(opened, 7) is None and library.class_name(opened, -1) is None
    library.close(opened)


@pytest.mark.parametrize("seed", range(4))
def test_pythons_logits(library: Library, seed: int, tmp_path: Path) -> None:
    graph = random_graph(seed)
    images = images_for(graph, 5)
    want = int8.load(graph)(images).tobytes()
    data = file.dump(graph)
    for options in [{"isa": isa.encode()} for isa in ISAS] + [{"threads": 2}]:
        opened = library.session(data, **options)
        assert library.logits(opened, images) == want
        assert library.run(opened, None, 0, None) == OK
        library.close(opened)
    # from a path, and from memory at any alignment, which is freed
    (tmp_path / "model").write_bytes(data)
    opened = ctypes.c_void_p()
    assert library.open(bytes(tmp_path / "model"), None, byref(opened)) == OK
    (tmp_path / "model").unlink()
    assert library.logits(opened, images) == want
    library.close(opened)
    for shift in (1, 4):
        memory = ctypes.create_string_buffer(b"-" * shift + data)
        at = ctypes.addressof(memory) + shift
        assert library.open_memory(at, len(data), None, byref(opened)) == OK
        memory.raw = bytes(len(memory))
        assert library.logits(opened, images) == want
        library.close(opened)


def test_another_image_size(library: Library) -> None:
    graph = random_graph(5, image_size=40)
    images = images_for(graph, 2, size=56)
    opened = library.session(file.dump(graph), image_size=56)
    assert library.image_size(opened) == 56
    assert library.logits(opened, images) == int8.load(graph, image_size=56)(images).tobytes()
    library.close(opened)


@pytest.mark.parametrize("shape", [(33, 33), (50, 41), (480, 640), (3, 100), (1, 1)])
def test_pythons_pixels(
    library: Library, graph: Graph, session: ctypes.c_void_p, shape: tuple[int, int]
) -> None:
    picture = random_images(1, (1, *shape, 3))[0]
    want = int8.load(graph).prepare(picture)
    image = np.zeros((33, 33, 3), np.uint8)
    row = 3 * shape[1]
    assert library.prepare(session, picture.ctypes.data, *shape, row, image.ctypes.data) == OK
    assert np.array_equal(image, want)
    mirrored = np.ascontiguousarray(picture[::-1])  # bottom up
    last = mirrored.ctypes.data + row * (shape[0] - 1)
    image[:] = 0
    assert library.prepare(session, last, *shape, -row, image.ctypes.data) == OK
    assert np.array_equal(image, want)


def test_calls_from_several_threads(library: Library, graph: Graph) -> None:
    images = images_for(graph, 3)
    want = int8.load(graph)(images).tobytes()
    opened = library.session(file.dump(graph))
    results: list[bytes] = []
    threads = [
        threading.Thread(
            target=lambda: results.extend(library.logits(opened, images) for _ in range(20))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    library.close(opened)
    assert results == [want] * 80


def test_refused_arguments(library: Library, graph: Graph, session: ctypes.c_void_p) -> None:
    data, opened = file.dump(graph), ctypes.c_void_p(1)
    image, out = np.zeros((33, 33, 3), np.uint8), np.zeros(7, np.float32)
    at = image.ctypes.data
    for options, message in (
        ({"threads": -1}, "threads: expected 1 to 256, got -1"),
        ({"threads": 257}, "threads: expected 1 to 256, got 257"),
        ({"isa": b"sse"}, "isa: expected one of this machine's, .*, got sse"),
        ({"image_size": -1}, "image_size -1: image_size: expected 1 to 8192, got -1"),
        ({"image_size": 8193}, "image_size 8193: .*expected 1 to 8192"),
    ):
        given = byref(Options(**options))
        assert library.open_memory(data, len(data), given, byref(opened)) == ARGUMENT
        assert re.search(message, library.error()) and opened.value is None
    for status, message in (
        (library.open_memory(data, len(data), None, None), "session: expected a pointer, got NULL"),
        (library.open_memory(None, 8, None, byref(opened)), "data: expected a pointer"),
        (library.open(None, None, byref(opened)), "path: expected a pointer"),
        (library.run(None, at, 1, out.ctypes.data), "session: expected a pointer"),
        (library.run(session, None, 1, out.ctypes.data), "images: expected a pointer"),
        (library.run(session, at, 1, None), "logits: expected a pointer"),
        (library.prepare(session, None, 1, 1, 3, at), "pixels: expected a pointer"),
        (library.prepare(session, at, 1, 1, 3, None), "image: expected a pointer"),
        (library.prepare(session, at, 0, 5, 15, at), "height and width: expected 1 to"),
        (library.prepare(session, at, 5, 5, 14, at), "stride: expected .* 15, or more, got 14"),
    ):
        assert status == ARGUMENT, message
    assert "stride: expected" in library.error()
    library.close(None)


def test_refused_files(library: Library, graph: Graph, tmp_path: Path) -> None:
    """The messages are Python's: there is one reader."""
    data = file.dump(graph)
    end = 8 + int.from_bytes(data[:8], "little")
    opened = ctypes.c_void_p(1)
    for changed in (
        b"",
        data[:-1],
        data[:100],
        data[:-1] + b"\0",
        data + b"\0" * 8,
        data.replace(b'\\"lo\\"', b'\\"ol\\"', 1),
        data.replace(b"conv", b"cone", 1),
        data[:8] + b"[" * (end - 8) + data[end:],
    ):
        with pytest.raises(int8.FileError) as error:
            int8.load(changed)
        assert library.open_memory(changed or b"x", len(changed), None, byref(opened)) == FORMAT
        assert library.error() == str(error.value) and opened.value is None
        path = tmp_path / "model"
        path.write_bytes(changed)
        assert library.open(bytes(path), None, byref(opened)) == FORMAT
        assert library.error() == f"{path}: {error.value}"
    missing = tmp_path / "none"
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (missing, "No such file or directory"),
        (tmp_path, "expected a regular file"),
        (tmp_path / "pipe", "expected a regular file"),
    ):
        assert library.open(bytes(path), None, byref(opened)) == IO
        assert library.error().startswith(f"{path}: {message}")
    with (tmp_path / "huge").open("wb") as huge:
        huge.truncate(1 << 34)  # a hole
    assert library.open(bytes(tmp_path / "huge"), None, byref(opened)) == FORMAT
    assert "huge: expected up to 1073741824 bytes, got 17179869184" in library.error()


def test_the_last_error_is_of_the_thread(library: Library, session: ctypes.c_void_p) -> None:
    assert library.run(session, None, 1, None) == ARGUMENT
    others: list[str] = []
    thread = threading.Thread(target=lambda: others.append(library.error()))
    thread.start()
    thread.join()
    assert others == [""] and "images" in library.error()


def ppm(path: Path, pixels: Array) -> Path:
    height, width, _ = pixels.shape
    path.write_bytes(b"P6\n# a comment\n%d %d\n255\n" % (width, height) + pixels.tobytes())
    return path


def test_the_example(built: Built, tmp_path: Path) -> None:
    graph = replace(random_graph(7, classes=31), classes=tuple(f"class {i}" for i in range(31)))
    model, picture = tmp_path / "model", random_images(5, (1, 75, 100, 3))[0]
    file.save(graph, model)
    session = int8.load(model)
    want = session(session.prepare(picture)[None])[0]
    example, logits = built.folder / "tests/cpp/classify", tmp_path / "logits"
    lines = sh(example, model, ppm(tmp_path / "picture.ppm", picture), logits).splitlines()
    assert logits.read_bytes() == want.tobytes()
    best = np.argsort(-want, kind="stable")[:5]
    assert lines == [f"{want[i]:9.4f}  {i} class {i}" for i in best]
    for arguments, message in (
        (["none", "picture.ppm"], "none: No such file or directory"),
        (["model", "none"], "none: No such file or directory"),
        (["model", "model"], "model: expected a binary PPM"),
        (["picture.ppm", "picture.ppm"], "picture.ppm: this is no safetensors file"),
        (["model"], "usage: classify"),
    ):
        result = subprocess.run(
            [example, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert result.returncode != 0 and result.stderr.startswith(message)


def test_memory_of_the_example(built: Built, tmp_path: Path) -> None:
    graph = mobilenet_v2()
    model, picture = tmp_path / "model", random_images(5, (1, 375, 500, 3))[0]
    file.save(graph, model)
    ppm(tmp_path / "picture.ppm", picture)
    # from a shell: a process begins with the peak of the one that started it
    code = """
import resource, subprocess, sys
subprocess.run(["sh", "-c", '"$@"; :', "sh", *sys.argv[1:]], stdout=2, check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
    example = built.folder / "tests/cpp/classify"
    for isa in ISAS:
        environment = os.environ | {"VITKD_FAST_ISA": isa}
        command = [sys.executable, "-S", "-c", code, example, model, tmp_path / "picture.ppm"]
        peak = int(sh(*command, env=environment)) / 1000
        print(f"{isa}: {peak:.1f} MB at most")
        assert peak < 15


CONSUMER = """
cmake_minimum_required(VERSION 3.20)
project(consumer LANGUAGES {languages})
find_package(vitkd_int8 0.2 REQUIRED)
add_executable(uses_it main.c)
target_link_libraries(uses_it PRIVATE vitkd_int8::{library})
"""


@pytest.mark.parametrize(
    ("library", "languages"), [("vitkd_int8", "C"), ("vitkd_int8_static", "C CXX")]
)
def test_a_project_finds_the_package(
    built: Built, graph: Graph, tmp_path: Path, library: str, languages: str
) -> None:
    sh(TOOLS["cmake"], "--install", built.folder, "--prefix", tmp_path / "prefix")
    shutil.copy(ROOT / "examples/c/classify.c", tmp_path / "main.c")
    (tmp_path / "CMakeLists.txt").write_text(CONSUMER.format(library=library, languages=languages))
    folder = tmp_path / "b"
    sh(TOOLS["cmake"], "-S", tmp_path, "-B", folder, f"-DCMAKE_PREFIX_PATH={tmp_path / 'prefix'}")
    sh(TOOLS["cmake"], "--build", folder)
    file.save(graph, tmp_path / "model")
    picture = ppm(tmp_path / "picture.ppm", random_images(5, (1, 40, 50, 3))[0])
    assert len(sh(folder / "uses_it", tmp_path / "model", picture).splitlines()) == 5


def test_kernels(built: Built) -> None:
    """Each beside the reference arithmetic; `ctest` runs it, too."""
    out = sh(built.folder / "tests/cpp/kernels_test", 300)
    assert [line.split(":")[0] for line in out.splitlines()] == ISAS


def test_damaged_files(built: Built) -> None:
    """A short run, without sanitizers, of what `make fuzz` does."""
    program = built.folder / "tests/cpp/fuzz_capi"
    out = sh(sys.executable, ROOT / "tests/int8/fuzz.py", "--files", 300, "--program", program)
    assert re.search(r"[1-9]\d* opened, [1-9]\d* run, \d+ refused, no finding", out)


@pytest.mark.slow
@pytest.mark.skipif(
    not any(map(shutil.which, CROSS)) or not shutil.which("qemu-aarch64"),
    reason="needs g++-aarch64-linux-gnu and qemu-user",
)
def test_aarch64(tmp_path: Path, graph: Graph) -> None:
    """Built by a toolchain file, run in an emulator."""
    build(tmp_path / "b", f"-DCMAKE_TOOLCHAIN_FILE={ROOT / 'cmake/aarch64-linux-gnu.cmake'}")
    sh(TOOLS["ctest"], "--test-dir", tmp_path / "b", "--output-on-failure")
    file.save(graph, tmp_path / "model")
    pixels = random_images(5, (1, 40, 50, 3))[0]
    session, logits = int8.load(graph), tmp_path / "logits"
    sh("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", tmp_path / "b/tests/cpp/classify",
       tmp_path / "model", ppm(tmp_path / "picture.ppm", pixels), logits)  # fmt: skip
    assert logits.read_bytes() == session(session.prepare(pixels)[None]).tobytes()
