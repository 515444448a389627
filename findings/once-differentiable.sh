#!/usr/bin/env bash
# A gradient penalty through an operation that is @once_differentiable, and through a function that
# torch.compile compiled, is dropped without an error where the input is reached in another way,
# too. Most expect an error: torch's words are "trying to differentiate twice a function that was
# marked with @once_differentiable" and "torch.compile with aot_autograd does not currently support
# double backward", and both are given in other cases.
# once_differentiable marks gradients only if the incoming gradient requires grad; a compiled
# function raises only if its backward kept an input (sin does, exp keeps its output).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy
cat > "$folder/twice.py" <<'PY'
import sys

import torch
from torch.autograd.function import once_differentiable


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


def penalty(function):
    """The gradient of x + |gradient|^2, or the error."""
    x = torch.tensor([0.1, 0.2], requires_grad=True)
    try:
        (grad,) = torch.autograd.grad(function(x), x, create_graph=True)
        return torch.autograd.grad(x.sum() + grad.square().sum(), x)[0].tolist()
    except RuntimeError as error:
        return str(error)


def exp(x):
    return x.exp().sum()


def sin(x):
    return x.sin().sum()


compiled = lambda f: torch.compile(f, backend="aot_eager", fullgraph=True)
found = {
    "once_differentiable": penalty(Square.apply),
    "exp": penalty(exp),
    "compiled exp": penalty(compiled(exp)),
    "compiled sin": penalty(compiled(sin)),
}
print("torch", torch.__version__)
print("expected: errors, or once_differentiable [1.8, 2.6] and exp twice the same")
for name, result in found.items():
    print(f"observed: {name}: {result}")
dropped = [1.0, 1.0]
same = found["once_differentiable"] == dropped and found["compiled exp"] == dropped
sys.exit(0 if same and found["exp"] != dropped and "double backward" in found["compiled sin"] else 1)
PY
"$folder/venv/bin/python" "$folder/twice.py"
