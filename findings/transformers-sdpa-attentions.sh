#!/usr/bin/env bash
# A transformers ViT asked for its attentions may give an empty tuple, and a loss over it is a silent 0.
# Guess: output_attentions=True raises, or falls back to eager attention, where fused attention has no maps.
# Seen: under sdpa (the default) `attentions` is an empty tuple without an exception; sum() or zip() over it is 0.
# With attn_implementation="eager" there is one map per block.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 transformers==5.24.0
"$folder/venv/bin/python" - <<'PY'
import torch, transformers
from transformers import ViTConfig, ViTModel

sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8)
found = {}
for implementation in (None, "sdpa", "eager"):
    arguments = {} if implementation is None else {"attn_implementation": implementation}
    model = ViTModel._from_config(ViTConfig(**sizes), **arguments).eval()
    with torch.no_grad():
        attentions = model(torch.zeros(1, 3, 32, 32), output_attentions=True).attentions
    found[implementation] = attentions if attentions is None else [None if x is None else tuple(x.shape) for x in attentions]
print("transformers", transformers.__version__, found)
assert found[None] == [] and found["sdpa"] == [], found
assert found["eager"] == [(1, 2, 17, 17)] * 2, found
PY
