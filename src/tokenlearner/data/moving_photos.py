"""A labeled set of motions in memory: a window slides over a real photograph.

It asks a model for nothing but the order of frames. A photograph goes on in its own mirror image
in all directions, and a clip starts anywhere in it with the same chance whatever its class. So
every single frame, first or last, is drawn from the same images in every class.

Source: the photographs that scikit-image ships, each CC0, in the public domain or without known
copyright restrictions, as the docstrings of `skimage.data` say.
Axes: `n` clips, `t` frames, `c h w`.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from ..utils.imports import require_package
from ..utils.validation import require
from .config import DataConfig
from .tensor_dataset import ImageDataset

# The content moves as the class says, from frame to frame; the window goes the other way.
# Down is towards the last row.
MOTIONS = {  # class: rows and columns that the content moves by, at a speed of 1
    "still": (0, 0),
    "right": (0, 1),
    "down right": (1, 1),
    "down": (1, 0),
    "down left": (1, -1),
    "left": (0, -1),
    "up left": (-1, -1),
    "up": (-1, 0),
    "up right": (-1, 1),
}
MOVING_PHOTOGRAPHS = {  # split: functions of skimage.data
    "train": (
        *("astronaut", "brick", "camera", "chelsea", "grass"),
        *("hubble_deep_field", "immunohistochemistry", "retina", "rocket"),
    ),
    "test": ("coffee", "coins", "gravel"),
}
MOVING_SIZES = {"train": 9000, "test": 1800}
MAX_SPEED = 3  # pixels a frame, along rows, columns or both
_SIDE = 256  # the shorter one of a photograph
_SEEDS = {"train": 0, "test": 1}


def load_moving_photos(name: str, split: str, config: DataConfig) -> ImageDataset:
    """Cuts the clips of a split out of its photographs, the same ones every time.

    Of `config`, `frames`, `img_size` (32 if it is None) and `in_chans` (1 if it is None) are used.
    Classes are equally frequent; mean and std are those of the training photographs.

    Raises:
        ValueError: scikit-image is missing, or a clip is larger than a photograph.
    """
    size = config.img_size or 32
    require(size <= _SIDE, f"{name} is cut out of photographs: img_size is {size}, up to {_SIDE}")
    train = _photographs("train")
    photographs = train if split == "train" else _photographs(split)
    labels = np.arange(MOVING_SIZES[split]) % len(MOTIONS)
    draw = np.random.default_rng(_SEEDS[split])
    shapes = np.array([photograph.shape for photograph in photographs])
    which, places = _draw_paths(labels, shapes, config.clip_frames, draw)
    clips = np.empty((*places.shape[:2], size, size), np.uint8)
    for number, photograph in enumerate(photographs):
        chosen = which == number
        clips[chosen] = _cut(photograph, places[chosen], size)
    mean, std = _mean_and_std(train)
    images, classes = torch.from_numpy(clips)[:, None], tuple(MOTIONS)
    data = ImageDataset(name, split, images, torch.from_numpy(labels), classes, (mean,), (std,))
    return data.resized(in_chans=config.in_chans)


def _draw_paths(
    labels: np.ndarray, shapes: np.ndarray, frames: int, draw: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The photograph of each clip, `n`, and its window's row and column in each frame, `n t 2`.

    A photograph and its mirror images repeat after twice its height and width, so there is no
    border: all places are equally likely, in every frame of every class.
    """
    steps = np.array(list(MOTIONS.values()))[labels][:, None]
    which = draw.integers(len(shapes), size=len(labels))
    period = 2 * shapes[which][:, None]
    start = draw.integers(period)
    speed = draw.integers(1, MAX_SPEED + 1, size=(len(labels), 1, 1))
    return which, (start - np.arange(frames)[:, None] * speed * steps) % period


def _cut(photograph: np.ndarray, places: np.ndarray, size: int) -> np.ndarray:
    """Windows of a photograph that goes on in its mirror image, `n t 2 -> n t h w`."""
    endless = np.pad(photograph, [(0, side + size) for side in photograph.shape], mode="symmetric")
    return sliding_window_view(endless, (size, size))[places[..., 0], places[..., 1]]


def _photographs(split: str) -> list[np.ndarray]:
    """The photographs of a split in gray, `h w`, the shorter side being 256."""
    data = require_package("skimage.data", "demo", "moving-photographs")
    return [_gray(getattr(data, name)()) for name in MOVING_PHOTOGRAPHS[split]]


def _gray(pixels: np.ndarray) -> np.ndarray:
    from PIL import Image

    image = Image.fromarray(pixels).convert("L")
    scale = _SIDE / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS))


def _mean_and_std(photographs: list[np.ndarray]) -> tuple[float, float]:
    """Returns mean and std of pixels in [0, 1], in which each photograph has the same share."""
    moments = [(p.mean(), (p.astype(np.float64) ** 2).mean()) for p in photographs]
    mean, square = np.mean(moments, axis=0)
    return float(mean / 255), float(np.sqrt(square - mean**2) / 255)
