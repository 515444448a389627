"""What `quantize` is given, as it is used: the images, and how they are normalised."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _preprocessing
from .float_graph import FloatNode
from .graph import Array

Three = tuple[float, float, float]


def batch(images: Iterable[Any], image_size: int | None) -> Tensor:
    """All batches as one tensor of bytes, [N, 3, H, H] in channels-last memory."""
    expected = "images: expected uint8 batches [N, H, H, 3] of one size, ndarrays or tensors"
    batches: list[Array] = []
    for batch in [images] if isinstance(images, np.ndarray | Tensor) else images:
        if not isinstance(batch, np.ndarray | Tensor):
            raise ValueError(
                f"quantize: {expected}, got a {type(batch).__name__} as batch {len(batches)}"
            )
        shape = tuple(batch.shape)
        given = f"{batch.dtype} {list(shape)} as batch {len(batches)}"
        right = len(shape) == 4 and shape[3] == 3 and shape[1] == shape[2] > 0
        if not right or batch.dtype not in (np.uint8, torch.uint8):
            raise ValueError(f"quantize: {expected}, got {given}")
        if batches and shape[1:] != batches[0].shape[1:]:
            raise ValueError(f"quantize: {expected}, got {given} after {list(batches[0].shape)}")
        if image_size is not None and shape[1] != image_size:
            raise ValueError(f"quantize: images: expected image_size {image_size}, got {given}")
        batches.append(batch.cpu().numpy() if isinstance(batch, Tensor) else batch)
    if not sum(map(len, batches)):
        shapes = ", ".join(str(list(batch.shape)) for batch in batches) or "no batches"
        raise ValueError(f"quantize: {expected}, got no images ({shapes})")
    # a copy, whatever the batches' strides, and whether they may be written to
    return torch.from_numpy(np.ascontiguousarray(np.concatenate(batches))).permute(0, 3, 1, 2)


def three(name: str, value: Any) -> Three | None:
    """A number, or three, of any kind of sequence."""
    if value is None:
        return None
    try:
        numbers = np.asarray(value, np.float64).flatten()
        numbers = np.repeat(numbers, 3) if numbers.size == 1 else numbers
        red, green, blue = map(float, numbers)
    except (TypeError, ValueError):
        raise ValueError(
            f"quantize: {name}: expected one number or three, for pixels in [0, 1], got {value!r}"
        ) from None
    return red, green, blue


def normalisation(
    nodes: tuple[FloatNode, ...], given: Mapping[str, Three | None], known: Mapping[str, Any]
) -> tuple[Three, Three]:
    """Mean and std of pixels in [0, 1]: the model's own, if it normalises, else as given."""
    own = _own_normalisation(nodes[0]) if nodes[0].op == "normalize" else {}
    values = []
    for name, value in given.items():
        if own and value and not np.allclose(value, own[name], atol=1e-4):
            raise ValueError(
                f"quantize: {name}: expected None or {own[name]}, with which the model normalises "
                f"its input itself ({nodes[0].name}), got {value}"
            )
        value = value or own.get(name) or three(name, known.get(name))
        if value is None:
            raise ValueError(
                f"quantize: {name}: expected one number or three, for pixels in [0, 1], got None "
                "and a model without pretrained_cfg"
            )
        values.append(value)
    return values[0], values[1]


def _own_normalisation(node: FloatNode) -> dict[str, Three]:
    """Of (pixel - mean) / std = pixel * weight + bias, for pixels in [0, 1] or in 0..255."""
    weight, bias = _numpy(node.weight).flatten(), _numpy(node.bias)
    if np.all(weight > 0):
        for pixel in (1, 255):
            mean, std = -bias / weight / pixel, 1 / weight / pixel
            # a float32's digits: 0.5 of 0.49999997, 0 of -1e-9
            found: dict[str, Three] = {}
            for name, x in (("mean", mean), ("std", std)):
                red, green, blue = (round(float(f"{value:.6g}"), 8) + 0.0 for value in x)
                found[name] = red, green, blue
            with suppress(ValueError):
                _preprocessing.check(found["mean"], found["std"], 1.0)
                return found
    raise ValueError(
        f"quantize: {node.name}: expected (x - mean) / std, of pixels x in [0, 1] or in 0..255, "
        f"got x * {weight.tolist()} + {bias.tolist()}"
    )


def _numpy(x: Tensor | None) -> Array:
    assert x is not None
    return x.double().cpu().numpy()
