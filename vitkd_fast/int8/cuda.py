"""The engine on an NVIDIA GPU, by CUDA's driver alone, without torch and CUDA's runtime."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np

from vitkd_fast import _int8

from .session import LayerProfile, Profile, Session, size_of

_KINDS = {"|u1": "uint8", "<f4": "float32"}  # of __cuda_array_interface__
_CODES = {(1, 8): "uint8", (2, 32): "float32"}  # of DLPack: code and bits
_DLPACK_CUDA, _DLPACK_CUDA_MANAGED = 2, 13


class _Place(NamedTuple):
    """An array's memory, contiguous."""

    address: int
    shape: tuple[int, ...]
    dtype: str
    on_device: bool
    stream: int  # whose work on it has to be waited for; 0: none
    owner: object

    @property
    def for_engine(self) -> tuple[int, bool, int]:
        return self.address, self.on_device, self.stream


def ordinal_of(device: str) -> int:
    """The number of the GPU that "cuda" or "cuda:N" names.

    Raises:
        ValueError: another text.
    """
    match = re.fullmatch(r"cuda(?::(\d{1,4}))?", device) if isinstance(device, str) else None
    if not match:
        raise ValueError(f"int8.load: device: expected 'cpu', 'cuda' or 'cuda:N', got {device!r}")
    return int(match[1] or 0)


def _on_device(array: Any, stream: int, name: str) -> _Place | None:
    """Where an array lies that says it lies on a GPU; what it waits for is left to `stream`."""
    if hasattr(array, "__dlpack_device__"):
        if array.__dlpack_device__()[0] not in (_DLPACK_CUDA, _DLPACK_CUDA_MANAGED):
            return None
        capsule = array.__dlpack__(stream=stream)
        address, shape, code, contiguous = _int8.dlpack(capsule)
        dtype, after, owner = _CODES.get(code, f"DLPack's type {code}"), 0, capsule
    elif hasattr(array, "__cuda_array_interface__"):
        said = array.__cuda_array_interface__
        address, shape, owner = said["data"][0], tuple(said["shape"]), array
        dtype, after = _KINDS.get(said["typestr"], said["typestr"]), said.get("stream") or 0
        size = 4 if dtype == "float32" else 1
        dense = [size * int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
        contiguous = said.get("strides") is None or list(said["strides"]) == dense
    else:
        return None
    if not contiguous:
        raise ValueError(f"int8.Session: {name}: expected a contiguous array on the GPU")
    return _Place(address, tuple(shape), dtype, True, after, owner)


class CudaSession(Session):
    """uint8 images [N, H, W, 3] -> float32 logits [N, classes] on a GPU; made by `load`.

    The bytes are those of the CPU. The GPU keeps the weights, and room for the activations of the
    largest batch so far; the first call of each batch size makes a CUDA graph. Calls from several
    threads take turns. A process that forks after `load` cannot use the session in the child.

    Attributes:
        device: such as "cuda:0".
        device_name: such as "NVIDIA H200".
        Others: as `Session`; isa and threads are of `prepare`, which runs on the CPU.
    """

    def __init__(self, opened: _int8.File, *, device: str, image_size: int | None = None) -> None:
        ordinal, size = ordinal_of(device), size_of(opened, image_size)
        try:
            self._engine: Any = _int8.CudaSession(opened, image_size=size, device=ordinal)
        except _int8.GraphError as error:
            raise ValueError(f"int8.load: image_size {size}: {error}") from error
        except _int8.CudaError as error:
            raise RuntimeError(f"int8.load: device={device!r}: {error}") from error
        self.device, self.device_name = f"cuda:{ordinal}", self._engine.device_name
        self.threads, self.isa = 1, _int8.isa()[0]
        self._describe(opened, size, self._engine.classes)

    def __call__(self, images: Any, out: Any = None, *, prepare: bool = False) -> Any:
        """Logits of images.

        Args:
            images: uint8 [N, image_size, image_size, 3], not normalised: an array, a CPU tensor, or
                anything on the GPU that has DLPack's methods or `__cuda_array_interface__`, such as
                a tensor of torch's, contiguous. Work of its stream is waited for.
            out: float32 [N, classes], contiguous, on the CPU or the GPU, to write the logits to.
            prepare: whether images is a sequence of frames of any size, each for `prepare`.

        Returns:
            The logits, once they are there: out, or a NumPy array.

        Raises:
            ValueError: images or out of another shape or dtype, or a closed session.
            RuntimeError: the GPU or its driver fails; the message says how.
        """
        engine: Any = self._open()
        if prepare:
            images = self._prepared(images)
        source = _on_device(images, engine.stream, "images")
        if source is None:
            batch = self._batch(images)
            source = _Place(batch.ctypes.data, batch.shape, "uint8", False, 0, batch)
        self._check("images", source, "uint8", (source.shape[0], *self._image_shape))
        shape = (source.shape[0], engine.classes)
        result = np.empty(shape, np.float32) if out is None else out
        to = _on_device(result, engine.stream, "out")
        if to is None:
            self._check_out(result, shape)
            to = _Place(result.ctypes.data, shape, "float32", False, 0, result)
        self._check("out", to, "float32", shape)
        engine.run(source.for_engine, shape[0], to.for_engine)
        return result

    def profile(self, images: Any, rounds: int = 5) -> Profile:
        """What each kernel takes: the median of some rounds over the images, at most those that one
        CUDA graph computes; by events, without a graph."""
        engine, images = self._open(), self._batch(images)
        runs = self._rounds(engine, images, rounds)
        layers = []
        for i, (step, name, kernel, shape, _, macs, size) in enumerate(runs[0]):
            us = float(np.median([run[i][4] for run in runs])) * 1e6
            gmacs = macs / us / 1e3 if us else 0.0
            layers.append(LayerProfile(step, name, kernel, shape, us, gmacs, size))
        return Profile(tuple(layers))

    @staticmethod
    def _check(name: str, place: _Place, dtype: str, shape: tuple[int, ...]) -> None:
        if place.dtype != dtype or place.shape != shape:
            raise ValueError(
                f"int8.Session: {name}: expected {dtype} {list(shape)}, got {place.dtype} "
                f"{list(place.shape)}"
            )

    def __repr__(self) -> str:
        if self._engine is None:
            return "int8.Session(closed)"
        megabytes = self._engine.weight_bytes / 1e6
        return (
            f"int8.Session({len(self.classes)} classes, {self.image_size}x{self.image_size}, "
            f"{self.device}, {self.device_name}, {megabytes:.1f} MB of weights)"
        )
