"""Where a cache lies: a folder, or a prefix in a bucket of S3 or of Google Cloud Storage.

All rests on one atomic operation, `create`: a file gets a name that was free, and is there entirely
or not at all. In a folder that is a hard link; in a bucket a conditional put, which S3 knows as
If-None-Match: * and Google as ifGenerationMatch=0. Stores without one are refused.

What is read of a bucket in training is fetched once to a local folder, and memory-mapped there.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeAlias

from ... import _files
from ..._extras import require

_PART = 50 << 20  # bytes of a part of an upload, which has several above twice that
_MODULES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}
_CONFLICTS = 8


class CacheError(ValueError):
    """A cache that cannot be used; the message names it."""


def at(place: str | Path | Folder | Bucket) -> Folder | Bucket:
    """A store by its path or URL: file://, s3:// or gs://.

    Raises:
        CacheError: a URL of another store.
        ImportError: what an URL needs is not installed (the extra `store`).
    """
    if isinstance(place, (Folder, Bucket)):
        return place
    scheme, separator, rest = str(place).partition("://")
    if not separator or scheme == "file":
        return Folder(Path(rest if separator else scheme))
    if scheme not in _MODULES:
        raise CacheError(
            f"{place}: expected a folder, or a URL that begins with file://, s3:// or gs://; of "
            f"{scheme}:// it is not known that a put can be refused where a file is there"
        )
    return Bucket(str(place))


class Folder:
    """On storage that all machines share and that knows hard links."""

    shared: Path  # where notes of processes may lie, too

    def __init__(self, path: Path) -> None:
        self.path = self.shared = path

    def __str__(self) -> str:
        return str(self.path)

    def name(self, file: str) -> str:
        return str(self.path / file)

    def absolute(self) -> Folder:
        return Folder(self.path.absolute())

    def create(self, file: str, *data: bytes) -> bool:
        """Writes a file; False, and nothing, where one of this name is there."""
        path = self.path / file
        path.parent.mkdir(exist_ok=True)
        if not _files.create(path, *data):
            return False
        _files.sync(self.path)
        return True

    def replace(self, file: str, *data: bytes) -> None:
        """Writes a file, whatever is there."""
        _files.replace(self.path / file, *data)

    def read(self, file: str) -> bytes:
        """Raises FileNotFoundError."""
        return (self.path / file).read_bytes()

    @contextmanager
    def local(self, file: str) -> Iterator[Path]:
        """A path at which to read it."""
        yield self.path / file

    def sizes(self) -> dict[str, int]:
        """Of every file in bytes, but hidden ones."""
        if not self.path.is_dir():
            return {}
        found: dict[str, int] = {}
        for entry in os.scandir(self.path):
            inside = os.scandir(entry) if entry.is_dir() else [entry]
            if not entry.name.startswith("."):
                found |= {os.path.relpath(x.path, self.path): x.stat().st_size for x in inside}
        return {name: size for name, size in found.items() if "/." not in name}

    def memory(self, file: str, size: int, group: str = "") -> memoryview:
        """The bytes of a file, memory-mapped; raises FileNotFoundError."""
        return _mapped(self.path / file)

    def forget(self, file: str, group: str) -> bool:
        """Whether `memory` will read another copy from now on."""
        return False

    def free(self) -> int | None:
        """Bytes; None: it has no end."""
        existing = next(x for x in (self.path, *self.path.absolute().parents) if x.exists())
        of = os.statvfs(existing)
        return of.f_bavail * of.f_frsize

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other runs out.

        Raises:
            CacheError: there is one.
        """
        with ExitStack() as stack:
            try:
                stack.enter_context(_files.locked(self.path))
            except BlockingIOError:
                raise CacheError(f"-o: {self} is in use by another process") from None
            yield

    def clear(self) -> None:
        """Removes what processes that were killed had begun."""
        for part in self.path.glob("**/.*.part"):
            part.unlink(missing_ok=True)


