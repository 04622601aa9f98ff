"""Loss and accuracy of a model on a data set: `evaluate(model, data)`."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.config import DataConfig
from ..data.dataset import Batch, IterableDataset, LabeledDataset, match_classes
from ..data.loader import SampleKey, load_batches
from ..data.token_dataset import check_token_source
from ..models.outputs import check_classifier, predict_logits
from ..models.preprocessing import get_classes, get_input_size, get_preprocessing, has_fixed_size
from ..utils.modules import stream_device, training_mode
from ..utils.validation import check_count, require, shortened

Config = TypeVar("Config", bound=DataConfig)
_LOGGER = logging.getLogger(__name__)
MAX_NAMED = 20  # unreadable files whose names are kept
_MAX_NUMBERS = 2**25  # that go into a model at a time, about


@dataclass(frozen=True)
class Evaluation:
    """Loss and accuracy over `images` images."""

    images: int
    loss: float
    """Mean cross-entropy, in nats."""
    top1_percent: float
    top5_percent: float
    broken: int = 0
    """Files that could not be read; they are not among `images`."""
    broken_files: tuple[str, ...] = ()
    """Names of the first of them, with the reasons."""


def evaluate(model: nn.Module, data: LabeledDataset, batch_size: int = 500) -> Evaluation:
    """Classifies every image of `data` and returns loss and accuracy.

    The model runs in evaluation mode and keeps its own. Files that cannot
    be read are left out and counted. Where a clip is given in several views, their logits are
    averaged.

    Args:
        model: Images `b c h w` to logits `b classes`, on any device.
        data: Labeled images. Labels go by name where the model has names of classes.
        batch_size: Images at a time; changes the speed only.

    Raises:
        ValueError: The data have classes that the model does not know, or as the model has no
            names of classes, another number of them; it has no classifier; or no image can be read.
    """
    check_count("batch_size", batch_size)
    check_classifier(model)
    unreadable: list[str] = []
    sums = sum_metrics(model, by_class_names(model, data), batch_size, unreadable=unreadable)
    return mean_metrics(sums, data, unreadable)


def by_class_names(model: nn.Module, data: LabeledDataset) -> LabeledDataset:
    """Returns the data with labels numbered as a model numbers its classes.

    A model of ImageNet's 1,000 classes has their WordNet names. Where a model has no names, numbers
    count, and `evaluate` compares how many.

    Raises:
        ValueError: The data have a class that the model does not know, or are other tokens than
            those of the model.
    """
    check_token_source(model, data)
    classes = get_classes(model)
    if classes is None and len(data.classes) != (count := getattr(model, "num_classes", None)):
        classes = _imagenet_names(count)
        if classes is None or not set(data.classes) <= set(classes):
            return data
    return match_classes(data, classes) if classes else data


def preprocess_for(
    model: nn.Module, data: LabeledDataset, options: Mapping[str, Any] | None = None
) -> LabeledDataset:
    """Returns the data as a model takes them: preprocessing and classes are the model's.

    Args:
        model: What is run on them.
        data: Any.
        options: Mean, std, crop_pct, interpolation or crop_mode that are taken before the model's.
    """
    data, given = by_class_names(model, data), dict(options or {})
    if found := get_preprocessing(model, data.shape[0]):
        return data.with_preprocessing(**found.to_kwargs() | given)
    if not {"mean", "std"} <= given.keys():
        warn_assumed(model, data)
    return data


def warn_assumed(model: nn.Module, data: LabeledDataset) -> None:
    """Logs how images are normalized for a model that does not say it."""
    _LOGGER.warning(
        "this %s does not say how its images are normalized; %s takes mean %s and std %s: if "
        "it was trained with others, write them to it by tokenlearner.models.set_preprocessing",
        *(type(model).__name__, f"{data.name} {data.split}", tuple(data.mean), tuple(data.std)),
    )


def with_model_size(config: Config, model: Any) -> Config:
    """Returns a config with the model's size of images and clips, where none is given.

    Args:
        config: Of a data set; some have a size of their own.
        model: One that takes images of any size changes nothing. Weights do not matter.
    """
    if not config.lacks_size:
        return config
    if config.data == "tokens":
        return replace(config, frames=getattr(model, "num_frames", None))
    _, *frames, height, width = get_input_size(model)
    is_fixed = has_fixed_size(model) and height == width
    sizes = {"img_size": height if is_fixed else None, "frames": frames[0] if frames else None}
    changes = {n: size for n, size in sizes.items() if getattr(config, n) is None}
    if config.data == "moving-photographs":
        changes.pop("img_size", None)
    return replace(config, **changes)


def _imagenet_names(count: int | None) -> tuple[str, ...] | None:
    from timm.data import ImageNetInfo

    return tuple(ImageNetInfo("imagenet-1k").label_names()) if count == 1000 else None


def eval_batch_size(shape: Sequence[int], views: int = 1) -> int:
    """Returns how many images or clips of a shape to evaluate at a time.

    Args:
        shape: Of one image, `c h w`, or clip, `c t h w`.
        views: Views and crops of each.
    """
    return max(1, min(500, _MAX_NUMBERS // math.prod(shape)) // views)


@torch.inference_mode()
def sum_metrics(
    model: nn.Module,
    data: LabeledDataset,
    batch_size: int,
    process: int = 0,
    num_processes: int = 1,
    unreadable: list[str] | None = None,
    forward: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """Sums over one process's part of the data: images, unreadable files, loss, top-1, top-5.

    Names of unreadable files, with the reasons, are appended to `unreadable`. `forward` makes
    logits of images in place of the model, and another mean loss, whose sum comes last.

    Every process runs the model equally often, as sharded models need; one without an image left
    runs it on a blank.
    """
    device = stream_device(model)
    sums = torch.zeros(6, dtype=torch.float64, device="cpu")
    with training_mode(model, training=False):
        for batch in _batches(data, batch_size, process, num_processes):
            images, labels = batch.images.to(device), batch.labels.to(device)
            sums[1] += len(batch.unreadable)
            if unreadable is not None:
                unreadable += batch.unreadable
            if not len(images):
                predict_logits(model, torch.zeros(1, *data.shape, device="cpu"))
                continue
            other = torch.zeros((), device="cpu")
            if forward:
                logits, other = forward(images)
            else:
                logits = mean_logits(model, images, data)
            _check_classes(logits.shape[1], data)
            best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
            loss = F.cross_entropy(logits, labels, reduction="sum")
            counts = best[:, 0].sum().item(), best.sum().item()
            sums += torch.tensor(
                [len(images), 0, loss.item(), *counts, len(images) * other.item()],
                dtype=sums.dtype,
                device="cpu",
            )
    return sums


def mean_metrics(sums: Tensor, data: LabeledDataset, unreadable: Sequence[str] = ()) -> Evaluation:
    """Makes means of the sums of all processes, and names unreadable files.

    Raises:
        ValueError: No image could be read.
    """
    n, broken, loss, top1, top5, _ = sums.tolist()
    names = f"{data.name} has no file that can be read: {shortened(unreadable)}"
    require(n > 0, names)
    means = loss / n, 100 * top1 / n, 100 * top5 / n
    return Evaluation(int(n), *means, int(broken), tuple(sorted(unreadable)[:MAX_NAMED]))


def _batches(
    data: LabeledDataset, batch_size: int, process: int, num_processes: int
) -> Iterator[Batch]:
    """Yields this process's part, in as many batches as any other's."""
    if isinstance(data, IterableDataset):
        return data.eval_batches(batch_size, process, num_processes)
    indices = range(process, len(data), num_processes)
    most = -(-len(data) // num_processes)
    keys = [
        [SampleKey(index) for index in indices[first : first + batch_size]]
        for first in range(0, most, batch_size)
    ]
    return load_batches(data, keys, workers=data.workers)


def mean_logits(model: nn.Module, images: Tensor, data: LabeledDataset) -> Tensor:
    """Returns `b classes` for images and clips, the mean over views if there are several."""
    if images.ndim == len(data.shape) + 1:
        return predict_logits(model, images)
    return predict_logits(model, images.flatten(0, 1)).unflatten(0, images.shape[:2]).mean(1)


def _check_classes(num_classes: int, data: LabeledDataset) -> None:
    if num_classes != len(data.classes):
        raise ValueError(
            f"the model has {num_classes} classes, {data.name} has {len(data.classes)}, and the "
            "model has no names by which to tell which are which; write them to it with "
            f"set_preprocessing(..., classes=...), or build it with num_classes={len(data.classes)}"
        )
