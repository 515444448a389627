"""One training by several processes, and by two machines: the samples and losses of one process.

Machines are network namespaces: each has a loopback and a host name of its own, and a cable leads
to the other. They need root and iproute2; where there are none, the test is skipped.
"""

import os
import shutil
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file

from support.cache_tools import DATA, config, contents, good_teacher, save_teacher, trainer
from support.process_tools import run_ranks
from vitkd_fast.distill.config import load

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 11  # of an epoch: 179 images by 16
AUGMENTED = "augmentation={scale: [0.6, 1.0], hflip: 0.5, color_jitter: 0.4, erasing: 0.3}"
# sums of other parts are rounded otherwise: at a rate of 1e-3 each step would make much more of it
TRAINED = [AUGMENTED, "optimizer={name: sgd, lr: 1e-4}", "run.epochs=2"]


class Step(NamedTuple):
    """What a process saw in a step, and the loss of its images."""

    images: list[tuple[int, int]]  # (index, CRC-32 of the augmented pixels)
    loss: float


def steps(file: Path, folder: Path, ranks: int) -> list[Step]:
    """Of an epoch."""
    run = trainer(folder, config(file, *TRAINED, f"data.batch_size={16 // ranks}"))
    found: list[Step] = []
    seen: list[Any] = []

    def noted() -> Iterator[Any]:
        for batch in run.loader.epoch(0):
            sums = [zlib.crc32(x.numpy().tobytes()) for x in batch.images]
            seen.append(list(zip(batch.indices.tolist(), sums, strict=True)))
            yield batch

    run.task.register_forward_hook(
        lambda *x: found.append(Step(seen[len(found)], float(x[2]["loss"].detach())))
    )
    run.task.calibrate(run._first_images())
    run.task.train()
    batches = noted()
    for _ in range(STEPS):
        run.update(batches)
    return found


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "teacher.safetensors")


@pytest.fixture(scope="module")
def alone(file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Step]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = steps(file, tmp_path_factory.mktemp("alone"), 1)
    torch.set_num_threads(threads)
    return found


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_share_the_samples_augmentations_and_loss_of_one_process(
    ranks: int, file: Path, alone: list[Step], tmp_path: Path
) -> None:
    run_ranks(__file__, ranks, file, tmp_path, ranks=ranks, seconds=300)
    each = [torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks)]
    assert len(alone) == STEPS and len({i for step in alone for i, _ in step.images}) == 16 * STEPS
    for one, several in zip(alone, zip(*each, strict=True), strict=True):
        assert [len(images) for images, _ in several] == [16 // ranks] * ranks
        assert sorted(x for images, _ in several for x in images) == sorted(one.images)
        mean = sum(loss for _, loss in several) / ranks
        assert mean == pytest.approx(one.loss, rel=1e-5)
    assert len({step.loss for step in alone}) == STEPS


def _rank(rank: int, ranks: int, file: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/group", rank=rank, world_size=ranks)
    found = steps(file, folder / "run", ranks)
    torch.save([tuple(step) for step in found], folder / f"{rank}.pt")
    dist.destroy_process_group()


# ---- two machines

Launch = Callable[..., None]
_PORT = 29713


def _ip(*command: str) -> None:
    subprocess.run(["ip", *command], check=True, capture_output=True, text=True)


def _stop(machine: str) -> None:
    """What a test that failed has left running there."""
    found = subprocess.run(["ip", "netns", "pids", machine], capture_output=True, text=True)
    for process in found.stdout.split():
        with suppress(ProcessLookupError):
            os.kill(int(process), signal.SIGKILL)


@pytest.fixture
def machines() -> Iterator[list[str]]:
    """Two network namespaces with addresses 10.213.7.1 and .2; their names."""
    if os.geteuid() or not all(map(shutil.which, ("ip", "unshare", "hostname"))):
        pytest.skip("two machines need root, iproute2, unshare and hostname")
    names = [f"vitkd-{os.getpid()}-{i}" for i in (1, 2)]
    with ExitStack() as stack:
        try:
            for name in names:
                _ip("netns", "add", name)
                stack.callback(_ip, "netns", "del", name)
                stack.callback(_stop, name)
            one, two = names
            _ip("-n", one, "link", "add", "wire", "type", "veth", "peer", "wire", "netns", two)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"two machines need network namespaces: {error.stderr.strip()}")
        for i, name in enumerate(names, 1):
            _ip("-n", name, "address", "add", f"10.213.7.{i}/24", "dev", "wire")
            for link in ("lo", "wire"):
                _ip("-n", name, "link", "set", link, "up")
        yield names


@pytest.mark.slow
def test_two_machines_are_one_machine_with_two_processes(
    machines: list[str], image_folder: Path, tmp_path: Path
) -> None:
    of_folder = ["data.dataset=''", f"data.train={image_folder}/train"]
    of_folder += [f"data.val={image_folder}/val", "data.workers=0"]
    teacher = good_teacher(tmp_path / "teacher.safetensors", load("digits", of_folder))

    def command(name: str) -> list[list[str]]:
        common = [*DATA, *of_folder, "optimizer={name: sgd, lr: 0.01}", "run.baseline=false"]
        common += ["run.max_steps=12", "run.log_every=2", "run.epochs=4", "data.batch_size=8"]
        cache, run = tmp_path / name / "cache", f"run.folder={tmp_path / name / 'run'}"
        cached = [f"teacher={{model: {teacher}, cache: {cache}}}", run]
        given = ["-o", str(cache), "--epochs", "2", "--topk", "4"]
        return [
            ["cache", "digits", *common, f"teacher={{model: {teacher}}}", *given],
            ["distill", "digits", *common, *cached],
        ]

    def torchrun(*arguments: str) -> list[str]:
        return [sys.executable, "-m", "torch.distributed.run", *arguments, "-m", "vitkd_fast.cli"]

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "wire"}
    for arguments in command("two"):
        running = []
        for i, machine in enumerate(machines):
            rank = ["--nnodes=2", "--nproc-per-node=1", f"--node-rank={i}"]
            inside = torchrun(*rank, "--master-addr=10.213.7.1", f"--master-port={_PORT}")
            named = ["unshare", "--uts", "sh", "-c", f'hostname machine-{i} && exec "$@"', "sh"]
            process = subprocess.Popen(
                ["ip", "netns", "exec", machine, *named, *inside, *arguments],
                cwd=tmp_path,
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            running.append(process)
        said = [process.communicate(timeout=600)[0] for process in running]
        assert [process.returncode for process in running] == [0, 0], "\n".join(said)
    del environment["GLOO_SOCKET_IFNAME"]
    for arguments in command("one"):
        subprocess.run(
            [*torchrun("--standalone", "--nproc-per-node=2"), *arguments],
            cwd=tmp_path, env=environment, check=True, timeout=600, capture_output=True,
        )  # fmt: skip
    assert contents(tmp_path / "one/cache") == contents(tmp_path / "two/cache")
    one, two = (
        load_file(tmp_path / x / "run/distilled-3/last.safetensors") for x in ("one", "two")
    )
    assert one.keys() == two.keys() and all(torch.equal(one[name], x) for name, x in two.items())
    begun = yaml.safe_load((tmp_path / "two/run/config.yaml").read_text())
    assert begun["teacher"]["cache"] == str(tmp_path / "two/cache")


if __name__ == "__main__":
    _rank(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
