# The compiled int8 engine (csrc/int8/bind.cpp).

import numpy as np
from numpy.typing import NDArray

from .int8.graph import Graph

class GraphError(ValueError): ...

class Session:
    def __init__(
        self,
        graph: Graph,
        *,
        image_size: int,
        threads: int = 1,
        isa: str = "",
        fuse: bool = True,
        poison: bool = False,
    ) -> None: ...
    # images [N, H, W, 3], logits [N, classes], both contiguous
    def run(self, images: NDArray[np.uint8], logits: NDArray[np.float32]) -> None: ...
    # step, name, kernel, output shape, seconds, multiply-adds and bytes of each layer
    def profile(
        self, images: NDArray[np.uint8], logits: NDArray[np.float32]
    ) -> list[tuple[int, str, str, tuple[int, int, int], float, int, int]]: ...
    # of one image [1, H, W, 3], by node; None inside a chain and for the logits
    def activations(self, image: NDArray[np.uint8]) -> list[NDArray[np.uint8] | None]: ...
    @property
    def classes(self) -> int: ...
    @property
    def isa(self) -> str: ...
    @property
    def weight_bytes(self) -> int: ...
    @property
    def arena_bytes(self) -> int: ...
    @property
    def steps(self) -> int: ...

# raises GraphError, which names node and field; returns the number of logits
def check(graph: Graph) -> int: ...

# frame [H, W, 3], pixels of a row side by side; out [image_size, image_size, 3], contiguous
def prepare(
    frame: NDArray[np.uint8],
    *,
    crop_pct: float,
    interpolation: str,
    isa: str = "",
    out: NDArray[np.uint8],
) -> None: ...
def isa() -> list[str]: ...
def vnni_peak(seconds: float) -> float: ...
def fma_peak(seconds: float) -> float: ...
