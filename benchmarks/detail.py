"""A set of images in which detail decides: a small garment among scrambled ones on a photograph.

The class is the garment's. Garments are those of Fashion-MNIST, photographs those that scikit-image
ships; those of the test split are in no image of the training split.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from skimage import data as photographs
from torch import Tensor

from tokenlearner import load_data

PHOTOGRAPHS = {  # split: functions of skimage.data
    "train": (
        *("astronaut", "brick", "camera", "chelsea", "grass"),
        *("hubble_deep_field", "immunohistochemistry", "retina", "rocket"),
    ),
    "test": ("coffee", "coins", "gravel", "stereo_motorcycle"),
}
SPLITS = tuple(PHOTOGRAPHS)


@dataclass(frozen=True)
class Scene:
    """What an image is made of, in pixels."""

    size: int = 224
    cell: int = 56  # each thing has a cell of its own, anywhere in it
    garment: int = 40
    distractors: int = 6
    pieces: int = 2  # of a scrambled garment, along each side
    contrast: float = 0.6  # of the photograph


class Detail:
    """Makes one image after the other, each from its number alone."""

    def __init__(
        self, split: str, scene: Scene, seed: int = 0, data: str = "fashion-mnist", root=None
    ):
        garments = load_data(data, split, root=root)
        self.garments, self.labels = garments.images[:, 0].numpy(), garments.labels.numpy()
        self.scene, self.seed, self.part = scene, seed, SPLITS.index(split)
        self.photographs = [_photograph(name) for name in PHOTOGRAPHS[split]]

    def __call__(self, index: int) -> tuple[np.ndarray, int]:
        scene, draw = self.scene, np.random.default_rng([self.seed, self.part, index])
        image = self._background(draw)
        cells = draw.permutation((scene.size // scene.cell) ** 2)[: scene.distractors + 1]
        chosen = draw.integers(len(self.garments), size=len(cells))
        for place, which in zip(reversed(cells), reversed(chosen), strict=True):
            garment = self.garments[which]
            if which is not chosen[0] and place != cells[0]:
                garment = _scramble(garment, scene.pieces, draw)
            self._paste(image, garment, place, draw)
        return image, int(self.labels[chosen[0]])

    def _background(self, draw: np.random.Generator) -> np.ndarray:
        photo = self.photographs[draw.integers(len(self.photographs))]
        most = min(photo.size)
        side = int(draw.integers(min(self.scene.size * 2 // 3, most), most + 1))
        left, top = (int(draw.integers(length - side + 1)) for length in photo.size)
        box = (left, top, left + side, top + side)
        size = (self.scene.size,) * 2
        pixels = np.asarray(photo.resize(size, Image.Resampling.BICUBIC, box))
        pixels = np.rot90(pixels, draw.integers(4))[..., draw.permutation(3)]
        pixels = pixels[:, ::-1] if draw.integers(2) else pixels
        gray = draw.uniform(80, 175)
        return (gray + (pixels - 128.0) * self.scene.contrast).clip(0, 255).astype(np.uint8)

    def _paste(self, image, garment, place, draw) -> None:
        scene = self.scene
        rows = scene.size // scene.cell
        y, x = (
            scene.cell * i + draw.integers(scene.cell - scene.garment + 1)
            for i in divmod(int(place), rows)
        )
        size = (scene.garment,) * 2
        values = (
            np.asarray(Image.fromarray(garment).resize(size, Image.Resampling.BICUBIC), np.float32)
            / 255
        )
        opaque = (values * 6).clip(0, 1)[..., None]
        tint = draw.uniform(0.55, 1, 3).astype(np.float32)
        cloth = 255 * (0.1 + 0.9 * values)[..., None] * tint
        window = image[y : y + scene.garment, x : x + scene.garment]
        window[:] = (opaque * cloth + (1 - opaque) * window).round()


def _scramble(garment: np.ndarray, pieces: int, draw: np.random.Generator) -> np.ndarray:
    side = len(garment) // pieces
    parts = garment.reshape(pieces, side, pieces, side).swapaxes(1, 2).reshape(-1, side, side)
    order = draw.permutation(len(parts))
    while (order == np.arange(len(parts))).any():
        order = draw.permutation(len(parts))
    parts = parts[order].reshape(pieces, pieces, side, side)
    return parts.swapaxes(1, 2).reshape(garment.shape)


def _photograph(name: str) -> Image.Image:
    pixels = getattr(photographs, name)()
    pixels = pixels[0] if isinstance(pixels, tuple) else pixels
    return Image.fromarray(pixels).convert("RGB")


def load_detail(
    split: str, count: int, seed: int = 0, scene: Scene = Scene(), data="fashion-mnist", root=None
) -> tuple[Tensor, Tensor]:
    make = Detail(split, scene, seed, data, root)
    images, labels = zip(*map(make, range(count)), strict=True)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)
