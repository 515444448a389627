"""Caches made by a Ray cluster: the bytes of one process, whatever dies meanwhile.

What needs a cluster is skipped where Ray is not installed (the extra `ray`).
"""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support.cache_tools import ROWS, config, contents, copied, save_teacher
from support.cluster_tools import (
    Died,
    Pretended,
    of_a_cluster,
    pretend,
    processes,
    watch_burials,
    when_there_are,
)
from support.process_tools import of_tests
from vitkd_fast import _cluster, _extras, cli
from vitkd_fast._cluster import ClusterError, Note
from vitkd_fast.distill import datasets, sources
from vitkd_fast.distill.cache import CacheError, Plan, cluster, plan, quarantine, shards
from vitkd_fast.distill.cache.build import Maker, Options, build, verify
from vitkd_fast.distill.cache.plan import Place
from vitkd_fast.distill.cache.read import CachedTeacher
from vitkd_fast.distill.cache.worker import Noted
from vitkd_fast.distill.config import Config
from vitkd_fast.distill.runtime import Runtime
from vitkd_fast.images import DataError

pytestmark = pytest.mark.usefixtures("one_thread")

EPOCHS, TOPK = 2, 4
SHARDS = "epoch-*/shard-*"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "teacher.safetensors")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_SHARD_ROWS", ROWS)


# ---- without a cluster


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_extras, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'ray, .*not installed: pip install "vitkd-fast\[ray\]"'):
        cluster.build(None, tmp_path, Options(1))  # type: ignore[arg-type]


