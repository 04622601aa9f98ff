"""Color drawings that install from Debian: `openclipart`, public domain.

`apt-get download openclipart-png && dpkg-deb -x openclipart-png_*.deb FOLDER` brings 8,121 of them.
Folders are the labels, which are noisy; links and files that are there twice are left out.
`load_openclipart` reads eight classes, `load_drawings` what can be drawn of everything.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageChops, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from tokenlearner.data.factory import ImageDataset

CLASSES = (
    *("animals", "food", "geography", "office", "people", "recreation", "tools", "transportation"),
)
MOST = 300  # drawings of a class
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which the host expects

HELD_OUT = 0.2  # of all drawings
ALIKE = 10  # drawings of a group; there are 1,300 stars alone
_READ, _SMALL = 448, 16  # sides in pixels, at which drawings are cropped and compared
_MOST_PIXELS = 10_000_000  # of a drawing; 17 have more, and 72 % of the pixels of all
_BITS, _COLOR = 24, 28.0  # how far near-duplicates are apart: signs of 240 slopes, rms of 256


@dataclass(frozen=True, eq=False)
class Drawings:
    """One part of all drawings.

    Args:
        images: uint8 `n 3 size size`.
        labels: int64 `n`, an index in `CLASSES`, or -1 of a drawing in another folder.
        groups: int64 `n`; near-duplicates have the same number, and are in the same part.
    """

    images: Tensor
    labels: Tensor
    groups: Tensor


def load_drawings(root: Path, size: int) -> tuple[Drawings, Drawings]:
    """Reads drawings to train on without labels, and a fifth of them that are held out.

    Each is cropped to what is drawn and scaled to the page. The parts are the same at all sizes.

    Raises:
        ValueError: `root` has no drawings.
    """
    paths = [path for _, path in sorted(_files(root).items())]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        read = list(threads.map(lambda path: _filling(path, size), paths))
    found = [(path, *images) for path, images in zip(paths, read, strict=True) if images]
    if not found:
        raise ValueError(f"{root} has no PNG files; unpack Debian's openclipart-png there")
    paths, images, small = zip(*found, strict=True)
    groups = group(torch.stack(small))
    earlier = (groups[:, None] == groups).tril(-1).sum(1)
    kept = earlier < ALIKE
    folders = [path.relative_to(root).parts[0] for path in paths]
    labels = torch.tensor([CLASSES.index(f) if f in CLASSES else -1 for f in folders])
    counts = groups[kept].bincount(minlength=len(paths)).cumsum(0)
    held_out = counts[groups] <= HELD_OUT * kept.sum()
    parts = [kept & ~held_out, kept & held_out]
    pages = torch.stack(images)
    train, test = (Drawings(pages[part], labels[part], groups[part]) for part in parts)
    return train, test


def group(small: Tensor) -> Tensor:
    """Numbers near-duplicates and all that are linked by them alike, `n 3 h w -> n`.

    Two drawings are near-duplicates if gray grows to the right in the same places, and if their
    colors are about the same.
    """
    gray = small.float().mean(1)
    bits = (gray[..., 1:] > gray[..., :-1]).flatten(1).float()
    colors = small.float().flatten(1)
    count = bits.sum(1)
    near = count[:, None] + count - 2 * bits @ bits.T <= _BITS
    near &= torch.cdist(colors, colors) <= _COLOR * colors.shape[1] ** 0.5
    one, other = near.nonzero(as_tuple=True)
    groups = torch.arange(len(small))
    while True:
        least = groups.scatter_reduce(0, one, groups[other], "amin")
        if torch.equal(least, groups):
            return groups
        groups = least


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
    found = _files(folder)
    images = [_image(found[digest], size) for digest in sorted(found)[:MOST]]
    kept = [image for image in images if image is not None]
    if not kept:
        raise ValueError(f"{folder} has no PNG files; unpack Debian's openclipart-png there")
    return kept


def _files(folder: Path) -> dict[str, Path]:
    """Files by their digest, each content once."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*.png")):
        if not path.is_symlink():
            found.setdefault(hashlib.sha256(path.read_bytes()).hexdigest(), path)
    return found


def _image(path: Path, size: int) -> Tensor | None:
    """A drawing on white, its longer side `size`, in the middle; None if it cannot be read."""
    page = _page(path, size)
    return None if page is None else pil_to_tensor(page)


def _filling(path: Path, size: int) -> tuple[Tensor, Tensor] | None:
    """A drawing that fills the page, and the same to compare with; None if nothing is drawn."""
    page = _page(path, _READ, _MOST_PIXELS)
    box = ImageChops.invert(page).getbbox() if page else None
    if not page or not box:
        return None
    drawing = page.crop(box)
    small = _fit(drawing, 4 * _SMALL).resize((_SMALL, _SMALL), Image.Resampling.BOX)
    return pil_to_tensor(_fit(drawing, size)), pil_to_tensor(small)


def _page(path: Path, size: int, most: float = float("inf")) -> Image.Image | None:
    try:
        file = Image.open(path)
        if file.width * file.height > most:
            return None
        drawing = file.convert("RGBA")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError):
        return None
    drawing.thumbnail((size, size), Image.Resampling.LANCZOS)
    return _centered(drawing, size).convert("RGB")


def _fit(drawing: Image.Image, size: int) -> Image.Image:
    scale = size / max(drawing.size)
    width, height = (max(1, round(side * scale)) for side in drawing.size)
    scaled = drawing.resize((width, height), Image.Resampling.LANCZOS)
    return _centered(scaled.convert("RGBA"), size).convert("RGB")


def _centered(drawing: Image.Image, size: int) -> Image.Image:
    page = Image.new("RGBA", (size, size), "white")
    left, top = (size - drawing.width) // 2, (size - drawing.height) // 2
    page.alpha_composite(drawing, (left, top))
    return page
