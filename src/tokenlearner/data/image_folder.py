"""Labeled images that stay in their files and are read one by one.

The files of a folder are listed and never opened, so a million of them take seconds.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..utils.files import image_formats, open_image
from ..utils.limits import VARIABLE, max_unpacked_bytes
from ..utils.preprocessing import Preprocessing
from ..utils.validation import require
from .config import DataConfig
from .dataset import MapDataset, UnreadableFile
from .file_lists import list_labeled_files
from .loader import eval_batches

if TYPE_CHECKING:
    from PIL import Image

_LOGGER = logging.getLogger(__name__)
MAX_ASPECT = 100  # longer strips would be resized to gigabytes
MAX_OPENED = 10  # images that are opened when a set is loaded, until one can be read
_BITS_PER_SAMPLE = 258  # a tag of TIFF
_FEW_VALUES = 2**12  # of 16 bits: what cameras and scanners of 12 bits leave


def imagenet_mean_std(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns ImageNet's mean and std, one number a channel; for gray the means of these."""
    from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    return (mean, std) if channels == 3 else ((sum(mean) / 3,), (sum(std) / 3,))


class FromFiles:
    """Numbers that data sets in files take from their config."""

    config: DataConfig

    @property
    def mean(self) -> tuple[float, ...]:
        """The config's, or ImageNet's; for gray the mean of these."""
        return tuple(self.config.mean or imagenet_mean_std(self.shape[0])[0])

    @property
    def std(self) -> tuple[float, ...]:
        """The config's, or ImageNet's; for gray the mean of these."""
        return tuple(self.config.std or imagenet_mean_std(self.shape[0])[1])

    @property
    def crop_pct(self) -> float:
        """The config's, or 0.875."""
        return self.config.crop_pct or 0.875

    @property
    def interpolation(self) -> str:
        """The config's, or bicubic."""
        return self.config.interpolation or "bicubic"

    @property
    def crop_mode(self) -> str:
        """The config's, or center."""
        return self.config.crop_mode or "center"

    def with_preprocessing(self, **values: Any) -> Any:
        """Returns the same images with other values of mean, std, crop_pct, ..."""
        values |= {name: list(values[name]) for name in ("mean", "std") if name in values}
        changed: Any = copy.copy(self)
        vars(changed).pop("_transform", None)
        object.__setattr__(changed, "config", replace(self.config, **values))
        return changed

    @property
    def shape(self) -> tuple[int, ...]:
        """`(c, h, w)` of an image."""
        return self.config.image_shape

    @property
    def workers(self) -> int:
        """Processes that read files."""
        return self.config.reading_workers


@dataclass(frozen=True, eq=False)
class ImageFiles(FromFiles):
    """Holds what data sets of image files have in common.

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

    def eval_transform(self, raw: Image.Image) -> Tensor:
        """Resizes and normalizes an image of `load`, and cuts its middle out: `c h w`.

        It is timm's transform for evaluation: the shorter side becomes the size divided by
        `crop_pct`.
        """
        return self._transform(raw)

    @cached_property
    def _transform(self) -> Any:
        return Preprocessing.of(self).eval_transform(self.config.image_shape)


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
    """Images that are one file each."""

    paths: Sequence[str]

    def open(self, number: int) -> Image.Image:
        """Opens the file."""
        return open_image(self.paths[number])

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

    It is turned upright as its EXIF data say. Transparent images are laid on white, 16-bit grays
    keep their upper 8 bits, and a log says once where they use only the lower 12.

    Raises:
        UnreadableFile: PIL raises something, the image is a thin strip, or its values have no
            known range; the message has `where` and the reason.
    """
    from PIL import Image, ImageOps

    try:
        if VARIABLE in os.environ:
            Image.MAX_IMAGE_PIXELS = max_unpacked_bytes() // 12  # PIL's own rule, of 1 GiB
        with opened() as image:
            short, long = sorted(image.size)
            require(
                long <= MAX_ASPECT * short,
                f"{long} x {short} pixels, more than {MAX_ASPECT} times as long as wide",
            )
            mode = "L" if in_chans == 1 else "RGB"
            bits = _bits_per_sample(image)
            if image.mode.startswith("I") and not bits:
                _warn_dark(image, where)
            return _in_mode(ImageOps.exif_transpose(image), mode, bits or 16)
    except Exception as error:  # what PIL raises on damaged bytes is anything from OSError on
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, Image.DecompressionBombError):
            reason += f" {VARIABLE} in the environment, of 1 GiB, raises the limit"
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


def image_extensions() -> tuple[str, ...]:
    """Returns the ends of names of image files that PIL reads, such as ".png", in lower case."""
    from PIL import Image

    formats = image_formats()
    return tuple(end for end, kind in Image.registered_extensions().items() if kind in formats)


def load_folder(name: str, split: str, config: DataConfig) -> ImageFileDataset:
    """Lists the images of a folder, `config.root`.

    It holds `train` and one or more of `val`, `valid`, `validation` and `test`; the split "val" is
    the first of these that is there, the split "test" goes by `test` before the others. Each is a
    folder with a folder a class, or a list such as train.csv, whose first line is `path,label` and
    whose paths start at the root; a list goes before a folder. Classes are sorted as text, as in
    torchvision: where they are numbers, write leading zeros. Their names are in Unicode's NFC,
    whatever form a computer wrote. Hidden folders and those that systems make (`__MACOSX`,
    `@eaDir`, ...) are no classes.

    Raises:
        ValueError: Something is missing, classes differ between splits, or none of the first few
            images can be read.
    """
    if config.folder is None:
        raise ValueError(f"{name} needs the folder that holds the images; pass root")
    paths, labels, classes = list_labeled_files(
        config.folder, split, image_extensions(), config.follow_links
    )
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


def _bits_per_sample(image: Image.Image) -> int:
    """Returns the bits that a tag of TIFF says are used, 0 without one."""
    return getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (0,))[0]


_dark: list[str] = []  # images of which a log has said so


def _warn_dark(image: Image.Image, where: str) -> None:
    """Logs for the first of gray images of 16 bits without a tag that it may be one of fewer."""
    most = np.asarray(image).max()
    if 0 < most < _FEW_VALUES and not _dark:
        _dark.append(where)
        _LOGGER.warning(
            "%s is gray of 16 bits whose values end at %d, and is taken as it is, nearly black; if "
            "it is of a camera of %d bits, save it and its like with 8 bits",
            *(where, most, max(8, int(most).bit_length())),
        )


def _in_mode(image: Image.Image, mode: str, bits: int) -> Image.Image:
    """Returns an image in a mode; of gray of more than 8 bits the upper 8 of these bits."""
    from PIL import Image

    require(image.mode != "F", "its values are floats of an unknown range; save it with 8 bits")
    if image.mode.startswith("I"):  # gray of 16 bits, which PIL would clip at 255
        values = np.asarray(image).astype(np.int64)
        least, most = values.min(), values.max()
        require(
            least >= 0 and most <= 65535,
            f"its values go from {least} to {most}, expected 0 to 65535; save it with 8 bits",
        )
        image = Image.fromarray((values >> (bits - 8 if 8 < bits < 16 else 8)).astype(np.uint8))
    elif image.has_transparency_data:
        drawn = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), drawn)
    color = image.convert("RGB")
    return color if mode == "RGB" else color.convert(mode)
