"""What a run starts from: a model built new or one that is trained, and its teacher."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoints.init_from import init_from
from ..data.dataset import LabeledDataset, require_order
from ..data.transforms import train_transform
from ..models.factory import create_model, load_model
from ..models.insertion import insert
from ..utils.validation import require
from .calibration import Calibration, calibrate
from .config import TrainConfig
from .distillation import Distillation
from .objective import make_optimizer, make_schedule
from .trainer import Report


@dataclass(frozen=True)
class TrainingSetup:
    """What a run starts from."""

    model: nn.Module
    host: nn.Module | None
    teaching: Distillation | None


def prepare(config: TrainConfig, data: LabeledDataset, device: torch.device) -> TrainingSetup:
    """Builds or loads the model and its teacher, and tries both on images."""
    host = None
    if config.insert:
        model = _trained(config.model, data)
        host = copy.deepcopy(model).to(device)
        insert(model, config.insert, config.at, learner=config.learner, fuse=config.fuse)
    else:
        model = _named(config, data)
    _try(config.model, model, data)
    _try_recipe(config, model, data)
    teaching = None
    if config.teacher:
        given = host if config.teacher == "host" else None
        teacher = _trained(config.teacher, data) if given is None else given
        teaching = Distillation(teacher.to(device), config.kd_distill_type, config.kd_temperature)
        _try_teaching(config, teaching, model, data, device)
    return TrainingSetup(model.to(device), host, teaching)


def _named(config: TrainConfig, data: LabeledDataset) -> nn.Module:
    """Builds a model by its name for the data's classes and channels."""
    kwargs: dict[str, Any] = {"num_classes": len(data.classes), "in_chans": data.shape[0]}
    if config.num_tokens:
        kwargs |= {k: getattr(config, k) for k in ("num_tokens", "at", "learner", "fuse")}
    if config.img_size:
        kwargs["img_size"] = config.img_size
    if config.drop_path:
        kwargs["drop_path_rate"] = config.drop_path
    model = create_model(config.model, **kwargs | (config.model_kwargs or {}))
    if config.head_bias is not None:
        _set_head_bias(model, config.head_bias)
    if config.init_from:
        init_from(model, config.init_from, keep_head=config.keep_head)
    return model


def _set_head_bias(model: Any, value: float) -> None:
    bias: Any = getattr(model.get_classifier(), "bias", None)
    require(bias is not None, f"head_bias is {value}, but the model's classifier has no bias")
    nn.init.constant_(bias, value)


def _trained(name: str, data: LabeledDataset) -> nn.Module:
    """Loads a trained model that fits the data."""
    model = load_model(name)
    _try(name, model, data)
    return model


def _try_recipe(config: TrainConfig, model: nn.Module, data: LabeledDataset) -> None:
    """Finds out before anything is written whether images and weights can change as is asked."""
    per_epoch = len(data) // config.batch_size
    train_transform(config, data, config.crop_pct)
    make_schedule(config, make_optimizer(config, model), config.epochs * per_epoch, per_epoch)


def _try_teaching(
    config: TrainConfig,
    teaching: Distillation,
    model: nn.Module,
    data: LabeledDataset,
    device: torch.device,
) -> None:
    """Finds out before anything is written whether the teacher fits model and batches."""
    images, _ = next(data.batches(min(2, config.batch_size)))
    with torch.no_grad():
        teaching(model.to(device), images.to(device))


def _try(name: str, model: nn.Module, data: LabeledDataset) -> None:
    """Runs a model on one image, and refuses it if it cannot, or has other classes."""
    images, _ = next(data.batches(1))
    try:
        with torch.inference_mode():
            logits = model.cpu().eval()(images)
    except (AssertionError, RuntimeError) as error:
        size = list(data.shape)
        message = f"{name} does not take images of {size}, as {data.name} has ({error})"
        raise ValueError(message) from error
    if logits.shape[1] != len(data.classes):
        raise ValueError(
            f"{name} has {logits.shape[1]} classes, {data.name} has {len(data.classes)}; "
            "take a model with the same classes"
        )


def read_calibration(config: TrainConfig) -> Calibration | None:
    """What calibrating did in a run that goes on."""
    path = Path(config.out) / "calibration.json"
    if not (config.resume and path.exists()):
        return None
    return Calibration(**json.loads(path.read_text(encoding="utf-8")))


def calibrate_inserted(
    config: TrainConfig, model: nn.Module, data: LabeledDataset, report: Report
) -> Calibration | None:
    """Fits inserted learners to the host's later blocks."""
    if not (config.insert and config.calibrate):
        return None
    device = next(model.parameters()).device
    count = min(config.calibrate, len(data))
    sample = require_order(data, f"draw {count} images").sample(count, config.seed)
    images, _ = next(sample.batches(len(sample)))
    return calibrate(model, images.to(device), seed=config.seed, report=report)
