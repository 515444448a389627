"""Which extra of the package brings what is missing here, said in one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

_BRINGS = {
    "torch": ("torch",),
    "distill": ("torch", "timm", "safetensors"),
    "ray": ("ray",),
    "audit": ("torch", "timm", "torchmetrics", "matplotlib", "jinja2", "statsmodels", "captum"),
    "select": ("torch", "timm", "torchmetrics", "matplotlib", "jinja2", "statsmodels"),
    "prune": ("torch_pruning",),
    "search": ("torch", "timm", "torchmetrics", "matplotlib", "jinja2", "optuna"),
    "export-onnx": ("onnx",),
    "export-litert": ("ai_edge_litert", "flatbuffers"),
    "export-executorch": ("torch", "executorch"),
    "export-coreml": ("coremltools",),
    "compare": ("jinja2", "onnxruntime", "ai_edge_litert"),
    "store": ("fsspec", "s3fs", "gcsfs"),
}


def require(extra: str, what: str, modules: Sequence[str] = ()) -> None:
    """Checks that an extra's modules are there, before the first of them is imported.

    Args:
        extra: one of pyproject's, such as torch.
        what: needs them; it names itself.
        modules: those of them that are needed; (): all.

    Raises:
        ImportError: names the first missing module, and the extra to install.
    """
    for name in modules or _BRINGS[extra]:
        if find_spec(name) is None:
            raise ImportError(
                f"{what} needs {name}, which is not installed: "
                f'pip install "vitkd-fast[{extra}]" brings it'
            )
