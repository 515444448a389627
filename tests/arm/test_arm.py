"""The int8 engine on ARM CPUs that QEMU emulates: the bytes of x86, on every instruction set.

Skipped where there is no emulator or no arm64 packages; `make test-arm` installs what is missing.
"""

import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support import int8_builder
from support.arm_tools import CPUS, Machine, Unavailable, machine
from support.int8_graphs import random_graph
from vitkd_fast.int8 import file, reference
from vitkd_fast.int8.graph import Add, Graph

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
FUSED = re.compile(r"\t(fn?m(add|sub)|fml[as])\t")

every_cpu = pytest.mark.parametrize("cpu", CPUS, ids=[name.split(",")[0] for name in CPUS])


@pytest.fixture(scope="session")
def arm() -> Machine:
    try:
        return machine()
    except Unavailable as reason:
        pytest.skip(f"no ARM machine: {reason}")


def write(folder: Path, name: str, graph: Graph, *, modes: bool = False) -> None:
    """An int8 file, two images, and what this machine makes of them, for guest.py."""
    images = int8_builder.images_for(graph, 2)
    session = int8_builder.engine(graph, fuse=False)
    logits = np.empty((2, session.classes), np.float32)
    session.run(images, logits)
    nodes = session.activations(images[:1])
    maps = {f"node{i}": output for i, output in enumerate(nodes) if output is not None}
    np.savez(folder / f"{name}.npz", images=images, logits=logits, modes=modes, **maps)
    (folder / f"{name}.safetensors").write_bytes(file.dump(graph))


def assert_same_bytes(arm: Machine, cpu: str, folder: Path) -> None:
    out = arm.python(cpu, HERE / "guest.py", folder)
    passed = {isa: int(count) for isa, count in map(str.split, out.splitlines())}
    assert tuple(passed) == CPUS[cpu]
    files = len(list(folder.glob("*.npz")))
    assert min(passed.values()) > 10 * files, passed


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graphs")
    for seed in range(16):
        write(folder, f"random{seed}", random_graph(seed), modes=seed < 2)
    write(folder, "mobilenet_v2", int8_builder.mobilenet_v2(2, 64))
    return folder


@every_cpu
def test_bytes(arm: Machine, graphs: Path, cpu: str) -> None:
    """Logits and every node's output, in chains or not, on one and two threads, and in each mode
    of rounding that a caller may have set, which a call leaves as it was."""
    assert_same_bytes(arm, cpu, graphs)


@pytest.fixture(scope="module")
def many_graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MobileNets of the real size, and more random ones."""
    from support.int8_models import PIXELS, create
    from vitkd_fast.int8 import quantize

    folder = tmp_path_factory.mktemp("many_graphs")
    for seed in range(16, 60):
        write(folder, f"random{seed}", random_graph(seed))
    for name in ("mobilenetv2_100", "mobilenetv3_large_100", "mobilenetv4_conv_small"):
        images = int8_builder.random_images(0, (8, 224, 224, 3))
        write(folder, name, quantize(create(name), images, **PIXELS).graph)
    return folder


@pytest.mark.slow
@every_cpu
def test_bytes_of_many(arm: Machine, many_graphs: Path, cpu: str) -> None:
    assert_same_bytes(arm, cpu, many_graphs)


@pytest.fixture(scope="module")
def every_add(arm: Machine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program that adds with the compiled kernels of the wheel."""
    program = tmp_path_factory.mktemp("every_add") / "every_add"
    kernels = [path for path in arm.objects if path.parent.name in ("kernels", "simd")]
    command = ["aarch64-linux-gnu-g++", "-std=c++20", "-O2", f"-I{ROOT / 'csrc'}", "-o", program]
    subprocess.run([*command, HERE / "every_add.cpp", *kernels], check=True)
    return program


@every_cpu
def test_every_add(arm: Machine, every_add: Path, cpu: str, tmp_path: Path) -> None:
    """All pairs of bytes, with multipliers a few units in the last place from n / 8: many sums are
    near a tie, and show a fused multiply-add where whole networks may not. The 27 that GCC 12
    makes of the scalar kernels, where it may, change 8,573 bytes here."""
    rng = np.random.default_rng(0)
    a, b = (x.astype(np.uint8).reshape(1, 256, 256, 1) for x in np.divmod(np.arange(65536), 256))
    given, want = [], []
    for _ in range(100):
        eighths = (rng.integers(2, 16, 2) / 8).astype(np.float32).view(np.int32)
        bits = eighths + rng.integers(-3, 4, 2, dtype=np.int32)
        multipliers = tuple(map(float, bits.view(np.float32)))
        points = rng.integers(0, 256, 2)
        node = Add(name="add", inputs=(0, 1), multipliers=multipliers, zero_point=128)
        maps = [(x, p.astype(np.uint8)[None]) for x, p in zip((a, b), points, strict=True)]
        want.append(reference.compute(node, maps).tobytes())
        given += [*multipliers, *points]
    result = arm.run(cpu, every_add, tmp_path / "bytes", *given)
    assert result.returncode == 0, result.stderr
    assert tuple(result.stdout.split()) == CPUS[cpu]
    got = (tmp_path / "bytes").read_bytes()
    assert len(got) == 65536 * 100 * len(CPUS[cpu])
    expected = b"".join(want)
    for i, isa in enumerate(CPUS[cpu]):
        assert got[i * len(expected) :][: len(expected)] == expected, isa


