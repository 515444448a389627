"""Float models for the tests of lowering and quantising: MobileNets, and networks of one part."""

from collections.abc import Callable
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn

from vitkd_fast.int8.lower import FloatNode, forward


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
