#!/usr/bin/env bash
# transformers' MobileNetV2 trains with running statistics of its last batch.
# Guess: momentum 0.1, PyTorch's default, as in torchvision and timm.
# Seen: MobileNetV2Config has no momentum; every BatchNorm2d is built with 0.997, TensorFlow's decay, which
# PyTorch reads as the share of the NEW batch. After one training step on an odd batch, 99.7% of what went before is
# forgotten, and eval() normalises with that batch's mean.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 transformers==5.24.0
"$folder/venv/bin/python" - <<'PY'
import torch, transformers
from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

torch.manual_seed(0)
config = MobileNetV2Config(depth_multiplier=0.35, image_size=96, num_labels=3)
model = MobileNetV2ForImageClassification(config)
norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
momenta = {m.momentum for m in norms}
print("transformers", transformers.__version__, "batch norms", len(norms), "momenta", momenta)

first = norms[0]
usual, odd = torch.randn(8, 3, 96, 96), torch.randn(8, 3, 96, 96) + 5
model.train()
with torch.no_grad():
    for _ in range(20):
        model(usual)
    before = first.running_mean.clone()
    model(odd)
    after = first.running_mean.clone()
    model(odd)
    last = first.running_mean.clone()
moved = ((after - before).norm() / (last - before).norm()).item()
print(f"one batch moved the running mean {moved:.1%} of the way to that batch's")
assert momenta == {0.997}, momenta
assert moved > 0.99, moved
PY
