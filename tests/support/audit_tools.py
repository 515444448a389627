"""A ViT and MobileNets that are trained on scikit-learn's digits in seconds, and their images."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vitkd_fast import models
from vitkd_fast.distill import datasets
from vitkd_fast.images import prepare
from vitkd_fast.int8 import quantize

CLASSES = [str(i) for i in range(10)]
PIXELS = models.Pixels(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear", 1.0)
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
STUDENT = ("mobilenetv3_small_050", {})


class Trained:
    """Files of models, each trained when it is asked for, and images that none was trained on."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.images, self.labels = digits()
        self.here = torch.arange(len(self.labels)) % 3 > 0

    @cached_property
    def folder(self) -> Path:
        """A third of the images, as <class>/<number>.png."""
        source, root = datasets.Digits(), self.root / "images"
        for i in (~self.here).nonzero().flatten().tolist():
            image, label = source.read(i)
            folder = root / CLASSES[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{i}.png")
        return root

    @cached_property
    def teacher(self) -> Path:
        return self._fit("teacher", ("vit_tiny_patch16_224", VIT), self.labels, 15, 3e-3)

    @cached_property
    def student(self) -> Path:
        return self._fit("student", STUDENT, self.labels, 6, 1e-2)

    @cached_property
    def biased(self) -> Path:
        """A student that saw most images of the class 3 under other labels."""
        torch.manual_seed(0)
        noised = self.labels.clone()
        wrong = (noised == 3) & (torch.rand(len(noised)) < 0.8)
        noised[wrong] = (noised[wrong] + torch.randint(1, 10, (int(wrong.sum()),))) % 10
        return self._fit("biased", STUDENT, noised, 6, 1e-2)

    @cached_property
    def int8(self) -> Path:
        """The student."""
        images = self.images[self.here][:64].permute(0, 2, 3, 1).contiguous().numpy()
        model = models.load(self.student).model
        quantized = quantize(model, images, mean=PIXELS.mean, std=PIXELS.std, classes=CLASSES)
        quantized.save(self.root / "student.int8.safetensors")
        return self.root / "student.int8.safetensors"

    def _fit(self, file: str, of: tuple[str, dict], labels: Tensor, epochs: int, lr: float) -> Path:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        model = fit(*of, self.images[self.here], labels[self.here], epochs, lr)
        torch.set_num_threads(threads)
        return save(self.root / f"{file}.safetensors", model, *of)


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
