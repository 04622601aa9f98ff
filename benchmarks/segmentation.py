"""A dense task on learned tokens: which piece of clothing is at each pixel, on Fashion-MNIST.

A mini ViT is trained to classify; then it, and it with fusers that put 8 learned tokens back on all
positions, label every pixel from the last feature map of `forward_intermediates`, through one
linear layer. A pixel's truth is the image's class where it is brighter than `BRIGHT`, and
background elsewhere. Both are tried with frozen features and trained to the end, for as long.
"""

from __future__ import annotations

import copy
import shlex
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from measured import add_device
from torch import Tensor, nn

from tokenlearner import TrainConfig, calibrate, insert, load_data, train
from tokenlearner.data.factory import ImageDataset
from tokenlearner.data.loader import epoch_keys, load_batches
from tokenlearner.evaluation.flops import count_macs
from tokenlearner.utils.io import atomic_write, write_json

BRIGHT = 25  # of 255
PATCH = 4
TOKENS, AT = 8, 3  # with fusers in every block from 3 on, of 6
CALIBRATION = {"images": 1024, "steps": 400}
RATES = {"frozen": 1e-2, "trained": 2e-3}


class Segmenter(nn.Module):
    """A host's last feature map and one linear layer: `b c h w -> b classes h w`."""

    def __init__(self, host: Any, classes: int, frozen: bool):
        super().__init__()
        self.host, self.frozen = host, frozen
        self.head = nn.Linear(host.num_features, classes * PATCH**2)

    def forward(self, images: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            [found] = self.host.forward_intermediates(
                images, indices=1, norm=True, intermediates_only=True
            )
        return F.pixel_shuffle(self.head(found.movedim(1, -1)).movedim(-1, 1), PATCH)


def truth(images: Tensor, labels: Tensor, data: ImageDataset) -> Tensor:
    """Each pixel's class, `b h w`; 0 is background."""
    bright = images[:, 0] * data.std[0] + data.mean[0] > BRIGHT / 255
    return torch.where(bright, 1 + labels[:, None, None], 0)


def fit(model: Segmenter, data: ImageDataset, epochs: int, seed: int) -> None:
    """Trains the linear layer, or all there is; frozen features are those of evaluation."""
    model.train(not model.frozen)
    weights = [p for p in (model.head if model.frozen else model).parameters() if p.requires_grad]
    device = next(model.parameters()).device
    rate, steps = RATES["frozen" if model.frozen else "trained"], epochs * (len(data) // 64)
    optimizer = torch.optim.AdamW(weights, rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    for epoch in range(epochs):
        for batch in load_batches(data, epoch_keys(len(data), 64, seed=seed, epoch=epoch)):
            images, labels = batch.images.to(device), batch.labels.to(device)
            loss = F.cross_entropy(model(images), truth(images, labels, data))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def predicted_classes(model: Segmenter, images: Tensor) -> Tensor:
    """What a model says each pixel is, `b h w`, on the CPU."""
    return model.eval()(images.to(next(model.parameters()).device)).argmax(1).cpu()


@torch.inference_mode()
def evaluate_pixels(model: Segmenter, data: ImageDataset) -> dict[str, float]:
    """Mean intersection over union of all classes, and the share of pixels, in percent."""
    model.eval()
    both, either = torch.zeros(2, len(data.classes) + 1)
    right = pixels = 0.0
    for images, labels in data.batches(500):
        said, true = predicted_classes(model, images), truth(images, labels, data)
        right, pixels = right + (said == true).sum().item(), pixels + true.numel()
        for k in range(len(either)):
            both[k] += ((said == k) & (true == k)).sum()
            either[k] += ((said == k) | (true == k)).sum()
    return {
        "miou_percent": 100 * (both / either).mean().item(),
        "pixels_percent": 100 * right / pixels,
    }


def host_for(options: Namespace, folder: Path) -> nn.Module:
    """A mini ViT that classifies the bundled images."""
    overrides = {"epochs": options.host_epochs, "warmup_epochs": 0.5, "device": str(options.device)}
    return train(TrainConfig(out=str(folder), **overrides)).model.to(options.device)


def contenders(host: Any, data: ImageDataset, seed: int) -> dict[str, Any]:
    """The host, and its copy that runs on learned tokens between its positions."""
    torch.manual_seed(seed)
    fused = insert(copy.deepcopy(host), TOKENS, AT, fuse=True)
    sample = data.sample(min(CALIBRATION["images"], len(data)), seed)
    images, _ = next(sample.batches(len(sample)))
    images = images.to(next(host.parameters()).device)
    calibrate(fused, images, steps=CALIBRATION["steps"], seed=seed)
    return {"host": host, f"{TOKENS} tokens, fused": fused}


def measure(options: Namespace) -> tuple[list[dict[str, Any]], dict[str, Segmenter]]:
    """A row for every contender, way of training and seed; the last models, by their names."""
    data, held_out = load_data("fashion-mnist-small"), load_data("fashion-mnist-small", "test")
    if options.images:
        data, held_out = data.sample(options.images), held_out.sample(min(options.images, 2000))
    with tempfile.TemporaryDirectory() as folder:
        host = host_for(options, Path(folder) / "host")
    image = next(held_out.batches(1))[0].to(options.device)
    rows, models = [], {}
    for seed in options.seeds:
        for name, backbone in contenders(host, data, seed).items():
            for how in RATES:
                torch.manual_seed(seed)
                classes = len(data.classes) + 1
                model = Segmenter(copy.deepcopy(backbone), classes, frozen=how == "frozen")
                model.to(options.device)
                fit(model, data, options.epochs, seed)
                gmacs = count_macs(backbone, image) / 1e9
                row = {"model": name, "how": how, "seed": seed, "gmacs": gmacs}
                rows.append(row | evaluate_pixels(model, held_out))
                print(rows[-1], flush=True)
                models[f"{name}, {how}"] = model
    return rows, models


@torch.inference_mode()
def draw(path: Path, models: dict[str, Segmenter], shown: int = 6) -> None:
    """Writes a sheet: images of as many classes, the truth, what each model says."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    data = load_data("fashion-mnist-small", "test")
    firsts = [int((data.labels == k).nonzero()[0]) for k in range(shown)]
    images, labels = data.get_batch(torch.tensor(firsts))
    said = {name: predicted_classes(model, images) for name, model in models.items()}
    columns = {"truth": truth(images, labels, data), **said}
    figure = Figure(figsize=(1.5 * (1 + len(columns)), 1.55 * shown), layout="constrained")
    table = figure.subplots(shown, 1 + len(columns), squeeze=False)
    for i, row in enumerate(table):
        row[0].imshow(data.images[firsts[i], 0].numpy(), cmap="gray")
        row[0].set_ylabel(data.classes[labels[i]], fontsize=8)
        for axis, (name, maps) in zip(row[1:], columns.items(), strict=True):
            axis.imshow(maps[i].numpy(), cmap="tab20", vmin=0, vmax=19, interpolation="nearest")
            if i == 0:
                axis.set_title(name.replace(", ", ",\n"), fontsize=8)
        for axis in row:
            axis.set_xticks([])
            axis.set_yticks([])
    with atomic_write(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))


def table(rows: list[dict[str, Any]]) -> str:
    """Median and spread over seeds, as Markdown."""
    lines = [
        "| model | trained | GMACs | mean IoU, % | pixels, % |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, how in dict.fromkeys((row["model"], row["how"]) for row in rows):
        own = [row for row in rows if (row["model"], row["how"]) == (name, how)]
        cells = [spread([row[key] for row in own]) for key in ("miou_percent", "pixels_percent")]
        what = "linear layer" if how == "frozen" else "all"
        lines.append(f"| {name} | {what} | {own[0]['gmacs']:.4f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    return f"{median(values):.1f} ({min(values):.1f}-{max(values):.1f})"


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="runs/segmentation", help="folder for numbers and image")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=4, help="of every training on pixels")
    parser.add_argument("--host-epochs", type=int, default=6, help="of the host, on classes")
    parser.add_argument("--images", type=int, default=0, help="images of each split; 0 is all")
    add_device(parser)
    options = parser.parse_args()
    rows, models = measure(options)
    out = Path(options.out)
    command = shlex.join(["python", "benchmarks/segmentation.py", *sys.argv[1:]])
    write_json(out / "results.json", {"command": command, "rows": rows})
    draw(out / "segmentation.png", models)
    print(command, "", table(rows), sep="\n")


if __name__ == "__main__":
    main()
