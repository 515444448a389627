"""A ViT and MobileNets that are trained on scikit-learn's digits in seconds, and their images."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vitkd_fast import int8, models
from vitkd_fast.distill import datasets
from vitkd_fast.images import prepare

CLASSES = [str(i) for i in range(10)]
PIXELS = models.Pixels(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear", 1.0)
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 2}


class Trained(NamedTuple):
    """Files of models, and the folder of images that none of them was trained on."""

    teacher: Path
    student: Path
    biased: Path  # a student that saw most images of the class 3 under other labels
    int8: Path  # the student
    folder: Path


def digits() -> tuple[Tensor, Tensor]:
    """All images as uint8 [N, 3, 32, 32], and their labels."""
    source = datasets.Digits()
    images = np.stack([prepare(source.read(i)[0], PIXELS) for i in range(len(source))])
    return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(source.labels)


def fit(name: str, options: dict, images: Tensor, labels: Tensor, epochs: int, lr: float):
    """A model of 10 classes, in eval mode."""
    torch.manual_seed(0)
    model = models.create(name, num_classes=10, options=options)
    predictor = models.predictor(model, PIXELS)
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    steps = epochs * (len(labels) // 50)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(labels)).split(50)[: len(labels) // 50]:
            optimizer.zero_grad()
            F.cross_entropy(predictor(images[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def save(path: Path, model: torch.nn.Module, name: str, options: dict) -> Path:
    models.save(
        path, model, name=name, options=options, num_classes=10, pixels=PIXELS, classes=CLASSES
    )
    return path


def train(root: Path) -> Trained:
    """Trains on two thirds of the images; the others lie in root/images/<class>/."""
    images, labels = digits()
    here = torch.arange(len(labels)) % 3 > 0
    vit, net = ("vit_tiny_patch16_224", VIT), ("mobilenetv3_small_050", {})
    teacher = fit(*vit, images[here], labels[here], 25, 3e-3)
    student = fit(*net, images[here], labels[here], 10, 1e-2)
    noised = labels.clone()
    wrong = here & (labels == 3) & (torch.rand(len(labels)) < 0.8)
    noised[wrong] = (labels[wrong] + torch.randint(1, 10, (int(wrong.sum()),))) % 10
    biased = fit(*net, images[here], noised[here], 10, 1e-2)
    calibration = images[here][:64].permute(0, 2, 3, 1).contiguous().numpy()
    quantized = int8.quantize(
        student, calibration, mean=PIXELS.mean, std=PIXELS.std, classes=CLASSES
    )
    quantized.save(root / "student.int8.safetensors")
    source = datasets.Digits()
    for i in (~here).nonzero().flatten().tolist():
        image, label = source.read(i)
        folder = root / "images" / CLASSES[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i}.png")
    return Trained(
        save(root / "teacher.safetensors", teacher, *vit),
        save(root / "student.safetensors", student, *net),
        save(root / "biased.safetensors", biased, *net),
        root / "student.int8.safetensors",
        root / "images",
    )
