"""Labeled images of other libraries: torchvision, Hugging Face datasets, tar files of WebDataset.

`torch/NAME` is read through timm. `hfds/NAME` and `hfids/NAME` are read by `datasets` itself, since
timm's readers do not find the columns of the images and the labels by themselves.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from ..utils.files import open_image, read_json
from ..utils.imports import require_package
from ..utils.validation import require, shortened
from .config import DataConfig
from .dataset import UnreadableFile
from .file_lists import FOLDERS, check_inside
from .image_folder import ImageFileDataset, file_dataset
from .iterable import SHUFFLE_BUFFER, Record, StreamDataset, check_stream
from .tar_files import read_tar

if TYPE_CHECKING:
    from PIL import Image

TORCH_SETS = ("cifar10", "cifar100", "mnist", "kmnist", "qmnist", "fashion_mnist",
              "imagenet", "inaturalist", "places365")  # fmt: skip
HUB_SPLITS = {  # of each split, the first that a set has
    "train": ("train",),
    "val": ("validation", "val", "valid", "test"),
    "test": ("test", "validation", "val", "valid"),
}


def load_library_dataset(
    name: str, split: str, config: DataConfig
) -> ImageFileDataset | StreamDataset:
    """Lists the images of another library, or opens a stream of them.

    `torch/cifar10` is a set of torchvision in the folder `config.root`. `hfds/NAME` is one of the
    Hugging Face Hub, fetched unless HF_HUB_OFFLINE=1, or a local folder (`hfds//data/birds`);
    `config.root` is where `datasets` keeps it. `hfids/NAME` is the same in a stream, and `wds/`
    are WebDataset's tar files, see `load_shards`. Of a torchvision set the held-out part is that
    which timm takes; of others the split "val" is `validation` before `test`, "test" the reverse.

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
class LibraryImages:
    """Numbered images of another library.

    Args:
        name: What errors call it.
        read: Opens the image of a number.
    """

    name: str
    read: Callable[[int], Image.Image]

    def open(self, number: int) -> Image.Image:
        """Opens one of them."""
        return self.read(number)

    def where(self, number: int) -> str:
        """Names an image by its number."""
        return f"image {number} of {self.name}"


@dataclass(frozen=True)
class HubRecords:
    """A stream of Hugging Face datasets, which shares it out among processes and workers."""

    name: str
    dataset: Any
    image: str
    label: str

    def readers(self, process: int, num_processes: int) -> int:
        """Returns how many shards this process has, at least 1."""
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
        dataset: Any = create_dataset(name, place, part, download=config.download)
    except Exception as error:  # torchvision raises RuntimeError, OSError, and what it runs into
        raise ValueError(
            f"torchvision cannot read {inner} in {place} ({error}); pass download=True or "
            "another root"
        ) from error
    labels, source = (
        _torch_labels(dataset),
        LibraryImages(f"{name} {split}", partial(_torch_image, dataset)),
    )
    classes = _classes(labels, getattr(dataset, "classes", None), config)
    return file_dataset(name, split, config, source, labels, classes)


def _torch_image(dataset: Any, number: int) -> Image.Image:
    return dataset[number][0]


def _hub_image(dataset: Any, column: str, number: int) -> Image.Image:
    return _opened(dataset[number][column])


def _torch_labels(dataset: Any) -> Tensor:
    """Returns the labels of a set of torchvision, without its images where that is possible."""
    if hasattr(dataset, "targets"):  # QMNIST has rows, with the label first
        return torch.as_tensor(dataset.targets).long().reshape(len(dataset), -1)[:, 0]
    if hasattr(dataset, "index"):  # iNaturalist's pairs of label and file
        return torch.tensor([label for label, _ in dataset.index])
    return torch.tensor([int(dataset[i][1]) for i in range(len(dataset))])


def _load_hub(name: str, split: str, config: DataConfig) -> ImageFileDataset:
    dataset, image, label, splits = _from_hub(name, split, config, streaming=False)
    values, names = list(dataset[label]), _names(dataset, label)
    if values and isinstance(values[0], str):  # numbered alike in all splits
        names = sorted({v for part in splits.values() for v in part.unique(label) if v is not None})
        number = {value: i for i, value in enumerate(names)}
        values = [number[value] for value in values]
    require(None not in values, f"{name} {split} has images without a label; take another set")
    labels = torch.tensor(values, dtype=torch.int64)
    source = LibraryImages(f"{name} {split}", partial(_hub_image, dataset, image))
    return file_dataset(name, split, config, source, labels, _classes(labels, names, config))


