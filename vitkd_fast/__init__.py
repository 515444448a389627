"""Fused distillation losses for training, and an int8 engine for what they train.

Importing this package loads nothing else. Each name below is imported when it is first used, so
that `vitkd_fast.int8` runs where there is no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import functional as functional
    from . import int8 as int8
    from . import nn as nn
    from ._show import show as show

    __version__: str

__all__ = ["functional", "int8", "nn", "show"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("vitkd-fast")
    if name == "show":
        from ._show import show

        return show
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
