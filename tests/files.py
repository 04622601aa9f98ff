"""Images, videos and checkpoints that several tests write."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tiny import randomized
from torch import Tensor

from tokenlearner import create_model, save_model
from tokenlearner.data.dataset import MapDataset, UnreadableFile
from tokenlearner.data.factory import ImageDataset
from tokenlearner.utils.io import write_json

MINI = "vit_mini_patch4_28"
_PIXELS = {"mjpeg": "yuvj420p"}


class Files(MapDataset):
    """Images in memory as if in files: `bad` cannot be read, and each may have several views."""

    def __init__(self, data: ImageDataset, bad: Iterable[int] = (), views: int = 1):
        self.data, self.bad, self.views = data, set(bad), views
        for name in ("name", "split", "labels", "classes", "mean", "std", "shape"):
            setattr(self, name, getattr(data, name))

    def load(self, index: int) -> Any:
        if index in self.bad:
            raise UnreadableFile(f"{index}.jpg is empty")
        return self.data.load(index)

    def eval_transform(self, raw: Any) -> Tensor:
        image = self.data.eval_transform(raw)
        shifted = [image + i / 255 for i in range(self.views)]
        return torch.stack(shifted) if self.views > 1 else image

    def select(self, indices: Tensor) -> Files:
        return Files(self.data.select(indices), self.bad, self.views)


def make_checkpoint(folder: Path, tokens: int, **run: Any) -> Path:
    """A checkpoint as `train` leaves one, by default of the bundled images."""
    save_model(randomized(create_model(MINI, num_tokens=tokens, depth=2)), folder)
    write_json(folder / "train.json", {"data": "fashion-mnist-small", "root": None} | run)
    return folder


def make_image(
    path: Path, size: tuple[int, int] = (40, 30), mode: str = "RGB", **options: Any
) -> Path:
    """A ramp from black at the left to white."""
    width, height = size
    ramp = np.linspace(0, 255, width).astype(np.uint8)
    pixels = np.broadcast_to(ramp[:, None], (height, width, 3)).copy()
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return path


def make_image_folder(
    root: Path, classes: Iterable[str], splits: Iterable[str] = ("train", "val"), count: int = 1
) -> Path:
    """Splits of classes with some images each, the classes in different colors."""
    for split in splits:
        for shade, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                color = (60 + 40 * shade % 190, 90, 60 + 9 * i)
                Image.new("RGB", (20, 18), color).save(root / split / name / f"{i}.png")
    return root


def make_video(
    path: Path,
    size: tuple[int, int] = (32, 24),
    frames: int = 12,
    codec: str = "mpeg4",
    rate: int = 8,
) -> Path:
    """A video of noise."""
    import av

    rng, (width, height) = np.random.default_rng(0), size
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, _PIXELS.get(codec, "yuv420p")
        for _ in range(frames):
            pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def png_bomb(width: int, height: int) -> bytes:
    """A PNG whose header names a large size and that holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    empty = zlib.compress(bytes(100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", empty) + chunk(b"IEND", b"")