class Bucket:
    """A prefix in a bucket. Several may write into it at once: what is there is not changed."""

    shared = None

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        scheme = url.partition("://")[0]
        require("store", url, ("fsspec", _MODULES[scheme]))
        import fsspec

        # others write, so a listing is of the moment
        self.fs, self.root = fsspec.url_to_fs(self.url, use_listings_cache=False)
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        self.copies = Path(cache, "vitkd_fast", hashlib.sha256(self.url.encode()).hexdigest()[:16])

    def __str__(self) -> str:
        return self.url

    def name(self, file: str) -> str:
        return f"{self.url}/{file}"

    def absolute(self) -> Bucket:
        return self

    def create(self, file: str, *data: bytes) -> bool:
        """See `Folder.create`."""
        for again in range(_CONFLICTS):
            try:
                self._put(file, "create", data)
                return True
            except FileExistsError:
                return False
            except OSError as error:
                if _code(error) in ("PreconditionFailed", "412"):  # of servers that say no more
                    return False
                # of two puts at once S3 may refuse both
                if _code(error) not in ("ConditionalRequestConflict", "409"):
                    raise
                time.sleep(0.1 * 2**again)
        raise OSError(f"{self.name(file)}: {_CONFLICTS} puts at once with others were refused")

    def replace(self, file: str, *data: bytes) -> None:
        self._put(file, "overwrite", data)

    def _put(self, file: str, mode: str, data: tuple[bytes, ...]) -> None:
        # not by a file that is opened: one that is left by an exception is committed as it is
        with self._named(file):
            self.fs.pipe_file(f"{self.root}/{file}", b"".join(data), mode=mode, chunksize=_PART)

    def read(self, file: str) -> bytes:
        with self._named(file):
            return bytes(self.fs.cat_file(f"{self.root}/{file}"))

    @contextmanager
    def local(self, file: str) -> Iterator[Path]:
        with TemporaryDirectory() as folder:
            path = Path(folder, Path(file).name)
            path.write_bytes(self.read(file))
            yield path

    def sizes(self) -> dict[str, int]:
        with self._named(""):
            try:
                found = self.fs.find(self.root, detail=True)
            except FileNotFoundError:
                return {}
        return {name[len(self.root) + 1 :]: about["size"] for name, about in found.items()}

    def memory(self, file: str, size: int, group: str = "") -> memoryview:
        """Of a `group`, from a local copy, which has this size or is made anew."""
        if not group:
            return memoryview(self.read(file))
        path = self.copies / group / file
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_name(f".{path.name}.lock"), "w") as lock:
            # the processes of a machine fetch it once
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists() or path.stat().st_size != size:
                with _files.replacing(path) as part:
                    part.write_bytes(self.read(file))
        return _mapped(path)

    def forget(self, file: str, group: str) -> bool:
        (self.copies / group / file).unlink(missing_ok=True)
        return True

    def free(self) -> None:
        return None

    def locked(self) -> AbstractContextManager[None]:
        return nullcontext()

    def clear(self) -> None:
        """There is nothing: what is half written has no name."""

    @contextmanager
    def _named(self, file: str) -> Iterator[None]:
        """Errors of the network are OSErrors that name the file."""
        try:
            yield
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.name(file)} is not there") from None
        except FileExistsError:
            raise
        except Exception as error:
            text = " ".join(str(error).split())
            raise OSError(f"{self.name(file)}: {type(error).__name__}: {text}") from error


def _code(error: BaseException) -> str:
    """The code that a server gave, of the exceptions that led to this one."""
    cause: BaseException | None = error
    while cause is not None:
        with suppress(AttributeError, KeyError, TypeError):
            return str(cause.response["Error"]["Code"])  # type: ignore[attr-defined]
        cause = cause.__cause__
    return ""


def _mapped(path: Path) -> memoryview:
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return memoryview(b"")
        return memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))


Store: TypeAlias = Folder | Bucket
Where: TypeAlias = str | Path | Folder | Bucket
