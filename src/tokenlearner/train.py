"""The training loop: a config, a data set and a named model become a checkpoint and its metrics."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_count, check_rate
from .data import ImageDataset, load_data
from .evaluate import evaluate
from .files import write_json
from .zoo import create_model, save_model

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class TrainConfig:
    """What to train, on what, and how; AdamW, a cosine schedule with warm-up, gradients clipped.

    Args:
        out: New folder for the model, train.json and metrics.jsonl.
        model: A name that `create_model` knows.
        num_tokens: Learned tokens to insert; 0 leaves the model as its name says.
        at: Block in front of which tokens are learned, or a share of the depth.
        learner: v11, v1, v1-mean or grouped.
        fuse: Put learned tokens back on all positions behind each block.
        data: A name that `load_data` knows.
        root: Folder in which the data set is looked for.
        epochs: Passes over the training pictures.
        batch_size: Pictures a step; what is left of an epoch makes no step.
        lr: Highest learning rate.
        weight_decay: AdamW's; not for biases, norms and position embeddings.
        warmup_epochs: Epochs over which the learning rate rises from 0.
        clip_grad: Largest norm of the gradient.
        smoothing: Label smoothing, from 0 to below 1.
        seed: Of the weights and of the pictures' order.
        device: Such as cpu or cuda; auto takes a GPU where there is one.

    Raises:
        ValueError: A number is out of range.
    """

    out: str = "runs/train"
    model: str = "vit_mini_patch4_28"
    num_tokens: int = 0
    at: int | float = 0.5
    learner: str = "v11"
    fuse: bool = False
    data: str = "fashion-mnist-small"
    root: str | None = None
    epochs: int = 6
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup_epochs: float = 1.0
    clip_grad: float = 1.0
    smoothing: float = 0.0
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        check_count("num_tokens", self.num_tokens, least=0)
        check_count("epochs", self.epochs)
        check_count("batch_size", self.batch_size)
        check_count("seed", self.seed, least=0)
        check_rate(self.smoothing, "smoothing")
        for name in ("lr", "clip_grad"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a number above 0")
        for name in ("weight_decay", "warmup_epochs"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a number from 0 on")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs is {self.warmup_epochs}, expected fewer than {self.epochs} epochs"
            )


@dataclass(frozen=True)
class TrainResult:
    """What a run left: the trained model and one row of metrics an epoch."""

    model: nn.Module
    checkpoint: Path
    history: list[dict[str, Any]]


def train(config: TrainConfig, report: Report | None = None) -> TrainResult:
    """Trains a model and writes it, with a line of metrics after every epoch.

    Nothing is written before the config, the data and the model have been found good. The same
    config gives the same weights on the same machine.

    Args:
        config: What to train, on what, and how.
        report: Called after every step with `epoch`, `step`, `steps`, `loss`, `lr` and
            `images_per_second`, and after every epoch with its row of metrics.

    Returns:
        The model in evaluation mode, its checkpoint and the metrics.

    Raises:
        ValueError: The folder holds a run already, or a name or a number does not fit.
        RuntimeError: The loss is no longer finite; the last checkpoint is named.
    """
    out, device = Path(config.out), pick_device(config.device)
    if (out / "metrics.jsonl").exists():
        raise ValueError(f"{out} holds a run already; pass another out, or move that one away")
    data = load_data(config.data, "train", root=config.root)
    held_out = load_data(config.data, "test", root=config.root)
    if config.batch_size > len(data):
        raise ValueError(f"batch_size is {config.batch_size}, but {data.name} has {len(data)}")
    torch.manual_seed(config.seed)
    model = _model(config, data).to(device)
    write_json(out / "train.json", asdict(config))
    loop, history = _Loop(config, model, data, report or (lambda row: None)), []
    for epoch in range(config.epochs):
        row = {"epoch": epoch + 1, **loop.epoch()}
        row |= {f"test_{k}": v for k, v in asdict(evaluate(model, held_out)).items()}
        save_model(model, out)
        with (out / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        history.append(row)
        loop.report(row)
    return TrainResult(model.eval(), out / "model.safetensors", history)


def pick_device(name: str = "auto") -> torch.device:
    """Returns the named device, or with `"auto"` a GPU where there is one.

    Raises:
        ValueError: torch does not know it or has no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        message = f"device {name!r} is not to be had here ({error}); pass cpu or auto"
        raise ValueError(message) from error
    return torch.device(name)


def _insertion_options(config: TrainConfig) -> dict[str, Any]:
    """The part of a config that `create_model` takes for learned tokens, if there are any."""
    names = ("num_tokens", "at", "learner", "fuse") if config.num_tokens else ()
    return {name: getattr(config, name) for name in names}


def _model(config: TrainConfig, data: ImageDataset) -> nn.Module:
    """Builds the model for the data's classes and channels, and tries it on one picture."""
    channels = data.images.shape[1]
    sizes: dict[str, Any] = {"num_classes": len(data.classes), "in_chans": channels}
    model = create_model(config.model, **_insertion_options(config), **sizes)
    images, _ = next(iter(data.batches(1)))
    try:
        with torch.inference_mode():
            model.eval()(images)
    except (AssertionError, RuntimeError) as error:
        size = list(data.images.shape[1:])
        message = f"{config.model} does not take pictures of {size}, as {data.name} has ({error})"
        raise ValueError(message) from error
    return model


class _Loop:
    """The state that changes while a model trains."""

    def __init__(self, config: TrainConfig, model: nn.Module, data: ImageDataset, report: Report):
        from timm.optim import create_optimizer_v2
        from timm.scheduler import CosineLRScheduler

        self.config, self.model, self.data, self.report = config, model, data, report
        self.step = 0
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
            loss = self._update(images, labels)
            total, steps = total + loss, steps + 1
            speed = steps * size / (time.perf_counter() - start)
            self.report({"step": self.step, "steps": self.steps, "loss": loss} | self._now(speed))
        seconds = time.perf_counter() - start
        row = {"step": self.step, "train_loss": total / steps, "train_seconds": seconds}
        return row | self._now(steps * size / seconds)

    def _update(self, images: Tensor, labels: Tensor) -> float:
        device = next(self.model.parameters()).device
        logits = self.model(images.to(device))
        smoothing = self.config.smoothing
        loss = F.cross_entropy(logits, labels.to(device), label_smoothing=smoothing)
        value = loss.item()
        if not math.isfinite(value):
            raise RuntimeError(
                f"the loss is {value} at step {self.step + 1} of {self.steps}; the last checkpoint "
                f"in {self.config.out} is from the epoch before. Try a lower lr"
            )
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
        self.optimizer.step()
        self.step += 1
        self.schedule.step_update(self.step)
        return value

    def _now(self, speed: float) -> dict[str, float]:
        return {"lr": self.optimizer.param_groups[0]["lr"], "images_per_second": speed}
