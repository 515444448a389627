"""Whether a student could still be quantised: looked at during its training, on few images.

    agreement = mean[argmax z = argmax q],  sqnr = 10 log10(sum z^2 / sum (z - q)^2)

z are logits of the float student as it is, q those of the int8 engine on what `int8.quantize` makes
of it, both on validation images; ranges are calibrated on training images. The images are
evenly spread and read once, so that looks differ by the student alone.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn

from .. import int8, models
from . import preflight, quantized, sources
from .config import Config


class Watch:
    """Compares students with themselves in int8; the first rank's work.

    Args:
        config: of the images and of `int8`.
        splits: images of training and of validation.
        ranks: processes of the run, among which loaders share images out.
    """

    def __init__(self, config: Config, splits: sources.Splits, ranks: int = 1) -> None:
        self.config, self.splits, self.ranks = config, splits, ranks

    @functools.cached_property
    def images(self) -> tuple[Tensor, Tensor]:
        """To calibrate on and to judge by, uint8 [N, H, W, 3] each."""
        count, parts = self.config.int8.watch_images, (self.splits.train, self.splits.val)
        first, second = (quantized.images(self.config, x, count, self.ranks) for x in parts)
        return first, second

    def __call__(self, student: nn.Module) -> dict[str, float | str]:
        """agreement and sqnr (dB) of a float student in evaluation mode, or "error": why not.

        With several labels an image, agreement is that of all decisions.
        """
        calibration, judged = self.images
        several = bool(self.config.data.labels)
        try:
            made = quantized.quantize(
                student,
                calibration,
                pixels=preflight.pixels(self.config, student),
                classes=self.splits.classes,
                multilabel=several,
                calibration=self.config.int8.calibration,
            )
        except ValueError as error:  # diverged, or with an operation that the engine lacks
            return {"error": " ".join(str(error).split())}
        q = torch.from_numpy(int8.load(made.graph)(judged.numpy()))
        predict = models.predictor(student).to(next(student.parameters()).device)
        with torch.inference_mode():
            z = predict(judged.permute(0, 3, 1, 2).to(next(student.parameters()).device)).cpu()
        if not z.isfinite().all():
            return {"error": "the float student's logits are NaN or Inf"}
        same = (z > 0) == (q > 0) if several else z.argmax(1) == q.argmax(1)
        signal, noise = (float(x.double().square().sum()) for x in (z, z - q))
        tiny = 1e-300  # equal logits, or zeros, have a number, too
        decibels = 10 * math.log10(max(signal, tiny) / max(noise, tiny))
        return {"agreement": float(same.double().mean()), "sqnr": decibels}
