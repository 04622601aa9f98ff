"""Fashion-MNIST: a part from the package, all of it from the idx files of Debian or torchvision."""

from __future__ import annotations

import gzip
import lzma
import os
import zlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..utils.validation import require
from .config import DataConfig
from .tensor_dataset import ImageDataset

FASHION_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
FASHION_MEAN, FASHION_STD = (0.286041,), (0.353024,)  # of the 60,000 full training images
IDX_FILES = {  # split: images, labels; each may also end in .gz or .xz
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
SMALL = "fashion_mnist_small.npz"
_FOLDERS = ("fashion-mnist", "FashionMNIST/raw", "")  # Debian's, torchvision's, the root itself
_DEBIAN = Path("/usr/share/datasets")
_CACHE = Path("~/.cache/tokenlearner")
_OPEN = {"": open, ".gz": gzip.open, ".xz": lzma.open}
_HINT = "run `apt-get install dataset-fashion-mnist`, or pass download=True or another root"


def load_fashion_mnist_small(name: str, split: str, config: DataConfig) -> ImageDataset:
    """Loads the images that come with the package."""
    bundled = Path(str(files("tokenlearner") / "assets" / "fashion_mnist_small"))
    path = (config.folder or bundled) / SMALL
    require(path.is_file(), f"{name} is missing: expected {path}; pass no root")
    with np.load(path) as arrays:
        return _dataset(name, split, config, arrays[f"{split}_images"], arrays[f"{split}_labels"])


def load_fashion_mnist(name: str, split: str, config: DataConfig) -> ImageDataset:
    """Loads all images, from the usual folders or from the root."""
    from_environment, cache = os.environ.get("TOKENLEARNER_DATA"), _CACHE.expanduser()
    usual = [Path(from_environment).expanduser()] if from_environment else []
    roots = [config.folder] if config.folder else [*usual, _DEBIAN, cache]
    paths = _find_idx(split, roots)
    if config.download and not paths:
        _download(config.folder or cache)
        paths = _find_idx(split, roots)
    if not paths:
        raise ValueError(
            f"{name} is missing: expected {' and '.join(IDX_FILES[split])} (plain, .gz or .xz) "
            f"in {', '.join(map(str, roots))}, or inside these in fashion-mnist or "
            f"FashionMNIST/raw; {_HINT}"
        )
    return _dataset(name, split, config, _read_idx(paths[0], 3), _read_idx(paths[1], 1))


def _dataset(
    name: str, split: str, config: DataConfig, images: np.ndarray, labels: np.ndarray
) -> ImageDataset:
    tensors = torch.from_numpy(images)[:, None], torch.from_numpy(labels).long()
    data = ImageDataset(name, split, *tensors, FASHION_CLASSES, FASHION_MEAN, FASHION_STD)
    return data.resized(config.img_size, config.in_chans)


def _find_idx(split: str, roots: Sequence[Path]) -> list[Path]:
    """Returns the images and the labels in the first folder that holds both."""
    for folder in (root / below for root in roots for below in _FOLDERS):
        variants = [[folder / (stem + end) for end in _OPEN] for stem in IDX_FILES[split]]
        paths = [next(filter(Path.is_file, paths), None) for paths in variants]
        if all(paths):
            return [path for path in paths if path]
    return []


def _read_idx(path: Path, dims: int) -> np.ndarray:
    """Reads an idx file of bytes: its type in 4 bytes, `dims` sizes of 4 bytes, the values."""
    open_file: Any = _OPEN[path.suffix]
    try:
        with open_file(path, "rb") as file:
            raw = file.read()
        require(raw[:4] == bytes((0, 0, 8, dims)), f"it starts with {raw[:4]!r}")
        sizes = np.frombuffer(raw, ">u4", dims, offset=4)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(sizes).copy()
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        message = f"{path} is not an idx file of {dims} axes, or damaged ({error}); replace it"
        raise ValueError(message) from error


def _download(target: Path) -> None:
    from torchvision.datasets import FashionMNIST  # here, so that importing this file stays light

    try:
        FashionMNIST(str(target), download=True)
    except (RuntimeError, OSError) as error:
        message = f"fashion-mnist could not be fetched into {target} ({error}); {_HINT}"
        raise ValueError(message) from error
