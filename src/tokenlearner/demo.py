"""The main job on real pictures: a small ViT against the same ViT on a few learned tokens."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .benchmark import Cost, Spread, benchmark
from .checks import check_count
from .data import ImageDataset, load_data
from .files import free_folder, write_json, written_whole
from .maps import attention_maps, draw_maps
from .progress import console, training_progress
from .train import TrainConfig, TrainResult, train

PHOTOGRAPHS = ("astronaut", "coffee")  # scikit-image's, public domain and CC0
PHOTOGRAPH_SIDE = 112


@dataclass(frozen=True)
class DemoConfig:
    """What the demo trains; both models get the same pictures, recipe and seed.

    Args:
        out: Folder for what it makes; if it exists, the next free name is taken.
        tokens: Learned tokens.
        at: Block in front of which they are learned, or a share of the depth.
        epochs: Passes over the training pictures.
        seed: Of the weights and of the pictures' order.

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


@dataclass(frozen=True)
class Contender:
    """One of the two models, what its training left and what it costs."""

    name: str
    result: TrainResult
    cost: Cost

    @property
    def top1_percent(self) -> float:
        """Accuracy on the held-out pictures after the last epoch."""
        return self.result.history[-1]["test_top1_percent"]


def demo(config: DemoConfig) -> Path:
    """Trains a ViT with and without learned tokens, compares them and draws what was learned.

    Writes both checkpoints, `metrics.json`, `table.txt`, `curves.png` and two sheets of maps.

    Args:
        config: What to train.

    Returns:
        The folder with everything in it.

    Raises:
        ValueError: An option does not fit, or a package of the `demo` extra is missing.
    """
    photographs = load_photographs()
    out = free_folder(config.out)
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
    images, _ = next(held_out.batches(64))
    costs = benchmark({name: run.model for name, run in runs.items()}, images)
    plain, learned = (Contender(name, runs[name], costs[name]) for name in names.values())
    _draw(out, learned, held_out, photographs)
    _draw_curves(out / "curves.png", (plain, learned))
    _write(out, config, (plain, learned), len(held_out))
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
    out: Path, learned: Contender, held_out: ImageDataset, photographs: dict[str, Tensor]
) -> None:
    """Draws the maps on one test picture of each of six classes, and on the photographs."""
    chosen = [int((held_out.labels == label).nonzero()[0]) for label in (0, 1, 3, 5, 8, 9)]
    images = held_out.images[chosen].float() / 255
    names = [held_out.classes[label] for label in held_out.labels[chosen]]
    model = learned.result.model.cpu()
    title = "Where the learned tokens look: held-out pictures"
    draw_maps(out / "maps-clothes.png", images, _maps(model, images, held_out), names, title)
    large: Any = copy.deepcopy(model)
    large.set_input_size((PHOTOGRAPH_SIDE, PHOTOGRAPH_SIDE))
    pictures = torch.stack(list(photographs.values()))
    maps = _maps(large, pictures.mean(1, keepdim=True), held_out)
    title = (
        f"The same weights on photographs of {PHOTOGRAPH_SIDE} x {PHOTOGRAPH_SIDE}, a kind unseen"
    )
    draw_maps(out / "maps-photographs.png", pictures, maps, list(photographs), title)


def _maps(model: nn.Module, pictures: Tensor, data: ImageDataset) -> Tensor:
    [maps] = attention_maps(model, (pictures - data.mean[0]) / data.std[0]).values()
    return maps


def _draw_curves(path: Path, contenders: tuple[Contender, ...]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    by_time, loss = figure.subplots(1, 2)
    for contender, marker in zip(contenders, ("o-", "s--"), strict=True):
        rows = contender.result.history
        seconds = list(accumulate(row["train_seconds"] for row in rows))
        by_time.plot(seconds, [r["test_top1_percent"] for r in rows], marker, label=contender.name)
        epochs = [row["epoch"] for row in rows]
        loss.plot(epochs, [row["train_loss"] for row in rows], marker, label=contender.name)
    by_time.set(xlabel="seconds of training", ylabel="top-1 on held-out pictures, %")
    loss.set(xlabel="epoch", ylabel="training loss, nats", xticks=epochs)
    for axis in (by_time, loss):
        axis.grid(alpha=0.3)
        axis.legend()
    with written_whole(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))


def _write(out: Path, config: DemoConfig, pair: tuple[Contender, Contender], images: int) -> None:
    """Prints the table and what to make of it; writes both, and all numbers, to files."""
    from rich.table import Table

    table = Table("", *(contender.name for contender in pair), "ratio", title=str(out))
    for column in table.columns[1:]:
        column.justify = "right"
    for label, value in ROWS:
        first, second = (value(contender) for contender in pair)
        ratio = "" if "top-1" in label else f"{second / first:.2f}"
        table.add_row(label, _number(first), _number(second), ratio)
    notes = _notes(pair, images)
    console().print(table, *notes, sep="\n")
    with written_whole(out / "table.txt") as temporary, temporary.open("w", encoding="utf-8") as to:
        console(file=to, width=100).print(table, *notes, sep="\n")
    models = [{"name": c.name, "cost": asdict(c.cost), "epochs": c.result.history} for c in pair]
    environment = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    write_json(
        out / "metrics.json",
        {"config": asdict(config), "environment": environment, "models": models, "notes": notes},
    )


ROWS: tuple[tuple[str, Callable[[Contender], float]], ...] = (
    ("top-1 on held-out pictures, %", lambda c: c.top1_percent),
    ("GMACs a picture", lambda c: c.cost.gmacs),
    ("images/s, inference", lambda c: c.cost.images_per_second.median),
    ("images/s, forward and backward", lambda c: c.cost.training_images_per_second.median),
    ("seconds of training", lambda c: sum(row["train_seconds"] for row in c.result.history)),
    ("peak memory, inference, MiB", lambda c: c.cost.peak_memory_mib),
    ("peak memory, training, MiB", lambda c: c.cost.training_peak_memory_mib),
    ("parameters", lambda c: c.cost.parameters),
)


def _notes(pair: tuple[Contender, Contender], images: int) -> list[str]:
    plain, learned = pair
    shares = [contender.top1_percent / 100 for contender in pair]
    margin = 196 * math.sqrt(sum(p * (1 - p) / images for p in shares))
    gap = learned.top1_percent - plain.top1_percent
    verdict = "which is more than chance" if abs(gap) > margin else "which chance could explain"
    macs = plain.cost.gmacs / learned.cost.gmacs
    last = [c.top1_percent - c.result.history[-2]["test_top1_percent"] for c in pair]
    return [
        f"Accuracy: {gap:+.1f} points, {verdict} (one seed; 95 % of chance lies within "
        f"±{margin:.1f} for {images} pictures).",
        f"Training: short; the last epoch still changed them by {last[0]:+.1f} and {last[1]:+.1f} "
        "points, so a longer one (--epochs) may close the gap or widen it.",
        f"Speed: {macs:.2f} times fewer multiply-adds; inference {_spread(learned.cost.speedup)}, "
        f"training {_spread(learned.cost.training_speedup)} times as fast (quartiles, in turn).",
        "Memory at inference is set by the blocks before the tokens are learned, so it can stay.",
    ]


def _spread(spread: Spread) -> str:
    return f"{spread.median:.2f} ({spread.low:.2f} to {spread.high:.2f})"


def _number(value: float) -> str:
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.4f}"
