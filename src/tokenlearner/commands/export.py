"""`tokenlearner export`: a model as a file, compared with the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..data.config import DataConfig
from ..data.dataset import LabeledDataset
from ..data.factory import load_data
from ..deploy.exporting import BatchCheck, export
from ..deploy.formats import check_target, load_exported
from ..deploy.quantization import PrecisionRow, precision_rows, weights_mib
from ..models.preprocessing import get_preprocessing
from ..utils.validation import check_count, check_literals, counted, require
from ._arguments import read_config
from ._console import console, show_progress
from ._models import load_sized
from ._runs import preprocessed
from ._tables import filled_table


@dataclass(frozen=True)
class ExportConfig:
    """Writes a model to a file that runs without its code, and compares the two.

    Args:
        model: A name that `create_model` knows, ours or timm's, or a checkpoint of `save_model`.
        out: File to write, in a folder that is there.
        format: What to write; auto goes by the ending of the file's name.
        precision: Of the file; bfloat16 is for pt2 only.
        batch_size: Images to run model and file on; the file takes any number.
        img_size: Height and width of the images; 0 leaves them as the model has them.
        data: Data set on whose held-out images model and file are evaluated; empty takes images
            that come with the package, or noise where they do not fit, and evaluates nothing.
        root: Folder or file in which to look for the data.
        rounds: Timed runs of model and file.
        device: Such as cpu or cuda; auto takes a GPU where there is one.

    Raises:
        ValueError: A value is out of range, or the file cannot be written.
    """

    model: str
    out: str
    format: Literal["auto", "onnx", "pt2"] = "auto"
    precision: Literal["float32", "bfloat16", "int8"] = "float32"
    batch_size: int = 8
    img_size: int = 0
    data: str = ""
    root: str | None = None
    rounds: int = 10
    device: str = "auto"

    def __post_init__(self) -> None:
        check_literals(self)
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


def export_command(arguments: Sequence[str]) -> None:
    """Writes a model to a file and prints how it compares with the model."""
    console().print(*export_table(read_config("export", ExportConfig, arguments)), sep="\n")


def export_table(config: ExportConfig) -> tuple[Any, ...]:
    """Exports a model and returns what to print: lines, and tables for rich.

    Raises:
        ValueError: As `export`, or there is no such model, data or device.
        RuntimeError: As `export`.
    """
    model, size = load_sized(config.model, config.img_size, config.device)
    device = next(model.parameters()).device
    data, images, source = _images(config, model, size)
    images = images.to(device)
    options: dict[str, Any] = {"precision": config.precision, "rounds": config.rounds}
    with show_progress(f"writing {config.path} and comparing it with {config.model}"):
        exported = export(model, config.path, images, **options)
    setting = f"{device}, {counted(torch.get_num_threads(), 'thread')}, torch {torch.__version__}"
    printed: list[Any] = [
        f"{exported.path}: {exported.precision}, {exported.size_mib:.1f} MiB, takes "
        f"{_ends(exported.inputs)}, gives {_ends(exported.outputs)}",
        filled_table(BATCH_COLUMNS, exported.checks),
        f"{config.model} on {source}, {setting}. Differences are absolute, to the model in PyTorch "
        f"(eager, float32); ms are medians (quartiles) of {config.rounds} interleaved rounds.",
    ]
    if not any(check.largest_output for check in exported.checks):
        printed.append(
            "All outputs are 0, as those of a head that was never trained: nothing was compared."
        )
    if data is not None:
        models = {"model": model.eval(), "file": load_exported(exported.path, device)}
        sizes = {"model": weights_mib(model), "file": exported.size_mib}
        with show_progress(f"evaluating both on {data.name}"):
            rows = precision_rows(models, sizes, data, images, config.rounds)
        note = f"Top-1 of the {len(data)} held-out images of {data.name}."
        printed += [filled_table(PRECISION_COLUMNS, rows), note]
    return tuple(printed)


def _images(
    config: ExportConfig, model: nn.Module, size: Sequence[int]
) -> tuple[LabeledDataset | None, Tensor, str]:
    """Returns the data to evaluate on, if any; one batch; and a description of the batch."""
    channels, *frames, height, width = size
    fits = height == width and channels in (1, 3)
    data = evaluated = None
    if config.data:
        require(
            fits,
            f"{config.model} takes {_times(size)}, expected squares of 1 or 3 colors; pass no data",
        )
        kwargs: dict[str, Any] = {"img_size": height, "in_chans": channels, "workers": 0}
        kwargs |= {"frames": frames[0]} if frames else {}
        options = DataConfig(config.data, config.root, **kwargs)
        data = evaluated = preprocessed(load_data(options, "val"), model, options, config.model)
        require(
            list(data.shape) == list(size),
            f"{config.data} gives {_times(data.shape)} and {config.model} takes {_times(size)}; "
            "pass img_size, or other data",
        )
    elif fits and not frames:
        bundled = load_data("fashion-mnist-small", "test").sample(config.batch_size)
        data = bundled.resized(height, channels)  # whose classes do not matter
        if found := get_preprocessing(model, channels):
            data = data.with_preprocessing(**found.to_kwargs())
    if data is None:
        return None, torch.randn(config.batch_size, *size), f"noise, {_times(size)}"
    images, _ = next(iter(data.batches(config.batch_size)))
    return evaluated, images, f"images of {data.name}, {_times(data.shape)}"


def _ends(axes: dict[str, tuple[int | str, ...]]) -> str:
    """Formats the names and shapes of inputs or outputs."""
    return ", ".join(f"{name} ({_times(shape)})" for name, shape in axes.items())


def _times(axes: Sequence[int | str]) -> str:
    return " x ".join(map(str, axes))


BATCH_COLUMNS: dict[str, Callable[[BatchCheck], str]] = {
    "batch": lambda check: str(check.batch_size),
    "difference": lambda check: f"{check.largest_difference:.1e}",
    "largest output": lambda check: f"{check.largest_output:.2g}",
    "model, ms": lambda check: f"{check.model_latency_ms:.1f}",
    "file, ms": lambda check: f"{check.latency_ms:.1f}",
    "speed-up": lambda check: f"{check.speedup.median:.2f}",
}
PRECISION_COLUMNS: dict[str, Callable[[PrecisionRow], str]] = {
    "": lambda row: row.precision,
    "top-1, %": lambda row: "–" if row.top1_percent is None else f"{row.top1_percent:.2f}",
    "difference": lambda row: f"{row.largest_difference:.1e}",
    "ms a batch": lambda row: f"{row.latency_ms:.1f}",
    "speed-up": lambda row: f"{row.speedup.median:.2f}",
    "MiB": lambda row: f"{row.size_mib:.1f}",
}
