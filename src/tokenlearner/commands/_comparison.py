"""Two models side by side: a table, notes, maps, and all numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.dataset import LabeledDataset, MapDataset, require_order
from ..data.loader import SampleKey, load_batches
from ..evaluation.accuracy import evaluate
from ..evaluation.hardware import describe_machine
from ..evaluation.latency import Cost, benchmark
from ..evaluation.maps import attention_maps, draw_maps
from ..training.config import TrainConfig
from ..training.run import TrainResult
from ..utils.imports import require_package
from ..utils.io import atomic_write, write_json
from ..utils.modules import pick_device
from ..utils.preprocessing import Preprocessing
from ._console import console
from ._tables import in_unit, plain_table

BATCH_SIZE = 64  # images that speed and memory are measured on
MAX_IMAGES = 6  # on a figure of maps, each of another class


@dataclass(frozen=True)
class Candidate:
    """One of the two models.

    Args:
        name: Its column in the table.
        top1_percent: Accuracy on the held-out images.
        cost: As `benchmark` measures it.
        history: Rows of metrics of its training; empty if it was not trained here.
        run: Folder of that training, relative to that of the comparison.
    """

    name: str
    top1_percent: float
    cost: Cost
    history: list[dict[str, Any]] = field(default_factory=list)
    run: str | None = None

    @property
    def train_seconds(self) -> float | None:
        """Seconds of its training, if it was trained here."""
        return sum(row["train_seconds"] for row in self.history) if self.history else None


@dataclass(frozen=True)
class ModelComparison:
    """Two models, the second against the first.

    Args:
        pair: The two.
        images: Number of held-out images that both classified.
        remarks: Notes on how they were trained.
        unit: What was classified, images or clips.
    """

    pair: tuple[Candidate, Candidate]
    images: int
    remarks: Sequence[str] = ()
    unit: str = "images"

    @property
    def notes(self) -> list[str]:
        """Returns notes below the table: the accuracy's error, and how the models were trained."""
        shares = [candidate.top1_percent / 100 for candidate in self.pair]
        margin = 196 * math.sqrt(sum(p * (1 - p) / self.images for p in shares))
        gap = 100 * (shares[1] - shares[0])
        error = f"may be chance within ±{margin:.1f} (95 %, {self.images} {self.unit}, one seed)"
        return [f"Accuracy: {gap:+.1f} points; {error}.", *self.remarks]


ROWS: tuple[tuple[str, Callable[[Candidate], float | None]], ...] = (
    ("top-1 on held-out images, %", lambda c: c.top1_percent),
    ("GMACs an image", lambda c: c.cost.gmacs),
    ("images/s, inference", lambda c: c.cost.images_per_second.median),
    ("images/s, forward and backward", lambda c: c.cost.training_images_per_second.median),
    ("seconds of training", lambda c: c.train_seconds),
    ("peak memory, inference, MiB", lambda c: c.cost.peak_memory_mib),
    ("peak memory, training, MiB", lambda c: c.cost.training_peak_memory_mib),
    ("parameters", lambda c: c.cost.parameters),
)


def compare_with_host(config: TrainConfig, result: TrainResult) -> ModelComparison:
    """Compares the model that `train` made of a host with that host, on the held-out images.

    Prints the table and the notes, and writes both to `table.txt` in `config.out`, all numbers to
    `metrics.json`, and where the learned tokens look to `maps.png`.

    Args:
        config: Of the training, with `insert`.
        result: Of the training.

    Raises:
        ValueError: Nothing was inserted, or matplotlib is missing.
    """
    if result.host is None:
        raise ValueError("there is no host to compare with; train with insert, or run the demo")
    require_package("matplotlib", "train", "drawing maps")
    data = result.held_out
    models = {"host": result.host, f"{config.insert} learned tokens": result.model}
    comparison = compare_models(
        models,
        data,
        ([], result.history),
        (None, "."),
        _training(config, result),
        (-1, result.kept),
    )
    out = Path(config.out)
    write_comparison(out, comparison, asdict(config))
    data = require_order(data, "list its labels")
    title = f"Where the learned tokens look: held-out {config.unit}"
    held_out_images(out / "maps.png", result.model, data, one_of_each(data), title)
    return comparison


def compare_models(
    models: Mapping[str, nn.Module],
    data: LabeledDataset,
    histories: Sequence[list[dict[str, Any]]],
    runs: Sequence[str | None],
    remarks: Sequence[str] = (),
    kept: Sequence[int] = (-1, -1),
) -> ModelComparison:
    """Measures two models, interleaved, on their device.

    Args:
        models: Names and models.
        data: Held-out images; a model without a history is evaluated on them.
        histories: Rows of metrics of each model's training.
        runs: Folder of each training, as in `Candidate`.
        remarks: As in `ModelComparison`.
        kept: Index of each model's row in its history.
    """
    console().print("measuring both, interleaved ...")
    images, _ = next(data.batches(BATCH_SIZE))
    device = next(next(iter(models.values())).parameters()).device
    costs = benchmark(models, images.to(device))
    first, second = (
        Candidate(name, _top1(model, data, history, row), costs[name], history, run)
        for (name, model), history, run, row in zip(
            models.items(), histories, runs, kept, strict=True
        )
    )
    return ModelComparison((first, second), len(data), remarks, _unit(images))


