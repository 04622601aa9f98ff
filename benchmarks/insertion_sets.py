"""The hosts and images of insertion.py: drawings, a set in which detail decides, and clothes."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from detail import finetuned_host, load_detail
from dinov2 import dinov2_small
from openclipart import MEAN, STD, Drawings, load_drawings
from torch import Tensor, nn

from tokenlearner import TrainConfig, load_data, load_model, train
from tokenlearner.utils.io import atomic_write

DETAIL_SEED = 1_000_000  # of students' images; the host was fine-tuned to those of 0 to 3


@dataclass(frozen=True, eq=False)
class Part:
    """Images `n c h w` uint8, their labels, -1 where there is none, and groups of near-duplicates.

    Nothing is fitted to labels; groups are what folds of a probe keep together.
    """

    images: Tensor
    labels: Tensor
    groups: Tensor

    def first(self, count: int) -> Part:
        """The part with so many images, drawn by chance; 0 is all."""
        if not count or count >= len(self.images):
            return self
        drawn = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(0))[:count]
        return Part(self.images[drawn], self.labels[drawn], self.groups[drawn])


@dataclass(frozen=True, eq=False)
class Setting:
    """A host, and images of two parts.

    Args:
        host: In evaluation mode, a classifier or not.
        train: Images to fit students on.
        test: Images to evaluate on.
        mean: Of the channels, as the host expects them.
        std: The same.
    """

    host: nn.Module
    train: Part
    test: Part
    mean: Sequence[float] = MEAN
    std: Sequence[float] = STD

    def normalized(self, images: Tensor) -> Tensor:
        both = torch.tensor([list(self.mean), list(self.std)], device=images.device)
        mean, std = both[..., None, None]
        return (images.float() / 255 - mean) / std


def drawings(options: Namespace) -> Setting:
    """DINOv2-S-derived, and drawings of openclipart; they are read once."""
    path = options.out / f"drawings-{options.size}.pt"
    if not path.exists():
        with atomic_write(path) as temporary:
            torch.save([vars(d) for d in load_drawings(options.drawings, options.size)], temporary)
    parts = [Drawings(**kept) for kept in torch.load(path)]
    train, test = (Part(d.images, d.labels, d.groups) for d in parts)
    return Setting(dinov2_small(options.wheel, options.size), train, test)


def detail(options: Namespace) -> Setting:
    """The same host, fine-tuned to images in which detail decides, and new ones of the kind."""
    shared: dict[str, Any] = {"root": options.garments, "data": options.data}
    half = options.dtype == "bfloat16"
    host = finetuned_host(options.wheel, options.out, device=options.device, half=half, **shared)
    parts = []
    for split, count in (("train", options.detail_images), ("test", options.detail_images // 3)):
        made = load_detail(split, count, DETAIL_SEED, **shared)
        parts.append(Part(*made, torch.arange(count)))
    return Setting(host, *parts)


def clothes(options: Namespace) -> Setting:
    """A small ViT trained on Fashion-MNIST with labels, and a tenth of its images."""
    folder = options.out / "host"
    config = TrainConfig(
        out=str(folder),
        model="vit_mini_patch4_28",
        model_kwargs={"depth": 8, "class_token": True, "global_pool": "token"},
        data=options.data,
        root=options.garments,
        epochs=options.host_epochs,
        lr=1e-3,
        device=str(options.device),
        resume="auto",  # a host whose training was cut off would be another one
    )
    train(config)
    kept = [load_data(options.data, split, root=options.garments) for split in ("train", "test")]
    parts = [Part(d.images, d.labels, torch.arange(len(d.labels))) for d in kept]
    host = load_model(folder / "model.safetensors").eval()
    mean, std = kept[0].mean, kept[0].std
    return Setting(host, parts[0].first(len(parts[0].labels) // 10), parts[1], mean, std)


SETS: dict[str, Callable[[Namespace], Setting]] = {
    "drawings": drawings,
    "detail": detail,
    "clothes": clothes,
}


def load_setting(options: Namespace) -> Setting:
    """Loads a set as the options say, with `--images` of its training part."""
    setting = SETS[options.set](options)
    return replace(setting, train=setting.train.first(options.images))
