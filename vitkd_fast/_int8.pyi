# The compiled int8 engine (csrc/int8/bind.cpp).

import numpy as np
from numpy.typing import NDArray

class GraphError(ValueError): ...

# the content of an int8 file; raises GraphError, which says what was expected and what was given
class File:
    def __init__(self, data: bytes) -> None: ...
    @property
    def data(self) -> bytes: ...
    @property
    def image_size(self) -> int: ...
    @property
    def mean(self) -> tuple[float, float, float]: ...
    @property
    def std(self) -> tuple[float, float, float]: ...
    @property
    def crop_pct(self) -> float: ...
    @property
    def interpolation(self) -> str: ...
    # none, or one for each logit
    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def multilabel(self) -> bool: ...
    @property
    def temperature(self) -> float: ...

class Session:
    def __init__(
        self,
        file: File,
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

# what there is none of: a driver, a device, kernels in this build; or what the driver says
class CudaError(RuntimeError): ...

# on a GPU
class CudaSession:
    def __init__(self, file: File, *, image_size: int, device: int) -> None: ...
    # images and logits: their address, whether that is the GPU's, and a stream to be waited for
    def run(
        self, images: tuple[int, bool, int], count: int, logits: tuple[int, bool, int]
    ) -> None: ...
    # as Session's; the step is the node, of which a squeeze-excite has several kernels
    def profile(
        self, images: NDArray[np.uint8], logits: NDArray[np.float32]
    ) -> list[tuple[int, str, str, tuple[int, int, int], float, int, int]]: ...
    def activations(self, image: NDArray[np.uint8]) -> list[NDArray[np.uint8] | None]: ...
    @property
    def classes(self) -> int: ...
    @property
    def device_name(self) -> str: ...
    @property
    def stream(self) -> int: ...
    @property
    def weight_bytes(self) -> int: ...
    @property
    def arena_bytes(self) -> int: ...

# with which CUDA the kernels were built, and for what; "" without
def cuda_kernels() -> str: ...

# what a GPU would run, which need not be there: of each launch the node's name, kernel, output
# shape, multiply-adds and bytes of maps of an image, bytes of weights, blocks, their threads and
# shared memory
def cuda_launches(
    file: File, *, image_size: int, batch: int, multiprocessors: int
) -> list[tuple[str, str, tuple[int, int, int], int, int, int, int, int, int]]: ...

# of a capsule of DLPack's: address, shape, code and bits of its type, whether it is contiguous
def dlpack(capsule: object) -> tuple[int, tuple[int, ...], tuple[int, int], bool]: ...

# frame [H, W, 3], pixels of a row side by side; out [image_size, image_size, 3], contiguous
def prepare(
    frame: NDArray[np.uint8],
    *,
    crop_pct: float,
    interpolation: str,
    isa: str = "",
    out: NDArray[np.uint8],
) -> None: ...

# boxes of frames [H, W, 3], int64 [N, 5]: top, left, height, width, flip; out [N, h, w, 3]
def crop(
    frames: list[NDArray[np.uint8]],
    boxes: NDArray[np.int64],
    *,
    interpolation: str,
    isa: str = "",
    out: NDArray[np.uint8],
) -> None: ...

# images [N, h, w, 3], in place; factors of brightness, contrast, saturation and their order [N, 3]
def jitter(
    images: NDArray[np.uint8],
    factors: NDArray[np.float32],
    orders: NDArray[np.uint8],
    *,
    isa: str = "",
) -> None: ...
def isa() -> list[str]: ...
def vnni_peak(seconds: float) -> float: ...
def fma_peak(seconds: float) -> float: ...
