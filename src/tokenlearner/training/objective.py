"""What a step is made of: the model and its teacher, the loss, the optimizer, its rate."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.outputs import output_tensor
from ..utils.validation import require
from .config import TrainConfig
from .distillation import Distillation


class Objective(nn.Module):
    """What runs in a step: a model, its teacher if there is one, and the loss.

    Processes that train together share this whole, since features are seen by hooks on the
    student's own blocks.

    Args:
        config: How much labels and teacher count.
        student: What trains.
        teaching: The teacher.
    """

    def __init__(self, config: TrainConfig, student: nn.Module, teaching: Distillation | None):
        super().__init__()
        self.config, self.student, self.teaching = config, student, teaching

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """What the teacher teaches and what the labels say, as far as they count."""
        config, loss = self.config, torch.zeros((), device=images.device)
        if self.teaching:
            logits, taught = self.teaching(self.student, images)
            loss = loss + config.distill_loss_weight * taught
        else:
            logits = output_tensor(self.student(images))
        if config.label_weight:
            loss = loss + config.label_weight * label_loss(config, logits, labels)
        return loss


def label_loss(config: TrainConfig, logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of labels `b`, or of mixed ones `b classes`.

    Source: for "sigmoid", scenic `sigmoid_cross_entropy`: summed over classes, mean over images.
    """
    logits = logits.float()
    mixed = labels.ndim == 2
    if config.loss == "softmax":
        smoothing = 0.0 if mixed else config.smoothing  # mixed labels are smooth already
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)
    if not mixed:
        smooth = config.smoothing
        labels = F.one_hot(labels, logits.shape[1]) * (1 - smooth) + smooth / logits.shape[1]
    loss = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")
    return loss.sum(1).mean()


def make_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """What changes the weights.

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
    told = [value for group in optimizer.param_groups for value in group.values()]
    require(
        not getattr(optimizer, "is_second_order", False)
        and not any(isinstance(value, torch.dtype) for value in told),
        f"opt={config.opt!r} needs gradients of gradients, or keeps what a checkpoint cannot hold; "
        "take another, such as adamw, lamb or adafactor",
    )
    return optimizer


def make_schedule(
    config: TrainConfig, optimizer: torch.optim.Optimizer, steps: int, per_epoch: int
) -> Any:
    """What sets the learning rate of every step.

    Raises:
        ValueError: There are not more steps than those of warming up.
    """
    from timm.scheduler import CosineLRScheduler, PolyLRScheduler, StepLRScheduler

    warmup = config.warmup_steps
    if warmup is None:
        warmup = round(config.warmup_epochs * per_epoch)
    require(
        warmup < steps, f"warmup_steps is {warmup}, expected fewer than the {steps} steps there are"
    )
    told: dict[str, Any] = {"warmup_t": warmup, "warmup_prefix": True, "t_in_epochs": False}
    if config.sched == "constant":
        return StepLRScheduler(optimizer, decay_t=steps, decay_rate=1.0, **told)
    told |= {"t_initial": steps - warmup, "lr_min": config.min_lr}  # it falls when it is warm
    if config.sched == "linear":
        return PolyLRScheduler(optimizer, power=1.0, **told)
    return CosineLRScheduler(optimizer, **told)


def make_average(config: TrainConfig, model: nn.Module) -> Any:
    """The moving average of the weights, if it is asked for."""
    from timm.utils import ModelEmaV3

    return ModelEmaV3(model, config.ema_decay) if config.ema_decay else None