def _unit(images: Tensor) -> str:
    return "clips" if images.ndim > 4 else "images"


def _top1(model: nn.Module, data: LabeledDataset, history: Sequence[Any], row: int) -> float:
    return history[row]["test_top1_percent"] if history else evaluate(model, data).top1_percent


def write_comparison(out: Path, comparison: ModelComparison, config: Mapping[str, Any]) -> None:
    """Prints the table and the notes; writes both, and all numbers, to files.

    Args:
        out: Folder for `table.txt` and `metrics.json`.
        comparison: The two models and their numbers.
        config: Options that both were made by, for `metrics.json`.
    """
    table, notes = comparison_table(comparison, str(out)), comparison.notes
    console().print(table, *notes, sep="\n")
    with atomic_write(out / "table.txt") as temporary, temporary.open("w", encoding="utf-8") as to:
        console(file=to, width=100).print(table, *notes, sep="\n")
    models = [
        {
            "name": candidate.name,
            "top1_percent": candidate.top1_percent,
            "cost": asdict(candidate.cost),
            "epochs": candidate.history,
            "run": candidate.run,
        }
        for candidate in comparison.pair
    ]
    environment = describe_machine(pick_device(config.get("device", "auto")))
    write_json(
        out / "metrics.json",
        {"config": dict(config), "environment": environment, "models": models, "notes": notes},
    )


def comparison_table(comparison: ModelComparison, title: str) -> Any:
    """Returns a table for rich: a row for each number, a column for each model, and ratios.

    The ratios of speeds are medians of interleaved rounds, with their quartiles.
    """
    pair = comparison.pair
    table = plain_table(("", *(candidate.name for candidate in pair), "ratio"))
    table.title, table.columns[0].justify = title, "left"
    speedups = {
        "images/s, inference": pair[1].cost.speedup,
        "images/s, forward and backward": pair[1].cost.training_speedup,
    }
    for label, value in ROWS:
        first, second = map(value, pair)
        ratio = f"{second / first:.2f}" if first and second and "top-1" not in label else ""
        if label in speedups:
            ratio = f"{speedups[label]:.2f}"
        table.add_row(in_unit(label, comparison.unit), _number(first), _number(second), ratio)
    return table


def one_of_each(data: MapDataset) -> list[int]:
    """Returns the first images of up to six classes, spread over all that there are."""
    present = data.labels.unique()
    count = min(MAX_IMAGES, len(present))
    labels = present[torch.linspace(0, len(present) - 1, count).round().long()]
    return [int((data.labels == label).nonzero()[0]) for label in labels]


def held_out_images(
    path: Path, model: nn.Module, data: MapDataset, indices: Sequence[int], title: str
) -> Path:
    """Draws where a model's first learner looks on some images of a data set.

    Args:
        path: The PNG to write.
        model: A model with learned tokens.
        data: The data set.
        indices: Of the images.
        title: Text above the figure.
    """
    batch = next(load_batches(data, [[SampleKey(index) for index in indices]]))
    images, labels = batch.images, batch.labels
    maps = next(iter(attention_maps(model, images.to(next(model.parameters()).device)).values()))
    shares = maps / maps.sum((-2, -1), keepdim=True)  # V1's are gates, which sum to anything
    names = [data.classes[label] for label in labels]
    return draw_maps(path, denormalized(images, data), shares, names, title)


def denormalized(images: Tensor, data: LabeledDataset | Preprocessing) -> Tensor:
    """Turns images as a model takes them, `b c h w`, into pixels in [0, 1], by a mean and std."""
    mean, std = torch.tensor([data.mean, data.std])[..., None, None]
    return (images * std + mean).clip(0, 1)


def _training(config: TrainConfig, result: TrainResult) -> list[str]:
    """Returns notes on how a model with inserted tokens was trained."""
    notes, unit = [], config.unit
    if done := result.calibration:
        notes.append(
            f"Calibration: {done.images} {unit} without labels, {done.seconds:.0f} s; unexplained "
            f"variance of the host's output on {done.held_out} others {done.error_before:.0%} "
            f"before, {done.error_after:.0%} after."
        )
    teacher = f", distilled from {config.teacher}" if config.teacher else ""
    labels = "with labels" if config.label_weight else "without labels"
    last = result.history[-1]
    length = f"{last['epoch']} epochs of {result.images} {unit}"
    if config.steps:
        length = f"{last['step']} steps of {config.batch_size}, drawn from {result.images} {unit}"
    return [*notes, f"Training: {length}{teacher}, {labels}."]


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.4f}"
