"""Totals of an epoch, and the rows that training and calibrating report."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypedDict


class StepRow(TypedDict):
    """A step of training: every `log_interval` steps, and the last one before an evaluation."""

    step: int
    steps: int
    loss: float
    lr: float
    images_per_second: float


class _HeldOut(TypedDict, total=False):
    held_out_error: float


class CalibrationRow(_HeldOut):
    """A step of calibrating, which has no `lr`; every twentieth part evaluates held-out images."""

    step: int
    steps: int
    loss: float
    images_per_second: float


class WarningRow(TypedDict):
    """A sentence about a step that was left out, with `nan="skip"`."""

    warning: str


class _Counts(TypedDict, total=False):
    skipped_steps: int
    broken: int
    broken_files: list[str]
    test_broken_files: list[str]
    test_distill_loss: float


class EpochRow(_Counts):
    """An evaluation, as in metrics.jsonl; `Evaluation` has the numbers that start with `test_`.

    `epoch` counts passes over the training images: 1, 2, 3, or with `steps` parts of them too.
    `test_distill_loss` is the loss against the teacher, if there is one, without its weight.
    """

    epoch: float
    step: int
    train_loss: float
    train_seconds: float
    waiting_percent: float
    lr: float
    images_per_second: float
    test_images: int
    test_loss: float
    test_top1_percent: float
    test_top5_percent: float
    test_broken: int


Report = Callable[[Any], None]
"""Takes any of the rows: `warning` is in a `WarningRow` only, `epoch` in an `EpochRow` only."""


@dataclass
class EpochMeter:
    """Running totals of an epoch, or of the steps up to an evaluation.

    Args:
        steps: Steps, those that were left out too.
        finite_steps: Steps with a finite loss.
        loss_sum: Sum of the finite losses.
        seconds: Time of the steps.
        data_seconds: Part of it in which the loop waited for data; a GPU may have been busy then.
    """

    steps: int = 0
    finite_steps: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    data_seconds: float = 0.0

    def add_step(self, seconds: float, data_seconds: float) -> None:
        """Adds the times of a step."""
        self.steps += 1
        self.seconds += seconds
        self.data_seconds += data_seconds

    def add_loss(self, loss: float) -> None:
        """Adds the loss of a step, if it is finite."""
        if math.isfinite(loss):
            self.finite_steps += 1
            self.loss_sum += loss

    def images_per_second(self, batch_size: int) -> float:
        """Returns the speed so far."""
        return self.steps * batch_size / self.seconds
