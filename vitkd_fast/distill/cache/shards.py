"""A shard: a safetensors file whose header holds plan, place and checksum, written atomically.

The bytes are a function of the plan, the place and the columns: the header is made here, and is
compared as a whole. A shard is there entirely or not at all: it is written beside its name, synced,
and linked to it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .plan import CacheError, Place, Plan, sync

METADATA = "vitkd_fast.cache"
_SAFETENSORS = {"<f4": "F32", "<u4": "U32", "<i4": "I32", "<f2": "F16", "<u2": "U16", "|i1": "I8"}
Columns = Mapping[str, np.ndarray[Any, Any]]


def header(plan: Plan, place: Place, digest: str) -> bytes:
    """What a shard begins with; its length depends on the plan and the place alone."""
    rows, offset = len(plan.rows_of(place)), 0
    about = {"plan": plan.fingerprint, "epoch": place.epoch, "shard": place.shard, "sha256": digest}
    tree: dict[str, Any] = {"__metadata__": {METADATA: json.dumps(about)}}
    for name, column in plan.columns.items():
        end = offset + rows * column.bytes
        tree[name] = {
            "dtype": _SAFETENSORS[column.dtype],
            "shape": [rows, *column.shape],
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(tree, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)  # columns begin at a multiple of 64 bytes
    return len(text).to_bytes(8, "little") + text


def commit(folder: Path, plan: Plan, place: Place, columns: Columns) -> bool:
    """Writes a shard under its name, atomically; False if the same bytes were there.

    A damaged shard is replaced.

    Raises:
        CacheError: a sound shard with other contents is there.
        OSError: such as a full disk; then the name is as it was.
    """
    rows = len(plan.rows_of(place))
    parts = []
    for name, column in plan.columns.items():
        x = np.ascontiguousarray(columns[name], column.dtype)
        if x.shape != (rows, *column.shape):
            raise ValueError(
                f"shards.commit: {name}: expected {[rows, *column.shape]}, got {list(x.shape)}"
            )
        parts.append(x.tobytes())
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    path = folder / place.file
    path.parent.mkdir(exist_ok=True)
    # of this call alone: another process may make the same shard
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        with open(beside, "wb") as file:
            file.write(header(plan, place, digest.hexdigest()))
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(beside, path)
        except OSError as error:
            if error.errno != errno.EEXIST:
                raise
            if path.read_bytes() == beside.read_bytes():
                return False
            if not fault(folder, plan, place):
                raise CacheError(
                    f"{path}: holds other outputs of the teacher than this process computed for "
                    "the same plan; another machine or thread count may round differently"
                ) from None
            os.replace(beside, path)
        sync(path.parent)
        sync(folder)
    finally:
        beside.unlink(missing_ok=True)
    return True


def fault(folder: Path, plan: Plan, place: Place, contents: bool = True) -> str:
    """What is wrong with a shard: "is missing", "is cut", "is damaged"; "" for nothing.

    Without `contents`, only name and length are looked at.
    """
    path = folder / place.file
    try:
        length = path.stat().st_size
    except FileNotFoundError:
        return "is missing"
    head = len(header(plan, place, "0" * 64))
    expected = head + plan.stride * len(plan.rows_of(place))
    if length != expected:
        return f"is cut: {length} bytes, not {expected}"
    if not contents:
        return ""
    try:
        opened(folder, plan, place)
    except CacheError as error:
        return str(error).split(": ", 1)[1]
    return ""


def opened(folder: Path, plan: Plan, place: Place, checked: bool = False) -> Columns:
    """The columns of a shard, memory-mapped; unless `checked` before, its checksum is compared.

    Raises:
        CacheError: naming the file, and what is wrong with it.
    """
    path = folder / place.file
    if why := fault(folder, plan, place, contents=False):
        raise CacheError(f"{path}: {why}")
    with open(path, "rb") as file:
        memory = memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
    start = len(header(plan, place, "0" * 64))
    if not checked:
        digest = hashlib.sha256(memory[start:]).hexdigest()
        if memory[:start] != header(plan, place, digest):
            raise CacheError(f"{path}: is damaged: its checksum or its header is another")
    found, rows = {}, len(plan.rows_of(place))
    for name, column in plan.columns.items():
        count = rows * int(np.prod(column.shape, dtype=np.int64))
        x = np.frombuffer(memory, column.dtype, count, start)
        found[name] = x.reshape(rows, *column.shape)
        start += rows * column.bytes
    return found
