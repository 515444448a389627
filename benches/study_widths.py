"""Which widths does the int8 engine run fast? Students without 30% of their channels, by multiples.

`python benches/study_widths.py` prunes each student so that layers keep any number of channels, or
a multiple of 4, 8, 16 or 32, quantizes it, and times one image at 224 x 224 on one thread, all
students in turns. Times are the least CPU time of 40 calls, which other work on the machine hardly
changes. The figures go to benches/results/study-widths.json.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from study_cifar10 import machine
from vitkd_fast import int8, models, pruning
from vitkd_fast.distill import evaluate

RESULTS = Path(__file__).parent / "results" / "study-widths.json"
STUDENTS = ("mobilenetv2_100", "mobilenetv4_conv_small")
SIZE, SHARE, CALLS = 224, 0.3, 40


def made(name: str, multiple: int, folder: Path) -> tuple[dict[str, float], int8.Session]:
    """A student's size, and it in the engine; multiple 0: as it is."""
    torch.manual_seed(0)
    model = models.create(name, num_classes=1000, image_size=SIZE)
    if multiple:
        pruning.prune(model, SHARE, SIZE, multiple=multiple)
    pixels = np.random.default_rng(0).integers(256, size=(4, SIZE, SIZE, 3), dtype=np.uint8)
    half = (0.5, 0.5, 0.5)
    quantized = int8.quantize(
        model.eval(), pixels, mean=half, std=half, calibration="minmax", bias_correction=False
    )
    file = folder / f"{name}-{multiple}.int8.safetensors"
    quantized.save(file)
    size = {
        "MMACs": evaluate.count_macs(model, SIZE) / 1e6,
        "million parameters": sum(x.numel() for x in model.parameters()) / 1e6,
    }
    return size, int8.load(file)


def main() -> None:
    image = np.random.default_rng(1).integers(256, size=(1, SIZE, SIZE, 3), dtype=np.uint8)
    benches: list[dict[str, Any]] = []
    for name in STUDENTS:
        with tempfile.TemporaryDirectory() as folder:
            found = {m: made(name, m, Path(folder)) for m in (0, 1, 4, 8, 16, 32)}
        least = dict.fromkeys(found, float("inf"))
        for _ in range(CALLS):
            for multiple, (_, session) in found.items():
                start = time.process_time()
                session(image)
                least[multiple] = min(least[multiple], time.process_time() - start)
        rows = {
            f"multiples of {m}" if m else "whole": size
            | {"CPU ms": 1e3 * least[m], "GMAC/s": size["MMACs"] / 1e3 / least[m]}
            for m, (size, _) in found.items()
        }
        info = {"study": rows, "device": "cpu, 1 thread(s)", "torch": torch.__version__}
        benches.append({"name": f"widths[{name}]", "extra_info": info})
    found_all = {"machine_info": machine(), "benchmarks": benches}
    RESULTS.write_text(json.dumps(found_all, indent=1) + "\n")


if __name__ == "__main__":
    main()
