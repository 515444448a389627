"""Further classifiers of a student, only needed in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..functional._common import check_tensors

if TYPE_CHECKING:
    pass


class DistillationHead(nn.Module):
    """Two classifiers on the same features, whose mean is the student's own: logits +- d(x).

    Distillation through a head of its own (Touvron et al., 2021, arXiv:2012.12877) for a student
    of one classifier, such as a MobileNet of timm: a linear layer d on what the classifier reads
    stands for half the difference of two heads, one for the labels and one for the teacher. Their
    mean, which DeiT predicts with, is the classifier as it is: it is evaluated, exported and
    quantised alone, and nothing is to be folded. Gradients of both heads reach it. The module is
    only needed in training.

    Args:
        features: that the classifier reads.
        classes: of the classifier.
    """

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.difference = nn.Linear(features, classes)
        # both heads begin as the classifier, which may be trained
        nn.init.zeros_(self.difference.weight)
        nn.init.zeros_(self.difference.bias)

    def forward(self, pooled: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The heads' logits, [batch, classes] each: of the labels, and of the teacher.

        Args:
            pooled: what the classifier read, [batch, features].
            logits: what it gave, [batch, classes].
        """
        check_tensors(type(self).__name__, {"pooled": pooled, "logits": logits})
        half = self.difference(pooled.flatten(1))
        if half.shape != logits.shape:
            raise ValueError(
                f"{type(self).__name__}: logits: expected {list(half.shape)}, got "
                f"{list(logits.shape)}"
            )
        return logits + half, logits - half


def _separable(channels: int, width: int) -> list[nn.Module]:
    """Two separable 3x3 convolutions, of which the first halves the map."""
    layers: list[nn.Module] = []
    for stride, out in ((2, channels), (1, width)):
        layers += [
            nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False),
            nn.Conv2d(channels, out, 1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
        ]
    return layers


class OFABranches(nn.Module):
    """Logits from the maps of a convnet's stages: separable convolutions, mean, linear layer.

    The branches of OFA-KD (Hao et al., 2023, arXiv:2310.19444) bring features that cannot be
    compared with another architecture's into the space of logits, where `functional.ofa_loss`
    does. A stage's map is halved once for each stage behind it; the last one's goes through a 1x1
    convolution. The module is only needed in training.

    Args:
        channels: of the maps, from the first stage to the last: of timm's `features_only` with
            out_indices (1, 2, 3, 4), or of `Taps` at strides 4, 8, 16 and 32.
        classes: of the logits.
        width: of what a branch's linear layer reads: the larger of what student's and teacher's
            classifiers read, in the authors' code.
    """

    def __init__(self, channels: Sequence[int], classes: int, width: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList()
        for stage, first in enumerate(channels):
            halvings = len(channels) - 1 - stage
            layers: list[nn.Module] = [] if halvings else [nn.Conv2d(first, width, 1)]
            for i in range(halvings):
                out = width if i == halvings - 1 else first * 2 ** (i + 1)
                layers += _separable(first * 2**i, out)
            layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)]
            self.branches.append(nn.Sequential(*layers))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Logits [batch, classes] of each map [batch, channels, height, width]."""
        if len(maps) != len(self.branches):
            raise ValueError(
                f"{type(self).__name__}: maps: expected {len(self.branches)}, got {len(maps)}"
            )
        return [branch(x) for branch, x in zip(self.branches, maps, strict=True)]
