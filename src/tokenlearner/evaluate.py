"""A model and a data set become numbers: `evaluate(model, data)`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .checks import check_count
from .data import ImageDataset


@dataclass(frozen=True)
class Evaluation:
    """What came out, over `images` pictures."""

    images: int
    loss: float
    """Mean cross-entropy, in nats."""
    top1_percent: float
    top5_percent: float


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Puts a model in training or evaluation mode; each of its parts gets its own mode back."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, was_training in before:
            module.training = was_training


@torch.inference_mode()
def evaluate(model: nn.Module, data: ImageDataset, batch_size: int = 500) -> Evaluation:
    """Classifies every picture of `data` and returns loss and accuracy.

    The model is put in evaluation mode for this and left in the mode it came in.

    Args:
        model: Pictures `b c h w` to logits `b classes`, on any device.
        data: Labelled pictures.
        batch_size: Pictures at a time; changes the speed only.

    Raises:
        ValueError: The model has fewer classes than the data.
    """
    check_count("batch_size", batch_size)
    device = next(model.parameters()).device
    loss = top1 = top5 = 0.0
    with mode(model, training=False):
        for images, labels in data.batches(batch_size):
            logits, labels = model(images.to(device)).float(), labels.to(device)
            _check_classes(logits.shape[1], data)
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
            top1 += best[:, 0].sum().item()
            top5 += best.sum().item()
    n = len(data)
    return Evaluation(n, loss / n, 100 * top1 / n, 100 * top5 / n)


def _check_classes(num_classes: int, data: ImageDataset) -> None:
    if num_classes < len(data.classes):
        raise ValueError(
            f"the model has {num_classes} classes, {data.name} has {len(data.classes)}; build it "
            f"with num_classes={len(data.classes)}"
        )
