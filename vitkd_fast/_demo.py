"""`vitkd demo`: a small vision transformer teaches a CNN a hundredth of its size to read digits.

scikit-learn's 1,797 scans of 8x8 pixels come with it, so this needs no network. Labels are what is
scarce, as they often are: the student alone learns from 100 labelled pictures, the distilled one,
from the same three seeds, from the teacher's answers on all training pictures and no label.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .functional import kd_loss

TEMPERATURE = 2.0
SEEDS = (0, 1, 2)
STEPS = 500
LABELLED = 100  # pictures whose labels the student alone may see

Loss = Callable[[Tensor], Tensor]


class PatchTransformer(nn.Module):
    """A vision transformer, [B, 1, 8, 8] -> logits [B, 10], 16 tokens.

    With so few pictures its patches are embedded by convolutions (Xiao et al., 2021,
    arXiv:2106.14881).
    """

    def __init__(self, dim: int = 64, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, dim, 3, stride=2, padding=1),
        )  # fmt: skip
        self.position = nn.Parameter(torch.randn(1, 16, dim) * 0.02)
        layer = nn.TransformerEncoderLayer(
            dim, 4, 2 * dim, dropout=0.1, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.blocks(tokens).mean(1))


def small_student() -> nn.Module:
    """Depthwise-separable, as MobileNets are: [B, 1, 8, 8] -> logits [B, 10]."""

    def separable(inputs: int, outputs: int) -> list[nn.Module]:
        return [
            nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False),
            nn.BatchNorm2d(inputs), nn.ReLU6(),
            nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU6(),
        ]  # fmt: skip

    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
        *separable(8, 16), nn.MaxPool2d(2), *separable(16, 32),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def _digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(digits.target, dtype=torch.int64)
    train, test = train_test_split(range(len(y)), test_size=0.5, random_state=0, stratify=y)
    return x[train], y[train], x[test], y[test]


def _train(model: nn.Module, loss: Loss, pictures: int, seed: int, steps: int) -> None:
    """`loss(batch)` is the loss on the pictures of these indices."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    model.train()
    for _ in range(steps):
        batch = torch.randint(pictures, (64,), generator=generator)
        optimizer.zero_grad()
        loss(batch).backward()
        optimizer.step()
    model.eval()


@torch.inference_mode()
def _accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return 100 * (model(x).argmax(1) == y).double().mean().item()


def demo() -> None:
    """Trains teacher and students, and prints what came out, whatever it is."""
    start = time.perf_counter()
    torch.set_num_threads(1)  # models as small as these gain nothing from more
    x, y, test_x, test_y = _digits()
    torch.manual_seed(0)
    teacher = PatchTransformer()
    _train(teacher, lambda i: F.cross_entropy(teacher(x[i]), y[i]), len(y), 0, STEPS)
    print(
        f"teacher, a transformer of {_size(teacher):,} parameters, {len(y)} labelled pictures: "
        f"{_accuracy(teacher, test_x, test_y):.1f}% right"
    )
    with torch.inference_mode():
        answers = teacher(x)

    scores: dict[str, list[float]] = {"alone": [], "distilled": []}
    for seed in SEEDS:
        for way, reached in scores.items():
            torch.manual_seed(seed)
            student = small_student()

            def alone(i: Tensor, student: nn.Module = student) -> Tensor:
                return F.cross_entropy(student(x[i]), y[i])

            def distilled(i: Tensor, student: nn.Module = student) -> Tensor:
                return kd_loss(student(x[i]), answers[i], temperature=TEMPERATURE)

            if way == "alone":
                _train(student, alone, LABELLED, seed, STEPS)
            else:
                _train(student, distilled, len(y), seed, STEPS)
            reached.append(_accuracy(student, test_x, test_y))
    for way, taught in (
        ("alone", f"{LABELLED} labelled pictures"),
        ("distilled", f"the teacher's answers on {len(y)} pictures, no labels"),
    ):
        print(
            f"student {way}, a CNN of {_size(student):,} parameters, {taught}: "
            f"{statistics.mean(scores[way]):.1f} +- {statistics.stdev(scores[way]):.1f}% right"
        )
    print(
        f"({len(test_y)} test pictures, {len(SEEDS)} seeds, "
        f"{time.perf_counter() - start:.0f} s on one thread)"
    )


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
