"""The main job on real images: a small ViT against the same ViT on a few learned tokens."""

from __future__ import annotations

import copy
from collections.abc import Sequence
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
from ..utils.imports import require_package
from ..utils.io import atomic_write, check_output_folder, unique_path
from ..utils.validation import check_count
from ._arguments import read_config
from ._comparison import Candidate, compare_models, held_out_images, write_comparison
from ._console import console, say, training_progress
from .main import next_commands
from .report.render import write_report

PHOTOGRAPHS = ("astronaut", "coffee")  # scikit-image's, public domain and CC0
PHOTOGRAPH_SIDE = 112


@dataclass(frozen=True)
class DemoConfig:
    """Options of what the demo trains; both models get the same images, recipe and seed.

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
    require_package("matplotlib", "train", "drawing maps")
    photographs = load_photographs()
    out = check_output_folder(unique_path(config.out))
    held_out = load_data("fashion-mnist-small", "test")
    runs: dict[str, TrainResult] = {}
    names = {"vit": "ViT", f"vit-tl{config.tokens}": f"ViT, {config.tokens} learned tokens"}
    for (folder, name), tokens in zip(names.items(), (0, config.tokens), strict=True):
        train_config = TrainConfig(
            out=str(out / folder),
            num_tokens=tokens,
            at=config.at,
            epochs=config.epochs,
            seed=config.seed,
            lr=2e-3,
        )
        with training_progress(f"training {name}") as report:
            runs[name] = train(train_config, report)
    models = {name: run.model for name, run in runs.items()}
    histories = [run.history for run in runs.values()]
    comparison = compare_models(models, held_out, histories, [*names], [_last_epoch(histories)])
    _draw(out, [*models.values()][1], held_out, photographs)
    _draw_curves(out / "curves.png", comparison.pair)
    write_comparison(out, comparison, asdict(config))
    console().print("evaluating both once more for the report ...")
    write_report(out, title="tokenlearner demo")
    return out


def demo_command(arguments: Sequence[str]) -> None:
    """Runs `tokenlearner demo`."""
    config = read_config("demo", DemoConfig, arguments)
    say(f"Trains a small ViT with and without {config.tokens} learned tokens on bundled images,")
    say("compares the two and draws where the tokens look; on two processors about 2 minutes.")
    out = demo(config)
    say(f"Everything is in {out}")
    say(f"The report is {out / 'report.html'}")
    print(f"Next, with images of yours:\n{next_commands()}", end="")


def load_photographs() -> dict[str, Tensor]:
    """Reads two photographs that scikit-image ships, as `[3, 112, 112]` in [0, 1].

    Raises:
        ValueError: scikit-image is missing.
    """
    data = require_package("skimage.data", "demo", "the demo")
    photographs = {}
    for name in PHOTOGRAPHS:
        pixels = torch.from_numpy(getattr(data, name)()).permute(2, 0, 1).float() / 255
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
    indices = [int((held_out.labels == label).nonzero()[0]) for label in (0, 1, 3, 5, 8, 9)]
    title = "Where the learned tokens look: held-out images"
    held_out_images(out / "maps-clothes.png", model, held_out, indices, title)
    large: Any = copy.deepcopy(model).cpu()
    large.set_input_size((PHOTOGRAPH_SIDE, PHOTOGRAPH_SIDE))
    images = torch.stack(list(photographs.values()))
    gray = (images.mean(1, keepdim=True) - held_out.mean[0]) / held_out.std[0]
    [maps] = attention_maps(large, gray).values()
    size = f"{PHOTOGRAPH_SIDE} x {PHOTOGRAPH_SIDE}"
    title = f"The same weights on photographs of {size}, unlike the images of the training"
    draw_maps(out / "maps-photographs.png", images, maps, list(photographs), title)


def _draw_curves(path: Path, candidates: tuple[Candidate, ...]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    by_time, loss = figure.subplots(1, 2)
    for candidate, marker in zip(candidates, ("o-", "s--"), strict=True):
        rows = candidate.history
        seconds = list(accumulate(row["train_seconds"] for row in rows))
        by_time.plot(seconds, [r["test_top1_percent"] for r in rows], marker, label=candidate.name)
        epochs = [row["epoch"] for row in rows]
        loss.plot(epochs, [row["train_loss"] for row in rows], marker, label=candidate.name)
    by_time.set(xlabel="seconds of training", ylabel="top-1 on held-out images, %")
    loss.set(xlabel="epoch", ylabel="training loss, nats", xticks=epochs)
    for axis in (by_time, loss):
        axis.grid(alpha=0.3)
        axis.legend()
    with atomic_write(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))


def _last_epoch(histories: Sequence[list[dict[str, Any]]]) -> str:
    last = [rows[-1]["test_top1_percent"] - rows[-2]["test_top1_percent"] for rows in histories]
    return f"Training: short; the last epoch changed accuracy by {last[0]:+.1f} and {last[1]:+.1f}."
