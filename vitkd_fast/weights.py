"""Weights from a file, whoever wrote it: a state dict of tensors, and never code that is run.

Read are safetensors and torch.save's files, old and new, by timm, torch, Lightning and torchvision
(MobileNet V2 and V3, ViT). Any other file (a Git LFS pointer, a pickled model, ...) is an error of
one line, which starts with the file's name.
"""

from __future__ import annotations

import argparse
import json
import mmap
import re
import textwrap
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from timm.layers import Conv2dSame
from torch import Tensor, nn

# keys of the weights in a checkpoint, averaged ones first as in timm
_NESTS = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict")
# what wrappers put before a key: DataParallel, torch.compile, LightningModules, transformers' timm
_PREFIXES = ("module.", "_orig_mod.", "student.", "model.", "net.", "timm_model.")
# what timm looks for in a folder, the first it finds
_IN_FOLDERS = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth",
               "*.safetensors", "*.pth", "*.pth.tar", "*.bin")  # fmt: skip
_ENTRIES = ("weight", "bias", "running_mean", "running_var")
_TORCHVISION = {
    "features.1.conv.0.0.weight": "MobileNetV2",
    "features.1.block.0.0.weight": "MobileNetV3",
}
_VIT = (
    (r"^class_token$", "cls_token"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.ln\.", "norm."),
    (r"^heads\.head\.", "head."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(0|linear_1)\.", ".mlp.fc1."),
    (r"\.mlp\.(3|linear_2)\.", ".mlp.fc2."),
)


@dataclass
class Weights:
    """What a file holds."""

    file: Path
    state: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)  # safetensors'
    note: str = ""  # what was left out

    @property
    def torchvision(self) -> str:
        """Which of torchvision's networks these are of, "" where of none that is known here."""
        return next((name for key, name in _TORCHVISION.items() if key in self.state), "")

    @property
    def foreign(self) -> str:
        """What to say of weights that fit no timm model."""
        if any(re.search(r"(^|\.)embeddings\.|\.convolution\.weight$", key) for key in self.state):
            return "these are weights of transformers; timm's of the same network are needed. "
        return f"these are weights of torchvision's {name}. " if (name := self.torchvision) else ""


def read(file: Path) -> Weights:
    """The weights in a file.

    Raises:
        ValueError: there is no such file, it is damaged, or holds something else.
    """
    if file.is_dir():
        hint = ""
        if (file / "config.json").exists():
            in_folder(file)
            hint = f", or local-dir:{file} as the model's name"
        raise ValueError(f"{file}: expected a file of weights{hint}, got a folder")
    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    with open(file, "rb") as opened:
        start = opened.read(40)
    metadata: dict[str, str] = {}
    if not start:
        raise ValueError(f"{file} is empty")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{file} is a Git LFS pointer, not the weights: `git lfs pull` gets them")
    if start[8:9] == b"{" or file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt") as tensors:
                metadata = tensors.metadata() or {}
                content: Any = {key: tensors.get_tensor(key) for key in tensors.keys()}
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or no safetensors file ({error})") from error
    elif start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
        content = _unpickled(file)
    else:
        raise ValueError(
            f"{file} is damaged, or neither safetensors nor by torch.save: it begins with "
            f"{start[:16]!r}"
        )
    while isinstance(content, Mapping):
        nests = (content[key] for key in _NESTS if isinstance(content.get(key), Mapping))
        inner = next(nests, None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping):
        raise ValueError(f"{file}: expected a state dict, got a {type(content).__name__}")
    others = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if others or not content:
        found = f"{others[0]!r}, which is no tensor" if others else "nothing"
        raise ValueError(
            f"{file}: expected a state dict, bare or under {', '.join(_NESTS)}, got {found}"
        )
    state, note = _without_prefixes(dict(content))
    if "encoder.layers.encoder_layer_0.ln_1.weight" in state:
        state = {_vit_key(key): value for key, value in state.items()}
    return Weights(file, state, metadata, note)


def in_folder(folder: Path) -> Path:
    """The file with the weights of a folder as timm's hub has it; ValueError says what it is."""
    try:
        config = dict(json.loads((folder / "config.json").read_text("utf-8")))
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} has no config.json that can be read: {error}") from error
    kind, architecture = config.get("model_type"), config.get("architecture")
    if architecture and kind and "pretrained_cfg" not in config:
        raise ValueError(
            f"{folder}: expected a model of timm's, got transformers' wrapper of {architecture}; "
            "use that name, with the file of weights as its checkpoint"
        )
    if not architecture and "pretrained_cfg" not in config:
        whose = f"transformers ({kind})" if kind else "another library"
        raise ValueError(f"{folder}: expected a model of timm's, got one of {whose}")
    for pattern in _IN_FOLDERS:
        for file in sorted(folder.glob(pattern)):
            return file
    raise ValueError(f"{folder}: expected one of {', '.join(_IN_FOLDERS)}, got none")


