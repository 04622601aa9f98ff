"""Labeled images or clips in memory.

Axes: `n` images, `b` in a batch, `t` frames of a clip, `c h w`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from ..utils.validation import check_count, require
from .dataset import MapDataset

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, eq=False)
class ImageDataset(MapDataset, Dataset[tuple[Tensor, int]]):
    """Holds one split of labeled images in memory and checks that they fit together.

    `dataset[i]` is one image, float32 `[c, h, w]` in [0, 1], and its label as an int, for a
    `DataLoader` with other transforms. `batches` gives normalized batches and is much quicker.

    Args:
        name: What the data set is called.
        split: Which part of it this is, such as `"train"`.
        images: uint8 `[n, c, h, w]`, of clips `[n, c, t, h, w]`, 0 to 255.
        labels: int64 `[n]`, 0 to `len(classes) - 1`.
        classes: The name of each label.
        mean: What `batches` subtracts, one number a channel, for images in [0, 1].
        std: What `batches` divides by, one number above 0 a channel.

    Raises:
        ValueError: A shape, a dtype, a count or a label does not fit, or there is no image.
    """

    name: str
    split: str
    images: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    in_memory = True

    def __post_init__(self) -> None:
        what, images, labels = f"{self.name} {self.split}", self.images, self.labels
        require(
            images.ndim in (4, 5) and images.dtype == torch.uint8 and images.numel() > 0,
            f"{what}: the images are {images.dtype} {list(images.shape)}, expected torch.uint8 "
            "[n, c, h, w] or of clips [n, c, t, h, w], none of them 0; give gray images a "
            "channel with images[:, None]",
        )
        n, c = images.shape[:2]
        require(
            labels.shape == (n,) and labels.dtype == torch.int64,
            f"{what}: the labels are {labels.dtype} {list(labels.shape)}, expected torch.int64 "
            f"[{n}]; give one label for each of the {n} images",
        )
        low, high, top = int(labels.min()), int(labels.max()), len(self.classes) - 1
        require(
            low >= 0 and high <= top,
            f"{what}: the labels run from {low} to {high}, expected 0 to {top}; name every class",
        )
        require(
            len(self.mean) == len(self.std) == c and min(self.std) > 0,
            f"{what}: mean is {self.mean}, std {self.std}, expected {c} each, every std above 0",
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the size of one image, `(c, h, w)`, or clip, `(c, t, h, w)`."""
        return tuple(self.images.shape[1:])

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
        """Yields normalized batches of images and their labels, each image once.

        Args:
            batch_size: Images in a batch; the last batch has what is left.
            shuffle: Draw a new order; otherwise the order is that of `images`.
            generator: Draws the order; None is torch's global one. Unused without `shuffle`.
            drop_last: Leave out the last batch when it is not full.

        Shape:
            float32 `b c h w` of `(image / 255 - mean) / std`, and int64 `b`.

        Raises:
            ValueError: `batch_size` is below 1, or `drop_last` would leave no batch.
        """
        n = len(self)
        check_count("batch_size", batch_size)
        require(
            batch_size <= n or not drop_last,
            f"{n} images make no batch of {batch_size}; pass batch_size={n} or drop_last=False",
        )
        order = (
            torch.randperm(n, generator=generator, device="cpu")
            if shuffle
            else torch.arange(n, device="cpu")
        )
        parts = order[: n - n % batch_size if drop_last else n].split(batch_size)
        return map(self.get_batch, parts)

    def get_batch(self, indices: Tensor | Sequence[int]) -> tuple[Tensor, Tensor]:
        """Returns the images at those indices, normalized, and their labels."""
        indices = torch.as_tensor(indices, device="cpu")
        return self._normalized(self.images[indices]), self.labels[indices]

    def load(self, index: int) -> Image.Image | Tensor:
        """Returns one image as a PIL image, or the frames of a clip, uint8 `t c h w`."""
        from torchvision.transforms.functional import to_pil_image

        image = self.images[index]
        return image.transpose(0, 1) if image.ndim == 4 else to_pil_image(image)

    def eval_transform(self, raw: Image.Image | Tensor) -> Tensor:
        """Normalizes what `load` returns: `c h w`, of a clip `c t h w`."""
        from torchvision.transforms.functional import pil_to_tensor

        is_clip = isinstance(raw, Tensor)
        return self._normalized((raw.transpose(0, 1) if is_clip else pil_to_tensor(raw))[None])[0]

    def resized(self, size: int | None = None, in_chans: int | None = None) -> ImageDataset:
        """Returns the images at another height and width, or gray ones in three channels.

        Args:
            size: Height and width in pixels; clips keep theirs. None keeps those of images.
            in_chans: The number of channels, or three times as many; None keeps them.

        Raises:
            ValueError: `in_chans` is another number.
        """
        images, (c, *_) = self.images, self.shape
        require(
            in_chans in (None, c, 3 * c),
            f"in_chans is {in_chans}, but {self.name} has {c} channels; pass in_chans={c}",
        )
        times = (in_chans or c) // c
        if size and images.ndim == 4 and self.shape[1:] != (size, size):
            parts = [
                F.interpolate(part.float(), (size, size), mode="bilinear", antialias=True)
                for part in images.split(1000)
            ]
            images = torch.cat([part.round().clamp(0, 255).byte() for part in parts])
        mean, std = self.mean * times, self.std * times
        return replace(self, images=torch.cat([images] * times, 1), mean=mean, std=std)

    def select(self, indices: Tensor) -> ImageDataset:
        """Returns a data set of these images."""
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def _normalized(self, images: Tensor) -> Tensor:
        numbers = torch.tensor([self.mean, self.std], dtype=torch.float32, device=images.device)
        mean, std = numbers.reshape(2, 1, -1, *[1] * (images.ndim - 2))
        return (images.float() / 255 - mean) / std
