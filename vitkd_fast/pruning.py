"""Structured pruning of a student: whole channels go, with all that reads or writes them.

torch-pruning finds which channels of which layers belong together (a MobileNet's expanded ones, its
depthwise convolution and squeeze-excite; all blocks of a stage that are added up), and the groups
whose weights are smallest go (Fang et al., "DepGraph: Towards Any Structural Pruning", 2023). What
stays is a multiple of `MULTIPLE`: the int8 engine computes so many channels at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ._extras import require

MULTIPLE = 16


def prune(model: nn.Module, share: float, image_size: int, multiple: int = MULTIPLE) -> nn.Module:
    """The model, changed in place, without a share of each layer's channels.

    Args:
        model: a convnet of timm's; its classifier keeps its classes.
        share: from 0 to less than 1, at least so much of a layer.
        image_size: of the image that shows which layer reads which.
        multiple: of what is kept, rounded down; layers that would keep none stay as they are.

    Raises:
        ValueError: share is out of range, or the model cannot be pruned.
        ImportError: the extra `prune` is not installed.
    """
    if not 0 <= share < 1:
        raise ValueError(f"prune: share: expected 0 to less than 1, got {share}")
    require("prune", "student.prune")
    import torch_pruning

    from .models import Origin

    body: Any = model
    training, image = model.training, torch.zeros(1, 3, image_size, image_size)
    classifier = body.get_classifier()
    if not isinstance(classifier, nn.Linear):
        raise ValueError(f"prune: model: expected a linear classifier, got {classifier}")
    model.eval()
    try:
        pruner = torch_pruning.pruner.BasePruner(
            model,
            image.to(classifier.weight.device),
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=share,
            round_to=multiple,
            ignored_layers=[classifier],
        )
        pruner.step()
    except Exception as error:  # all that tracing may raise
        why = " ".join(str(error).split())
        raise ValueError(f"prune: model: {type(model).__name__} cannot be pruned: {why}") from error
    finally:
        model.train(training)
    _tell(model)
    body.origin = replace(Origin.of(model), pruned=True)
    return model


def narrow(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """The model, changed in place: its layers as wide as these weights, by name.

    A classifier keeps its classes. The first channels keep their weights.
    """
    for name, module in model.named_modules():
        given = weights.get(f"{name}.weight")
        own: Any = module
        if given is None or not isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)):
            continue
        if isinstance(module, nn.Conv2d):
            grouped = module.groups > 1
            own.out_channels = len(given)
            own.groups = len(given) // given.shape[1] if grouped else 1
            own.in_channels = given.shape[1] * own.groups
        elif isinstance(module, nn.Linear):
            own.in_features = given.shape[1]
            given = given.new_empty(module.out_features, given.shape[1])
        else:
            own.num_features = len(given)
        shape = [slice(0, size) for size in given.shape]
        own.weight = nn.Parameter(own.weight.detach()[tuple(shape)].clone())
        for key in ("bias", "running_mean", "running_var"):
            if (x := getattr(module, key, None)) is not None:
                x = x.detach()[: len(given)].clone()
                setattr(own, key, nn.Parameter(x) if key == "bias" else x)
    _tell(model)
    return model


def _tell(model: nn.Module) -> None:
    """What timm remembers of widths, of which a new classifier is made."""
    body: Any = model
    classifier = body.get_classifier()
    if not isinstance(classifier, nn.Linear):
        return
    if body.num_features == body.head_hidden_size:
        body.num_features = classifier.in_features
    else:  # of MobileNetV3 and V4: what their last convolution reads, behind the pooling
        body.num_features = body.conv_head.in_channels
    body.head_hidden_size = classifier.in_features
