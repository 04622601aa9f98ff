"""A data set by name: `load_data("fashion-mnist-small")` gives images and labels.

A new data set is one loader and one row in `_LOADERS`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..utils.validation import require
from .config import DataConfig
from .dataset import LabeledDataset
from .fashion_mnist import load_fashion_mnist, load_fashion_mnist_small
from .hub_datasets import load_library_dataset
from .image_folder import load_folder
from .moving_photos import load_moving_photos
from .tensor_dataset import ImageDataset as ImageDataset
from .token_dataset import load_tokens
from .video_folder import load_video_folder

SPLITS = ("train", "val", "test")
_TWO = {"val": "test"}  # of sets with two parts
_WITH_VAL = (
    "folder",
    "video-folder",
    "tokens",
    "hfds/",
    "hfids/",
    "wds/",
)  # may have both val and test


def load_data(
    name: str | DataConfig,
    split: str = "train",
    *,
    root: str | Path | None = None,
    workers: int | None = 0,
    **options: Any,
) -> Any:
    """Reads the data set called `name`, or gets ready to read it image by image.

    `fashion-mnist-small` (8,000 + 2,000 images) comes with the package. `fashion-mnist`
    (60,000 + 10,000) is looked for in the folder named by the environment variable
    TOKENLEARNER_DATA, then in Debian's /usr/share/datasets, then in ~/.cache/tokenlearner;
    in each also in the folders `fashion-mnist` and `FashionMNIST/raw`. `moving-photographs`
    (9,000 + 1,800 clips) is made of what scikit-image ships. These are `ImageDataset`.

    `folder` and `video-folder` are your own images and videos, in `root`, by folders of classes or
    lists; `tokens` are those that `tokenlearner encode` wrote of videos, in `root`.
    `torch/NAME` is a set of torchvision's, `hfds/NAME` of Hugging Face datasets; `hfids/NAME` and
    `wds/` (WebDataset's tar files in `root`) are streams, which have no order. All of these are
    read image by image.

    Args:
        name: One of `list_data()`; one that ends in `/` goes on with a name of that library's.
            Or a `DataConfig`, which has all options but the split.
        split: `"train"`, `"val"`, on which training evaluates, or `"test"`; the two are the same
            where a set has one of them.
        root: Look in this folder and nowhere else.
        workers: Processes that read files for `batches`; None is one a processor.
        **options: `download=True` to fetch a set that is missing, `img_size=224`, and the other
            options of `tokenlearner.data.config.DataConfig`.

    Returns:
        A `tokenlearner.data.dataset.MapDataset`, or of a stream an `IterableDataset`.

    Raises:
        ValueError: An unknown name or split, or a set that is missing, not fetched or damaged.

    Source: Fashion-MNIST, Xiao, Rasul and Vollgraf, arXiv:1708.07747, MIT License, (c) Zalando SE.

    >>> load_data("fashion-mnist-small", "test").images.shape
    torch.Size([2000, 1, 28, 28])
    """
    config = name
    if not isinstance(config, DataConfig):
        folder = None if root is None else str(root)
        config = DataConfig(config, folder, workers=workers, **options)
    name, names, splits = config.data, ", ".join(_LOADERS), ", ".join(SPLITS)
    key = name if name in _LOADERS else name.partition("/")[0] + "/"
    require(key in _LOADERS, f"unknown data set {name!r}, expected one of: {names}")
    require(split in SPLITS, f"{name} has no split {split!r}, expected one of: {splits}")
    return _LOADERS[key](name, split if key in _WITH_VAL else _TWO.get(split, split), config)


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
    "tokens": load_tokens,
    "moving-photographs": load_moving_photos,
}
