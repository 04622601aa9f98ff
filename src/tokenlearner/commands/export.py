"""An export as a person reads it: what `tokenlearner export` prints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.dataset import LabeledDataset
from ..data.factory import load_data
from ..deploy.exporting import BatchCheck, Exported, export
from ..deploy.formats import SUFFIXES, check_target, load_exported
from ..deploy.quantization import PrecisionRow, precision_rows, weights_mib
from ..utils.validation import check_choice, check_count, require
from ._models import load_sized
from ._tables import plain_table


@dataclass(frozen=True)
class ExportConfig:
    """Writes a model to a file that runs without its code, and compares the two.

    Args:
        model: A name that `create_model` knows, ours or timm's, or a checkpoint of `save_model`.
        out: File to write, in a folder that is there.
        format: What to write, onnx or pt2; auto goes by the ending of the file's name.
        precision: float32, int8, or for pt2 bfloat16.
        batch_size: Images to run model and file on; the file takes any number.
        img_size: Height and width of the images; 0 leaves them as the model has them.
        data: Data set whose held-out images model and file are judged by; empty takes images
            that come with the package, or noise where they do not fit, and judges nothing.
        root: Folder or file in which to look for the data.
        rounds: Timed runs of model and file.
        device: Such as cpu or cuda; auto takes a GPU where there is one.

    Raises:
        ValueError: A value is out of range, or the file cannot be written.
    """

    model: str
    out: str
    format: str = "auto"
    precision: str = "float32"
    batch_size: int = 8
    img_size: int = 0
    data: str = ""
    root: str | None = None
    rounds: int = 10
    device: str = "auto"

    def __post_init__(self) -> None:
        check_choice("format", self.format, ("auto", *(suffix[1:] for suffix in SUFFIXES)))
        check_count("batch_size", self.batch_size)
        check_count("img_size", self.img_size, least=0)
        check_count("rounds", self.rounds, least=2)
        check_target(self.path, self.precision)

    @property
    def path(self) -> Path:
        """The file, with the ending that its format has."""
        path = Path(self.out)
        if self.format == "auto" or path.suffix == f".{self.format}":
            return path
        return path.with_name(f"{path.name}.{self.format}")


def export_table(config: ExportConfig) -> tuple[Any, ...]:
    """Exports a model and gives what to print: lines, and tables for rich.

    Raises:
        ValueError: As `export`, or there is no such model, data or device.
        RuntimeError: As `export`.
    """
    model, size = load_sized(config.model, config.img_size, config.device)
    device = next(model.parameters()).device
    data, images, what = _images(config, size)
    made = export(
        model, config.path, images.to(device), precision=config.precision, rounds=config.rounds
    )
    where = f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    note = (
        f"{config.model} on {what}, {where}. Differences are absolute, to the model in PyTorch "
        f"(eager, float32); ms are medians (quartiles) of {config.rounds} rounds in turn."
    )
    printed: list[Any] = [_sentence(made), _table(COLUMNS_OF_BATCHES, made.checks), note]
    if not any(check.largest_output for check in made.checks):
        printed.append(
            "All outputs are 0, as those of a head that was never trained: nothing was compared."
        )
    if data is not None:
        printed += _judged(model, made, data, images.to(device), config.rounds)
    return tuple(printed)


def _images(config: ExportConfig, size: Sequence[int]) -> tuple[LabeledDataset | None, Tensor, str]:
    """The data to judge by, if any; one batch; and what that is."""
    channels, *frames, height, width = size
    fits = height == width and channels in (1, 3)
    if not config.data:
        if not fits or frames:
            return None, torch.randn(config.batch_size, *size), f"noise, {_times(size)}"
        bundled = load_data("fashion-mnist-small", "test").sample(config.batch_size)
        return None, *_batch(bundled.resized(height, channels), config)
    require(
        fits,
        f"{config.model} takes {_times(size)}, and data are squares of 1 or 3 colors; pass no data",
    )
    wanted = {"img_size": height, "in_chans": channels} | ({"frames": frames[0]} if frames else {})
    data = load_data(config.data, "test", root=config.root, **wanted)
    require(
        list(data.shape) == list(size),
        f"{config.data} gives {_times(data.shape)} and {config.model} takes {_times(size)}; pass "
        "img_size, or other data",
    )
    return data, *_batch(data, config)


def _batch(data: LabeledDataset, config: ExportConfig) -> tuple[Tensor, str]:
    images, _ = next(iter(data.batches(config.batch_size)))
    return images, f"images of {data.name}, {_times(data.shape)}"


def _judged(
    model: nn.Module, made: Exported, data: LabeledDataset, images: Tensor, rounds: int
) -> list[Any]:
    """Model and file side by side on all held-out images."""
    models = {"model": model.eval(), "file": load_exported(made.path, images.device)}
    sizes = {"model": weights_mib(model), "file": made.size_mib}
    rows = precision_rows(models, sizes, data, images, rounds)
    note = f"Top-1 of the {len(data)} held-out images of {data.name}."
    return [_table(COLUMNS_OF_PRECISIONS, rows), note]


def _sentence(made: Exported) -> str:
    takes, gives = (
        ", ".join(f"{name} ({_times(axes)})" for name, axes in told.items())
        for told in (made.inputs, made.outputs)
    )
    return f"{made.path}: {made.precision}, {made.size_mib:.1f} MiB, takes {takes}, gives {gives}"


def _times(axes: Sequence[int | str]) -> str:
    return " x ".join(map(str, axes))


def _table(columns: dict[str, Callable[[Any], str]], rows: Sequence[Any]) -> Any:
    table = plain_table(columns)
    for row in rows:
        table.add_row(*(cell(row) for cell in columns.values()))
    return table


COLUMNS_OF_BATCHES: dict[str, Callable[[BatchCheck], str]] = {
    "batch": lambda check: str(check.batch_size),
    "difference": lambda check: f"{check.largest_difference:.1e}",
    "of at most": lambda check: f"{check.largest_output:.2g}",
    "model, ms": lambda check: f"{check.model_latency_ms:.1f}",
    "file, ms": lambda check: f"{check.latency_ms:.1f}",
    "speed-up": lambda check: f"{check.speedup.median:.2f}",
}
COLUMNS_OF_PRECISIONS: dict[str, Callable[[PrecisionRow], str]] = {
    "": lambda row: row.precision,
    "top-1, %": lambda row: "–" if row.top1_percent is None else f"{row.top1_percent:.2f}",
    "difference": lambda row: f"{row.largest_difference:.1e}",
    "ms a batch": lambda row: f"{row.latency_ms:.1f}",
    "speed-up": lambda row: f"{row.speedup.median:.2f}",
    "MiB": lambda row: f"{row.size_mib:.1f}",
}
