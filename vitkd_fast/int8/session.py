"""uint8 images -> float32 logits, by the compiled engine. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitkd_fast import _int8

from .. import _preprocessing
from .._timing import warn_of_threads
from . import file
from .graph import Graph


@dataclass(frozen=True)
class LayerProfile:
    """One layer's share of a call; layers of one step are computed together, strip by strip."""

    step: int
    name: str
    kernel: str  # that computed most of it
    shape: tuple[int, int, int]  # of its output: H, W, C
    us: float  # per image
    gmacs: float  # 1e9 multiply-adds a second
    bytes: int  # read and written per image, if each were once


@dataclass(frozen=True)
class Profile:
    """What each layer took, on one thread."""

    layers: tuple[LayerProfile, ...]

    @property
    def us(self) -> float:
        """Per image, all layers."""
        return sum(layer.us for layer in self.layers)

    def json(self) -> list[dict[str, Any]]:
        """Of each layer name, kernel, shape [H, W, C], us, macs and bytes, per image."""
        return [
            {
                "name": layer.name,
                "kernel": layer.kernel,
                "shape": list(layer.shape),
                "us": layer.us,
                "macs": round(layer.gmacs * layer.us * 1e3),
                "bytes": layer.bytes,
            }
            for layer in self.layers
        ]

    def __str__(self) -> str:
        rows = [f"{'layer':44} {'kernel':38} {'output':>14} {'us':>8} {'GMAC/s':>7} {'kB':>8}"]
        for n in self.layers:
            size = "x".join(map(str, n.shape))
            rows.append(
                f"{n.step:3} {n.name:40} {n.kernel:38} {size:>14} {n.us:8.1f} {n.gmacs:7.1f} "
                f"{n.bytes / 1e3:8.1f}"
            )
        return "\n".join([*rows, f"{'all':98} {self.us:8.1f}"])


class Session:
    """uint8 images [N, H, W, 3] -> float32 logits [N, classes]; made by `load`.

    Calls may come from several threads at once. Each concurrent one has its own memory and threads,
    made at its first call and kept; a call allocates only its result.

    Attributes:
        image_size: the side of the images.
        classes: names, or as many numbers.
        multilabel: classes are not exclusive: a sigmoid of each logit, in place of a softmax.
        temperature: what logits are divided by before they become probabilities: 1, unless `vitkd
            audit --store` fitted one. The logits of a call are not divided.
        mean, std, crop_pct, interpolation: how images are prepared; the engine normalises.
        threads: of one call.
        isa: the instruction set of its kernels.
    """

    def __init__(
        self,
        opened: _int8.File,
        *,
        threads: int = 1,
        isa: str | None = None,
        image_size: int | None = None,
    ) -> None:
        if not isinstance(threads, int) or not 1 <= threads <= 256:
            raise ValueError(f"int8.load: threads: expected 1 to 256, got {threads!r}")
        warn_of_threads("int8.load: threads", threads)
        size = size_of(opened, image_size)
        try:
            self._engine: _int8.Session | None = _int8.Session(
                opened, image_size=size, threads=threads, isa=isa or ""
            )
        except _int8.GraphError as error:
            raise ValueError(f"int8.load: image_size {size}: {error}") from error
        self.threads, self.isa = threads, self._engine.isa
        self._describe(opened, size, self._engine.classes)

    def _describe(self, opened: _int8.File, size: int, classes: int) -> None:
        self.image_size = size
        self.mean, self.std = opened.mean, opened.std
        self.crop_pct, self.interpolation = opened.crop_pct, opened.interpolation
        self.multilabel: bool = opened.multilabel
        self.temperature: float = opened.temperature
        self.classes = opened.classes or tuple(map(str, range(classes)))

    @property
    def memory_bytes(self) -> int:
        """Of the weights, and of what one call computes in; concurrent calls have more."""
        engine = self._open()
        return engine.weight_bytes + engine.arena_bytes

    @property
    def resize(self) -> int:
        """What the short side is resized to before the centre is cropped."""
        return int(self.image_size / self.crop_pct)

    def _open(self) -> _int8.Session:
        if self._engine is None:
            raise ValueError("int8.Session: it is closed")
        return self._engine

    @property
    def _image_shape(self) -> tuple[int, int, int]:
        return self.image_size, self.image_size, 3

    def _batch(self, images: Any) -> np.ndarray:
        array = np.asarray(images)
        size = self.image_size
        if array.dtype != np.uint8 or array.shape[1:] != self._image_shape:
            raise ValueError(
                f"int8.Session: images: expected uint8 [N, {size}, {size}, 3], got {array.dtype} "
                f"{list(array.shape)}"
            )
        return np.ascontiguousarray(array)

    def prepare(self, frame: Any, out: np.ndarray | None = None) -> np.ndarray:
        """A frame of any size as the session wants it: uint8 [image_size, image_size, 3].

        The pixels are those of calibration and of training's validation; see `images.prepare`.

        Args:
            frame: RGB, uint8 [H, W, 3], an array or a CPU tensor.
            out: uint8 [image_size, image_size, 3], contiguous, to write them to.

        Raises:
            ValueError: frame or out of another shape or dtype.
        """
        return _preprocessing.prepare("int8.Session.prepare", frame, self, out, self.isa)

    @staticmethod
    def _check_out(out: Any, shape: tuple[int, ...]) -> None:
        _preprocessing.check_out("int8.Session", out, np.float32, shape)

    def _prepared(self, frames: Any) -> np.ndarray:
        images = np.empty((len(frames), *self._image_shape), np.uint8)
        for frame, prepared in zip(frames, images, strict=True):
            self.prepare(frame, prepared)
        return images

    def __call__(
        self, images: Any, out: np.ndarray | None = None, *, prepare: bool = False
    ) -> np.ndarray:
        """Logits of images.

        Args:
            images: uint8 [N, image_size, image_size, 3], an array or a CPU tensor, not normalised.
            out: float32 [N, classes], contiguous, to write the logits to.
            prepare: whether images is a sequence of frames of any size, each for `prepare`.

        Raises:
            ValueError: images or out of another shape or dtype, or a closed session.
        """
        engine = self._open()
        images = self._batch(self._prepared(images) if prepare else images)
        shape = (len(images), engine.classes)
        if out is None:
            out = np.empty(shape, np.float32)
        self._check_out(out, shape)
        engine.run(images, out)
        return out

    def profile(self, images: Any, rounds: int = 5) -> Profile:
        """What each layer takes on one thread: the median of some rounds over the images."""
        engine, images = self._open(), self._batch(images)
        runs = self._rounds(engine, images, rounds)
        layers = []
        for i, (step, name, kernel, shape, _, macs, size) in enumerate(runs[0]):
            seconds = float(np.median([run[i][4] for run in runs])) / len(images)
            gmacs = macs / seconds / 1e9 if seconds else 0.0
            layers.append(LayerProfile(step, name, kernel, shape, seconds * 1e6, gmacs, size))
        return Profile(tuple(layers))

    @staticmethod
    def _rounds(engine: Any, images: np.ndarray, rounds: int) -> list[Any]:
        if len(images) == 0 or rounds < 1:
            raise ValueError(
                "int8.Session.profile: expected at least one image and one round, got "
                f"{len(images)} and {rounds}"
            )
        out = np.empty((len(images), engine.classes), np.float32)
        engine.profile(images, out)  # warms the caches
        return [engine.profile(images, out) for _ in range(rounds)]

    def close(self) -> None:
        """Gives back weights, memory and threads; a later call raises ValueError."""
        self._engine = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._engine is None:
            return "int8.Session(closed)"
        megabytes = self._engine.weight_bytes / 1e6
        return (
            f"int8.Session({len(self.classes)} classes, {self.image_size}x{self.image_size}, "
            f"{self.isa}, {self.threads} thread{'s' * (self.threads > 1)}, "
            f"{megabytes:.1f} MB of weights)"
        )


