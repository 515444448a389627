#!/usr/bin/env bash
# A MobileNetV2 of timm's for 10 classes begins with a cross-entropy of 7.8, where guessing has 2.3:
# its classifier is drawn within 1 / sqrt(classes), not within 1 / sqrt(features) as torch's
# Linear. With 1000 classes the two are alike; the fewer classes, the larger the first logits. Most
# expect a fresh classifier to begin near the loss of guessing, whatever the number of classes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 timm==1.0.31 numpy
cat > "$folder/first.py" <<'PY'
import math
import sys

import timm
import torch

torch.set_num_threads(1)
print("torch", torch.__version__, "timm", timm.__version__)
over = {}
for name in ("mobilenetv2_050", "mobilenetv3_small_100", "mobilenetv4_conv_small", "resnet18"):
    for classes in (2, 10, 1000):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=classes).train()
        with torch.no_grad():
            logits = model(torch.randn(64, 3, 64, 64))
        loss = torch.nn.functional.cross_entropy(logits, torch.arange(64) % classes).item()
        over[name, classes] = loss - math.log(classes)
        print(f"{name}, {classes} classes: loss {loss:.2f}, that of guessing {math.log(classes):.2f}")
few = [x for (name, n), x in over.items() if n < 1000 and "mobilenet" in name]
many = [x for (name, n), x in over.items() if n == 1000 or name == "resnet18"]
print("expected: within 0.5 of guessing for any number of classes")
print(f"observed: MobileNets of 2 and 10 classes are {min(few):.1f} to {max(few):.1f} above it")
sys.exit(0 if min(few) > 0.5 and max(few) > 4 and max(many) < 0.5 else 1)
PY
"$folder/venv/bin/python" "$folder/first.py"
