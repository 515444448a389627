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

from support import cuda_tools
from support.cuda_tools import CSRC, build_emulated
from support.process_tools import files_of, run_tests, sampled

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

SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_emulated(tmp_path_factory.mktemp("emulated"))


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_emulated(tmp_path_factory.mktemp("sanitized"), *SANITIZERS)


def run_emulated(
    library: Path, cwd: Path, stem: str, marked: str, *more: str, **environment: str
) -> None:  # fmt: skip
    run_tests(
        cwd, [cuda_tools.__file__], *files_of(stem), "-m", f"{marked} and not gpu", "-s",
        "-p", "no:faulthandler", *more, VITKD_EMULATED=str(library), **environment,
    )  # fmt: skip


def sanitizers() -> dict[str, str]:
    """The environment in which a library with sanitizers can be loaded."""
    libraries = [
        subprocess.check_output(["g++", f"-print-file-name=lib{name}.so"], text=True).strip()
        for name in ("asan", "ubsan")
    ]
    options = "detect_leaks=0:detect_stack_use_after_return=0"
    return {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": options}


STEMS = ["kd", "kd_topk", "dist", "attention_map", "int8_ops", "rkd", "row_loss"]


@pytest.mark.parametrize("stem", [*STEMS, "contract"])
def test_values(stem: str, emulated: Path, tmp_path: Path) -> None:
    run_emulated(emulated, tmp_path, stem, "emulated and not slow")


# KB that a block may ask for: compute capability 8.6, 8.9 and 12.0; 8.0; 9.0 and 10.0
@pytest.mark.parametrize(
    "shared", ["99", *(pytest.param(x, marks=pytest.mark.slow) for x in ("163", "227"))]
)
@pytest.mark.parametrize("stem", ["kd", "attention_map"])
def test_any_size_of_shared_memory(stem: str, shared: str, emulated: Path, tmp_path: Path) -> None:
    slow = "" if shared == "99" else "or slow"
    run_emulated(
        emulated, tmp_path, stem, f"emulated and (not slow {slow})", "-k", "long_rows",
        VITKD_EMULATED_SHARED=shared,
    )  # fmt: skip


def test_distributions(emulated: Path, tmp_path: Path) -> None:
    run_emulated(emulated, tmp_path, "distributions", "emulated", **sampled())


@pytest.mark.slow
@pytest.mark.parametrize("stem", [*STEMS, "contract", "distributions"])
def test_all_values(stem: str, emulated: Path, tmp_path: Path) -> None:
    run_emulated(emulated, tmp_path, stem, "(every_isa or emulated)")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stem", "marked"),
    [
        *((stem, "sanitized and not slow") for stem in STEMS),
        ("attention_map", "sanitized and slow"),
    ],
)
def test_under_sanitizers(stem: str, marked: str, sanitized: Path, tmp_path: Path) -> None:
    """No byte beside an array is touched, and every thread meets the others where it must."""
    run_emulated(sanitized, tmp_path, stem, marked, **sanitizers())


MISTAKES = {
    "no barrier":
        ("kd", "    __syncthreads();\n    const int count", "    const int count", "emulated"),
    "no barrier between uses":
        ("rkd", "  __syncthreads();  // of what a sum", "  // of what a sum", "emulated"),
    "no barrier between walks":
        ("attention_map", "    __syncthreads();  // an earlier", "    // an earlier",
         "emulated"),
    "no wait": ("attention_map", "        wait_for_all_but<0>();\n", "", "emulated"),
    "wait for too little":
        ("int8_pwconv", "but<kStages - 2>", "but<kStages - 1>", "emulated"),
    "a lane too few": ("rkd", "mask /= 2) x +=", "mask /= 2) if (threadIdx.x % 32 != 5) x +=",
                       "emulated"),
    "a row too many": ("attention_map", "first + r < x.tokens ?", "first + r <= x.tokens ?",
                       "sanitized"),
    "a column too many": ("int8_dwconv", "<= c.width", "<= c.width + 1", "sanitized"),
    "a limit that another thread may lower":
        ("int8_pwconv", "  allowed_shared_memory(kernel);\n  int at_once",
         "  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);\n"
         "  int at_once",
         "emulated"),
    "a nearly empty round":
        ("int8_pwconv", "chip / groups, 1", "ceil_div(chip, groups), 1", "emulated"),
    "scores beyond what sums have room for":
        ("attention_map", "!__syncthreads_or(!fits)", "true", "emulated"),
    "a tail too short": ("attention_map", "(left + 7) / 8", "left / 8", "emulated"),
    "no room for static shared memory":
        ("kd", "allowed_shared_memory(kernel, kStatic)", "allowed_shared_memory(kernel)",
         "emulated"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(mistake: str, tmp_path: Path) -> None:
    stem, right, wrong, marked = MISTAKES[mistake]

    changed = []

    def change(text: str) -> str:
        changed.append(text.count(right))
        return text.replace(right, wrong)

    library = build_emulated(tmp_path, *SANITIZERS, only=stem, change=change)
    assert sum(changed) == 1
    tests = stem.replace("dwconv", "ops").replace("pwconv", "ops")
    with pytest.raises(AssertionError, match=r"FAILED|AddressSanitizer|CUDA emulator"):
        run_emulated(library, tmp_path, tests, f"{marked} and not slow", "-x", **sanitizers())
