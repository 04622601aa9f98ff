"""A data set by name: `load_data("fashion-mnist-small")` gives images and labels.

A new data set is one loader and one row in `_LOADERS`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..utils.validation import require
from .dataset import DataConfig, LabeledDataset
from .fashion_mnist import load_fashion_mnist, load_fashion_mnist_small
from .hub_datasets import load_library_dataset
from .image_folder import load_folder
from .moving_photos import load_moving_photos
from .tensor_dataset import ImageDataset as ImageDataset
from .video_folder import load_video_folder

SPLITS = ("train", "test")
OLD_NAMES = {"film": "video-folder"}  # of version 0.3, which still work


def load_data(
    name: str, split: str = "train", *, root: str | Path | None = None, **wanted: Any
) -> Any:
    """Reads the data set called `name`, or gets ready to read it image by image.

    `fashion-mnist-small` (8,000 + 2,000 images) comes with the package. `fashion-mnist`
    (60,000 + 10,000) is looked for in the folder named by the environment variable
    TOKENLEARNER_DATA, then in Debian's /usr/share/datasets, then in ~/.cache/tokenlearner;
    in each also in the folders `fashion-mnist` and `FashionMNIST/raw`. `moving-photographs`
    (9,000 + 1,800 clips) is made of what scikit-image ships. These are `ImageDataset`.

    `folder` and `video-folder` are your own images and videos, in `root`, by folders of classes or
    lists.
    `torch/NAME` is a set of torchvision's, `hfds/NAME` of Hugging Face datasets; `hfids/NAME` and
    `wds/` (WebDataset's tar files in `root`) are streams, which have no order. All of these are
    read image by image.

    Args:
        name: One of `list_data()`; one that ends in `/` goes on with a name of that library's.
        split: `"train"` or `"test"`.
        root: Look in this folder and nowhere else.
        **wanted: `download=True` to fetch a set that is not found, `img_size=224`, and whatever
            else `tokenlearner.data.dataset.DataConfig` says.

    Returns:
        A `tokenlearner.data.dataset.LabeledDataset`.

    Raises:
        ValueError: An unknown name or split, or a set that is not found, not fetched or damaged.

    Source: Fashion-MNIST, Xiao, Rasul and Vollgraf, arXiv:1708.07747, MIT License, (c) Zalando SE.

    >>> load_data("fashion-mnist-small", "test").images.shape
    torch.Size([2000, 1, 28, 28])
    """
    names, splits = ", ".join(_LOADERS), ", ".join(SPLITS)
    name = OLD_NAMES.get(name, name)
    key = name if name in _LOADERS else name.partition("/")[0] + "/"
    require(key in _LOADERS, f"unknown data set {name!r}, expected one of: {names}")
    require(split in SPLITS, f"{name} has no split {split!r}, expected one of: {splits}")
    place = None if root is None else Path(root).expanduser()
    return _LOADERS[key](name, split, DataConfig(root=place, **wanted))


def list_data() -> tuple[str, ...]:
    """Names the data sets that `load_data` knows."""
    return tuple(_LOADERS)


_LOADERS: dict[str, Callable[[str, str, DataConfig], LabeledDataset]] = {
    "fashion-mnist-small": load_fashion_mnist_small,
    "fashion-mnist": load_fashion_mnist,
    "folder": load_folder,
    "torch/": load_library_dataset,
    "hfds/": load_library_dataset,
    "hfids/": load_library_dataset,
    "wds/": load_library_dataset,
    "video-folder": load_video_folder,
    "moving-photographs": load_moving_photos,
}
