"""`vitkd predict --engine ray`: the lines of one process, whatever dies meanwhile.

What needs a cluster is skipped where Ray is not installed (the extra `ray`).
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support.cluster_tools import (
    Died,
    of_a_cluster,
    pretend,
    processes,
    watch_burials,
    when_there_are,
)
from support.process_tools import of_tests
from vitkd_fast import _cluster, int8, models, predict_cluster
from vitkd_fast._cluster import Note
from vitkd_fast.distill import datasets
from vitkd_fast.images import list_images
from vitkd_fast.predict_command import Said

pytestmark = pytest.mark.usefixtures("one_thread")
FILES = 7  # of a chunk


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An int8 file of an untrained network whose answers differ from image to image."""
    torch.manual_seed(0)
    made = models.create("mobilenetv2_035", num_classes=10).train()
    for _ in range(3):
        made(torch.rand(16, 3, 32, 32) * 4 - 2)
    digits = np.stack([datasets.Digits().read(i)[0] for i in range(16)])
    classes = tuple(f"digit {i}" for i in range(10))
    half = (0.5, 0.5, 0.5)
    quantized = int8.quantize(made.eval(), digits, mean=half, std=half, classes=classes)
    file = tmp_path_factory.mktemp("student") / "student.int8.safetensors"
    quantized.save(file)
    return file


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict_cluster, "_FILES", FILES)


