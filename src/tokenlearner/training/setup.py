"""Models that a run starts from, built new or trained, and the teacher."""

from __future__ import annotations

import copy
import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.init_from import init_from
from ..data.dataset import LabeledDataset, require_order
from ..data.token_dataset import TokenDataset
from ..data.transforms import train_transform
from ..evaluation.accuracy import preprocess_for, with_model_size
from ..models.factory import create_model
from ..models.hub import load_model
from ..models.insertion import insert
from ..models.outputs import predict_logits
from ..models.preprocessing import (
    CLIPS,
    get_classes,
    get_preprocessing,
    set_preprocessing,
    size_errors,
    without_classes,
)
from ..models.temporal import TEMPORAL
from ..utils.modules import building_on_meta, training_mode
from ..utils.preprocessing import Preprocessing
from ..utils.validation import require, shortened
from .calibration import Calibration, calibrate
from .config import TrainConfig
from .distillation import Distillation
from .meter import Report
from .optim import make_optimizer, make_schedule

logger = logging.getLogger(__name__)
_MEASURED = 256  # images that tell the variance of a teacher's features


@dataclass(frozen=True)
class TrainingSetup:
    """The model to train; with insert the host before inserting; the teacher, if there is one.

    The data are preprocessed as the model takes them.
    """

    model: nn.Module
    host: nn.Module | None
    distillation: Distillation | None
    data: Any
    held_out: Any


def prepare(
    config: TrainConfig, data: LabeledDataset, held_out: LabeledDataset, device: torch.device
) -> TrainingSetup:
    """Builds or loads the model and its teacher, and runs both on images.

    Images are preprocessed as a pretrained model says; one that is trained from scratch is told
    how the data set is.

    Raises:
        ValueError: Model, teacher, data or recipe do not fit each other.
    """
    host = None
    model = _load_model(config, data) if config.is_trained else _build_model(config, data)
    is_pretrained = config.is_trained or (config.model_kwargs or {}).get("pretrained")
    if is_pretrained:
        options = config.preprocessing
        data, held_out = (preprocess_for(model, part, options) for part in (data, held_out))
    if config.insert:
        host = copy.deepcopy(model).to(device)
        how = {key: getattr(config, key) for key in ("learner", "fuse", "overlap")}
        insert(model, config.insert, config.at, **how)
    _write_preprocessing(model, data)
    _write_license(config, model, is_known=bool(is_pretrained))
    _check_model(config.model, model, data)
    _check_recipe(config, model, data)
    distillation = None
    if config.teacher:
        given = host if config.teacher == "host" else None  # which `TrainConfig` takes with insert
        teacher = given or _load_teacher(config.teacher, data)
        kind, temperature = config.kd_distill_type, config.kd_temperature
        distillation = Distillation(teacher.to(device), kind, temperature)
        _measure(distillation, model.to(device), data, config)
    return TrainingSetup(model.to(device), host, distillation, data, held_out)


def with_sizes(config: TrainConfig) -> TrainConfig:
    """Returns a config with the sizes of its model, where none are given and the data have none.

    Raises:
        ValueError: There is no such model.
    """
    if not config.lacks_size:
        return config
    if config.is_trained:
        return with_model_size(config, load_model(config.model))
    kwargs = {k: v for k, v in (config.model_kwargs or {}).items() if k != "pretrained"}
    with building_on_meta():
        return with_model_size(config, create_model(config.model, **kwargs))


def _measure(
    distillation: Distillation, model: nn.Module, data: LabeledDataset, config: TrainConfig
) -> None:
    """Tries student and teacher on images, and measures the teacher's features on the first few.

    They are the same images in every process and in a run that goes on.
    """
    device = next(model.parameters()).device
    parts = data.batches(min(_MEASURED, max(2, config.batch_size), len(data)))
    counted, batches = 0, list[Tensor]()
    for images, _ in parts:
        batches.append(images.flatten(0, 1) if images.ndim > len(data.shape) + 1 else images)
        counted += len(images)
        if counted >= _MEASURED:
            break
    with torch.no_grad(), training_mode(model, training=False):
        distillation(model, batches[0][:2].to(device))
        distillation.measure(model, (images.to(device) for images in batches))


def _write_preprocessing(model: nn.Module, data: LabeledDataset) -> None:
    is_clip = len(data.shape) == 4
    used = Preprocessing.of(data)
    used = replace(used, interpolation=CLIPS, crop_mode="center") if is_clip else used
    set_preprocessing(model, used, data.classes)


def _write_license(config: TrainConfig, model: Any, *, is_known: bool) -> None:
    """Writes the license to the model; timm gives that of its own weights to every new model."""
    license = config.license or (model.pretrained_cfg.get("license") if is_known else None)
    model.pretrained_cfg = model.default_cfg = model.pretrained_cfg | {"license": license}


