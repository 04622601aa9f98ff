"""The loop over steps: AdamW, a cosine schedule with warm-up, gradients clipped."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import ImageDataset
from .distill import Distillation, output_of
from .recipe import TrainConfig

Report = Callable[[dict[str, Any]], None]
Augment = Callable[[Tensor, torch.Generator], Tensor]


class Loop:
    """The state that changes while a model trains.

    Args:
        config: The recipe.
        model: What trains: its parameters that need gradients.
        data: Training pictures, and labels where they count.
        report: Called after every step.
        teaching: The teacher, if there is one.
        augment: Changes a batch of pictures, with the generator that draws.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        data: ImageDataset,
        report: Report = lambda row: None,
        teaching: Distillation | None = None,
        augment: Augment | None = None,
    ):
        from timm.optim import create_optimizer_v2
        from timm.scheduler import CosineLRScheduler

        self.config, self.model, self.data, self.report = config, model, data, report
        self.teaching, self.augment, self.step = teaching, augment, 0
        per_epoch = len(data) // config.batch_size
        self.steps = config.epochs * per_epoch
        self.order = torch.Generator().manual_seed(config.seed)
        self.optimizer = create_optimizer_v2(
            model, opt="adamw", lr=config.lr, weight_decay=config.weight_decay
        )
        warmup = round(config.warmup_epochs * per_epoch)
        self.schedule = CosineLRScheduler(
            self.optimizer,
            t_initial=self.steps - warmup,
            warmup_t=warmup,
            warmup_prefix=True,  # the cosine starts where the warm-up ends, at the full rate
            t_in_epochs=False,
        )
        self.schedule.step_update(0)

    def epoch(self) -> dict[str, float]:
        """Trains on every picture once; returns the mean loss, the time and the speed."""
        self.model.train()
        size, start, total, steps = self.config.batch_size, time.perf_counter(), 0.0, 0
        for images, labels in self.data.batches(
            size, shuffle=True, generator=self.order, drop_last=True
        ):
            if self.augment:
                images = self.augment(images, self.order)
            loss = self._update(images, labels)
            total, steps = total + loss, steps + 1
            speed = steps * size / (time.perf_counter() - start)
            self.report({"step": self.step, "steps": self.steps, "loss": loss} | self._now(speed))
        seconds = time.perf_counter() - start
        row = {"step": self.step, "train_loss": total / steps, "train_seconds": seconds}
        return row | self._now(steps * size / seconds)

    def _update(self, images: Tensor, labels: Tensor) -> float:
        device = next(self.model.parameters()).device
        loss = self._loss(images.to(device), labels.to(device))
        value = loss.item()
        if not math.isfinite(value):
            raise RuntimeError(
                f"the loss is {value} at step {self.step + 1} of {self.steps}; {self._left()}. Try "
                "a lower lr"
            )
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
        self.optimizer.step()
        self.step += 1
        self.schedule.step_update(self.step)
        return value

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """What the teacher teaches and what the labels say, as far as they count."""
        config, loss = self.config, torch.zeros((), device=images.device)
        if self.teaching:
            logits, taught = self.teaching(self.model, images)
            loss = loss + config.distill_loss_weight * taught
        else:
            logits = output_of(self.model(images))
        if weight := config.label_weight:
            smoothing = config.smoothing
            loss = loss + weight * F.cross_entropy(logits, labels, label_smoothing=smoothing)
        return loss

    def _left(self) -> str:
        """What a run that stops here leaves."""
        if self.step < self.steps // self.config.epochs:
            return f"there is no checkpoint in {self.config.out} yet"
        return f"the last checkpoint in {self.config.out} is from the epoch before"

    def _now(self, speed: float) -> dict[str, float]:
        return {"lr": self.optimizer.param_groups[0]["lr"], "images_per_second": speed}
