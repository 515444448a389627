"""The int8 engine: a MobileNet quantised once runs on uint8 images, the same bytes everywhere.

`quantize` and `QuantizationAware` need torch; everything else here never imports it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vitkd_fast import _int8

from .file import FileError
from .session import LayerProfile, Profile, Session, load

if TYPE_CHECKING:
    from .aware import QuantizationAware
    from .quantizer import quantize
    from .report import QuantizedModel

__all__ = ["FileError", "LayerProfile", "Profile", "QuantizationAware", "QuantizedModel",
           "Session", "isa", "load", "quantize"]  # fmt: skip


def isa() -> list[str]:
    """The instruction sets that the CPU kernels may use, best first; they use the first.

    The sets are scalar, sse41, avx2 (with FMA and F16C), avxvnni, avx512 (F, BW, VL, DQ),
    avx512vnni and amx (AMX-INT8), each containing the ones before it but for avxvnni, which CPUs
    with AVX-512 may lack. VITKD_FAST_ISA names the best one to use; it is read once.

    Raises:
        RuntimeError: VITKD_FAST_ISA names no instruction set, or one that this CPU lacks.
    """
    return _int8.isa()


def __getattr__(name: str) -> Any:
    if name in ("QuantizationAware", "quantize", "QuantizedModel"):
        import importlib

        from .._extras import require

        require("torch", f"{__name__}.{name}")
        stem = "aware" if name == "QuantizationAware" else "quantizer"
        module = importlib.import_module(f".{stem}", __name__)
        globals()[name] = getattr(module, name)
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
