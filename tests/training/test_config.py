"""`TrainConfig`: nonsense is refused when it is built, by the option's name and value."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenlearner import TrainConfig
from tokenlearner.training.checkpointing import read_checkpoint

NAN, INF = float("nan"), float("inf")
OUT_OF_RANGE: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("epochs", "steps", "batch_size", "grad_accum_steps", "log_interval"), (0, -4)),
    **dict.fromkeys(("num_tokens", "insert", "images", "workers", "max_broken"), (-1,)),
    **dict.fromkeys(("save_every", "seed", "warmup_steps", "patience"), (-1,)),
    **dict.fromkeys(("weight_decay", "distill_loss_weight", "color_jitter", "cutmix"), (-0.1,)),
    **dict.fromkeys(("lr", "kd_temperature"), (0.0, NAN)),
    **dict.fromkeys(("smoothing", "ema_decay", "drop_path", "held_out"), (1.0,)),
    **dict.fromkeys(("hflip", "reprob"), (1.1, -0.1)),
    **dict.fromkeys(("resume", "nan", "sched", "loss", "mixed_precision"), ("abacus",)),
    **dict.fromkeys(("download", "fsdp"), ("no", 1)),
    "kd_distill_type": ("hard",),
    "calibrate": (-1, 1),
    "clip_grad": (INF, -1.0),
    "task_loss_weight": (NAN,),
    "mixup": (INF,),
    "warmup_epochs": (6.0, -1.0),
    "min_lr": (1e-3, -1e-3),
    "layer_decay": (0.0, 1.1),
    "betas": ([0.9], [0.9, 1.0]),
    "scale": ([0.5], [0.5, 0.4], [0.0, 0.4], [0.5, 1.5]),
    "ratio": ([1.0, INF],),
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in OUT_OF_RANGE.items() for value in values]
)
def test_a_value_out_of_range_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name} (is|are) {re.escape(repr(value))}"):
        TrainConfig(**{name: value})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"insert": 4, "num_tokens": 4}, "insert .*num_tokens"),
        ({"insert": 4, "model_kwargs": {"depth": 2}}, "insert .*model_kwargs"),
        ({"insert": 4, "head_bias": -10.0}, "insert .*head_bias"),
        ({"insert": 4, "drop_path": 0.1, "init_from": "a"}, "insert .*init_from and drop_path"),
        ({"learner": "v1", "at": 2}, "at and learner .*num_tokens or insert"),
        ({"steps": 5, "epochs": 3}, "steps is 5 and epochs is 3"),
        ({"keep_head": True}, "keep_head .*init_from"),
        ({"keep_head": True, "init_from": "a", "head_bias": -10.0}, "keep_head .*head_bias"),
        ({"sched": "constant", "min_lr": 1e-5}, "min_lr is 1e-05"),
        ({"teacher": "host"}, "teacher is 'host', .*insert"),
        ({"task_loss_weight": 0.0}, "task_loss_weight"),
        ({"teacher": "a", "distill_loss_weight": 0.0}, "distill_loss_weight"),
        ({"teacher": "a", "mixup": 0.2}, "mixup .*task_loss_weight"),
        ({"teacher": "a", "mixup": 1.0, "cutmix": 1.0}, "mixup and cutmix .*task_loss_weight"),
        ({"ratio": [0.75, 1.333]}, "ratio .*scale"),
        ({"fsdp": True, "ema_decay": 0.9}, "ema_decay .*fsdp"),
        ({"compile": "default", "teacher": "a"}, "kd_distill_type='logit'"),
        ({"compile": True, "teacher": "a", "kd_distill_type": "feature"}, "compile='no'"),
        ({"onednn": True, "compile": True}, "onednn .*compile"),
        ({"onednn": True, "mixed_precision": "bf16"}, "onednn .*mixed_precision"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        TrainConfig(**changes)


@pytest.mark.parametrize(
    ("options", "weight"),
    [
        ({}, 1),
        ({"teacher": "a"}, 0),
        ({"teacher": "a", "task_loss_weight": 0.5}, 0.5),
        ({"task_loss_weight": 2.0}, 2),
        ({"teacher": "a", "task_loss_weight": 0.0}, 0),
        ({"teacher": "a", "task_loss_weight": 1.0, "distill_loss_weight": 0.0}, 1),
        ({"teacher": "a", "compile": True, "kd_distill_type": "logit"}, 0),
        ({"warmup_epochs": 9.0, "warmup_steps": 0}, 1),
    ],
    ids=str,
)
def test_labels_count_unless_there_is_a_teacher(options: dict[str, Any], weight: float) -> None:
    assert TrainConfig(**options).label_weight == weight


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, "last"),
        ({"patience": 3}, "best"),
        ({"patience": 3, "keep": "last"}, "last"),
        ({"teacher": "a"}, "best"),
        ({"teacher": "a", "task_loss_weight": 0.5}, "last"),
    ],
    ids=str,
)
def test_the_best_model_is_kept_where_labels_do_not_count_or_a_run_may_end_early(
    options: dict[str, Any], kept: str
) -> None:
    assert TrainConfig(**options).keep == kept


def test_a_single_epoch_needs_no_option() -> None:
    assert TrainConfig(epochs=1).warmup_epochs == 0.5


@pytest.mark.parametrize(
    ("workers", "share", "reading"),
    [(3, "4", 3), (0, "1", 0), (None, "1", 8), (None, "4", 2), (None, "16", 1)],
)
def test_workers_are_the_processors_shared_among_processes(
    workers: int | None, share: str, reading: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenlearner.data.config.usable_processors", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", share)
    assert TrainConfig(workers=workers).reading_workers == reading


def test_a_run_of_version_0_3_on_videos_goes_on(tmp_path: Path) -> None:
    config = TrainConfig(data="film", out=str(tmp_path), resume="auto")
    assert config.data == TrainConfig(data="video-folder").data == "video-folder"
    stored = json.dumps(asdict(config) | {"data": "film"})
    torch.save({"format": 1, "config": stored, "step": 3}, tmp_path / "checkpoint.pt")
    state = read_checkpoint(config)
    assert state is not None
    assert state["step"] == 3
