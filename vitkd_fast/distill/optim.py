"""timm's optimiser, schedule and moving average of weights, from the section `optimizer`."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers
from timm.scheduler.scheduler import Scheduler
from timm.scheduler.scheduler_factory import create_scheduler_v2
from timm.utils.model_ema import ModelEmaV3
from torch import nn

from .config import ConfigError, Optimizer


def create_optimizer(
    model: nn.Module, options: Optimizer, learned: Iterable[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """timm's optimiser of this name, without weight decay for biases and norms.

    Args:
        model: the student.
        options: its name, learning rate, weight decay and arguments.
        learned: parameters of the losses, to be updated with the model's.

    Raises:
        ConfigError: naming an unknown optimiser or option.
    """
    try:
        kind = get_optimizer_class(options.name, bind_defaults=False)
    except ValueError as error:
        near = difflib.get_close_matches(options.name, list_optimizers(), 1, cutoff=0)[0]
        raise ConfigError(
            f"optimizer.name: timm has no {options.name!r}; the nearest is {near}"
        ) from error
    # torch's own update all weights in one pass, where they can: a quarter of the time
    fused = {"fused": True} if "fused" in inspect.signature(kind).parameters else {}
    try:
        optimizer = create_optimizer_v2(
            model,
            opt=options.name,
            lr=options.lr,
            weight_decay=options.weight_decay,
            **(fused | options.options),
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optimizer.options: {options.options}: {error}") from error
    learned = list(learned)
    for decayed in (True, False):  # as timm does with the model's: weights, not biases
        if group := [p for p in learned if (p.dim() > 1) == decayed]:
            decay = options.weight_decay if decayed else 0.0
            optimizer.add_param_group({"params": group, "weight_decay": decay})
    return optimizer


def create_scheduler(
    optimizer: torch.optim.Optimizer, options: Optimizer, steps: int, steps_per_epoch: int
) -> Scheduler:
    """timm's schedule of the learning rate over `steps` updates; `step_update(step)` sets it.

    Raises:
        ConfigError: wsd of a timm that has none, or with a warm-up that leaves no room for it.
    """
    warmup = round(options.warmup_epochs * steps_per_epoch)
    more: dict[str, Any] = {}
    if options.schedule == "wsd":
        if find_spec("timm.scheduler.wsd_lr") is None:
            raise ConfigError("optimizer.schedule: wsd needs timm >= 1.0.31")
        cooldown = max(round(options.cooldown * steps), 1)
        if warmup + cooldown > steps:
            raise ConfigError(
                f"optimizer.cooldown: expected warm-up and cooldown within {steps} steps, got "
                f"{warmup} and {cooldown}"
            )
        more = {"decay_epochs": cooldown}
    return create_scheduler_v2(
        optimizer,
        options.schedule,
        num_epochs=steps,
        warmup_epochs=warmup,
        warmup_lr=options.warmup_lr,
        min_lr=options.min_lr,
        step_on_epochs=False,
        updates_per_epoch=1,
        **more,
    )[0]


def create_ema(model: nn.Module, options: Optimizer) -> ModelEmaV3 | None:
    """timm's moving average of the weights; None where ema_decay is 0."""
    if not options.ema_decay:
        return None
    return ModelEmaV3(model, decay=options.ema_decay, use_warmup=True)
