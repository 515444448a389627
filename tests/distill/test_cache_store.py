"""Caches in buckets: the bytes of a folder, by puts that replace nothing.

What needs an S3 server is skipped where moto's is not installed.
"""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from support.cache_tools import (
    ROWS,
    SHARDS,
    config,
    contents,
    copied,
    losses,
    make,
    save_teacher,
    trainer,
)
from support.cluster_tools import Died, of_a_cluster, pretend
from support.gcs_tools import gcs_server, of_gcs
from support.s3_tools import of_s3, s3_server
from vitkd_fast import _cluster, _extras
from vitkd_fast._cluster import Note
from vitkd_fast.distill.cache import CacheError, Plan, cluster, plan, quarantine, shards, store
from vitkd_fast.distill.cache.build import Options, build, verify
from vitkd_fast.distill.cache.plan import Place
from vitkd_fast.distill.cache.read import CachedTeacher

pytestmark = pytest.mark.usefixtures("one_thread")
TOPK = 4


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "teacher.safetensors")


@pytest.fixture(scope="module")
def made(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache in a folder; nothing changes it."""
    folder = tmp_path_factory.mktemp("caches") / "one"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        make(file, folder, monkeypatch=patch, topk=TOPK)
    torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    with s3_server() as files:
        yield files


@pytest.fixture(autouse=True)
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_SHARD_ROWS", ROWS)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


def upload(s3: Any, folder: Path, name: str) -> str:
    """A cache by hand; its URL."""
    for path in folder.rglob("*"):
        if path.is_file() and path.name != ".lock":
            s3.pipe_file(f"bucket/{name}/{path.relative_to(folder)}", path.read_bytes())
    return f"s3://bucket/{name}"


def there(s3: Any, name: str) -> dict[str, bytes]:
    """Of every file but the configuration."""
    found = {path: s3.cat_file(path) for path in s3.find(f"bucket/{name}")}
    kept = {path.removeprefix(f"bucket/{name}/"): x for path, x in found.items()}
    return {path: x for path, x in kept.items() if path != "config.yaml"}


@pytest.fixture
def sent(s3: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """The requests that write, and their conditions."""
    found: list[tuple[str, str | None]] = []
    kind, real = type(s3), type(s3)._call_s3

    async def call(self: Any, method: str, *given: Any, **more: Any) -> Any:
        if method in ("put_object", "complete_multipart_upload"):
            found.append((method, more.get("IfNoneMatch")))
        return await real(self, method, *given, **more)

    monkeypatch.setattr(kind, "_call_s3", call)
    return found


# ---- without a server


@pytest.mark.parametrize("url", ["memory://cache", "http://host/cache", "abfs://container/cache"])
def test_stores_without_a_conditional_put_are_refused_by_name(
    url: str, file: Path, vitkd: Any
) -> None:
    with pytest.raises(CacheError, match=rf"^{url}: expected a folder, or a URL that begins"):
        store.at(url)
    found = vitkd("cache", "verify", url)
    assert found.code == 1 and f"CacheError: {url}: expected a folder" in found.err
    found = vitkd("cache", "digits", f"teacher={{model: {file}}}", "-o", url, "--epochs", 1)
    assert found.code == 1 and f"CacheError: {url}: expected a folder" in found.err


@pytest.mark.parametrize("url,module", [("s3://bucket/a", "s3fs"), ("gs://bucket/a", "gcsfs")])
def test_a_missing_extra_is_named(url: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extras, "find_spec", lambda name: name != module or None)
    why = rf'{url} needs {module}, .*not installed: pip install "vitkd-fast\[store\]"'
    with pytest.raises(ImportError, match=why):
        store.at(url)


def test_a_url_of_a_folder_is_the_folder(made: Path) -> None:
    url = f"file://{made}"
    assert store.at(url).name("a/b") == f"{made}/a/b" == store.at(made).name("a/b")
    assert Plan.read(url) == Plan.read(str(made)) == Plan.read(made)
    sizes = store.at(url).sizes()
    assert sizes == {name: len(x) for name, x in contents(made).items()} | {
        "config.yaml": (made / "config.yaml").stat().st_size
    }
    assert CachedTeacher(url).example().logits.shape == (1, 0)


# ---- with one


@of_s3
def test_a_bucket_holds_the_bytes_of_a_folder(
    s3: Any, file: Path, made: Path, sent: list[Any]
) -> None:
    url = "s3://bucket/new/cache"
    found = build(config(file), url, Options(2, TOPK))
    assert (found.made, found.kept, found.bad) == (2 * SHARDS, 0, [])
    assert there(s3, "new/cache") == contents(made)
    # all but the configuration are puts that replace nothing
    assert sorted(sent, key=str) == sorted(
        [("put_object", "*")] * (2 * SHARDS + 2) + [("put_object", None)], key=str
    )
    # what is missing or cut is made again, and no more
    s3.rm(f"bucket/new/cache/{Place(1, 1).file}")
    s3.pipe_file(f"bucket/new/cache/{Place(0, 2).file}", b"cut")
    with pytest.raises(CacheError, match=rf"{url}/epoch-00000/.*02\.safetensors is cut: 3 bytes"):
        CachedTeacher(url)
    found = build(config(file), url, Options(2, TOPK))
    assert (found.made, found.kept) == (2, 2 * SHARDS - 2)
    assert found.bad[0].startswith(f"{url}/{Place(0, 2).file}: is cut")
    assert there(s3, "new/cache") == contents(made)
    with pytest.raises(CacheError, match=rf"-o: {url} holds another cache: record\.topk: 4"):
        build(config(file), url, Options(2, 3))
    with pytest.raises(CacheError, match=r"-o: s3://bucket/new is no cache, and holds cache/"):
        build(config(file), "s3://bucket/new", Options(2, TOPK))


@of_s3
def test_verify_reads_what_is_in_the_bucket(s3: Any, made: Path, vitkd: Any) -> None:
    url = upload(s3, made, "verified")
    CachedTeacher(url).rows(0, np.arange(179))  # local copies are not what is verified
    assert vitkd("cache", "verify", url, "--samples", 5).code == 0
    name = f"bucket/verified/{Place(0, 1).file}"
    whole = s3.cat_file(name)
    s3.pipe_file(name, whole[:-1] + bytes([whole[-1] ^ 1]))
    found = vitkd("cache", "verify", url, "--samples", 5)
    assert found.code == 1 and f"s3://{name}: is damaged: its checksum" in found.out
    assert vitkd("cache", "verify", url, "--samples", 0, "--rebuild").code == 0
    assert there(s3, "verified") == contents(made)


@of_s3
def test_training_fetches_a_shard_once(
    s3: Any, file: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, got = upload(s3, made, "trained"), []
    real = store.Bucket.read

    def read(self: Any, name: str) -> bytes:
        got.append(name)
        return real(self, name)

    monkeypatch.setattr(store.Bucket, "read", read)
    run = ["run.epochs=3", "run.max_steps=25"]
    found = [
        losses(trainer(tmp_path / name, config(file, *run, cache=cache)), 14)  # over an epoch
        for name, cache in (("bucket", url), ("folder", made), ("again", url))
    ]
    assert torch.equal(found[0], found[1]) and torch.equal(found[2], found[1])
    of_shards = [name for name in got if "shard" in name]
    assert sorted(of_shards) == [x.file for x in Plan.read(made).places()]
    copies = sorted((tmp_path / "xdg").rglob("shard-*.safetensors"))
    assert [x.read_bytes() for x in copies] == [(made / name).read_bytes() for name in of_shards]
    # a copy that is cut or damaged is fetched again
    copies[0].write_bytes(b"")
    copies[1].write_bytes(bytes(copies[1].stat().st_size))
    rows = CachedTeacher(url).rows(0, np.arange(179))
    expected = CachedTeacher(made).rows(0, np.arange(179))
    assert all(np.array_equal(rows[name], x) for name, x in expected.items())
    # and what is damaged in the bucket is an error
    s3.pipe_file(f"bucket/trained/{Place(0, 0).file}", bytes(copies[0].stat().st_size))
    copies[0].unlink()
    with pytest.raises(
        CacheError, match=rf"teacher\.cache: {url}/.*00000\.safetensors: is damaged"
    ):
        CachedTeacher(url).rows(0, np.arange(10))


@of_s3
def test_what_is_there_is_never_replaced(s3: Any, made: Path, sent: list[Any]) -> None:
    url, place = upload(s3, made, "raced"), Place(0, 1)
    read, name = Plan.read(made), f"bucket/raced/{place.file}"
    columns = {key: x.copy() for key, x in shards.opened(made, read, place).items()}
    assert not shards.commit(url, read, place, columns)  # the same
    other = columns | {"values": columns["values"] + 1}
    with pytest.raises(CacheError, match=rf"s3://{name}: holds other outputs"):
        shards.commit(url, read, place, other)
    whole = s3.cat_file(name)
    for _ in range(3):  # two that make it at once, and differ
        s3.rm(name)
        together, results = threading.Barrier(2), []

        def commit(mine: Any, together: Any = together, results: list[Any] = results) -> None:
            together.wait()
            try:
                results.append(shards.commit(url, read, place, mine))
            except CacheError as error:
                results.append(str(error))

        threads = [threading.Thread(target=commit, args=(x,)) for x in (columns, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(map(str, results))[0] == "True"
        assert "holds other outputs" in str(next(x for x in results if x is not True))
    s3.pipe_file(name, whole[:100])
    sent.clear()
    assert shards.commit(url, read, place, columns)  # a damaged one is
    assert s3.cat_file(name) == whole and sent == [("put_object", "*"), ("put_object", None)]


@of_s3
def test_an_upload_of_several_parts_replaces_nothing_either(
    s3: Any, monkeypatch: pytest.MonkeyPatch, sent: list[Any]
) -> None:
    monkeypatch.setattr(store, "_PART", 5 << 20)  # the least that S3 knows
    bucket, size = store.at("s3://bucket/large"), 11 << 20
    assert bucket.create("a", b"1", bytes(size))
    assert not bucket.create("a", b"2", bytes(size))
    assert sent == [("complete_multipart_upload", "*")] * 2
    assert bucket.read("a") == b"1" + bytes(size)
    bucket.replace("a", b"3", bytes(size))
    assert bucket.read("a")[:1] == b"3"


@of_s3
def test_a_server_that_knows_no_conditions_is_refused(
    s3: Any, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, real = type(s3), type(s3)._call_s3

    async def call(self: Any, *given: Any, IfNoneMatch: str = "", **more: Any) -> Any:
        return await real(self, *given, **more)

    monkeypatch.setattr(kind, "_call_s3", call)
    with pytest.raises(CacheError, match=r"-o: s3://bucket/old: its server replaces a file"):
        build(config(file), "s3://bucket/old", Options(1, TOPK))
    assert not s3.glob("bucket/old/epoch*")


@of_s3
@pytest.mark.parametrize("code", ["PreconditionFailed", "ConditionalRequestConflict"])
def test_what_servers_say_instead(
    code: str, s3: Any, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refusal without its reason, and one of two puts at once, after which there may be none."""
    bucket, refused = store.at(f"s3://bucket/{code}"), []
    real = bucket.fs.pipe_file

    def pipe_file(*given: Any, **more: Any) -> Any:
        if len(refused) < 2:
            refused.append(given)
            cause = Exception()
            cause.response = {"Error": {"Code": code}}  # type: ignore[attr-defined]
            raise OSError(5, "refused") from cause
        return real(*given, **more)

    monkeypatch.setattr(store.time, "sleep", lambda seconds: None)
    bucket.fs = SimpleNamespace(pipe_file=pipe_file)
    assert bucket.create("a", b"1") == (code != "PreconditionFailed")
    assert s3.exists(f"bucket/{code}/a") == (code != "PreconditionFailed")
    assert len(refused) == (1 if code == "PreconditionFailed" else 2)
    refused.clear()
    bucket.fs.pipe_file = lambda *x, **y: (_ for _ in ()).throw(ConnectionError("no route"))
    with pytest.raises(OSError, match=rf"s3://bucket/{code}/b: ConnectionError: no route"):
        bucket.create("b", b"1")


@of_s3
def test_an_image_that_kills_its_process_is_found_without_shared_storage(
    s3: Any, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[Path] = []

    def dies(call: Any) -> None:
        notes.append(call.note)
        if 70 in plan_of.rows_of(call.piece) and 70 not in call.left_out:
            Note(7, 70).write(call.note)
            raise Died("gone")

    def on_machine(ray: Any, node: str, function: Any, *given: Any) -> Any:
        return function(*given)

    monkeypatch.setattr(_cluster, "on_machine", on_machine)
    build(config(file), tmp_path / "one", Options(1, TOPK))
    plan_of = Plan.read(tmp_path / "one")
    with pretend(monkeypatch, dies) as ray:
        cluster.build(config(file), "s3://bucket/dying", Options(1, TOPK))
    assert len(ray.actors) == 2 + 3 and list(quarantine.read("s3://bucket/dying")) == [70]
    assert not any(note.exists() for note in notes)
    ours, theirs = there(s3, "dying"), contents(tmp_path / "one")
    assert list(json.loads(ours.pop(quarantine.FILE))) == ["70"]
    assert {name for name in theirs if ours[name] != theirs[name]} == {Place(0, 1).file}
    sums = CachedTeacher("s3://bucket/dying").rows(0, np.arange(179))["log_sum_exp"]
    assert np.nonzero(np.isnan(sums[:, 0]))[0].tolist() == [70]
    assert verify("s3://bucket/dying", samples=100, seed=0).pixels == []


@of_gcs
def test_google_cloud_storage(
    file: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with gcs_server() as server:
        url = "gs://bucket/a/cache"
        build(config(file), url, Options(2, TOPK))
        found = {name.removeprefix("a/cache/"): x for name, x in server.objects.items()}
        found.pop("config.yaml")
        assert found == contents(made)
        assert server.writes.count(("multipart", "0")) == 2 * SHARDS + 2  # and one that replaces
        assert server.writes.count(("multipart", None)) == 1 == len(server.writes) - 2 * SHARDS - 2
        assert build(config(file), url, Options(2, TOPK)).kept == 2 * SHARDS
        cached = config(file, "run.epochs=3", cache=url)
        online = config(file, "run.epochs=3", cache=made)
        assert torch.equal(*(losses(trainer(tmp_path, x), 4) for x in (cached, online)))
        server.writes.clear()
        monkeypatch.setattr(store, "_PART", 1 << 18)
        bucket = store.at("gs://bucket/large")
        assert bucket.create("a", b"1", bytes(600_000))
        assert not bucket.create("a", b"2", bytes(600_000))
        assert server.writes == [("resumable", "0")] * 2
        assert bucket.read("a") == b"1" + bytes(600_000)


@of_s3
@of_a_cluster
@pytest.mark.slow
def test_a_cluster_makes_a_cache_in_a_bucket(
    s3: Any, machines: Any, file: Path, image_folder: Path, tmp_path: Path
) -> None:
    whole = config(file, *copied(image_folder, tmp_path / "images", kills=b""))
    made = cluster.build(whole, "s3://bucket/cluster", Options(2, TOPK), 3)
    assert (made.kept, made.bad) == (0, [])
    [killer] = quarantine.read("s3://bucket/cluster").values()
    assert killer.endswith("kills.png")
    Path(killer).write_bytes(b"")
    skipping = whole.model_copy(update={"data": whole.data.model_copy(update={"skip_bad": True})})
    build(skipping, tmp_path / "one", Options(2, TOPK))
    ours, theirs = there(s3, "cluster"), contents(tmp_path / "one")
    ours.pop(quarantine.FILE)
    assert ours == theirs
    assert not list(Path("/tmp").glob(".vitkd-*.note"))
