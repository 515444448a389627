"""The CUDA kernels without a GPU: what the compiler made of them, and what they do when emulated.

The emulator (cuda_emulator/emulator.h) runs the tests that compare with the float64 references, and
under sanitizers those that a GPU has for compute-sanitizer.
"""

import importlib.util
import platform
import re
import subprocess
from pathlib import Path

import pytest

from . import cuda_tools
from .cuda_tools import CSRC, build_emulated
from .triton_tools import run_tests

FILES = sorted((CSRC / "cuda").glob("*.cu"))


def test_no_register_spills() -> None:
    """On any architecture that the extension holds."""
    spec = importlib.util.find_spec("vitkd_fast._C")
    triton = importlib.util.find_spec("triton")
    if spec is None or triton is None or not (spec.origin and triton.origin):
        pytest.skip("the extension is not built, or there is no Triton, which has cuobjdump")
    cuobjdump = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    result = subprocess.run(
        [cuobjdump, "-res-usage", spec.origin], capture_output=True, text=True, check=False
    )
    cubins = [x for x in result.stdout.split("\nFatbin elf code:") if "Resource usage" in x]
    if not cubins:
        pytest.skip("the extension was built without CUDA")
    assert {re.search(r"(\w+\.cu)\n", x)[1] for x in cubins} == {f.name for f in FILES}
    for cubin in cubins:
        kernels = re.findall(r"Function (\S+):\s+REG:\d+ STACK:(\d+) .*? LOCAL:(\d+)", cubin)
        assert kernels
        assert [name for name, *of_memory in kernels if of_memory != ["0", "0"]] == []


# on the emulator

if platform.machine() != "x86_64":
    pytest.skip("the emulator switches stacks in x86-64 assembly", allow_module_level=True)

SANITIZERS = ["address", "undefined"]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_emulated(tmp_path_factory.mktemp("emulated"))


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    flags = ["-fsanitize=" + ",".join(SANITIZERS), "-fno-sanitize=vptr"]
    return build_emulated(tmp_path_factory.mktemp("sanitized"), *flags, "-fno-sanitize-recover=all")


def run_emulated(
    library: Path, cwd: Path, stem: str, chosen: str, marked: str = "not gpu and not slow",
    **environment: str,
) -> None:  # fmt: skip
    run_tests(
        cwd, [cuda_tools.__file__], str(Path(__file__).with_name(f"test_{stem}.py")), "-k", chosen,
        "-m", marked, VITKD_EMULATED=str(library), **environment,
    )  # fmt: skip


# forms of every kind of test that are quick there
QUICK = {
    "kd": "match and (plain or everything or 1001 or 70000 or layouts) or extreme and few "
          "or bitwise and labels or in_any_form",
    "attention_map": "(shapes_match and 49 and not long) or (dtypes_match and js) or "
                     "(layouts_match and bfloat16 and 20) or (bitwise and 150) or "
                     "(extreme and few and (mse or reverse_kl))",
    "int8_ops": "shapes_match and (24 or 40) or forms_match or ties_match or extreme_sums",
    "relations": "rkd and (match or extreme)",
}  # fmt: skip
NOT_THERE = "not on_the_cpu and not instruction_set and not backend and not 10000"


@pytest.mark.parametrize("stem", QUICK)
def test_values(stem: str, emulated: Path, tmp_path: Path) -> None:
    chosen = f"({QUICK[stem]}) and {NOT_THERE}"
    run_emulated(emulated, tmp_path, stem, chosen)


@pytest.mark.slow
@pytest.mark.parametrize("stem", QUICK)
def test_all_values(stem: str, emulated: Path, tmp_path: Path) -> None:
    chosen = f"(match or extreme or bitwise or factor or compile) and {NOT_THERE}"
    run_emulated(emulated, tmp_path, stem, chosen, "not gpu")


@pytest.mark.parametrize(
    ("stem", "chosen"),
    [
        ("kd", "Sanitize"), ("int8_ops", "Sanitize"), ("relations", "Sanitize"),
        ("attention_map", "Sanitize and not (values and (js or mse))"),
        pytest.param("attention_map", "Sanitize", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_under_sanitizers(stem: str, chosen: str, sanitized: Path, tmp_path: Path) -> None:
    """No byte beside an array is touched, and every thread meets the others where it must."""
    libraries = [
        subprocess.check_output(["g++", f"-print-file-name=lib{name}.so"], text=True).strip()
        for name in ("asan", "ubsan")
    ]
    run_emulated(
        sanitized, tmp_path, stem, chosen, LD_PRELOAD=" ".join(libraries),
        ASAN_OPTIONS="detect_leaks=0:detect_stack_use_after_return=0",
    )  # fmt: skip
