"""`TrainConfig`: nonsense is refused when it is built, with what would make sense."""

from __future__ import annotations

from typing import Any

import pytest

from tokenlearner import TrainConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs is 0, expected an integer of 1 or more"),
        ({"batch_size": -4}, "batch_size is -4"),
        ({"num_tokens": -1}, "num_tokens is -1, expected an integer of 0 or more"),
        ({"insert": -1}, "insert is -1, expected an integer of 0 or more"),
        ({"images": -1}, "images is -1, expected an integer of 0 or more"),
        ({"calibrate": -1}, "calibrate is -1, expected an integer of 0 or more"),
        ({"calibrate": 1}, "calibrate is 1, expected 2 pictures or more, or 0 for none"),
        ({"seed": -1}, "seed is -1"),
        ({"lr": 0.0}, "lr is 0.0, expected a number above 0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"clip_grad": float("inf")}, "clip_grad is inf"),
        ({"kd_temperature": 0.0}, "kd_temperature is 0.0, expected a number above 0"),
        ({"kd_distill_type": "hard"}, "kd_distill_type is 'hard', expected one of 'logit', 'feat"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1, expected a number from 0 on"),
        ({"distill_loss_weight": -1.0}, "distill_loss_weight is -1.0, expected a number from 0"),
        ({"task_loss_weight": float("nan")}, "task_loss_weight is nan, expected a number from 0"),
        ({"smoothing": 1.0}, "smoothing is 1.0, expected a share"),
        ({"warmup_epochs": 6.0}, "warmup_epochs is 6.0, expected fewer than 6 epochs"),
    ],
    ids=str,
)
def test_a_number_out_of_range_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"insert": 4, "num_tokens": 4}, "insert is for a trained model, num_tokens .* either"),
        ({"insert": 4, "model_kwargs": {"depth": 2}}, "model_kwargs for one built new; pass"),
        ({"teacher": "host"}, "teacher is 'host', but nothing is inserted in one; pass insert"),
        ({"task_loss_weight": 0.0}, "nothing would be taught: .* raise task_loss_weight"),
        ({"teacher": "a", "distill_loss_weight": 0.0}, "nothing would be taught: .* counts for 0"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


@pytest.mark.parametrize(
    ("options", "weight"),
    [
        ({}, 1),
        ({"teacher": "a"}, 0),
        ({"teacher": "a", "task_loss_weight": 0.5}, 0.5),
        ({"task_loss_weight": 2.0}, 2),
        ({"teacher": "a", "task_loss_weight": 0.0}, 0),
    ],
    ids=str,
)
def test_labels_count_unless_there_is_a_teacher(options: dict[str, Any], weight: float) -> None:
    assert TrainConfig(**options).label_weight == weight


def test_a_teacher_that_counts_for_nothing_beside_labels_is_allowed() -> None:
    config = TrainConfig(teacher="a", distill_loss_weight=0.0, task_loss_weight=1.0)
    assert config.label_weight == 1
