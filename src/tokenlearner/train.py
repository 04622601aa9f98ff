"""The training loop: a config, a data set and a named model become a checkpoint and its metrics."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .calibrate import Calibration, calibrate
from .data import ImageDataset, load_data
from .distill import Distillation
from .evaluate import evaluate
from .files import write_json
from .insert import insert
from .loop import Loop, Report
from .recipe import TrainConfig
from .zoo import create_model, load_model, save_model


@dataclass(frozen=True)
class TrainResult:
    """What a run left: the trained model and one row of metrics an epoch.

    Args:
        model: In evaluation mode.
        checkpoint: Its weights.
        history: A row of metrics for every epoch.
        images: Training pictures there were.
        host: With insert, the model as it was before.
        calibration: With insert, what calibrating did, if it was asked for.
    """

    model: nn.Module
    checkpoint: Path
    history: list[dict[str, Any]]
    images: int
    host: nn.Module | None = None
    calibration: Calibration | None = None


def train(config: TrainConfig, report: Report | None = None) -> TrainResult:
    """Trains a model and writes it, with a line of metrics after every epoch.

    Nothing is written before the config, the data and the model have been found good. The same
    config gives the same weights on the same machine.

    Args:
        config: What to train, on what, and how.
        report: Called after every step with `step`, `steps`, `loss`, `lr` and `images_per_second`,
            and after every epoch with its row of metrics; before that after every step of
            calibrating, without `lr`.

    Returns:
        The model in evaluation mode, its checkpoint and the metrics.

    Raises:
        ValueError: The folder holds a run already, or a name or a number does not fit.
        RuntimeError: The loss is no longer finite; the last checkpoint is named, if there is one.
    """
    out, device = Path(config.out), pick_device(config.device)
    if (out / "metrics.jsonl").exists():
        raise ValueError(f"{out} holds a run already; pass another out, or move that one away")
    data = load_data(config.data, "train", root=config.root)
    held_out = load_data(config.data, "test", root=config.root)
    data = data.sample(config.images, config.seed) if config.images else data
    if config.batch_size > len(data):
        raise ValueError(f"batch_size is {config.batch_size}, but {data.name} has {len(data)}")
    torch.manual_seed(config.seed)
    start, report = _start(config, data, device), report or (lambda row: None)
    model, calibrated = start.model, _calibrate(config, start.model, data, report)
    write_json(out / "train.json", asdict(config))
    if calibrated:
        write_json(out / "calibration.json", asdict(calibrated))
    loop, history = Loop(config, model, data, report, start.teaching), []
    for epoch in range(config.epochs):
        row = {"epoch": epoch + 1, **loop.epoch()}
        row |= {f"test_{k}": v for k, v in asdict(evaluate(model, held_out)).items()}
        save_model(model, out)
        with (out / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        history.append(row)
        loop.report(row)
    checkpoint = out / "model.safetensors"
    return TrainResult(model.eval(), checkpoint, history, len(data), start.host, calibrated)


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


@dataclass(frozen=True)
class _Start:
    """What a run starts from."""

    model: nn.Module
    host: nn.Module | None
    teaching: Distillation | None


def _start(config: TrainConfig, data: ImageDataset, device: torch.device) -> _Start:
    """Builds or loads the model and its teacher, and tries both on pictures."""
    host = None
    if config.insert:
        model = _trained(config.model, data)
        host = copy.deepcopy(model).to(device)
        insert(model, config.insert, config.at, learner=config.learner, fuse=config.fuse)
    else:
        model = _named(config, data)
    _try(config.model, model, data)
    teaching = None
    if config.teacher:
        given = host if config.teacher == "host" else None
        teacher = _trained(config.teacher, data) if given is None else given
        teaching = Distillation(teacher.to(device), config.kd_distill_type, config.kd_temperature)
        _try_teaching(config, teaching, model, data, device)
    return _Start(model.to(device), host, teaching)


def _named(config: TrainConfig, data: ImageDataset) -> nn.Module:
    """Builds a model by its name for the data's classes and channels."""
    kwargs: dict[str, Any] = {"num_classes": len(data.classes), "in_chans": data.images.shape[1]}
    if config.num_tokens:
        kwargs |= {k: getattr(config, k) for k in ("num_tokens", "at", "learner", "fuse")}
    return create_model(config.model, **kwargs | (config.model_kwargs or {}))


def _trained(name: str, data: ImageDataset) -> nn.Module:
    """Loads a trained model that fits the data."""
    model = load_model(name)
    _try(name, model, data)
    return model


def _try_teaching(
    config: TrainConfig,
    teaching: Distillation,
    model: nn.Module,
    data: ImageDataset,
    device: torch.device,
) -> None:
    """Finds out before anything is written whether the teacher fits model and batches."""
    images, _ = next(data.batches(min(2, config.batch_size)))
    with torch.no_grad():
        teaching(model.to(device), images.to(device))


def _try(name: str, model: nn.Module, data: ImageDataset) -> None:
    """Runs a model on one picture, and refuses it if it cannot, or has other classes."""
    images, _ = next(data.batches(1))
    try:
        with torch.inference_mode():
            logits = model.cpu().eval()(images)
    except (AssertionError, RuntimeError) as error:
        size = list(data.images.shape[1:])
        message = f"{name} does not take pictures of {size}, as {data.name} has ({error})"
        raise ValueError(message) from error
    if logits.shape[1] != len(data.classes):
        raise ValueError(
            f"{name} has {logits.shape[1]} classes, {data.name} has {len(data.classes)}; "
            "take a model with the same classes"
        )


def _calibrate(
    config: TrainConfig, model: nn.Module, data: ImageDataset, report: Report
) -> Calibration | None:
    """Fits inserted learners to the host's later blocks."""
    if not (config.insert and config.calibrate):
        return None
    device = next(model.parameters()).device
    sample = data.sample(min(config.calibrate, len(data)), config.seed)
    images, _ = next(sample.batches(len(sample)))
    return calibrate(model, images.to(device), seed=config.seed, report=report)
