"""Labeled images that stay in their files and are read one by one.

The files of a folder are listed and never opened, so a million of them take seconds.
"""

from __future__ import annotations

import copy
import csv
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..utils.files import image_formats, open_image, read_text
from ..utils.limits import VARIABLE, max_unpacked_bytes
from ..utils.preprocessing import Preprocessing
from ..utils.validation import counted, require, shortened
from .config import DataConfig
from .dataset import MapDataset, UnreadableFile
from .loader import eval_batches

if TYPE_CHECKING:
    from PIL import Image

_LOGGER = logging.getLogger(__name__)
MAX_ASPECT = 100  # longer strips would be resized to gigabytes
MAX_OPENED = 10  # images that are opened when a set is loaded, until one can be read
FOLDERS = {  # of each split, the first that is there
    "train": ("train",),
    "val": ("val", "valid", "validation", "test"),
    "test": ("test", "val", "valid", "validation"),
}
_BITS_PER_SAMPLE = 258  # a tag of TIFF
_LAYOUT = "make train/ and val/ with a folder a class, or write train.csv and val.csv"


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
    keep their upper 8 bits.

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
            return _in_mode(ImageOps.exif_transpose(image), "L" if in_chans == 1 else "RGB")
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
    torchvision: where they are numbers, write leading zeros.

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


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    from PIL import Image

    require(image.mode != "F", "its values are floats of an unknown range; save it with 8 bits")
    if image.mode.startswith("I"):  # gray of 16 bits, which PIL would clip at 255
        [bits, *_] = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))
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


def list_labeled_files(
    root: Path, split: str, extensions: Sequence[str], follow_links: bool = False
) -> tuple[list[str], list[int], tuple[str, ...]]:
    """Lists the files of a split, their labels and the classes; opens none of them.

    Args:
        root: Holds folders of classes or lists, as `load_folder` says.
        split: `"train"`, `"val"` or `"test"`.
        extensions: Ends of file names that count, such as ".png", in lower case. What a list names
            counts whatever its name ends in.
        follow_links: Take files that are not in the root, where links or lists lead to them.

    Raises:
        ValueError: Something is missing, the classes are not those of the other split, or a file
            is not in the root.
    """
    require(
        root.is_dir(),
        f"{root} is not a folder; pass root, the folder of the data; for a new one, {_LAYOUT}",
    )
    others = "val" if split == "train" else "train"
    source, other = (_find_source(root, name) for name in (split, others))
    if source is None:
        raise ValueError(_missing_split(root, split))
    top = None if follow_links else root
    files = _read_list(root, source) if source.suffix else _read_folder(source, extensions, top)
    if source.suffix and top:
        for folder in {os.path.dirname(path) for path, _ in files}:
            check_inside(folder, top)
        check_links((path for path, _ in files), top)
    classes = sorted({label for _, label in files})
    if other is not None:
        listed = {label for _, label in _read_list(root, other)} if other.suffix else ()
        _check_same_classes(source, classes, other, sorted(listed or _folders(other)))
    number = {label: i for i, label in enumerate(classes)}
    return [path for path, _ in files], [number[label] for _, label in files], tuple(classes)


def _find_source(root: Path, split: str) -> Path | None:
    """Returns the list or the folder of a split."""
    paths = [root / f"{name}{suffix}" for name in FOLDERS[split] for suffix in (".csv", "")]
    return next((p for p in paths if (p.is_file() if p.suffix else p.is_dir())), None)


def _missing_split(root: Path, split: str) -> str:
    expected = ", ".join(f"{name}/ or {name}.csv" for name in FOLDERS[split])
    others = [name for name in _folders(root) if name not in sum(FOLDERS.values(), ())]
    hint = f"it holds {shortened(others)}: if these are classes, " if others else ""
    return f"{root} has nothing for split {split!r}, expected {expected}; {hint}{_LAYOUT}"


def _folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _check_same_classes(
    source: Path, classes: Sequence[str], other: Path, others: Sequence[str]
) -> None:
    pairs = (other, set(classes) - set(others)), (source, set(others) - set(classes))
    missing = [f"{path} lacks {shortened(sorted(names))}" for path, names in pairs if names]
    require(
        not missing,
        f"{source} and {other} have different classes: {'; '.join(missing)}; both need the same",
    )


