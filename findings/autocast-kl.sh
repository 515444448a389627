#!/usr/bin/env bash
# Inside torch.autocast("cpu", torch.bfloat16), log_softmax of bfloat16 logits stays in bfloat16. A
# distillation loss by F.kl_div at temperature 4 of a student near its teacher is then negative for
# a good part of the rows, which no divergence is, and half of its gradient is noise. Most expect
# autocast to run softmax and losses in float32, as the CUDA list of it does.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy
cat > "$folder/kl.py" <<'PY'
import sys

import torch
import torch.nn.functional as F


def kl(student, teacher, temperature=4.0):
    log_q, log_p = (F.log_softmax(x / temperature, -1) for x in (student, teacher))
    terms = F.kl_div(log_q, log_p, reduction="none", log_target=True)
    return terms.sum(-1) * temperature**2, log_q.dtype


torch.manual_seed(0)
teacher = 3 * torch.randn(64, 1000)
student = (teacher + 0.1 * torch.randn(64, 1000)).bfloat16()
teacher = teacher.bfloat16()
results = {}
for name, of in (("float64", torch.float64), ("autocast", torch.bfloat16)):
    leaf = student.to(of).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=name == "autocast"):
        rows, dtype = kl(leaf, teacher.to(of))
    (grad,) = torch.autograd.grad(rows.sum(), leaf)
    results[name] = rows.detach().double(), grad.double(), dtype
exact, cast = results["float64"], results["autocast"]
off = ((cast[1] - exact[1]).norm() / exact[1].norm()).item()
negative = (cast[0] < 0).double().mean().item()
print("torch", torch.__version__)
print(f"expected: log_softmax in torch.float32, losses of {exact[0].min():.4f} to {exact[0].max():.4f}")
print(f"observed: {cast[2]}, losses of {cast[0].min():.4f} to {cast[0].max():.4f}, of which")
print(f"{negative:.0%} are below 0; the gradient is off by {off:.0%} of its length")
sys.exit(0 if cast[2] == torch.bfloat16 and negative > 0.1 and off > 0.4 else 1)
PY
"$folder/venv/bin/python" "$folder/kl.py"
