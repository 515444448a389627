"""A step of quantisation-aware training beside a float step of the same model, in CPU time.

One thread. Float: the model in training mode, its normalisation, cross-entropy, AdamW. Aware: the
same through `int8.QuantizationAware`, with batch norms over the batch ("live") and frozen. They
take turns, and the ratio is the median of those of the turns. A module whose logits are not the
engine's is not timed.
"""

from __future__ import annotations

import statistics
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("timm")

import timm

from vitkd_fast import int8, models

STEPS = 5
CASES = [("mobilenetv3_small_100", 112, 32), ("mobilenetv3_small_100", 224, 32),
         ("mobilenetv2_100", 112, 32), ("mobilenetv2_100", 224, 32)]  # fmt: skip


def turns(name: str, size: int, batch: int) -> dict[str, list[float]]:
    """Seconds of each step, after one that warms up."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval().to(memory_format=torch.channels_last)
    pixels = np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), np.uint8)
    start = int8.quantize(model, pixels[:4], bias_correction=False)
    module = int8.QuantizationAware(model, start).eval()
    images, labels = torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.randint(1000, (batch,))
    with torch.no_grad():
        same = np.array_equal(module(images[:2]).numpy(), int8.load(module.graph())(pixels[:2]))
    assert same, f"{name}: other logits than the engine's"
    predict = models.predictor(model).train()
    module.train()
    kinds = {"float": predict, "live": module, "frozen": module}
    optimizers = {
        kind: torch.optim.AdamW(forward.parameters(), 1e-5, fused=True)
        for kind, forward in kinds.items()
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(1 + STEPS):
        for kind, forward in kinds.items():
            module.freeze_batch_norm(kind == "frozen")
            begin = time.thread_time()
            F.cross_entropy(forward(images), labels).backward()
            optimizers[kind].step()
            optimizers[kind].zero_grad()
            seconds[kind].append(time.thread_time() - begin)
    return {kind: values[1:] for kind, values in seconds.items()}


@pytest.mark.parametrize(("name", "size", "batch"), CASES)
def bench_step(benchmark, capsys, name, size, batch):
    torch.set_num_threads(1)
    seconds = turns(name, size, batch)
    found = {"float, ms": 1e3 * statistics.median(seconds["float"])}
    for kind in ("live", "frozen"):
        pairs = zip(seconds[kind], seconds["float"], strict=True)
        found[f"{kind} / float"] = statistics.median(aware / plain for aware, plain in pairs)
    case = f"{name}, {size} pixels, batch {batch}"
    benchmark.extra_info |= {"study": {case: found}, "device": "cpu, 1 thread(s)"}
    benchmark.extra_info["torch"] = torch.__version__
    with capsys.disabled():
        print(f"\n  {case}:", ", ".join(f"{key} {value:.3g}" for key, value in found.items()))
    benchmark.pedantic(lambda: None, rounds=1)
