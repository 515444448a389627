"""The state of a run in one safetensors file: no pickle, replaced by one rename.

Random numbers are a function of (seed, step, rank) and are not stored (data.py, loop.py).
"""

from __future__ import annotations

import fcntl
import json
import shutil
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .._files import replacing

VERSION = 1


class CheckpointError(ValueError):
    """A checkpoint or a folder that cannot be used; the message names it."""


def save(
    path: Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer, info: dict
) -> None:
    """Writes modules, optimiser and `info` (JSON) to `path`, atomically."""
    tensors: dict[str, Tensor] = {}
    for name, module in modules.items():
        tensors |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
    state = optimizer.state_dict()
    numbers: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{key}"] = value
            else:
                numbers.setdefault(str(index), {})[key] = value
    groups = [dict(group) for group in state["param_groups"]]
    for i, group in enumerate(groups):
        # timm's lamb counts its steps in a tensor of the group
        for key in [key for key, value in group.items() if isinstance(value, Tensor)]:
            tensors[f"group.{i}.{key}"] = group.pop(key)
    header = {"version": VERSION, "info": info, "groups": groups, "numbers": numbers}
    tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    with replacing(path) as part:
        save_file(tensors, part, metadata={"checkpoint": json.dumps(header)})


def restore(
    path: Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Loads the state, memory layouts included, and returns `info`.

    Raises:
        CheckpointError: the file is damaged, or a checkpoint of other modules.
    """
    header = read_header(path)
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    try:
        for name, module in modules.items():
            prefix = f"{name}."
            module.load_state_dict(
                {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            )
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, Any]] = {
            int(index): dict(entries) for index, entries in header["numbers"].items()
        }
        for key, value in tensors.items():
            if key.startswith("group."):
                _, index, entry = key.split(".", 2)
                header["groups"][int(index)][entry] = value
            elif key.startswith("optimizer."):
                _, index, entry = key.split(".", 2)
                parameter = parameters[int(index)]
                if value.shape == parameter.shape:
                    # channels_last, as it was: else every update would mix two layouts
                    value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
                state.setdefault(int(index), {})[entry] = value
        optimizer.load_state_dict({"state": state, "param_groups": header["groups"]})
    except (RuntimeError, ValueError, IndexError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{path}: is of another model or optimiser: {reason}") from error
    return header["info"]


def tensors(path: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint whose names begin with the prefix.

    Raises:
        CheckpointError: the file is damaged, or of another version.
    """
    read_header(path)
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}


def read_header(path: Path) -> dict[str, Any]:
    """What is not a tensor, `info` among it.

    Raises:
        CheckpointError: the file is damaged, or of another version.
    """
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("checkpoint", "null"))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: expected a checkpoint: {error}") from error
    if not header or header.get("version") != VERSION:
        raise CheckpointError(f"{path}: expected a checkpoint of version {VERSION}")
    return header


def check_folder(folder: Path, need: int) -> None:
    """Makes the folder, and finds out before any work whether `need` bytes can be written there.

    Raises:
        CheckpointError: naming the folder and the reason.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.write_bytes(b"0")
        probe.unlink()
    except OSError as error:
        raise CheckpointError(f"run.folder: {folder} cannot be written: {error}") from error
    if (left := free(folder)) < need:
        raise CheckpointError(
            f"run.folder: {folder} has {left >> 20} MiB left, and checkpoints take {need >> 20} MiB"
        )


def free(folder: Path) -> int:
    """Bytes that are free where a folder is, or would be."""
    there = next(x for x in (folder, *folder.absolute().parents) if x.exists())
    return shutil.disk_usage(there).free


def lock(folder: Path) -> IO[str]:
    """Keeps other processes out of a run's folder for as long as the file returned is open.

    Raises:
        CheckpointError: another process is in it.
    """
    file = open(folder / ".lock", "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise CheckpointError(f"run.folder: {folder} is in use by another process") from error
    return file
