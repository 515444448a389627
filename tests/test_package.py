"""The package around the operations: lazy imports, instruction sets, show, command line, build."""

import os
import re
import runpy
import subprocess
import sys
from importlib import metadata, resources
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ISAS = ["amx", "avx512vnni", "avx512", "avxvnni", "avx2", "sse41", "scalar"]  # best first


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command outside the checkout, as a user's program would be."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("VITKD_FAST_")}
    return subprocess.run(
        command, cwd=cwd, env=kept | environment, capture_output=True, text=True, check=False
    )


def python(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-c", code, cwd=cwd, **environment)


def vitkd(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(str(Path(sys.executable).parent / "vitkd"), *arguments, cwd=cwd, **environment)


# imports


@pytest.mark.parametrize("module", ["vitkd_fast", "vitkd_fast.int8", "vitkd_fast.cli"])
def test_import_loads_no_torch(module: str, tmp_path: Path) -> None:
    result = python(f"import sys, {module}; print('torch' in sys.modules)", tmp_path)
    assert (result.stdout, result.stderr) == ("False\n", "")


def test_using_int8_loads_no_torch(tmp_path: Path) -> None:
    code = "import sys, vitkd_fast; vitkd_fast.int8.isa(); print('torch' in sys.modules)"
    assert python(code, tmp_path).stdout == "False\n"


def test_functional_registers_the_operations_and_loads_no_compiler(tmp_path: Path) -> None:
    code = (
        "import sys, vitkd_fast, torch; before = hasattr(torch.ops.vitkd_fast, 'kd_fwd');"
        "vitkd_fast.functional, vitkd_fast.nn;"
        "print(before, hasattr(torch.ops.vitkd_fast, 'kd_fwd'), 'torch._dynamo' in sys.modules)"
    )
    assert python(code, tmp_path).stdout == "False True False\n"


def test_public_names() -> None:
    import vitkd_fast

    assert {"functional", "int8", "nn", "show"} <= set(dir(vitkd_fast))
    assert vitkd_fast.__version__ == metadata.version("vitkd-fast")
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = vitkd_fast.nonsense


def test_version_is_the_projects() -> None:
    assert (
        f'\nversion = "{metadata.version("vitkd-fast")}"\n' in (ROOT / "pyproject.toml").read_text()
    )


# instruction sets


def test_isa_is_sorted_and_ends_with_scalar(tmp_path: Path) -> None:
    found = python("import vitkd_fast.int8 as i; print(*i.isa())", tmp_path).stdout.split()
    absent = {"avxvnni"} - set(found)  # which CPUs with AVX-512 VNNI may lack
    assert found == [isa for isa in ISAS[ISAS.index(found[0]) :] if isa not in absent]


@pytest.mark.parametrize("isa", ISAS)
def test_isa_override(isa: str, tmp_path: Path) -> None:
    code = "import vitkd_fast.int8 as i; print(*i.isa())"
    has = python(code, tmp_path).stdout.split()
    result = python(code, tmp_path, VITKD_FAST_ISA=isa)
    if isa in has:
        assert result.stdout.split() == has[has.index(isa) :]
    else:
        assert result.returncode == 1
        words = f"expected one of this CPU's, {', '.join(has)}, got {isa}"
        assert result.stderr.endswith(f"RuntimeError: VITKD_FAST_ISA: {words}\n")


def test_isa_override_is_checked(tmp_path: Path) -> None:
    code = "import vitkd_fast.int8 as i; print(*i.isa())"
    has = python(code, tmp_path).stdout.split()
    result = python(code, tmp_path, VITKD_FAST_ISA="avx1024")
    assert result.returncode == 1
    assert result.stderr.endswith(
        f"RuntimeError: VITKD_FAST_ISA: expected one of this CPU's, {', '.join(has)}, got avx1024\n"
    )


def test_isa_override_empty_is_unset(tmp_path: Path) -> None:
    code = "import vitkd_fast.int8 as i; print(*i.isa())"
    assert python(code, tmp_path, VITKD_FAST_ISA="").stdout == python(code, tmp_path).stdout


# show and the command line


def test_show(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    import vitkd_fast
    from vitkd_fast import _ops

    vitkd_fast.show()
    lines = capsys.readouterr().out.splitlines()
    table = lines.index("")
    facts = dict(line.split(maxsplit=1) for line in lines[:table])
    assert facts["vitkd_fast"] == vitkd_fast.__version__
    assert facts["torch"] == str(torch.__version__)
    assert facts["CUDA"].startswith(f"{torch.version.cuda or 'none'} in torch, ")
    assert facts["CPU"].split("; ")[0] == vitkd_fast.int8.isa()[0]
    assert lines[table + 1].split() == ["operation", "CPU", "CUDA"]
    rows = [line.split(maxsplit=1) for line in lines[table + 2 :]]
    assert [(name, " ".join(served.split())) for name, served in rows] == [
        (name, f"{on['CPU']} {on['CUDA']}") for name, on in _ops.backends().items()
    ]


def test_vitkd_show_prints_the_same(tmp_path: Path) -> None:
    called = python("import vitkd_fast; vitkd_fast.show()", tmp_path)
    result = vitkd("show", cwd=tmp_path)
    assert result.returncode == 0
    assert result.stdout == called.stdout != ""


def test_vitkd_show_names_the_overrides(tmp_path: Path) -> None:
    result = vitkd("show", cwd=tmp_path, VITKD_FAST_ISA="scalar")
    assert "scalar; best first: scalar\n" in result.stdout
    assert "VITKD_FAST_ISA  scalar\n" in result.stdout


@pytest.mark.parametrize("arguments", [(), ("nonsense",), ("show", "--nonsense")])
def test_vitkd_wrong_usage_is_2(arguments: tuple[str, ...], tmp_path: Path) -> None:
    assert vitkd(*arguments, cwd=tmp_path).returncode == 2


def test_vitkd_failure_is_1_and_one_line(tmp_path: Path) -> None:
    result = vitkd("show", cwd=tmp_path, VITKD_FAST_ISA="nonsense")
    assert result.returncode == 1
    assert result.stderr.startswith("vitkd: RuntimeError: VITKD_FAST_ISA: expected one of ")
    assert len(result.stderr.splitlines()) == 1


def test_vitkd_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = vitkd("--debug", "show", cwd=tmp_path, VITKD_FAST_ISA="nonsense")
    assert result.returncode == 1
    assert "Traceback" in result.stderr


# the build


@pytest.fixture(scope="module")
def setup_py() -> dict:
    pytest.importorskip("setuptools")
    return runpy.run_path(str(ROOT / "setup.py"))


def fake_toolkit(home: Path, version: int) -> Path:
    for name in ("include/cuda_runtime.h", "include/cuda_runtime_api.h", "bin/nvcc"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(f"#define CUDART_VERSION  {version}\n")
    (home / "bin/nvcc").chmod(0o755)
    return home


def test_setup_py_is_short() -> None:
    assert len((ROOT / "setup.py").read_text().splitlines()) <= 120


def test_cuda_is_taken_from_a_toolkit_of_torchs_major_version(
    setup_py: dict, tmp_path: Path
) -> None:
    homes = [
        tmp_path / "absent",
        fake_toolkit(tmp_path / "older", 12040),
        fake_toolkit(tmp_path / "same", 13010),
    ]
    choose = setup_py["choose_cuda"]
    assert choose("auto", "13.2", homes) == (homes[2], "13.1", "")
    assert choose("1", "12.8", homes) == (homes[1], "12.4", "")


@pytest.mark.parametrize(
    ("torch_cuda", "why"),
    [
        (None, "no torch that is built with CUDA"),
        ("13.2", "no CUDA 13 toolkit (bin/nvcc, include/); found: 12.4 in {home}"),
        ("11.8", "no CUDA 11 toolkit (bin/nvcc, include/); found: 12.4 in {home}"),
    ],
)
def test_cuda_is_left_out_with_a_reason_or_fails(
    setup_py: dict, tmp_path: Path, torch_cuda: str | None, why: str
) -> None:
    home = fake_toolkit(tmp_path / "toolkit", 12040)
    why = why.format(home=home)
    assert setup_py["choose_cuda"]("auto", torch_cuda, [home]) == (None, "", why)
    with pytest.raises(SystemExit) as error:
        setup_py["choose_cuda"]("1", torch_cuda, [home])
    assert str(error.value) == f"vitkd_fast: VITKD_FAST_CUDA=1 cannot be met: {why}"


def test_cuda_needs_headers_and_compiler(setup_py: dict, tmp_path: Path) -> None:
    home = fake_toolkit(tmp_path, 13000)
    (home / "include/cuda_runtime.h").unlink()
    reason = setup_py["choose_cuda"]("auto", "13.0", [home])[2]
    assert reason == "no CUDA 13 toolkit (bin/nvcc, include/); found: none"


def test_cuda_can_be_switched_off(setup_py: dict, tmp_path: Path) -> None:
    home = fake_toolkit(tmp_path, 13000)
    assert setup_py["choose_cuda"]("0", "13.0", [home]) == (None, "", "VITKD_FAST_CUDA=0")


def test_cuda_choice_is_checked(setup_py: dict) -> None:
    with pytest.raises(SystemExit, match="VITKD_FAST_CUDA=yes: accepted are auto, 0 and 1"):
        setup_py["choose_cuda"]("yes", "13.0", [])


@pytest.mark.parametrize(
    ("version", "editable", "gpus", "expected"),
    [
        ("12.6", False, [(9, 0)], "8.0;8.6;8.9;9.0+PTX"),
        ("12.8", False, [], "8.0;8.6;8.9;9.0+PTX;10.0;12.0"),
        ("13.0", False, [], "8.0;8.6;8.9;9.0+PTX;10.0;12.0"),
        ("13.0", True, [], "9.0+PTX"),
        ("13.0", True, [(8, 9), (8, 0), (8, 9)], "8.0;8.9"),
        ("12.8", True, [(7, 5)], "9.0+PTX"),  # older than what the kernels are written for
    ],
)
def test_architectures(
    setup_py: dict, version: str, editable: bool, gpus: list[tuple[int, int]], expected: str
) -> None:
    assert setup_py["architectures"](version, editable, gpus) == expected


def test_warnings_of_nvcc_are_errors_in_ci_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, strict in (("true", True), ("", False)):
        monkeypatch.setenv("CI", value)
        flags = runpy.run_path(str(ROOT / "setup.py"))["NVCC"]
        assert ("-Werror=all-warnings" in flags) == strict


def test_cuda_home_behind_a_script_on_path(
    setup_py: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = fake_toolkit(tmp_path / "cuda-13.0", 13000)
    script = tmp_path / "bin" / "nvcc"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent))
    monkeypatch.setenv("CUDA_HOME", "/first")
    monkeypatch.delenv("CUDA_PATH", raising=False)
    assert list(setup_py["cuda_homes"]())[:2] == [Path("/first"), home]

    # and where PATH holds a link to the real one
    script.unlink()
    script.symlink_to(home / "bin" / "nvcc")
    assert list(setup_py["cuda_homes"]())[1] == home


def test_metadata_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import runpy, sys; sys.modules['torch'] = None; sys.argv = ['setup.py', '--version'];"
        f"import os; os.chdir({str(ROOT)!r}); runpy.run_path('setup.py', run_name='__main__')"
    )
    result = python(code, tmp_path)
    assert result.stdout.split()[-1] == metadata.version("vitkd-fast"), result.stderr


def test_makefile_installs_what_the_build_requires() -> None:
    line = next(x for x in (ROOT / "pyproject.toml").read_text().splitlines() if "requires = " in x)
    required = line.removeprefix("requires = [").removesuffix("]").replace('"', "").split(", ")
    installed = next(x for x in (ROOT / "Makefile").read_text().splitlines() if "pybind11" in x)
    words = [word.strip('"') for word in installed.split("--quiet ")[1].split()]
    assert words == [*required, "ninja", "torch>=2.11"]


def test_package_data_is_installed() -> None:
    assert resources.files("vitkd_fast").joinpath("py.typed").is_file()
    assert resources.files("vitkd_fast.kernels").joinpath("__init__.py").is_file()


def test_every_package_is_in_the_wheel() -> None:
    """An editable installation would not miss one."""
    listed = set(
        re.findall(r'^    "(vitkd_fast[\w.]*)",$', (ROOT / "pyproject.toml").read_text(), re.M)
    )
    folders = {file.parent.relative_to(ROOT) for file in ROOT.glob("vitkd_fast/**/__init__.py")}
    found = {".".join(folder.parts) for folder in folders}
    assert listed == found | {"vitkd_fast.kernels"}