def test_workers_are_of_ray(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    command = ["vitkd", "cache", "digits", "-o", str(tmp_path / "c"), "--workers", "2"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2 and "--workers: only with" in capsys.readouterr().err


def test_what_a_process_takes_of_a_cluster() -> None:
    cpu = {"CPU": 16.0}
    assert cluster.share("cpu", 1, None, cpu) == (15, {"num_cpus": 1})
    assert cluster.share("cpu", 4, None, cpu) == (3, {"num_cpus": 4})
    assert cluster.share("cpu", 1, 2, cpu) == (2, {"num_cpus": 1})
    assert cluster.share("cpu", 1, None, {"CPU": 1.0}) == (1, {"num_cpus": 1})
    gpus = cpu | {"GPU": 4.0}
    assert cluster.share("cuda", 1, None, gpus) == (4, {"num_cpus": 1, "num_gpus": 1.0})
    assert cluster.share("cuda", 1, 16, gpus) == (16, {"num_cpus": 1, "num_gpus": 0.25})
    assert cluster.share("cuda", 1, 2, gpus) == (2, {"num_cpus": 1, "num_gpus": 1.0})
    with pytest.raises(ClusterError, match="has no GPU"):
        cluster.share("cuda", 1, None, cpu)


def test_a_note_names_the_image_that_is_being_read(tmp_path: Path) -> None:
    path, seen = tmp_path / "new" / "note", []

    class Images(datasets.Digits):
        def read(self, index: int) -> Any:
            seen.append(Note.read(path))
            if index == 5:
                raise OSError("bad")
            return super().read(index)

    noted = Noted(Images())
    Note().write(path)
    assert Note.read(path) == (0, -1)
    noted.notes.begin(path)
    assert Note.read(path) == (1, -1)
    assert noted.read(3)[1] == datasets.Digits().read(3)[1]
    with pytest.raises(OSError, match="bad"):
        noted.read(5)
    assert seen == [(2, 3), (4, 5)] and Note.read(path) == (5, -1)
    noted.notes.end()
    noted.read(4)  # without a note, nothing is lost but the note
    assert path.stat().st_size == 16


def test_two_that_make_one_shard_at_once_leave_it_whole(file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    build(config(file), folder, Options(1, TOPK))
    read, place = Plan.read(folder), Place(0, 1)
    columns = {name: x.copy() for name, x in shards.opened(folder, read, place).items()}
    expected = contents(folder)
    for _ in range(5):
        (folder / place.file).unlink()
        together, made = threading.Barrier(4), []

        def commit(together: Any = together, made: list[bool] = made) -> None:
            together.wait()
            made.append(shards.commit(folder, read, place, columns))

        threads = [threading.Thread(target=commit) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(made) == [False, False, False, True]
        assert contents(folder) == expected


def test_what_is_in_quarantine_is_not_read(
    file: Path, tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = copied(image_folder, tmp_path / "images")
    whole = config(file, *given)
    source = Maker(whole, Runtime.of(whole), Options(1)).source
    name = source.name(70)
    folder = tmp_path / "c"
    build(whole, folder, Options(1, TOPK))
    assert quarantine.read(folder) == {}
    assert quarantine.add(folder, 70, name) == {70: name}
    assert quarantine.add(folder, 9, "x") == {9: "x", 70: name} == quarantine.read(folder)
    (folder / Place(0, 1).file).unlink()
    real = datasets.Part.read

    def read(self: Any, index: int) -> Any:
        assert index not in (70, 9)
        return real(self, index)

    monkeypatch.setattr(datasets.Part, "read", read)
    build(whole, folder, Options(1, TOPK))  # without data.skip_bad
    (bad,) = np.nonzero(np.isnan(CachedTeacher(folder).rows(0, np.arange(135))["log_sum_exp"]))[:1]
    assert bad.tolist() == [70]
    (folder / Place(0, 0).file).unlink()
    build(whole, folder, Options(1, TOPK))
    found = verify(folder, samples=200, seed=0)
    assert (found.pixels, found.bad) == ([], []) and found.equal > 150
    (folder / quarantine.FILE).write_text("[")
    with pytest.raises(CacheError, match=r"quarantine\.json: cannot be read"):
        build(whole, folder, Options(1, TOPK))


@pytest.fixture
def pretended(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a cache of 179 digits so; and the folder."""

    def make(dies: Callable[[Any], None], answers: bool = True) -> Pretended:
        with pretend(monkeypatch, dies, answers) as made:
            cluster.build(config(file), tmp_path / "c", Options(EPOCHS, TOPK))
        return made

    return make, tmp_path / "c"


def of_image(image: int, more: Callable[[Any, Died], None] = lambda call, error: None) -> Any:
    """Kills each process that reads an image."""

    def dies(call: Any) -> None:
        plan_of = Plan.read(call.note.parents[1])
        if image in plan_of.rows_of(call.piece) and image not in call.left_out:
            Note(7, image).write(call.note)
            call.note.with_name(".half.part").write_bytes(b"half a shard")
            error = Died("gone")
            more(call, error)
            raise error

    return dies


def test_the_third_death_of_an_image_leaves_it_out(
    pretended: Any, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    make, folder = pretended
    made = make(of_image(70))
    # that of the other epoch may have been given by then
    assert len(made.actors) - 2 in (3, 4) and all(actor.killed for actor in made.actors)
    assert list(quarantine.read(folder)) == [70]
    assert "3 processes died reading it; it is left out" in capsys.readouterr().out
    for epoch in range(EPOCHS):
        sums = CachedTeacher(folder).rows(epoch, np.arange(179))["log_sum_exp"]
        assert np.nonzero(np.isnan(sums[:, 0]))[0].tolist() == [70]
    assert not list(folder.rglob("*.part"))
    build(config(file), tmp_path / "one", Options(EPOCHS, TOPK))
    ours, theirs = contents(folder), contents(tmp_path / "one")
    with_it = {Place(epoch, 1).file for epoch in range(EPOCHS)} | {quarantine.FILE}
    assert {name for name in ours if ours[name] != theirs.get(name)} == with_it


@pytest.mark.parametrize("why", ["lost", "preempted", "two deaths"])
def test_lost_machines_count_against_no_image(
    why: str, pretended: Any, file: Path, tmp_path: Path
) -> None:
    make, folder = pretended
    deaths = []

    def more(call: Any, error: Died) -> None:
        deaths.append(call.piece)
        error.preempted = why == "preempted"
        if why == "lost" and len(deaths) != 2:  # of one it is known later
            call.ray.lost.update(actor.node for actor in call.ray.actors[: len(deaths)])
            call.ray.lost.add(call.actor.node)

    kills, most = of_image(70, more), 2 if why == "two deaths" else 7
    make(lambda call: None if len(deaths) == most else kills(call))
    assert len(deaths) == most and quarantine.read(folder) == {}
    build(config(file), tmp_path / "one", Options(EPOCHS, TOPK))
    same(folder, tmp_path / "one")


def test_a_process_that_had_not_begun_counts_against_no_shard(pretended: Any) -> None:
    deaths = []

    def dies(call: Any) -> None:
        if call.piece == Place(0, 1) and len(deaths) < 9:
            deaths.append(call.actor)
            raise Died("gone")

    make, folder = pretended
    made = make(dies)
    assert len(deaths) == 9 and len(made.actors) == 2 + 9
    CachedTeacher(folder)


def test_a_shard_of_which_every_process_dies_is_given_up(pretended: Any) -> None:
    calls = []

    def dies(call: Any) -> None:
        if call.piece == Place(0, 1):
            calls.append(call)
            Note(7, -1 if len(calls) % 2 else len(calls)).write(call.note)
            raise Died("gone")

    make, folder = pretended
    with pytest.raises(ClusterError, match=r"shard-00001\.safetensors: 5 processes died making it"):
        make(dies)
    assert len(calls) == 5 and quarantine.read(folder) == {}
    assert not list(folder.rglob("*.part"))


def test_processes_that_die_before_they_are_ready_are_given_up(pretended: Any) -> None:
    make, _ = pretended
    with pytest.raises(ClusterError, match="6 processes died before they were ready: no library"):
        make(lambda call: None, answers=False)


# ---- on three machines


@pytest.fixture(scope="module")
def slow(file: Path, image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Images that take a while to read on the cluster, and the cache of one process."""
    root = tmp_path_factory.mktemp("slow")
    whole = config(file, *copied(image_folder, root / "slow"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "_SHARD_ROWS", ROWS)
        build(whole, root / "one", Options(EPOCHS, TOPK))
    torch.set_num_threads(threads)
    return whole, root / "one"


def on_three(whole: Config, folder: Path, workers: int | None = 3) -> Any:
    return cluster.build(whole, folder, Options(EPOCHS, TOPK), workers)


def same(folder: Path, expected: Path) -> None:
    ours, theirs = contents(folder), contents(expected)
    for one in (ours, theirs):
        one.pop(plan.FILE)  # names the file of weights, which may be elsewhere
    assert ours == theirs
    assert not list(folder.rglob("*.part"))


@of_a_cluster
@pytest.mark.slow
def test_a_killed_process_costs_nothing_but_time(
    machines: Any, slow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = []

    def kill() -> None:
        killed.extend(processes(machines.hook)[:1])
        os.kill(killed[0], signal.SIGKILL)

    folder = tmp_path / "cuts" / "c"
    buried = watch_burials(monkeypatch)
    thread = when_there_are(lambda: folder.glob(SHARDS), 1, kill)
    found = on_three(slow[0], folder)
    thread.join()
    assert len(killed) == 1 and len(buried) == 3
    hook = Path(machines.hook)
    assert (hook / "os.link").exists() and (hook / "os.remove").exists()
    assert (found.made, found.kept, found.bad) == (6, 0, [])
    same(folder, slow[1])
    assert quarantine.read(folder) == {}
    found = on_three(slow[0], folder)  # starts nothing
    assert (found.made, found.kept) == (0, 6)


@of_a_cluster
@pytest.mark.slow
def test_a_lost_machine_costs_nothing_but_time(
    machines: Any, slow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buried = watch_burials(monkeypatch)
    lost = machines.worker_nodes.copy().pop()
    thread = when_there_are(
        lambda: (tmp_path / "c").glob(SHARDS),
        1,
        lambda: machines.remove_node(lost, allow_graceful=False),
    )
    found = on_three(slow[0], tmp_path / "c")
    thread.join()
    machines.add_node(num_cpus=1, object_store_memory=80 << 20)
    assert (found.made, found.bad, buried) == (6, [], [lost.node_id])
    same(tmp_path / "c", slow[1])
    assert quarantine.read(tmp_path / "c") == {}


@of_a_cluster
@pytest.mark.slow
def test_a_killed_driver_is_resumed(machines: Any, slow: Any, file: Path, tmp_path: Path) -> None:
    arguments = [str(file), str(tmp_path / "c"), slow[0].data.train]
    driver = subprocess.Popen(
        [sys.executable, __file__, *arguments],
        env=of_tests() | {"RAY_ADDRESS": machines.address},
    )
    thread = when_there_are(lambda: (tmp_path / "c").glob(SHARDS), 2, driver.kill)
    assert driver.wait(120) == -signal.SIGKILL
    thread.join()
    there = len(list((tmp_path / "c").glob(SHARDS)))
    assert 2 <= there < 6
    found = on_three(slow[0], tmp_path / "c")
    assert found.kept >= there and found.made + found.kept == 6 and not found.bad
    time.sleep(1)  # for what the dead driver's processes may still do
    same(tmp_path / "c", slow[1])


@of_a_cluster
@pytest.mark.slow
def test_an_image_that_kills_its_process_is_left_out(
    machines: Any, file: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    given = copied(image_folder, tmp_path / "images", kills=b"")
    whole = config(file, *given)
    names = [sources.open_data(whole.data).train.name(i) for i in range(135)]
    [index] = [i for i, name in enumerate(names) if name.endswith("kills.png")]
    on_three(whole, tmp_path / "c")
    assert quarantine.read(tmp_path / "c") == {index: names[index]}
    out = capsys.readouterr().out
    assert f"{names[index]}: 3 processes died reading it; it is left out" in out
    for epoch in range(EPOCHS):
        sums = CachedTeacher(tmp_path / "c").rows(epoch, np.arange(135))["log_sum_exp"]
        assert np.nonzero(np.isnan(sums[:, 0]))[0].tolist() == [index]
    found = verify(tmp_path / "c", samples=300)  # does not read it, though it could here
    # rows were made in batches, which round differently than an image alone
    assert not found.pixels and found.equal > 250 and found.distance < 1e-3
    # the same bytes as one process, for which it cannot be read
    Path(names[index]).write_bytes(b"")
    build(config(file, *given, "data.skip_bad=true"), tmp_path / "one", Options(EPOCHS, TOPK))
    (tmp_path / "c" / quarantine.FILE).unlink()
    same(tmp_path / "c", tmp_path / "one")


@of_a_cluster
@pytest.mark.slow
def test_what_cannot_go_on_is_an_error_that_says_why(
    machines: Any,
    slow: Any,
    file: Path,
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # a full disk
    full = tmp_path / "full"
    with pytest.raises(OSError, match=r"No space left on device.*process") as caught:
        on_three(config(file), full / "c")
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(CacheError, match="are not there"):
        CachedTeacher(full / "c")
    assert not list((full / "c").glob("epoch-00001/shard*"))
    # another plan
    with pytest.raises(CacheError, match=r"record\.topk: 4 there, 3 here"):
        cluster.build(config(file), full / "c", Options(EPOCHS, 3))
    # an image that cannot be read
    bad = config(file, *copied(image_folder, tmp_path / "images", bad=b"no image"))
    with pytest.raises(DataError, match=r"bad\.png cannot be read: .*process"):
        on_three(bad, tmp_path / "bad")
    monkeypatch.setattr(_cluster, "PATIENCE", 4.0)
    # more CPUs than any machine has
    with (
        pytest.warns(UserWarning, match=r"run\.threads: 64 given"),
        pytest.raises(ClusterError, match=r"6 shards wait; 1 processes for a place, .*: 64"),
    ):
        on_three(config(file, "run.threads=64"), tmp_path / "large", 1)
    # one that never ends
    hangs = config(file, *copied(image_folder, tmp_path / "more", hangs=b""))
    monkeypatch.setattr(_cluster, "PATIENCE", 15.0)
    with pytest.raises(ClusterError, match=r"nothing has moved for 15 s.*reading .*hangs\.png"):
        on_three(hangs, tmp_path / "hangs", 1)


@of_a_cluster
@pytest.mark.slow
def test_a_process_has_one_thread_and_refuses_another_plan(
    machines: Any, file: Path, tmp_path: Path
) -> None:
    import ray

    whole = config(file)
    maker = Maker(whole, Runtime.of(whole), Options(EPOCHS, TOPK))
    (tmp_path / "c").mkdir()
    actor = ray.remote(num_cpus=1)(cluster.Worker)

    def answer(options: Options) -> Any:
        made = actor.remote(whole, options, maker.plan, tmp_path / "c", os.getcwd(), 1)
        found = ray.get(made.answer.remote())
        ray.kill(made)
        return found

    found = answer(Options(EPOCHS, TOPK))
    assert found.threads == 1 and "holds no cache" in str(found.refused)  # not the same storage
    maker.plan.write(tmp_path / "c")
    assert answer(Options(EPOCHS, TOPK)).refused is None
    refused = answer(Options(EPOCHS, 3)).refused
    assert isinstance(refused, CacheError) and "record.topk: 4 there, 3 here" in str(refused)


if __name__ == "__main__":
    plan._SHARD_ROWS = ROWS  # type: ignore[misc]
    on_three(
        config(
            Path(sys.argv[1]), "data.dataset=''", f"data.train={sys.argv[3]}", "data.holdout=0.1"
        ),
        Path(sys.argv[2]),
    )
