"""Two models side by side: a table, what to make of it in plain words, maps, and all numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.dataset import LabeledDataset, MapDataset, require_order
from ..data.factory import load_data
from ..data.loader import SampleKey, load_batches
from ..evaluation.accuracy import evaluate
from ..evaluation.hardware import describe_machine
from ..evaluation.latency import Cost, benchmark
from ..evaluation.maps import attention_maps, draw_maps
from ..training.config import TrainConfig
from ..training.run import TrainResult
from ..utils.io import atomic_write, write_json
from ..utils.modules import pick_device
from ._console import console

SHOWN = 6  # images on a sheet of maps, each of another class


@dataclass(frozen=True)
class Candidate:
    """One of the two models.

    Args:
        name: What the table calls it.
        top1_percent: Accuracy on the held-out images.
        cost: What it costs.
        history: Rows of metrics of its training here, if it was trained here.
        run: Folder of that training, relative to that of the comparison.
    """

    name: str
    top1_percent: float
    cost: Cost
    history: list[dict[str, Any]] = field(default_factory=list)
    run: str | None = None

    @property
    def train_seconds(self) -> float | None:
        """How long it was trained here."""
        return sum(row["train_seconds"] for row in self.history) if self.history else None


@dataclass(frozen=True)
class ModelComparison:
    """Two models, the second against the first.

    Args:
        pair: The two.
        images: Held-out images that both classified.
        remarks: What else there is to know of how they came to be, in sentences.
    """

    pair: tuple[Candidate, Candidate]
    images: int
    remarks: Sequence[str] = ()

    @property
    def notes(self) -> list[str]:
        """What to make of the numbers, in sentences."""
        return [_accuracy(self), *self.remarks, _speed(self.pair), _MEMORY]


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
_MEMORY = "Memory at inference is set by the blocks before the tokens are learned, so it can stay."


def compare_with_host(config: TrainConfig, result: TrainResult) -> ModelComparison:
    """Compares what `train` made of a host with that host, on the held-out images.

    Prints the table and what to make of it, and writes both to `table.txt` in `config.out`, all
    numbers to `metrics.json`, and where the learned tokens look to `maps.png`.

    Args:
        config: What was trained, with `insert`.
        result: What came of it.

    Raises:
        ValueError: Nothing was inserted, or matplotlib is missing.
    """
    if result.host is None:
        raise ValueError("there is no host to compare with; train with insert, or take the demo")
    check_drawing()
    data = load_data(config, "test")
    names = ("host", f"{config.insert} learned tokens")
    models = dict(zip(names, (result.host, result.model), strict=True))
    console().print("measuring both in turn ...")
    costs = measure_models(models, data)
    top1s = (evaluate(result.host, data).top1_percent, result.history[-1]["test_top1_percent"])
    histories: tuple[list[Any], list[Any]] = ([], result.history)
    host, reduced = (
        Candidate(name, top1, costs[name], history, "." if history else None)
        for name, top1, history in zip(names, top1s, histories, strict=True)
    )
    contest = ModelComparison((host, reduced), len(data), _how(config, result))
    out = Path(config.out)
    write_comparison(out, contest, asdict(config))
    title = "Where the learned tokens look: held-out images"
    data = require_order(data, "list its labels")
    held_out_images(out / "maps.png", result.model, data, one_of_each(data), title)
    return contest


def check_drawing() -> None:
    """Refuses to go on where nothing can be drawn, before any work is done.

    Raises:
        ValueError: matplotlib is missing.
    """
    if find_spec("matplotlib") is None:
        raise ValueError("maps need matplotlib; run pip install 'tokenlearner[train]'")


def measure_models(models: Mapping[str, nn.Module], data: LabeledDataset) -> dict[str, Cost]:
    """Measures models in turn on the first images of a data set, on the models' device."""
    device = next(next(iter(models.values())).parameters()).device
    images, _ = next(data.batches(64))
    return benchmark(models, images.to(device))


