"""The engine's CUDA path without a GPU: the very launches, through an emulated libcuda.so.1."""

import platform
from pathlib import Path

import pytest

from support.driver_tools import build_driver
from support.process_tools import TESTS, run_tests
from vitkd_fast import _int8

if platform.machine() != "x86_64":
    pytest.skip("the emulator switches stacks in x86-64 assembly", allow_module_level=True)
if not _int8.cuda_kernels():
    pytest.skip("the extension was built without CUDA", allow_module_level=True)


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
