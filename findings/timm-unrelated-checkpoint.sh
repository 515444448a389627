#!/usr/bin/env bash
# timm loads any weights for a model whose number of classes is not the pretrained config's.
# create_model(name, pretrained=True, num_classes=N, pretrained_cfg_overlay={"file": ...}) is the way
# to fine-tune from a file of one's own. With N = 1000 (the config's) a file of another network raises,
# as expected. With any other N timm drops the classifier and loads with strict=False: a file of which
# not one key fits is taken, and every weight stays random; only a warning is logged.
# Stated otherwise: "num_classes" in the overlay too makes it strict again.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q timm==1.0.31
cd "$folder"
venv/bin/python - <<'P'
import sys

import timm
import torch

print("timm", timm.__version__, "torch", torch.__version__)
torch.save({"of.another.network": torch.ones(3)}, "other.pth")


def load(**overlay):
    classes = overlay.pop("classes")
    torch.manual_seed(0)
    overlay = {"file": "other.pth", **overlay}
    arguments = {"num_classes": classes, "pretrained_cfg_overlay": overlay}
    return timm.create_model("mobilenetv3_small_050", pretrained=True, **arguments)


def raises(**arguments):
    try:
        load(**arguments)
    except RuntimeError:
        return True
    return False


found = {
    "1000 classes": raises(classes=1000),
    "3 classes": raises(classes=3),
    "3 classes, said in the overlay": raises(classes=3, num_classes=3),
}
print("expected: each raises. Found:", found)
torch.manual_seed(0)
random = timm.create_model("mobilenetv3_small_050", num_classes=3).state_dict()
loaded = load(classes=3).state_dict()
same = all(loaded[key].equal(random[key]) for key in random)
print("with 3 classes every weight is the random one:", same)
sys.exit(list(found.values()) != [True, False, True] or not same)
P
