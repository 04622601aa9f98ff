"""A data set by name: `load_data("fashion-mnist-small")` gives pictures and labels in memory.

A new data set is one loader and one row in `_LOADERS`. Axes: `n` pictures, `b` in a batch, `c h w`.
"""

from __future__ import annotations

import gzip
import lzma
import math
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

SPLITS = ("train", "test")
FASHION_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
FASHION_MEAN, FASHION_STD = (0.286041,), (0.353024,)  # of the 60,000 full training pictures
IDX_FILES = {  # split: pictures, labels; each may also end in .gz or .xz
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_IDX_FOLDERS = ("fashion-mnist", "FashionMNIST/raw", "")  # Debian's, torchvision's, the place
_DEBIAN = Path("/usr/share/datasets")
_CACHE = Path("~/.cache/tokenlearner")
_WAYS_OUT = "run `apt-get install dataset-fashion-mnist`, or pass download=True or another root"


@dataclass(frozen=True, eq=False)
class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Holds one split of labelled pictures in memory and checks that they fit together.

    `dataset[i]` is one picture, float32 `[c, h, w]` in [0, 1], and its label as an int, for a
    `DataLoader` with its own transforms. `batches` gives normalised batches and is much quicker.

    Args:
        name: What the data set is called.
        split: Which part of it this is, such as `"train"`.
        images: uint8 `[n, c, h, w]`, 0 to 255.
        labels: int64 `[n]`, 0 to `len(classes) - 1`.
        classes: The name of each label.
        mean: What `batches` subtracts, one number a channel, for pictures in [0, 1].
        std: What `batches` divides by, one number above 0 a channel.

    Raises:
        ValueError: A shape, a dtype, a count or a label does not fit, or there is no picture.
    """

    name: str
    split: str
    images: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        what, images, labels = f"{self.name} {self.split}", self.images, self.labels
        _require(
            images.ndim == 4 and images.dtype == torch.uint8 and images.numel() > 0,
            f"{what}: the images are {images.dtype} {list(images.shape)}, expected torch.uint8 "
            "[n, c, h, w], none of them 0; give grey pictures a channel with images[:, None]",
        )
        n, c, _, _ = images.shape
        _require(
            labels.shape == (n,) and labels.dtype == torch.int64,
            f"{what}: the labels are {labels.dtype} {list(labels.shape)}, expected torch.int64 "
            f"[{n}]; give one label for each of the {n} images",
        )
        low, high, top = int(labels.min()), int(labels.max()), len(self.classes) - 1
        _require(
            low >= 0 and high <= top,
            f"{what}: the labels run from {low} to {high}, expected 0 to {top}; name every class",
        )
        _require(
            len(self.mean) == len(self.std) == c and min(self.std) > 0,
            f"{what}: mean is {self.mean}, std {self.std}, expected {c} each, every std above 0",
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index].float() / 255, int(self.labels[index])

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool = False,
        generator: torch.Generator | None = None,
        drop_last: bool = False,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields normalised batches of pictures and their labels, each picture once.

        Args:
            batch_size: Pictures in a batch; the last batch has what is left.
            shuffle: Draw a new order; otherwise the order is that of `images`.
            generator: Draws the order; None is torch's own. Unused without `shuffle`.
            drop_last: Leave out the last batch when it is not full.

        Shape:
            float32 `b c h w` of `(image / 255 - mean) / std`, and int64 `b`.

        Raises:
            ValueError: `batch_size` is below 1, or `drop_last` would leave no batch.
        """
        n = len(self)
        _require(batch_size >= 1, f"batch_size is {batch_size}, expected 1 or more")
        _require(
            batch_size <= n or not drop_last,
            f"{n} images make no batch of {batch_size}; pass batch_size={n} or drop_last=False",
        )
        order = torch.randperm(n, generator=generator) if shuffle else torch.arange(n)
        parts = order[: n - n % batch_size if drop_last else n].split(batch_size)
        return ((self._normalised(part), self.labels[part]) for part in parts)

    def sample(self, n: int, seed: int = 0) -> ImageDataset:
        """Returns `n` of the pictures, drawn by a seed; fewer are the first of more.

        Raises:
            ValueError: There are not as many.
        """
        _require(1 <= n <= len(self), f"{self.name} has {len(self)} images, {n} are asked for")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:n]
        return replace(self, images=self.images[order], labels=self.labels[order])

    def _normalised(self, index: Tensor) -> Tensor:
        mean, std = torch.tensor([self.mean, self.std], device=self.images.device)[..., None, None]
        return (self.images[index].float() / 255 - mean) / std


