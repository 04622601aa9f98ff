"""Fashion-MNIST: read from the idx files of the package, of Debian or of torchvision."""

from __future__ import annotations

import gzip
import lzma
import math
import os
import struct
import zlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

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
_IDX_FOLDERS = ("fashion-mnist", "FashionMNIST/raw", "")  # Debian's, torchvision's, the place
_DEBIAN = Path("/usr/share/datasets")
_CACHE = Path("~/.cache/tokenlearner")
_WAYS_OUT = "run `apt-get install dataset-fashion-mnist`, or pass download=True or another root"


def load_fashion_mnist_small(name: str, split: str, config: DataConfig) -> ImageDataset:
    """The images that come with the package."""
    bundled = Path(str(files("tokenlearner") / "assets" / "fashion_mnist_small"))
    return _read_fashion(name, split, config, [config.folder or bundled], "pass no root")


def load_fashion_mnist(name: str, split: str, config: DataConfig) -> ImageDataset:
    """All images, from the usual places or the one that is named."""
    named, cache = os.environ.get("TOKENLEARNER_DATA"), _CACHE.expanduser()
    usual = [*([Path(named).expanduser()] if named else []), _DEBIAN, cache]
    places = [config.folder] if config.folder else usual
    if config.download and not _find_idx(split, places):
        _download_fashion(config.folder or cache)
    return _read_fashion(name, split, config, places, _WAYS_OUT)


def _read_fashion(
    name: str, split: str, config: DataConfig, places: Sequence[Path], way_out: str
) -> ImageDataset:
    paths = _find_idx(split, places)
    if not paths:
        raise ValueError(
            f"{name} was not found: expected {' and '.join(IDX_FILES[split])} (plain, .gz or .xz) "
            f"in {', '.join(map(str, places))}, or inside these in fashion-mnist or "
            f"FashionMNIST/raw; {way_out}"
        )
    images, labels = _read_idx(paths[0], dims=3)[:, None], _read_idx(paths[1], dims=1).long()
    data = ImageDataset(name, split, images, labels, FASHION_CLASSES, FASHION_MEAN, FASHION_STD)
    return data.resized(config.img_size, config.in_chans)


def _find_idx(split: str, places: Sequence[Path]) -> tuple[Path, Path] | None:
    """Names the images and the labels in the first folder that holds both."""
    for folder in (place / below for place in places for below in _IDX_FOLDERS):
        images, labels = (_find_file(folder / stem) for stem in IDX_FILES[split])
        if images and labels:
            return images, labels
    return None


def _find_file(path: Path) -> Path | None:
    variants = (path.with_name(path.name + suffix) for suffix in _UNPACK)
    return next((variant for variant in variants if variant.is_file()), None)


def _read_idx(path: Path, dims: int) -> Tensor:
    """Reads an idx file of bytes: its type in 4 bytes, `dims` sizes of 4 bytes, the values."""
    magic, start = bytes((0, 0, 8, dims)), 4 + 4 * dims
    try:
        raw = _UNPACK[path.suffix](path.read_bytes())
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        message = f"{path} cannot be unpacked ({error}), expected a whole file; replace it"
        raise ValueError(message) from error
    require(
        len(raw) >= start and raw[:4] == magic,
        f"{path} has {len(raw)} bytes and starts with {raw[:4]!r}, expected {magic!r} and {dims} "
        "sizes (an idx file of bytes); replace it",
    )
    sizes = struct.unpack_from(f">{dims}I", raw, 4)
    require(
        len(raw) == start + math.prod(sizes),
        f"{path} has {len(raw)} bytes, expected {start + math.prod(sizes)} for the sizes "
        f"{list(sizes)} that it names; it is damaged, replace it",
    )
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=start).reshape(sizes).copy())


def _download_fashion(target: Path) -> None:
    from torchvision.datasets import FashionMNIST  # here, so that importing this file stays light

    try:
        FashionMNIST(str(target), download=True)
    except (RuntimeError, OSError) as error:
        message = f"fashion-mnist could not be fetched into {target} ({error}); {_WAYS_OUT}"
        raise ValueError(message) from error


_UNPACK = {"": bytes, ".gz": gzip.decompress, ".xz": lzma.decompress}
