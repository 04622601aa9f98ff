"""Gray images whose value is their label, and what an epoch of a stream of them holds."""

from __future__ import annotations

import io

import torch
from PIL import Image
from torch import Tensor

from tokenlearner.data.dataset import Batch
from tokenlearner.data.iterable import StreamDataset


def gray(value: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (value,) * 3)


def png(value: int) -> bytes:
    gray(value).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


def value(image: Image.Image) -> Tensor:
    """A change that keeps the gray value."""
    return torch.full((3, 8, 8), float(image.getpixel((0, 0))[0]))  # type: ignore[index]


def batches(data: StreamDataset, size: int = 4, **options: object) -> list[Batch]:
    usual = {"transform": value, "epoch": 0, "seed": 0, "workers": 0}
    return list(data.train_batches(batch_size=size, **{**usual, **options}))  # type: ignore[arg-type]


def seen(data: StreamDataset, size: int = 4, **options: object) -> list[int]:
    """The labels of an epoch, which are those of their images."""
    found = batches(data, size, **options)
    assert all(torch.equal(batch.images[:, 0, 0, 0].long(), batch.labels) for batch in found)
    return [int(label) for batch in found for label in batch.labels]
