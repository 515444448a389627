"""A model of the command line: an int8 file, which needs no torch, or a float one."""

from __future__ import annotations

import json
from typing import Any, NamedTuple


class Opened(NamedTuple):
    """A model that answers."""

    logits: Any  # a function of uint8 images [N, H, W, 3]
    pixels: Any  # image_size, crop_pct and interpolation
    classes: tuple[str, ...]
    device: str = "cpu"
    multilabel: bool = False  # classes are not exclusive
    temperature: float = 1.0  # what logits are divided by before they become probabilities


def open_model(model: str, threads: int | None, accelerated: bool = False) -> Opened:
    """An int8 file, which needs no torch, or a model, `accelerated` by a GPU if there is one."""
    if is_int8(model):
        from . import int8

        session = int8.load(model, threads=threads or 1)
        return Opened(
            session,
            session,
            session.classes,
            multilabel=session.multilabel,
            temperature=session.temperature,
        )
    try:
        from . import models
    except ImportError as error:
        raise ImportError(f"{model} is no int8 file, and {error}") from error
    import torch

    from ._timing import warn_of_threads

    if threads:
        warn_of_threads("--threads", threads)
        torch.set_num_threads(threads)
    loaded = load(model)
    device = "cuda" if accelerated and torch.cuda.is_available() else "cpu"
    predictor = models.predictor(loaded.model, loaded.pixels).to(device)

    @torch.inference_mode()
    def logits(images: Any) -> torch.Tensor:
        return predictor(torch.as_tensor(images).permute(0, 3, 1, 2)).float()

    multilabel = models.Origin.of(loaded.model).multilabel
    return Opened(logits, loaded.pixels, loaded.classes, device, multilabel)


def load(model: str) -> Any:
    """A model with a classifier."""
    from . import models

    loaded = models.load(model)
    if not loaded.classes:
        raise ValueError(
            f"{model} has no classifier: it returns features; with data.probe, `vitkd distill` "
            "leaves classifier.safetensors beside it"
        )
    return loaded


def is_int8(model: str) -> bool:
    """Whether this is a file of the int8 engine, which its header says, not its name."""
    try:
        with open(model, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, 1 << 23)))
        return "vitkd_fast.int8" in header["__metadata__"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
