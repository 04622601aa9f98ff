"""Labeled images of other libraries: torchvision, Hugging Face datasets and WebDataset.

`torch/NAME` is read through timm. `hfds/NAME` and `hfids/NAME` are read by `datasets` itself, since
timm's readers have to be told which columns hold the images and the labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..utils.imports import require_package
from ..utils.validation import require, shortened
from .config import DataConfig
from .dataset import UnreadableFile
from .image_folder import ImageFileDataset, file_dataset
from .iterable import SHUFFLE_BUFFER, Record, StreamDataset, check_stream
from .webdataset import load_shards

if TYPE_CHECKING:
    from PIL import Image

TORCH_SETS = ("cifar10", "cifar100", "mnist", "kmnist", "qmnist", "fashion_mnist",
              "imagenet", "inaturalist", "places365")  # fmt: skip
HELD_OUT = ("validation", "val", "valid", "test")  # the first that a set has is the split "test"


def load_library_dataset(
    name: str, split: str, config: DataConfig
) -> ImageFileDataset | StreamDataset:
    """Gets ready to read the images of another library.

    `torch/cifar10` is a set of torchvision in the folder `config.root`. `hfds/NAME` is one of the
    Hugging Face Hub, fetched unless HF_HUB_OFFLINE=1, or a local folder (`hfds//data/birds`);
    `config.root` is where `datasets` keeps it. `hfids/NAME` is the same in a stream, and `wds/`
    are WebDataset's tar files, see `load_shards`. The split "test" is the held-out part that
    timm takes of a torchvision set; of others it is `validation` before `test`.

    Raises:
        ValueError: A library, the set or the split is missing, or the library refuses it.
    """
    kind, _, inner = name.partition("/")
    require(kind in _KINDS, f"unknown data set {name!r}, expected {', '.join(_KINDS)} and a name")
    require(
        bool(inner) or kind == "wds",
        f"{name!r} names no data set; write one behind the stroke, such as torch/cifar10",
    )
    return _KINDS[kind](name, split, config)


@dataclass(frozen=True)
class TorchvisionImages:
    """A set of torchvision."""

    name: str
    dataset: Any

    def open(self, number: int) -> Image.Image:
        """Decodes one of its images."""
        return self.dataset[number][0]

    def where(self, number: int) -> str:
        """Names the image by its number."""
        return f"image {number} of {self.name}"


@dataclass(frozen=True)
class HubImages:
    """A set of Hugging Face datasets, on disk."""

    name: str
    dataset: Any
    column: str

    def open(self, number: int) -> Image.Image:
        """Opens one of its images."""
        return _opened(self.dataset[number][self.column])

    def where(self, number: int) -> str:
        """Names the image by its number."""
        return f"image {number} of {self.name}"


@dataclass(frozen=True)
class HubRecords:
    """A stream of Hugging Face datasets, which shares it out among processes and workers."""

    name: str
    dataset: Any
    image: str
    label: str

    def readers(self, process: int, num_processes: int) -> int:
        """As many as this process has shards, at least 1."""
        return max(1, self._part(process, num_processes, 0).num_shards)

    def records(
        self, process: int, num_processes: int, seed: int | None
    ) -> Iterator[Record | UnreadableFile]:
        """Reads one row after the other."""
        for number, row in enumerate(self._part(process, num_processes, seed)):
            where, label = f"image {number} of {self.name}", row[self.label]
            if isinstance(label, int):
                yield Record(where, partial(_opened, row[self.image]), label)
            else:
                yield UnreadableFile(f"{where} has label {label!r}, expected a number")

    def _part(self, process: int, num_processes: int, seed: int | None) -> Any:
        from datasets.distributed import split_dataset_by_node

        whole = self.dataset
        if seed is not None:
            # Several shards at a time would be read by threads, whose end is 5 s of sleep.
            whole = whole.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER, max_buffer_input_shards=1)
        return split_dataset_by_node(whole, rank=process, world_size=num_processes)


def _load_torch(name: str, split: str, config: DataConfig) -> ImageFileDataset:
    from timm.data import create_dataset

    inner = name.partition("/")[2].lower()
    known = ", ".join(TORCH_SETS)
    require(
        inner in TORCH_SETS, f"timm reads no torchvision set {inner!r}, expected one of {known}"
    )
    require(config.root is not None, f"{name} needs torchvision's folder of data; pass root")
    place, part = str(config.folder), "train" if split == "train" else "validation"
    try:
        found: Any = create_dataset(name, place, part, download=config.download)
    except Exception as error:  # torchvision raises RuntimeError, OSError, and what it runs into
        raise ValueError(
            f"torchvision cannot read {inner} in {place} ({error}); pass download=True or "
            "another root"
        ) from error
    labels, source = _torch_labels(found), TorchvisionImages(f"{name} {split}", found)
    classes = _classes(labels, getattr(found, "classes", None), config)
    return file_dataset(name, split, config, source, labels, classes)


def _torch_labels(dataset: Any) -> Tensor:
    """The labels of a set of torchvision, without its images where that is possible."""
    if hasattr(dataset, "targets"):  # QMNIST has rows, with the label first
        return torch.as_tensor(dataset.targets).long().reshape(len(dataset), -1)[:, 0]
    if hasattr(dataset, "index"):  # iNaturalist's pairs of label and file
        return torch.tensor([label for label, _ in dataset.index])
    return torch.tensor([int(dataset[i][1]) for i in range(len(dataset))])


def _load_hub(name: str, split: str, config: DataConfig) -> ImageFileDataset:
    dataset, image, label = _from_hub(name, split, config, streaming=False)
    values, names = list(dataset[label]), _names(dataset, label)
    if values and isinstance(values[0], str):
        names = sorted(set(values))
        number = {value: i for i, value in enumerate(names)}
        values = [number[value] for value in values]
    require(None not in values, f"{name} {split} has images without a label; take another set")
    labels = torch.tensor(values, dtype=torch.int64)
    source = HubImages(f"{name} {split}", dataset, image)
    return file_dataset(name, split, config, source, labels, _classes(labels, names, config))


def _load_hub_stream(name: str, split: str, config: DataConfig) -> StreamDataset:
    dataset, image, label = _from_hub(name, split, config, streaming=True)
    told = (dataset.info.splits or {}).get(str(dataset.split))
    num_samples = told.num_examples if told else None
    names = _names(dataset, label)
    require(
        bool(names or config.num_classes),
        f"{name} does not tell how many classes it has; pass num_classes",
    )
    classes = tuple(names or map(str, range(config.num_classes or 0)))
    return check_stream(
        StreamDataset(
            name,
            split,
            classes,
            config,
            source=HubRecords(f"{name} {split}", dataset, image, label),
            num_samples=num_samples or config.num_samples,
        )
    )


def _from_hub(name: str, split: str, config: DataConfig, streaming: bool) -> tuple[Any, str, str]:
    """A split, its images not decoded, with the columns of images and labels."""
    datasets = require_package("datasets", "data", name)
    place = None if config.folder is None else str(config.folder)
    try:
        splits: Any = datasets.load_dataset(
            name.partition("/")[2], cache_dir=place, streaming=streaming
        )
    except Exception as error:  # DatasetNotFoundError, ConnectionError, ValueError and others
        raise ValueError(
            f"datasets cannot load {name} ({error}); pass the name of a set on the Hub, or of a "
            "local folder after the stroke"
        ) from error
    names = ("train",) if split == "train" else HELD_OUT
    part = next((splits[known] for known in names if known in splits), None)
    require(
        part is not None,
        f"{name} has no split {split!r}, expected {' or '.join(names)} among its "
        f"{shortened([*splits])}",
    )
    image, label = _columns(name, part)
    return part.cast_column(image, datasets.Image(decode=False)), image, label  # type: ignore[union-attr]


def _columns(name: str, dataset: Any) -> tuple[str, str]:
    """The columns of the images and of the labels: by kind, and by the usual name."""
    from datasets import ClassLabel, Image

    features = dataset.features or {}
    images = [key for key, kind in features.items() if isinstance(kind, Image)]
    labels = [key for key, kind in features.items() if isinstance(kind, ClassLabel)]
    labels = labels or [key for key in ("label", "labels", "cls") if key in features]
    require(
        bool(images and labels),
        f"{name} has the columns {shortened([*features]) or 'none that it tells'}, expected one of "
        "images and one of labels; take a set for classification",
    )
    image = "image" if "image" in images else images[0]
    return image, "label" if "label" in labels else labels[0]


def _names(dataset: Any, column: str) -> list[str] | None:
    return getattr(dataset.features[column], "names", None)


def _classes(labels: Tensor, names: Sequence[Any] | None, config: DataConfig) -> tuple[str, ...]:
    """The names of all labels; numbers where there are none."""
    require(
        int(labels.min()) >= 0, f"a label is {int(labels.min())}, expected 0 or more; such a "
        "split is for submissions, take another set",
    )  # fmt: skip
    least = max(int(labels.max()) + 1, config.num_classes or 0)
    known = [", ".join(n) if isinstance(n, tuple) else str(n) for n in names or []]
    return tuple(known + [str(number) for number in range(len(known), least)])


def _opened(cell: Any) -> Image.Image:
    """Opens what a column of images holds: bytes, or where they are."""
    from PIL import Image

    if cell["bytes"]:
        return Image.open(BytesIO(cell["bytes"]))
    if "://" not in cell["path"]:
        return Image.open(cell["path"])
    import fsspec

    with fsspec.open(cell["path"], "rb") as file:
        return Image.open(BytesIO(file.read()))  # type: ignore[union-attr]


_KINDS: dict[str, Callable[[str, str, DataConfig], ImageFileDataset | StreamDataset]] = {
    "torch": _load_torch,
    "hfds": _load_hub,
    "hfids": _load_hub_stream,
    "wds": load_shards,
}