def _read_folder(
    folder: Path, extensions: Sequence[str], top: Path | None
) -> list[tuple[str, str]]:
    classes = _folders(folder)
    require(bool(classes), f"{folder} holds no folder; make one for each class")
    pairs, others, ends = [], list[str](), tuple(extensions)
    for name in classes:
        files, left_out = split_by_suffix(walk_files(folder / name, top), ends)
        others += left_out
        require(
            bool(files),
            f"{folder / name} holds no file that ends in {', '.join(ends)}; put some there, or "
            "remove the folder",
        )
        pairs += [(path, name) for path in files]
    warn_left_out(folder, others)
    return pairs


def split_by_suffix(paths: Iterable[str], ends: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Returns the paths that end in one of these, in lower case, and the others."""
    fitting: list[str] = []
    others: list[str] = []
    for path in paths:
        (fitting if path.lower().endswith(ends) else others).append(path)
    return fitting, others


def warn_left_out(folder: Path, others: Sequence[str]) -> None:
    """Logs how many files of a folder are of other kinds, and of which, if there are any."""
    if others:
        kinds = sorted({os.path.splitext(path)[1].lower() or "no suffix" for path in others})
        left_out = counted(len(others), "file")
        _LOGGER.warning(
            "%s: %s of other kinds left out (%s)", *(folder, left_out, shortened(kinds))
        )


def walk_files(folder: Path, top: Path | None) -> Iterator[str]:
    """Yields files in the order of torchvision; each folder once, though links may lead back.

    Raises:
        ValueError: A link leads out of the folder `top`; with None it is followed.
    """
    visited, files = set(), {}
    for path, folders, names in os.walk(folder, followlinks=True):
        if top is not None:
            check_inside(path, top)
        stat = os.stat(path)
        key = (stat.st_dev, stat.st_ino)
        folders[:] = [n for n in folders if key not in visited and not n.startswith(".")]
        if key not in visited:
            files[path] = sorted(name for name in names if not name.startswith("."))
        visited.add(key)
    found = [os.path.join(path, name) for path in sorted(files) for name in files[path]]
    if top is not None:
        check_links(found, top)
    return iter(found)


def check_links(paths: Iterable[str], top: Path) -> None:
    """Checks that those of the files that are links stay in a folder; see `check_inside`."""
    for path in filter(os.path.islink, paths):
        check_inside(path, top)


def check_inside(path: str, top: Path) -> None:
    """Checks that a path stays in a folder when its links are followed.

    Raises:
        ValueError: It does not.
    """
    target, folder = os.path.realpath(path), os.path.realpath(top)
    require(
        os.path.commonpath([target, folder]) == folder,
        f"{path} leads to {target}, which is not in {top}; pass follow_links if it is meant to be "
        "read",
    )


def _read_list(root: Path, path: Path) -> list[tuple[str, str]]:
    (_, header), *rows = _read_rows(path) or [(0, [])]
    require(
        [cell.strip() for cell in header] == ["path", "label"],
        f"{path} does not start with the line path,label; write it there",
    )
    odd = [f"line {line}" for line, cells in rows if len(cells) != 2 or not all(cells)]
    require(not odd, f"{path} has {shortened(odd)} without a path and a label; write path,label")
    require(bool(rows), f"{path} lists no file; write a line path,label for each")
    files = [(line, os.path.join(root, name), label) for line, (name, label) in rows]
    gone = [f"{name} (line {line})" for line, name, _ in files if not os.path.isfile(name)]
    require(not gone, f"{path} lists files that do not exist: {shortened(gone)}; correct the paths")
    return [(name, label) for _, name, label in files]


def _read_rows(path: Path) -> list[tuple[int, list[str]]]:
    """Returns the number and the cells of every line that is not empty."""
    try:
        lines = StringIO(read_text(path, "utf-8-sig"), newline="")
        reader = csv.reader(lines, skipinitialspace=True)
        return [(reader.line_num, cells) for cells in reader if cells]
    except (OSError, ValueError, csv.Error) as error:
        message = f"{path} cannot be read as a list ({error}); save it as CSV in UTF-8"
        raise ValueError(message) from error
