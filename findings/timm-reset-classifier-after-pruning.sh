#!/usr/bin/env bash
# A timm MobileNet whose channels torch-pruning removed does not take another number of classes.
# Guess: reset_classifier reads the width of the classifier that is there.
# Seen: it reads num_features or head_hidden_size, which torch-pruning does not change. MobileNetV2's new classifier
# has the old width, which shows only when the model is called; MobileNetV3 refuses by an assertion about its pooling.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 timm==1.0.31 torch-pruning==1.6.1 numpy
"$folder/venv/bin/python" - <<'PY'
import sys

import timm
import torch
import torch_pruning

print("torch", torch.__version__, "timm", timm.__version__, "torch-pruning", torch_pruning.__version__)
images, seen = torch.randn(1, 3, 64, 64), {}
for name in ("mobilenetv2_100", "mobilenetv3_small_100"):
    model = timm.create_model(name, num_classes=10).eval()
    torch_pruning.pruner.MagnitudePruner(
        model,
        images,
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=0.3,
        ignored_layers=[model.classifier],
    ).step()
    assert model(images).shape == (1, 10)
    read, remembered = model.classifier.in_features, model.head_hidden_size
    print(f"{name}: the classifier reads {read} channels, timm remembers {remembered}")
    try:
        model.reset_classifier(5)
        model(images)
        seen[name] = "works"
    except (AssertionError, RuntimeError) as error:
        seen[name] = type(error).__name__
    print(f"  reset_classifier(5), and a call: {seen[name]}")
print("expected: logits of 5 classes from both")
print("observed: neither")
sys.exit(0 if seen == {"mobilenetv2_100": "RuntimeError", "mobilenetv3_small_100": "AssertionError"} else 1)
PY