class Renormalized(nn.Module):
    """A teacher that takes images as they are normalized for its student.

    Args:
        teacher: Takes images with its own mean and std.
        student: Mean and std of the images that come.
        own: Those of the teacher.
    """

    def __init__(self, teacher: nn.Module, student: Preprocessing, own: Preprocessing):
        super().__init__()
        self.teacher = teacher
        values = torch.tensor([student.mean, student.std, own.mean, own.std], dtype=torch.float32)
        self.register_buffer("values", values, persistent=False)

    def forward(self, images: Tensor) -> Any:
        """Runs the teacher: `b c h w`, or clips `b c t h w`."""
        values: Any = self.values
        mean, std, own_mean, own_std = values.reshape(4, -1, *[1] * (images.ndim - 2))
        return self.teacher((images * std + mean - own_mean) / own_std)


def _load_teacher(name: str, data: LabeledDataset) -> nn.Module:
    """Loads a teacher, which takes images with a mean and std of its own."""
    teacher = _load_trained(name, data)
    classes = get_classes(teacher)
    require(
        classes is None or classes == data.classes,
        f"the classes of the teacher {name} have other names or another order than those of "
        f"{data.name}, {shortened(list(classes or ()))}; take a teacher of the same classes",
    )
    own = get_preprocessing(teacher, data.shape[0])
    student = Preprocessing(data.mean, data.std)
    if own is None or (own.mean, own.std) == (student.mean, student.std):
        return teacher
    return Renormalized(teacher, student, own)


def _build_model(config: TrainConfig, data: LabeledDataset) -> nn.Module:
    """Builds a model by its name for the data's classes and channels."""
    kwargs: dict[str, Any] = {"num_classes": len(data.classes), **_input_kwargs(config, data)}
    if config.num_tokens:
        kwargs |= {k: getattr(config, k) for k in ("num_tokens", "at", "learner", "fuse")}
        kwargs |= {"overlap": config.overlap} if config.overlap else {}
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


def _input_kwargs(config: TrainConfig, data: LabeledDataset) -> dict[str, Any]:
    """Returns the arguments of a new model that say what its inputs are.

    Raises:
        ValueError: The model takes pixels and the data are tokens, or the other way round.
    """
    is_tokens = isinstance(data, TokenDataset)
    require(
        is_tokens == (config.model in TEMPORAL),
        f"{config.model} takes {'pixels' if is_tokens else 'tokens'}, and {data.name} has "
        f"{'tokens' if is_tokens else 'pixels'}; models of tokens are {', '.join(TEMPORAL)}, and "
        "go with data='tokens'",
    )
    if not isinstance(data, TokenDataset):
        return {"in_chans": data.shape[0]}
    require(
        not config.num_tokens,
        f"num_tokens is {config.num_tokens}, but the tokens are learned already; leave it out",
    )
    shape = dict(zip(("num_frames", "tokens_per_frame", "token_dim"), data.shape, strict=True))
    return shape | {"token_source": dict(data.source)}


def _set_head_bias(model: Any, value: float) -> None:
    bias: Any = getattr(model.get_classifier(), "bias", None)
    require(bias is not None, f"head_bias is {value}, but the model's classifier has no bias")
    nn.init.constant_(bias, value)


def _load_model(config: TrainConfig, data: LabeledDataset) -> nn.Module:
    """Loads the trained model that the run goes on from, with float32 weights.

    One that learns other classes than it has gets a new classifier.
    """
    model: Any = load_model(config.model).float()
    if not config.insert and not _has_classes(model, data):
        logger.info(
            "%s gets a new classifier: it has other classes than %s", config.model, data.name
        )
        model.reset_classifier(len(data.classes))
        model.pretrained_cfg = without_classes(getattr(model, "pretrained_cfg", None) or {})
    if config.img_size and hasattr(model, "set_input_size"):
        model.set_input_size((config.img_size, config.img_size))
    return model


def _has_classes(model: Any, data: LabeledDataset) -> bool:
    names = get_classes(model)
    return set(data.classes) <= set(names) if names else model.num_classes == len(data.classes)


def _load_trained(name: str, data: LabeledDataset) -> nn.Module:
    """Loads a trained model that fits the data."""
    model = load_model(name).float()
    _check_model(name, model, data)
    return model


def _check_recipe(config: TrainConfig, model: nn.Module, data: LabeledDataset) -> None:
    """Builds transform, optimizer and schedule once, so that their errors come early."""
    per_epoch = len(data) // config.batch_size
    train_transform(config, data)
    make_schedule(config, make_optimizer(config, model), config.total_steps(per_epoch), per_epoch)
    require(
        len(data) > 1 or not (config.insert and config.calibrate),
        "images is 1, but calibrating takes 2 or more; pass more images, or calibrate=0",
    )


def _check_model(name: str, model: nn.Module, data: LabeledDataset) -> None:
    """Runs a model on one image; refuses one that cannot take it or has other classes."""
    images, _ = next(data.batches(1))
    with size_errors(name, model, data.shape), torch.inference_mode():
        logits = predict_logits(model.cpu().eval(), images)
    if logits.shape[1] != len(data.classes):
        raise ValueError(
            f"{name} has {logits.shape[1]} classes, {data.name} has {len(data.classes)}; "
            "take a model with the same classes"
        )


def read_calibration(config: TrainConfig) -> Calibration | None:
    """Reads the result of calibrating of a run that goes on."""
    path = Path(config.out) / "calibration.json"
    return Calibration(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


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
