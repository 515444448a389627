#!/usr/bin/env bash
# timm numbers the classes of a folder in an order that depends on PYTHONHASHSEED.
# create_dataset("", root) sorts a set by a natural key for which Cat and cat, or 1 and 01, are equal: where class
# folders differ by no more, the processes of one training can disagree on every label, and a resume can swap them.
# Its classes are the last folders of each path besides: of cat/batch1, cat/batch2 and dog/batch1 it makes the classes
# batch1 and batch2, where torchvision's ImageFolder has cat and dog.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q timm==1.0.31
cd "$folder"
venv/bin/python - <<'P'
import os
import subprocess
import sys
from pathlib import Path

import timm
import torchvision
from PIL import Image
from timm.data import create_dataset

print("timm", timm.__version__, "torchvision", torchvision.__version__)
for name in "case/Cat case/cat case/01 case/1 deep/cat/batch1 deep/cat/batch2 deep/dog/batch1".split():
    Path(name).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(f"{name}/0.png")
code = "from timm.data import create_dataset as c; print(c('', root='case').reader.class_to_idx)"
orders = {
    subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": str(seed)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    for seed in range(5)
}
theirs = torchvision.datasets.ImageFolder("deep").class_to_idx
last = create_dataset("", root="deep").reader.class_to_idx
print("hash seeds 0 to 4: expected one order, observed", *sorted(orders), sep="\n  ")
print("sub-folders: expected, as torchvision,", theirs, "observed", last)
sys.exit(not (len(orders) > 1 and list(theirs) == ["cat", "dog"] and list(last) == ["batch1", "batch2"]))
P
