#!/usr/bin/env bash
# torchdistill's PKTLoss, like the authors' code that it refactors, adds an epsilon inside the
# logarithm: mean p log((p + eps) / (q + eps)), with p and q rows of (cosine + 1) / 2 that sum to 1.
# Its gradient in q is -p / (q + eps), at q = p no constant, which alone would vanish in the rows'
# normalisation. So a student that is its teacher has a gradient, most where embeddings are nearly
# opposite, and descent leads away from the teacher to a loss below 0. Most expect a divergence to
# be least, and flat, where both are equal; it is, with p + eps in front of the logarithm, too.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torchdistill==1.1.5 torch==2.14.1 torchvision==0.29.1 numpy
cat > "$folder/pkt.py" <<'PY'
import sys
from importlib.metadata import version

import torch
from torchdistill.losses.mid_level import PKTLoss

loss = PKTLoss("head", "input", "head", "input")  # eps of 1e-7


def value_and_grad(student, teacher):
    student = student.detach().requires_grad_()
    value = loss({"head": {"input": student}}, {"head": {"input": teacher}})
    return value.item(), torch.autograd.grad(value, student)[0]


torch.manual_seed(0)
half = torch.randn(32, 16, dtype=torch.float64)
teacher = torch.cat([half, -half + 0.01 * torch.randn_like(half)])  # some are nearly opposite
at_teacher, grad = value_and_grad(teacher.clone(), teacher)
_, untrained = value_and_grad(torch.randn_like(teacher), teacher)
share = (grad.norm() / untrained.norm()).item()
student = teacher.clone()
for _ in range(300):
    student = student - 100 * value_and_grad(student, teacher)[1]
after, _ = value_and_grad(student, teacher)
print("torchdistill", version("torchdistill"), "torch", torch.__version__)
print("expected, of a student equal to its teacher in float64: loss 0, the least, and gradient 0")
print(f"observed: loss {at_teacher:.3g}, gradient of norm {grad.norm():.3g}, {share:.2g} of that of")
print(f"random embeddings; after 300 steps down that gradient the loss is {after:.3g}")
sys.exit(0 if at_teacher == 0 and share > 1e-5 and after < -1e-12 else 1)
PY
"$folder/venv/bin/python" "$folder/pkt.py"
