"""The two kinds of labeled data: map-style, read in any order, and iterable, read as a stream."""

from __future__ import annotations

import copy
import unicodedata
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..utils.validation import check_count, require, shortened


class UnreadableFile(ValueError):
    """An image or a clip that cannot be read; the message names the file and the reason."""


@dataclass(frozen=True)
class Batch:
    """Images that go through a model together.

    Args:
        images: float32 `b c h w`, of clips `b c t h w`, normalized.
        labels: int64 `b`.
        unreadable: For each file that cannot be read its name and the reason.
    """

    images: Tensor
    labels: Tensor
    unreadable: tuple[str, ...] = ()

    def pin_memory(self) -> Batch:
        """Returns it in memory from which a GPU copies faster."""
        return Batch(self.images.pin_memory(), self.labels.pin_memory(), self.unreadable)


class _Labeled(ABC):
    """One split of labeled images or clips.

    Attributes:
        name: What the data set is called.
        split: `"train"`, `"val"` or `"test"`.
        classes: The name of each label.
        mean: Subtracted from images in [0, 1], one number a channel.
        std: Divided by, one number above 0 a channel.
        crop_pct: Share of the resized image's side that is kept.
        interpolation: How images are resized.
        crop_mode: How an image becomes a square, as in `DataConfig`.
        shape: `(c, h, w)` of an image in a batch, `(c, t, h, w)` of a clip.
        workers: Processes that read files for evaluation.
        in_memory: Whether all of it is in memory, at its final size.
    """

    name: str
    split: str
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float = 1.0
    interpolation: str = "bicubic"
    crop_mode: str = "center"
    shape: tuple[int, ...]
    workers: int = 0
    in_memory: bool = False

    def with_preprocessing(self, **values: Any) -> Any:
        """Returns the same images with other values of mean, std, crop_pct, ..."""
        changed = copy.copy(self)
        for name, value in values.items():
            object.__setattr__(changed, name, tuple(value) if name in ("mean", "std") else value)
        return changed

    def with_split(self, split: str) -> Any:
        """Returns the same images as another split: a clip of `"train"` is drawn at random."""
        changed = copy.copy(self)
        object.__setattr__(changed, "split", split)
        return changed

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields images and labels for evaluation, each image once, without unreadable ones."""


class MapDataset(_Labeled):
    """Labeled images or clips with an order, read by their index.

    A subclass has the attributes, `labels`, `__len__`, `load`,
    `eval_transform` and `select`.

    Attributes:
        labels: int64 `[n]`, 0 to `len(classes) - 1`.
    """

    labels: Tensor

    @abstractmethod
    def load(self, index: int) -> Any:
        """Reads one image, a PIL image, or the frames of a clip, uint8 `t c h w`.

        Raises:
            UnreadableFile: It cannot be read.
        """

    @abstractmethod
    def eval_transform(self, raw: Any) -> Tensor:
        """Makes of what `load` returns the input of a model, float32 `shape`, without randomness.

        Several views of a clip come first: `v c t h w`.
        """

    @abstractmethod
    def select(self, indices: Tensor) -> MapDataset:
        """Returns a data set of these images."""

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> Any:
        """Loads an image; the name that `load` had in version 0.3."""
        warnings.warn("read is load now", DeprecationWarning, stacklevel=2)
        return self.load(index)

    def plain(self, raw: Any) -> Tensor:
        """Makes the input of a model; the name that `eval_transform` had in version 0.3."""
        warnings.warn("plain is eval_transform now", DeprecationWarning, stacklevel=2)
        return self.eval_transform(raw)

    def get_batch(self, indices: Tensor | Sequence[int]) -> tuple[Tensor, Tensor]:
        """Returns images as `eval_transform` makes them, and their labels.

        Raises:
            UnreadableFile: One cannot be read.
        """
        indices = torch.as_tensor(indices, device="cpu")
        images = [self.eval_transform(self.load(index)) for index in indices.tolist()]
        return torch.stack(images), self.labels[indices]

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields images and labels in order.

        Raises:
            ValueError: `batch_size` is below 1.
        """
        check_count("batch_size", batch_size)
        return map(self.get_batch, torch.arange(len(self), device="cpu").split(batch_size))

    def sample(self, n: int, seed: int = 0) -> MapDataset:
        """Returns `n` of the images, drawn by a seed; fewer are the first of more.

        Raises:
            ValueError: There are not as many.
        """
        require(1 <= n <= len(self), f"n is {n}, but {self.name} has {len(self)} images")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.select(order[:n])


