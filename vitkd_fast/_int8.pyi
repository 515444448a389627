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
    # of one picture [1, H, W, 3], by node; None inside a chain and for the logits
    def maps(self, image: NDArray[np.uint8]) -> list[NDArray[np.uint8] | None]: ...
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

def isa() -> list[str]: ...
def vnni_peak(seconds: float) -> float: ...