def load_data(
    name: str, split: str = "train", *, root: str | Path | None = None, download: bool = False
) -> ImageDataset:
    """Reads the data set called `name` into memory.

    `fashion-mnist-small` (8,000 + 2,000 pictures) comes with the package. `fashion-mnist`
    (60,000 + 10,000) is looked for in the folder named by the environment variable
    TOKENLEARNER_DATA, then in Debian's /usr/share/datasets, then in ~/.cache/tokenlearner;
    in each also in the folders `fashion-mnist` and `FashionMNIST/raw`.

    Args:
        name: One of `list_data()`.
        split: `"train"` or `"test"`.
        root: Look in this folder and nowhere else.
        download: Fetch a set that is not found, into `root` or ~/.cache/tokenlearner.

    Raises:
        ValueError: An unknown name or split, or a set that is not found, not fetched or damaged.

    Source: Fashion-MNIST, Xiao, Rasul and Vollgraf, arXiv:1708.07747, MIT License, (c) Zalando SE.

    >>> load_data("fashion-mnist-small", "test").images.shape
    torch.Size([2000, 1, 28, 28])
    """
    names, splits = ", ".join(_LOADERS), ", ".join(SPLITS)
    _require(name in _LOADERS, f"unknown data set {name!r}, expected one of: {names}")
    _require(split in SPLITS, f"{name} has no split {split!r}, expected one of: {splits}")
    return _LOADERS[name](split, None if root is None else Path(root).expanduser(), download)


def list_data() -> tuple[str, ...]:
    """Names the data sets that `load_data` knows."""
    return tuple(_LOADERS)


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


def _load_small(split: str, root: Path | None, download: bool) -> ImageDataset:
    bundled = Path(str(files("tokenlearner") / "assets" / "fashion_mnist_small"))
    return _read_fashion("fashion-mnist-small", split, [root or bundled], "pass no root")


def _load_full(split: str, root: Path | None, download: bool) -> ImageDataset:
    named, cache = os.environ.get("TOKENLEARNER_DATA"), _CACHE.expanduser()
    usual = [*([Path(named).expanduser()] if named else []), _DEBIAN, cache]
    places = [root] if root else usual
    if download and not _find_idx(split, places):
        _download_fashion(root or cache)
    return _read_fashion("fashion-mnist", split, places, _WAYS_OUT)


def _read_fashion(name: str, split: str, places: Sequence[Path], way_out: str) -> ImageDataset:
    paths = _find_idx(split, places)
    if not paths:
        raise ValueError(
            f"{name} was not found: expected {' and '.join(IDX_FILES[split])} (plain, .gz or .xz) "
            f"in {', '.join(map(str, places))}, or inside these in fashion-mnist or "
            f"FashionMNIST/raw; {way_out}"
        )
    images, labels = _read_idx(paths[0], dims=3)[:, None], _read_idx(paths[1], dims=1).long()
    return ImageDataset(name, split, images, labels, FASHION_CLASSES, FASHION_MEAN, FASHION_STD)


def _find_idx(split: str, places: Sequence[Path]) -> tuple[Path, Path] | None:
    """Names the pictures and the labels in the first folder that holds both."""
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
    _require(
        len(raw) >= start and raw[:4] == magic,
        f"{path} has {len(raw)} bytes and starts with {raw[:4]!r}, expected {magic!r} and {dims} "
        "sizes (an idx file of bytes); replace it",
    )
    sizes = struct.unpack_from(f">{dims}I", raw, 4)
    _require(
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
_LOADERS: dict[str, Callable[[str, Path | None, bool], ImageDataset]] = {
    "fashion-mnist-small": _load_small,
    "fashion-mnist": _load_full,
}
