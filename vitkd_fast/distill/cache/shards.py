"""A shard: a safetensors file whose header holds plan, place and checksum, written atomically.

The bytes are a function of the plan, the place and the columns: the header is made here, and is
compared as a whole. A shard is there entirely or not at all, see `store`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from .plan import Place, Plan
from .store import CacheError, Where, at

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


def commit(folder: Where, plan: Plan, place: Place, columns: Columns) -> bool:
    """Writes a shard under its name, atomically; False if the same bytes were there.

    A damaged shard is replaced.

    Raises:
        CacheError: a sound shard with other contents is there.
        OSError: such as a full disk; then the name is as it was.
    """
    store, rows = at(folder), len(plan.rows_of(place))
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
    parts.insert(0, header(plan, place, digest.hexdigest()))
    if store.create(place.file, *parts):
        return True
    there = store.read(place.file)
    if there == b"".join(parts):
        return False
    if not _fault(there, plan, place):
        raise CacheError(
            f"{store.name(place.file)}: holds other outputs of the teacher than this process "
            "computed for the same plan; another machine or thread count may round differently"
        )
    store.replace(place.file, *parts)
    return True


def _length(plan: Plan, place: Place) -> int:
    return len(header(plan, place, "0" * 64)) + plan.stride * len(plan.rows_of(place))


def _fault(there: bytes | memoryview, plan: Plan, place: Place) -> str:
    """What is wrong with the bytes of a shard: "is cut", "is damaged"; "" for nothing."""
    if len(there) != (expected := _length(plan, place)):
        return f"is cut: {len(there)} bytes, not {expected}"
    start = len(header(plan, place, "0" * 64))
    digest = hashlib.sha256(memoryview(there)[start:]).hexdigest()
    if there[:start] != header(plan, place, digest):
        return "is damaged: its checksum or its header is another"
    return ""


def fault(folder: Where, plan: Plan, place: Place) -> str:
    """What is wrong with a shard: "is missing", "is cut", "is damaged"; "" for nothing."""
    try:
        return _fault(at(folder).memory(place.file, 0), plan, place)
    except FileNotFoundError:
        return "is missing"


def lengths(folder: Where, plan: Plan) -> dict[Place, str]:
    """Each shard that is missing or cut, by a look at names and lengths alone."""
    sizes, found = at(folder).sizes(), {}
    for place in plan.places():
        size, expected = sizes.get(place.file), _length(plan, place)
        if size is None:
            found[place] = "is missing"
        elif size != expected:
            found[place] = f"is cut: {size} bytes, not {expected}"
    return found


def opened(folder: Where, plan: Plan, place: Place, checked: bool = False) -> Columns:
    """The columns of a shard, memory-mapped; unless `checked` before, its checksum is compared.

    Raises:
        CacheError: naming the file, and what is wrong with it.
    """
    store, size, group = at(folder), _length(plan, place), plan.fingerprint
    try:
        memory = store.memory(place.file, size, group)
        why = "" if checked and len(memory) == size else _fault(memory, plan, place)
        if why and store.forget(place.file, group):
            memory = store.memory(place.file, size, group)
            why = _fault(memory, plan, place)
    except FileNotFoundError:
        why = "is missing"
    if why:
        raise CacheError(f"{store.name(place.file)}: {why}")
    start, found = len(header(plan, place, "0" * 64)), {}
    rows = len(plan.rows_of(place))
    for name, column in plan.columns.items():
        count = rows * int(np.prod(column.shape, dtype=np.int64))
        x = np.frombuffer(memory, column.dtype, count, start)
        found[name] = x.reshape(rows, *column.shape)
        start += rows * column.bytes
    return found