class IterableDataset(_Labeled):
    """Labeled images that come one after the other, in no order of one's choice."""

    @abstractmethod
    def eval_batches(
        self, batch_size: int, process: int = 0, num_processes: int = 1
    ) -> Iterator[Batch]:
        """Yields one process's part for evaluation, each image once, and what is unreadable."""

    @abstractmethod
    def train_batches(
        self,
        transform: Any,
        batch_size: int,
        *,
        epoch: int,
        seed: int,
        workers: int,
        process: int = 0,
        num_processes: int = 1,
    ) -> Iterator[Batch]:
        """Yields an epoch's full batches of one process, shuffled by epoch and seed.

        Args:
            transform: Makes of an image the input of a model; None is that of evaluation.
            batch_size: Images of a batch of this process.
            epoch: Counted from 0.
            seed: Draws the order and every image's augmentation.
            workers: Processes that read.
            process: Number of this process, from 0.
            num_processes: Processes that share the images.
        """

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields images and labels, each image once, without unreadable ones.

        Raises:
            ValueError: `batch_size` is below 1.
        """
        check_count("batch_size", batch_size)
        batches = self.eval_batches(batch_size)
        return ((batch.images, batch.labels) for batch in batches if len(batch.labels))


LabeledDataset = MapDataset | IterableDataset


def normalized(name: str) -> str:
    """Returns the name of a class in Unicode's NFC, since computers write é in two ways."""
    return unicodedata.normalize("NFC", name)


def match_classes(data: LabeledDataset, classes: Sequence[str]) -> Any:
    """Returns a data set whose labels are numbered as these names are.

    Args:
        data: Has some of these classes, or all.
        classes: Names, in the order of a model's logits.

    Raises:
        ValueError: It has a class of another name or of one that two classes have, or is a stream
            and would have to be renumbered.
    """
    classes, ours = [*map(normalized, classes)], [*map(normalized, data.classes)]
    if ours == classes:
        return data
    number = {name: i for i, name in enumerate(classes)}
    twice = [name for name, times in Counter(classes).items() if times > 1 and name in ours]
    require(
        not twice,
        f"{data.name} has the classes {shortened(twice)}, which the model has twice; give its "
        "classes names of their own by tokenlearner.models.set_preprocessing",
    )
    unknown = [name for name in ours if name not in number]
    require(
        not unknown,
        f"{data.name} has classes that the model does not know, {shortened(unknown)}; it knows "
        f"{shortened(list(classes))}: rename the folders or labels as it was trained",
    )
    data = require_order(data, "be renumbered by the names of the model's classes")
    order = torch.tensor([number[name] for name in ours], device="cpu")
    changed: Any = copy.copy(data)
    object.__setattr__(changed, "labels", order[data.labels])
    object.__setattr__(changed, "classes", tuple(classes))
    return changed


def require_order(data: LabeledDataset, purpose: str) -> MapDataset:
    """Returns a data set whose images can be chosen.

    Raises:
        ValueError: It is a stream; the message says what `purpose` is not possible.
    """
    if not isinstance(data, MapDataset):
        raise ValueError(
            f"{data.name} is a stream without an order, it cannot {purpose}; unpack it for the "
            "data set 'folder', or take hfds/ in place of hfids/"
        )
    return data