def of_torchvision(weights: Weights, model: nn.Module) -> dict[str, Tensor]:
    """torchvision's MobileNet under the keys of timm's, whose layers come in the same order.

    Shapes may still differ, which load_state_dict says. ValueError: the networks differ.
    """
    order = sorted((k for k in weights.state if k.endswith(_ENTRIES)), key=_place)
    state = model.state_dict()
    own = [key for key in state if key.endswith(_ENTRIES)]
    if len(order) != len(own):
        raise ValueError(f"torchvision's network has {len(order)} tensors, timm's {len(own)}")
    if any(isinstance(module, Conv2dSame) for module in model.modules()):
        raise ValueError("torchvision pads both sides alike, and this network as TensorFlow does")
    for theirs, ours in zip(order, own, strict=True):
        tensor = weights.state[theirs]
        # a linear layer of torchvision's head is a 1 x 1 convolution in timm's
        same = tensor.numel() == state[ours].numel()
        state[ours] = tensor.reshape(state[ours].shape) if same else tensor
    return state


def _vit_key(key: str) -> str:
    """timm's key for one of torchvision's vision transformer."""
    for theirs, ours in _VIT:
        key = re.sub(theirs, ours, key)
    return key


def _place(key: str) -> tuple[bool, list[tuple[int, str]], int]:
    """Sorts keys as the network runs: a safetensors file has them in another order."""
    layer, entry = key.rsplit(".", 1)
    path = [(int(part), "") if part.isdigit() else (-1, part) for part in layer.split(".")]
    return not key.startswith("features."), path, _ENTRIES.index(entry)


def _without_prefixes(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The wrapped model's own keys; and a note of those beside it (a teacher's, a metric's)."""
    note = ""
    while True:
        for prefix in _PREFIXES:
            inner = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            if inner:
                break
        else:
            return state, note
        if left := len(state) - len(inner):
            note += f"{left} tensors outside {prefix[:-1]!r} left out"
        state = inner


def _unpickled(file: Path) -> Any:
    """What torch.save wrote, as far as it can be read without running code."""
    try:
        # timm's training writes its arguments so
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise nearly anything
        raise ValueError(f"{file} {_why_unreadable(file, error)}") from error


def _why_unreadable(file: Path, error: Exception) -> str:
    text = str(error)
    if "TorchScript" in text:
        return "is a TorchScript program; save the state_dict() of torch.jit.load's model instead"
    if blocked := re.search(r"GLOBAL ([\w.]+)", text):
        with open(file, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as content:
            whole = content.find(b"torch.nn.modules.") >= 0
        what = "a whole pickled model" if whole else "Python objects beside its weights"
        return (
            f"holds {what} ({blocked[1]}), and reading that runs code from the file; where it was "
            "made, save model.state_dict() alone"
        )
    reason = textwrap.shorten(text or repr(error), 100, placeholder=" ...")
    return f"is damaged or not by torch.save ({reason})"


@dataclass(frozen=True)
class Misfit:
    """How weights differ from a model, read from what load_state_dict raises."""

    missing: list[str]
    unexpected: list[str]
    shapes: list[tuple[str, list[int], list[int]]]  # key, in the file, in the model

    @classmethod
    def of(cls, error: Exception) -> Misfit:
        text = str(error)
        listed = {
            kind: re.findall(r'"([^"]+)"', found[1])
            for kind in ("Missing", "Unexpected")
            if (found := re.search(rf"{kind} key\(s\) in state_dict: (.*)", text))
        }
        sizes = r"mismatch for (\S+): .*?Size\((\[.*?\])\).*?Size\((\[.*?\])\)"
        shapes = [(k, json.loads(a), json.loads(b)) for k, a, b in re.findall(sizes, text)]
        return cls(listed.get("Missing", []), listed.get("Unexpected", []), shapes)

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.shapes)

    def __str__(self) -> str:
        parts = [
            f"{name} {len(keys)} (first {keys[0]})"
            for name, keys in (("missing", self.missing), ("unexpected", self.unexpected))
            if keys
        ]
        if self.shapes:
            key, theirs, ours = self.shapes[0]
            parts.append(f"of another shape {len(self.shapes)} (first {key}, {theirs} for {ours})")
        return ", ".join(parts)

    @property
    def classes(self) -> int | None:
        """The file's number of classes, 0 without a classifier, if that may be all that differs."""
        if self.missing and not self.unexpected and not self.shapes:
            return 0
        rows = {(theirs[0], ours[0]) for _, theirs, ours in self.shapes if theirs and ours}
        alike = all(theirs[1:] == ours[1:] for _, theirs, ours in self.shapes)
        if self.missing or self.unexpected or not alike or len(rows) != 1:
            return None
        return rows.pop()[0]
