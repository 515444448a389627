"""The int8 engine. Nothing in this module imports torch, at import or later."""

from vitkd_fast import _int8

__all__ = ["isa"]


def isa() -> list[str]:
    """The instruction sets that the CPU kernels may use, best first; they use the first.

    The sets are scalar, avx2 (with FMA and F16C), avx512 (F, BW, VL, DQ) and avx512vnni, each
    containing the ones before it. VITKD_FAST_ISA names the best one to use; it is read once.

    Raises:
        RuntimeError: VITKD_FAST_ISA names no instruction set, or one that this CPU lacks.
    """
    return _int8.isa()
