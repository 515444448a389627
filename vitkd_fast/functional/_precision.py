"""Regions in which arithmetic is that of the dtypes that are written."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

_HOW_MATMULS_ROUND = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]


class _Float32Products:
    """While a thread is inside, products of float32 matrices are neither TF32 nor bfloat16.

    torch has one setting for the process: the first to enter changes it, and the last to leave puts
    back what was there.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0
        self.before: tuple[str | None, list[str]] = (None, [])

    def enter(self) -> None:
        with self.lock:
            self.inside += 1
            if self.inside > 1:
                return
            found = [of.fp32_precision for of in _HOW_MATMULS_ROUND]
            if all(x in ("none", "ieee") for x in found):
                self.before = (None, [])
                return
            try:  # torch's older way says the same, and raises later if it is told otherwise
                name = torch.get_float32_matmul_precision()
            except RuntimeError:  # the newer way was used alone
                name = None
            self.before = (name, found)
            if name is not None:
                torch.set_float32_matmul_precision("highest")
            for of in _HOW_MATMULS_ROUND:
                of.fp32_precision = "ieee"

    def leave(self) -> None:
        with self.lock:
            self.inside -= 1
            name, found = self.before
            if self.inside or not found:
                return
            if name is not None:
                torch.set_float32_matmul_precision(name)
            for of, x in zip(_HOW_MATMULS_ROUND, found, strict=True):
                of.fp32_precision = x


_float32_products = _Float32Products()


class _Exactly:
    def __init__(self, region: AbstractContextManager) -> None:
        self.region = region

    def __enter__(self) -> None:
        _float32_products.enter()
        self.region.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.region.__exit__(kind, error, trace)
        _float32_products.leave()


def without_autocast(x: Tensor) -> Any:
    """Arithmetic in the dtypes that are written, inside an autocast region too."""
    if x.device.type == "meta":  # which has no autocast
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def exactly(x: Tensor) -> Any:
    """The same, where torch.set_float32_matmul_precision allows TF32 or bfloat16, too.

    A compiler's graph obeys that setting: it may not change it.
    """
    region = without_autocast(x)
    return region if torch.compiler.is_compiling() else _Exactly(region)
