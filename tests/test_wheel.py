"""The package as it is installed: where there is no torch, and as a wheel."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from packaging.requirements import Requirement
from PIL import Image

from support import int8_builder
from vitkd_fast.int8 import file

ROOT = Path(__file__).parents[1]
BASE = ["numpy", "pillow", "typer"]  # all that int8 inference may need
CLASSES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")
EXTRA = re.compile(r'needs torch, which is not installed: pip install "vitkd-fast\[(\w+)\]"')


def run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Outside the checkout, and without what leads there."""
    dropped = ("PYTHON", "VITKD_FAST_", "TORCH_", "CI")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd, env=kept | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def closure(names: list[str]) -> set[str]:
    """The packages, and all that they need."""
    todo, found = list(names), set()
    while todo:
        if (name := todo.pop()) not in found:
            found.add(name)
            needed = map(Requirement, metadata.requires(name) or [])
            todo += [x.name for x in needed if not x.marker or x.marker.evaluate({"extra": ""})]
    return found


def environment(folder: Path, packages: list[str]) -> Path:
    """An environment that holds packages of this one, and nothing else; returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for name in closure(packages):
        for path in metadata.files(name) or []:
            top, place = path.parts[0], site / path.parts[0]
            if top not in ("..", "__pycache__") and not place.exists():
                place.symlink_to(Path(str(path.locate())).parents[len(path.parts) - 1] / top)
    return folder / "bin" / "python"


def pip(python: Path, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """This environment's pip, at work in another and without network."""
    command = (sys.executable, "-m", "pip", "--python", python, *arguments)
    return run(*command, cwd=python.parent, PIP_NO_INDEX="1", **variables)


def build(into: Path, python: Path, **variables: str) -> tuple[Path, str]:
    """A wheel from a copy of the checkout, and what the build said."""
    checkout = into / "checkout"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "*.so")
    shutil.copytree(ROOT, checkout, ignore=ignored)
    options = ("--no-build-isolation", "--no-deps", "--verbose", "--wheel-dir", into)
    result = pip(python, "wheel", *options, checkout, **variables)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = into.glob("*.whl")
    return wheel, result.stdout + result.stderr


