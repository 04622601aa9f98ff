"""The main job on real images: a small ViT against the same ViT on a few learned tokens."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.factory import ImageDataset, load_data
from ..evaluation.maps import attention_maps, draw_maps
from ..training.config import TrainConfig
from ..training.run import TrainResult, train
from ..utils.io import atomic_write, unique_path
from ..utils.validation import check_count
from ._comparison import (
    Candidate,
    ModelComparison,
    check_drawing,
    held_out_images,
    measure_models,
    write_comparison,
)
from ._console import console, training_progress
from .report.render import write_report

PHOTOGRAPHS = ("astronaut", "coffee")  # scikit-image's, public domain and CC0
PHOTOGRAPH_SIDE = 112


@dataclass(frozen=True)
class DemoConfig:
    """What the demo trains; both models get the same images, recipe and seed.

    Args:
        out: Folder for what it makes; if it exists, the next free name is taken.
        tokens: Learned tokens.
        at: Block in front of which they are learned, or a share of the depth.
        epochs: Passes over the training images.
        seed: Of the weights and of the images' order.

    Raises:
        ValueError: A number is out of range.
    """

    out: str = "tokenlearner-demo"
    tokens: int = 8
    at: int | float = 0.5
    epochs: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("tokens", self.tokens)
        check_count("epochs", self.epochs, least=2)


def demo(config: DemoConfig) -> Path:
    """Trains a ViT with and without learned tokens, compares them and draws what was learned.

    Writes both checkpoints, `metrics.json`, `table.txt`, `curves.png`, two sheets of maps, and
    `report.html` with all of it.

    Args:
        config: What to train.

    Returns:
        The folder with everything in it.

    Raises:
        ValueError: An option does not fit, or a package of the `demo` extra is missing.
    """
    check_drawing()
    photographs = load_photographs()
    out = unique_path(config.out)
    held_out = load_data("fashion-mnist-small", "test")
    runs: dict[str, TrainResult] = {}
    names = {"vit": "ViT", f"vit-tl{config.tokens}": f"ViT, {config.tokens} learned tokens"}
    for (folder, name), tokens in zip(names.items(), (0, config.tokens), strict=True):
        recipe = TrainConfig(
            out=str(out / folder),
            num_tokens=tokens,
            at=config.at,
            epochs=config.epochs,
            seed=config.seed,
            lr=2e-3,
        )
        with training_progress(f"training {name}") as report:
            runs[name] = train(recipe, report)
    console().print("measuring both in turn ...")
    costs = measure_models({name: run.model for name, run in runs.items()}, held_out)
    plain, learned = (
        Candidate(name, run.history[-1]["test_top1_percent"], costs[name], run.history, folder)
        for (folder, name), run in zip(names.items(), runs.values(), strict=True)
    )
    _draw(out, runs[learned.name].model, held_out, photographs)
    _draw_curves(out / "curves.png", (plain, learned))
    contest = ModelComparison((plain, learned), len(held_out), [_training((plain, learned))])
    write_comparison(out, contest, asdict(config))
    console().print("judging both once more for the report ...")
    write_report(out, title="tokenlearner demo")
    return out


def load_photographs() -> dict[str, Tensor]:
    """Reads two photographs that scikit-image ships, as `[3, 112, 112]` in [0, 1].

    Raises:
        ValueError: scikit-image is missing.
    """
    try:
        import skimage.data
    except ImportError as error:
        message = "the demo needs scikit-image; run pip install 'tokenlearner[demo]'"
        raise ValueError(message) from error
    photographs = {}
    for name in PHOTOGRAPHS:
        pixels = torch.from_numpy(getattr(skimage.data, name)()).permute(2, 0, 1).float() / 255
        side = min(pixels.shape[1:])
        top, left = ((size - side) // 2 for size in pixels.shape[1:])
        square = pixels[None, :, top : top + side, left : left + side]
        size = (PHOTOGRAPH_SIDE, PHOTOGRAPH_SIDE)
        photographs[name] = F.interpolate(square, size, mode="area")[0]
    return photographs


def _draw(
    out: Path, model: nn.Module, held_out: ImageDataset, photographs: dict[str, Tensor]
) -> None:
    """Draws the maps on one test image of each of six classes, and on the photographs."""
    chosen = [int((held_out.labels == label).nonzero()[0]) for label in (0, 1, 3, 5, 8, 9)]
    title = "Where the learned tokens look: held-out images"
    held_out_images(out / "maps-clothes.png", model, held_out, chosen, title)
    large: Any = copy.deepcopy(model).cpu()
    large.set_input_size((PHOTOGRAPH_SIDE, PHOTOGRAPH_SIDE))
    images = torch.stack(list(photographs.values()))
    gray = (images.mean(1, keepdim=True) - held_out.mean[0]) / held_out.std[0]
    [maps] = attention_maps(large, gray).values()
    title = (
        f"The same weights on photographs of {PHOTOGRAPH_SIDE} x {PHOTOGRAPH_SIDE}, a kind unseen"
    )
    draw_maps(out / "maps-photographs.png", images, maps, list(photographs), title)


def _draw_curves(path: Path, contenders: tuple[Candidate, ...]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    by_time, loss = figure.subplots(1, 2)
    for contender, marker in zip(contenders, ("o-", "s--"), strict=True):
        rows = contender.history
        seconds = list(accumulate(row["train_seconds"] for row in rows))
        by_time.plot(seconds, [r["test_top1_percent"] for r in rows], marker, label=contender.name)
        epochs = [row["epoch"] for row in rows]
        loss.plot(epochs, [row["train_loss"] for row in rows], marker, label=contender.name)
    by_time.set(xlabel="seconds of training", ylabel="top-1 on held-out images, %")
    loss.set(xlabel="epoch", ylabel="training loss, nats", xticks=epochs)
    for axis in (by_time, loss):
        axis.grid(alpha=0.3)
        axis.legend()
    with atomic_write(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))


def _training(pair: tuple[Candidate, Candidate]) -> str:
    last = [c.top1_percent - c.history[-2]["test_top1_percent"] for c in pair]
    return (
        f"Training: short; the last epoch still changed them by {last[0]:+.1f} and {last[1]:+.1f} "
        "points, so a longer one (--epochs) may close the gap or widen it."
    )