@pytest.fixture
def images(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """50 of them, in the folder in which the command runs."""
    shutil.copytree(image_folder / "val", tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    return Path("images")


def stay(call: Any) -> None:
    """No process dies."""


@pytest.mark.parametrize("form", [[], ["--top", 2, "--json"]])
def test_the_lines_are_those_of_one_process(
    form: list[Any], student: Path, images: Path, vitkd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # in an order that is not the folder's, and one of them twice
    given = (list_images(images)[9], images, list_images(images)[3])
    printed = vitkd("predict", student, *given, *form)
    assert printed.code == 0 and len(set(printed.out.splitlines())) == 50
    found = vitkd("predict", student, *given, *form, "-o", "one.txt")
    assert (found.code, found.out) == (0, "one.txt: 52 images\n")
    with pretend(monkeypatch, stay) as ray:
        found = vitkd("predict", student, *given, *form, "--engine", "ray", "-o", "two.txt")
    assert (found.code, found.out, found.err) == (0, "two.txt: 52 images\n", "")
    assert len(ray.actors) == 3  # one for each CPU
    assert Path("one.txt").read_text() == Path("two.txt").read_text() == printed.out
    assert sorted(os.listdir()) == ["images", "one.txt", "two.txt"]
    if form:
        rows = [json.loads(line) for line in printed.out.splitlines()]
        assert [row["file"] for row in rows[1:-1]] == list(map(str, list_images(images)))
        assert all(len(row["classes"]) == len(row["probabilities"]) == 2 for row in rows)
        assert all(1 >= row["probabilities"][0] >= row["probabilities"][1] > 0 for row in rows)


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_an_image_that_cannot_be_read(
    engine: str, student: Path, images: Path, vitkd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = list_images(images)[20]
    bad.write_bytes(b"no image")
    command = ("predict", student, images, "-o", "out.txt", "--engine", engine)
    with pretend(monkeypatch, stay):
        found = vitkd(*command)
        assert found.code == 1 and f"DataError: {bad} cannot be read: " in found.err
        assert not Path("out.txt").exists() and Path("out.txt.parts").exists() == (engine == "ray")
        found = vitkd(*command, "--skip-bad")  # which goes on with what is there
    assert (found.code, found.err) == (0, "1 of 50 images cannot be read\n")
    lines = Path("out.txt").read_text().splitlines()
    assert lines[20].startswith(f"{bad}: cannot be read: cannot identify image file")
    assert lines == vitkd("predict", student, images, "--skip-bad").out.splitlines()
    as_json = vitkd("predict", student, bad, "--skip-bad", "--json").out
    assert json.loads(as_json)["error"].startswith("cannot be read: ")


def dying(image: int, deaths: list[Any], most: int = 99) -> Callable[[Any], None]:
    """Kills each process that reads an image, at most so often."""

    def dies(call: Any) -> None:
        first = call.piece.start
        among = first <= image < first + len(call.piece.files) and image not in call.left_out
        if among and len(deaths) < most:
            deaths.append(call.actor)
            Note(7, image).write(call.note)
            raise Died("gone")

    return dies


def test_the_third_death_of_an_image_leaves_it_out(
    student: Path, images: Path, vitkd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    deaths: list[Any] = []
    command = ("predict", student, images, "-o", "out.txt")
    with pretend(monkeypatch, dying(20, deaths, most=2)):
        found = vitkd(*command, "--engine", "ray")
    whole = vitkd("predict", student, images).out
    assert found.code == 0 and len(deaths) == 2 and Path("out.txt").read_text() == whole
    with pretend(monkeypatch, dying(20, deaths)) as ray:
        found = vitkd(*command, "--engine", "ray", "--workers", "2")
    name = list_images(images)[20]
    assert (found.code, found.err) == (0, "1 of 50 images cannot be read\n")
    assert f"{name}: 3 processes died reading it; it is left out\n" in found.out
    assert len(deaths) == 2 + 3 and len(ray.actors) == 2 + 3
    lines = Path("out.txt").read_text().splitlines()
    assert lines.pop(20) == f"{name}: cannot be read: processes died reading it"
    assert [line for line in whole.splitlines() if not line.startswith(f"{name}:")] == lines
    assert not Path("out.txt.parts").exists()


def test_an_interrupted_run_goes_on(
    student: Path, images: Path, vitkd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def interrupt(call: Any) -> None:
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(call.piece.number)

    Path("out.txt").write_text("what was there")
    command = ["predict", student, images, "-o", "out.txt", "--engine", "ray"]
    with pretend(monkeypatch, interrupt):
        assert vitkd(*command).code != 0
    parts = Path("out.txt.parts")
    assert len(list(parts.glob("[0-9]*.json"))) == 3 and Path("out.txt").read_text()[:4] == "what"
    # as it may be left by a kill in the middle of a chunk
    (parts / ".0000003.json.half.part").write_bytes(b"{")
    for more, key in ((["--top", 1], "form"), ([list_images(images)[0]], "files")):
        with pretend(monkeypatch, stay):
            found = vitkd(*command, *more)
        assert found.code == 1
        assert f"out.txt.parts is of an interrupted run with another {key}; remove" in found.err
    made.clear()
    with pretend(monkeypatch, lambda call: made.append(call.piece.number)):
        assert vitkd(*command).code == 0
    assert len(made) == 5  # of 8
    assert Path("out.txt").read_text() == vitkd("predict", student, images).out
    assert not parts.exists()


def test_a_chunk_is_there_once(tmp_path: Path) -> None:
    path = tmp_path / "0.json"
    for _ in range(2):  # by a process that was thought to be dead
        predict_cluster.commit(path, [Said("a: cat 100%")])
    with pytest.raises(_cluster.ClusterError, match=r"0\.json: holds other predictions"):
        predict_cluster.commit(path, [Said("a: dog 100%")])
    assert os.listdir(tmp_path) == ["0.json"]


@pytest.mark.parametrize("other", ["file", "storage"])
def test_a_process_that_sees_something_else_is_refused(
    other: str, student: Path, images: Path, vitkd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = predict_cluster.Worker.__init__

    def elsewhere(self: Any, model: str, digest: str, parts: Path, *given: Any) -> None:
        if other == "file":
            digest = 64 * "a"
        real(self, model, digest, Path("none"), *given)

    monkeypatch.setattr(predict_cluster.Worker, "__init__", elsewhere)
    with pretend(monkeypatch, stay):
        found = vitkd("predict", student, images, "-o", "out.txt", "--engine", "ray")
    why = f"{student}: the driver's is aaaaaaaaaaaa..., not "
    if other == "storage":
        why = "none: is not on storage that this machine shares"
    assert found.code == 1 and why in found.err


def test_wrong_usage(student: Path, images: Path, tmp_path: Path, vitkd: Any) -> None:
    wrong = {
        "-o: missing; --engine ray writes a file": ["--engine", "ray"],
        "-o: images is a folder": ["-o", "images"],
        "-o: none/out.txt is in no folder that is there": ["-o", "none/out.txt"],
        "--workers: only with --engine ray": ["--workers", "2"],
    }
    for why, given in wrong.items():
        found = vitkd("predict", student, images, *given)
        assert found.code == 2 and why in found.err
    found = vitkd("predict", "resnet18", images, "--engine", "ray", "-o", "out.txt")
    assert found.code == 2 and "MODEL: expected a file of `vitkd quantize`, got" in found.err
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vitkd_fast._extras.find_spec", lambda name: None)
        found = vitkd("predict", student, images, "--engine", "ray", "-o", "out.txt")
    assert found.code == 1 and "vitkd predict --engine ray needs ray, which is not" in found.err


# ---- on three machines


@pytest.fixture
def slow_images(images: Path) -> Path:
    """Which take a while to read there."""
    (images.parent / "slow").mkdir()
    return images.rename("slow/images")


def on_three(student: Path, folder: Path, output: str) -> int:
    files = list(map(str, list_images(folder)))
    return predict_cluster.predict(str(student), files, Path(output), predict_cluster.Form())


def chunks() -> list[Path]:
    return list(Path("out.txt.parts").glob("[0-9]*.json"))


@of_a_cluster
@pytest.mark.slow
def test_a_killed_process_costs_nothing_but_time(
    machines: Any,
    student: Path,
    slow_images: Path,
    vitkd: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    buried, killed = watch_burials(monkeypatch), []

    def kill() -> None:
        killed.extend(processes(machines.hook)[:1])
        os.kill(killed[0], signal.SIGKILL)

    thread = when_there_are(chunks, 1, kill)
    assert on_three(student, slow_images, "out.txt") == 0
    thread.join()
    assert len(killed) == len(buried) == 1
    assert Path("out.txt").read_text() == vitkd("predict", student, slow_images).out
    assert sorted(os.listdir()) == ["out.txt", "slow"]


@of_a_cluster
@pytest.mark.slow
def test_an_image_that_kills_its_process_is_left_out(
    machines: Any, student: Path, images: Path, vitkd: Any
) -> None:
    list_images(images)[20].rename(images / "kills.png")
    assert on_three(student, images, "out.txt") == 1
    lines = Path("out.txt").read_text().splitlines()
    found = {str(file): line for file, line in zip(list_images(images), lines, strict=True)}
    assert found.pop("images/kills.png").endswith(": cannot be read: processes died reading it")
    assert list(found.values()) == vitkd("predict", student, *found).out.splitlines()


@of_a_cluster
@pytest.mark.slow
def test_a_killed_driver_is_resumed(
    machines: Any, student: Path, slow_images: Path, vitkd: Any
) -> None:
    driver = subprocess.Popen(
        [sys.executable, __file__, str(student), str(slow_images)],
        env=of_tests() | {"RAY_ADDRESS": machines.address},
    )
    thread = when_there_are(chunks, 2, driver.kill)
    assert driver.wait(120) == -signal.SIGKILL
    thread.join()
    there = {path: path.stat().st_ino for path in chunks()}
    assert 2 <= len(there) < 8 and not Path("out.txt").exists()
    kept: dict[Path, int] = {}
    real, shutil.rmtree = (
        shutil.rmtree,
        lambda folder: kept.update({path: path.stat().st_ino for path in chunks()}),
    )
    try:
        on_three(student, slow_images, "out.txt")
    finally:
        shutil.rmtree = real
    assert len(kept) == 8 and there.items() <= kept.items()  # not made again
    assert Path("out.txt").read_text() == vitkd("predict", student, slow_images).out


if __name__ == "__main__":
    predict_cluster._FILES = FILES  # type: ignore[misc]
    on_three(Path(sys.argv[1]), Path(sys.argv[2]), "out.txt")
