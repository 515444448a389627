"""What hypothesis draws for the losses of relations."""

from collections.abc import Callable

import torch
from torch import Tensor

from support.feature_tools import DOUBLE


def seeded(seed: int) -> Callable[..., Tensor]:
    """draw(*shape) in float64, from this seed."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=DOUBLE)


def orthogonal(x: Tensor) -> Tensor:
    return torch.linalg.qr(x).Q