def write_comparison(out: Path, contest: ModelComparison, config: Mapping[str, Any]) -> None:
    """Prints the table and the notes; writes both, and all numbers, to files.

    Args:
        out: Folder for `table.txt` and `metrics.json`.
        contest: What to write.
        config: What the two were made by, for `metrics.json`.
    """
    table, notes = _table(str(out), contest.pair), contest.notes
    console().print(table, *notes, sep="\n")
    with atomic_write(out / "table.txt") as temporary, temporary.open("w", encoding="utf-8") as to:
        console(file=to, width=100).print(table, *notes, sep="\n")
    models = [
        {
            "name": contender.name,
            "top1_percent": contender.top1_percent,
            "cost": asdict(contender.cost),
            "epochs": contender.history,
            "run": contender.run,
        }
        for contender in contest.pair
    ]
    environment = describe_machine(pick_device(config.get("device", "auto")))
    write_json(
        out / "metrics.json",
        {"config": dict(config), "environment": environment, "models": models, "notes": notes},
    )


def one_of_each(data: MapDataset) -> list[int]:
    """The first images of up to six classes, spread over all that there are."""
    present = data.labels.unique()
    count = min(SHOWN, len(present))
    labels = present[torch.linspace(0, len(present) - 1, count).round().long()]
    return [int((data.labels == label).nonzero()[0]) for label in labels]


def held_out_images(
    path: Path, model: nn.Module, data: MapDataset, chosen: Sequence[int], title: str
) -> Path:
    """Draws where a model's first learner looks on some images of a data set.

    Args:
        path: The PNG to write.
        model: A model with learned tokens.
        data: Where the images are.
        chosen: Which of them.
        title: What to write above the sheet.
    """
    batch = next(load_batches(data, [[SampleKey(index) for index in chosen]]))
    images, labels = batch.images, batch.labels
    maps = next(iter(attention_maps(model, images.to(next(model.parameters()).device)).values()))
    shares = maps / maps.sum((-2, -1), keepdim=True)  # V1's are gates, which sum to anything
    names = [data.classes[label] for label in labels]
    return draw_maps(path, preprocessed(images, data), shares, names, title)


def preprocessed(images: Tensor, data: LabeledDataset) -> Tensor:
    """Images as a model takes them, `b c h w`, become what they look like, in [0, 1]."""
    mean, std = torch.tensor([data.mean, data.std])[..., None, None]
    return (images * std + mean).clip(0, 1)


def _table(title: str, pair: tuple[Candidate, Candidate]) -> Any:
    from rich.table import Table

    table = Table("", *(contender.name for contender in pair), "ratio", title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for label, value in ROWS:
        first, second = (value(contender) for contender in pair)
        ratio = f"{second / first:.2f}" if first and second and "top-1" not in label else ""
        table.add_row(label, _number(first), _number(second), ratio)
    return table


def _how(config: TrainConfig, result: TrainResult) -> list[str]:
    """What a model on tokens was made of, in sentences."""
    said = []
    if done := result.calibration:
        said.append(
            f"Calibrating: {done.images} images without labels, {done.seconds:.0f} s; what is "
            "missed of the variance of the host's features went from "
            f"{done.error_before:.0%} to {done.error_after:.0%}."
        )
    taught = f", taught by {config.teacher}" if config.teacher else ""
    labels = ", with their labels" if config.label_weight else "; their labels were not used"
    said.append(f"Training: {config.epochs} epochs of {result.images} images{taught}{labels}.")
    return said


def _accuracy(contest: ModelComparison) -> str:
    first, second = contest.pair
    shares = [contender.top1_percent / 100 for contender in contest.pair]
    margin = 196 * math.sqrt(sum(p * (1 - p) / contest.images for p in shares))
    gap = second.top1_percent - first.top1_percent
    verdict = "which is more than chance" if abs(gap) > margin else "which chance could explain"
    return (
        f"Accuracy: {gap:+.1f} points, {verdict} (one seed; 95 % of chance lies within "
        f"±{margin:.1f} for {contest.images} images)."
    )


def _speed(pair: tuple[Candidate, Candidate]) -> str:
    first, second = (contender.cost for contender in pair)
    return (
        f"Speed: {first.gmacs / second.gmacs:.2f} times fewer multiply-adds; inference "
        f"{second.speedup:.2f}, training {second.training_speedup:.2f} times as fast "
        "(quartiles, in turn)."
    )


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.4f}"