def test_nothing_is_fused(arm: Machine) -> None:
    """Outside of the kernels that fuse where it changes nothing, and are named for their set."""
    objects = [path for path in arm.objects if not path.name.startswith("neon")]
    assert {"scalar.o", "plan.o", "executor.o"} <= {path.name for path in objects}
    command = ["aarch64-linux-gnu-objdump", "-d", "--no-show-raw-insn", *objects]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "\tfmul\t" in code
    assert not FUSED.findall(code)


@every_cpu
def test_an_instruction_set_that_is_not_there(arm: Machine, cpu: str) -> None:
    missing = next(name for name in ("neoni8mm", "avx2") if name not in CPUS[cpu])
    code = "from vitkd_fast import int8; print(*int8.isa())"
    result = arm.run(cpu, arm.interpreter, "-c", code, VITKD_FAST_ISA=missing)
    here = ", ".join(CPUS[cpu])
    error = f"VITKD_FAST_ISA: expected one of this CPU's, {here}, got {missing}"
    assert result.stderr.splitlines()[-1] == f"RuntimeError: {error}"


def test_predict_and_profile(arm: Machine, vitkd, tmp_path: Path) -> None:
    """An int8 file and photographs through the command line: what x86 prints."""
    graph = int8_builder.mobilenet_v2(8, 64)
    (tmp_path / "int8.safetensors").write_bytes(file.dump(graph))
    pixels = int8_builder.random_images(0, (3, 90, 120, 3))
    for name, image in zip(("a.jpg", "b.png", "c.jpg"), pixels, strict=True):
        Image.fromarray(image).save(tmp_path / name)
    given = (tmp_path / "int8.safetensors", tmp_path)
    cpu = list(CPUS)[-1]
    predicted = arm.python(cpu, "-m", "vitkd_fast.cli", "predict", *given)
    assert predicted == vitkd("predict", *given).out
    assert len(predicted.splitlines()) == 3
    profile = arm.python(cpu, "-m", "vitkd_fast.cli", "profile", given[0], "--threads", 2)
    assert CPUS[cpu][0] in profile and "images/s" in profile


@pytest.mark.slow
def test_wheel(arm: Machine, tmp_path: Path) -> None:
    """What `make wheel-arm` leaves in dist: tags, metadata, and the one extension."""
    pytest.importorskip("auditwheel")
    repair = [sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", tmp_path, arm.wheel]
    subprocess.run(repair, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    python = "cp" + arm.interpreter.name.removeprefix("python").replace(".", "")
    version = metadata.version("vitkd-fast")
    name = rf"vitkd_fast-{version}-{python}-{python}-(manylinux_2_\d+_aarch64)\.whl"
    found = re.fullmatch(name, wheel.name)
    assert found, wheel.name
    archive = zipfile.ZipFile(wheel)
    info = f"vitkd_fast-{version}.dist-info"
    tags = re.findall(r"^Tag: (.*)$", archive.read(f"{info}/WHEEL").decode(), re.MULTILINE)
    assert tags == [f"{python}-{python}-{found[1]}"]
    libraries = [n for n in archive.namelist() if n.endswith(".so")]
    assert libraries == [f"vitkd_fast/_int8.cpython-{python[2:]}-aarch64-linux-gnu.so"]
    (here,) = metadata.distribution("vitkd-fast").metadata.get_all("Summary")
    text = archive.read(f"{info}/METADATA").decode()
    assert f"\nSummary: {here}\n" in text
    assert f"\nRequires-Python: {metadata.metadata('vitkd-fast')['Requires-Python']}\n" in text
    archive.extractall(tmp_path / "site")
    code = "import vitkd_fast.int8 as x; print(x.__file__, *x.isa())"
    for cpu, isas in CPUS.items():
        out = arm.python(cpu, "-c", code, PYTHONPATH=f"{tmp_path / 'site'}:{arm.site}")
        assert out.split() == [str(tmp_path / "site/vitkd_fast/int8/__init__.py"), *isas]
