#!/usr/bin/env bash
# torchmetrics' calibration error of n_bins bins puts confidences of exactly 1 into one more.
# Guess: 15 bins, the last of them (14/15, 1], as in Guo et al., "On Calibration of Modern Neural Networks" (2017).
# Seen: a bin of its own for 1, which a saturated softmax reaches in float32. Errors that cancel within the last bin
# no longer do: a hair of confidence more changes the value.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchmetrics==1.9.0 numpy
"$folder/venv/bin/python" - <<'PY'
import sys

import torch
import torchmetrics
from torchmetrics.functional.classification import multiclass_calibration_error

labels = torch.tensor([0] * 195 + [1] * 5)
print("torch", torch.__version__, "torchmetrics", torchmetrics.__version__)
found = {}
for name, top in (("99.99%", 9.2), ("100%", 20.0)):
    # 100 answers at 95%, all right, and 100 surer ones, of which 5 are wrong
    logits = torch.tensor([[0.0, -2.9444]] * 100 + [[top, 0.0]] * 100)
    confidences = logits.softmax(1)
    ones = int((confidences.amax(1) == 1).sum())
    found[name] = multiclass_calibration_error(confidences, labels, 2, n_bins=15).item()
    print(f"100 answers at 95%, 100 at {name}: {ones} of exactly 1, error {found[name]:.4f}")
print("expected: about 0 for both, since the last of 15 bins holds all, and says what it reaches")
print(f"observed: {found['100%']:.2f} where the surer ones are exactly 1")
sys.exit(0 if found["100%"] > 0.049 and found["99.99%"] < 0.001 else 1)
PY
