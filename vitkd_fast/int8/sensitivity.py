"""What rounding each map, and each layer's weights, costs the logits: one backward pass for all.

An error e of a map moves the logits by J e, J their derivative there. With signs v drawn at random
(+1 or -1), (v^T J e)^2 is |J e|^2 on average, and one backward pass gives v^T J of every map. The
errors are exact, their effect is taken as linear: trying the layers one at a time, which needs no
such thing, needs as many passes as there are layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .calibrate import Scale
from .float_graph import FloatNode, activated, pre_activation


@dataclass
class Costs:
    """Squared errors of the logits, summed over images, by float node."""

    maps: dict[int, Tensor]  # of the rounding of its map, by channel [C], float64
    weights: dict[int, float]  # of the rounding of its weights

    @property
    def total(self) -> float:
        return float(sum(map(torch.sum, self.maps.values()))) + sum(self.weights.values())


def costs(
    nodes: tuple[FloatNode, ...],
    batches: list[Tensor],
    scales: Mapping[int, Scale],
    lost: Mapping[int, Tensor],
) -> Costs:
    """Of maps rounded to `scales`, and of weights that `lost` was added to, [C_out, ...].

    The batches are normalised images [N, 3, H, W].
    """
    random = torch.Generator().manual_seed(0)
    result = Costs(dict.fromkeys(scales, torch.zeros(())), dict.fromkeys(lost, 0.0))
    for images in batches:
        maps, before = {-1: images.detach().requires_grad_()}, []
        with torch.enable_grad():
            for index, node in enumerate(nodes):
                before.append(pre_activation(node, [maps[source] for source in node.inputs]))
                maps[index] = activated(before[index], node.activation)
            logits = maps[len(nodes) - 1]
        signs = torch.randint(2, logits.shape, generator=random).to(logits) * 2 - 1
        wanted = [*(maps[i] for i in scales), *(before[i] for i in lost)]
        gradients = iter(torch.autograd.grad(logits, wanted, signs))
        for i, scale in scales.items():
            error = scale.rounded(maps[i].detach()) - maps[i].detach()
            effect = (next(gradients) * error).sum((2, 3)).double()  # [N, C]
            result.maps[i] = result.maps[i] + effect.square().sum(0)
        for i, weight in lost.items():
            node = replace(nodes[i], weight=weight, bias=torch.zeros(len(weight)))
            error = pre_activation(node, [maps[source].detach() for source in node.inputs])
            error = error - error.mean((0, 2, 3), keepdim=True)  # which the bias makes up for
            effect = (next(gradients) * error).sum((1, 2, 3)).double()
            result.weights[i] += float(effect.square().sum())
    return result
