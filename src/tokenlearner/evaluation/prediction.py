"""Labels of images and videos in files: `predict(model, ["photos/"])`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.config import DataConfig
from ..data.dataset import Batch, MapDataset
from ..data.loader import SampleKey, load_batches
from ..data.unlabeled import list_files, load_unlabeled
from ..models.outputs import check_classifier
from ..models.preprocessing import get_classes, get_input_size, get_preprocessing, size_errors
from ..utils.modules import training_mode
from ..utils.validation import check_count, require
from .accuracy import eval_batch_size, mean_logits, warn_assumed

_BATCH = 64  # files at most that are read by one process, then run together


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of a file."""

    file: str
    labels: tuple[str, ...] = ()
    """Names of classes, or their numbers where the model has no names; the most probable first."""
    probabilities: tuple[float, ...] = ()
    error: str = ""
    """Why the file cannot be read; it has no labels then."""


def predict(
    model: nn.Module,
    sources: Sequence[str | Path],
    *,
    top: int = 1,
    batch_size: int | None = None,
    **options: Any,
) -> Iterator[Prediction]:
    """Labels images, or for a model of clips videos, in the order of their names.

    They are resized, cropped and normalized as the model's `pretrained_cfg` says, or by ImageNet's
    numbers. The model runs in evaluation mode and keeps its own.

    Args:
        model: Images `b c h w`, or clips `b c t h w`, to logits `b classes`, on any device.
        sources: Files, and folders that are searched with all that is in them.
        top: Classes of each file.
        batch_size: Files at a time, changes the speed only; None is up to 64, fewer of large ones.
        **options: Of `DataConfig`, such as `img_size`, `stride`, `views`, `workers`, `mean`.

    Yields:
        A prediction for each file, those that cannot be read too.

    Raises:
        ValueError: There is no file, the model takes no squares or has no classifier, its numbers
            are not finite, or it returns no logits.
    """
    check_count("top", top)
    check_classifier(model)
    files, data, config = _open(model, sources, options)
    most = min(_BATCH, eval_batch_size(data.shape, config.views * config.crops))
    return _predictions(model, files, data, config, top, batch_size or most)


def read_images(
    model: nn.Module,
    sources: Sequence[str | Path],
    *,
    most: int | None = None,
    seed: int = 0,
    **options: Any,
) -> tuple[Tensor, list[str]]:
    """Reads images in files as a model takes them, normalized: `b c h w`.

    Args:
        model: As in `predict`, of images.
        sources: As in `predict`.
        most: Files to read, drawn by a seed; None is all.
        seed: Of the draw.
        **options: As in `predict`.

    Returns:
        The images, and why others cannot be read.

    Raises:
        ValueError: There is no file, or none can be read, or the model takes clips or no squares.
    """
    require(len(get_input_size(model)) == 3, "the model takes clips, and images are read")
    files, data, config = _open(model, sources, options)
    order = torch.randperm(len(files), generator=torch.Generator("cpu").manual_seed(seed))
    drawn = order[:most].sort().values if most else torch.arange(len(files), device="cpu")
    images, unreadable = list[Tensor](), list[str]()
    for _, batch in _batches(data, drawn, config, _BATCH):
        images.append(batch.images)
        unreadable += batch.unreadable
    found = torch.cat(images) if images else torch.empty(0)
    require(len(found) > 0, f"none of {len(drawn)} files can be read; the first: {unreadable[:1]}")
    return found, unreadable


def _open(
    model: nn.Module, sources: Sequence[str | Path], options: dict[str, Any]
) -> tuple[list[str], MapDataset, DataConfig]:
    """Lists files, and returns them as a data set that is preprocessed for a model."""
    channels, *frames, height, width = get_input_size(model)
    size = options.get("img_size") or height
    require(
        height == width or "img_size" in options,
        f"the model takes {height} x {width} pixels, and files are cut to squares; pass img_size "
        "if it takes those too",
    )
    found = get_preprocessing(model, channels)
    known: dict[str, Any] = {"in_chans": channels} | ({"frames": frames[0]} if frames else {})
    known |= (found.to_kwargs() if found else {}) | options | {"img_size": size}
    config = DataConfig(**known)
    files = list_files(sources, videos=bool(frames), follow_links=config.follow_links)
    data = load_unlabeled(files, config, videos=bool(frames))
    if not found and not {"mean", "std"} <= options.keys():
        warn_assumed(model, data)
    return files, data, config


def _batches(
    data: MapDataset, indices: Tensor, config: DataConfig, batch_size: int
) -> Iterator[tuple[Tensor, Batch]]:
    """Yields parts of the indices, and the files of each that can be read."""
    parts = indices.split(batch_size)
    keys = [[SampleKey(index) for index in part.tolist()] for part in parts]
    workers = min(config.reading_workers, len(parts)) if len(parts) > 1 else 0
    return zip(parts, load_batches(data, keys, workers=workers), strict=True)


def _predictions(
    model: nn.Module,
    files: list[str],
    data: MapDataset,
    config: DataConfig,
    top: int,
    batch_size: int,
) -> Iterator[Prediction]:
    classes = get_classes(model) or ()
    indices = torch.arange(len(files), device="cpu")
    for part, batch in _batches(data, indices, config, batch_size):
        reasons = iter(batch.unreadable)
        read = {}
        if len(batch.labels):
            ranked = _rank(model, batch.images, data, top)
            read = dict(zip(batch.labels.tolist(), zip(*ranked, strict=True), strict=True))
        for index in part.tolist():
            if index in read:
                numbers, shares = read[index]
                labels = tuple(classes[i] if classes else str(i) for i in numbers)
                yield Prediction(files[index], labels, tuple(shares))
            else:
                yield Prediction(files[index], error=next(reasons))


@torch.inference_mode()
def _rank(
    model: nn.Module, images: Tensor, data: MapDataset, top: int
) -> tuple[list[list[int]], list[list[float]]]:
    """Returns the numbers of the most probable classes of each image, and their probabilities."""
    with training_mode(model, training=False), size_errors("the model", model, data.shape):
        logits = mean_logits(model, images, data)
    require(bool(logits.isfinite().all()), "the model returns NaN or infinity")
    shares, numbers = logits.double().softmax(-1).topk(min(top, logits.shape[1]))
    return numbers.tolist(), shares.tolist()
