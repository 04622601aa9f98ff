"""What to train and how: `TrainConfig`, which is also the options of `tokenlearner train`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .checks import check_above_zero, check_choice, check_count, check_rate
from .distill import KINDS


@dataclass(frozen=True)
class TrainConfig:
    """What to train, on what, and how; AdamW, a cosine schedule with warm-up, gradients clipped.

    Args:
        out: New folder for the model, train.json and metrics.jsonl.
        model: A name that `create_model` knows, or with insert a file or folder of a trained model.
        model_kwargs: Arguments for a named model, such as {"depth": 8}.
        num_tokens: Learned tokens of a model built new; 0 leaves it as its name says.
        insert: Learned tokens to insert into the trained model; they are calibrated first.
        at: Block in front of which tokens are learned, or a share of the depth.
        learner: v11, v1, v1-mean or grouped.
        fuse: Put learned tokens back on all positions behind each block.
        calibrate: Training pictures, without labels, for calibrating; 0 leaves it out.
        teacher: host, for the trained model as it is before inserting, or another trained model.
        kd_distill_type: What the teacher teaches: logit, feature or logit+feature.
        kd_temperature: Divides the logits that are taught.
        distill_loss_weight: Of what the teacher teaches.
        task_loss_weight: Of the labels; None is 1 without a teacher, and 0 with one.
        data: A name that `load_data` knows.
        root: Folder in which the data set is looked for.
        images: Training pictures to use, drawn by the seed; 0 is all.
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
    model_kwargs: dict[str, Any] | None = None
    num_tokens: int = 0
    insert: int = 0
    at: int | float = 0.5
    learner: str = "v11"
    fuse: bool = False
    calibrate: int = 512
    teacher: str | None = None
    kd_distill_type: str = "logit+feature"
    kd_temperature: float = 1.0
    distill_loss_weight: float = 1.0
    task_loss_weight: float | None = None
    data: str = "fashion-mnist-small"
    root: str | None = None
    images: int = 0
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
        for name in ("num_tokens", "insert", "calibrate", "images"):
            check_count(name, getattr(self, name), least=0)
        check_count("epochs", self.epochs)
        check_count("batch_size", self.batch_size)
        check_count("seed", self.seed, least=0)
        check_rate(self.smoothing, "smoothing")
        check_choice("kd_distill_type", self.kd_distill_type, KINDS)
        for name in ("lr", "clip_grad", "kd_temperature"):
            check_above_zero(name, getattr(self, name))
        for name in ("weight_decay", "warmup_epochs", "distill_loss_weight", "task_loss_weight"):
            if not 0 <= (getattr(self, name) or 0) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a number from 0 on")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs is {self.warmup_epochs}, expected fewer than {self.epochs} epochs"
            )
        self._check_teaching()

    def _check_teaching(self) -> None:
        if self.insert and (self.num_tokens or self.model_kwargs):
            raise ValueError(
                "insert is for a trained model, num_tokens and model_kwargs are for one built new; "
                "pass either"
            )
        if self.teacher == "host" and not self.insert:
            raise ValueError("teacher is 'host', but nothing is inserted in one; pass insert too")
        if not (self.label_weight or (self.teacher and self.distill_loss_weight)):
            raise ValueError(
                "nothing would be taught: labels count for 0, and there is no teacher or it counts "
                "for 0; raise task_loss_weight, or pass a teacher and a distill_loss_weight above 0"
            )
        if self.calibrate == 1:
            raise ValueError("calibrate is 1, expected 2 pictures or more, or 0 to leave it out")

    @property
    def label_weight(self) -> float:
        """How much the labels count."""
        if self.task_loss_weight is None:
            return 0.0 if self.teacher else 1.0
        return self.task_loss_weight
