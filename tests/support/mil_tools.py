"""Core ML's programs, run in torch as the MIL specification has their operators, in float32.

Core ML runs on macOS alone, and computes these in float16.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def saved_program(package: Path) -> Any:
    """coremltools' program of a saved package, with its weights."""
    import coremltools as ct
    from coremltools.converters.mil.frontend.milproto.load import load

    spec = ct.utils.load_spec(str(package))
    folder = package / "Data" / "com.apple.CoreML" / "weights"
    return load(spec, spec.specificationVersion, str(folder))


def operations(program: Any, kind: str) -> list[Any]:
    return [op for op in program.functions["main"].operations if op.op_type == kind]


def run(program: Any, image: Tensor) -> dict[str, Tensor]:
    """All values by name, of an image [1, 3, H, W] of bytes in float32."""
    main = program.functions["main"]
    values: dict[str, Any] = {name: image for name in main.inputs}
    for op in main.operations:
        if op.op_type != "const":
            made = _OPERATORS[op.op_type](_Inputs(op, values))
            values[op.outputs[0].name] = made
    return values


class _Inputs:
    """An operator's inputs as attributes: tensors, and what is constant as numbers or arrays."""

    def __init__(self, op: Any, values: dict[str, Any]) -> None:
        self._op, self._values = op, values

    def __getattr__(self, name: str) -> Any:
        var = self._op.inputs[name]
        if var.name in self._values:
            return self._values[var.name]
        value = np.asarray(var.val)
        if value.dtype.kind not in "fiu":
            return var.val
        return torch.from_numpy(value.astype(np.float32 if value.dtype.kind == "f" else np.int64))


def _along(x: _Inputs, q: Tensor, per: Tensor) -> Tensor:
    """A value for each channel, or one."""
    shape = [1] * q.ndim
    if per.ndim:
        shape[int(x.axis)] = -1
    return per.reshape(shape)


def _dequantized(x: _Inputs, q: Tensor) -> Tensor:
    scale, zero = x.scale, x.zero_point
    return (q - _along(x, q, zero)) * _along(x, q, scale)


def _quantized(x: _Inputs) -> Tensor:
    assert x.output_dtype == "uint8"
    return (torch.round(x.input / x.scale) + x.zero_point).clamp(0, 255)


def _convolution(x: _Inputs) -> Tensor:
    assert x.pad_type == "custom"
    top, bottom, left, right = x.pad.tolist()
    padded = torch.nn.functional.pad(x.x, (left, right, top, bottom))
    strides, groups = x.strides.tolist(), int(x.groups)
    return torch.nn.functional.conv2d(padded, x.weight, x.bias, strides, groups=groups)


def _padded(x: _Inputs) -> Tensor:
    pairs = x.pad.reshape(-1, 2).flip(0).reshape(-1).tolist()
    return torch.nn.functional.pad(x.x, pairs, value=float(x.constant_val))


def _squeezed(x: _Inputs) -> Tensor:
    return x.x.squeeze(tuple(x.axes.tolist()))


def _expanded(x: _Inputs) -> Tensor:
    assert x.axes.tolist() == [2, 3]
    return x.x[..., None, None]


_OPERATORS = {
    "constexpr_affine_dequantize": lambda x: _dequantized(x, x.quantized_data),
    "dequantize": lambda x: _dequantized(x, x.input),
    "quantize": _quantized,
    "cast": lambda x: x.x,
    "mul": lambda x: x.x * x.y,
    "add": lambda x: x.x + x.y,
    "conv": _convolution,
    "linear": lambda x: torch.nn.functional.linear(x.x, x.weight, x.bias),
    "relu": lambda x: x.x.relu(),
    "clip": lambda x: x.x.clamp(float(x.alpha), float(x.beta)),
    "sigmoid_hard": lambda x: (x.x * x.alpha + x.beta).clamp(0, 1),
    "reduce_mean": lambda x: x.x.mean(tuple(x.axes.tolist()), keepdim=bool(x.keep_dims)),
    "pad": _padded,
    "squeeze": _squeezed,
    "expand_dims": _expanded,
    "softmax": lambda x: x.x.softmax(int(x.axis)),
    "classify": lambda x: x.probabilities,
}
