"""Bounds of mean, std and crop_pct, the same wherever they enter; nothing here imports torch.

Mean and std are of pixels in [0, 1], where OpenVINO, ncnn and mmcv want them of pixels in 0..255;
crop_pct is a share, not a percentage.
"""

from __future__ import annotations

from typing import Any


def check(mean: Any, std: Any, crop_pct: float) -> None:
    """Checks three numbers each for mean and std.

    Raises:
        ValueError: names the argument, what was expected and what was given.
    """
    for name, value in (("mean", mean), ("std", std)):
        wanted = "[0, 1]" if name == "mean" else "(0, 1]"
        fit = len(value) == 3 and all(0 <= x <= 1 and (name == "mean" or x > 0) for x in value)
        if not fit:
            pixels = any(1 < abs(x) <= 255 for x in value)
            hint = "; divide by 255 what is for pixels in 0..255" if pixels else ""
            raise ValueError(
                f"{name}: expected three numbers in {wanted}, got {tuple(value)}{hint}"
            )
    if not 0.1 <= crop_pct <= 2:
        hint = "; divide a percentage by 100" if 2 < crop_pct <= 200 else ""
        raise ValueError(f"crop_pct: expected 0.1 to 2, got {crop_pct}{hint}")