class Installed(NamedTuple):
    python: Path
    vitkd: tuple[object, ...]  # the command

    def run(self, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
        return run(*self.vitkd, *arguments, cwd=cwd)


@pytest.fixture(scope="module", params=["checkout", pytest.param("wheel", marks=pytest.mark.slow)])
def installed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Installed:
    """An environment without torch: with the checkout, or a wheel that was built in such a one."""
    folder = tmp_path_factory.mktemp(request.param)
    python = environment(folder / "venv", BASE)
    if request.param == "checkout":
        (site,) = (folder / "venv").glob("lib/python*/site-packages")
        (site / "checkout.pth").write_text(f"{ROOT}\n")
        known = metadata.distribution("vitkd-fast").locate_file("")
        version = metadata.version("vitkd-fast")
        name = f"vitkd_fast-{version}.dist-info"
        (site / name).symlink_to(Path(str(known)) / name)
        return Installed(python, (python, "-m", "vitkd_fast.cli"))
    wheel, said = build(folder, environment(folder / "build", ["setuptools", "pybind11"]))
    assert "vitkd_fast: _int8 alone, without the losses: no torch to build them with" in said
    names = zipfile.ZipFile(wheel).namelist()
    assert [x.split(".")[0] for x in names if x.endswith(".so")] == ["vitkd_fast/_int8"]
    # of what it needs nothing is fetched: all must be there already
    result = pip(python, "install", wheel)
    assert result.returncode == 0, result.stdout + result.stderr
    return Installed(python, (folder / "venv/bin/vitkd",))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with student.int8.safetensors, cat.jpg, and val/ with a folder for each class."""
    folder = tmp_path_factory.mktemp("work")
    builder = int8_builder.Builder()
    options = {"stride": (2, 2), "padding": (1, 1, 1, 1), "zero_point": 0}
    builder.conv(16, 3, inputs=(-1,), **options)
    builder.conv(None, 3, **options)
    builder.conv(32, zero_point=0)
    graph = replace(builder.graph(32, classes=7), classes=CLASSES)
    (folder / "student.int8.safetensors").write_bytes(file.dump(graph))
    generator = np.random.default_rng(0)
    for i in range(40):
        name = folder / "val" / CLASSES[i % 6] / f"{i}.png"  # and no gnu
        name.parent.mkdir(parents=True, exist_ok=True)
        colours = generator.integers(256, size=(4, 4, 3), dtype=np.uint8)
        Image.fromarray(colours).resize((40, 30)).save(name)
    Image.open(folder / "val/cat/2.png").save(folder / "cat.jpg")
    return folder


# without torch


def test_there_is_no_torch(installed: Installed, tmp_path: Path) -> None:
    result = run(installed.python, "-c", "import torch", cwd=tmp_path)
    assert "No module named 'torch'" in result.stderr


def test_readmes_inference_runs(installed: Installed, work: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"```python\n([^`]*# where it runs, without torch\n[^`]*)```", readme)
    result = run(installed.python, "-c", code, cwd=work)
    assert result.returncode == 0, result.stderr
    name, header, *layers = result.stdout.splitlines()
    assert name in CLASSES
    assert header.split() == ["layer", "kernel", "output", "us", "GMAC/s", "kB"]
    assert len(layers) >= 5


def test_show_names_what_is_missing(installed: Installed, tmp_path: Path) -> None:
    result = installed.run("show", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert f"vitkd_fast  {metadata.version('vitkd-fast')}" in lines
    assert "torch       not installed" in lines
    assert EXTRA.search(lines[-1])[1] == "torch"


def test_predict_and_profile(installed: Installed, work: Path, vitkd, monkeypatch) -> None:
    monkeypatch.chdir(work)
    given = ("student.int8.safetensors", "cat.jpg", "val/ant")
    result = installed.run("predict", *given, cwd=work)
    assert (result.stdout, result.stderr) == (vitkd("predict", *given).out, "")
    assert len(result.stdout.splitlines()) == 8
    result = installed.run("profile", given[0], "--threads", 2, cwd=work)
    assert result.returncode == 0 and "images/s" in result.stdout, result.stderr


def test_eval_agrees_with_the_one_on_torch(
    installed: Installed, work: Path, vitkd, monkeypatch
) -> None:
    monkeypatch.chdir(work)
    given = ("eval", "student.int8.safetensors", "val")
    plain = installed.run(*given, "--batch-size", 7, cwd=work)
    assert plain.returncode == 0, plain.stderr
    assert plain.stderr == 'pip install "vitkd-fast[distill]" brings more metrics than these\n'
    count, *lines = plain.stdout.splitlines()
    whole = vitkd(*given).out.splitlines()
    assert count == whole[0] == "40 images, 0 skipped"
    assert lines == [x for x in whole[1:] if x.split()[0] in ("top1", "top5", "nll")]
    assert len(lines) == 3
    found = json.loads(installed.run(*given, "--json", cwd=work).stdout)
    assert found["classes"] == json.loads(vitkd(*given, "--json").out)["classes"]


def test_eval_of_bad_images(installed: Installed, work: Path, tmp_path: Path) -> None:
    shutil.copytree(work / "val", tmp_path / "val")
    (tmp_path / "val/ant/0.png").write_bytes(b"no image")
    given = ("eval", work / "student.int8.safetensors", "val")
    result = installed.run(*given, cwd=tmp_path)
    assert result.returncode == 1
    assert "val/ant/0.png cannot be read" in result.stderr
    result = installed.run(*given, "--skip-bad", cwd=tmp_path)
    assert result.stdout.startswith("39 images, 1 skipped\n"), result.stderr


@pytest.mark.parametrize(
    ("code", "extra"),
    [
        ("import vitkd_fast.functional", "torch"),
        ("import vitkd_fast; vitkd_fast.nn", "torch"),
        ("from vitkd_fast.int8 import quantize", "torch"),
        ("import vitkd_fast.models", "distill"),
    ],
)
def test_the_extra_is_named(installed: Installed, tmp_path: Path, code: str, extra: str) -> None:
    result = run(installed.python, "-c", code, cwd=tmp_path)
    last = result.stderr.splitlines()[-1]
    assert last.startswith("ImportError: vitkd_fast.")
    assert EXTRA.search(last)[1] == extra


def test_commands_name_the_extra(installed: Installed, tmp_path: Path) -> None:
    for command in ("predict mobilenetv2_100 x.png", "distill digits", "recipes", "demo"):
        result = installed.run(*command.split(), cwd=tmp_path)
        assert result.returncode == 1
        assert len(result.stderr.splitlines()) == 1
        assert 'pip install "vitkd-fast[distill]" brings' in result.stderr, result.stderr


# with torch


@pytest.mark.slow
def test_wheel_with_torch(tmp_path: Path) -> None:
    for requirement in ("ninja", "pybind11", "setuptools"):
        pytest.importorskip(requirement)
    wheel, said = build(tmp_path, Path(sys.executable), VITKD_FAST_CUDA="0")
    assert "vitkd_fast: _C for the CPU only (VITKD_FAST_CUDA=0), _int8" in said
    names = zipfile.ZipFile(wheel).namelist()
    folders = {name.split("/")[0] for name in names}
    assert folders == {"vitkd_fast", f"vitkd_fast-{metadata.version('vitkd-fast')}.dist-info"}
    kernels = {f"vitkd_fast/kernels/{file.name}" for file in (ROOT / "kernels").glob("*.py")}
    data = {
        "py.typed",
        "_int8.pyi",
        "recipes/digits.yaml",
        "distill/report.html.jinja",
        "page.css",
        "export/card.html.jinja",
    }
    assert kernels | {f"vitkd_fast/{name}" for name in data} <= set(names)
    assert "vitkd_fast/_C.abi3.so" in names

    # from outside the checkout, and before the editable install that these tests run from
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "import vitkd_fast; print(vitkd_fast.__file__); vitkd_fast.show()"
    result = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert result.stdout.startswith(str(tmp_path / "site")), result.stderr
    assert "none in _C" in result.stdout


def test_torch_without_the_compiled_operations(tmp_path: Path) -> None:
    package = tmp_path / "vitkd_fast"
    package.mkdir()
    for path in (ROOT / "vitkd_fast").iterdir():
        if not path.name.startswith("_C."):
            (package / path.name).symlink_to(path)

    def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
        # an editable install's finder would bring the checkout's _C
        code = (
            "import sys; sys.meta_path = [x for x in sys.meta_path if 'editable' not in repr(x)];"
            f"import vitkd_fast; assert vitkd_fast.__file__.startswith({str(tmp_path)!r}); {code}"
        )
        paths = os.pathsep.join([str(tmp_path), *sys.path[1:]])
        return run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=paths, **variables)

    result = python("import vitkd_fast.functional")
    last = result.stderr.splitlines()[-1]
    assert last.startswith("ImportError: torch ") and "built without torch" in last
    assert "pip install --no-build-isolation" in last
    shown = python("import vitkd_fast; vitkd_fast.show()")
    assert shown.returncode == 0 and last.removeprefix("ImportError: ") in shown.stdout
    forced = python("import vitkd_fast.functional", VITKD_FAST_BACKEND="reference")
    assert forced.returncode == 0, forced.stderr
