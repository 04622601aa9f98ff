"""Models as `tokenlearner bench` is told them become models that can be run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ...layers.onednn import use_onednn
from ...models.insertion import insert
from ...utils.validation import require
from .._models import load_sized
from .config import BenchModel


def load_bench_models(
    candidates: Sequence[BenchModel], img_size: int, device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, nn.Module], list[int]]:
    """Builds the models, and finds the size of images that all of them take.

    Args:
        candidates: What to build.
        img_size: Height and width; 0 leaves them as the models have them.
        device: Where to put them.
        dtype: What to turn them into.

    Returns:
        The models by what they were named as, and the axes of one image, `c h w`, or clip,
        `c t h w`.

    Raises:
        ValueError: There is no such model, tokens cannot be inserted, oneDNN is asked for on
            another device than a CPU, or sizes differ.
    """
    models, sizes = {}, {}
    for candidate in candidates:
        require(
            not candidate.onednn or device.type == "cpu",
            f"{candidate.text!r} asks for oneDNN, which computes on a CPU, and the device is "
            f"{device}; leave out +onednn, or pass device cpu",
        )
        model, sizes[candidate.text] = _load(candidate, img_size, device)
        models[candidate.text] = model.to(dtype)
    if len({tuple(size) for size in sizes.values()}) > 1:
        told = ", ".join(f"{name} {' x '.join(map(str, s))}" for name, s in sizes.items())
        way = "measure them apart" if img_size else "pass img_size, or measure them apart"
        raise ValueError(f"the models take images of different sizes ({told}); {way}")
    return models, next(iter(sizes.values()))


def _load(candidate: BenchModel, img_size: int, device: torch.device) -> tuple[Any, list[int]]:
    """The model with its tokens, and the axes of what it takes."""
    try:
        model, axes = load_sized(candidate.base, img_size, str(device))
    except (AssertionError, RuntimeError) as error:  # timm's and torch's
        if not img_size:
            raise
        side = f"{img_size} x {img_size}"
        message = f"{candidate.base} takes no images of {side} ({error}); pass another img_size"
        raise ValueError(message) from error
    if candidate.tokens:
        try:
            insert(model, **candidate.tokens)
        except ValueError as error:
            raise ValueError(f"{candidate.text}: {error}") from error
    return use_onednn(model) if candidate.onednn else model, axes
