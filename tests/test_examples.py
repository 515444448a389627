"""Every example runs as its first lines say, on real data, and comes to what it is to show."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from PIL import Image
from sklearn.datasets import load_digits

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: object) -> str:
    """What an example prints."""
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> tuple[Path, float]:
    """A file that quantize_and_serve.py has written, and its top-1 on the digits left over."""
    file = tmp_path_factory.mktemp("student") / "student.int8.safetensors"
    printed = run("quantize_and_serve.py", "quantize", file, "--epochs", 4)
    return file, float(re.search(r"top-1 ([\d.]+)%", printed)[1])


def test_there_is_a_test_of_each_and_each_is_short() -> None:
    for example in EXAMPLES.glob("*.py"):
        assert example.name in Path(__file__).read_text()
        text = example.read_text()
        assert len(text.splitlines()) < 80, example
        assert f"    python examples/{example.name}" in text.split('"""')[1]


@pytest.mark.parametrize(
    "command",
    [
        ["distil_own_loop.py"],
        pytest.param(["distil_with_timm.py"], marks=pytest.mark.slow),
        ["distil_with_timm.py", "--attention"],
    ],
    ids=" ".join,
)
def test_distillation_learns(command: list[str]) -> None:
    printed = run(*command, "--epochs", 4)
    found = re.fullmatch(r"teacher +([\d.]+)%\ndistilled +([\d.]+)%\n", printed)
    assert found
    teacher, distilled = map(float, found.groups())
    assert teacher > 30  # of ten classes, after a few seconds
    assert distilled > 30


def test_served_without_torch(student: tuple[Path, float]) -> None:
    file, top1 = student
    assert top1 > 50  # of ten classes, after a few seconds
    command = [sys.executable, str(EXAMPLES / "quantize_and_serve.py"), "serve", str(file)]
    with subprocess.Popen([*command, "--port", "0"], stdout=subprocess.PIPE, text=True) as server:
        try:
            found = re.fullmatch(r"port (\d+), torch: False\n", server.stdout.readline())
            assert found
            url = f"http://127.0.0.1:{found[1]}"
            digits = load_digits()
            right = 0
            for pixels, label in zip(digits.images[-100:], digits.target[-100:], strict=True):
                body = io.BytesIO()
                Image.fromarray((15.9 * pixels).astype("uint8")).save(body, "png")
                answer = json.load(urllib.request.urlopen(url, body.getvalue(), timeout=60))
                assert 0.1 <= answer["probability"] <= 1
                right += answer["class"] == str(label)
            assert right > 30, right  # of 100
            with pytest.raises(urllib.error.HTTPError) as error:
                urllib.request.urlopen(url, b"no image", timeout=60)
            assert error.value.code == 400
        finally:
            server.terminate()


def test_camera(student: tuple[Path, float]) -> None:
    printed = run("camera_loop.py", student[0], "--seconds", 1, "--fps", 50)
    found = re.search(r"(\d+) frames.*p50 ([\d.]+) ms, p99 ([\d.]+) ms", printed, re.DOTALL)
    assert found
    frames, p50, p99 = map(float, found.groups())
    assert 5 <= frames <= 60
    assert 0 < p50 <= p99
