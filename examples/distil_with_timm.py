"""Distil with timm's training tasks: its train script with one line changed.

    python examples/distil_with_timm.py [--epochs 10] [--attention]

`FusedLogitDistillationTask` is timm's LogitDistillationTask with the fused loss: the same
arguments, loss and gradient. With --attention the student learns where the teacher looks instead:
`AttentionDistillationTask` takes the place of timm's FeatureDistillationTask. All else is timm's:
Mixup, criterion, optimiser, EMA. The images are scikit-learn's digits.
"""

import argparse

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask, TrainingTask
from torch import Tensor, nn

from vitkd_fast.timm_task import AttentionDistillationTask, FusedLogitDistillationTask


def load(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Images [1797, 3, 32, 32], normalised for the model, and their classes."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    images = F.interpolate(images, (32, 32), mode="bilinear")
    mean, std = (torch.tensor(model.pretrained_cfg[x]).view(3, 1, 1) for x in ("mean", "std"))
    return (images - mean) / std, torch.from_numpy(digits.target).long()


def train(task: TrainingTask, images: Tensor, labels: Tensor, epochs: int) -> float:
    """What timm's train script does with any task; the top-1 of the averaged weights."""
    mixup = Mixup(mixup_alpha=0.2, num_classes=10)
    # the trainable module also holds the projection that learns beside the student
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt="adamw", lr=2e-3)
    task.setup_ema(decay=0.95, use_warmup=True)
    task.train()
    for step in range(epochs * 28):
        rows = torch.randint(900, (32,))
        task(*mixup(images[rows], labels[rows]))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema(step)
    with torch.inference_mode():
        logits = task.get_eval_model(ema=True).eval()(images[900:])
    return (logits.argmax(1) == labels[900:]).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--epochs", type=int, default=10, help="of the student; the teacher: thrice"
    )
    parser.add_argument("--attention", action="store_true")
    given = parser.parse_args()

    torch.manual_seed(0)
    vit = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 2, "num_heads": 3}
    teacher = timm.create_model("vit_tiny_patch16_224", num_classes=10, **vit)
    task: TrainingTask = ClassificationTask(teacher, SoftTargetCrossEntropy())
    print(f"teacher   {train(task, *load(teacher), 3 * given.epochs):.1%}")

    student = timm.create_model("mobilenetv3_small_050", num_classes=10)
    models, weights = (student, teacher, SoftTargetCrossEntropy()), {"task_loss_weight": 0.5}
    if given.attention:  # stride 8: a map of 4 x 4, as many places as the teacher has patches
        task = AttentionDistillationTask(*models, stride=8, **weights)
    else:
        task = FusedLogitDistillationTask(*models, temperature=4.0, **weights)
    print(f"distilled {train(task, *load(student), given.epochs):.1%}")


if __name__ == "__main__":
    main()
