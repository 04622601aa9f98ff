"""Gray images whose value is their label, tar files of them, and what an epoch of them holds."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from tokenlearner.data.dataset import Batch
from tokenlearner.data.iterable import StreamDataset

PER_SHARD = 5


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


def write_tar(path: Path, files: Iterable[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def write_shard(path: Path, images: Mapping[int, bytes]) -> None:
    """Each image and its number as the label."""
    pairs = [((f"{i:03}.png", png), (f"{i:03}.cls", b"%d" % i)) for i, png in images.items()]
    write_tar(path, [file for pair in pairs for file in pair])


def write_shards(root: Path, shards: int = 4, split: str = "train") -> Path:
    """Image i is gray of the value i, and so is its label."""
    for shard in range(shards):
        numbers = range(shard * PER_SHARD, (shard + 1) * PER_SHARD)
        write_shard(root / f"{split}-{shard:03}.tar", {i: png(i) for i in numbers})
    return root