def _load_hub_stream(name: str, split: str, config: DataConfig) -> StreamDataset:
    dataset, image, label, _ = _from_hub(name, split, config, streaming=True)
    info = (dataset.info.splits or {}).get(str(dataset.split))
    num_samples = info.num_examples if info else None
    names = _names(dataset, label)
    require(
        bool(names or config.num_classes),
        f"{name} has an unknown number of classes; pass num_classes",
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


def _from_hub(
    name: str, split: str, config: DataConfig, streaming: bool
) -> tuple[Any, str, str, Any]:
    """Loads a split, its images not decoded.

    Returns:
        The split, the columns of images and of labels, and all splits by name.
    """
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
    names = HUB_SPLITS[split]
    part = next((splits[known] for known in names if known in splits), None)
    require(
        part is not None,
        f"{name} has no split {split!r}, expected {' or '.join(names)} among its "
        f"{shortened([*splits])}",
    )
    image, label = _columns(name, part)
    decoded_later = part.cast_column(image, datasets.Image(decode=False))  # type: ignore[union-attr]
    return decoded_later, image, label, splits


def _columns(name: str, dataset: Any) -> tuple[str, str]:
    """Returns the columns of the images and of the labels: by kind, and by the usual name."""
    from datasets import ClassLabel, Image

    features = dataset.features or {}
    images = [key for key, kind in features.items() if isinstance(kind, Image)]
    labels = [key for key, kind in features.items() if isinstance(kind, ClassLabel)]
    labels = labels or [key for key in ("label", "labels", "cls") if key in features]
    require(
        bool(images and labels),
        f"{name} has the columns {shortened([*features]) or 'none'}, expected one of "
        "images and one of labels; take a set for classification",
    )
    image = "image" if "image" in images else images[0]
    return image, "label" if "label" in labels else labels[0]


def _names(dataset: Any, column: str) -> list[str] | None:
    return getattr(dataset.features[column], "names", None)


def _classes(labels: Tensor, names: Sequence[Any] | None, config: DataConfig) -> tuple[str, ...]:
    """Returns the names of all labels; numbers where there are none."""
    require(
        int(labels.min()) >= 0, f"a label is {int(labels.min())}, expected 0 or more; such a "
        "split is for submissions, take another set",
    )  # fmt: skip
    least = max(int(labels.max()) + 1, config.num_classes or 0)
    known = [", ".join(n) if isinstance(n, tuple) else str(n) for n in names or []]
    return tuple(known + [str(number) for number in range(len(known), least)])


def _opened(cell: Any) -> Image.Image:
    """Opens what a column of images holds: bytes, or where they are."""
    if cell["bytes"]:
        return open_image(BytesIO(cell["bytes"]))
    if "://" not in cell["path"]:
        return open_image(cell["path"])
    import fsspec

    with fsspec.open(cell["path"], "rb") as file:
        return open_image(BytesIO(file.read()))  # type: ignore[union-attr]


def load_shards(name: str, split: str, config: DataConfig) -> StreamDataset:
    """Opens a stream of the images of WebDataset's tar files in `config.root`.

    They are those that `_info.json` names for the split, in timm's format, or else are called
    train-*.tar and val-*.tar (or valid, validation, test). An image is a file that ends as timm
    knows it, its label the number in the .cls file of the same name, or the number that the .json
    file has under the name that is `alt_label` in _info.json. `config.num_classes` is needed, and
    `config.num_samples` where there is no _info.json.

    Raises:
        ValueError: The files or the number of classes are missing, or none of the first few images
            can be read.
    """
    root = config.folder
    if root is None:
        raise ValueError(f"{name} needs the folder that holds the tar files; pass root")
    info = _find_shards(root, split)
    if not config.follow_links:
        for path in info.paths:
            check_inside(path, root)
    require(
        config.num_classes is not None,
        f"{name} has an unknown number of classes; pass num_classes",
    )
    return check_stream(
        StreamDataset(
            name,
            split,
            tuple(map(str, range(config.num_classes or 0))),
            config,
            source=TarShards(info.paths, info.label_key),
            num_samples=info.num_samples or config.num_samples,
        )
    )


@dataclass(frozen=True)
class TarShards:
    """The images of tar files, which are shared out whole.

    Args:
        paths: The tar files.
        label_key: What .json files call the label; empty takes .cls files.
    """

    paths: tuple[str, ...]
    label_key: str = ""

    def readers(self, process: int, num_processes: int) -> int:
        """Returns how many tar files this process has."""
        return len(self.paths[process::num_processes])

    def records(
        self, process: int, num_processes: int, seed: int | None
    ) -> Iterator[Record | UnreadableFile]:
        """Reads one tar file after the other."""
        paths = list(self.paths)
        if seed is not None:
            _rng(seed).shuffle(paths)
        paths, worker = paths[process::num_processes], get_worker_info()
        if worker:
            paths = paths[worker.id :: worker.num_workers]
        records = chain.from_iterable(map(self._read_shard, paths))
        return records if seed is None else _shuffled(records, _rng(seed))

    def _read_shard(self, path: str) -> Iterator[Record | UnreadableFile]:
        """Yields the images up to the end, or to where the tar file is damaged, and why."""
        for key, group in read_tar(path):
            where = f"{path}: {key}"
            yield group if isinstance(group, UnreadableFile) else self._record(where, group)

    def _record(self, where: str, sample: Mapping[str, Any]) -> Record | UnreadableFile:
        from timm.data import is_img_extension

        images = [sample[end] for end in sample if is_img_extension(f".{end}")]
        if not images:
            return UnreadableFile(f"{where} has no image, expected a file such as .jpg")
        try:
            key = self.label_key
            label = int(json.loads(sample["json"])[key] if key else sample["cls"])
        except (KeyError, ValueError, TypeError, OverflowError, RecursionError) as error:
            expected = f"a .json file with {key!r}" if key else "a .cls file with a number"
            return UnreadableFile(f"{where} has no label ({error!r}), expected {expected}")
        return Record(where, partial(_opened, {"bytes": images[0]}), label)


def _rng(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311, an order of images and no secret


def _shuffled(records: Iterable[Any], rng: random.Random) -> Iterator[Any]:
    """Yields all records, each drawn from the next `SHUFFLE_BUFFER`, as WebDataset does."""
    buffer, records = list[Any](), iter(records)
    for record in records:
        buffer.append(record)
        if len(buffer) < SHUFFLE_BUFFER:
            buffer.extend(islice(records, 1))
        if len(buffer) >= SHUFFLE_BUFFER:
            yield _pick(buffer, rng)
    while buffer:
        yield _pick(buffer, rng)


def _pick(buffer: list[Any], rng: random.Random) -> Any:
    index = rng.randint(0, len(buffer) - 1)
    buffer[index], buffer[-1] = buffer[-1], buffer[index]
    return buffer.pop()


class _Info(NamedTuple):
    """The tar files of a split."""

    paths: tuple[str, ...]
    num_samples: int | None = None
    label_key: str = ""


def _find_shards(root: Path, split: str) -> _Info:
    require(root.is_dir(), f"{root} is not a folder; pass the one that holds the tar files as root")
    info = _read_info(root, split)
    if info:
        gone = [path for path in info.paths if not Path(path).is_file()]
        require(not gone, f"{root} lacks what its _info.json names: {shortened(gone)}")
        return info
    patterns = [f"{name}-*.tar" for name in FOLDERS[split]]
    matches = (tuple(map(str, sorted(root.glob(pattern)))) for pattern in patterns)
    paths = next(filter(None, matches), ())
    require(
        bool(paths),
        f"{root} has nothing for split {split!r}, expected {', '.join(patterns)} or an _info.json "
        "that names the tar files, as timm reads it",
    )
    return _Info(paths)


def _read_info(root: Path, split: str) -> _Info | None:
    path = root / "_info.json"
    if not path.is_file():
        return None
    try:
        splits = read_json(path)["splits"]
        info = next((splits[name] for name in FOLDERS[split] if name in splits), None)
        if info is None:
            return None
        paths = tuple(str(root / name) for name in info["filenames"])
        return _Info(paths, int(info["num_samples"]), info.get("alt_label", ""))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        message = f"{path} is not as timm writes it ({error!r}); correct it or take it away"
        raise ValueError(message) from error


_KINDS: dict[str, Callable[[str, str, DataConfig], ImageFileDataset | StreamDataset]] = {
    "torch": _load_torch,
    "hfds": _load_hub,
    "hfids": _load_hub_stream,
    "wds": load_shards,
}
