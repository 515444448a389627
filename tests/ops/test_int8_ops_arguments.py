"""What int8_dwconv and int8_pwconv say of arguments that are not accepted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from support.int8_ops_tools import OPS, every_device
from vitkd_fast import reference

X, WEIGHT = torch.zeros(2, 5, 6, 8, dtype=torch.uint8), torch.zeros(3, 3, 8, dtype=torch.int8)
DENSE = torch.zeros(4, 8, dtype=torch.int8)
GOOD: dict[str, Any] = {
    "x": X, "weight": WEIGHT, "bias": torch.zeros(8, dtype=torch.int32),
    "multiplier": torch.ones(8), "stride": [1, 1], "padding": [1, 1, 1, 1], "x_zero_point": 0,
    "y_zero_point": 0, "lo": 0, "hi": 255, "hardswish_scale": None,
}  # fmt: skip
GOOD_DENSE = {k: v for k, v in GOOD.items() if k not in ("stride", "padding", "x_zero_point")} | {
    "weight": DENSE, "bias": torch.zeros(4, dtype=torch.int32), "multiplier": torch.ones(4),
}  # fmt: skip
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"x": X.float()}, r"x: expected \w+ \[.*, got \w+ \[2, 5, 6, 8\]"),
    ({"weight": WEIGHT.int()}, r"weight: expected \w+ \[kh, kw, C\].*, got \w+ \[3, 3, 8\]"),
    ({"weight": DENSE}, r"weight: expected \w+ \[kh, kw, C\].*, got \w+ \[4, 8\]"),
    ({"x": X[0]}, r"x: expected \w+ \[N, H, W, C\].*, got \w+ \[5, 6, 8\]"),
    ({"bias": torch.zeros(8)}, r"bias: expected \w+ \[C\].*, got \w+ \[8\]"),
    ({"multiplier": torch.zeros(8).double()}, r"multiplier: expected \w+ \[C\].*, got \w+ \[8\]"),
    ({"multiplier": torch.ones(())}, r"multiplier: expected \w+ \[C\].*, got \w+ \[\]"),
    (
        {"weight": WEIGHT[..., :7]},
        r"weight: expected the channels of x \[2, 5, 6, 8\], got \[3, 3, 7\]",
    ),
    (
        {"bias": torch.zeros(7, dtype=torch.int32)},
        r"bias: expected the channels of weight \[3, 3, 8\], got \[7\]",
    ),
    (
        {"multiplier": torch.zeros(9)},
        r"multiplier: expected the channels of weight \[3, 3, 8\], got \[9\]",
    ),
    ({"weight": WEIGHT[:0]}, r"weight: expected no empty dimension, got \[0, 3, 8\]"),
    ({"x": X[:, :0]}, r"map of x: expected 1 to.*, got \[0, 6\]"),
    ({"weight": torch.zeros(32, 3, 8).char()}, r"kernel of weight: expected 1 to 31.*, got .*"),
    ({"stride": [0, 1]}, r"stride: expected 1 to.*, got \[0, 1\]"),
    ({"padding": [1, 1, -1, 1]}, r"padding: expected 0 to.*, got \[1, 1, -1, 1\]"),
    (
        {"padding": [0, 0, 0, 0], "weight": torch.zeros(6, 3, 8).char()},
        r"x: expected at least the kernel of weight \[6, 3, 8\], got \[2, 5, 6, 8\] with padding",
    ),
    ({"x_zero_point": 256}, r"x_zero_point: expected 0 to 255.*, got \[?256\]?"),
    ({"y_zero_point": -1}, r"y_zero_point: expected 0 to 255.*, got \[?-1\]?"),
    ({"lo": 9, "hi": 8}, r"lo, hi: expected 0 <= lo <= hi <= 255, got 9, 8"),
    ({"hi": 256}, r"lo, hi: expected 0 <= lo <= hi <= 255, got 0, 256"),
    ({"lo": -1}, r"lo, hi: expected 0 <= lo <= hi <= 255, got -1, 255"),
    *(
        ({"hardswish_scale": k}, r"hardswish_scale: expected none or a normal positive")
        for k in (0.0, -1.0, float("inf"), float("nan"), 1e-40, 1e39)
    ),
]
WRONG_DENSE: list[tuple[dict[str, Any], str]] = [
    ({"weight": WEIGHT}, r"weight: expected \w+ \[C_out, C_in\].*, got \w+ \[3, 3, 8\]"),
    (
        {"x": torch.zeros((), dtype=torch.uint8)},
        r"x: expected \w+ \[\.\.\., C_in\].*, got \w+ \[\]",
    ),
    ({"weight": DENSE[:, :7]}, r"weight: expected the channels of x \[2, 5, 6, 8\], got \[4, 7\]"),
    ({"bias": torch.zeros(8).int()}, r"bias: expected the channels of weight \[4, 8\], got \[8\]"),
    ({"weight": DENSE[:0]}, r"weight: expected no empty dimension, got \[0, 8\]"),
    ({"lo": 9, "hi": 8}, r"lo, hi: expected 0 <= lo <= hi <= 255, got 9, 8"),
    ({"hardswish_scale": -1.0}, r"hardswish_scale: expected none or a normal positive"),
]
EVERY_ERROR = [
    *(("int8_dwconv", GOOD | wrong, message) for wrong, message in WRONG),
    *(("int8_pwconv", GOOD_DENSE | wrong, message) for wrong, message in WRONG_DENSE),
]


@pytest.mark.parametrize(("op", "arguments", "message"), EVERY_ERROR)
def test_errors_name_the_argument(op: str, arguments: dict[str, Any], message: str) -> None:
    """In the same words from the reference, the operation and its fake."""
    getattr(OPS, op)(**(GOOD if op == "int8_dwconv" else GOOD_DENSE))
    with pytest.raises(ValueError, match=f"^{op}: {message}"):
        getattr(reference, op)(**arguments)
    with pytest.raises((ValueError, RuntimeError), match=f"{op}: {message}"):
        getattr(OPS, op)(**arguments)
    meta = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match=f"^{op}: {message}"):
        getattr(OPS, op)(**meta)


@every_device
@pytest.mark.parametrize(
    ("op", "wrong", "message"),
    [("int8_dwconv", *WRONG[i]) for i in (0, 2, 7, 9, 13, 15, 16, 18, 21)]
    + [("int8_pwconv", *x) for x in WRONG_DENSE],
)
def test_errors_on_every_device(op: str, wrong: dict[str, Any], message: str, device: str) -> None:
    arguments = (GOOD if op == "int8_dwconv" else GOOD_DENSE) | wrong
    arguments = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    with pytest.raises((ValueError, RuntimeError), match=message):
        getattr(OPS, op)(**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["weight", "bias", "multiplier"])
def test_tensors_on_different_devices(name: str) -> None:
    for op, good in (("int8_dwconv", GOOD), ("int8_pwconv", GOOD_DENSE)):
        on_gpu = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in good.items()}
        with pytest.raises(
            (ValueError, RuntimeError), match=f"{op}: {name}: expected the device of x, .*got"
        ):
            getattr(OPS, op)(**on_gpu | {name: good[name]})
