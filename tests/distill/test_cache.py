"""Caches of a teacher's outputs: what their files hold, and what happens to damaged ones."""

import errno
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from safetensors import safe_open

from support.cache_tools import (
    DATA,
    ROWS,
    SHARDS,
    config,
    contents,
    losses,
    make,
    save_teacher,
    trainer,
)
from support.process_tools import run_ranks
from vitkd_fast import cli, models
from vitkd_fast.distill import augment, data, sources
from vitkd_fast.distill.cache import CacheError, Plan, plan, shards
from vitkd_fast.distill.cache.build import Options, build, verify
from vitkd_fast.distill.cache.plan import Place
from vitkd_fast.distill.cache.read import CachedTeacher, checksum
from vitkd_fast.distill.config import ConfigError
from vitkd_fast.images import DataError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "teacher.safetensors")


@pytest.fixture(scope="module")
def made(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 4 classes; nothing changes it."""
    folder = tmp_path_factory.mktemp("caches") / "top"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        make(file, folder, monkeypatch=patch, topk=4)
    torch.set_num_threads(threads)
    return folder


@pytest.fixture
def again(file: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Any]:
    """Makes what is missing or damaged."""
    return lambda folder: make(file, folder, monkeypatch=monkeypatch, topk=4)


def test_a_row_is_what_the_teacher_says_of_the_image_that_a_run_sees(
    file: Path, made: Path
) -> None:
    read = Plan.read(made)
    assert read.stride == 4 * 4 + 8 and read.rows == ROWS and read.shards == SHARDS
    whole = config(file)
    splits, teacher = sources.open_data(whole.data), models.load(file).model
    assert read.images == len(splits.train) == 179
    transform = augment.Augment(whole.data, whole.augmentation)
    loader = data.Loader(
        splits.train, transform, whole.data, seed=7, drawn=data.Drawn(read.seed, read.epochs)
    )
    predict, cached = models.predictor(teacher), CachedTeacher(made)
    for epoch in (0, 1, 3):  # the plan has two
        batch = next(loader.epoch(epoch))
        with torch.inference_mode():
            logits = predict(batch.images)
        said = cached.outputs(batch, epoch)
        assert said.top and said.logits.shape == (16, 0)
        expected = logits.topk(4)
        assert torch.equal(said.top.indices.long(), expected.indices)
        torch.testing.assert_close(
            said.top.values, expected.values - expected.values[:, :1], rtol=2**-11, atol=1e-5
        )
        of_all = ((logits - logits.amax(1, keepdim=True)) / 4).logsumexp(1)
        torch.testing.assert_close(said.top.log_sum_exp[4.0], of_all)


def test_the_files_are_safetensors(made: Path) -> None:
    read = Plan.read(made)
    for place in read.places():
        with safe_open(made / place.file, "np") as opened:
            about = json.loads(opened.metadata()[shards.METADATA])
            rows = len(read.rows_of(place))
            assert about["plan"] == read.fingerprint
            assert (about["epoch"], about["shard"]) == place
            found = {name: opened.get_tensor(name) for name in opened.keys()}
        ours = shards.opened(made, read, place)
        assert found.keys() == ours.keys() == read.columns.keys()
        for name, x in found.items():
            assert x.dtype == ours[name].dtype and x.shape == (rows, *read.columns[name].shape)
            assert np.array_equal(x, ours[name])
    assert len({x for name, x in contents(made).items() if "shard" in name}) == 2 * SHARDS


@pytest.mark.parametrize("classes,dtype", [(100, "<u2"), (2**16, "<u2"), (2**16 + 1, "<i4")])
def test_the_size_of_a_row(made: Path, classes: int, dtype: str) -> None:
    tree = json.loads((made / plan.FILE).read_text())
    del tree["sha256"]
    record = tree["record"] | {"classes": classes, "topk": 32}
    found = Plan(**tree | {"record": record, "rows": 0})
    assert found.columns["indices"].dtype == dtype
    assert found.stride == (4 if dtype == "<u2" else 6) * 32 + 8
    whole = Plan(**tree | {"record": record | {"topk": classes}})
    assert "indices" not in whole.columns and whole.stride == 2 * classes + 8
    assert found.rows % found.batch_size == 0 and found.rows * found.stride <= 2**25
    # features of a row that is larger than a shard should be
    large = record | {"features": {"patch.3": [2**12, 2**12]}}
    assert Plan(**tree | {"record": large, "rows": 0}).rows == found.batch_size


def test_bytes_do_not_depend_on_workers_or_on_where_the_weights_are(
    file: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(file.read_bytes())
    make(moved, tmp_path / "c", "data.workers=2", monkeypatch=monkeypatch, topk=4)
    one, two = contents(tmp_path / "c"), contents(made)
    plans = [json.loads(x.pop(plan.FILE)) for x in (one, two)]
    assert one == two and plans[0]["sha256"] == plans[1]["sha256"]
    assert make(file, tmp_path / "c", monkeypatch=monkeypatch, topk=4).kept == 2 * SHARDS


def _rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    plan._SHARD_ROWS = ROWS  # type: ignore[misc]
    dist.init_process_group("gloo", f"file://{folder}/group", rank=rank, world_size=2)
    teacher = folder / "teacher.safetensors"
    found = build(config(teacher), folder / "cache", Options(2, 4))
    assert (found.made, found.kept) == (3, 0)
    dist.init_process_group("gloo", f"file://{folder}/training", rank=rank, world_size=2)
    cached = config(teacher, *SLOW, "data.batch_size=8", cache=folder / "cache")
    torch.save(losses(trainer(folder / "run", cached), 14), folder / f"{rank}.pt")
    dist.destroy_process_group()


SLOW = ["optimizer={name: sgd, lr: 1e-6}", "run.epochs=3"]


def test_bytes_and_losses_do_not_depend_on_ranks(tmp_path: Path, file: Path) -> None:
    target = tmp_path / "teacher.safetensors"
    target.write_bytes(file.read_bytes())
    run_ranks(__file__, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        make(target, tmp_path / "one", monkeypatch=patch, topk=4)
    assert contents(tmp_path / "cache") == contents(tmp_path / "one")
    cached = config(target, *SLOW, cache=tmp_path / "one")
    one = losses(trainer(tmp_path / "alone", cached), 14)
    two = torch.stack([torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)])
    assert len(set(one.tolist())) == 14 and not torch.equal(*two)
    torch.testing.assert_close(two.mean(0), one)


KILLS = ["half a file", "before the name", "after the name", "between shards", "in the plan"]


@pytest.mark.parametrize("when", KILLS)
def test_killed_at_any_point_and_made_again_gives_the_same_bytes(
    when: str, made: Path, tmp_path: Path, again: Callable[[Path], Any]
) -> None:
    folder = tmp_path / "c"
    child = os.fork()
    if not child:  # what it computes by then is the same, too
        try:
            _die(when)
            again(folder)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    there = set(contents(folder))
    assert there != set(contents(made))
    before = {name for name in there if re.search(r"/shard-\d+.safetensors$", name)}
    found = again(folder)
    assert (found.kept, found.bad) == (len(before), [])
    assert contents(folder) == contents(made)


def _die(when: str) -> None:
    """Lets this process kill itself while it makes the second shard."""
    real, calls = {"link": os.link, "fsync": os.fsync}, [0]

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def link(source: Any, target: Any) -> None:
        if when == "in the plan":
            die()
        calls[0] += Path(target).name.startswith("shard")
        if calls[0] == 2 and when == "before the name":
            die()
        if calls[0] == 2 and when == "half a file":
            os.truncate(source, 100)
            die()
        real["link"](source, target)
        if calls[0] == 2 and when == "after the name":
            die()

    def fsync(descriptor: int) -> None:
        real["fsync"](descriptor)
        if calls[0] == 1 and when == "between shards":
            die()

    os.link, os.fsync = link, fsync  # type: ignore[assignment]


DAMAGES: dict[str, tuple[Callable[[bytes, int], bytes], str]] = {
    "a flipped bit of a value": (lambda x, head: _flip(x, len(x) - 3), "is damaged"),
    "a flipped bit of a sum": (lambda x, head: _flip(x, head), "is damaged"),
    "a flipped bit of the checksum": (
        lambda x, head: _flip(x, x.index(b"sha256") + 12), "is damaged",
    ),
    "a flipped bit of a name": (lambda x, head: _flip(x, x.index(b"values")), "is damaged"),
    "a flipped bit of the length": (lambda x, head: _flip(x, 1), "is damaged"),
    "cut": (lambda x, head: x[:-1], "is cut: "),
    "empty": (lambda x, head: b"", "is cut: 0 bytes"),
    "longer": (lambda x, head: x + b"0", "is cut: "),
    "another shard": (lambda x, head: x, "is damaged"),
}  # fmt: skip


def _flip(x: bytes, place: int) -> bytes:
    return x[:place] + bytes([x[place] ^ 4]) + x[place + 1 :]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_found_named_and_made_again_alone(
    damage: str, made: Path, tmp_path: Path, again: Callable[[Path], Any]
) -> None:
    _copy(made, tmp_path / "c")
    read, place = Plan.read(made), Place(1, 1)
    path = tmp_path / "c" / place.file
    whole = path.read_bytes()
    change, why = DAMAGES[damage]
    if damage == "another shard":
        whole = (made / Place(0, 1).file).read_bytes()
    path.unlink()
    path.write_bytes(change(whole, len(shards.header(read, place, "0" * 64))))
    others = {x: x.stat().st_mtime_ns for x in (tmp_path / "c").glob("epoch*/*") if x != path}
    assert why in shards.fault(tmp_path / "c", read, place)
    # a run does not read it
    with pytest.raises(CacheError, match=rf"shard-00001.*{why}.*--rebuild"):
        cached = CachedTeacher(tmp_path / "c")
        cached.rows(0, np.array([70]))  # sound
        cached.rows(1, np.array([70]))
    found = again(tmp_path / "c")
    assert found.made == 1 and found.kept == 2 * SHARDS - 1
    assert [line.split(": ")[0] for line in found.bad] == [str(path)] and why in found.bad[0]
    assert contents(tmp_path / "c") == contents(made)
    assert others == {x: x.stat().st_mtime_ns for x in others}


def _copy(folder: Path, to: Path) -> None:
    for name, x in contents(folder).items():
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        (to / name).write_bytes(x)
    (to / "config.yaml").write_bytes((folder / "config.yaml").read_bytes())


def test_verify_asks_the_teacher_again(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(plan, "_SHARD_ROWS", ROWS)
    _copy(made, tmp_path / "c")
    found = verify(tmp_path / "c", samples=20, seed=0)
    assert (found.bad, found.asked, found.pixels) == ([], 20, [])
    assert found.distance < 1e-5
    # sound files whose contents no teacher said: what checksums do not find
    read, place = Plan.read(made), Place(0, 0)
    columns = {name: x.copy() for name, x in shards.opened(made, read, place).items()}
    with pytest.raises(CacheError, match=r"shard-00000\.safetensors: holds other outputs"):
        wrong = columns | {"values": columns["values"] - np.float16(1)}
        shards.commit(tmp_path / "c", read, place, wrong)
    assert not shards.commit(tmp_path / "c", read, place, columns)  # the same
    assert contents(tmp_path / "c") == contents(made)
    for name, change in (("values", np.float16(1)), ("pixels", np.uint32(1))):
        for every in read.places():
            columns = {k: x.copy() for k, x in shards.opened(made, read, every).items()}
            columns[name] = columns[name] - change
            (tmp_path / "c" / every.file).unlink()
            shards.commit(tmp_path / "c", read, every, columns)
        found = verify(tmp_path / "c", samples=4)
        assert not found.bad and found.equal == 0
        assert (found.distance > found.allowed) == (name == "values")
        assert len(found.pixels) == (4 if name == "pixels" else 0)
        with pytest.raises(SystemExit) as stop:
            _vitkd(monkeypatch, "cache", "verify", str(tmp_path / "c"))
        assert stop.value.code == 1
        assert "sees or says something else now" in capsys.readouterr().err


def _vitkd(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["vitkd", *arguments])
    cli.main()


def test_the_command_line(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = str(tmp_path / "c")
    command = ["cache", "digits", *DATA, "-o", folder]
    options = ["--epochs", "2", "--topk", "3", "--features", "pooled", "--features", "patch:-1"]
    # a run's configuration may name the cache already
    for text, named in (("2 made, 0 kept", ""), ("0 made, 2 kept", f", cache: {folder}")):
        with pytest.raises(SystemExit) as stop:
            _vitkd(monkeypatch, *command, f"teacher={{model: {file}{named}}}", *options)
        assert not stop.value.code
        out = capsys.readouterr().out
        assert text in out and "179 images, 2 epochs, 3 of 10 classes" in out
    (tmp_path / "c" / Place(1, 0).file).write_bytes(b"")
    for extra, code in ((["--rebuild"], 0), ([], 0)):
        with pytest.raises(SystemExit) as stop:
            _vitkd(monkeypatch, "cache", "verify", folder, "--samples", "5", *extra)
        out, err = capsys.readouterr()
        assert stop.value.code in (code, None), err
        assert ("1 of 2" if extra else "2 of 2") + " shards are sound" in out
        assert ("1 made, 1 kept" in out) == bool(extra)
    (tmp_path / "c" / Place(1, 0).file).unlink()
    with pytest.raises(SystemExit) as stop:
        _vitkd(monkeypatch, "cache", "verify", folder, "--samples", "0")
    out, err = capsys.readouterr()
    assert stop.value.code == 1 and "epoch-00001/shard-00000.safetensors: is missing" in out
    assert "1 bad shards" in err


def test_a_full_disk_is_an_error(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: Callable[[Path], Any]
) -> None:
    real, calls = os.fsync, [0]

    def full(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] == 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            again(tmp_path / "c")
    there = contents(tmp_path / "c")
    assert 1 < len(there) < len(contents(made)) and not any(".part" in name for name in there)
    with pytest.raises(CacheError, match=r"is missing: . of 6 shards are not there"):
        CachedTeacher(tmp_path / "c")
    again(tmp_path / "c")
    assert contents(tmp_path / "c") == contents(made)


def test_images_that_cannot_be_read_are_rows_that_say_so(
    file: Path, tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "images"
    for i, path in enumerate(sorted((image_folder / "train").rglob("*.png"))):
        (folder / path.parent.name).mkdir(parents=True, exist_ok=True)
        found = path.read_bytes()
        (folder / path.parent.name / path.name).write_bytes(found[:90] if i == 2 else found)
    given = ["data.dataset=''", f"data.train={folder}", "data.holdout=0.1"]
    monkeypatch.setattr(plan, "_SHARD_ROWS", ROWS)
    with pytest.raises(DataError, match="cannot be read"):
        build(config(file, *given), tmp_path / "c", Options(1))
    whole = config(file, *given, "data.skip_bad=true")
    build(whole, tmp_path / "c", Options(1))
    cached = CachedTeacher(tmp_path / "c")
    rows = cached.rows(0, np.arange(cached.plan.images))
    (bad,) = np.nonzero(np.isnan(rows["log_sum_exp"][:, 0]))
    assert len(bad) == 1
    assert not verify(tmp_path / "c", samples=300).pixels
    splits = sources.open_data(whole.data)
    transform = augment.Augment(whole.data, whole.augmentation)
    loader = data.Loader(splits.train, transform, whole.data, seed=0, drawn=cached.drawn)
    for batch in loader.epoch(0):
        assert cached.outputs(batch, 0).logits.isfinite().all()
    # it can be read now
    path = splits.train.name(int(bad[0]))
    Image.new("RGB", (8, 8)).save(path)
    with pytest.raises(CacheError, match=f"image {bad[0]} could not be read when"):
        for batch in data.Loader(
            splits.train, transform, whole.data, seed=0, drawn=cached.drawn
        ).epoch(0):
            cached.outputs(batch, 0)


def test_an_image_that_the_teacher_did_not_see_is_refused(file: Path, made: Path) -> None:
    cached = CachedTeacher(made)
    whole = config(file)
    splits = sources.open_data(whole.data)
    transform = augment.Augment(whole.data, whole.augmentation)
    loader = data.Loader(splits.train, transform, whole.data, seed=3, drawn=cached.drawn)
    batch = next(loader.epoch(0))
    cached.outputs(batch, 0)
    with pytest.raises(CacheError, match=r"image \d+ has other pixels than the teacher saw"):
        cached.outputs(batch, 1)  # of another epoch
    assert checksum(batch.images[0]) != checksum(batch.images[0].flip(2))


@pytest.mark.parametrize(
    "overrides,options,why",
    [
        (["augmentation.mixup=0.2"], {}, "augmentation.mixup: expected 0, as it mixes"),
        (["augmentation.cutmix=1.0"], {}, "augmentation.cutmix: expected 0"),
        (["teacher={model: vit_tiny_patch16_224, epochs: 3}"], {}, "teacher.epochs: expected 0"),
        (["teacher={model: vit_tiny_patch16_224}"], {}, "would teach with random weights"),
        (["losses={ce: {}}", "teacher={}"], {}, "teacher.model: missing"),
        (
            ["teacher={}", "teachers=[{model: vit_tiny_patch16_224}, {model: resnet18}]"],
            {}, "teachers: expected one",
        ),
        (["data.unlabelled=true", "losses={features: {}}"], {}, "data.unlabelled: expected false"),
        ([], {"topk": 11}, "--topk: expected 1 to 10 classes, got 11"),
        ([], {"features": ["maps"]}, "--features: expected pooled or patch:BLOCK, got maps"),
        ([], {"features": ["patch:2"]}, "--features: expected a block from -2 to 1, got patch:2"),
    ],
)  # fmt: skip
def test_what_cannot_be_cached_is_said(
    file: Path, tmp_path: Path, overrides: list[str], options: dict[str, Any], why: str
) -> None:
    with pytest.raises((ConfigError, ValueError), match=re.escape(why)):
        build(config(file, *overrides), tmp_path / "c", Options(1, **options))
    assert not (tmp_path / "c").exists()
    if overrides and why.startswith(("augmentation", "teacher.epochs", "data")):
        named = [x.replace("epochs: 3", "epochs: 3, cache: there") for x in overrides]
        with pytest.raises(ConfigError, match="teacher.cache: " + re.escape(why)):
            config(file, *named, cache=Path("there"))


def test_another_plan_does_not_go_on(
    made: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _copy(made, tmp_path / "c")
    before = contents(tmp_path / "c")
    for overrides, options, why in (
        ([], {"topk": 5}, "record.topk: 4 there, 5 here"),
        ([], {"topk": 4, "epochs": 3}, "epochs: 2 there, 3 here"),
        (["run.seeds=[4]"], {"topk": 4}, "seed: 3 there, 4 here"),
        (["data.batch_size=32"], {"topk": 4}, "batch_size: 16 there, 32 here"),
        (["losses.kd.temperature=2"], {"topk": 4}, r"record.temperatures: \[4.0\] there"),
    ):
        with pytest.raises(CacheError, match=f"holds another cache: {why}"):
            make(file, tmp_path / "c", *overrides, monkeypatch=monkeypatch, **options)  # type: ignore[arg-type]
    assert contents(tmp_path / "c") == before
    tree = (tmp_path / "c" / plan.FILE).read_text()
    (tmp_path / "c" / plan.FILE).write_text(tree.replace('"seed": 3', '"seed": 5'))
    with pytest.raises(CacheError, match=r"plan.json: is damaged"):
        Plan.read(tmp_path / "c")
    with pytest.raises(CacheError, match="holds no cache"):
        Plan.read(tmp_path)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "photo.jpg").write_bytes(b"")
    with pytest.raises(CacheError, match=r"is no cache, and holds photo\.jpg"):
        make(file, tmp_path / "d", monkeypatch=monkeypatch)


if __name__ == "__main__":
    _rank(int(sys.argv[1]), Path(sys.argv[2]))
