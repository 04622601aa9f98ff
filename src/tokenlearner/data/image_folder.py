"""Labeled images that stay in their files and are read one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..utils.validation import require
from .dataset import DataConfig, UnreadableFile
from .file_lists import list_labeled_files
from .loader import eval_batches

if TYPE_CHECKING:
    from PIL import Image

MAX_OPENED = 10  # images that are opened when a set is loaded, until one can be read


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """How images of files come out, wherever the files are.

    Args:
        name: What the data set is called.
        split: Which part of it this is.
        classes: The name of each label.
        shape: `(c, h, w)` of an image that a model takes; 3 channels, or 1 for gray.
        crop_pct: Share of the resized image's side that is kept.
        workers: Processes that read for `batches`.
    """

    name: str
    split: str
    classes: tuple[str, ...]
    shape: tuple[int, int, int] = (3, 224, 224)
    crop_pct: float = 0.875
    workers: int = 0

    @property
    def mean(self) -> tuple[float, ...]:
        """ImageNet's, one number a channel; for gray the mean of these."""
        from timm.data.constants import IMAGENET_DEFAULT_MEAN

        return _for_channels(IMAGENET_DEFAULT_MEAN, self.shape[0])

    @property
    def std(self) -> tuple[float, ...]:
        """ImageNet's, one number above 0 a channel; for gray the mean of these."""
        from timm.data.constants import IMAGENET_DEFAULT_STD

        return _for_channels(IMAGENET_DEFAULT_STD, self.shape[0])

    def plain(self, raw: Image.Image) -> Tensor:
        """An image as `read` gives it, resized, its middle cut out, normalized: `c h w`.

        It is timm's transform for evaluation: the shorter side becomes the size divided by
        `crop_pct`, with bicubic interpolation.
        """
        return self._transform(raw)

    @cached_property
    def _transform(self) -> Any:
        from timm.data import create_transform

        return create_transform(
            self.shape,
            crop_pct=self.crop_pct,
            mean=self.mean,
            std=self.std,
            interpolation="bicubic",
        )


class ImageSource(Protocol):
    """Numbered images, wherever they are kept."""

    def open(self, number: int) -> Image.Image:
        """One of them, perhaps not decoded yet."""
        ...

    def where(self, number: int) -> str:
        """What an error calls it."""
        ...


@dataclass(frozen=True)
class ImagePaths:
    """Images that are files of their own."""

    paths: Sequence[str]

    def open(self, number: int) -> Image.Image:
        """Opens the file."""
        from PIL import Image

        return Image.open(self.paths[number])

    def where(self, number: int) -> str:
        """Names the file."""
        return self.paths[number]


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageFileDataset(ImageFiles):
    """One split of labeled images that are read one by one; `labeled.LabeledData`.

    Args:
        source: Opens them.
        numbers: Which of the source's images these are, int64 `n`.
        labels: int64 `n`, 0 to `len(classes) - 1`.
    """

    source: ImageSource = field(repr=False)
    numbers: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> Image.Image:
        """One image in color, or in gray when `shape` has one channel; see `decoded`.

        Raises:
            BrokenFile: It cannot be read.
        """
        number = int(self.numbers[index])
        where = self.source.where(number)
        return decoded(lambda: self.source.open(number), where, self.shape[0])

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields plain batches and their labels, in order, without what cannot be read.

        Raises:
            ValueError: `batch_size` is below 1.
        """
        require(batch_size >= 1, f"batch_size is {batch_size}, expected 1 or more")
        return eval_batches(self, batch_size, self.workers)

    def sample(self, n: int, seed: int = 0) -> ImageFileDataset:
        """Returns `n` of the images, drawn by a seed; fewer are the first of more.

        Raises:
            ValueError: There are not as many.
        """
        require(1 <= n <= len(self), f"{self.name} has {len(self)} images, {n} are asked for")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:n]
        return replace(self, numbers=self.numbers[order], labels=self.labels[order])


def decoded(opened: Callable[[], Image.Image], where: str, in_chans: int) -> Image.Image:
    """Decodes an image and returns it in RGB, or with `in_chans` 1 in gray.

    Transparent images are laid on white, 16-bit grays keep their upper 8 bits. As in timm and
    torchvision, a rotation that EXIF asks for is not made.

    Raises:
        BrokenFile: PIL raises something; the message has `where` and the reason.
    """
    try:
        with opened() as image:
            return _in_mode(image, "L" if in_chans == 1 else "RGB")
    except Exception as error:  # what PIL raises on damaged bytes is anything from OSError on
        reason = f"{type(error).__name__}: {error}"
        raise UnreadableFile(f"{where} cannot be read as an image ({reason})") from error


def first_read(candidates: Iterator[Callable[[], object]], what: str) -> None:
    """Tries to read a few images, so that a set of none that can be read is refused at once."""
    broken = []
    for _, read in zip(range(MAX_OPENED), candidates, strict=False):
        try:
            read()
            return
        except UnreadableFile as error:
            broken.append(str(error))
    reason = broken[0] if broken else "it is empty"
    raise ValueError(f"{what}: none of the first {len(broken)} images can be read: {reason}")


def load_folder(name: str, split: str, wanted: DataConfig) -> ImageFileDataset:
    """Gets ready to read the images of a folder, `wanted.root`.

    It holds `train` and one of `val`, `valid`, `validation` and `test`; the split "test" is the
    first of these that is there, so `val` goes before `test`, as in timm. Each is a folder with a
    folder a class, or a list such as train.csv, whose first line is `path,label` and whose paths
    start at the root; a list goes before a folder. Classes are sorted as text, as in torchvision:
    where they are numbers, write leading zeros.

    Raises:
        ValueError: Something is missing, classes differ between splits, or none of the first few
            images can be read.
    """
    from timm.data import get_img_extensions

    require(wanted.root is not None, f"{name} needs the folder that holds the images; pass root")
    paths, labels, classes = list_labeled_files(
        Path(str(wanted.root)), split, tuple(get_img_extensions())
    )
    source = ImagePaths(paths)
    return file_dataset(name, split, wanted, source, torch.tensor(labels), classes)


def file_dataset(
    name: str,
    split: str,
    wanted: DataConfig,
    source: ImageSource,
    labels: Tensor,
    classes: tuple[str, ...],
) -> ImageFileDataset:
    """All images of a source, as they are wanted.

    Raises:
        ValueError: None of the first few images can be read.
    """
    numbers = torch.arange(len(labels))
    data = ImageFileDataset(
        name, split, classes, **dataset_args(wanted), source=source, numbers=numbers, labels=labels
    )
    first_read((partial(data.read, index) for index in range(len(data))), f"{name} {split}")
    return data


def dataset_args(wanted: DataConfig) -> dict[str, Any]:
    """The arguments of `FileImages` that can be asked for."""
    size = wanted.img_size or 224
    shape = (wanted.in_chans or 3, size, size)
    return {"shape": shape, "crop_pct": wanted.crop_pct, "workers": wanted.workers}


def _for_channels(colors: Sequence[float], c: int) -> tuple[float, ...]:
    return tuple(colors) if c == 3 else (sum(colors) / len(colors),)


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    from PIL import Image

    if image.mode.startswith("I"):  # gray of 16 bits, which PIL would clip at 255
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray((values >> 8).astype(np.uint8))
    elif image.has_transparency_data:
        drawn = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), drawn)
    color = image.convert("RGB")
    return color if mode == "RGB" else color.convert(mode)
