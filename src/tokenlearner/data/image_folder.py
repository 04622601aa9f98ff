"""Labeled images that stay in their files and are read one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .config import DataConfig
from .dataset import MapDataset, UnreadableFile
from .file_lists import list_labeled_files
from .loader import eval_batches

if TYPE_CHECKING:
    from PIL import Image

MAX_OPENED = 10  # images that are opened when a set is loaded, until one can be read


def imagenet_mean_std(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns ImageNet's mean and std, one number a channel; for gray the means of these."""
    from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    return (mean, std) if channels == 3 else ((sum(mean) / 3,), (sum(std) / 3,))


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """What data sets of image files have in common.

    Args:
        name: What the data set is called.
        split: Which part of it this is.
        classes: The name of each label.
        config: Their size, channels and crop, and the processes that read for `batches`.
    """

    name: str
    split: str
    classes: tuple[str, ...]
    config: DataConfig = field(repr=False)

    @property
    def mean(self) -> tuple[float, ...]:
        """ImageNet's; for gray the mean of these."""
        return imagenet_mean_std(self.shape[0])[0]

    @property
    def std(self) -> tuple[float, ...]:
        """ImageNet's; for gray the mean of these."""
        return imagenet_mean_std(self.shape[0])[1]

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(c, h, w)` of an image."""
        return self.config.image_shape

    @property
    def workers(self) -> int:
        """Processes that read files."""
        return self.config.reading_workers

    def eval_transform(self, raw: Image.Image) -> Tensor:
        """Resizes and normalizes an image of `load`, and cuts its middle out: `c h w`.

        It is timm's transform for evaluation: the shorter side becomes the size divided by
        `crop_pct`, with bicubic interpolation.
        """
        return self._transform(raw)

    @cached_property
    def _transform(self) -> Any:
        from timm.data import create_transform

        return create_transform(
            self.shape,
            crop_pct=self.config.crop_pct,
            mean=self.mean,
            std=self.std,
            interpolation="bicubic",
        )


class ImageSource(Protocol):
    """Numbered images, wherever they are kept."""

    def open(self, number: int) -> Image.Image:
        """Opens one of them; it may not be decoded yet."""
        ...

    def where(self, number: int) -> str:
        """Returns its name for an error."""
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
class ImageFileDataset(ImageFiles, MapDataset):
    """One split of labeled images that are read one by one.

    Args:
        source: Opens them.
        numbers: Which of the source's images these are, int64 `n`.
        labels: int64 `n`, 0 to `len(classes) - 1`.
    """

    source: ImageSource = field(repr=False)
    numbers: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)

    def load(self, index: int) -> Image.Image:
        """Decodes one image in color, or in gray when `shape` has one channel; see `decoded`.

        Raises:
            UnreadableFile: It cannot be read.
        """
        number = int(self.numbers[index])
        where = self.source.where(number)
        return decoded(lambda: self.source.open(number), where, self.shape[0])

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields images and labels in order, without unreadable ones.

        Raises:
            ValueError: `batch_size` is below 1.
        """
        return eval_batches(self, batch_size, self.workers)

    def select(self, indices: Tensor) -> ImageFileDataset:
        """Returns a data set of these images."""
        return replace(self, numbers=self.numbers[indices], labels=self.labels[indices])


def decoded(opened: Callable[[], Image.Image], where: str, in_chans: int) -> Image.Image:
    """Decodes an image and returns it in RGB, or with `in_chans` 1 in gray.

    Transparent images are laid on white, 16-bit grays keep their upper 8 bits. As in timm and
    torchvision, a rotation that EXIF asks for is not made.

    Raises:
        UnreadableFile: PIL raises something; the message has `where` and the reason.
    """
    try:
        with opened() as image:
            return _in_mode(image, "L" if in_chans == 1 else "RGB")
    except Exception as error:  # what PIL raises on damaged bytes is anything from OSError on
        reason = f"{type(error).__name__}: {error}"
        raise UnreadableFile(f"{where} cannot be read as an image ({reason})") from error


def first_read(candidates: Iterator[Callable[[], object]], what: str) -> None:
    """Reads the first of a few images that can be read, so that a mistake shows at once.

    Raises:
        ValueError: None can.
    """
    unreadable = []
    for _, read in zip(range(MAX_OPENED), candidates, strict=False):
        try:
            read()
            return
        except UnreadableFile as error:
            unreadable.append(str(error))
    reason = unreadable[0] if unreadable else "it is empty"
    raise ValueError(f"{what}: none of the first {len(unreadable)} images can be read: {reason}")


def load_folder(name: str, split: str, config: DataConfig) -> ImageFileDataset:
    """Lists the images of a folder, `config.root`.

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

    if config.folder is None:
        raise ValueError(f"{name} needs the folder that holds the images; pass root")
    extensions = tuple(get_img_extensions())
    paths, labels, classes = list_labeled_files(config.folder, split, extensions)
    return file_dataset(name, split, config, ImagePaths(paths), torch.tensor(labels), classes)


def file_dataset(
    name: str,
    split: str,
    config: DataConfig,
    source: ImageSource,
    labels: Tensor,
    classes: tuple[str, ...],
) -> ImageFileDataset:
    """Returns a data set of all images of a source.

    Raises:
        ValueError: None of the first few images can be read.
    """
    numbers = torch.arange(len(labels))
    data = ImageFileDataset(
        name, split, classes, config, source=source, numbers=numbers, labels=labels
    )
    first_read((partial(data.load, index) for index in range(len(data))), f"{name} {split}")
    return data


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
