"""timm's optimizers, learning rate schedules and moving average, from a config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..utils.validation import require
from .config import TrainConfig

if TYPE_CHECKING:
    from timm.utils import ModelEmaV3


def make_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Builds the optimizer of a model's parameters.

    Raises:
        ValueError: timm does not know it, or it does not take the options.
    """
    from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers

    known: Any = list_optimizers()
    require(config.opt in known, f"opt is {config.opt!r}, expected one of: {', '.join(known)}")
    require(
        not config.betas or bool(get_optimizer_info(config.opt).has_betas),
        f"betas are {config.betas}, but {config.opt} has none; leave them out",
    )
    betas: dict[str, Any] = {"betas": tuple(config.betas)} if config.betas else {}
    try:
        optimizer = create_optimizer_v2(
            model,
            opt=config.opt,
            lr=config.lr,
            weight_decay=config.weight_decay,
            layer_decay=config.layer_decay,
            **betas,
        )
    except (TypeError, AssertionError) as error:
        raise ValueError(f"timm refuses opt={config.opt!r} with these options: {error}") from error
    values = [value for group in optimizer.param_groups for value in group.values()]
    require(
        not getattr(optimizer, "is_second_order", False)
        and not any(isinstance(value, torch.dtype) for value in values),
        f"opt={config.opt!r} needs gradients of gradients, or keeps what a checkpoint cannot hold; "
        "take another, such as adamw, lamb or adafactor",
    )
    return optimizer


def moments_per_weight(config: TrainConfig) -> int:
    """Returns how many numbers the optimizer keeps for each weight, found by a step of it."""
    with torch.random.fork_rng(devices=[]):
        tiny = nn.Linear(8, 8)
    optimizer = make_optimizer(replace(config, layer_decay=None), tiny)
    tiny.weight.grad, tiny.bias.grad = torch.ones(8, 8), torch.ones(8)
    optimizer.step()
    kept = optimizer.state[tiny.weight].values()
    return sum(isinstance(x, torch.Tensor) and x.shape == tiny.weight.shape for x in kept)


def make_schedule(
    config: TrainConfig, optimizer: torch.optim.Optimizer, steps: int, steps_per_epoch: int
) -> Any:
    """Builds the schedule that sets the learning rate of every step.

    Raises:
        ValueError: There are not more steps than those of warming up.
    """
    from timm.scheduler import CosineLRScheduler, PolyLRScheduler, StepLRScheduler

    warmup, epochs = config.warmup_steps, config.warmup_epochs
    if warmup is None:
        warmup = steps // 10 if epochs is None else round(epochs * steps_per_epoch)
    given = "warmup_steps is" if config.warmup_steps else f"warmup_epochs is {epochs},"
    require(warmup < steps, f"{given} {warmup} steps, expected fewer than all {steps}")
    kwargs: dict[str, Any] = {"warmup_t": warmup, "warmup_prefix": True, "t_in_epochs": False}
    if config.sched == "constant":
        return StepLRScheduler(optimizer, decay_t=steps, decay_rate=1.0, **kwargs)
    kwargs |= {"t_initial": steps - warmup, "lr_min": config.min_lr}  # it falls after warming up
    if config.sched == "linear":
        return PolyLRScheduler(optimizer, power=1.0, **kwargs)
    return CosineLRScheduler(optimizer, **kwargs)


class MasterWeights:
    """Holds float32 copies of parameters of half precision, for an optimizer to change.

    Args:
        parameters: What to fit; those of other precisions are their own weights.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self.parameters = parameters
        half = (torch.float16, torch.bfloat16)
        self.weights = [
            nn.Parameter(p.detach().float()) if p.dtype in half else p for p in parameters
        ]

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Lets the optimizer of `weights` take the parameters' gradients, and clears them."""
        pairs = [(w, p) for w, p in zip(self.weights, self.parameters, strict=True) if w is not p]
        for weight, parameter in pairs:
            weight.grad = None if parameter.grad is None else parameter.grad.float()
        optimizer.step()
        for weight, parameter in pairs:
            parameter.copy_(weight)
            parameter.grad = None
        optimizer.zero_grad()


def make_average(config: TrainConfig, model: nn.Module) -> ModelEmaV3 | None:
    """Builds the moving average of a model's weights, with `ema_decay`."""
    from timm.utils import ModelEmaV3

    return ModelEmaV3(model, config.ema_decay) if config.ema_decay else None
