"""Models and images for the tests of exported files, and ONNX Runtime and LiteRT to run them in."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitkd_fast.int8.graph import Array

HALF = (0.5, 0.5, 0.5)


def in_onnxruntime(path: Path, images: Array) -> tuple[Array, Counter[str]]:
    """Logits, and the operations that it runs, after its optimisations."""
    import onnx
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.optimized_model_filepath = str(path.with_suffix(".optimised"))
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    logits = [session.run(None, {"images": part[None]})[0] for part in images]
    nodes = onnx.load(options.optimized_model_filepath).graph.node
    return np.concatenate(logits), Counter(node.op_type for node in nodes)


def in_litert(path: Path, images: Array) -> tuple[Array, Counter[str]]:
    """Logits, by XNNPACK, and the operations; DELEGATE is a part that XNNPACK runs."""
    from ai_edge_litert import interpreter as litert

    interpreter = litert.Interpreter(str(path), num_threads=1)
    interpreter.resize_tensor_input(0, images.shape)  # the batch is free
    interpreter.allocate_tensors()
    [given], [made] = interpreter.get_input_details(), interpreter.get_output_details()
    interpreter.set_tensor(given["index"], images)
    interpreter.invoke()
    operations = Counter(x["op_name"] for x in interpreter._get_ops_details())
    return interpreter.get_tensor(made["index"]), operations


def smooth(count: int, size: int) -> Array:
    torch.manual_seed(0)
    coarse = torch.rand(count, 3, 4, 4) * 255
    large = nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 255)
    return large.to(torch.uint8).permute(0, 2, 3, 1).numpy().copy()


def plain() -> nn.Module:
    """Layers that the engine and the runtimes round alike: no hard-swish, no addition."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU6(),
        nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.ReLU(),
        nn.Conv2d(8, 16, 1), nn.Conv2d(16, 12, 3, 2, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 7),
    ).eval()  # fmt: skip


class Added(nn.Module):
    """Convolutions whose results are added."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.fc((x + self.b(self.a(x).relu())).mean((2, 3)))


class Gated(nn.Module):
    """A squeeze-excite between hard-swishes, and a residual addition, as in MobileNetV3."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 5, 1, 2, groups=8)
        self.reduce, self.expand = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.project, self.fc = nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        functional: Any = nn.functional
        x = functional.hardswish(self.stem(x))
        y = functional.hardswish(self.depthwise(x))
        gate = self.expand(functional.relu(self.reduce(y.mean((2, 3), keepdim=True))))
        x = x + self.project(y * functional.hardsigmoid(gate))
        return self.fc(x.mean((2, 3)))
