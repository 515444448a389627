"""What a candidate costs where it will run: measured on the int8 engine, before any training.

`int8:threads=N` is this machine: the untrained student is quantized on a few images and timed. On
one thread the time is CPU time, which other processes do not lengthen; on more, the clock's median.

FILE.json is a target: what `vitkd profile --json` prints there, of one network or a list of them.
A layer of a candidate that stands in the file (the same kind, output, multiply-adds and bytes)
takes its time from there; for others, each kind has a line, us = a + b multiply-adds + c bytes, by
non-negative least squares of the relative error (scipy's nnls), fitted to the file's layers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import scipy.optimize  # type: ignore[import-untyped]

from .. import int8
from .._timing import measure
from ..distill.config import ConfigError

_KEYS = {"name", "kernel", "shape", "us", "macs", "bytes"}


class Cost(NamedTuple):
    """Of one image."""

    latency_ms: float
    memory_mb: float  # of the engine on this machine: weights, and what a call computes in


class Device(Protocol):
    """What tells a candidate's cost."""

    name: str

    def cost(self, made: int8.QuantizedModel) -> Cost:
        """Of one image of the model's size."""


class Here:
    """The int8 engine of this machine."""

    def __init__(self, threads: int) -> None:
        self.name, self.threads = f"int8:threads={threads}", threads

    def cost(self, made: int8.QuantizedModel) -> Cost:
        with int8.load(made.graph, threads=self.threads) as session:
            image = _image(session)
            found = measure(lambda: session(image))
            seconds = found.cpu if self.threads == 1 else found.p50
            return Cost(1e3 * seconds, session.memory_bytes / 1e6)


class Target:
    """A machine that is known by measurements of layers.

    Args:
        file: of `vitkd profile --json`, or a list of what it printed.

    Attributes:
        error: the mean relative error of the lines on the file's own layers.
    """

    def __init__(self, file: str) -> None:
        self.name, layers = file, _read(file)
        self.known = {_key(x): float(x["us"]) for x in layers}
        kinds: dict[str, list[dict[str, Any]]] = {}
        for layer in layers:
            kinds.setdefault(kind(layer["kernel"]), []).append(layer)
        self.lines = {name: _fit(of_kind) for name, of_kind in kinds.items()}
        errors = [abs(self._line(x) / x["us"] - 1) for x in layers if x["us"] > 0]
        self.error = float(np.mean(errors)) if errors else 0.0

    def cost(self, made: int8.QuantizedModel) -> Cost:
        with int8.load(made.graph) as session:
            layers = session.profile(_image(session), rounds=1).json()
            memory = session.memory_bytes / 1e6
        return Cost(sum(map(self.us, layers)) / 1e3, memory)

    def us(self, layer: dict[str, Any]) -> float:
        """Microseconds of a layer.

        Raises:
            ConfigError: the file has no layer of this kind.
        """
        return self.known.get(_key(layer)) or self._line(layer)

    def _line(self, layer: dict[str, Any]) -> float:
        name = kind(layer["kernel"])
        if name not in self.lines:
            raise ConfigError(
                f"--device: {self.name} holds no layer of kind {name}, which {layer['name']} is; "
                "measure a network there that has one"
            )
        return float(self.lines[name] @ _terms(layer))


def kind(kernel: str) -> str:
    """What a kernel computes, without its tile and instruction set: gemm, depthwise, pool, ..."""
    return "squeeze_excite" if kernel.startswith("squeeze") else kernel.split("_")[0]


def open_device(name: str) -> Device:
    """`int8`, `int8:threads=N` or FILE.json.

    Raises:
        ConfigError: it is none of them, or the file holds no measurements.
    """
    if name.endswith(".json"):
        return Target(name)
    base, _, options = name.partition(":")
    key, _, value = options.partition("=")
    if base != "int8" or (options and (key != "threads" or not value.isdecimal())):
        raise ConfigError(f"--device: expected int8:threads=N or FILE.json, got {name}")
    threads = int(value or 1)
    if not 1 <= threads <= 256:
        raise ConfigError(f"--device: threads: expected 1 to 256, got {threads}")
    return Here(threads)


def _image(session: int8.Session) -> np.ndarray:
    size = session.image_size
    return np.random.default_rng(0).integers(256, size=(1, size, size, 3), dtype=np.uint8)


def _key(layer: dict[str, Any]) -> tuple[Any, ...]:
    return kind(layer["kernel"]), tuple(layer["shape"]), layer["macs"], layer["bytes"]


def _terms(layer: dict[str, Any]) -> np.ndarray:
    return np.array([1.0, layer["macs"] / 1e6, layer["bytes"] / 1e3])


def _fit(layers: Sequence[dict[str, Any]]) -> np.ndarray:
    """a, b and c of a kind, none of them below 0."""
    rows = np.array([_terms(x) / max(x["us"], 1e-3) for x in layers])
    found, _ = scipy.optimize.nnls(rows, np.ones(len(rows)))
    return np.asarray(found)


def _read(file: str) -> list[dict[str, Any]]:
    try:
        tree = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--device: {file} cannot be read: {error}") from error
    layers: list[dict[str, Any]] = []
    for profile in tree if isinstance(tree, list) and tree else [tree]:
        found = profile.get("layers") if isinstance(profile, dict) else None
        if not found or not all(isinstance(x, dict) and x.keys() >= _KEYS for x in found):
            raise ConfigError(
                f"--device: {file}: expected what `vitkd profile --json` prints, with layers that "
                f"have {', '.join(sorted(_KEYS))}"
            )
        layers += found
    return layers
