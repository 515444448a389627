"""exp, log and their kin of csrc/simd/vec.h, against long double over a sample of all floats."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parents[1] / "support"
CSRC = Path(__file__).parents[2] / "csrc"


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What tests/support/cpp/vec_ulp.cpp prints."""
    if platform.machine() != "x86_64":
        pytest.skip(f"csrc/simd/vec.h is for x86-64, and this is {platform.machine()}")
    if not (compiler := shutil.which("g++")):
        pytest.skip("no g++ to compile tests/support/cpp/vec_ulp.cpp with")
    program = tmp_path_factory.mktemp("vec") / "vec_ulp"
    source = SUPPORT / "cpp" / "vec_ulp.cpp"
    options = ["-O2", "-std=c++20", "-ffp-contract=off", f"-I{CSRC}"]
    subprocess.run([compiler, *options, str(source), "-o", str(program)], check=True)
    return subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines()


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_ulp(isa: str, lines: list[str]) -> None:
    """At most 2 ulp: exp up to 88, log of normal numbers, near 1 too; 2.5: expm1 below 0."""
    found = [line.split()[1:] for line in lines if line.startswith(f"{isa} ")]
    if not found:
        pytest.skip(f"this CPU lacks {isa}")
    # 0 would mean that nothing was compared
    names = ["exp", "log", "log near 1", "log_normal", "expm1_negative"]
    errors = dict(zip(names, map(float, found[0]), strict=True))
    assert 0.5 <= errors.pop("expm1_negative") <= 2.5
    assert all(0.5 <= error <= 2 for error in errors.values()), errors


def test_exact_values(lines: list[str]) -> None:
    """exp of -inf and below FLT_MIN is 0, of 0 1; log(1) and expm1(0) are 0; NaN stays NaN."""
    assert [line for line in lines if ": " in line] == []
