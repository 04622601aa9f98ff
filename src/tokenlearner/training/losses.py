"""The loss of a step: labels, teacher, or both."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.outputs import output_tensor
from .config import TrainConfig
from .distillation import Distillation


class Objective(nn.Module):
    """Images and labels to the loss of a step.

    A module, so that processes that train together can wrap it as a whole: features are read by
    hooks on the student's blocks.

    Args:
        config: The weights of labels and teacher.
        student: The model that is trained.
        distillation: The teacher, if there is one.
    """

    def __init__(self, config: TrainConfig, student: nn.Module, distillation: Distillation | None):
        super().__init__()
        self.config, self.student, self.distillation = config, student, distillation

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Returns the weighted sum of the teacher's and the labels' loss."""
        config, loss = self.config, torch.zeros((), device=images.device)
        if self.distillation:
            logits, distill_loss = self.distillation(self.student, images)
            loss = loss + config.distill_loss_weight * distill_loss
        else:
            logits = output_tensor(self.student(images))
        if config.label_weight:
            loss = loss + config.label_weight * label_loss(config, logits, labels)
        return loss


def label_loss(config: TrainConfig, logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the loss of labels `b`, or of mixed ones `b classes`.

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
