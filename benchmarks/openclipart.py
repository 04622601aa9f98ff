"""Labeled color drawings that install from Debian: `openclipart`, public domain.

`apt-get download openclipart-png && dpkg-deb -x openclipart-png_*.deb FOLDER` brings 8,121 of them.
Folders are the labels, which are noisy; links and drawings that are there twice are left out.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from tokenlearner.data.factory import ImageDataset

CLASSES = (
    *("animals", "food", "geography", "office", "people", "recreation", "tools", "transportation"),
)
MOST = 300  # drawings of a class
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which the host expects


def load_openclipart(root: Path, size: int) -> tuple[ImageDataset, ImageDataset]:
    """Reads half of every class to train on and half to test on, as `3 size size`.

    Raises:
        ValueError: A class has no drawings in `root`.
    """
    halves: tuple[list[Tensor], list[Tensor]] = ([], [])
    labels: tuple[list[int], list[int]] = ([], [])
    for label, name in enumerate(CLASSES):
        drawings = _drawings(root / name, size)
        for part in (0, 1):
            halves[part].extend(drawings[part::2])
            labels[part].extend([label] * len(drawings[part::2]))
    train, test = (
        ImageDataset(
            "openclipart", split, torch.stack(images), torch.tensor(own), CLASSES, MEAN, STD
        )
        for split, images, own in zip(("train", "test"), halves, labels, strict=True)
    )
    return train, test


def _drawings(folder: Path, size: int) -> list[Tensor]:
    """Drawings of a class in an order that is the same everywhere, each once."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*.png")):
        if not path.is_symlink():
            found.setdefault(hashlib.sha256(path.read_bytes()).hexdigest(), path)
    images = [_image(found[digest], size) for digest in sorted(found)[:MOST]]
    kept = [image for image in images if image is not None]
    if not kept:
        raise ValueError(f"{folder} has no PNG files; unpack Debian's openclipart-png there")
    return kept


def _image(path: Path, size: int) -> Tensor | None:
    """A drawing on white, its longer side `size`, in the middle; None if it cannot be read."""
    try:
        drawing = Image.open(path).convert("RGBA")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError):
        return None
    drawing.thumbnail((size, size), Image.Resampling.LANCZOS)
    page = Image.new("RGBA", (size, size), "white")
    left, top = (size - drawing.width) // 2, (size - drawing.height) // 2
    page.alpha_composite(drawing, (left, top))
    return pil_to_tensor(page.convert("RGB"))
