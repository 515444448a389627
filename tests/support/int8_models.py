"""Float models for the tests of lowering and quantising: MobileNets, and networks of one part."""

from collections.abc import Callable
from typing import Any

import numpy as np
import timm
import torch
import torchvision
from torch import Tensor, nn

from vitkd_fast.int8.float_graph import FloatNode, forward
from vitkd_fast.int8.graph import Array


def randomised(model: nn.Module) -> nn.Module:
    """In evaluation, with batch norms that are far from the identity."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            with torch.no_grad():
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 2)
                if module.affine:
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.normal_(0, 0.3)
    return model.eval()


def create(name: str) -> nn.Module:
    if name.startswith("torchvision/"):
        return randomised(torchvision.models.get_model(name.split("/")[1], weights=None))
    return randomised(timm.create_model(name))


def check(model: nn.Module, nodes: tuple[FloatNode, ...], *sizes: int) -> None:
    for size in sizes:
        x = torch.randn(2, 3, size, size)
        with torch.no_grad():
            expected = model(x)
        error = (forward(nodes, x) - expected).abs().max() / expected.abs().max()
        assert error < 5e-5, size


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any], *modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.modules_ = nn.ModuleList(modules)

    def forward(self, x: Tensor) -> Any:
        return self.function(x, *self.modules_)


def network(*middle: nn.Module) -> nn.Module:
    """A small network with a middle that keeps 8 channels."""
    return nn.Sequential(nn.Conv2d(3, 8, 3), *middle, nn.AdaptiveAvgPool2d(1), *head()).eval()


def head() -> tuple[nn.Module, ...]:
    return nn.Flatten(), nn.Linear(8, 5)


def conv(**options: int | str) -> nn.Module:
    return nn.Conv2d(8, 8, 3, **options)


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PIXELS: dict[str, Any] = {"mean": MEAN, "std": STD}


def normalised(images: Array, mean: Any = MEAN, std: Any = STD) -> Tensor:
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    return (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


@torch.no_grad()
def logits_of(model: nn.Module, images: Array) -> Array:
    return model(normalised(images)).numpy()


def sqnr(signal: Array, other: Array) -> float:
    noise = np.square(signal - other, dtype=np.float64).sum()
    return float(10 * np.log10(np.square(signal, dtype=np.float64).sum() / noise))


class Block(nn.Module):
    """Every kind of node but squeeze-excite, in 8 to 12 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.expand = nn.Conv2d(8, 12, 1)
        self.depthwise = nn.Conv2d(12, 12, 3, 1, 1, groups=12)
        self.project = nn.Conv2d(12, 8, 1)
        self.left, self.right = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, 1, 1)
        self.side = nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.head, self.fc = nn.Conv2d(8, 16, 1), nn.Linear(16, 5)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
                nn.init.normal_(module.bias, 0, 0.3)

    def forward(self, x: Tensor) -> Tensor:
        relu, relu6, hardswish = nn.functional.relu, nn.functional.relu6, nn.functional.hardswish
        x = relu6(self.stem(x))
        x = x + self.project(hardswish(self.depthwise(relu(self.expand(x)))))
        x = relu(self.left(x) + self.right(x))
        x = x + self.side(x)
        return self.fc(hardswish(self.head(x.mean((2, 3), keepdim=True))).flatten(1))
