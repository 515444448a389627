"""The engine's CUDA path without a GPU: the very launches, through an emulated libcuda.so.1."""

import importlib.util
import platform
import re
import subprocess
from pathlib import Path

import pytest

from support.driver_tools import build_driver
from support.int8_builder import mobilenet_v2
from support.process_tools import TESTS, run_tests
from vitkd_fast import _int8
from vitkd_fast.int8 import file

if platform.machine() != "x86_64":
    pytest.skip("the emulator switches stacks in x86-64 assembly", allow_module_level=True)
if not _int8.cuda_kernels():
    pytest.skip("the extension was built without CUDA", allow_module_level=True)


def test_machine_code() -> None:
    """On any architecture that the extension holds; nor are a product and a sum fused anywhere."""
    triton = importlib.util.find_spec("triton")
    if triton is None or not triton.origin:
        pytest.skip("there is no Triton, which has cuobjdump")
    cuobjdump = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
    command = [cuobjdump, "-res-usage", _int8.__file__]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels = re.findall(r"Function (vitkd_int8_\w+):\s+REG:\d+ STACK:(\d+) .*? LOCAL:(\d+)", said)
    assert len({name for name, *_ in kernels}) == 24
    assert [name for name, *of_memory in kernels if of_memory != ["0", "0"]] == []
    sass = subprocess.run([cuobjdump, "-sass", _int8.__file__], capture_output=True, text=True)
    assert "FMUL" in sass.stdout
    assert "FFMA" not in sass.stdout


def test_launches_are_planned_without_a_driver() -> None:
    """Blocks enough for the outputs, and no more shared memory than every GPU gives."""
    graph = mobilenet_v2(4, 96)
    for batch, chip in ((1, 5), (64, 132)):
        launches = _int8.cuda_launches(
            file.opened(graph), image_size=96, batch=batch, multiprocessors=chip
        )
        assert len(launches) == len(graph.nodes)  # there is no squeeze-excite
        for _, kernel, (height, width, channels), *_, blocks, threads, shared in launches:
            assert shared <= 48 << 10
            if match := re.search(r"(?:gemm|conv)_(\d)_(\d+)", kernel):
                pixels, outputs = 64 * int(match[1]), int(match[2])
                tiles = -(-batch * height * width // pixels)
                assert (blocks, threads) == (tiles * -(-channels // outputs), 128)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_driver(tmp_path_factory.mktemp("driver"))


def run_emulated(driver: Path, cwd: Path, marked: str, **environment: str) -> None:
    run_tests(
        cwd, ["-m", "pytest"], str(TESTS / "int8/test_cuda_session.py"), "-m",
        f"not gpu and {marked}", "-p", "no:faulthandler", VITKD_EMULATED_DRIVER="1",
        LD_LIBRARY_PATH=str(driver), **environment,
    )  # fmt: skip


def test_values(driver: Path, tmp_path: Path) -> None:
    run_emulated(driver, tmp_path, "not slow")


@pytest.mark.slow
@pytest.mark.parametrize("multiprocessors", ["1", "132"])
def test_values_on_smaller_and_larger_chips(
    multiprocessors: str, driver: Path, tmp_path: Path
) -> None:
    """Which tiles are chosen, and how many blocks there are, follows from the chip."""
    run_emulated(driver, tmp_path, "not slow", VITKD_EMULATED_SMS=multiprocessors)


@pytest.mark.slow
def test_all_values(driver: Path, tmp_path: Path) -> None:
    run_emulated(driver, tmp_path, "slow")


MISTAKES = {
    "no barrier": ("    __syncthreads();  // the slice is there", "    // the slice is there"),
    "wait for too little": ("wait_for_all_but<kStages - 2>", "wait_for_all_but<kStages - 1>"),
    "a pixel too many": ("if (pixel >= c.pixels) break;", "if (pixel > c.pixels) break;"),
    "no padding": ("make_uint4(c.padding, c.padding,", "make_uint4(0, c.padding,"),
    "sums of too few lanes": ("mask < 32; mask *= 2", "mask < 16; mask *= 2"),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(mistake: str, tmp_path: Path) -> None:
    right, wrong = MISTAKES[mistake]
    changed = []

    def change(text: str) -> str:
        changed.append(text.count(right))
        return text.replace(right, wrong)

    driver = build_driver(tmp_path, change)
    assert sum(changed) == 1
    with pytest.raises(AssertionError, match=r"FAILED|CUDA emulator"):
        run_emulated(driver, tmp_path, "not slow", PYTEST_ADDOPTS="-x -k 'random or mobilenet'")
