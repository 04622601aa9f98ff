"""`TrainConfig`: nonsense is refused when it is built, with what would make sense."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenlearner import TrainConfig
from tokenlearner.training.checkpointing import read_checkpoint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs is 0, expected an integer of 1 or more"),
        ({"batch_size": -4}, "batch_size is -4"),
        ({"num_tokens": -1}, "num_tokens is -1, expected an integer of 0 or more"),
        ({"insert": -1}, "insert is -1, expected an integer of 0 or more"),
        ({"images": -1}, "images is -1, expected an integer of 0 or more"),
        ({"calibrate": -1}, "calibrate is -1, expected an integer of 0 or more"),
        ({"calibrate": 1}, "calibrate is 1, expected 2 images or more, or 0 for none"),
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
        ({"warmup_epochs": -1.0}, "warmup_epochs is -1.0, expected a number from 0 on"),
        ({"warmup_steps": -1}, "warmup_steps is -1, expected an integer of 0 or more"),
        ({"min_lr": 1e-3}, "min_lr is 0.001, expected less than lr, which is 0.001"),
        ({"min_lr": -1e-3}, "min_lr is -0.001, expected a number from 0 on"),
        ({"layer_decay": 0.0}, "layer_decay is 0.0, expected a factor above 0, up to 1"),
        ({"layer_decay": 1.1}, "layer_decay is 1.1, expected a factor above 0, up to 1"),
        ({"betas": [0.9]}, r"betas are \[0.9\], expected two shares"),
        ({"betas": [0.9, 1.0]}, r"betas are \[0.9, 1.0\], expected two shares"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0, expected a share from 0 to below 1"),
        ({"grad_accum_steps": 0}, "grad_accum_steps is 0, expected an integer of 1 or more"),
        ({"sched": "step"}, "sched is 'step', expected one of 'cosine', 'linear', 'constant'"),
        ({"sched": "constant", "min_lr": 1e-5}, "min_lr is 1e-05, but a constant learning rate"),
        ({"clip_grad": -1.0}, "clip_grad is -1.0, expected a number from 0 on"),
        ({"learner": "v1", "at": 2}, "at and learner go with num_tokens or insert; pass one of"),
        ({"keep_head": True}, "keep_head is for the classifier in init_from"),
        ({"keep_head": True, "init_from": "a", "head_bias": -10.0}, "pass init_from, and no head"),
        ({"loss": "hinge"}, "loss is 'hinge', expected one of 'softmax', 'sigmoid'"),
        ({"drop_path": 1.0}, "drop_path is 1.0, expected a share"),
        ({"hflip": 1.1}, "hflip is 1.1, expected a share from 0 to 1"),
        ({"reprob": -0.1}, "reprob is -0.1, expected a share from 0 to 1"),
        ({"color_jitter": -0.1}, "color_jitter is -0.1, expected a number from 0 on"),
        ({"mixup": float("inf")}, "mixup is inf, expected a number from 0 on"),
        ({"cutmix": -1.0}, "cutmix is -1.0, expected a number from 0 on"),
        ({"scale": [0.5]}, r"scale is \[0.5\], expected two numbers above 0 that rise, such as"),
        ({"scale": [0.5, 0.4]}, r"scale is \[0.5, 0.4\], expected two numbers above 0 that rise"),
        ({"scale": [0.0, 0.4]}, r"scale is \[0.0, 0.4\], expected two numbers above 0"),
        ({"scale": [0.5, 1.5]}, r"scale is \[0.5, 1.5\], expected shares of an image, up to 1.0"),
        ({"ratio": [1.0, float("inf")]}, r"ratio is \[1.0, inf\], expected two numbers above 0"),
        ({"workers": -1}, "workers is -1, expected an integer of 0 or more"),
        ({"max_broken": -1}, "max_broken is -1, expected an integer of 0 or more"),
        ({"save_every": -1}, "save_every is -1, expected an integer of 0 or more"),
        ({"nan": "ignore"}, "nan is 'ignore', expected one of 'stop', 'skip'"),
        ({"onednn": True, "compile": True}, "onednn is for float32 that is not compiled; leave"),
        ({"onednn": True, "mixed_precision": "bf16"}, "onednn is for float32 that is not"),
        ({"mixed_precision": "fp8"}, "mixed_precision is 'fp8', expected one of 'no', 'bf16'"),
        ({"resume": "yes"}, "resume is 'yes', expected 'auto' or None"),
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
        ({"teacher": "a", "mixup": 0.2}, "mixup change labels, .* for 0; pass task_loss_weight"),
        ({"teacher": "a", "mixup": 1.0, "cutmix": 1.0}, "mixup and cutmix change labels"),
        ({"ratio": [0.75, 1.333]}, "ratio is the shape of what is cut out .*; pass scale too"),
        ({"fsdp": True, "ema_decay": 0.9}, r"weights that are shared out \(fsdp\) .* pass either"),
        ({"compile": True, "teacher": "a"}, "hooks, which a compiled model does .*='logit'"),
        ({"insert": 4, "head_bias": -10.0}, "head_bias for one built new; pass either"),
        ({"insert": 4, "drop_path": 0.1, "init_from": "a"}, "init_from and drop_path for one"),
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


@pytest.mark.parametrize("kind", ["feature", "logit+feature"])
def test_a_compiled_model_is_taught_logits_only(kind: str) -> None:
    with pytest.raises(ValueError, match="kd_distill_type='logit', or compile=False"):
        TrainConfig(teacher="a", compile=True, kd_distill_type=kind)
    assert TrainConfig(teacher="a", compile=True, kd_distill_type="logit").compile
    assert TrainConfig(compile=True, kd_distill_type=kind).compile


def test_warming_up_in_steps_takes_the_place_of_epochs() -> None:
    assert TrainConfig(warmup_epochs=9.0, warmup_steps=0).warmup_steps == 0


@pytest.mark.parametrize(
    ("workers", "share", "reading"), [(3, "4", 3), (0, "1", 0), (None, "1", 8), (None, "4", 2)]
)
def test_workers_are_the_processors_shared_among_processes(
    workers: int | None, share: str, reading: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", share)
    assert TrainConfig(workers=workers).reading_workers == reading


def test_a_reader_is_left_where_there_are_more_processes_than_processors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert TrainConfig().reading_workers == 1


def test_the_name_of_version_0_3_for_videos_is_replaced_by_the_new_one() -> None:
    assert TrainConfig(data="film").data == TrainConfig(data="video-folder").data == "video-folder"


def test_a_run_of_version_0_3_on_videos_goes_on(tmp_path: Path) -> None:
    config = TrainConfig(data="video-folder", out=str(tmp_path), resume="auto")
    stored = json.dumps(asdict(config) | {"data": "film"})
    torch.save({"format": 1, "config": stored, "step": 3}, tmp_path / "checkpoint.pt")
    state = read_checkpoint(config)
    assert state is not None
    assert state["step"] == 3
