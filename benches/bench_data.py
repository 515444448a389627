"""Training's batches on one thread, by CPU time: timm's loader; ours from files and packed ones.

500 photographs of ImageNet at 224 and 5,000 images of CIFAR-10 at 32, both as JPEG files, out of
VITKD_DATA (noise without it); random resized crops and flips, and `colour` with a colour jitter.
The time is that of one image, from its file to a uint8 batch; files are in the page cache.
"""

from __future__ import annotations

import os
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("timm")

import torch
from PIL import Image, ImageEnhance
from timm.data import create_dataset, create_loader

from vitkd_fast import images
from vitkd_fast.distill import pack
from vitkd_fast.distill.augment import colours, draw, uniform
from vitkd_fast.distill.config import validate
from vitkd_fast.distill.data import loaders
from vitkd_fast.distill.sources import open_data

TURBO = images.simplejpeg  # None without the extra `turbo`
ENHANCE = ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color
ARCHIVES = {"imagenet": "imagenet-sample-a.zip", "cifar": "cifar10-train.zip"}


def unpacked(kind: str, root: Path) -> Path:
    """A folder of class folders, with 500 photographs or the first 500 images of each class."""
    if folder := os.environ.get("VITKD_DATA"):
        with zipfile.ZipFile(Path(folder) / ARCHIVES[kind]) as archive:
            names = sorted(x for x in archive.namelist() if x.lower().endswith((".jpg", ".jpeg")))
            for i, name in enumerate(names):
                file = Path(name)
                if kind == "cifar" and int(file.stem) >= 500:
                    continue
                of = file.parent.name if kind == "cifar" else str(i % 10)
                (root / of).mkdir(parents=True, exist_ok=True)
                (root / of / file.name).write_bytes(archive.read(name))
        return root
    rng = np.random.default_rng(0)
    height, width = (32, 32) if kind == "cifar" else (375, 500)
    for i in range(200):
        (root / str(i % 10)).mkdir(parents=True, exist_ok=True)
        noise = rng.integers(256, size=(height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / str(i % 10) / f"{i}.jpg")
    return root


class Ours:
    """Batches of `loaders`; decoder is simplejpeg, or None: Pillow decodes."""

    def __init__(
        self, train: Path, size: int, batch: int, jitter: float, decoder: object = TURBO
    ) -> None:
        self.decoder = decoder
        tree = {
            "data": {
                "train": str(train),
                "image_size": size,
                "batch_size": batch,
                "workers": 0,
                "holdout": 0.02,
            },
            "augmentation": {"color_jitter": jitter},
            "student": {"model": "mobilenetv2_050"},
            "losses": {"ce": {}},
        }
        config = validate(tree)
        self.source = open_data(config.data).train
        self.jitter, self.size = jitter, size
        self.loader, _ = loaders(config, open_data(config.data), seed=0)

    def __call__(self) -> int:
        images.simplejpeg = self.decoder
        return sum(len(batch.labels) for batch in self.loader.epoch())

    def check(self) -> None:
        """A batch is Pillow's pixels, of the crops, flips and colours that are drawn."""
        batch = next(self.loader.epoch())
        indices = batch.indices.tolist()
        drawn = uniform(draw(0, 0), indices, 64)
        frames = [self.source.read(i)[0] for i in indices]
        boxes = self.loader._dataset.transform.boxes([x.shape[:2] for x in frames], drawn)
        factors, orders = colours(drawn[:, 23:27], self.jitter)
        for i, image in enumerate(batch.images.permute(0, 2, 3, 1).numpy()):
            top, left, height, width, flip = boxes[i].tolist()
            crop = Image.fromarray(frames[i]).crop((left, top, left + width, top + height))
            for size in ((self.size, height), (self.size, self.size)):  # rows first
                crop = crop.resize(size, Image.Resampling.BICUBIC)
            if flip:
                crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            for which in orders[i] if self.jitter else ():
                crop = ENHANCE[which](crop).enhance(float(factors[i, which]))
            assert np.abs(image.astype(int) - np.asarray(crop)).max() <= 1


class Timms:
    def __init__(self, train: Path, size: int, batch: int, jitter: float) -> None:
        loader = create_loader(
            create_dataset("", root=str(train), is_training=True),
            input_size=(3, size, size),
            batch_size=batch,
            is_training=True,
            interpolation="bicubic",
            color_jitter=jitter or None,  # type: ignore[arg-type]
            num_workers=0,
            persistent_workers=False,
            device=torch.device("cpu"),
        )
        self.loader = loader.loader  # uint8 batches, before they are normalised

    def __call__(self) -> int:
        return sum(len(labels) for _, labels in self.loader)

    def check(self) -> None:
        batch, _ = next(iter(self.loader))
        assert batch.dtype == torch.uint8 and batch.shape[2] == batch.shape[3]


@pytest.mark.parametrize("jitter", [0.0, 0.4], ids=["crop", "colour"])
@pytest.mark.parametrize("kind", ["imagenet", "cifar"])
def bench_data(race, tmp_path, kind, jitter):
    train = unpacked(kind, tmp_path / "train")
    chosen = pack.choose(str(train), "", False, False)
    forms = {"packed": {}, "packed, as files": {"encoded": True}}
    if kind == "imagenet":
        forms["packed at 256"] = {"size": 256}
    paths = {name: tmp_path / f"{name}.pack" for name in forms}
    for name, path in paths.items():
        pack.write(path, chosen, **forms[name])
    common = (224, 49, jitter) if kind == "imagenet" else (32, 100, jitter)
    contenders = {"timm": Timms(train, *common), "vitkd_fast": Ours(train, *common)}
    contenders["vitkd_fast, Pillow decodes"] = Ours(train, *common, decoder=None)
    contenders |= {f"vitkd_fast, {name}": Ours(path, *common) for name, path in paths.items()}

    def check(name, contender):
        contender.check()

    def cpu(contender):
        start = time.thread_time()
        count = contender()
        return (time.thread_time() - start) / count

    table = race(contenders, check=check, timed=cpu, rounds=5)
    for row in table.values():
        row["images_per_s"] = 1e6 / row["median_us"]
