"""Which extra of the package brings what is missing here, said in one sentence."""

from __future__ import annotations

from importlib.util import find_spec

_BRINGS = {
    "torch": ("torch",),
    "distill": ("torch", "timm", "safetensors"),
    "ray": ("ray",),
    "export-onnx": ("onnx",),
    "export-litert": ("ai_edge_litert", "flatbuffers"),
}


def require(extra: str, what: str) -> None:
    """Checks that an extra's modules are there, before the first of them is imported.

    Args:
        extra: torch, distill or ray.
        what: needs them; it names itself.

    Raises:
        ImportError: names the first missing module, and the extra to install.
    """
    for name in _BRINGS[extra]:
        if find_spec(name) is None:
            raise ImportError(
                f"{what} needs {name}, which is not installed: "
                f'pip install "vitkd-fast[{extra}]" brings it'
            )
