"""Distil a vision transformer into a MobileNet in a training loop of your own.

    python examples/distil_own_loop.py [--epochs 10]

The only line that differs from a plain PyTorch loop is the loss: `kd_loss` computes

    kd_weight * T^2 * KL(teacher || student) + ce_weight * CE(student, labels)

and its gradient in one pass over the logits. The images are scikit-learn's 1,797 digits, so there
is nothing to download; needs timm and scikit-learn. Half a minute on one core.
"""

import argparse

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from vitkd_fast.functional import kd_loss


def load() -> tuple[Tensor, Tensor]:
    """Images [1797, 3, 32, 32] of 8 x 8 pixels made larger, and their classes."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    images = F.interpolate(images, (32, 32), mode="bilinear").expand(-1, 3, -1, -1)
    return (images - 0.5) / 0.5, torch.from_numpy(digits.target).long()


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, loss_of) -> None:
    """The loop; loss_of(logits, images, labels) is what a step minimises."""
    steps = epochs * (len(images) // 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(32)[: len(images) // 32]:
            loss = loss_of(model(images[rows]), images[rows], labels[rows])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    model.eval()


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (model(images).argmax(1) == labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--epochs", type=int, default=10, help="of the student; the teacher: thrice"
    )
    epochs = parser.parse_args().epochs
    torch.manual_seed(0)
    images, labels = load()
    training, test = (images[:900], labels[:900]), (images[900:], labels[900:])

    vit = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 2, "num_heads": 3}
    teacher = timm.create_model("vit_tiny_patch16_224", num_classes=10, **vit)
    train(teacher, *training, 3 * epochs, lambda logits, _, y: F.cross_entropy(logits, y))
    print(f"teacher   {accuracy(teacher, *test):.1%}")

    def distil(logits: Tensor, x: Tensor, y: Tensor) -> Tensor:
        with torch.inference_mode():
            answers = teacher(x)
        return kd_loss(logits, answers, temperature=4.0, labels=y, kd_weight=0.5, ce_weight=0.5)

    student = timm.create_model("mobilenetv3_small_050", num_classes=10)
    train(student, *training, epochs, distil)
    print(f"distilled {accuracy(student, *test):.1%}")


if __name__ == "__main__":
    main()