def size_of(opened: _int8.File, image_size: int | None) -> int:
    """The side of a session's images; ValueError for none."""
    if image_size is not None and (not isinstance(image_size, int) or image_size < 1):
        raise ValueError(f"int8.load: image_size: expected 1 or more, got {image_size!r}")
    return opened.image_size if image_size is None else image_size


def load(
    source: str | Path | bytes | Graph,
    *,
    threads: int = 1,
    isa: str | None = None,
    image_size: int | None = None,
    device: str = "cpu",
) -> Session:
    """Makes a file, its bytes or a graph ready to run, on the CPU or on an NVIDIA GPU.

    Both give the same bytes. The kernels for GPUs have not run on one yet: tests emulate one, on
    which every byte is the CPU's.

    Args:
        source: a .int8.safetensors file, its content, or `QuantizedModel.graph`.
        threads: that share a call; images of a batch first, then the layers of what is left.
        isa: one of `isa()`; None: the best.
        image_size: the side of the images; None: as the file says.
        device: "cpu", or "cuda" or "cuda:N" for the first or another GPU (see `CudaSession`), of
            compute capability 8.0 or later; the driver is loaded then, and torch is not needed.

    Raises:
        FileError: the file is damaged or no such file, or the graph breaks a rule of
            `file.validate`; it names what is wrong.
        FileNotFoundError: there is no file.
        ValueError: threads, isa, image_size or device is out of range, or threads or isa is given
            for a GPU.
        RuntimeError: there is no driver, no such GPU, or the package was built without CUDA.
    """
    if device != "cpu":
        from .cuda import CudaSession

        if threads != 1 or isa is not None:
            raise ValueError(f"int8.load: device={device!r}: threads and isa are of the CPU alone")
        return CudaSession(file.opened(source), device=device, image_size=image_size)
    return Session(file.opened(source), threads=threads, isa=isa, image_size=image_size)
